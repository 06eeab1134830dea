//! MSI-X: the table of messages, its two masks, and the pending bits.
//!
//! This is only the register file. Which eventfd belongs to which vector, and telling KVM about it, is the function's
//! business (`virtio`): after every change it asks [`Msix::message`] for each of its vectors and attaches or detaches.
//! A masked vector is a detached eventfd: a signal then stays in the eventfd, which is exactly what a pending bit is.

/// Bytes of one table entry.
pub const ENTRY: usize = 16;
/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Message control, relative to the capability: its upper byte holds the writable bits.
pub const CONTROL: u16 = 2;
/// Writable bits of message control.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_CONTROL: usize = 12;
const MASKED: u8 = 1;

/// What an unmasked vector sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// The table and the function-wide bits.
#[derive(Clone, Debug)]
pub struct Msix {
    entries: Vec<[u8; ENTRY]>,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// A table in power-on state: every vector masked, MSI-X off.
    pub fn new(vectors: u16) -> Self {
        let mut entry = [0; ENTRY];
        if let Some(control) = entry.get_mut(VECTOR_CONTROL) {
            *control = MASKED;
        }
        Self { entries: vec![entry; usize::from(vectors)], enabled: false, masked: false }
    }

    /// The body of the capability: table and pending bits in the same base address register 0.
    pub fn capability(vectors: u16, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let (control, rest) = body.split_at_mut(2);
        control.copy_from_slice(&vectors.saturating_sub(1).to_le_bytes());
        let (first, second) = rest.split_at_mut(4);
        first.copy_from_slice(&table.to_le_bytes());
        second.copy_from_slice(&pending.to_le_bytes());
        body
    }

    /// The guest has written message control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & ENABLE != 0;
        self.masked = control & FUNCTION_MASK != 0;
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(u16::MAX)
    }

    /// What a signal of this vector sends now; nothing while it is masked or MSI-X is off.
    pub fn message(&self, vector: u16) -> Option<Message> {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = *self.entries.get(usize::from(vector))?;
        (self.enabled && !self.masked && control & MASKED == 0).then_some(Message {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }

    /// The guest reads the table. Only aligned words and double words exist; anything else reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((entry, at)) = Self::locate(offset, data.len())
            && let Some(source) = self.entries.get(entry).and_then(|e| e.get(at..at + data.len()))
        {
            data.copy_from_slice(source);
        }
    }

    /// The guest writes the table.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((entry, at)) = Self::locate(offset, data.len())
            && let Some(target) = self.entries.get_mut(entry).and_then(|e| e.get_mut(at..at + data.len()))
        {
            target.copy_from_slice(data);
        }
    }

    fn locate(offset: u64, len: usize) -> Option<(usize, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let aligned = matches!(len, 4 | 8) && offset.is_multiple_of(len);
        aligned.then_some((offset / ENTRY, offset % ENTRY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Msix {
        let mut msix = Msix::new(3);
        msix.write(16, &0xfee0_1000u64.to_le_bytes());
        msix.write(24, &0x41u32.to_le_bytes());
        msix
    }

    #[test]
    fn a_vector_speaks_only_when_all_three_masks_are_off() {
        let mut msix = ready();
        let message = Some(Message { address: 0xfee0_1000, data: 0x41 });
        assert_eq!(msix.message(1), None);
        msix.write(28, &0u32.to_le_bytes());
        assert_eq!(msix.message(1), None, "MSI-X is still off");
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert_eq!(msix.message(1), None, "the function is masked");
        msix.set_control(ENABLE);
        assert_eq!(msix.message(1), message);
        msix.write(28, &1u32.to_le_bytes());
        assert_eq!(msix.message(1), None, "the vector is masked again");
    }

    #[test]
    fn no_vector_is_no_vector() {
        let mut msix = ready();
        msix.set_control(ENABLE);
        assert_eq!(msix.message(0xffff), None);
        assert_eq!(msix.message(3), None);
    }

    #[test]
    fn odd_accesses_read_zero_and_change_nothing() {
        let mut msix = ready();
        let before = msix.entries.clone();
        for offset in (0..64).chain([u64::MAX - 8, u64::MAX]) {
            for len in [0, 1, 2, 3, 5, 7, 16] {
                msix.write(offset, &vec![0xff; len]);
                let mut data = vec![1; len];
                msix.read(offset, &mut data);
                assert_eq!(data, vec![0; len]);
            }
        }
        assert_eq!(msix.entries, before);
    }
}
