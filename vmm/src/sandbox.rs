//! What the VMM may do: the system calls of its two kinds of threads, each beside its reason.
//!
//! Everything is open and created when the filters are installed, except for the eventfds of the queues, whose number only
//! the backends know. A processor's thread cannot open, connect, start or map anything executable; with KVM it can only do
//! what is listed here by number.

use std::mem::size_of;

use daemon::rules::RUNTIME;
use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_ioeventfd, kvm_irq_level, kvm_irq_routing, kvm_irqchip, kvm_irqfd, kvm_lapic_state,
    kvm_mp_state, kvm_msrs, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use sandbox::{Limits, Policy, Rule, When, allow, allow_if};

/// The role of a processor's thread.
pub const PROCESSOR: &str = "cpu";

/// Four for each queue (two of ours, two for its session), and a hundred queues for each of ten devices is plenty; the rest is
/// what the machine itself and messages bring.
const DESCRIPTORS: u64 = 4096;
/// Processors, the control thread, and what KVM starts by itself.
const THREADS: u64 = crate::args::MAX_CPUS as u64 + 8;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// A request number as the kernel's `_IOC` makes it: direction, size of the argument, KVM's letter, number.
const fn request<T>(direction: u32, number: u32) -> [When; 1] {
    const KVM: u32 = 0xae;
    #[expect(clippy::cast_possible_truncation, reason = "the largest argument has 4 KiB")]
    let size = size_of::<T>() as u32;
    [When::Is(1, direction << 30 | size << 16 | KVM << 8 | number)]
}

const RUN: [When; 1] = request::<()>(NONE, 0x80);
const GET_REGS: [When; 1] = request::<kvm_regs>(READ, 0x81);
const SET_REGS: [When; 1] = request::<kvm_regs>(WRITE, 0x82);
const SET_SREGS: [When; 1] = request::<kvm_sregs>(WRITE, 0x84);
const SET_MSRS: [When; 1] = request::<kvm_msrs>(WRITE, 0x89);
const SET_LAPIC: [When; 1] = request::<kvm_lapic_state>(WRITE, 0x8f);
const SET_MP_STATE: [When; 1] = request::<kvm_mp_state>(WRITE, 0x99);
const SET_VCPU_EVENTS: [When; 1] = request::<kvm_vcpu_events>(WRITE, 0xa0);
const SET_DEBUGREGS: [When; 1] = request::<kvm_debugregs>(WRITE, 0xa2);
const SET_XSAVE: [When; 1] = request::<kvm_xsave>(WRITE, 0xa5);
const SET_XCRS: [When; 1] = request::<kvm_xcrs>(WRITE, 0xa7);
const IRQ_LINE: [When; 1] = request::<kvm_irq_level>(WRITE, 0x61);
const SET_IRQCHIP: [When; 1] = request::<kvm_irqchip>(READ, 0x63);
const SET_GSI_ROUTING: [When; 1] = request::<kvm_irq_routing>(WRITE, 0x6a);
const IRQFD: [When; 1] = request::<kvm_irqfd>(WRITE, 0x76);
const IOEVENTFD: [When; 1] = request::<kvm_ioeventfd>(WRITE, 0x79);
const SET_CLOCK: [When; 1] = request::<kvm_clock_data>(WRITE, 0x7b);
const SET_PIT2: [When; 1] = request::<kvm_pit_state2>(WRITE, 0xa0);

const fn kvm(when: &'static [When], why: &'static str) -> Rule {
    allow_if(libc::SYS_ioctl, when, why)
}

/// What the registers of devices need from KVM, whichever thread changes them.
const REGISTERS: &[Rule] = &[
    kvm(&IRQFD, "a device's interrupt is unmasked or masked"),
    kvm(&IOEVENTFD, "a device's notification addresses move"),
    kvm(&IRQ_LINE, "the power button's interrupt"),
    allow_if(libc::SYS_preadv2, &[When::Is(5, libc::RWF_NOWAIT as u32)], "silencing the notifiers of a device that is reset"),
    allow(libc::SYS_clock_gettime, "the time of day, where the kernel offers no faster way"),
];

/// Less than [`RUNTIME`]: a processor's thread closes nothing and never ends before the process.
const CPU: &[Rule] = &[
    allow(libc::SYS_futex, "the gate, and the locks of devices"),
    allow(libc::SYS_brk, "the allocator's heap"),
    allow(libc::SYS_write, "waking the control thread; kicks at an address KVM does not know; log lines"),
    allow(libc::SYS_ppoll, "whether a masked interrupt is pending"),
    allow(libc::SYS_exit_group, "the end of the process"),
    kvm(&RUN, "the guest"),
    kvm(&SET_GSI_ROUTING, "a device's interrupt gets another message; a reset takes messages away, which KVM need not know"),
    kvm(&GET_REGS, "where a guest that KVM cannot run stands"),
    kvm(&SET_REGS, "power on and reset"),
    kvm(&SET_SREGS, "power on and reset"),
    kvm(&SET_MSRS, "reset"),
    kvm(&SET_LAPIC, "reset"),
    kvm(&SET_MP_STATE, "reset"),
    kvm(&SET_VCPU_EVENTS, "reset"),
    kvm(&SET_DEBUGREGS, "reset"),
    kvm(&SET_XSAVE, "reset"),
    kvm(&SET_XCRS, "reset"),
    allow(libc::SYS_rt_sigreturn, "the signal that gets a processor out of the guest"),
    allow(libc::SYS_gettid, "the address of that signal"),
];

/// The control thread writes more: the rest of the machine. It maps nothing and gives no mapping up.
const CONTROL: &[Rule] = &[
    kvm(&SET_IRQCHIP, "reset"),
    kvm(&SET_PIT2, "reset"),
    kvm(&SET_CLOCK, "reset"),
    allow(libc::SYS_tgkill, "getting a processor out of the guest"),
    allow(libc::SYS_getpid, "the address of that signal"),
    allow(libc::SYS_restart_syscall, "the kernel resumes the wait for the processors after SIGSTOP and SIGCONT"),
    allow(libc::SYS_lseek, "where kernel and initrd go in guest memory, again at a reset"),
    allow(libc::SYS_sendfile, "loading them"),
    allow(libc::SYS_fallocate, "giving guest memory back at a reset"),
    allow(libc::SYS_recvmsg, "answers of backends, commands"),
    allow(libc::SYS_sendmsg, "requests to backends, events"),
    allow(libc::SYS_eventfd2, "the notifiers of a device's queues"),
    allow_if(libc::SYS_socketpair, &[When::Is(0, libc::AF_UNIX as u32)], "the channel on which a backend asks"),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)], "the duplicates a session keeps"),
];

/// Of both.
pub const POLICY: Policy = Policy {
    name: "outboard-vmm",
    limits: Limits { descriptors: DESCRIPTORS, threads: THREADS },
    capabilities: &[],
    control: &[RUNTIME, REGISTERS, CONTROL],
    threads: &[(PROCESSOR, &[REGISTERS, CPU])],
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn calls(groups: &[&[Rule]]) -> BTreeSet<i64> {
        groups.iter().copied().flatten().map(|rule| rule.syscall).collect()
    }

    #[test]
    fn the_filters_stay_small() {
        let control = calls(POLICY.control);
        let cpu = calls(POLICY.thread(PROCESSOR).unwrap());
        assert!(control.len() <= 35, "{}", control.len());
        assert!(cpu.len() <= 18, "{}", cpu.len());
        for forbidden in [libc::SYS_openat, libc::SYS_execve, libc::SYS_clone3, libc::SYS_socket, libc::SYS_connect] {
            assert!(!control.contains(&forbidden) && !cpu.contains(&forbidden));
        }
    }

    #[test]
    fn request_numbers_are_the_kernels() {
        let number = |when: [When; 1]| match when {
            [When::Is(1, number)] => number,
            other => panic!("{other:?}"),
        };
        assert_eq!(number(RUN), 0xae80);
        assert_eq!(number(SET_REGS), 0x4090_ae82);
        assert_eq!(number(SET_IRQCHIP), 0x8208_ae63);
        assert_eq!(number(SET_XSAVE), 0x5000_aea5);
        assert_eq!(number(IRQFD), 0x4020_ae76);
        assert_eq!(number(SET_GSI_ROUTING), 0x4008_ae6a);
    }
}
