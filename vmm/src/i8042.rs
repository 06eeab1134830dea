//! What is left of the keyboard controller: its oldest trick, a reset of the machine.
//!
//! ACPI says that there is no such controller, so nobody polls it. A kernel that runs out of ways to reboot writes here
//! all the same.

use std::sync::Arc;

use crate::bus::Port;
use crate::events::{Doorbell, Ending};

/// Status when read, command when written.
pub const PORT: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// The command port.
pub struct I8042(pub Arc<Doorbell>);

impl Port for I8042 {
    fn read(&self, _: u16, data: &mut [u8]) {
        // Both buffers empty: nobody who waits for the controller waits for long.
        data.fill(0);
    }

    fn write(&self, _: u16, data: &[u8]) {
        if data.first() == Some(&PULSE_RESET) {
            self.0.end(Ending::Reset);
        }
    }
}
