//! PCI: one bus, a host bridge at slot 0 and up to 31 devices after it, each with one function.
//!
//! Configuration space is reached in both ways a PC has: by memory (ECAM, one page for each function) and by ports
//! (mechanism 1). Both end in [`Function::config_read`] and [`Function::config_write`]. Base addresses are
//! given out here, below 4 GiB, before the guest starts; a guest that moves them is followed.
//!
//! Ports 0xcf8 to 0xcff also hold the reset register, which is one byte in the middle of the address register: only the
//! size of the access tells them apart.

pub mod config;
pub mod msix;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use self::config::ConfigSpace;
use crate::bus::Port;
use crate::events::{Doorbell, Ending};
use crate::memory::{ECAM, MMIO32, Span};

/// First port of mechanism 1; eight of them.
pub const CONFIG_PORT: u16 = 0xcf8;
/// ACPI's reset register.
pub const RESET_PORT: u16 = 0xcf9;
/// Written there, it resets the machine: "reset processor" and "full reset" of the PC's register.
pub const RESET_VALUE: u8 = 0x06;
/// Slots after the host bridge.
pub const MAX_FUNCTIONS: usize = 31;

const RESET_CPU: u8 = 1 << 2;
const FUNCTION_SHIFT: u32 = 12;

/// What sits in a slot.
pub trait Function: Send + Sync {
    /// Reads configuration space. `data` does not cross a 32-bit word.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space. `data` does not cross a 32-bit word.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// Where the function's memory is right now, if it is switched on.
    fn memory(&self) -> Option<Span>;
    /// Reads inside [`Function::memory`].
    fn memory_read(&self, offset: u64, data: &mut [u8]);
    /// Writes inside [`Function::memory`].
    fn memory_write(&self, offset: u64, data: &[u8]);
    /// Back to power-on state. No processor runs meanwhile.
    fn reset(&self);
}

/// Gives out base addresses below 4 GiB.
#[derive(Debug)]
pub struct Allocator {
    next: u64,
}

impl Default for Allocator {
    fn default() -> Self {
        Self { next: MMIO32.start }
    }
}

impl Allocator {
    /// `size` bytes, a power of two, aligned to themselves. The window has room for a thousand times what 31 devices
    /// ask for.
    pub fn take(&mut self, size: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(size)?;
        let end = at.checked_add(size).filter(|&end| end <= MMIO32.end())?;
        self.next = end;
        Some(at)
    }
}

/// The bus.
pub struct Pci {
    bridge: Mutex<ConfigSpace>,
    /// Set once, when the backends have been greeted; processors do not run before that.
    functions: OnceLock<Vec<Arc<dyn Function>>>,
    address: Mutex<u32>,
    doorbell: Arc<Doorbell>,
}

impl Pci {
    /// A bus with a host bridge.
    pub fn new(doorbell: Arc<Doorbell>) -> Self {
        const INTEL: u16 = 0x8086;
        const VIRTUAL_HOST_BRIDGE: u16 = 0x0d57;
        const HOST_BRIDGE: u32 = 0x06_0000;
        let bridge = Mutex::new(ConfigSpace::new(INTEL, VIRTUAL_HOST_BRIDGE, HOST_BRIDGE, 0));
        Self { bridge, functions: OnceLock::new(), address: Mutex::new(0), doorbell }
    }

    /// Fills the slots, once.
    pub fn populate(&self, functions: Vec<Arc<dyn Function>>) {
        let _ = self.functions.set(functions);
    }

    fn functions(&self) -> &[Arc<dyn Function>] {
        self.functions.get().map_or(&[], Vec::as_slice)
    }

    /// Everything back to power-on state. No processor runs meanwhile.
    pub fn reset(&self) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = 0;
        for function in self.functions() {
            function.reset();
        }
    }

    /// `function` is bus, device and function as the hardware packs them.
    fn config_read(&self, function: u32, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        match Self::slot(function) {
            Some(0) => self.bridge.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            Some(slot) => {
                if let Some(f) = self.functions().get(slot - 1) {
                    f.config_read(offset, data);
                }
            }
            None => {}
        }
    }

    fn config_write(&self, function: u32, offset: u16, data: &[u8]) {
        match Self::slot(function) {
            Some(0) => self.bridge.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data),
            Some(slot) => {
                if let Some(f) = self.functions().get(slot - 1) {
                    f.config_write(offset, data);
                }
            }
            None => {}
        }
    }

    /// The slot on bus 0, if this is function 0 of it.
    fn slot(function: u32) -> Option<usize> {
        (function & 7 == 0 && function >> 8 == 0).then_some((function >> 3) as usize)
    }

    fn find(&self, addr: u64) -> Option<(u64, &dyn Function)> {
        self.functions().iter().find_map(|f| Some((f.memory()?.offset_of(addr)?, &**f)))
    }

    /// A processor reads memory that is not RAM.
    pub fn memory_read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, offset)) = ecam(addr, data.len()) {
            self.config_read(function, offset, data);
        } else if let Some((offset, function)) = self.find(addr) {
            function.memory_read(offset, data);
        }
    }

    /// A processor writes memory that is not RAM.
    pub fn memory_write(&self, addr: u64, data: &[u8]) {
        if let Some((function, offset)) = ecam(addr, data.len()) {
            self.config_write(function, offset, data);
        } else if let Some((offset, function)) = self.find(addr) {
            function.memory_write(offset, data);
        }
    }

    fn mechanism1(&self, offset: u16, len: usize) -> Option<(u32, u16)> {
        const ENABLE: u32 = 1 << 31;
        let address = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
        let register = u16::try_from(address & 0xfc).ok()?.checked_add(offset.checked_sub(4)?)?;
        (address & ENABLE != 0 && in_word(register, len)).then_some((address >> 8 & 0xffff, register))
    }
}

fn in_word(offset: u16, len: usize) -> bool {
    usize::from(offset & 3).saturating_add(len) <= 4
}

fn ecam(addr: u64, len: usize) -> Option<(u32, u16)> {
    let offset = u32::try_from(ECAM.offset_of(addr)?).ok()?;
    let register = u16::try_from(offset & ((1 << FUNCTION_SHIFT) - 1)).ok()?;
    in_word(register, len).then_some((offset >> FUNCTION_SHIFT, register))
}

/// Mechanism 1, attached at [`CONFIG_PORT`].
impl Port for Pci {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data) {
            (0, [a, b, c, d]) => {
                let address = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
                [*a, *b, *c, *d] = address.to_le_bytes();
            }
            (1, [reset]) => *reset = 0,
            (_, data) => {
                if let Some((function, register)) = self.mechanism1(offset, data.len()) {
                    self.config_read(function, register, data);
                }
            }
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (0, [a, b, c, d]) => {
                let address = u32::from_le_bytes([*a, *b, *c, *d]);
                *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
            }
            (1, [value]) if value & RESET_CPU != 0 => self.doorbell.end(Ending::Reset),
            (_, data) => {
                if let Some((function, register)) = self.mechanism1(offset, data.len()) {
                    self.config_write(function, register, data);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pci() -> Pci {
        Pci::new(Arc::new(Doorbell::new().unwrap()))
    }

    #[test]
    fn both_ways_reach_the_host_bridge() {
        let pci = pci();
        let mut by_memory = [0; 4];
        pci.memory_read(ECAM.start, &mut by_memory);
        pci.write(0, &0x8000_0000u32.to_le_bytes());
        let mut by_port = [0; 4];
        pci.read(4, &mut by_port);
        assert_eq!((by_memory, by_port), ([0x86, 0x80, 0x57, 0x0d], [0x86, 0x80, 0x57, 0x0d]));
    }

    #[test]
    fn empty_slots_read_as_ones() {
        let pci = pci();
        let mut word = [0; 4];
        pci.memory_read(ECAM.start + (1 << 15), &mut word);
        assert_eq!(word, [0xff; 4]);
        pci.memory_read(ECAM.start + 0x1000, &mut word);
        assert_eq!(word, [0xff; 4], "function 1 of the host bridge");
    }

    #[test]
    fn only_a_byte_with_the_right_bit_resets() {
        let pci = pci();
        pci.write(0, &[6, 6, 6, 6]);
        pci.write(1, &[2]);
        assert!(!pci.doorbell.has_ended());
        pci.write(1, &[RESET_VALUE]);
        assert_eq!(pci.doorbell.answer(), Some(Ending::Reset));
    }

    #[test]
    fn every_size_at_every_offset_is_harmless() {
        let pci = pci();
        for offset in 0..16 {
            for len in 0..=8 {
                Port::write(&pci, offset, &vec![0xff; len]);
                Port::read(&pci, offset, &mut vec![0; len]);
            }
        }
        for addr in (ECAM.start..ECAM.start + 0x3000).chain([ECAM.end() - 1, u64::MAX]) {
            for len in [0, 1, 2, 3, 4, 8] {
                pci.memory_write(addr, &vec![0xff; len]);
                pci.memory_read(addr, &mut vec![0; len]);
            }
        }
    }

    #[test]
    fn base_addresses_are_aligned_and_end_with_the_window() {
        let mut allocator = Allocator::default();
        assert_eq!(allocator.take(0x1000), Some(MMIO32.start));
        assert_eq!(allocator.take(0x8000), Some(MMIO32.start + 0x8000));
        assert_eq!(allocator.take(MMIO32.size), None);
    }
}
