//! The order of a program's life, as types.

use std::hash::RandomState;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::{fs, io, panic, process, thread};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::error::ErrorKind;
use clap_mangen::Man;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::process::geteuid;
use sandbox::{Filter, IdentityKind, Needs, Policy, When, close_all_but, confine, signal_fd};
use tracing::{Level, debug, info, warn};

use crate::args::{Arguments, LogFormat, Socket};
use crate::endpoint::Endpoint;
use crate::{logging, parent, syslog};

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;
/// As Rust has it.
const PANICKED: u8 = 101;

/// Stack of a thread. Its frames are small and it calls nothing deep.
const STACK: usize = 256 * 1024;

/// The `main` of a program: everything that is the same in all of them. `policy` is what the process may do once it is confined;
/// `run` gives the exit status.
pub fn main<A: Arguments>(policy: &'static Policy, run: impl FnOnce(Startup<A>) -> Result<u8>) -> ExitCode {
    let args = match parse::<A>(policy) {
        Ok(args) => args,
        Err(status) => return status.into(),
    };
    let format = args.base().log_format;
    let ran = begin(args, policy, run);
    let status = ran.unwrap_or_else(|error| {
        report(&error, format);
        FAILED
    });
    // Returning would have Rust tidy up after itself, with calls that no filter has.
    sandbox::exit(status.into())
}

fn parse<A: Arguments>(policy: &Policy) -> std::result::Result<A, u8> {
    // Asking what the program is needs no other argument.
    let asked = |flag: &str| std::env::args_os().any(|arg| arg == flag);
    if let Some(capabilities) = A::CAPABILITIES.filter(|_| asked("--print-capabilities")) {
        println!("{}", serde_json::json!({"type": capabilities.kind, "features": capabilities.features}));
        return Err(0);
    }
    if asked("--print-sandbox") {
        println!("{}", describe(policy));
        return Err(0);
    }
    if std::env::args_os().nth(1).is_some_and(|arg| arg == "--print-man") {
        return Err(u8::from(print_man::<A>().is_err()));
    }
    let words = A::words(std::env::args_os().collect()).map_err(|why| A::command().error(ErrorKind::ValueValidation, why));
    words.and_then(A::try_parse_from).map_err(|error| {
        let _nobody_reads = error.print();
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
            _ => WRONG_USAGE,
        }
    })
}

/// A policy, for machines. The table in `docs/sandbox.md` is made from it.
fn describe(policy: &Policy) -> serde_json::Value {
    let condition = |when: &When| match *when {
        When::Is(argument, value) => format!("argument {argument} is {value:#x}"),
        When::Not(argument, value) => format!("argument {argument} is not {value:#x}"),
        When::HasNone(argument, mask) => format!("argument {argument} has no bit of {mask:#x}"),
    };
    let threads = [("control", policy.control)].into_iter().chain(policy.threads.iter().copied());
    let threads: Vec<_> = threads
        .map(|(thread, groups)| {
            let rules = groups.iter().copied().flatten().map(|rule| {
                let when: Vec<_> = rule.when.iter().map(condition).collect();
                serde_json::json!({"call": sandbox::name(rule.syscall), "number": rule.syscall, "when": when, "why": rule.why})
            });
            serde_json::json!({"thread": thread, "rules": rules.collect::<Vec<_>>()})
        })
        .collect();
    let capabilities: Vec<_> = policy.capabilities.iter().map(ToString::to_string).collect();
    serde_json::json!({
        "program": policy.name,
        "descriptors": policy.limits.descriptors,
        "capabilities": capabilities,
        "threads": threads,
    })
}

/// The manual page, made from the same words as `--help`. `outboard man` asks for it. In the section
/// of what runs by itself: there is a command `outboard console`, too.
fn print_man<A: Arguments>() -> io::Result<()> {
    Man::new(A::command()).section("8").render(&mut io::stdout().lock())
}

fn begin<A: Arguments>(args: A, policy: &'static Policy, run: impl FnOnce(Startup<A>) -> Result<u8>) -> Result<u8> {
    let mut inherited = args.inherited();
    let sockets: Vec<_> = args.socket().cloned().into_iter().chain(args.more_sockets()).collect();
    inherited.extend(sockets.iter().filter_map(|socket| socket.fd));
    inherited.extend(&args.base().listener_fd);
    inherited.extend([args.base().metrics_fd, args.base().ready_fd].into_iter().flatten());
    if !args.base().namespaced {
        let paths: Vec<_> = sockets.iter().filter_map(|socket| socket.socket_path.as_deref()).collect();
        return parent::run(&inherited, &paths, args.socket_group(), args.identity()?);
    }
    must_be_namespaced(args.base().identity)?;
    die_of_panics();
    sandbox::plain_faults();
    sandbox::one_heap();
    close_all_but(&inherited).context("Cannot close inherited descriptors")?;
    logging::start(args.base(), args.syslog().then_some(policy.name))?;
    run(Startup { args, policy, sockets })
}

/// A panic in one thread would leave a ring that nobody serves; the process's end is noticed and mended. No trace of the stack:
/// reading the program's own file for its names is no longer possible.
fn die_of_panics() {
    panic::set_hook(Box::new(|what| {
        eprintln!("This is a bug: {what}");
        if let Some(host) = syslog::connected() {
            host.say(Level::ERROR, &format!("This is a bug: {what}"));
        }
        sandbox::exit(PANICKED.into());
    }));
}

/// The flag is believed only where it is true: the next steps would take the host's own file systems apart.
fn must_be_namespaced(identity: IdentityKind) -> Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map").context("Cannot read this process's user map")?;
    let as_said = match identity {
        IdentityKind::Own => map.split_whitespace().nth(2) == Some("1") && map.lines().count() == 1,
        IdentityKind::Ranges => !map.split_whitespace().eq(["0", "0", "4294967295"]),
        IdentityKind::Host => geteuid().is_root(),
    };
    if process::id() != 1 || !as_said {
        bail!("--namespaced is for processes that outboard starts; leave it out");
    }
    Ok(())
}

fn report(error: &anyhow::Error, format: LogFormat) {
    let program = std::env::args_os().next().unwrap_or_default();
    let program = std::path::Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let chain = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if let Some(host) = syslog::connected() {
        host.say(Level::ERROR, &chain);
    }
    match format {
        LogFormat::Text => eprintln!("{program}: {chain}"),
        LogFormat::Json => eprintln!("{}", serde_json::json!({"level": "ERROR", "program": program, "message": chain})),
    }
}

/// The first part of a program's life: it may open what its arguments name.
#[derive(Debug)]
pub struct Startup<A> {
    args: A,
    policy: &'static Policy,
    sockets: Vec<Socket>,
}

impl<A: Arguments> Startup<A> {
    /// The arguments.
    pub fn args(&self) -> &A {
        &self.args
    }

    /// Which users the process has: what [`Arguments::identity`] said, or only its starter's own.
    pub fn identity(&self) -> IdentityKind {
        self.args.base().identity
    }

    /// Takes a descriptor over that an argument named. Each can be taken once.
    ///
    /// # Errors
    /// When nothing is open under that number.
    pub fn inherited(&self, fd: RawFd) -> Result<OwnedFd> {
        sandbox::inherited(fd).ok_or_else(|| anyhow!("Descriptor {fd} is not open"))
    }

    /// The page in which counters are to be shown, if somebody asked for them.
    ///
    /// # Errors
    /// When nothing is open under the number that was given.
    pub fn metrics(&self) -> Result<Option<OwnedFd>> {
        self.args.base().metrics_fd.map(|fd| self.inherited(fd)).transpose()
    }

    /// Gives up everything that is not open. The socket, if the arguments name one, is opened before; its path appears when it is served.
    ///
    /// # Errors
    /// When the socket cannot be had, or the process cannot be confined.
    pub fn confine(self) -> Result<Confined> {
        self.confine_with(&Needs::default())
    }

    /// The same for a program whose arguments decide what it keeps of what its policy may leave it.
    ///
    /// # Errors
    /// As [`Startup::confine`], and when it needs what cannot be had.
    pub fn confine_with(self, needs: &Needs<'_>) -> Result<Confined> {
        let policy = self.policy;
        let base = self.args.base();
        let endpoints = Endpoint::open_all(&self.sockets, base)?;
        let ready = base.ready_fd.map(|fd| self.inherited(fd)).transpose()?;
        let control = Filter::new(policy.control)?;
        // Blocked before there are threads, so that they inherit it.
        let stop = Stop::new()?;
        let kernel = confine(policy, needs, base.identity, base.sandbox_floor)
            .with_context(|| format!("Cannot confine {}", policy.name))?;
        debug!(landlock = kernel.landlock, mdwe = kernel.refuses_executable_memory, "confined");
        Ok(Confined { policy, endpoints, ready, control, stop })
    }
}

/// The second part: no paths, no new rights. Threads may start.
#[derive(Debug)]
pub struct Confined {
    policy: &'static Policy,
    endpoints: Vec<Endpoint>,
    /// Who shows the socket's path, when frontends may come.
    ready: Option<OwnedFd>,
    control: Filter,
    stop: Stop,
}

/// What becomes readable when the process is to end: because of a signal, or because the program itself says so.
#[derive(Debug)]
struct Stop {
    either: OwnedFd,
    own: OwnedFd,
    _signals: OwnedFd,
}

impl Stop {
    fn new() -> Result<Stop> {
        let signals = signal_fd(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP]).context("Cannot block signals")?;
        let what = "Cannot watch for the end";
        let own = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(what)?;
        let either = epoll::create(epoll::CreateFlags::CLOEXEC).context(what)?;
        for fd in [&signals, &own] {
            epoll::add(&either, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN).context(what)?;
        }
        Ok(Stop { either, own, _signals: signals })
    }
}

/// Ends the process in order, from any of its threads.
#[derive(Debug)]
pub struct Stopper(OwnedFd);

impl Stopper {
    /// The process is to end, as if it had got a SIGTERM.
    pub fn stop(&self) {
        let _already_stopping = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Confined {
    /// Starts a thread that runs `body` under the filter that the policy has for threads called `role`.
    ///
    /// # Errors
    /// When it does not start, or its filter cannot be installed.
    pub fn spawn(&self, role: &str, name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
        self.spawn_prepared(role, name, || (), |()| body())
    }

    /// The same for a thread that needs something which its filter forbids to make, and only the thread itself can make: `prepare`
    /// runs on it before the filter. It must not look at anything a guest or a peer has written.
    ///
    /// # Errors
    /// As [`Confined::spawn`].
    pub fn spawn_prepared<T>(
        &self,
        role: &str,
        name: String,
        prepare: impl FnOnce() -> T + Send + 'static,
        body: impl FnOnce(T) + Send + 'static,
    ) -> Result<()> {
        self.spawn_under(Filter::new(self.policy.thread(role)?)?, name, prepare, body)
    }

    fn spawn_under<T>(
        &self,
        filter: Filter,
        name: String,
        prepare: impl FnOnce() -> T + Send + 'static,
        body: impl FnOnce(T) + Send + 'static,
    ) -> Result<()> {
        let told = Arc::new((Mutex::new(None), Condvar::new()));
        let tell = Arc::clone(&told);
        let confined_body = move || {
            // The first hash table of a thread asks for random numbers, which no filter allows.
            let _asked = RandomState::new();
            let prepared = prepare();
            let installed = filter.install();
            let ok = installed.is_ok();
            let (place, news) = &*tell;
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(installed);
            news.notify_one();
            if ok {
                body(prepared);
            }
        };
        let builder = thread::Builder::new().name(name).stack_size(STACK);
        builder.spawn(confined_body).context("Cannot start a thread")?;
        let (place, news) = &*told;
        let mut installed = place.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match installed.take() {
                Some(outcome) => return Ok(outcome?),
                None => installed = news.wait(installed).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// For a thread that may decide that the process is to end.
    ///
    /// # Errors
    /// The system's.
    pub fn stopper(&self) -> Result<Stopper> {
        Ok(Stopper(self.stop.own.try_clone().context("Cannot watch for the end")?))
    }

    /// Installs the control thread's filter and runs `body`, which is given a descriptor that becomes readable when the process
    /// is asked to end.
    ///
    /// # Errors
    /// What `body` returns.
    pub fn run<T>(self, body: impl FnOnce(BorrowedFd<'_>) -> Result<T>) -> Result<T> {
        body(self.begin()?.either.as_fd())
    }

    /// Serves frontends: the connected one until it ends, or one after the other where the process listens. `each` serves
    /// one until it goes or the descriptor it is given becomes readable.
    ///
    /// # Errors
    /// What ended a connected frontend's service. Where the process listens, that is a log line, and it goes on.
    pub fn serve(mut self, each: impl FnMut(UnixStream, BorrowedFd<'_>) -> Result<()>) -> Result<u8> {
        let endpoint = self.endpoints.pop().context("There is no socket to serve")?;
        let stop = self.begin()?;
        serve_one(endpoint, each, stop.either.as_fd()).map(|()| 0)
    }

    /// The same on several sockets at a time, each with a server and a thread of its own, until all have ended.
    ///
    /// # Errors
    /// As [`Confined::serve`], and when there are not as many servers as sockets.
    pub fn serve_all(mut self, servers: Vec<Server>) -> Result<u8> {
        let endpoints = std::mem::take(&mut self.endpoints);
        ensure!(!endpoints.is_empty() && endpoints.len() == servers.len(), "There is no socket to serve");
        let others = endpoints.len().saturating_sub(1);
        let mut pairs = endpoints.into_iter().zip(servers);
        let first = pairs.next();
        let (ended, ends) = channel();
        for (index, (endpoint, server)) in pairs.enumerate() {
            let stop = self.stop.either.try_clone().context("Cannot watch for the end")?;
            let ended = ended.clone();
            let body = move |()| {
                let _somebody_waits = ended.send(serve_one(endpoint, server, stop.as_fd()));
                // The end of a thread takes calls that it may not make; that of the process is near.
                loop {
                    thread::park();
                }
            };
            let name = format!("control{}", index.saturating_add(2));
            self.spawn_under(Filter::new(self.policy.control)?, name, || (), body)?;
        }
        let stop = self.begin()?;
        let served = first.map_or(Ok(()), |(endpoint, server)| serve_one(endpoint, server, stop.either.as_fd()));
        ends.iter().take(others).fold(served, Result::and).map(|()| 0)
    }

    /// The last steps before the first byte is read.
    fn begin(self) -> Result<Stop> {
        sandbox::leave_start_behind();
        self.control.install()?;
        if let Some(parent) = self.ready {
            let _without_it_nobody_comes = rustix::io::write(&parent, &1u64.to_ne_bytes());
        }
        Ok(self.stop)
    }
}

/// Serves a frontend until it goes, or until the descriptor it is given becomes readable.
pub type Server = Box<dyn FnMut(UnixStream, BorrowedFd<'_>) -> Result<()> + Send>;

fn serve_one(
    endpoint: Endpoint,
    mut each: impl FnMut(UnixStream, BorrowedFd<'_>) -> Result<()>,
    stop: BorrowedFd<'_>,
) -> Result<()> {
    match endpoint {
        Endpoint::Connected(stream) => each(stream, stop),
        Endpoint::Listening(listener) => {
            while let Some(stream) = next_frontend(&listener, stop)? {
                info!("a frontend has come");
                if let Err(error) = each(stream, stop) {
                    let chain = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
                    warn!(target: "guest", "The frontend's connection ended: {chain}");
                }
            }
            Ok(())
        }
    }
}

/// The next connection; `None` when the process is to end.
fn next_frontend(listener: &UnixListener, stop: BorrowedFd<'_>) -> Result<Option<UnixStream>> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        // An interrupted wait leaves the results empty.
        let _interrupted = poll(&mut fds, None);
        let [stopped, ready] = fds.map(|fd| !fd.revents().is_empty());
        if stopped {
            return Ok(None);
        }
        if !ready {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            // Too many open files, or gone before it was accepted: not at once again.
            Err(error) => {
                warn!(target: "guest", "Cannot accept a frontend: {error}");
                let _interrupted = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }));
            }
        }
    }
}
