//! A processor: its state at power on, its thread, and what each way out of the guest means.
//!
//! A processor's thread does four things: it runs the guest, it carries out port and memory accesses on the [`Bus`], it
//! follows orders from the [`Gate`], and it reports an end. It never opens, allocates per exit, logs what a guest can
//! repeat, or waits for anybody but the gate.

pub mod cpuid;
pub mod gate;

use std::io;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use self::gate::{Gate, Order};
use crate::boot::Entry;
use crate::bus::Bus;
use crate::events::{Doorbell, Ending};
use crate::kvm::{Error, Kick, Vm, call, internal_error, set_xsave};
use crate::virtio::remote::sentence;

/// What all processors share. The bus is there before the gate opens for the first time.
pub struct Shared {
    /// Devices.
    pub bus: OnceLock<Bus>,
    /// Orders.
    pub gate: Gate,
    /// Reports.
    pub doorbell: Arc<Doorbell>,
}

/// Everything KVM keeps about a processor, as it was at power on.
struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: kvm_lapic_state,
    mp: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

/// One processor, before its thread.
pub struct Cpu {
    id: u8,
    /// Leaked: its kvm_run page is referred to by [`Kick`] for the life of the process.
    fd: &'static mut VcpuFd,
    power_on: PowerOn,
}

const MSR_TSC: u32 = 0x10;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;

/// Model-specific registers a PC's firmware would have set.
fn firmware_msrs() -> [kvm_msr_entry; 2] {
    const FAST_STRINGS: u64 = 1;
    const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [msr(MSR_MISC_ENABLE, FAST_STRINGS), msr(MSR_MTRR_DEFAULT, MTRR_ENABLED_WRITE_BACK)]
}

fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| Error::Lacks { what: "room for model-specific registers" })?;
        let done = fd.set_msrs(&msrs).map_err(call("set model-specific registers"))?;
        // KVM stops at the first register it does not let anybody set; the ones after it still have to be.
        rest = rest.get(done.saturating_add(1)..).unwrap_or_default();
    }
    Ok(())
}

fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut values = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::Lacks { what: "room for model-specific registers" })?;
        let done = fd.get_msrs(&mut msrs).map_err(call("read model-specific registers"))?;
        values.extend_from_slice(msrs.as_slice().get(..done).unwrap_or_default());
        rest = rest.get(done.saturating_add(1)..).unwrap_or_default();
    }
    Ok(values)
}

/// The registers that make up a processor's state. The time-stamp counter is not among them: it goes on over a reset, and
/// setting it on each processor in turn would set them apart.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(call("list model-specific registers"))?;
    Ok(list.as_slice().iter().copied().filter(|index| *index != MSR_TSC).collect())
}

impl PowerOn {
    fn read(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, Error> {
        const DOING: &str = "read a processor's state";
        Ok(Self {
            regs: fd.get_regs().map_err(call(DOING))?,
            sregs: fd.get_sregs().map_err(call(DOING))?,
            xsave: Box::new(fd.get_xsave().map_err(call(DOING))?),
            xcrs: fd.get_xcrs().map_err(call(DOING))?,
            debug: fd.get_debug_regs().map_err(call(DOING))?,
            events: fd.get_vcpu_events().map_err(call(DOING))?,
            lapic: fd.get_lapic().map_err(call(DOING))?,
            mp: fd.get_mp_state().map_err(call(DOING))?,
            msrs: get_msrs(fd, msrs)?,
        })
    }

    /// In QEMU's order: special registers first (they decide what the others mean), the interrupt controller after the
    /// registers that hold its base, pending events last.
    fn write(&self, fd: &VcpuFd) -> Result<(), Error> {
        const DOING: &str = "reset a processor";
        fd.set_mp_state(self.mp).map_err(call(DOING))?;
        fd.set_regs(&self.regs).map_err(call(DOING))?;
        fd.set_sregs(&self.sregs).map_err(call(DOING))?;
        fd.set_xcrs(&self.xcrs).map_err(call(DOING))?;
        set_xsave(fd, &self.xsave)?;
        fd.set_debug_regs(&self.debug).map_err(call(DOING))?;
        fd.set_lapic(&self.lapic).map_err(call(DOING))?;
        set_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events).map_err(call(DOING))
    }
}

impl Cpu {
    /// Creates processor `id` and remembers its state.
    pub fn new(vm: &Vm, id: u8, cpuid: &CpuId, msrs: &[u32]) -> Result<Self, Error> {
        let fd = vm.fd().create_vcpu(u64::from(id)).map_err(call("create a processor"))?;
        let fd = Box::leak(Box::new(fd));
        fd.set_cpuid2(cpuid).map_err(call("describe a processor"))?;
        set_msrs(fd, &firmware_msrs())?;
        let power_on = PowerOn::read(fd, msrs)?;
        Ok(Self { id, fd, power_on })
    }

    /// What its thread is called.
    pub fn thread_name(&self) -> String {
        format!("cpu{}", self.id)
    }

    /// The first processor begins in the kernel; the others wait until it calls them.
    pub fn enter(&self, entry: &Entry) -> Result<(), Error> {
        if self.id != 0 {
            return Ok(());
        }
        let mut sregs = self.power_on.sregs;
        let regs = entry.registers(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(call("set a processor's registers"))?;
        self.fd.set_regs(&regs).map_err(call("set a processor's registers"))
    }

    fn obey(&self, order: &Order) -> Result<(), String> {
        let outcome = match order {
            Order::Wait | Order::Run => Ok(()),
            Order::Reset(entry) => self.power_on.write(self.fd).and_then(|()| self.enter(entry)),
        };
        outcome.map_err(|e| sentence(&e))
    }

    /// The thread. Ends with the process.
    pub fn run(self, shared: &Shared) {
        let kick = Kick::new(self.fd);
        let mut ticket = shared.gate.join(kick.share());
        loop {
            // Cleared before the gate is looked at: an order that comes after the look sets it again.
            kick.clear();
            shared.gate.pass(&mut ticket, |order| self.obey(order));
            let Some(bus) = shared.bus.get() else { continue };
            while !shared.doorbell.has_ended() {
                match step(self.fd, bus) {
                    Step::Again => {}
                    Step::Interrupted => break,
                    Step::End(ending) => shared.doorbell.end(ending),
                }
            }
            if shared.doorbell.has_ended() {
                shared.gate.rest(&ticket);
            }
        }
    }
}

enum Step {
    Again,
    Interrupted,
    End(Ending),
}

/// One stay in the guest.
fn step(fd: &mut VcpuFd, bus: &Bus) -> Step {
    match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
        Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
        Ok(VcpuExit::MmioRead(addr, data)) => bus.memory_read(addr, data),
        Ok(VcpuExit::MmioWrite(addr, data)) => bus.memory_write(addr, data),
        Ok(VcpuExit::Shutdown) => return Step::End(Ending::TripleFault),
        Ok(VcpuExit::InternalError) => return Step::End(Ending::Broken(explain(fd))),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Step::End(Ending::Broken(format!(
                "This machine's KVM cannot enter the guest (reason {reason:#x} on processor {cpu})"
            )));
        }
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        Ok(other) => return Step::End(Ending::Broken(format!("KVM left the guest for an unknown reason: {other:?}"))),
        Err(e) => match e.errno() {
            libc::EINTR | libc::EAGAIN => return Step::Interrupted,
            errno => {
                let error = io::Error::from_raw_os_error(errno);
                return Step::End(Ending::Broken(format!("KVM cannot run the guest: {error}")));
            }
        },
    }
    Step::Again
}

fn explain(fd: &mut VcpuFd) -> String {
    const EMULATION: u32 = 1;
    let what = match internal_error(fd) {
        EMULATION => "it cannot emulate an instruction".to_owned(),
        other => format!("internal error {other}"),
    };
    let at = fd.get_regs().map_or(0, |r| r.rip);
    format!("This machine's KVM cannot run this guest: {what} at {at:#x}")
}
