//! A backend: one that listens, or one that is started here, killed, and started again.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use sandbox::{Identity, NetNamespace, Spawn, spawn};

/// How long a started backend may take to open its socket.
const START: Duration = Duration::from_secs(10);

/// How long a killed backend may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// Connects to a backend that listens.
///
/// # Errors
/// With the path.
pub fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).with_context(|| format!("Cannot connect to {}", path.display()))
}

/// Connects to a backend that perhaps takes nobody: a full queue of connections is waited for until `limit`, not for ever.
///
/// # Errors
/// With the path.
pub fn connect_within(path: &Path, limit: Duration) -> Result<UnixStream> {
    let what = || format!("Cannot connect to {}", path.display());
    let address = SocketAddrUnix::new(path).with_context(what)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).with_context(what)?;
    let start = Instant::now();
    while let Err(errno) = rustix::net::connect(&socket, &address) {
        if errno != Errno::AGAIN || start.elapsed() >= limit {
            return Err(errno).with_context(what);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).with_context(what)?;
    Ok(stream)
}

/// A backend that is started with a command. `{fd}` in it is the number of a connected socket; `{socket}` the path of one it is
/// to listen on; without either, `--fd N` is added.
#[derive(Debug)]
pub struct Backend {
    command: Vec<String>,
    socket: Option<PathBuf>,
    child: Option<Process>,
    /// Words of the command that stand for others.
    given: Vec<(String, Vec<String>)>,
    quiet: bool,
    /// The machine's network namespace, where the backend is started as in a machine.
    machine: Option<NetNamespace>,
}

/// What was started.
#[derive(Debug)]
enum Process {
    /// A command; perhaps the waiting parent of the backend.
    Command(Child),
    /// The backend itself, in its namespaces.
    Composed(sandbox::Child),
}

impl Process {
    /// Ends it at once, and returns when it is gone.
    fn end(&mut self) -> Result<()> {
        match self {
            Process::Command(child) => {
                child.kill().context("Cannot kill the backend")?;
                child.wait().context("Cannot wait for the backend")?;
            }
            Process::Composed(child) => {
                pidfd_send_signal(&child.pidfd, Signal::KILL).context("Cannot kill the backend")?;
                waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).context("Cannot wait for the backend")?;
            }
        }
        Ok(())
    }

    /// How it ended, if it has; of a command only.
    fn ended(&mut self) -> Option<ExitStatus> {
        match self {
            Process::Command(child) => child.try_wait().ok().flatten(),
            Process::Composed(_) => None,
        }
    }
}

impl Backend {
    /// Nothing is started yet.
    pub fn new(command: Vec<String>) -> Backend {
        let listens = command.iter().any(|word| word.contains("{socket}"));
        let socket = listens.then(|| std::env::temp_dir().join(format!("outboard-probe-{}.sock", std::process::id())));
        Backend { command, socket, child: None, given: Vec::new(), quiet: false, machine: None }
    }

    /// What it says is not shown.
    #[must_use]
    pub fn quiet(mut self) -> Backend {
        self.quiet = true;
        self
    }

    /// It is started as a machine starts it: at once in its namespaces, of which the network's is made here and now for all of them.
    /// For programs of this project.
    ///
    /// # Errors
    /// When there can be no such namespace.
    pub fn in_machine(mut self) -> Result<Backend> {
        self.machine = Some(NetNamespace::new()?);
        Ok(self)
    }

    /// A word of the command that stands for others, from the next start on.
    pub fn give(&mut self, word: &str, words: Vec<String>) {
        self.given.retain(|(one, _)| one != word);
        self.given.push((word.to_owned(), words));
    }

    /// The command.
    fn words(&self) -> Vec<String> {
        let stands_for = |word: &String| match self.given.iter().find(|(one, _)| one == word) {
            Some((_, words)) => words.clone(),
            None => vec![word.clone()],
        };
        self.command.iter().flat_map(stands_for).collect()
    }

    /// Connects once more to the one that listens.
    ///
    /// # Errors
    /// With the path; when it has none.
    pub fn connect_within(&self, limit: Duration) -> Result<UnixStream> {
        connect_within(self.socket.as_deref().context("The command has no {socket} to connect to")?, limit)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(Process::ended)
    }

    /// Starts it and connects.
    ///
    /// # Errors
    /// When it does not start or does not open its socket.
    pub fn start(&mut self) -> Result<UnixStream> {
        match self.socket.clone() {
            Some(path) => self.start_listening(&path),
            None => self.start_connected(),
        }
    }

    fn start_connected(&mut self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
        let theirs = OwnedFd::from(theirs);
        if let Some(machine) = &self.machine {
            self.child = Some(Process::Composed(compose(&self.words(), machine, &theirs)?));
            return Ok(ours);
        }
        // A number that survives exec: the copy without close-on-exec is the child's alone, as this one is closed here.
        let passed = rustix::io::dup(&theirs).context("Cannot pass a socket on")?;
        let number = passed.as_raw_fd().to_string();
        let mut words: Vec<String> = self.words().iter().map(|word| word.replace("{fd}", &number)).collect();
        if !self.command.iter().any(|word| word.contains("{fd}")) {
            words.extend(["--fd".to_owned(), number]);
        }
        self.child = Some(Process::Command(run(&words, self.quiet)?));
        drop(passed);
        Ok(ours)
    }

    fn start_listening(&mut self, path: &Path) -> Result<UnixStream> {
        let _nothing_left_behind = std::fs::remove_file(path);
        let words: Vec<String> = self.words().iter().map(|word| word.replace("{socket}", &path.to_string_lossy())).collect();
        self.child = Some(Process::Command(run(&words, self.quiet)?));
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(stream),
                Err(error) if start.elapsed() > START => {
                    return Err(error).with_context(|| format!("{} does not open {}", words.join(" "), path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
            if let Some(status) = self.ended() {
                bail!("{} ended: {status}", words.join(" "));
            }
        }
    }

    /// Kills it, and waits until its end of `connection` is closed: then no thread of it can touch the rings any more, also if what
    /// was started here was only the worker's waiting parent.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(&mut self, connection: Option<impl AsFd>) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.end()?;
        }
        let Some(connection) = connection else { return Ok(()) };
        let start = Instant::now();
        loop {
            let mut fds = [PollFd::new(&connection, PollFlags::empty())];
            let _interrupted = poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 }));
            let [fd] = fds;
            if fd.revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                return Ok(());
            }
            if start.elapsed() > GONE {
                bail!("The killed backend is still alive");
            }
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _already_gone = child.end();
        }
        if let Some(path) = &self.socket {
            let _already_gone = std::fs::remove_file(path);
        }
    }
}

/// The number under which a composed backend finds its socket.
const SOCKET: i32 = 3;

fn compose(words: &[String], machine: &NetNamespace, socket: &OwnedFd) -> Result<sandbox::Child> {
    let Some((program, args)) = words.split_first() else { bail!("No command to start a backend with is given") };
    let number = SOCKET.to_string();
    let mut args: Vec<String> = args.iter().map(|word| word.replace("{fd}", &number)).collect();
    if !words.iter().any(|word| word.contains("{fd}")) {
        args.extend(["--fd".to_owned(), number]);
    }
    let what = Spawn {
        program: Path::new(program),
        args: args.into_iter().map(OsString::from).collect(),
        fds: vec![(socket.as_fd(), SOCKET)],
        stdin: None,
        stdout: None,
        stderr: None,
        net: Some(machine),
        identity: Identity::Own,
    };
    Ok(spawn(&what)?)
}

fn run(words: &[String], quiet: bool) -> Result<Child> {
    let Some((program, args)) = words.split_first() else { bail!("No command to start a backend with is given") };
    // A group of its own: what a terminal sends to the probe is not for it.
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).process_group(0);
    if quiet {
        command.stdout(Stdio::null()).stderr(Stdio::null());
    }
    command.spawn().with_context(|| format!("Cannot start {program}"))
}
