//! What somebody who has taken a device process over would try: made to be done by the process itself, with its real confinement.
//!
//! Each [`Probe`] is a few system calls that a [`Tracer`] puts into a thread in place of its own. The kernel's answer is an
//! error number, or the end of the process, or an escape. A process can be started without one of its layers ([`Layer`]): the step that
//! would have made it is left out, and everything else is as it is for users. What each layer is there for shows so.

#![expect(clippy::cast_sign_loss, reason = "the C library's flags are signed, registers are not")]

use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::unistd::Pid;

use crate::tracer::{Answer, Event, Filters, Tracer, argument, launch, place, read, write};

/// The first argument of `seccomp` that installs a filter.
const SET_MODE_FILTER: u64 = 1;

const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_SET_MDWE: u64 = 65;

const KVM_RUN: u64 = 0xae80;

const NEW_NET: u64 = 0x4000_0000;
const NEW_IPC: u64 = 0x0800_0000;
const NEW_PID: u64 = 0x2000_0000;
const NEW_USER: u64 = 0x1000_0000;

/// Here: the current directory, as a descriptor.
const HERE: u64 = (-100i64).cast_unsigned();

/// A layer that a process can be started without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The empty root.
    Mounts,
    /// The network namespace.
    Network,
    /// The IPC namespace.
    Ipc,
    /// The PID namespace.
    Pids,
    /// The limit of no further user namespaces.
    UserNamespaces,
    /// Dropping capabilities.
    Capabilities,
    /// Giving up new privileges.
    NoNewPrivileges,
    /// Refusing executable memory.
    ExecutableMemory,
    /// Landlock.
    Landlock,
    /// The limits on what may be used up.
    Limits,
}

impl Layer {
    /// All of them.
    pub const ALL: [Layer; 10] = [
        Layer::Mounts,
        Layer::Network,
        Layer::Ipc,
        Layer::Pids,
        Layer::UserNamespaces,
        Layer::Capabilities,
        Layer::NoNewPrivileges,
        Layer::ExecutableMemory,
        Layer::Landlock,
        Layer::Limits,
    ];

    /// Whether the call before which a thread stands is the step that makes this layer. `clone3` is not left out but changed.
    fn is_made_by(self, tid: Pid, call: i64) -> bool {
        match self {
            Layer::Mounts => call == libc::SYS_pivot_root,
            Layer::Network | Layer::Ipc | Layer::Pids => false,
            Layer::UserNamespaces => {
                call == libc::SYS_write && argument(tid, 2) == 2 && read::<2>(tid, argument(tid, 1)) == *b"0\n"
            }
            Layer::Capabilities => call == libc::SYS_capset,
            Layer::NoNewPrivileges => call == libc::SYS_prctl && argument(tid, 0) == PR_SET_NO_NEW_PRIVS,
            Layer::ExecutableMemory => call == libc::SYS_prctl && argument(tid, 0) == PR_SET_MDWE,
            Layer::Landlock => call == libc::SYS_landlock_restrict_self,
            Layer::Limits => call == libc::SYS_prlimit64 || call == libc::SYS_setrlimit,
        }
    }

    fn namespace(self) -> u64 {
        match self {
            Layer::Network => NEW_NET,
            Layer::Ipc => NEW_IPC,
            Layer::Pids => NEW_PID,
            _ => 0,
        }
    }
}

/// A confined process in a tracer's hands, each of its threads before a call.
#[derive(Debug)]
pub struct Prisoner {
    child: Child,
    /// The tracer.
    pub tracer: Tracer,
    /// The thread that talks to the frontend.
    pub control: Pid,
    /// The others.
    pub threads: Vec<Pid>,
    /// A directory that was left open: what one forgotten descriptor would be worth.
    pub leaked: u64,
}

impl Prisoner {
    /// Starts a program and lets it go as far as serving, with `others` threads besides the control thread. `None`: it refuses to
    /// start.
    pub fn take(program: &Path, args: &[String], filters: Filters, without: Option<Layer>, others: usize) -> Option<Prisoner> {
        let (child, tracer) = launch(program, args, filters);
        let parent = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        let mut prisoner = Prisoner { child, tracer, control: parent, threads: Vec::new(), leaked: 0 };
        let (mut filtered, mut control_serves) = (Vec::new(), false);
        while !control_serves || prisoner.threads.len() < others {
            let (tid, call) = match prisoner.tracer.event()? {
                Event::Call(tid, call) => (tid, call),
                Event::Return(tid, _) => {
                    prisoner.tracer.go(tid);
                    continue;
                }
                Event::Died(..) => continue,
            };
            if tid == parent {
                prisoner.parent_calls(tid, call, without);
                continue;
            }
            let serves = filtered.contains(&tid) && serves(tid, call);
            if call == libc::SYS_seccomp && argument(tid, 0) == SET_MODE_FILTER {
                filtered.push(tid);
            }
            match (serves, tid == prisoner.control) {
                (true, true) => control_serves = true,
                (true, false) => prisoner.threads.push(tid),
                (false, _) => prisoner.worker_calls(tid, call, without),
            }
        }
        Some(prisoner)
    }

    /// The parent makes the namespaces.
    fn parent_calls(&mut self, tid: Pid, call: i64, without: Option<Layer>) {
        if call == libc::SYS_clone3 {
            let at = argument(tid, 0);
            let flags = u64::from_ne_bytes(read(tid, at)) & !without.map_or(0, Layer::namespace);
            write(tid, at, &flags.to_ne_bytes());
        }
        self.tracer.go(tid);
    }

    /// The worker makes the rest, while it has one thread.
    fn worker_calls(&mut self, tid: Pid, call: i64, without: Option<Layer>) {
        if call == libc::SYS_mount && self.leaked == 0 {
            let root = place(tid, 0, b"/\0");
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            let answer = self.tracer.instead(tid, Some((libc::SYS_openat, [HERE, root, flags as u64, 0, 0, 0])));
            let Answer::Value(fd @ 3..) = answer else { panic!("a directory can be left open: {answer:?}") };
            (self.leaked, self.control) = (fd.cast_unsigned(), tid);
        }
        if without.is_some_and(|layer| layer.is_made_by(tid, call)) {
            self.tracer.instead(tid, None);
        } else {
            self.tracer.go(tid);
        }
    }
}

/// Whether a thread has come to where it waits for a guest: in `ppoll`, or in the guest.
fn serves(tid: Pid, call: i64) -> bool {
    call == libc::SYS_ppoll || call == libc::SYS_ioctl && argument(tid, 1) == KVM_RUN
}

impl Drop for Prisoner {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        self.tracer.run(|_, _| {});
        let _reaped = self.child.wait();
    }
}

/// What there is to be reached outside.
#[derive(Debug)]
pub struct Outside {
    tcp: TcpListener,
    udp: UdpSocket,
    path: PathBuf,
    _unix: [UnixListener; 2],
    shared: String,
}

impl Outside {
    /// Sockets that listen, and System V memory.
    pub fn new(path: PathBuf) -> Outside {
        let made = Command::new("ipcmk").args(["--shmem", "4096"]).output().expect("ipcmk of util-linux");
        let text = String::from_utf8_lossy(&made.stdout).into_owned();
        let shared = text.split(':').nth(1).expect("an id").trim().to_owned();
        let named = UnixListener::bind(&path).expect("a socket");
        let address = SocketAddr::from_abstract_name(path.to_string_lossy().as_bytes()).expect("a name");
        let unix = [named, UnixListener::bind_addr(&address).expect("a socket")];
        let tcp = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        Outside { tcp, udp, path, _unix: unix, shared }
    }

    fn internet(port: u16) -> Vec<u8> {
        let [high, low] = port.to_be_bytes();
        [[2, 0, high, low], [127, 0, 0, 1], [0; 4], [0; 4]].concat()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _gone = Command::new("ipcrm").args(["--shmem-id", &self.shared]).status();
    }
}

/// Who tries, from which thread.
pub struct Attempt<'a> {
    tracer: &'a mut Tracer,
    tid: Pid,
    leaked: u64,
    outside: &'a Outside,
}

/// The process was ended for a call, or the call failed with this error number.
type Failed = Option<i32>;

impl Attempt<'_> {
    fn call(&mut self, number: i64, args: [u64; 6]) -> Result<u64, Failed> {
        match self.tracer.instead(self.tid, Some((number, args))) {
            Answer::Value(value) if value < 0 => Err(Some(i32::try_from(-value).expect("an error number"))),
            Answer::Value(value) => Ok(value.cast_unsigned()),
            Answer::Killed(_) => Err(None),
        }
    }

    fn bytes(&self, slot: u64, bytes: &[u8]) -> u64 {
        place(self.tid, slot, bytes)
    }

    fn open(&mut self, dir: u64, path: &[u8], flags: i32) -> Result<u64, Failed> {
        let path = self.bytes(0, path);
        self.call(libc::SYS_openat, [dir, path, flags as u64, 0o600, 0, 0])
    }

    fn socket(&mut self, domain: i32, kind: i32) -> Result<u64, Failed> {
        self.call(libc::SYS_socket, [domain as u64, kind as u64, 0, 0, 0, 0])
    }

    fn connect(&mut self, domain: i32, kind: i32, address: &[u8]) -> Result<u64, Failed> {
        let socket = self.socket(domain, kind)?;
        let at = self.bytes(0, address);
        self.call(libc::SYS_connect, [socket, at, address.len() as u64, 0, 0, 0])
    }

    fn unix(&mut self, name: &[u8]) -> Result<u64, Failed> {
        self.connect(libc::AF_UNIX, libc::SOCK_STREAM, &[&[1, 0], name].concat())
    }
}

/// A way out that is tried.
pub type Probe = (&'static str, fn(&mut Attempt<'_>) -> Result<u64, Failed>);

fn tester() -> u64 {
    std::process::id().into()
}

/// The ways out: those of the field's escape matrix, and some of our own.
pub const PROBES: [Probe; 33] = [
    ("open /etc/passwd", |a| a.open(HERE, b"/etc/passwd\0", libc::O_RDONLY)),
    ("open through a leaked directory", |a| a.open(a.leaked, b"etc/passwd\0", libc::O_RDONLY)),
    ("open /dev/kvm", |a| a.open(HERE, b"/dev/kvm\0", libc::O_RDWR)),
    ("create a file", |a| a.open(HERE, b"escaped\0", libc::O_CREAT | libc::O_WRONLY)),
    ("TCP to the host", |a| {
        let port = a.outside.tcp.local_addr().expect("bound").port();
        a.connect(libc::AF_INET, libc::SOCK_STREAM, &Outside::internet(port))
    }),
    ("UDP to the host", |a| {
        let port = a.outside.udp.local_addr().expect("bound").port();
        let socket = a.socket(libc::AF_INET, libc::SOCK_DGRAM)?;
        let (to, what) = (a.bytes(0, &Outside::internet(port)), a.bytes(1, b"x"));
        a.call(libc::SYS_sendto, [socket, what, 1, 0, to, 16])
    }),
    ("an abstract socket", |a| {
        let path = a.outside.path.to_string_lossy().into_owned();
        a.unix(&[b"\0", path.as_bytes()].concat())
    }),
    ("a socket with a path", |a| {
        let path = a.outside.path.to_string_lossy().into_owned();
        a.unix(&[path.as_bytes(), b"\0"].concat())
    }),
    ("signal another process", |a| a.call(libc::SYS_kill, [tester(), 0, 0, 0, 0, 0])),
    ("trace another process", |a| a.call(libc::SYS_ptrace, [0x4206, tester(), 0, 0, 0, 0])),
    ("read another's memory", |a| {
        let at = a.bytes(0, &[0; 64]);
        let vector = a.bytes(1, &[at.to_ne_bytes(), 8u64.to_ne_bytes()].concat());
        a.call(libc::SYS_process_vm_readv, [tester(), vector, 1, vector, 1, 0])
    }),
    ("pidfd of another", |a| a.call(libc::SYS_pidfd_open, [tester(), 0, 0, 0, 0, 0])),
    ("System V memory", |a| {
        let id = a.outside.shared.parse().expect("a number");
        a.call(libc::SYS_shmat, [id, 0, 0, 0, 0, 0])
    }),
    ("a new user namespace", |a| a.call(libc::SYS_clone, [NEW_USER | libc::SIGCHLD as u64, 0, 0, 0, 0, 0])),
    ("mount", |a| {
        let (what, here, kind) = (a.bytes(0, b"x\0"), a.bytes(1, b"/\0"), a.bytes(2, b"tmpfs\0"));
        a.call(libc::SYS_mount, [what, here, kind, 0, 0, 0])
    }),
    ("chroot", |a| {
        let root = a.bytes(0, b"/\0");
        a.call(libc::SYS_chroot, [root, 0, 0, 0, 0, 0])
    }),
    ("io_uring", |a| {
        let parameters = a.bytes(0, &[0; 120]);
        a.call(libc::SYS_io_uring_setup, [1, parameters, 0, 0, 0, 0])
    }),
    ("bpf", |a| {
        let map = a.bytes(0, &[1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]);
        a.call(libc::SYS_bpf, [0, map, 16, 0, 0, 0])
    }),
    ("userfaultfd", |a| a.call(libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0])),
    ("perf_event_open", |a| {
        let about = a.bytes(0, &[[1, 0, 0, 0, 128, 0, 0, 0].as_slice(), &[0; 120]].concat());
        a.call(libc::SYS_perf_event_open, [about, 0, u64::MAX, u64::MAX, 0, 0])
    }),
    ("keyctl", |a| a.call(libc::SYS_keyctl, [0, (-3i64).cast_unsigned(), 0, 0, 0, 0])),
    ("a netlink socket", |a| a.socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("a vsock socket", |a| a.socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("a crypto socket", |a| a.socket(libc::AF_ALG, libc::SOCK_SEQPACKET)),
    ("map executable memory", |a| {
        let (rwx, private) = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        a.call(libc::SYS_mmap, [0, 4096, rwx as u64, private as u64, u64::MAX, 0])
    }),
    ("make memory executable", |a| {
        let page = a.bytes(0, &[0; 8]) & !4095;
        a.call(libc::SYS_mprotect, [page, 4096, (libc::PROT_READ | libc::PROT_EXEC) as u64, 0, 0, 0])
    }),
    ("a memory file", |a| {
        let name = a.bytes(0, b"x\0");
        a.call(libc::SYS_memfd_create, [name, 0, 0, 0, 0, 0])
    }),
    ("fork", |a| a.call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0])),
    ("raise a limit", |a| {
        let wanted = a.bytes(0, &[4096u64.to_ne_bytes(), 4096u64.to_ne_bytes()].concat());
        a.call(libc::SYS_prlimit64, [0, libc::RLIMIT_CORE.into(), wanted, 0, 0, 0])
    }),
    ("execute a program", |a| {
        let (path, none) = (a.bytes(0, b"/bin/true\0"), a.bytes(1, &[0; 16]));
        a.call(libc::SYS_execve, [path, none, none, 0, 0, 0])
    }),
    ("become another user", |a| a.call(libc::SYS_setuid, [65534, 0, 0, 0, 0, 0])),
    ("type into the terminal", |a| {
        let key = a.bytes(0, b"x");
        a.call(libc::SYS_ioctl, [0, 0x5412, key, 0, 0, 0])
    }),
    ("a device file", |a| {
        let path = a.bytes(0, b"null\0");
        a.call(libc::SYS_mknodat, [HERE, path, 0o020_600, 0x103, 0, 0])
    }),
];

/// How an attempt came out, in the words of the tables.
pub fn attempt(prisoner: &mut Prisoner, tid: Pid, probe: &Probe, outside: &Outside) -> String {
    let leaked = prisoner.leaked;
    let mut attempt = Attempt { tracer: &mut prisoner.tracer, tid, leaked, outside };
    match probe.1(&mut attempt) {
        Ok(_) => "ESCAPE".to_owned(),
        Err(None) => "killed".to_owned(),
        Err(Some(errno)) => name(errno),
    }
}

/// What the layers other than the filter answer, where that does not depend on the host's settings, and what changes when a
/// layer is left out. Ways that are not here are closed by the filter alone, or by the host.
pub const MATRIX: [Row; 21] = [
    ("open /etc/passwd", "ENOENT", &[(Layer::Mounts, "EACCES")]),
    ("open through a leaked directory", "EACCES", &[(Layer::Landlock, "ESCAPE")]),
    ("open /dev/kvm", "ENOENT", &[(Layer::Mounts, "EACCES")]),
    ("create a file", "EROFS", &[(Layer::Mounts, "EACCES")]),
    ("TCP to the host", "EACCES", &[(Layer::Landlock, "ENETUNREACH")]),
    ("UDP to the host", "ENETUNREACH", &[(Layer::Network, "ESCAPE")]),
    ("an abstract socket", "ECONNREFUSED", &[(Layer::Network, "EPERM")]),
    ("a socket with a path", "ENOENT", &[(Layer::Mounts, "ESCAPE")]),
    ("signal another process", "ESRCH", &[]),
    ("trace another process", "ESRCH", &[]),
    ("read another's memory", "ESRCH", &[]),
    ("pidfd of another", "ESRCH", &[]),
    ("System V memory", "EINVAL", &[(Layer::Ipc, "ESCAPE")]),
    ("a new user namespace", "ENOSPC", &[(Layer::UserNamespaces, "ESCAPE")]),
    ("mount", "EPERM", &[]),
    ("chroot", "EPERM", &[(Layer::Capabilities, "ESCAPE")]),
    ("map executable memory", "EACCES", &[(Layer::ExecutableMemory, "ESCAPE")]),
    ("make memory executable", "EACCES", &[(Layer::ExecutableMemory, "ESCAPE")]),
    ("raise a limit", "EPERM", &[(Layer::Limits, "ESCAPE")]),
    ("execute a program", "ENOENT", &[(Layer::Mounts, "EACCES")]),
    ("a device file", "EROFS", &[(Layer::Mounts, "EACCES")]),
];

/// A way out, the answer with every layer but the filter, and the answers where one more is missing.
pub type Row = (&'static str, &'static str, &'static [(Layer, &'static str)]);

/// Layers without which a process refuses to start: it looks for the one, and the next step needs the other.
pub const NEEDED_TO_START: [Layer; 2] = [Layer::Pids, Layer::NoNewPrivileges];

/// Whether the kernel has every layer of [`MATRIX`]; says so if not. Where it lacks one, the tasks lower the sandbox's floor, and other
/// layers answer.
pub fn has_all_layers() -> bool {
    let lower = std::env::var_os("OUTBOARD_SANDBOX_FLOOR");
    if let Some(floor) = &lower {
        println!("With the floor {} some layers are not there: only the filter is tried here.", floor.display());
    }
    lower.is_none()
}

/// Tries everything from every thread, each time in a new process, under the filter it has for users.
///
/// # Panics
/// When the process survives one of them.
pub fn filters_end_whoever_tries(program: &Path, args: &[String], others: usize, outside: &Outside) {
    for thread in 0..=others {
        for probe in &PROBES {
            let taken = Prisoner::take(program, args, Filters::InForce, None, others);
            let mut prisoner = taken.expect("the program starts");
            let tid = thread.checked_sub(1).map_or(prisoner.control, |other| prisoner.threads[other]);
            let came_out = attempt(&mut prisoner, tid, probe, outside);
            assert_eq!(came_out, "killed", "{}, thread {thread}: {}", program.display(), probe.0);
        }
    }
}

/// Tries everything with the filter suspended: with the other layers, and with each of them left out.
///
/// # Panics
/// When an answer is another than in [`MATRIX`], or a layer can be left out and nothing shows it.
pub fn layers_answer_as_they_should(program: &Path, args: &[String], others: usize, outside: &Outside) {
    for without in [None].into_iter().chain(Layer::ALL.map(Some)) {
        let taken = Prisoner::take(program, args, Filters::Suspended, without, others);
        let needed = without.is_some_and(|layer| NEEDED_TO_START.contains(&layer));
        assert_eq!(taken.is_none(), needed, "{}: started without {without:?}", program.display());
        let Some(mut prisoner) = taken else { continue };
        let control = prisoner.control;
        let mut noticed = without.is_none();
        for (name, usual, changes) in MATRIX {
            let probe = PROBES.iter().find(|(known, _)| *known == name).expect("a probe of that name");
            let changed = changes.iter().find(|(layer, _)| Some(*layer) == without).map(|(_, answer)| *answer);
            let came_out = attempt(&mut prisoner, control, probe, outside);
            assert_eq!(came_out, changed.unwrap_or(usual), "{}: {name} without {without:?}", program.display());
            noticed |= changed.is_some();
        }
        assert!(noticed, "nothing shows that {without:?} is missing");
    }
}

/// [`MATRIX`] as the documents show it.
pub fn table() -> String {
    let mut text = "| tried | filter | the other layers | if one more is missing |\n|---|---|---|---|\n".to_owned();
    for (name, _) in PROBES {
        let row = MATRIX.iter().find(|(known, ..)| *known == name);
        let usual = row.map_or("(the filter alone, or the host)", |(_, usual, _)| usual);
        let changes = row.map_or(&[][..], |(.., changes)| changes);
        let changes: Vec<String> = changes.iter().map(|(layer, answer)| format!("{layer:?}: {answer}")).collect();
        text.push_str(&format!("| {name} | killed | {usual} | {} |\n", changes.join(", ")));
    }
    text
}

fn name(errno: i32) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EROFS, "EROFS"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
        (libc::ENETUNREACH, "ENETUNREACH"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOKEY, "ENOKEY"),
        (libc::EIO, "EIO"),
    ];
    let known = names.iter().find(|(number, _)| *number == errno);
    known.map_or_else(|| io::Error::from_raw_os_error(errno).to_string(), |(_, name)| (*name).to_owned())
}
