//! What a processor's I/O reaches: a table of ports, and PCI for everything in memory.
//!
//! Processors call in here at the same time, with nothing locked; each device locks itself. An access to nothing reads
//! as ones and writes nowhere, as on a PC.

use std::sync::Arc;

use crate::pci::Pci;

/// A device behind I/O ports. `offset` counts from the first port of the range it was attached to.
pub trait Port: Send + Sync {
    /// The guest reads 1, 2 or 4 bytes.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// The guest writes 1, 2 or 4 bytes.
    fn write(&self, offset: u16, data: &[u8]);
}

/// All of them.
pub struct Bus {
    ports: Vec<(u16, u16, Arc<dyn Port>)>,
    pci: Arc<Pci>,
}

impl Bus {
    /// A machine with PCI and nothing else.
    pub fn new(pci: Arc<Pci>) -> Self {
        Self { ports: Vec::new(), pci }
    }

    /// Adds a device at `count` ports from `first` on.
    pub fn attach(&mut self, first: u16, count: u16, device: Arc<dyn Port>) {
        self.ports.push((first, count, device));
    }

    fn find(&self, port: u16) -> Option<(u16, &dyn Port)> {
        self.ports.iter().find_map(|(first, count, device)| {
            let offset = port.checked_sub(*first)?;
            (offset < *count).then_some((offset, &**device))
        })
    }

    /// `in`.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.find(port) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// `out`.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if let Some((offset, device)) = self.find(port) {
            device.write(offset, data);
        }
    }

    /// A load from where there is no RAM.
    pub fn memory_read(&self, addr: u64, data: &mut [u8]) {
        self.pci.memory_read(addr, data);
    }

    /// A store to where there is no RAM.
    pub fn memory_write(&self, addr: u64, data: &[u8]) {
        self.pci.memory_write(addr, data);
    }
}
