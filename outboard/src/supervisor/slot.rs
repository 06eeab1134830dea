//! A device of the running machine: who serves it, in which state it is, and when something is due.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::io::ioctl_fionbio;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair};
use rustix::process::Signal;
use sandbox::NetNamespace;
use virtio::words;

use super::drive::Drive;
use super::policy::Backoff;
use super::process::{Order, Process};
use super::programs::Programs;
use super::view::seconds;
use super::vmm::DeviceState;
use crate::control::report;
use crate::machine::{Backend, Class, Device, Machine, Program, Stdio};

/// The number under which a device process gets its connection.
const CONNECTION: i32 = 3;
/// A process whose connection is lost but which lives on is stuck: it gets this long to end by itself.
const GRACE: Duration = Duration::from_secs(1);
/// A process that is stopped (SIGSTOP) does nothing by itself: it gets this long to be continued by whoever stopped it. Guests wait
/// for seconds before they complain.
const STANDSTILL: Duration = Duration::from_millis(500);

/// A device of the running machine.
#[derive(Debug)]
pub struct Slot<'a> {
    /// What it is.
    pub device: &'a Device,
    /// Its process, if it has one and it runs.
    pub process: Option<Process>,
    /// What the VMM says of the connection.
    pub state: Option<DeviceState>,
    /// The disk, if it is one of ours.
    pub drive: Option<Drive<'a>>,
    /// What a process leaves for its successor.
    memory: Option<OwnedFd>,
    /// Its backend has been connected at least once.
    pub served: bool,
    /// How often it was started, or connected, again.
    pub restarts: u32,
    /// When it is to be started, or connected, again.
    pub retry_at: Option<Instant>,
    /// When a stuck process is to be killed.
    pub kill_at: Option<Instant>,
    /// When a stopped process counts as stuck.
    pub stuck_at: Option<Instant>,
    /// The user has left the terminal that this process had.
    left: bool,
    backoff: Backoff,
    began: Instant,
}

impl<'a> Slot<'a> {
    /// Not started yet.
    pub fn new(device: &'a Device) -> Self {
        Self {
            device,
            drive: device.disk().map(|disk| Drive::new(&device.name, disk)),
            memory: None,
            process: None,
            state: None,
            served: false,
            restarts: 0,
            retry_at: None,
            kill_at: None,
            stuck_at: None,
            left: false,
            backoff: Backoff::default(),
            began: Instant::now(),
        }
    }

    /// Starts the process, or connects to somebody else's; returns the VMM's end of the connection.
    pub fn start(&mut self, machine: &Machine, programs: &Programs, net: &NetNamespace) -> Result<OwnedFd> {
        self.retry_at = None;
        self.kill_at = None;
        self.stuck_at = None;
        // What the VMM said was about the predecessor.
        self.state = None;
        self.began = Instant::now();
        match &self.device.backend {
            Backend::Socket(path) => connect_to(path)
                .with_context(|| format!("Cannot connect the device `{}` to {}", self.device.name, path.display())),
            Backend::Process(program) => {
                let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                    .context("Cannot make a connection")?;
                let away = self.left.then(|| program.without_terminal());
                let program = away.as_ref().unwrap_or(program);
                let handed = self.drive.as_mut().map(|drive| drive.hand(CONNECTION + 1)).transpose();
                let handed = handed.with_context(|| format!("Cannot start the disk `{}`", self.device.name))?;
                let mut args = arguments(program, machine);
                args.extend(handed.iter().flat_map(|handed| handed.args.iter().cloned()));
                if program.share.is_some() {
                    args.extend(["--session-fd".into(), (CONNECTION + 1).to_string().into()]);
                    if self.memory.is_none() {
                        self.memory = Some(words::make("session").context("Cannot make a page for a session")?);
                    }
                }
                let memory = self.memory.iter().map(|page| (page.as_fd(), CONNECTION + 1));
                let more = handed.iter().flat_map(|handed| &handed.fds).map(|(fd, number)| (fd.as_fd(), *number));
                let order = Order {
                    program: &programs.path(program.name),
                    args,
                    fds: [(theirs.as_fd(), CONNECTION)].into_iter().chain(memory).chain(more).collect(),
                    stdio: program.stdio,
                    net,
                };
                self.process = Some(Process::start(order, &self.device.name, !self.served)?);
                Ok(ours)
            }
        }
    }

    /// What served it has ended: when is it to be tried again?
    pub fn schedule(&mut self) -> Duration {
        let now = Instant::now();
        let delay = self.backoff.after(self.began, now);
        self.retry_at = now.checked_add(delay);
        delay
    }

    /// The VMM has said something about the connection.
    pub fn note(&mut self, state: DeviceState) {
        self.state = Some(state);
        match (state, &mut self.process) {
            (DeviceState::Connected, process) => {
                self.served = true;
                self.kill_at = None;
                if let Some(process) = process {
                    process.log.release();
                }
            }
            (DeviceState::Lost | DeviceState::Degraded, Some(_)) => self.kill_at = Instant::now().checked_add(GRACE),
            _ => {}
        }
    }

    /// A process may have been stopped, or continued.
    pub fn look(&mut self) {
        while let Some(stopped) = self.process.as_ref().and_then(Process::stopped) {
            self.stuck_at = if stopped { Instant::now().checked_add(STANDSTILL) } else { None };
        }
    }

    /// Kills a process that is stuck, unless it is not to be replaced: then it is left to whoever looks into it. Returns what is
    /// wrong with it, once.
    pub fn kill_if_due(&mut self, now: Instant, replace: bool) -> Option<&'static str> {
        let is_due = |at: &mut Option<Instant>| at.take_if(|due| *due <= now).is_some();
        let (lost, stopped) = (is_due(&mut self.kill_at), is_due(&mut self.stuck_at));
        let process = self.process.as_ref().filter(|_| lost || stopped)?;
        if replace {
            process.signal(Signal::KILL);
        }
        Some(if stopped { "it is stopped" } else { "it lives on without its connection" })
    }

    /// The next moment at which something is due.
    pub fn due(&self) -> Option<Instant> {
        let drive = self.drive.as_ref().and_then(Drive::due);
        [self.retry_at, self.kill_at, self.stuck_at, drive].into_iter().flatten().min()
    }

    /// The user has left the terminal. Somebody has to take what the guest still says: Linux waits for its console, also on its way
    /// to power off.
    pub fn leave_terminal(&mut self) {
        self.left = true;
        self.schedule();
    }

    /// Does this process own the user's terminal?
    pub fn is_terminal(&self) -> bool {
        !self.left && matches!(&self.device.backend, Backend::Process(Program { stdio: Stdio::Terminal, .. }))
    }

    /// For `ps`.
    pub fn report(&self) -> report::Process {
        let program = match &self.device.backend {
            Backend::Process(program) => program.name.to_owned(),
            Backend::Socket(path) => path.display().to_string(),
        };
        let state = match self.state {
            _ if self.retry_at.is_some() => "restarting",
            None => "starting",
            Some(DeviceState::Connected) => "connected",
            Some(DeviceState::Lost) => "lost",
            Some(DeviceState::Degraded) => "degraded",
        };
        report::Process {
            role: self.device.name.clone(),
            class: Some(class(&self.device.class)),
            program,
            pid: self.process.as_ref().map(|process| process.pid),
            state: state.to_owned(),
            restarts: self.restarts,
            uptime: Some(self.began.elapsed().as_secs()),
            confinement: None,
            started: self.process.as_ref().and_then(|process| seconds(process.since)),
        }
    }

    /// The VMM's argument for this device, whose connection has this number there.
    pub fn vmm_argument(&self, number: i32) -> OsString {
        let kind = match &self.device.class {
            Class::Named(name) => format!("class={name}"),
            Class::Id(id) => format!("id={id}"),
        };
        let queues = self.device.queues.map_or_else(String::new, |queues| format!(",queues={queues}"));
        format!("{},{kind},fd={number}{queues}", self.device.name).into()
    }
}

fn class(class: &Class) -> String {
    match class {
        Class::Named(name) => name.clone(),
        Class::Id(id) => format!("id {id}"),
    }
}

fn arguments(program: &Program, machine: &Machine) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--fd".into(), CONNECTION.to_string().into()];
    args.extend(program.args.iter().cloned());
    if let Some(floor) = &machine.sandbox_floor {
        args.extend(["--sandbox-floor".into(), floor.into()]);
    }
    args
}

/// Connects without waiting: a backend whose queue of connections is full counts as one that is not there yet.
fn connect_to(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    ioctl_fionbio(&socket, false)?;
    Ok(socket)
}
