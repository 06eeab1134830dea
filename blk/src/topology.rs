//! Sizes of blocks, as the host's file or device has them, so that a guest aligns what it writes to what is cheap down there.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::{AtFlags, SeekFrom, StatxFlags, fstat, major, minor, seek, statx};
use sandbox::secure_erase;

use crate::direct::Alignment;
use crate::request::{LIFETIME, SECTOR};

/// Sizes in bytes, each a power of two but for the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The least that can be addressed.
    pub logical: u32,
    /// The least that is written without being read first.
    pub physical: u32,
    /// The least that is done well.
    pub least: u32,
    /// What is done best; zero: nothing is known.
    pub best: u32,
    /// What space is given back in.
    pub discard: u32,
}

impl Default for Topology {
    fn default() -> Topology {
        Topology { logical: 512, physical: 512, least: 512, best: 0, discard: 512 }
    }
}

/// What a file or device says of itself. `direct`: it is used past the page cache, which cannot change parts of a block.
pub fn of(file: impl AsFd, device: bool, direct: bool) -> Topology {
    if device { of_device(file) } else { of_file(file, direct) }
}

fn of_file(file: impl AsFd, direct: bool) -> Topology {
    let physical = fstat(&file).map_or(4096, |stat| u32::try_from(stat.st_blksize).unwrap_or(4096));
    let physical = if physical.is_power_of_two() { physical.clamp(512, 65536) } else { 4096 };
    let logical = if direct { alignment(file).offset } else { 512 };
    let physical = physical.max(logical);
    Topology { logical, physical, least: physical, best: 0, discard: physical }
}

/// What a file wants that is used past the page cache. Kernels before 6.1, and some file systems, do not tell: then a page, and the least
/// a disk can have.
pub fn alignment(file: impl AsFd) -> Alignment {
    let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let stat = stat.filter(|stat| StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN));
    let (memory, offset) = stat.map_or((0, 0), |stat| (stat.stx_dio_mem_align, stat.stx_dio_offset_align));
    let or = |value: u32, other: u32| if value.is_power_of_two() && value <= 4096 { value } else { other };
    Alignment { memory: or(memory, 4096), offset: or(offset, 512).max(512) }
}

fn of_device(file: impl AsFd) -> Topology {
    let logical = rustix::fs::ioctl_blksszget(&file).unwrap_or(512);
    let physical = rustix::fs::ioctl_blkpbszget(&file).unwrap_or(logical).max(logical);
    let folder = folder(&file);
    let word = |name: &str| -> Option<u32> {
        let folder = folder.as_ref()?;
        // A partition has the queue of the device it is on.
        let text = fs::read_to_string(folder.join("queue").join(name))
            .or_else(|_| fs::read_to_string(folder.join("../queue").join(name)));
        text.ok()?.trim().parse().ok()
    };
    Topology {
        logical,
        physical,
        least: word("minimum_io_size").unwrap_or(physical),
        best: word("optimal_io_size").unwrap_or(0),
        discard: word("discard_granularity").filter(|bytes| *bytes > 0).unwrap_or(logical).max(logical),
    }
}

fn folder(file: impl AsFd) -> Option<PathBuf> {
    let number = fstat(file).ok()?.st_rdev;
    Some(PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number))))
}

/// How worn a device says it is, in the four bytes of the specification (virtio 1.3, 5.2.6.3). Only some flash memory tells.
pub fn lifetime(file: impl AsFd) -> Option<[u8; LIFETIME]> {
    lifetime_in(&folder(file)?.join("device"))
}

fn lifetime_in(folder: &std::path::Path) -> Option<[u8; LIFETIME]> {
    let hex = |text: &str| u8::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok();
    let end = hex(&fs::read_to_string(folder.join("pre_eol_info")).ok()?)?;
    let life = fs::read_to_string(folder.join("life_time")).ok()?;
    let mut types = life.split_whitespace();
    let (a, b) = (hex(types.next()?)?, hex(types.next()?)?);
    // Linux shows the files for every eMMC card. In one older than version 5 there is nothing to show: all of it is "not defined".
    let tells = [end, a, b] != [0; 3];
    tells.then_some([end, 0, a, b])
}

/// Whether a block device that is open for writing can erase so that nobody finds what was there. No file of sysfs says so: it is asked to
/// erase nothing, at its end, where there is also nothing that the kernel's cache could lose by it. A kernel to which that is not
/// worth a request may call the range invalid; a device that cannot is told before its range is looked at.
pub fn erases_securely(device: impl AsFd) -> bool {
    let Ok(end) = seek(&device, SeekFrom::End(0)) else { return false };
    match secure_erase(device.as_fd(), end, 0) {
        Err(error) => error.kind() == ErrorKind::InvalidInput,
        Ok(()) => true,
    }
}

/// The bytes of the configuration space that say so (virtio 1.3, 5.2.4): blk_size, then the topology.
pub fn config(topology: &Topology) -> [u8; 12] {
    let blocks = |bytes: u32| bytes.checked_div(topology.logical).unwrap_or(1);
    let exponent = u8::try_from(blocks(topology.physical).max(1).ilog2()).unwrap_or(0);
    let least = u16::try_from(blocks(topology.least)).unwrap_or(u16::MAX);
    let [s0, s1, s2, s3] = topology.logical.to_le_bytes();
    let [l0, l1] = least.to_le_bytes();
    let [b0, b1, b2, b3] = blocks(topology.best).to_le_bytes();
    [s0, s1, s2, s3, exponent, 0, l0, l1, b0, b1, b2, b3]
}

/// Sectors that discards are aligned to.
pub fn discard_sectors(topology: &Topology) -> u32 {
    topology.discard / u32::try_from(SECTOR).unwrap_or(512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wear_of_flash_memory_is_read_as_the_specification_has_it() {
        let folder = std::env::temp_dir().join(format!("outboard-wear-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        assert_eq!(lifetime_in(&folder), None);
        fs::write(folder.join("pre_eol_info"), "0x01\n").unwrap();
        fs::write(folder.join("life_time"), "0x02 0x0b\n").unwrap();
        assert_eq!(lifetime_in(&folder), Some([1, 0, 2, 11]));
        fs::write(folder.join("pre_eol_info"), "0x00\n").unwrap();
        fs::write(folder.join("life_time"), "0x00 0x00\n").unwrap();
        assert_eq!(lifetime_in(&folder), None, "a card that tells nothing");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn sizes_are_told_in_blocks() {
        let four = Topology { logical: 512, physical: 4096, least: 4096, best: 1 << 20, discard: 4096 };
        let bytes = config(&four);
        assert_eq!(bytes[..4], 512u32.to_le_bytes());
        assert_eq!((bytes[4], bytes[5]), (3, 0));
        assert_eq!(bytes[6..8], 8u16.to_le_bytes());
        assert_eq!(bytes[8..], 2048u32.to_le_bytes());
        assert_eq!(discard_sectors(&four), 8);
    }
}
