//! Starting a program inside its own namespaces.
//!
//! Between the clone and the `exec` the child is a copy of a process that may have had other threads, so nothing there may
//! allocate or lock: all strings are made before, and the child only makes system calls. A failure comes back through a pipe as
//! the number of the step and of the error.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Gid, Pid, PidfdFlags, Signal, Uid, WaitId, WaitIdOptions, getegid, geteuid, kill_process, pidfd_open,
    set_parent_process_death_signal, setsid, waitid,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::identity::{IdRange, Identity, write_maps};
use crate::sys::{self, Clone};
use crate::{Error, Result};

/// The flag by which a program learns that it is where it should be.
const NAMESPACED: &[u8] = b"--namespaced";

/// A network namespace with nothing in it, and the user namespace that owns it. One for each machine.
#[derive(Debug)]
pub struct NetNamespace {
    user: OwnedFd,
    net: OwnedFd,
}

/// A program to be started.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The file.
    pub program: &'a Path,
    /// Its arguments, without its name. `--namespaced` is added.
    pub args: Vec<OsString>,
    /// What it inherits, and under which number (3 and up). Nothing else is passed on.
    pub fds: Vec<(BorrowedFd<'a>, RawFd)>,
    /// Its standard input; `/dev/null` if there is none.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Its standard output; `/dev/null` if there is none.
    pub stdout: Option<BorrowedFd<'a>>,
    /// Its standard error; ours if there is none.
    pub stderr: Option<BorrowedFd<'a>>,
    /// The network namespace it joins; a new empty one if there is none. Only for a program that is its caller's own user.
    pub net: Option<&'a NetNamespace>,
    /// Which users it is and can be.
    pub identity: Identity,
}

/// A running program.
#[derive(Debug)]
pub struct Child {
    /// Its process id, as this process sees it.
    pub pid: i32,
    /// Readable when it has ended. Of the program itself, not of something that waits for it.
    pub pidfd: OwnedFd,
}

/// Steps of the child, by which a failure is told.
const STEPS: [&str; 12] = [
    "join the machine's network namespace",
    "create the namespaces",
    "tie the process to its parent",
    "forbid changes of groups",
    "map the user",
    "map the group",
    "start a session",
    "pass on the descriptors",
    "execute the program",
    "wait for the maps of users and groups",
    "become the first user of the map",
    "keep mounts from the host",
];

#[derive(Clone, Copy)]
enum Step {
    Join,
    Namespaces,
    Parent,
    Groups,
    User,
    Group,
    Session,
    Descriptors,
    Execute,
    Maps,
    First,
    Mounts,
}

type Failure = (Step, rustix::io::Errno);

impl NetNamespace {
    /// Makes one.
    ///
    /// # Errors
    /// When the host forbids user namespaces.
    pub fn new() -> Result<NetNamespace> {
        let maps = Maps::own();
        let (ready, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::step("make a pipe"))?;
        let (hold, release) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::step("make a pipe"))?;
        let flags = Clone::NEW_USER | Clone::NEW_NET;
        let Some(pid) = sys::clone3(flags).map_err(user_namespaces)? else {
            // The child: a holder of namespaces for as long as it takes to open them.
            drop((ready, release));
            let told = maps.write().and_then(|()| rustix::io::write(&tell, b"+").map_err(|errno| (Step::Parent, errno)));
            if told.is_ok() {
                let _released = rustix::io::read(&hold, &mut [0]);
            }
            sys::exit(0);
        };
        drop((tell, hold));
        let ok = rustix::io::read(&ready, &mut [0]) == Ok(1);
        let opened = if ok { NetNamespace::of(pid) } else { Err(Error::step("map a user namespace")(rustix::io::Errno::PERM)) };
        drop(release);
        reap(pid);
        opened
    }

    fn of(pid: Pid) -> Result<NetNamespace> {
        let step = || Error::step("open a namespace");
        let file = |name: &str| {
            let path = format!("/proc/{}/ns/{name}", pid.as_raw_nonzero());
            open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(step())
        };
        Ok(NetNamespace { user: file("user")?, net: file("net")? })
    }
}

/// Starts a program. When this returns, it has been executed.
///
/// # Errors
/// With the step that failed.
pub fn spawn(what: &Spawn<'_>) -> Result<Child> {
    what.identity.check()?;
    let plan = Plan::new(what)?;
    let (report, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::step("make a pipe"))?;
    let pid = match (&what.identity, what.net) {
        (Identity::Own, None) => start(&plan, &tell, &report)?,
        (Identity::Own, Some(net)) => start_within(net, &plan, &tell, &report)?,
        (Identity::Ranges { uids, gids }, None) => start_mapped(uids, gids, &plan, &tell, &report)?,
        (Identity::Host, None) => start_on_host(&plan, &tell, &report)?,
        (_, Some(_)) => return Err(Error::NetOfOthers),
    };
    drop(tell);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(Error::step("watch the process"))?;
    let mut failure = [0; 8];
    match rustix::io::read(&report, &mut failure) {
        Ok(0) => Ok(Child { pid: pid.as_raw_nonzero().get(), pidfd }),
        _ => {
            reap(pid);
            Err(decode(failure))
        }
    }
}

/// Clones the worker as a child of this process.
fn start(plan: &Plan<'_>, tell: &OwnedFd, report: &OwnedFd) -> Result<Pid> {
    // Asked before: inside, the user is nobody until the map is written.
    let maps = Maps::own();
    match sys::clone3(Clone::NEW_USER | Clone::WORKER | Clone::NEW_NET).map_err(user_namespaces)? {
        Some(pid) => Ok(pid),
        None => become_program(plan, &Entry::Own(&maps), tell, report),
    }
}

/// The same with a map of several users, which this process writes while the worker waits.
fn start_mapped(uids: &[IdRange], gids: &[IdRange], plan: &Plan<'_>, tell: &OwnedFd, report: &OwnedFd) -> Result<Pid> {
    let (hold, release) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::step("make a pipe"))?;
    let flags = Clone::NEW_USER | Clone::WORKER | Clone::NEW_NET;
    let Some(pid) = sys::clone3(flags).map_err(user_namespaces)? else {
        become_program(plan, &Entry::Mapped { hold: &hold, release: &release }, tell, report)
    };
    drop(hold);
    let mapped = write_maps(pid, uids, gids)
        .and_then(|()| rustix::io::write(&release, b"+").map(drop).map_err(Error::step("release the process")));
    if mapped.is_err() {
        reap(pid);
    }
    mapped.map(|()| pid)
}

/// The same without a user namespace.
fn start_on_host(plan: &Plan<'_>, tell: &OwnedFd, report: &OwnedFd) -> Result<Pid> {
    match sys::clone3(Clone::WORKER | Clone::NEW_NET).map_err(Error::step("create the namespaces"))? {
        Some(pid) => Ok(pid),
        None => become_program(plan, &Entry::Host, tell, report),
    }
}

/// Joining another user namespace cannot be undone, so a short-lived process in between does it. The worker is cloned as *our*
/// child all the same.
fn start_within(net: &NetNamespace, plan: &Plan<'_>, tell: &OwnedFd, report: &OwnedFd) -> Result<Pid> {
    let (number, tell_number) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::step("make a pipe"))?;
    let Some(between) = sys::clone3(Clone::empty()).map_err(Error::step("create a process"))? else {
        let failed = |step, errno| {
            give_up(tell, (step, errno));
            sys::exit(1)
        };
        let joined = move_into_link_name_space(net.user.as_fd(), Some(LinkNameSpaceType::User))
            .and_then(|()| move_into_link_name_space(net.net.as_fd(), Some(LinkNameSpaceType::Network)));
        if let Err(errno) = joined {
            failed(Step::Join, errno);
        }
        match sys::clone3(Clone::NEW_USER | Clone::WORKER | Clone::SIBLING) {
            Ok(Some(pid)) => {
                let _told = rustix::io::write(&tell_number, &pid.as_raw_nonzero().get().to_ne_bytes());
                sys::exit(0);
            }
            Ok(None) => become_program(plan, &Entry::Own(&Maps::INNER), tell, report),
            Err(errno) => failed(Step::Namespaces, errno),
        }
    };
    drop(tell_number);
    let mut bytes = [0; 4];
    let got = rustix::io::read(&number, &mut bytes);
    reap(between);
    match (got, Pid::from_raw(i32::from_ne_bytes(bytes))) {
        (Ok(4), Some(pid)) => Ok(pid),
        _ => {
            let mut failure = [0; 8];
            let _none = rustix::io::read(report, &mut failure);
            Err(decode(failure))
        }
    }
}

/// How the child comes to be who it is to be.
enum Entry<'a> {
    /// It writes the map of one user itself.
    Own(&'a Maps),
    /// The maps are written from outside. It may go on when there is something to be read.
    Mapped { hold: &'a OwnedFd, release: &'a OwnedFd },
    /// It is who it was.
    Host,
}

impl Entry<'_> {
    /// Before the tie to the parent, which a change of users cuts.
    fn become_first(&self) -> std::result::Result<(), Failure> {
        let Entry::Mapped { hold, release } = self else { return Ok(()) };
        // Otherwise this process would keep itself waiting after the death of the other.
        sys::close(release);
        match rustix::io::read(hold, &mut [0]) {
            Ok(1) => {}
            Ok(_) => return Err((Step::Maps, rustix::io::Errno::PIPE)),
            Err(errno) => return Err((Step::Maps, errno)),
        }
        set_thread_groups(&[])
            .and_then(|()| set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT))
            .and_then(|()| set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT))
            .map_err(|errno| (Step::First, errno))
    }

    fn settle(&self) -> std::result::Result<(), Failure> {
        match self {
            Entry::Own(maps) => maps.write(),
            Entry::Mapped { .. } => Ok(()),
            // With a user namespace the kernel does this by itself.
            Entry::Host => mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
                .map_err(|errno| (Step::Mounts, errno)),
        }
    }
}

/// What the child does until it is the program.
fn become_program(plan: &Plan<'_>, entry: &Entry<'_>, tell: &OwnedFd, report: &OwnedFd) -> ! {
    // The pipe's number may be one that the program is to have.
    let Ok(tell) = &sys::park(tell) else { sys::exit(127) };
    let failure: std::result::Result<(), Failure> = entry
        .become_first()
        .and_then(|()| tie_to_parent(tell, report))
        .and_then(|()| entry.settle())
        .and_then(|()| setsid().map(drop).map_err(|errno| (Step::Session, errno)))
        .and_then(|()| plan.pass_on().map_err(|errno| (Step::Descriptors, errno)))
        .and_then(|()| Err((Step::Execute, plan.execute())));
    if let Err(failure) = failure {
        give_up(tell, failure);
    }
    sys::exit(127)
}

/// From here on the death of the parent is ours. It may have died before that was said: then nobody holds the other end of the
/// pipe any more.
fn tie_to_parent(tell: &OwnedFd, report: &OwnedFd) -> std::result::Result<(), Failure> {
    let failed = |errno| (Step::Parent, errno);
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed)?;
    sys::close(report);
    if sys::nobody_reads(tell) { Err(failed(rustix::io::Errno::PIPE)) } else { Ok(()) }
}

fn give_up(tell: &OwnedFd, (step, errno): Failure) {
    let mut bytes = [0; 8];
    let (first, second) = bytes.split_at_mut(4);
    first.copy_from_slice(&(step as u32).to_ne_bytes());
    second.copy_from_slice(&errno.raw_os_error().to_ne_bytes());
    let _told = rustix::io::write(tell, &bytes);
}

fn decode(bytes: [u8; 8]) -> Error {
    let [a, b, c, d, e, f, g, h] = bytes;
    let step = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok();
    let source = match i32::from_ne_bytes([e, f, g, h]) {
        0 => io::Error::other("the process ended before it said why"),
        errno => io::Error::from_raw_os_error(errno),
    };
    let step = step.and_then(|step| STEPS.get(step)).copied().unwrap_or("start the process");
    Error::Step { step, source }
}

fn user_namespaces(errno: rustix::io::Errno) -> Error {
    let hint = "see sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and \
                kernel.apparmor_restrict_unprivileged_userns";
    Error::UserNamespaces { hint, source: errno.into() }
}

fn reap(pid: Pid) {
    let _gone = kill_process(pid, Signal::KILL);
    let _reaped = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
}

/// The identity map of one user: 0 inside is the caller outside, so that executing the program keeps the capabilities the next
/// steps need.
struct Maps {
    user: [u8; 32],
    group: [u8; 32],
}

impl Maps {
    /// Within a namespace in which the caller is 0 already.
    const INNER: Maps = Maps { user: text(0), group: text(0) };

    fn own() -> Maps {
        Maps { user: text(geteuid().as_raw()), group: text(getegid().as_raw()) }
    }

    fn write(&self) -> std::result::Result<(), Failure> {
        let put = |path: &std::ffi::CStr, step, bytes: &[u8]| {
            let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            file.and_then(|file| rustix::io::write(&file, bytes)).map(drop).map_err(|errno| (step, errno))
        };
        put(c"/proc/self/setgroups", Step::Groups, b"deny")?;
        put(c"/proc/self/uid_map", Step::User, &self.user)?;
        put(c"/proc/self/gid_map", Step::Group, &self.group)
    }
}

/// `0 ID 1`, padded with spaces: the child cannot allocate to format it.
const fn text(id: u32) -> [u8; 32] {
    let mut out = [b' '; 32];
    out[0] = b'0';
    let (mut rest, mut at) = (id, 16);
    loop {
        out[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
        at -= 1;
    }
    out[18] = b'1';
    out[31] = b'\n';
    out
}

/// All that the child needs, made before there is one.
struct Plan<'a> {
    program: CString,
    argv: Vec<CString>,
    envp: Vec<CString>,
    fds: Vec<(BorrowedFd<'a>, RawFd)>,
    stdio: [Option<BorrowedFd<'a>>; 3],
    null: OwnedFd,
}

impl<'a> Plan<'a> {
    fn new(what: &Spawn<'a>) -> Result<Plan<'a>> {
        let text = |bytes: Vec<u8>| CString::new(bytes).map_err(|_| Error::Argument);
        let program = text(what.program.as_os_str().as_bytes().to_vec())?;
        let mut argv = vec![program.clone()];
        for arg in &what.args {
            argv.push(text(arg.clone().into_vec())?);
        }
        argv.push(text(NAMESPACED.to_vec())?);
        let envp = std::env::vars_os().map(|(name, value)| text([name.as_bytes(), b"=", value.as_bytes()].concat()));
        let null = open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(Error::step("open /dev/null"))?;
        let stdio = [what.stdin, what.stdout, what.stderr];
        Ok(Plan { program, argv, envp: envp.collect::<Result<_>>()?, fds: what.fds.clone(), stdio, null })
    }

    fn pass_on(&self) -> rustix::io::Result<()> {
        let [stdin, stdout, stderr] = self.stdio;
        let null = self.null.as_fd();
        let standard = [Some((stdin.unwrap_or(null), 0)), Some((stdout.unwrap_or(null), 1)), stderr.map(|fd| (fd, 2))];
        sys::pass_on(standard.into_iter().flatten(), &self.fds)
    }

    fn execute(&self) -> rustix::io::Errno {
        sys::execute(&self.program, &self.argv, &self.envp)
    }
}

#[cfg(test)]
pub(crate) mod tests;
