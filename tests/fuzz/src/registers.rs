//! A guest that reads and writes whatever registers there are.

#[path = "../../../vmm/tests/support/agreeable.rs"]
mod agreeable;

use std::sync::Arc;

use agreeable::Agreeable;
use vmm::bus::Port;
use vmm::events::Doorbell;
use vmm::memory::{ECAM, MMIO32};
use vmm::pci::{Function, Pci};
use vmm::virtio::shadow::Shadow;
use vmm::virtio::{Identity, VirtioPci, lines};

use crate::bytes::Bytes;

const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 5;
const SIZES: [usize; 4] = [1, 2, 4, 8];
const QUEUE_SIZE: u16 = 64;

fn device(class: &str, queues: u16, config: usize, at: u64, doorbell: &Arc<Doorbell>) -> Arc<VirtioPci> {
    let class = vmm::classes::named(class).expect("a class");
    let identity = Identity {
        name: "fuzz".to_owned(),
        id: class.id,
        class,
        features: FEATURES,
        queues,
        queue_size: QUEUE_SIZE,
        first_route: 24,
    };
    let (lines, _) = lines(queues).expect("event descriptors");
    let shadow = Shadow::new(vec![7; config], u16::try_from(config).expect("small"));
    let function = VirtioPci::new(identity, lines, shadow, at, Arc::new(Agreeable), Arc::clone(doorbell));
    Arc::new(function.expect("a function"))
}

/// PCI configuration space by memory and by port, and the registers of two virtio functions.
pub fn registers(mut bytes: Bytes<'_>) {
    let doorbell = Arc::new(Doorbell::new().expect("an event descriptor"));
    let pci = Pci::new(Arc::clone(&doorbell));
    let step = VirtioPci::memory_size();
    let devices = [device("blk", 2, 60, MMIO32.start, &doorbell), device("rng", 1, 0, MMIO32.start + step, &doorbell)];
    pci.populate(devices.iter().map(|device| Arc::clone(device) as Arc<dyn Function>).collect());
    for (slot, _) in devices.iter().enumerate() {
        // Without it the fuzzer would have to find this one bit first.
        pci.memory_write(ECAM.start + ((slot as u64 + 1) << 15) + 4, &[2]);
    }
    while !bytes.is_empty() {
        access(&pci, &mut bytes);
        for device in &devices {
            let work = device.work();
            if let Some((features, rings)) = work.start {
                assert_eq!(features & !FEATURES, 0, "only what was offered");
                assert!(rings.iter().all(|ring| ring.size.is_power_of_two() && ring.size <= QUEUE_SIZE));
            }
            if work.stop {
                device.stopped();
            }
        }
    }
    pci.reset();
}

fn access(pci: &Pci, bytes: &mut Bytes<'_>) {
    let what = bytes.byte();
    let size = SIZES[usize::from(what >> 6)];
    let slot = u64::from(what >> 3 & 3);
    let addr = match what & 7 {
        0 | 1 => ECAM.start + (slot << 15) + u64::from(bytes.u16() & 0xfff),
        2..=4 => MMIO32.start + (slot & 1) * VirtioPci::memory_size() + u64::from(bytes.u16() & 0x7fff),
        5 => bytes.u64(),
        _ => return port(pci, size, bytes),
    };
    if bytes.byte() & 1 == 0 {
        pci.memory_read(addr, &mut [0; 8][..size]);
    } else {
        pci.memory_write(addr, &bytes.u64().to_le_bytes()[..size]);
    }
}

fn port(pci: &Pci, size: usize, bytes: &mut Bytes<'_>) {
    let offset = u16::from(bytes.byte() & 7);
    if bytes.byte() & 1 == 0 {
        Port::read(pci, offset, &mut [0; 8][..size.min(4)]);
    } else {
        Port::write(pci, offset, &bytes.u32().to_le_bytes()[..size.min(4)]);
    }
}
