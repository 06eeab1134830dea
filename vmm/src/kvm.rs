//! Everything that touches KVM with `unsafe`, and the interface the rest of the VMM uses instead.
//!
//! [`Vm`] owns the VM descriptor. Devices see it only as [`Hypervisor`], five verbs about interrupts and doorbells, so
//! that every register file can be tested on a machine without KVM. [`Kick`] gets a processor out of the guest.

#![expect(unsafe_code, reason = "memory slots, the shared kvm_run page and tgkill have no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_clock_data, kvm_irq_routing_entry, kvm_irqchip,
    kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use thiserror::Error;
use vhost_user::event;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

use crate::memory::{KVM_PRIVATE, Memory};

/// Interrupt lines of the I/O APIC; MSI routes have the numbers after them.
pub const IOAPIC_LINES: u32 = 24;
/// The kernel takes at most 4096 routes; a device has one for each queue and one for its configuration.
pub const MAX_ROUTES: u32 = 4096;

/// Why KVM cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// There is none.
    #[error(
        "This machine has no /dev/kvm: switch virtualisation on in the firmware and load kvm_intel or kvm_amd; \
         inside a virtual machine, nested virtualisation has to be enabled on its host"
    )]
    Missing,
    /// There is one, for others.
    #[error("No right to open /dev/kvm: add yourself to its group with `sudo usermod -aG kvm $USER` and log in again")]
    Denied,
    /// There is something else.
    #[error("/dev/kvm is not KVM, or not of a version that this program knows")]
    Strange,
    /// It lacks something.
    #[error("This machine's KVM has no {what}")]
    Lacks {
        /// What is missing.
        what: &'static str,
    },
    /// A call failed.
    #[error("Cannot {doing}")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Turns the errno of kvm-ioctls into a sentence's second half.
pub(crate) fn call(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Call { doing, source: io::Error::from_raw_os_error(e.errno()) }
}

/// Opens /dev/kvm and checks that it has what every guest needs.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| match io::Error::from_raw_os_error(e.errno()).kind() {
        io::ErrorKind::NotFound => Error::Missing,
        io::ErrorKind::PermissionDenied => Error::Denied,
        _ => call("open /dev/kvm")(e),
    })?;
    if kvm.get_api_version() != KVM_API_VERSION.cast_signed() {
        return Err(Error::Strange);
    }
    const NEEDED: [(Cap, &str); 7] = [
        (Cap::Irqchip, "interrupt controller in the kernel"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IoeventfdNoLength, "ioeventfd without a length"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::Pit2, "timer in the kernel"),
    ];
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(Error::Lacks { what }),
        None => Ok(kvm),
    }
}

/// An eventfd that never blocks: the currency between processors, the control thread, KVM and backends.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// A silent one.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Signals it. A backend may have it, too: nobody waits here for room in it.
    pub fn signal(&self) {
        event::signal(self.as_fd());
    }

    /// Silences it. A backend may have it, too: nobody waits here for something in it.
    pub fn take(&self) {
        let _is_one = event::take(self.as_fd());
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by self.0, which nobody can close while self is borrowed; vmm-sys-util just does
        // not say so in its types.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// What devices may ask of the hypervisor.
pub trait Hypervisor: Send + Sync {
    /// Lets interrupt `gsi` mean this message.
    fn route_msi(&self, gsi: u32, address: u64, data: u32) -> io::Result<()>;
    /// A write to `event` raises `gsi` from now on; one that is already pending does so at once.
    fn attach_irq(&self, event: &Event, gsi: u32) -> io::Result<()>;
    /// Undoes [`Hypervisor::attach_irq`].
    fn detach_irq(&self, event: &Event, gsi: u32) -> io::Result<()>;
    /// A guest write to `addr` writes `event` and does not leave the kernel.
    fn attach_kick(&self, event: &Event, addr: u64) -> io::Result<()>;
    /// Undoes [`Hypervisor::attach_kick`].
    fn detach_kick(&self, event: &Event, addr: u64) -> io::Result<()>;
}

/// The virtual machine: memory slots, interrupt controllers and routes.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    /// The kernel replaces its whole table at each change, so this is the table.
    routes: Mutex<Vec<kvm_irq_routing_entry>>,
}

impl Vm {
    /// Creates a machine without memory, with nothing on its board.
    pub fn new(kvm: &Kvm) -> Result<Self, Error> {
        let fd = kvm.create_vm().map_err(call("create a virtual machine"))?;
        let identity = KVM_PRIVATE.start;
        fd.set_identity_map_address(identity).map_err(call("place KVM's identity map"))?;
        let tss = usize::try_from(identity + 0x1000).unwrap_or(0);
        fd.set_tss_address(tss).map_err(call("place KVM's task state segment"))?;
        Ok(Self { fd, routes: Mutex::new(line_routes()) })
    }

    /// Interrupt controllers, timer and the lines between them. Before there are processors.
    pub fn add_chips(&self) -> Result<(), Error> {
        self.fd.create_irq_chip().map_err(call("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(call("create the timer"))?;
        self.set_routes(|_| {}).map_err(|source| Error::Call { doing: "route interrupt lines", source })
    }

    /// Gives the machine its memory, which must live as long as the process.
    pub fn add_memory(&self, memory: &'static Memory) -> Result<(), Error> {
        for (slot, (span, host)) in memory.slots().into_iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(slot).unwrap_or(0),
                flags: 0,
                guest_phys_addr: span.start,
                memory_size: span.size,
                userspace_addr: host,
            };
            // SAFETY: the range is exactly one mapping of `memory`, which is never unmapped, because the reference is
            // 'static. Nothing in this process holds a Rust reference into it: it is only reached through vm-memory's
            // volatile accessors, so a guest that changes it under us changes data, not Rust's assumptions.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(call("give the guest its memory"))?;
        }
        Ok(())
    }

    /// The VM descriptor, for creating processors.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    fn set_routes(&self, change: impl FnOnce(&mut Vec<kvm_irq_routing_entry>)) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut routes);
        let table = KvmIrqRouting::from_entries(&routes).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.fd.set_gsi_routing(&table).map_err(os_error)
    }

    /// Everything in the kernel that a reset has to bring back, apart from the processors.
    pub fn snapshot(&self) -> Result<Chips, Error> {
        let mut controllers = [kvm_irqchip::default(); 3];
        for (chip, id) in controllers.iter_mut().zip([KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]) {
            chip.chip_id = id;
            self.fd.get_irqchip(chip).map_err(call("read the interrupt controllers"))?;
        }
        let timer = self.fd.get_pit2().map_err(call("read the timer"))?;
        Ok(Chips { controllers, timer })
    }

    /// Puts interrupt controllers and timer back to what they were when [`Vm::snapshot`] was taken.
    pub fn restore(&self, chips: &Chips) -> Result<(), Error> {
        for chip in &chips.controllers {
            self.fd.set_irqchip(chip).map_err(call("reset the interrupt controllers"))?;
        }
        self.fd.set_pit2(&chips.timer).map_err(call("reset the timer"))?;
        self.fd.set_clock(&kvm_clock_data::default()).map_err(call("reset the clock"))
    }
}

/// State of the chips at power on.
#[derive(Debug)]
pub struct Chips {
    controllers: [kvm_irqchip; 3],
    timer: kvm_pit_state2,
}

fn os_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

/// The sixteen ISA lines reach both kinds of controller, the rest only the I/O APIC. As on every PC the timer's line 0
/// arrives at pin 2 (the MADT says so too), where the cascade of the two old controllers leaves a pin free.
fn line_routes() -> Vec<kvm_irq_routing_entry> {
    let chip = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_bindings::kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let mut routes = Vec::new();
    for gsi in 0..16 {
        match gsi {
            2 => {}
            0..8 => routes.push(chip(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            _ => routes.push(chip(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
        }
    }
    for gsi in 0..IOAPIC_LINES {
        match gsi {
            0 => routes.push(chip(gsi, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => routes.push(chip(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    routes
}

impl Hypervisor for Vm {
    fn route_msi(&self, gsi: u32, address: u64, data: u32) -> io::Result<()> {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        let [a0, a1, a2, a3, a4, a5, a6, a7] = address.to_le_bytes();
        entry.u.msi = kvm_bindings::kvm_irq_routing_msi {
            address_lo: u32::from_le_bytes([a0, a1, a2, a3]),
            address_hi: u32::from_le_bytes([a4, a5, a6, a7]),
            data,
            ..Default::default()
        };
        self.set_routes(|routes| {
            routes.retain(|r| r.gsi != gsi);
            routes.push(entry);
        })
    }

    fn attach_irq(&self, event: &Event, gsi: u32) -> io::Result<()> {
        self.fd.register_irqfd(&event.0, gsi).map_err(os_error)
    }

    fn detach_irq(&self, event: &Event, gsi: u32) -> io::Result<()> {
        self.fd.unregister_irqfd(&event.0, gsi).map_err(os_error)
    }

    fn attach_kick(&self, event: &Event, addr: u64) -> io::Result<()> {
        self.fd.register_ioevent(&event.0, &IoEventAddress::Mmio(addr), NoDatamatch).map_err(os_error)
    }

    fn detach_kick(&self, event: &Event, addr: u64) -> io::Result<()> {
        self.fd.unregister_ioevent(&event.0, &IoEventAddress::Mmio(addr), NoDatamatch).map_err(os_error)
    }
}

/// The way to get one processor out of the guest, held by the control thread.
///
/// A signal alone could arrive just before `KVM_RUN` and be lost. So the flag in the page that is shared with the kernel
/// comes first: if the processor is on its way in, KVM sees the flag and returns; if it is inside, the signal ends it.
#[derive(Debug)]
pub struct Kick {
    flag: &'static AtomicU8,
    thread: i32,
}

impl Kick {
    /// For the calling thread, which runs this processor. The processor is never closed: its thread parks until the
    /// process ends.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        let flag: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: the byte lies in the kvm_run page, which is shared with the kernel and is accessed by it concurrently,
        // so it is an atomic by nature. `own` (cpu.rs) leaks the VcpuFd before its thread starts, so that the page stays
        // mapped for the life of the process; AtomicU8 has the size and alignment of u8.
        let flag = unsafe { AtomicU8::from_ptr(flag) };
        Self { flag, thread: rustix::thread::gettid().as_raw_nonzero().get() }
    }

    /// Makes the processor leave the guest, now or at its next attempt to enter.
    pub fn kick(&self) {
        self.flag.store(1, Ordering::Release);
        let process = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: tgkill takes three integers and touches no memory of ours. The thread lives as long as the process,
        // so the number cannot have been given to another one; if it had, the worst is a signal with an empty handler.
        unsafe { libc::syscall(libc::SYS_tgkill, process, self.thread, KICK) };
    }

    /// Lets the processor enter the guest again. Only its own thread may call this, before it looks for orders.
    pub fn clear(&self) {
        self.flag.store(0, Ordering::Release);
    }

    /// The same processor, for a second holder.
    pub fn share(&self) -> Self {
        Self { flag: self.flag, thread: self.thread }
    }
}

/// Not one of the real-time signals: of those, each one that is sent again while a processor is slow would wait in a queue.
const KICK: libc::c_int = libc::SIGUSR1;

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the empty handler of the signal that [`Kick::kick`] sends: it exists to end a system call.
pub fn install_kick_signal() -> io::Result<()> {
    register_signal_handler(KICK, interrupted).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// What KVM says about an internal error: its kind; 1 is a failed emulation.
pub fn internal_error(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller has just seen KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member; any bit pattern
    // is a valid u32.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// Restores the floating-point and vector registers.
pub(crate) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), Error> {
    // SAFETY: KVM reads as many bytes as KVM_GET_XSAVE wrote, which is the size of this structure as long as no feature
    // with a larger area has been switched on for this process by arch_prctl (we never do).
    unsafe { vcpu.set_xsave(xsave) }.map_err(call("reset a processor's vector registers"))
}
