//! The waiting parent of a process that was started by hand.
//!
//! A process cannot move itself into a new PID namespace; only its child is born there. So a program that was not started by the
//! composer starts itself again inside its namespaces, and this parent passes signals on, waits, and ends as its child ended.
//!
//! It also has the name of the child's socket, which the confined child could neither show nor remove. The socket is bound before the
//! child starts, under another name. It gets its own when the child says that it serves: whoever finds the path before that would meet
//! a program that has not read its image yet, and may refuse it.
//!
//! The parent gives up all it does not need for that. Its death is the child's.

use std::env;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result};
use caps::CapSet;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{DumpableBehavior, Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, set_dumpable_behavior, waitid};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use sandbox::{Filter, Identity, IdentityKind, Rule, Spawn, When, allow, allow_if, signal_fd, spawn};

use crate::endpoint::Name;

/// Signals that are passed on.
const FORWARDED: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGWINCH];

/// The numbers of ioctls, as the filter sees them.
const TCSETS: u32 = 0x5402;
const TCSETS2: u32 = 0x402c_542b;

/// Bytes of one signal as a signal descriptor tells it; the number comes first.
const SIGNAL_INFO: usize = 128;

const RULES: &[Rule] = &[
    allow(libc::SYS_poll, "waiting for the child and for signals"),
    allow(libc::SYS_ppoll, "waiting for the child and for signals"),
    allow(libc::SYS_read, "which signal it was"),
    allow(libc::SYS_pidfd_send_signal, "passing it on"),
    allow(libc::SYS_waitid, "how the child ended"),
    allow(libc::SYS_renameat2, "the child's socket gets its name"),
    allow(libc::SYS_unlinkat, "the file of the child's socket"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, TCSETS2)], "the terminal is put back"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, TCSETS)], "the terminal is put back"),
    allow(libc::SYS_close, "the descriptors at the end"),
    allow_if(
        libc::SYS_fcntl,
        &[When::Is(1, libc::F_GETFD as u32)],
        "debug builds look whether a descriptor is open before closing it",
    ),
    allow(libc::SYS_munmap, "the C library frees memory at the end"),
    allow(libc::SYS_sigaltstack, "Rust takes its signal stack away at the end"),
    allow(libc::SYS_write, "an error"),
    allow(libc::SYS_exit_group, "the end"),
    allow(libc::SYS_restart_syscall, "the kernel resumes a wait after SIGSTOP and SIGCONT"),
];

/// Runs this program again in its own namespaces, with the descriptors in `keep`, and gives its exit status.
pub(crate) fn run(keep: &[RawFd], sockets: &[&Path], group: Option<&str>, identity: Identity) -> Result<u8> {
    let program = env::current_exe().context("Cannot find this program's own file")?;
    let inherited: Vec<_> = keep.iter().filter_map(|fd| Some((sandbox::inherited(*fd)?, *fd))).collect();
    let signals = signal_fd(&FORWARDED).context("Cannot block signals")?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    // Asked before the child changes it.
    let terminal = tcgetattr(&stdin).ok();
    let mut doors = Doors::new()?;
    let listeners = sockets.iter().map(|path| doors.add(path, group)).collect::<Result<Vec<_>>>()?;
    let mut args: Vec<_> = env::args_os().skip(1).collect();
    let mut fds: Vec<_> = inherited.iter().map(|(fd, number)| (fd.as_fd(), *number)).collect();
    let ready = (!sockets.is_empty()).then(|| ("--ready-fd", doors.ready.as_fd()));
    if identity.kind() != IdentityKind::Own {
        args.extend(["--identity".into(), identity.kind().to_string().into()]);
    }
    for (flag, fd) in listeners.iter().map(|listener| ("--listener-fd", listener.as_fd())).chain(ready) {
        let number = (3..).find(|free| fds.iter().all(|(_, number)| number != free)).unwrap_or(3);
        args.extend([flag.into(), number.to_string().into()]);
        fds.push((fd, number));
    }
    let child = spawn(&Spawn {
        program: &program,
        args,
        fds,
        stdin: Some(stdin.as_fd()),
        stdout: Some(stdout.as_fd()),
        stderr: Some(stderr.as_fd()),
        net: None,
        identity,
    })?;
    // The child has them; a copy here would keep a connection open after its death.
    drop((inherited, listeners));
    give_up()?;
    let ended = wait(child.pid, child.pidfd.as_fd(), signals.as_fd(), &mut doors);
    // Also when the child was killed before it could do so.
    if let Some(before) = terminal {
        let _gone = tcsetattr(&stdin, OptionalActions::Now, &before);
    }
    ended
}

/// The names of the child's sockets.
struct Doors {
    names: Vec<Name>,
    ready: OwnedFd,
    shown: bool,
}

impl Doors {
    fn new() -> Result<Doors> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC).context("Cannot watch for the program to serve")?;
        Ok(Doors { names: Vec::new(), ready, shown: false })
    }

    /// Binds one more.
    fn add(&mut self, path: &Path, group: Option<&str>) -> Result<UnixListener> {
        let (listener, name) = Name::bind(path)?;
        self.names.push(name);
        if let (Some(group), Some(name)) = (group, self.names.last()) {
            name.give_to(group)?;
        }
        Ok(listener)
    }

    /// The child serves: whoever looks may come.
    fn show(&mut self) -> Result<()> {
        self.shown = true;
        self.names.iter_mut().try_for_each(Name::appear)
    }
}

/// Also when the child was killed, or never started.
impl Drop for Doors {
    fn drop(&mut self) {
        self.names.iter().for_each(Name::remove);
    }
}

fn give_up() -> Result<()> {
    for set in [CapSet::Ambient, CapSet::Bounding, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        // An ordinary user may not touch the bounding set, and with no new privileges it means nothing.
        let _bounding_of_a_user = caps::clear(None, set);
    }
    rustix::thread::set_no_new_privs(true).context("Cannot give up new privileges")?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("Cannot refuse to be traced")?;
    let filter = Filter::new(&[RULES])?;
    sandbox::leave_start_behind();
    Ok(filter.install()?)
}

fn wait(pid: i32, child: BorrowedFd<'_>, signals: BorrowedFd<'_>, doors: &mut Doors) -> Result<u8> {
    let mut shown = Ok(());
    loop {
        let ready = if doors.shown { child } else { doors.ready.as_fd() };
        let mut fds = [child, signals, ready].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // An interrupted wait leaves the results empty.
        let _interrupted = poll(&mut fds, None);
        let [ended, signalled, ready] = fds.map(|fd| !fd.revents().is_empty());
        if signalled && let Some(signal) = next_signal(signals) {
            let _already_gone = pidfd_send_signal(child, signal);
        }
        if ended {
            return shown.map(|()| status(pid));
        }
        if ready && !doors.shown {
            shown = doors.show();
            if shown.is_err() {
                let _already_gone = pidfd_send_signal(child, Signal::TERM);
            }
        }
    }
}

fn next_signal(signals: BorrowedFd<'_>) -> Option<Signal> {
    let mut info = [0; SIGNAL_INFO];
    rustix::io::read(signals, &mut info).ok()?;
    let number = info.first_chunk::<4>().map(|bytes| i32::from_ne_bytes(*bytes))?;
    Signal::from_named_raw(number)
}

/// As a shell tells it: the status, or 128 and the signal.
fn status(pid: i32) -> u8 {
    let Some(pid) = Pid::from_raw(pid) else { return 1 };
    let Ok(Some(ended)) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED) else { return 1 };
    let code = ended.exit_status().or_else(|| ended.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
