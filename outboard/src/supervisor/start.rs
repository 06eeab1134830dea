//! From a machine file to a running machine, and to its end.

use std::ffi::OsString;
use std::fs::File;
use std::io::stdin;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use anyhow::{Context, Result};
use rustix::process::getpid;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use sandbox::{Filter, NetNamespace};

use super::drive::Drive;
use super::ending::{End, Wanted};
use super::process::{Order, Process};
use super::programs::{Programs, VMM};
use super::signals::Signals;
use super::slot::Slot;
use super::terminal::Terminal;
use super::vmm::Link;
use super::{Stage, Supervisor};
use crate::args::{OnReboot, Run};
use crate::background;
use crate::control::Server;
use crate::janitor::Janitor;
use crate::journal::Journal;
use crate::machine::{Machine, Serial, Stdio, check, file, flags};
use crate::runtime::{self, RuntimeDir};
use crate::{metrics, notices, usage};

/// What is kept of the processes' words, twice: some ten thousand lines. A runtime directory lies in memory.
const LOG_LIMIT: usize = 512 * 1024;
/// What is kept of the events, twice: a few thousand.
const EVENTS_LIMIT: usize = 256 * 1024;
/// The first number of the descriptors the VMM inherits.
const FIRST: i32 = 3;

/// What neither the composer nor anything it starts ever calls. Its filter is inherited by all of them, and they need the calls by
/// which a process confines itself, so it names what is forbidden; each process puts its own list of what is allowed on top.
const NEVER: &[i64] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
];

/// The command.
pub fn run(args: &Run) -> Result<u8> {
    let mut machine = match &args.file {
        Some(path) => {
            let given = args.flags.given().join(", ");
            if !given.is_empty() {
                usage!("A machine is a file or flags, not both: with {} leave out {given}", path.display());
            }
            file::read(path)?
        }
        None => flags::machine(&args.flags, &flags::here()?)?,
    };
    if args.detach || args.background {
        machine.without_terminal()?;
    }
    check::machine(&machine)?;
    let programs = Programs::find(&machine)?;
    if args.detach {
        return background::start();
    }
    if args.background {
        background::enter()?;
    }
    // From here on every end must leave nothing behind; these are dropped in the opposite order.
    let signals = Signals::new()?;
    let dir = RuntimeDir::create(&runtime::base()?, &machine.name)?;
    // First of all, because clients wait for it: who connects now is answered when the machine is there.
    let control = Server::new(&dir.path().join(runtime::CONTROL))?;
    machine.attach(&dir.path().join(runtime::CONSOLE));
    let terminal = Terminal::remember(stdin());
    let mut janitor = Janitor::start(&dir, terminal.as_ref(), args.background)?;
    notices::keep(Journal::new(dir.path().join(runtime::LOG), LOG_LIMIT)?);
    let events = Journal::new(dir.path().join(runtime::EVENTS), EVENTS_LIMIT)?;
    let metrics = metrics::server::Server::new(&dir.path().join(runtime::METRICS))?;
    let net = NetNamespace::new().context("Cannot make the machine's network namespace")?;
    // It took its time beside ours. Nothing has touched the terminal yet.
    janitor.ready()?;
    give_up()?;
    let parts = Parts { programs, net, signals, control, metrics, events };
    let end = supervise(&machine, parts, args);
    drop(terminal);
    drop(dir);
    drop(janitor);
    let end = end?;
    notices::show(&format!("{}: {}", machine.name, end.sentence));
    Ok(end.status)
}

/// What a machine needs beside its processes.
struct Parts {
    programs: Programs,
    net: NetNamespace,
    signals: Signals,
    control: Server,
    metrics: metrics::server::Server,
    events: Journal,
}

fn supervise(machine: &Machine, parts: Parts, args: &Run) -> Result<End> {
    let Parts { programs, net, signals, control, metrics, events } = parts;
    let mut slots: Vec<Slot<'_>> = machine.devices.iter().map(Slot::new).collect();
    Drive::join_groups(slots.iter_mut().filter_map(|slot| slot.drive.as_mut()))?;
    let mut connections = Vec::new();
    for slot in &mut slots {
        connections.push(slot.start(machine, &programs, &net)?);
    }
    let (link, theirs) = Link::pair()?;
    let vmm = start_vmm(machine, &programs, &net, &slots, &connections, theirs)?;
    // The VMM has them now; a copy here would hide from the processes that it has ended.
    drop(connections);
    let mut supervisor = Supervisor {
        machine,
        programs,
        net,
        slots,
        vmm,
        link,
        control,
        metrics,
        events,
        signals,
        stage: Stage::Starting,
        wanted: Wanted::No,
        press_at: None,
        began: SystemTime::now(),
        end: None,
        announce: args.announce,
        background: args.background,
    };
    let end = supervisor.run();
    if let Ok(end) = &end {
        supervisor.ended(end);
    }
    supervisor.wind_down();
    end
}

fn start_vmm(
    machine: &Machine,
    programs: &Programs,
    net: &NetNamespace,
    slots: &[Slot<'_>],
    connections: &[OwnedFd],
    control: OwnedFd,
) -> Result<Process> {
    let mut fds: Vec<(BorrowedFd<'_>, i32)> = vec![(control.as_fd(), FIRST)];
    let mut args = arguments(machine);
    args.extend(["--control-fd".into(), FIRST.to_string().into()]);
    let serial = serial_file(machine)?;
    let mut number = FIRST;
    let mut next = || {
        number += 1;
        number
    };
    args.push("--serial".into());
    match (&machine.serial, &serial) {
        (_, Some(file)) => {
            let number = next();
            fds.push((file.as_fd(), number));
            args.push(format!("fd={number}").into());
        }
        (Serial::Stdio, None) => args.push("stdio".into()),
        (_, None) => args.push("none".into()),
    }
    for (slot, connection) in slots.iter().zip(connections) {
        let number = next();
        fds.push((connection.as_fd(), number));
        args.extend(["--device".into(), slot.vmm_argument(number)]);
    }
    let program = programs.path(VMM);
    let stdio = if machine.serial == Serial::Stdio { Stdio::Terminal } else { Stdio::Nothing };
    Process::start(Order { program: &program, args, fds, stdio, net }, "vmm", true)
}

fn arguments(machine: &Machine) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--kernel".into(), machine.kernel.clone().into()];
    if let Some(initrd) = &machine.initrd {
        args.extend(["--initrd".into(), initrd.into()]);
    }
    let megabytes = format!("{}M", machine.memory >> 20);
    args.extend(["--cmdline".into(), machine.cmdline.clone().into()]);
    args.extend(["--memory".into(), megabytes.into(), "--cpus".into(), machine.cpus.to_string().into()]);
    let on_reboot = match machine.on_reboot {
        OnReboot::Restart => "restart",
        OnReboot::Exit => "exit",
    };
    args.extend(["--on-reboot".into(), on_reboot.into()]);
    if let Some(floor) = &machine.sandbox_floor {
        args.extend(["--sandbox-floor".into(), floor.into()]);
    }
    args
}

fn serial_file(machine: &Machine) -> Result<Option<File>> {
    let Serial::File(path) = &machine.serial else {
        return Ok(None);
    };
    let file = File::options().append(true).create(true).open(path);
    Ok(Some(file.with_context(|| format!("Cannot open the serial port's file {}", path.display()))?))
}

/// What only root has, and a composer does not need: its children make their own namespaces inside the machine's, as any user
/// may. Only the machine's own had to be made before, because mapping root takes a capability.
/// The filter of system calls names what is forbidden, see [`NEVER`].
fn give_up() -> Result<()> {
    set_no_new_privs(true).context("Cannot give up new privileges")?;
    Filter::forbidding(NEVER)?.install().context("Cannot install the filter of system calls")?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(Some(getpid()), sets).context("Cannot drop capabilities")
}
