//! A request, from the question to the answer.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Answer, Drive};
use crate::args::ImageFormat;
use crate::control::Ticket;
use crate::control::disk::Request;
use crate::events::{Event, What};
use crate::machine::disk::{Image, Limits};
use crate::{notices, overlay};

/// How long a client waits. Snapshots take milliseconds; a process that was killed is back in as many; a slow disk may have to write
/// much before a snapshot.
const PATIENCE: Duration = Duration::from_secs(30);

/// The request.
#[derive(Debug)]
pub(super) struct Job {
    /// Who is to be answered; nobody, if they have waited in vain.
    ticket: Option<Ticket>,
    request: Request,
    stage: Stage,
    due: Instant,
}

/// How far it is.
#[derive(Debug)]
enum Stage {
    /// The process does not know of it.
    Waiting,
    /// It was asked how large the disk is.
    Asked,
    /// It was told, and will answer.
    Told,
    /// It was told, and has this overlay.
    Given(Overlay),
}

/// An overlay on its way.
#[derive(Debug)]
enum Overlay {
    /// On top of what is there, under this name.
    On(PathBuf),
    /// In the place of the top image, whose name it gets when it is there.
    Instead {
        /// Where it is.
        place: PathBuf,
        /// Where the top image is, whatever links lead to it.
        home: PathBuf,
    },
    /// In the place of what was written to an ephemeral disk.
    Scratch(File),
}

impl Overlay {
    /// It was not wanted; the disk goes on as before.
    fn discard(self) {
        if let Overlay::On(path) | Overlay::Instead { place: path, .. } = self {
            drop(fs::remove_file(path));
        }
    }
}

/// What a process says of its disk. Only this is passed on.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct State {
    bytes: u64,
    read_only: bool,
    direct: bool,
    limits: Limits,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pause_microseconds: Option<u64>,
}

/// What a process has answered.
fn understood(answer: &Value) -> Result<State, String> {
    match serde_json::from_value::<State>(answer.clone()) {
        Ok(state) if answer["ok"] == true => Ok(state),
        _ => Err(notices::printable(answer["error"].as_str().unwrap_or("The disk's process says something nobody understands"))),
    }
}

impl Job {
    /// Nobody will answer it.
    pub(super) fn refuse(self, says: &str) -> Option<(Ticket, Answer)> {
        self.ticket.map(|ticket| (ticket, Err(says.to_owned())))
    }

    /// When whoever asked has waited long enough.
    pub(super) fn due(&self) -> Option<Instant> {
        self.ticket.as_ref().map(|_| self.due)
    }
}

impl Drive<'_> {
    /// Somebody asks.
    pub fn ask(&mut self, ticket: Ticket, request: Request) {
        if let Err(says) = self.makes_sense(&request) {
            return self.done.push((ticket, Err(says)));
        }
        let job = Job { ticket: Some(ticket), request, stage: Stage::Waiting, due: Instant::now() + PATIENCE };
        self.jobs.push_back(job);
        self.go();
    }

    fn makes_sense(&self, request: &Request) -> Result<(), String> {
        let (disk, name) = (self.disk, self.name);
        let changes = matches!(request, Request::Snapshot(_) | Request::Reset);
        let why_not = match request {
            _ if changes && disk.readonly => "is only read",
            _ if changes && disk.data_file.is_some() => {
                "keeps its data in a file apart (`data-file`), and such an image cannot lie below another one"
            }
            Request::Snapshot(_) if disk.ephemeral.is_some() => {
                "is ephemeral: what a snapshot would be based on is gone when the machine ends"
            }
            Request::Reset if self.scratch.is_none() && self.images.len() < 2 => {
                "has only one image, and nothing below it to go back to: it would have to be ephemeral, or an overlay"
            }
            _ => return Ok(()),
        };
        let what = if *request == Request::Reset { "reset" } else { "make a snapshot of" };
        Err(format!("Cannot {what} the disk `{name}`: it {why_not}"))
    }

    /// Lets the process know of the first job, if there is one of both.
    pub(super) fn go(&mut self) {
        let Some(line) = &self.line else { return };
        let Some(job) = self.jobs.front_mut() else { return };
        if !matches!(job.stage, Stage::Waiting) {
            return;
        }
        let (command, stage) = match &job.request {
            Request::Status => (json!({"command": "status"}), Stage::Told),
            Request::Resize(bytes) => (json!({"command": "resize", "bytes": bytes}), Stage::Told),
            Request::Limit { operations, bytes } => {
                let (operations, bytes) = (operations.unwrap_or(self.limits.operations), bytes.unwrap_or(self.limits.bytes));
                (json!({"command": "limit", "operations": operations, "bytes": bytes}), Stage::Told)
            }
            Request::Snapshot(_) | Request::Reset => (json!({"command": "status"}), Stage::Asked),
        };
        // One that cannot be reached is on its way out: its successor will be told.
        if line.send(&command, &[]).is_ok() {
            job.stage = stage;
        }
    }

    /// The process has answered.
    pub(super) fn answered(&mut self, answer: &Value) {
        let Some(Job { ticket, request, stage, due }) = self.jobs.pop_front() else { return };
        let answer = match (stage, understood(answer)) {
            // Nobody has asked.
            (Stage::Waiting, _) => return self.jobs.push_front(Job { ticket, request, stage: Stage::Waiting, due }),
            (Stage::Asked, Ok(state)) => match self.give(&request, state.bytes) {
                Ok(overlay) => return self.jobs.push_front(Job { ticket, request, stage: Stage::Given(overlay), due }),
                Err(error) => Err(format!("{error:#}")),
            },
            (Stage::Given(overlay), Ok(state)) => {
                self.place(overlay).map(|()| self.describe(&state)).map_err(|error| format!("{error:#}"))
            }
            (Stage::Given(overlay), Err(says)) => {
                overlay.discard();
                Err(says)
            }
            (_, state) => state.map(|state| {
                self.note(&request, &state);
                self.describe(&state)
            }),
        };
        self.done.extend(ticket.map(|ticket| (ticket, answer)));
    }

    /// Makes an overlay and sends it.
    fn give(&self, request: &Request, bytes: u64) -> Result<Overlay> {
        let top = self.images.first().context("The disk has no image")?;
        let (file, overlay, past) = match (request, &self.disk.ephemeral, self.images.get(1)) {
            (Request::Snapshot(path), _, _) => (overlay::named(path, bytes, top)?, Overlay::On(path.clone()), self.past(path)?),
            (_, Some(dir), _) => {
                let file = overlay::unnamed(dir, bytes, top)?;
                let past = self.disk.direct.then(|| overlay::again(&file, true)).transpose()?;
                // The process gets an open file of its own, and we keep ours for its successors.
                (File::from(overlay::again(&file, false)?), Overlay::Scratch(file), past)
            }
            (_, None, Some(below)) => {
                let home =
                    fs::canonicalize(&top.path).with_context(|| format!("Cannot find the image {}", top.path.display()))?;
                let (file, place) = overlay::beside(&home, bytes, below)?;
                let past = self.past(&place)?;
                (file, Overlay::Instead { place, home }, past)
            }
            (_, None, None) => bail!("There is no image below it to go back to"),
        };
        let command = if matches!(request, Request::Reset) { "reset" } else { "snapshot" };
        let fds: Vec<_> = [file.as_fd()].into_iter().chain(past.as_ref().map(AsFd::as_fd)).collect();
        let line = self.line.as_ref().context("The disk's process is gone")?;
        match line.send(&json!({"command": command}), &fds) {
            Ok(()) => Ok(overlay),
            Err(error) => {
                overlay.discard();
                Err(error)
            }
        }
    }

    /// The process has done what it was asked for.
    fn note(&mut self, request: &Request, state: &State) {
        match request {
            Request::Limit { operations, bytes } => {
                let Limits { operations: ops, bytes: most } = self.limits;
                self.limits = Limits { operations: operations.unwrap_or(ops), bytes: bytes.unwrap_or(most) };
                self.happened.push(Event { limits: Some(state.limits), ..Event::of(What::DiskLimited, self.name) });
            }
            Request::Resize(_) => {
                self.happened.push(Event { bytes: Some(state.bytes), ..Event::of(What::DiskResized, self.name) });
            }
            Request::Status | Request::Snapshot(_) | Request::Reset => {}
        }
    }

    fn past(&self, path: &Path) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
        let about = || format!("Cannot open the overlay {} past the page cache", path.display());
        self.disk.direct.then(|| open(path, flags, Mode::empty()).with_context(about)).transpose()
    }

    /// From here on the disk has this overlay.
    fn place(&mut self, overlay: Overlay) -> Result<()> {
        match overlay {
            Overlay::On(path) => {
                notices::line(&format!("{}: the disk goes on in {}", self.name, path.display()));
                let file = Some(path.display().to_string());
                self.happened.push(Event { file, ..Event::of(What::DiskSnapshot, self.name) });
                self.images.insert(0, Image { path, format: ImageFormat::Qcow2 });
            }
            Overlay::Scratch(file) => {
                self.was_reset();
                self.scratch = Some(file);
            }
            Overlay::Instead { place, home } => {
                self.was_reset();
                let Some(top) = self.images.first_mut() else { return Ok(()) };
                if let Err(error) = fs::rename(&place, &home) {
                    let (now, name) = (place.display().to_string(), home.display());
                    top.path = place;
                    return Err(error).with_context(|| format!("The disk was reset, but {now} cannot get the name {name}"));
                }
            }
        }
        Ok(())
    }

    fn was_reset(&mut self) {
        notices::line(&format!("{}: the disk was reset", self.name));
        self.happened.push(Event::of(What::DiskReset, self.name));
    }

    /// The process is gone, and knows of nothing any more.
    pub(super) fn interrupted(&mut self) {
        let Some(mut job) = self.jobs.pop_front() else { return };
        match job.stage {
            // See above: right whether it was done or not.
            Stage::Given(overlay) => {
                if let Err(error) = self.place(overlay) {
                    notices::line(&format!("{}: {error:#}", self.name));
                }
                job.request = Request::Status;
            }
            // Nobody waits for it any more, and it may be why the process is gone.
            _ if job.ticket.is_none() => return,
            _ => {}
        }
        job.stage = Stage::Waiting;
        self.jobs.push_front(job);
    }

    /// Tells those who have waited long enough.
    pub fn expire(&mut self, now: Instant) {
        let late = |job: &Job| job.ticket.is_some() && job.due <= now;
        for job in self.jobs.iter_mut().filter(|job| late(job)) {
            let seconds = PATIENCE.as_secs();
            let (says, name) = match job.stage {
                Stage::Waiting => ("has no process that could be asked; nothing was done", self.name),
                _ => ("has not answered yet; what was asked may still be done", self.name),
            };
            let says = format!("In {seconds} s the disk `{name}` {says}. See outboard disk status");
            self.done.extend(job.ticket.take().map(|ticket| (ticket, Err(says))));
        }
        self.jobs.retain(|job| job.ticket.is_some() || !matches!(job.stage, Stage::Waiting));
    }

    /// What is said of a disk.
    fn describe(&self, state: &State) -> Value {
        let mut value = serde_json::to_value(state).unwrap_or_default();
        value["device"] = self.name.into();
        value["ephemeral"] = self.scratch.is_some().into();
        let image = |image: &Image| json!({"path": image.path, "format": image.format.name()});
        value["images"] = self.images.iter().map(image).collect();
        value
    }
}
