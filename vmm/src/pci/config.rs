//! The 256 bytes of a function's configuration space: what they hold, and which bits the guest may change.
//!
//! There is no code per register. A write changes the bits its mask allows; a base address register is a mask that
//! leaves out the bits below its size, which makes the "write ones, read back the size" protocol come out by itself.

/// Command register.
pub const COMMAND: u16 = 0x04;
/// The first base address register.
pub const BAR0: u16 = 0x10;
/// Command bit: memory accesses are answered.
pub const MEMORY_ENABLE: u16 = 1 << 1;

const SIZE: usize = 256;
const STATUS: usize = 0x06;
const CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const BUS_MASTER: u16 = 1 << 2;
const INTERRUPT_DISABLE: u16 = 1 << 10;
const MEMORY_64: u64 = 4;

/// One function's configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability goes, and where the link to it is.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A type 0 header.
    pub fn new(vendor: u16, device: u16, class: u32, subsystem: u16) -> Self {
        let mut space = Self { bytes: [0; SIZE], writable: [0; SIZE], next: FIRST_CAPABILITY, link: CAPABILITY_POINTER };
        space.put(0, &vendor.to_le_bytes());
        space.put(2, &device.to_le_bytes());
        // Revision 1 says "not a transitional device" to virtio drivers; it means nothing to others.
        space.put(8, &[1]);
        let [interface, sub, base, _] = class.to_le_bytes();
        space.put(9, &[interface, sub, base]);
        if subsystem != 0 {
            space.put(0x2c, &vendor.to_le_bytes());
            space.put(0x2e, &subsystem.to_le_bytes());
        }
        space.allow(usize::from(COMMAND), &(MEMORY_ENABLE | BUS_MASTER | INTERRUPT_DISABLE).to_le_bytes());
        // The interrupt line belongs to firmware and guest.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Sets bytes the guest sees.
    pub fn put(&mut self, at: usize, value: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(at).zip(value) {
            *byte = *new;
        }
    }

    /// Makes bits writable.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        for (byte, new) in self.writable.iter_mut().skip(at).zip(mask) {
            *byte = *new;
        }
    }

    /// A 64-bit memory base address in the first pair of registers. `size` is a power of two.
    pub fn memory_bar(&mut self, address: u64, size: u64) {
        self.put(usize::from(BAR0), &(address | MEMORY_64).to_le_bytes());
        self.allow(usize::from(BAR0), &size.wrapping_neg().to_le_bytes());
    }

    /// Appends a capability. `body` is what follows id and link. Returns its offset.
    pub fn capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.put(self.link, &[u8::try_from(at).unwrap_or(0)]);
        self.put(STATUS, &CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// What the guest reads. Beyond the 256 bytes there is nothing: no extended capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(self.bytes.iter().skip(usize::from(offset))) {
            *byte = *value;
        }
    }

    /// What the guest writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let old = self.bytes.iter_mut().zip(&self.writable).skip(usize::from(offset));
        for ((byte, mask), new) in old.zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// A 16-bit register.
    pub fn u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A 32-bit register.
    pub fn u32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the memory of the first pair of base address registers is, if memory is enabled.
    pub fn memory_base(&self) -> Option<u64> {
        let (low, high) = (self.u32(BAR0), self.u32(BAR0 + 4));
        (self.u16(COMMAND) & MEMORY_ENABLE != 0).then_some(u64::from(high) << 32 | u64::from(low & !0xf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(0x1af4, 0x1044, 0x00_ff00, 0x40);
        space.memory_bar(0xc000_8000, 0x8000);
        space
    }

    #[test]
    fn writing_ones_to_a_base_address_gives_its_size() {
        let mut space = space();
        space.write(BAR0, &[0xff; 4]);
        space.write(BAR0 + 4, &[0xff; 4]);
        let size = !(u64::from(space.u32(BAR0 + 4)) << 32 | u64::from(space.u32(BAR0) & !0xf)) + 1;
        assert_eq!(size, 0x8000);
        assert_eq!(space.u32(BAR0) & 0xf, 4, "the type bits stay");
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut space = space();
        for offset in 0..256 {
            space.write(offset, &[0xff]);
        }
        assert_eq!(space.u32(0), 0x1044_1af4);
        assert_eq!(space.u32(8) >> 8, 0x00_ff00);
    }

    #[test]
    fn memory_is_there_only_while_enabled() {
        let mut space = space();
        assert_eq!(space.memory_base(), None);
        space.write(COMMAND, &MEMORY_ENABLE.to_le_bytes());
        assert_eq!(space.memory_base(), Some(0xc000_8000));
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = space();
        let first = space.capability(9, &[1; 14]);
        let second = space.capability(0x11, &[2; 10]);
        assert_eq!((first, second), (0x40, 0x50));
        let mut byte = [0];
        space.read(0x34, &mut byte);
        assert_eq!(byte, [0x40]);
        space.read(0x41, &mut byte);
        assert_eq!(byte, [0x50]);
    }

    #[test]
    fn the_end_of_the_space_is_harmless() {
        let mut space = space();
        for offset in [250, 255, 256, 4095, u16::MAX] {
            for len in 0..9 {
                space.write(offset, &vec![0xff; len]);
                space.read(offset, &mut vec![0; len]);
            }
        }
    }
}
