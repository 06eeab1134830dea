//! What kinds of device there are. To the VMM they differ in this table and nowhere else.
//!
//! A row says how a class looks on PCI, how many queues are sensible when nobody asks for more, and how long its
//! configuration space is. A class that is not here works too: `--device NAME,id=N,queues=Q,socket=PATH`.

use std::ops::RangeInclusive;

/// A row.
#[derive(Debug)]
pub struct Class {
    /// As in `class=NAME`.
    pub name: &'static str,
    /// Virtio's number for it.
    pub id: u16,
    /// PCI base class, subclass and interface.
    pub pci: u32,
    /// Queues, if the backend has that many and nobody asked for another number.
    pub queues: u16,
    /// Bytes of configuration space that every backend of this class knows.
    pub config: u16,
    /// Features that make it longer, and how long: a driver that knows one of them reads up to there, and Linux's stops the guest
    /// where there is less.
    pub longer: &'static [(u64, u16)],
    /// Configuration that depends on what the driver has selected in its first two bytes.
    pub selectors: &'static [Selector],
    /// Configuration for backends that keep none.
    pub fallback: Option<Fallback>,
}

/// The first byte, and the values of the second one for which there may be an answer.
pub type Selector = (u8, RangeInclusive<u8>);
/// Makes a configuration space from the device's name and number of queues.
pub type Fallback = fn(&str, u16) -> Vec<u8>;

const PLAIN: Class =
    Class { name: "", id: 0, pci: 0xff_0000, queues: 1, config: 256, longer: &[], selectors: &[], fallback: None };

/// The table.
pub static CLASSES: [Class; 10] = [
    Class { name: "net", id: 1, pci: 0x02_0000, queues: 2, config: 12, ..PLAIN },
    // Up to and with write-zeroes: what all backends have.
    Class { name: "blk", id: 2, pci: 0x01_8000, queues: 1, config: 60, longer: &BLK, ..PLAIN },
    Class { name: "console", id: 3, pci: 0x07_8000, queues: 4, config: 12, ..PLAIN },
    Class { name: "rng", id: 4, pci: 0x00_ff00, queues: 1, config: 0, ..PLAIN },
    Class { name: "balloon", id: 5, pci: 0x00_ff00, queues: 5, config: 16, ..PLAIN },
    Class { name: "gpu", id: 16, pci: 0x03_8000, queues: 2, config: 16, ..PLAIN },
    Class { name: "input", id: 18, pci: 0x09_8000, queues: 2, config: 136, selectors: &INPUT, ..PLAIN },
    Class { name: "vsock", id: 19, pci: 0x02_8000, queues: 3, config: 8, ..PLAIN },
    Class { name: "snd", id: 25, pci: 0x04_0100, queues: 4, config: 12, ..PLAIN },
    Class { name: "fs", id: 26, pci: 0x01_8000, queues: 2, config: 40, fallback: Some(file_system), ..PLAIN },
];

/// A device of any other virtio id: all of the configuration space the protocol can carry.
pub static OTHER: Class = PLAIN;

/// Secure erase, and zones after it.
static BLK: [(u64, u16); 2] = [(1 << 16, 72), (1 << 17, 96)];

/// Name, serial number, ids, properties, one bitmap for each type of event, one range for each absolute axis.
static INPUT: [Selector; 6] = [(1, 0..=0), (2, 0..=0), (3, 0..=0), (0x10, 0..=0), (0x11, 0..=0x1f), (0x12, 0..=0x3f)];

impl Class {
    /// Bytes of configuration space that a backend has which offers these features.
    pub fn config_len(&self, offered: u64) -> u16 {
        let longer = self.longer.iter().filter(|(feature, _)| offered & feature != 0);
        longer.fold(self.config, |most, (_, len)| most.max(*len))
    }
}

/// The row of that name.
pub fn named(name: &str) -> Option<&'static Class> {
    CLASSES.iter().find(|c| c.name == name)
}

/// The row for that virtio id, or the one for all others.
pub fn numbered(id: u16) -> &'static Class {
    CLASSES.iter().find(|c| c.id == id).unwrap_or(&OTHER)
}

/// Backends that are not told a tag keep no configuration; the guest then mounts the device's name.
fn file_system(name: &str, queues: u16) -> Vec<u8> {
    const TAG: usize = 36;
    let mut config = name.as_bytes().to_vec();
    config.resize(TAG, 0);
    config.extend(u32::from(queues.saturating_sub(1)).to_le_bytes());
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_can_be_found_by_both_of_its_names() {
        for class in &CLASSES {
            assert!(std::ptr::eq(named(class.name).unwrap(), numbered(class.id)), "{}", class.name);
            assert!(class.config <= 256 && class.queues > 0);
        }
        assert!(named("floppy").is_none());
        assert_eq!(numbered(99).config, 256);
    }

    #[test]
    fn a_disk_has_the_configuration_of_what_it_offers() {
        let disk = named("blk").unwrap();
        let lengths = [0, 1 << 15, 1 << 16, 1 << 17, u64::MAX].map(|offered| disk.config_len(offered));
        assert_eq!(lengths, [60, 60, 72, 96, 96]);
    }

    #[test]
    fn a_file_system_without_a_tag_has_its_name() {
        let config = file_system("home", 2);
        assert_eq!((config.len(), &config[..5], config[36]), (40, &b"home\0"[..], 1));
        assert_eq!(file_system(&"x".repeat(99), 1).len(), 40);
    }
}
