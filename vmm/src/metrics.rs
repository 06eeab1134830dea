//! What is counted. Kicks and interrupts are not: they go past this process, from the guest to the device processes and back.

use virtio::metrics::page::Error;
use virtio::metrics::{Counter, Each, Family, Kind, Label, show};

use crate::pci::MAX_FUNCTIONS;

/// Resets of the machine.
pub static RESETS: Counter = Counter::new();
/// Bytes of COM1 that nobody took.
pub static DROPPED_BYTES: Counter = Counter::new();
/// Rings that run, for each device.
pub static RINGS: Each<MAX_FUNCTIONS> = Each::new();
/// Rings that a device process has declared broken, for each device.
pub static RING_ERRORS: Each<MAX_FUNCTIONS> = Each::new();

/// Shows them for a machine with so many devices.
///
/// # Errors
/// When the page cannot be used.
pub fn publish(page: Option<std::os::fd::OwnedFd>, devices: usize) -> Result<(), Error> {
    let one = |name, help, counter| {
        let values = std::slice::from_ref(counter);
        Family { name, help, kind: Kind::Counter, label: Label::None, values }
    };
    let each = |name, help, kind, values: &'static Each<MAX_FUNCTIONS>| {
        let values = values.first(devices);
        Family { name, help, kind, label: Label::Device, values }
    };
    let all = [
        one("vmm_resets", "Resets of the machine", &RESETS),
        one("vmm_serial_dropped_bytes", "Bytes of COM1 that nobody took", &DROPPED_BYTES),
        each("vmm_rings", "Rings of the device that run", Kind::Gauge, &RINGS),
        each("vmm_ring_errors", "Rings that the device process has declared broken", Kind::Counter, &RING_ERRORS),
    ];
    show(page, &all)
}
