//! pvpanic: one port through which a guest kernel says that it has panicked.

use std::sync::Arc;

use crate::bus::Port;
use crate::events::{Doorbell, Ending};

/// Where QEMU has it, and drivers look (they believe ACPI's `QEMU0001` first).
pub const PORT: u16 = 0x505;
const PANICKED: u8 = 1;

/// The port.
pub struct PvPanic(pub Arc<Doorbell>);

impl Port for PvPanic {
    fn read(&self, _: u16, data: &mut [u8]) {
        // Which events we understand. "A crash kernel was loaded" is not among them: then the guest goes on.
        data.fill(PANICKED);
    }

    fn write(&self, _: u16, data: &[u8]) {
        if data.first().is_some_and(|b| b & PANICKED != 0) {
            self.0.end(Ending::Panic);
        }
    }
}
