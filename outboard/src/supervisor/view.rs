//! The machine as others see it: who serves what, in which state, and what it costs.

use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use virtio::metrics::page;

use super::ending::End;
use super::process::Process;
use super::programs::VMM;
use super::slot::Slot;
use super::{Stage, Supervisor};
use crate::control::disk::Request;
use crate::control::report::{self, Report};
use crate::control::{self, Ask, Ticket};
use crate::events::{Event, What};
use crate::machine::{Machine, Restart};
use crate::metrics::usage::Usage;
use crate::metrics::{Sample, Stats, own, text};
use crate::notices;

/// What of the supervisor can be seen. It borrows only that, so that a client can be answered meanwhile.
#[derive(Debug)]
pub struct View<'a> {
    machine: &'a Machine,
    vmm: &'a Process,
    slots: &'a [Slot<'a>],
    stage: Stage,
    began: SystemTime,
}

impl<'a> View<'a> {
    /// Of these parts.
    pub(super) fn new(machine: &'a Machine, vmm: &'a Process, slots: &'a [Slot<'a>], stage: Stage, began: SystemTime) -> Self {
        Self { machine, vmm, slots, stage, began }
    }

    fn status(&self) -> &'static str {
        match self.stage {
            Stage::Starting => "prelaunch",
            Stage::Running | Stage::Stopping(_) => "running",
            Stage::Ending(_) => "shutdown",
        }
    }

    fn ours(&self, role: &str, program: &str, pid: i32, state: &str, since: SystemTime) -> report::Process {
        report::Process {
            role: role.to_owned(),
            class: None,
            program: program.to_owned(),
            pid: Some(pid),
            state: state.to_owned(),
            restarts: 0,
            uptime: since.elapsed().ok().map(|time| time.as_secs()),
            confinement: None,
            started: seconds(since),
        }
    }

    /// Who serves what.
    pub fn report(&self) -> Report {
        let own_pid = rustix::process::getpid().as_raw_nonzero().get();
        let status = self.status();
        let mut processes = vec![
            self.ours("composer", "outboard", own_pid, "watching", self.began),
            self.ours("vmm", VMM, self.vmm.pid, status, self.vmm.since),
        ];
        processes.extend(self.slots.iter().map(Slot::report));
        Report { name: self.machine.name.clone(), status: status.to_owned(), processes }
    }

    /// What it costs, and what is counted.
    pub fn samples(&self) -> Vec<Sample> {
        let devices = self.slots.iter().map(|slot| slot.process.as_ref());
        let pages = [None, Some(self.vmm)].into_iter().chain(devices);
        let each = |(process, running): (report::Process, Option<&Process>)| Sample {
            usage: process.pid.and_then(Usage::of),
            shown: running.map_or_else(Vec::new, |running| own(&process.program, page::read(running.counters.as_fd()))),
            process,
        };
        self.report().processes.into_iter().zip(pages).map(each).collect()
    }

    /// The same in OpenMetrics.
    pub fn metrics(&self) -> String {
        text::write(&self.machine.name, self.status() == "running", &self.samples())
    }
}

impl control::Machine for View<'_> {
    fn answer(&self, ask: Ask) -> serde_json::Value {
        let value = match ask {
            Ask::Report => serde_json::to_value(self.report()),
            Ask::Stats => serde_json::to_value(self.samples().into_iter().map(Stats::from).collect::<Vec<_>>()),
        };
        value.unwrap_or_default()
    }
}

impl Supervisor<'_> {
    pub(super) fn report(&self) -> Report {
        View::new(self.machine, &self.vmm, &self.slots, self.stage, self.began).report()
    }

    /// Keeps it, and tells it to the clients of the control socket.
    pub(super) fn happened(&mut self, event: &Event) {
        if let Ok(line) = serde_json::to_string(event) {
            self.events.append(&line);
        }
        if let Some((name, data)) = event.qmp() {
            self.control.announce(name, &data);
        }
    }

    /// The last event. The sentence itself is shown when everything is put back.
    pub(super) fn ended(&mut self, end: &End) {
        notices::note(&format!("{}: {}", self.machine.name, end.sentence));
        let event = Event::new(What::Ended).because(Some(end.sentence.clone()));
        self.happened(&Event { status: Some(end.status), ..event });
    }

    pub(super) fn client_spoke(&mut self, index: usize) {
        let view = View::new(self.machine, &self.vmm, &self.slots, self.stage, self.began);
        for wish in self.control.hear(index, &view) {
            self.grant(wish);
        }
    }

    /// Something about a disk was asked.
    pub(super) fn ask_disk(&mut self, ticket: Ticket, device: &str, request: Request) {
        let never = self.machine.restart == Restart::Never;
        let slot = self.slots.iter_mut().find(|slot| slot.device.name == device);
        let gone = slot.as_ref().is_some_and(|slot| slot.process.is_none() && never);
        let Some(drive) = slot.and_then(|slot| slot.drive.as_mut()) else {
            let says = format!("The machine has no disk called `{device}` that a process of ours serves");
            self.control.reply(&ticket, Err(says));
            return;
        };
        drive.ask(ticket, request);
        if gone {
            drive.give_up();
        }
    }

    pub(super) fn disk_spoke(&mut self, index: usize) {
        if let Some(drive) = self.slots.get_mut(index).and_then(|slot| slot.drive.as_mut()) {
            drive.hear();
        }
    }

    /// What has become of disks is kept and told before whoever asked for it is answered.
    pub(super) fn note_disks(&mut self) {
        let drives = self.slots.iter_mut().filter_map(|slot| slot.drive.as_mut());
        let happened: Vec<Event> = drives.flat_map(|drive| drive.take_happened()).collect();
        happened.iter().for_each(|event| self.happened(event));
    }

    /// Those whose disk has answered. What a client has said while it waited comes next.
    pub(super) fn answer_clients(&mut self) {
        loop {
            let drives = self.slots.iter_mut().filter_map(|slot| slot.drive.as_mut());
            let done: Vec<_> = drives.flat_map(|drive| drive.take_done()).collect();
            if done.is_empty() {
                return;
            }
            for (ticket, answer) in done {
                if let Some(index) = self.control.reply(&ticket, answer) {
                    self.client_spoke(index);
                }
            }
        }
    }

    pub(super) fn scraped(&mut self, index: usize) {
        let view = View::new(self.machine, &self.vmm, &self.slots, self.stage, self.began);
        self.metrics.serve(index, || view.metrics());
    }
}

/// Since 1970.
pub(super) fn seconds(time: SystemTime) -> Option<u64> {
    time.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
}
