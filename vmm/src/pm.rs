//! ACPI fixed hardware: the PM1a event and control registers, the power button and the way to switch off.
//!
//! Sixteen status bits, sixteen enable bits, and one interrupt line (the SCI) that is up while an enabled status bit is
//! set. The control thread presses the button; processors read and clear. The line is level triggered, so it is set
//! from the same lock that changes the bits.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::Port;
use crate::events::{Doorbell, Ending};

/// PM1a event block: status at 0, enable at 2.
pub const EVENT_PORT: u16 = 0x600;
/// PM1a control block.
pub const CONTROL_PORT: u16 = 0x604;
/// The system control interrupt.
pub const SCI: u8 = 9;
/// What `_S5` says, and what a guest writes to switch off.
pub const SOFT_OFF: u8 = 5;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;

/// Raises or lowers the SCI.
pub type Line = Box<dyn Fn(bool) -> io::Result<()> + Send + Sync>;

#[derive(Debug, Default)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

/// The register block from [`EVENT_PORT`] on, eight ports.
pub struct Power {
    registers: Mutex<Registers>,
    line: Line,
    doorbell: Arc<Doorbell>,
}

impl Power {
    /// `line` drives the SCI.
    pub fn new(line: Line, doorbell: Arc<Doorbell>) -> Self {
        Self { registers: Mutex::default(), line, doorbell }
    }

    fn with(&self, change: impl FnOnce(&mut Registers)) {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut registers);
        if let Err(e) = (self.line)(registers.status & registers.enable != 0) {
            tracing::warn!("Cannot change the system control interrupt: {e}");
        }
    }

    /// Somebody presses the power button.
    pub fn press(&self) {
        self.with(|r| r.status |= POWER_BUTTON);
    }

    /// Back to power-on state.
    pub fn reset(&self) {
        self.with(|r| *r = Registers::default());
    }

    fn bytes(registers: &Registers) -> [u8; 8] {
        let [s0, s1] = registers.status.to_le_bytes();
        let [e0, e1] = registers.enable.to_le_bytes();
        // ACPI mode is on from the start: there is no SMI to switch it with.
        let [c0, c1] = (registers.control | SCI_ENABLED).to_le_bytes();
        [s0, s1, e0, e1, c0, c1, 0, 0]
    }
}

impl Port for Power {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let all = Self::bytes(&registers);
        for (byte, value) in data.iter_mut().zip(all.iter().skip(usize::from(offset))) {
            *byte = *value;
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            let word = |old: u16, high: bool| {
                if high { (old & 0x00ff) | u16::from(*byte) << 8 } else { (old & 0xff00) | u16::from(*byte) }
            };
            match at {
                // Status bits are cleared by writing ones.
                0 => self.with(|r| r.status &= !u16::from(*byte)),
                1 => self.with(|r| r.status &= !(u16::from(*byte) << 8)),
                2 | 3 => self.with(|r| r.enable = word(r.enable, at == 3)),
                4 | 5 => self.control(|old| word(old, at == 5)),
                _ => {}
            }
        }
    }
}

impl Power {
    fn control(&self, change: impl FnOnce(u16) -> u16) {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let value = change(registers.control);
        // SLP_EN reads as zero.
        registers.control = value & !SLEEP_ENABLE;
        if value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & 7 == u16::from(SOFT_OFF) {
            self.doorbell.end(Ending::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn power() -> (Power, Arc<AtomicBool>, Arc<Doorbell>) {
        let up = Arc::new(AtomicBool::new(false));
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let line = Arc::clone(&up);
        let set = move |level| {
            line.store(level, Ordering::Relaxed);
            Ok(())
        };
        (Power::new(Box::new(set), Arc::clone(&doorbell)), up, doorbell)
    }

    #[test]
    fn the_button_raises_the_line_only_when_enabled_and_a_write_clears_it() {
        let (power, up, _) = power();
        power.press();
        assert!(!up.load(Ordering::Relaxed));
        power.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(up.load(Ordering::Relaxed));
        power.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!up.load(Ordering::Relaxed));
    }

    #[test]
    fn soft_off_ends_the_machine_and_other_states_do_not() {
        let (power, _, doorbell) = power();
        power.write(4, &(SLEEP_ENABLE | 1 << SLEEP_TYPE_SHIFT).to_le_bytes());
        assert!(!doorbell.has_ended());
        power.write(4, &(SLEEP_ENABLE | 5 << SLEEP_TYPE_SHIFT).to_le_bytes());
        assert_eq!(doorbell.answer(), Some(Ending::PowerOff));
    }

    #[test]
    fn byte_writes_reach_soft_off_too() {
        let (power, _, doorbell) = power();
        power.write(5, &[0x34]);
        assert!(doorbell.has_ended());
    }

    #[test]
    fn any_size_at_any_offset_is_harmless() {
        let (power, _, _) = power();
        for offset in 0..=u16::from(u8::MAX) {
            for len in 0..=8 {
                power.write(offset, &vec![0xff; len][..]);
                power.read(offset, &mut vec![0; len][..]);
            }
        }
        assert_eq!(Power::bytes(&power.registers.lock().unwrap())[4] & 1, 1);
    }
}
