//! The control thread: one poll loop for everything that is not the guest running.
//!
//! It owns the backends' sessions, the terminal and the control socket, and it alone starts, stops and resets the
//! machine. Each turn waits for any of its descriptors and then does one thing for each that is ready. What it waits for
//! outside of poll is bounded: a backend by its deadlines, the processors by the kick that gets them out of the guest.

pub mod socket;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use self::socket::{Command, ControlSocket, Event, Received};
use crate::acpi::{self, Platform};
use crate::args::OnReboot;
use crate::boot::{self, Entry};
use crate::cpu::Shared;
use crate::cpu::gate::Order;
use crate::events::Ending;
use crate::kernel::{Images, Loaded};
use crate::kvm::{Chips, Vm};
use crate::machine::{Error, host};
use crate::memory::Memory;
use crate::metrics;
use crate::pci::Pci;
use crate::pm::Power;
use crate::serial::{Com1, Terminal};
use crate::virtio::remote::{Change, Remote};

/// What a reset has to bring back.
pub struct Board {
    /// Guest RAM.
    pub memory: &'static Memory,
    /// KVM.
    pub vm: Arc<Vm>,
    /// Interrupt controllers and timer at power on.
    pub chips: Chips,
    /// The bus.
    pub pci: Arc<Pci>,
    /// Power button and sleep register.
    pub power: Arc<Power>,
    /// Kernel and initrd, open.
    pub images: Images,
    /// For the kernel.
    pub cmdline: String,
    /// For the ACPI tables.
    pub platform: Platform,
}

impl Board {
    /// Everything but processors and backends back to power on.
    fn reset(&self) -> Result<Entry, Error> {
        self.pci.reset();
        self.power.reset();
        self.memory.discard()?;
        self.vm.restore(&self.chips)?;
        let loaded = self.images.load(self.memory)?;
        describe(self.memory, &self.platform, loaded, &self.cmdline)
    }
}

/// Writes what the guest is told about itself: tables and boot information.
pub fn describe(memory: &Memory, platform: &Platform, loaded: Loaded, cmdline: &str) -> Result<Entry, Error> {
    acpi::write(memory, platform)?;
    Ok(boot::prepare(memory, loaded, cmdline)?)
}

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The guest powered off, or somebody said `quit`.
    Done = 0,
    /// The guest was reset and this was to be its end.
    Reset = 3,
    /// The guest's kernel panicked.
    Panic = 4,
    /// A processor shut down.
    TripleFault = 5,
}

impl From<Status> for u8 {
    fn from(status: Status) -> Self {
        status as Self
    }
}

/// The thread's state.
pub struct Control {
    board: Board,
    shared: Arc<Shared>,
    remotes: Vec<Remote>,
    serial: Option<(Arc<Com1>, Terminal)>,
    socket: Option<ControlSocket>,
    on_reboot: OnReboot,
    software_kvm: bool,
}

/// Whose descriptor is ready.
#[derive(Clone, Copy, Debug)]
enum Token {
    Stop,
    Doorbell,
    Socket,
    Output,
    Input,
    HangUp(usize),
    Request(usize),
    RingError(usize),
}

impl Control {
    /// A machine that is ready to run.
    pub fn new(
        board: Board,
        shared: Arc<Shared>,
        remotes: Vec<Remote>,
        serial: Option<(Arc<Com1>, Terminal)>,
        socket: Option<ControlSocket>,
        on_reboot: OnReboot,
        software_kvm: bool,
    ) -> Self {
        Self { board, shared, remotes, serial, socket, on_reboot, software_kvm }
    }

    /// Runs the machine to its end.
    ///
    /// `stop` becomes readable when the process is asked to end.
    pub fn run(mut self, stop: BorrowedFd<'_>) -> Result<Status, Error> {
        let outcome = self.serve(stop);
        if let Some((_, terminal)) = &mut self.serial {
            terminal.flush();
        }
        outcome
    }

    fn serve(&mut self, stop: BorrowedFd<'_>) -> Result<Status, Error> {
        self.shared.gate.gather(usize::from(self.board.platform.cpus));
        for index in 0..self.remotes.len() {
            self.tell_change(index, Some(Change::Connected));
        }
        self.tell(&Event::Started);
        self.order(Order::Run)?;
        loop {
            for token in self.wait(stop)? {
                if let Some(status) = self.handle(token)? {
                    return Ok(status);
                }
            }
        }
    }

    fn order(&self, order: Order) -> Result<(), Error> {
        self.shared.gate.order(order).map_err(Error::Broken)
    }

    fn wait(&self, stop: BorrowedFd<'_>) -> Result<Vec<Token>, Error> {
        let mut tokens = vec![Token::Stop];
        let mut fds = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        self.watch(|token, fd, flags| {
            tokens.push(token);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        });
        // Who is not listened to now is listened to again then.
        let deaf = self.remotes.iter().filter_map(Remote::deaf_for).min().and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, deaf.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(host("wait for events")(e.into())),
        }
        let ready = fds.iter().zip(tokens).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(ready.map(|(_, token)| token).collect())
    }

    fn watch<'a>(&'a self, mut add: impl FnMut(Token, BorrowedFd<'a>, PollFlags)) {
        add(Token::Doorbell, self.shared.doorbell.event().as_fd(), PollFlags::IN);
        if let Some(socket) = &self.socket {
            add(Token::Socket, socket.as_fd(), PollFlags::IN);
        }
        if let Some((com1, terminal)) = &self.serial {
            let (fd, flags) = terminal.output();
            add(Token::Output, fd, flags);
            if let Some(fd) = terminal.input().filter(|_| com1.room() > 0) {
                add(Token::Input, fd, PollFlags::IN);
            }
        }
        for (index, remote) in self.remotes.iter().enumerate() {
            if let Some(fd) = remote.connection() {
                add(Token::HangUp(index), fd, PollFlags::RDHUP);
            }
            if let Some(fd) = remote.ring_errors() {
                add(Token::RingError(index), fd, PollFlags::IN);
            }
            if let Some(fd) = remote.requests() {
                add(Token::Request(index), fd, PollFlags::IN);
            }
        }
    }

    fn handle(&mut self, token: Token) -> Result<Option<Status>, Error> {
        match token {
            Token::Stop => return Ok(Some(Status::Done)),
            Token::Doorbell => return self.answer(),
            Token::Socket => return self.obey(),
            Token::Output => {
                if let Some((_, terminal)) = &mut self.serial {
                    terminal.send();
                }
                if let Some((com1, _)) = &self.serial {
                    metrics::DROPPED_BYTES.set(com1.dropped());
                }
            }
            Token::Input => {
                if let Some((com1, terminal)) = &mut self.serial {
                    terminal.receive(com1);
                }
            }
            Token::HangUp(index) => self.with_remote(index, Remote::hang_up),
            Token::Request(index) => self.with_remote(index, Remote::listen),
            Token::RingError(index) => {
                metrics::RING_ERRORS.add(index, 1);
                self.with_remote(index, Remote::ring_error);
            }
        }
        Ok(None)
    }

    fn with_remote(&mut self, index: usize, act: impl FnOnce(&mut Remote) -> Option<Change>) {
        let Some(remote) = self.remotes.get_mut(index) else { return };
        let change = act(remote);
        metrics::RINGS.set(index, u64::try_from(remote.rings()).unwrap_or_default());
        self.tell_change(index, change);
    }

    /// A processor has rung.
    fn answer(&mut self) -> Result<Option<Status>, Error> {
        let ending = self.shared.doorbell.answer();
        for index in 0..self.remotes.len() {
            self.with_remote(index, Remote::serve);
        }
        let Some(ending) = ending else { return Ok(None) };
        let (what, status) = match ending {
            Ending::Broken(reason) => return Err(Error::Broken(self.explain(reason))),
            Ending::PowerOff => ("shutdown", Status::Done),
            Ending::Reset => ("reset", Status::Reset),
            Ending::Panic => ("panic", Status::Panic),
            Ending::TripleFault => ("triple-fault", Status::TripleFault),
        };
        self.tell(&Event::Guest { what });
        if status == Status::Reset && self.on_reboot == OnReboot::Restart {
            self.restart()?;
            return Ok(None);
        }
        Ok(Some(status))
    }

    fn explain(&self, reason: String) -> String {
        if !self.software_kvm {
            return reason;
        }
        format!("{reason} (its KVM is kvm_pvm, which works without processor support and does not run most kernels)")
    }

    /// The same machine from its beginning: same process, same descriptors, same device processes.
    fn restart(&mut self) -> Result<(), Error> {
        metrics::RESETS.add(1);
        self.order(Order::Wait)?;
        for index in 0..self.remotes.len() {
            self.with_remote(index, Remote::reset);
        }
        if let Some((com1, _)) = &self.serial {
            com1.reset();
        }
        let entry = self.board.reset()?;
        self.shared.doorbell.forget();
        self.order(Order::Reset(entry))?;
        self.order(Order::Run)
    }

    /// The composer has said something.
    fn obey(&mut self) -> Result<Option<Status>, Error> {
        let Some(socket) = &self.socket else { return Ok(None) };
        match socket.receive() {
            Received::Nothing => {}
            Received::Command(Command::PowerButton, _) => self.board.power.press(),
            Received::Command(Command::Reset, _) => self.shared.doorbell.end(Ending::Reset),
            Received::Command(Command::Quit, _) => return Ok(Some(Status::Done)),
            Received::Command(Command::Replug { device }, Some(stream)) => self.replug(&device, stream),
            Received::Command(Command::Replug { device }, None) => {
                self.tell(&Event::Error { message: format!("Cannot replug {device}: no socket came with the command") });
            }
            Received::Wrong(message) => self.tell(&Event::Error { message }),
            Received::Closed => return Err(Error::Broken("The control socket was closed by its owner".to_owned())),
        }
        Ok(None)
    }

    fn replug(&mut self, device: &str, stream: UnixStream) {
        match self.remotes.iter().position(|r| r.name() == device) {
            Some(index) => self.with_remote(index, |remote| Some(remote.replug(stream))),
            None => self.tell(&Event::Error { message: format!("Cannot replug {device}: there is no such device") }),
        }
    }

    fn tell_change(&self, index: usize, change: Option<Change>) {
        let (Some(change), Some(remote)) = (change, self.remotes.get(index)) else { return };
        let device = remote.name();
        let (state, reason) = match change {
            Change::Connected => ("connected", None),
            Change::Lost(reason) => ("lost", Some(reason)),
            Change::Degraded(reason) => ("degraded", Some(reason)),
        };
        match &reason {
            None => tracing::debug!(device, "{state}"),
            Some(reason) => tracing::warn!(device, "Device {device} is {state}: {reason}"),
        }
        self.tell(&Event::Device { device, state, reason: reason.as_deref() });
    }

    fn tell(&self, event: &Event<'_>) {
        if let Some(socket) = &self.socket {
            socket.send(event);
        }
    }
}
