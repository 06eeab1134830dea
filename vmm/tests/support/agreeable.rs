//! The stand-in for KVM of tests and fuzzers that need none.

use std::io;

use vmm::kvm::{Event, Hypervisor};

/// KVM that agrees to everything.
pub(crate) struct Agreeable;

impl Hypervisor for Agreeable {
    fn route_msi(&self, _: u32, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn attach_irq(&self, _: &Event, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn detach_irq(&self, _: &Event, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn attach_kick(&self, _: &Event, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn detach_kick(&self, _: &Event, _: u64) -> io::Result<()> {
        Ok(())
    }
}
