//! `outboard run`: starts the processes of a machine and keeps them alive until the VMM has ended.
//!
//! Everything happens in one loop on one thread (`Supervisor::run`): it waits for signals, for the VMM's events, for the end
//! and the words of each process, for clients of the control socket, and for the next moment at which something is due.

pub mod drive;
pub mod ending;
pub mod policy;
pub mod process;
pub mod programs;
pub mod signals;
pub mod slot;
pub mod start;
pub mod terminal;
pub mod view;
pub mod vmm;
pub mod winddown;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;
use sandbox::NetNamespace;

use self::drive::Drive;
use self::ending::{End, Wanted};
use self::process::{Ending, Process};
use self::programs::Programs;
use self::signals::{Request, Signals};
use self::slot::Slot;
use self::vmm::{Command, DeviceState, Link};
use crate::control::report;
use crate::control::{Server, Wish};
use crate::events::{Event, What};
use crate::journal::Journal;
use crate::machine::{Backend, Machine, Restart};
use crate::{background, metrics, notices};

pub use self::start::run;

/// How long a guest may take to power off after its power button was pressed by a signal or by leaving the console. A `stop`
/// keeps its own time.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);
/// A guest that is still starting does not hear its power button: it is pressed again and again until the guest's time is over.
pub const PRESS_AGAIN: Duration = Duration::from_secs(3);
/// How long the VMM may take to obey `quit` before it is killed.
const QUIT_LIMIT: Duration = Duration::from_secs(2);
/// Between a device process that sees the VMM's connection close and the VMM's own end lies the release of its memory.
const VMM_END_DELAY: Duration = Duration::from_millis(300);

/// The running machine.
#[derive(Debug)]
pub struct Supervisor<'a> {
    machine: &'a Machine,
    programs: Programs,
    net: NetNamespace,
    slots: Vec<Slot<'a>>,
    vmm: Process,
    link: Link,
    control: Server,
    metrics: metrics::server::Server,
    events: Journal,
    signals: Signals,
    stage: Stage,
    wanted: Wanted,
    press_at: Option<Instant>,
    began: SystemTime,
    end: Option<End>,
    announce: bool,
    background: bool,
}

/// How far the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// No processor has run.
    Starting,
    /// The guest runs.
    Running,
    /// The power button was pressed; the guest has until then, if we keep its time.
    Stopping(Option<Instant>),
    /// The VMM was told to end, and will be killed then.
    Ending(Instant),
}

/// What the loop waits for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signal,
    VmmEvent,
    VmmEnd,
    VmmLog,
    End(usize),
    Log(usize),
    Disk(usize),
    NewClient,
    Client(usize),
    NewScraper,
    Scraper(usize),
}

impl Supervisor<'_> {
    /// Until the machine has ended.
    fn run(&mut self) -> Result<End> {
        while self.end.is_none() {
            for source in self.wait()? {
                match source {
                    Source::VmmEnd => self.vmm_ended(),
                    _ if self.end.is_some() => {}
                    Source::Signal => self.signalled(),
                    Source::VmmEvent => self.vmm_spoke(),
                    Source::VmmLog => self.vmm.log.read(),
                    Source::End(index) => self.process_ended(index),
                    Source::Log(index) => self.process_spoke(index),
                    Source::Disk(index) => self.disk_spoke(index),
                    Source::NewClient => self.control.accept(),
                    Source::Client(index) => self.client_spoke(index),
                    Source::NewScraper => self.metrics.accept(),
                    Source::Scraper(index) => self.scraped(index),
                }
            }
            self.note_disks();
            self.answer_clients();
            self.control.sweep();
            self.metrics.sweep();
            self.do_what_is_due();
        }
        self.end.take().context("The machine has not ended")
    }

    /// Waits, and says what there is to do.
    fn wait(&self) -> Result<Vec<Source>> {
        let sources = self.sources();
        let flags = |source: &Source| match source {
            Source::Scraper(index) => self.metrics.wants(*index),
            _ => PollFlags::IN,
        };
        let mut polled: Vec<PollFd<'_>> =
            sources.iter().map(|(source, fd)| PollFd::from_borrowed_fd(*fd, flags(source))).collect();
        let timeout = self.due().map(|due| due.saturating_duration_since(Instant::now()));
        // Rounded up to the next millisecond, so that the loop does not spin until something is due.
        let timeout = timeout.map(|left| Timespec::try_from(left + Duration::from_millis(1))).transpose()?;
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error).context("Cannot wait for the machine"),
        }
        let ready = sources.iter().zip(&polled).filter(|(_, polled)| !polled.revents().is_empty());
        Ok(ready.map(|((source, _), _)| *source).collect())
    }

    fn sources(&self) -> Vec<(Source, BorrowedFd<'_>)> {
        // The VMM's words and end come before those of the devices: they end because it ends.
        let mut sources = vec![(Source::Signal, self.signals.source()), (Source::VmmEvent, self.link.source())];
        sources.extend(self.vmm.log.source().map(|fd| (Source::VmmLog, fd)));
        sources.push((Source::VmmEnd, self.vmm.pidfd.as_fd()));
        for (index, slot) in self.slots.iter().enumerate() {
            if let Some(process) = &slot.process {
                sources.extend(process.log.source().map(|fd| (Source::Log(index), fd)));
                sources.push((Source::End(index), process.pidfd.as_fd()));
            }
            sources.extend(slot.drive.as_ref().and_then(Drive::source).map(|fd| (Source::Disk(index), fd)));
        }
        let (listener, clients) = self.control.sources();
        sources.push((Source::NewClient, listener));
        sources.extend(clients.enumerate().map(|(index, fd)| (Source::Client(index), fd)));
        let (listener, clients) = self.metrics.sources();
        sources.push((Source::NewScraper, listener));
        sources.extend(clients.enumerate().map(|(index, fd)| (Source::Scraper(index), fd)));
        sources
    }

    fn signalled(&mut self) {
        while let Some(request) = self.signals.take() {
            match request {
                Request::Resize => {
                    for process in self.slots.iter().filter(|slot| slot.is_terminal()).flat_map(|slot| &slot.process) {
                        process.signal(Signal::WINCH);
                    }
                }
                Request::Look => self.slots.iter_mut().for_each(Slot::look),
                Request::End => match self.stage {
                    Stage::Starting | Stage::Running => {
                        notices::line(&format!(
                            "outboard: Pressing the power button; the guest has {} s. Another signal ends it at once.",
                            POWER_OFF_LIMIT.as_secs()
                        ));
                        self.press_power_button(Some(POWER_OFF_LIMIT));
                    }
                    Stage::Stopping(_) => self.quit(Wanted::Killed),
                    Stage::Ending(_) => self.vmm.signal(Signal::KILL),
                },
            }
        }
    }

    fn vmm_spoke(&mut self) {
        while let Some(event) = self.link.receive() {
            match event {
                Err(error) => notices::line(&format!("outboard: {error:#}")),
                Ok(vmm::Event::Started) => self.started(),
                Ok(vmm::Event::Device { device, state, reason }) => self.device_changed(&device, state, reason),
                Ok(vmm::Event::Guest { what }) => self.guest_did(&what),
                Ok(vmm::Event::Error { message }) => {
                    notices::line(&format!("vmm: {}", notices::printable(&message)));
                }
            }
        }
    }

    fn started(&mut self) {
        if self.stage == Stage::Starting {
            self.stage = Stage::Running;
        }
        self.vmm.log.release();
        self.happened(&Event::new(What::Started));
        self.announce_once();
    }

    fn device_changed(&mut self, device: &str, state: DeviceState, reason: Option<String>) {
        let never = self.machine.restart == Restart::Never;
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.device.name == device) else {
            return;
        };
        let what = match state {
            DeviceState::Connected if slot.served => What::DeviceBack,
            DeviceState::Connected => What::DeviceConnected,
            DeviceState::Lost => What::DeviceLost,
            DeviceState::Degraded => What::DeviceDegraded,
        };
        slot.note(state);
        let reason = reason.map(|reason| notices::printable(&reason));
        let event = Event::of(what, device).because(reason.clone());
        let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
        match (state, &slot.device.backend) {
            (DeviceState::Connected, _) => {}
            (DeviceState::Degraded, _) => notices::line(&format!("{device}: degraded{reason}")),
            (DeviceState::Lost, Backend::Process(_)) => {} // told when the process ends
            (DeviceState::Lost, Backend::Socket(path)) => {
                notices::line(&format!("{device}: the connection to {} is lost{reason}", path.display()));
            }
        }
        // A process is started again when it ends; of somebody else's backend that is all one hears.
        if state != DeviceState::Connected && matches!(slot.device.backend, Backend::Socket(_)) && !never {
            slot.schedule();
        }
        self.happened(&event);
        self.announce_once();
    }

    fn guest_did(&mut self, what: &str) {
        self.happened(&Event::new(match what {
            "reset" => What::GuestRebooted,
            "shutdown" => What::GuestPoweredOff,
            "panic" => What::GuestPanicked,
            _ => What::GuestTripleFault,
        }));
    }

    fn vmm_ended(&mut self) {
        self.vmm_spoke();
        let ending = self.vmm.reap();
        let words = self.vmm.log.last_words();
        if self.end.is_none() {
            self.end = Some(ending::of_vmm(ending, self.wanted, words));
        }
    }

    fn process_spoke(&mut self, index: usize) {
        if let Some(process) = self.slots.get_mut(index).and_then(|slot| slot.process.as_mut()) {
            process.log.read();
        }
    }

    fn process_ended(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let Some(mut process) = slot.process.take() else {
            return;
        };
        let ending = process.reap();
        let name = slot.device.name.clone();
        if !slot.served && slot.restarts == 0 && matches!(ending, Ending::Exit(1 | 2)) {
            let words = process.log.last_words().unwrap_or_else(|| format!("its process {ending}"));
            return self.fail(format!("The device `{name}` did not start: {words}"));
        }
        process.log.release();
        if let Some(drive) = &mut slot.drive {
            drive.lost();
        }
        let left = slot.is_terminal() && slot.served && ending == Ending::Exit(0);
        // A device process ends in order when the VMM hangs up, and that it does when it ends itself. One that was killed is
        // started again without a delay, unless there is no VMM any more.
        let patience = if ending == Ending::Exit(0) { VMM_END_DELAY } else { Duration::ZERO };
        if self.vmm_ends_within(patience) {
            return;
        }
        if left {
            notices::line(&format!(
                "outboard: You have left the console; the guest has {} s to power off.",
                POWER_OFF_LIMIT.as_secs()
            ));
            if let Some(slot) = self.slots.get_mut(index) {
                slot.leave_terminal();
            }
            return self.press_power_button(Some(POWER_OFF_LIMIT));
        }
        self.happened(&Event::of(What::ProcessEnded, &name).because(Some(ending.to_string())));
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if self.machine.restart == Restart::Never {
            if let Some(drive) = &mut slot.drive {
                drive.give_up();
            }
            self.happened(&Event::of(What::GaveUp, &name).because(Some("restart is `never`".to_owned())));
            return notices::line(&format!("{name}: the process {ending}; it is not started again"));
        }
        let delay = slot.schedule();
        let when = if delay.is_zero() { "at once".to_owned() } else { format!("in {:.1} s", delay.as_secs_f32()) };
        notices::line(&format!("{name}: the process {ending}; starting it again {when}"));
    }

    /// Gives the VMM's end time to show.
    fn vmm_ends_within(&self, limit: Duration) -> bool {
        let mut polled = [PollFd::new(&self.vmm.pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        poll(&mut polled, limit.as_ref()).is_ok_and(|ready| ready > 0)
    }

    /// What a client wants.
    fn grant(&mut self, wish: Wish) {
        match wish {
            Wish::PowerButton => self.press_power_button(None),
            Wish::Reset => self.tell(&Command::Reset),
            Wish::Quit => self.quit(Wanted::Now),
            Wish::Disk { ticket, device, request } => self.ask_disk(ticket, &device, request),
        }
    }

    /// Asks the guest to power off, and keeps its time if there is a limit.
    fn press_power_button(&mut self, limit: Option<Duration>) {
        self.tell(&Command::PowerButton);
        self.happened(&Event::new(What::PowerButton));
        self.wanted = Wanted::PowerOff;
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        self.press_at = deadline.and_then(|_| Instant::now().checked_add(PRESS_AGAIN));
        match self.stage {
            Stage::Ending(_) | Stage::Stopping(Some(_)) => {}
            _ => self.stage = Stage::Stopping(deadline),
        }
    }

    /// Ends the machine without asking the guest.
    fn quit(&mut self, wanted: Wanted) {
        self.wanted = wanted;
        self.press_at = None;
        self.tell(&Command::Quit);
        self.stage = Stage::Ending(Instant::now() + QUIT_LIMIT);
    }

    /// The machine cannot go on.
    fn fail(&mut self, sentence: String) {
        self.end = Some(End::failed(sentence));
    }

    fn tell(&self, command: &Command<'_>) {
        if let Err(error) = self.link.send(command, None) {
            notices::line(&format!("outboard: {error:#}"));
        }
    }

    /// The next moment at which something is due.
    fn due(&self) -> Option<Instant> {
        let stage = match self.stage {
            Stage::Stopping(due) => due,
            Stage::Ending(due) => Some(due),
            Stage::Starting | Stage::Running => None,
        };
        self.slots.iter().filter_map(Slot::due).chain(stage).chain(self.press_at).chain(self.metrics.due()).min()
    }

    fn do_what_is_due(&mut self) {
        let now = Instant::now();
        match self.stage {
            Stage::Stopping(Some(due)) if due <= now => self.quit(Wanted::Overdue),
            Stage::Ending(due) if due <= now => {
                self.vmm.signal(Signal::KILL);
                self.stage = Stage::Ending(now + QUIT_LIMIT);
            }
            _ => {}
        }
        if self.press_at.is_some_and(|due| due <= now) {
            self.press_at = now.checked_add(PRESS_AGAIN);
            self.tell(&Command::PowerButton);
        }
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get_mut(index) else {
                continue;
            };
            if let Some(drive) = &mut slot.drive {
                drive.expire(now);
            }
            let retry = slot.retry_at.is_some_and(|due| due <= now);
            if let Some(wrong) = slot.kill_if_due(now, self.machine.restart != Restart::Never) {
                let event = Event::of(What::ProcessHung, &slot.device.name);
                let pid = slot.process.as_ref().map(|process| process.pid);
                notices::line(&format!("{}: the process hangs: {wrong}", slot.device.name));
                self.happened(&Event { pid, ..event.because(Some(wrong.to_owned())) });
            }
            if retry {
                self.restart(index);
            }
        }
    }

    /// Starts what serves a device again and plugs it in.
    fn restart(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.restarts = slot.restarts.saturating_add(1);
        let connection = match slot.start(self.machine, &self.programs, &self.net) {
            Ok(connection) => connection,
            Err(error) => {
                // Somebody else's backend may be away for long; one line each time its delay has grown is enough.
                let delay = slot.schedule();
                return notices::line(&format!("{}: {error:#}; again in {:.1} s", slot.device.name, delay.as_secs_f32()));
            }
        };
        let restarted = Event {
            pid: slot.process.as_ref().map(|process| process.pid),
            restarts: Some(slot.restarts),
            ..Event::of(What::ProcessRestarted, &slot.device.name)
        };
        let command = Command::Replug { device: &slot.device.name };
        if let Err(error) = self.link.send(&command, Some(connection.as_fd())) {
            notices::line(&format!("outboard: {error:#}"));
        }
        self.happened(&restarted);
    }

    /// The table of processes, and the word to who waits for a machine in the background, once everything runs.
    fn announce_once(&mut self) {
        let connected = self.slots.iter().all(|slot| slot.state == Some(DeviceState::Connected));
        if self.announce && connected && self.stage != Stage::Starting {
            self.announce = false;
            let mut report = self.report();
            report.look();
            notices::show(&report::table(&[report]));
        }
        if self.background && connected && self.stage != Stage::Starting {
            self.background = false;
            if let Err(error) = background::running(&self.machine.name) {
                notices::line(&format!("outboard: {error:#}"));
            }
        }
    }
}
