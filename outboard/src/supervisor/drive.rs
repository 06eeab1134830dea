//! A disk of the running machine: the images it consists of by now, and what is asked of its process.
//!
//! # Theory of operation
//!
//! A disk process cannot open or make files. What it is started with stands here: the chain of images, which grows with each snapshot,
//! the file without a name that an ephemeral disk writes to, and the limits it was given last. So a successor goes on where its
//! predecessor was. Every descriptor that is handed in was opened for that one process, see [`overlay::again`].
//!
//! Requests of the machine's owner are [jobs](Job), one after the other. The process is asked on a socket of its own and answers when
//! it is done; nobody waits for it. A snapshot or reset has two steps: how large is the disk, and then: take this overlay.
//!
//! # A process that dies in the middle
//!
//! Once an overlay was sent, its successor begins with the overlay, whether the predecessor had put it in its place or not, because
//! that is right in both cases. If it had not, the overlay is empty: over the image as it was it shows that image, and a reset
//! has just happened. If it had, writes that the guest knows to be done may lie in the overlay already. The other way round they would
//! be lost. All other requests are repeated; each gives the same result when it is done twice.

mod job;
mod line;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use virtio::words;

use self::job::Job;
use self::line::Line;
use crate::args::ImageFormat;
use crate::control::Ticket;
use crate::events::Event;
use crate::machine::disk::{Disk, Image, Limits};
use crate::overlay;

/// What a client is answered.
pub type Answer = Result<Value, String>;

/// The disk.
#[derive(Debug)]
pub struct Drive<'a> {
    name: &'a str,
    disk: &'a Disk,
    /// Those with names, from the top down.
    images: Vec<Image>,
    /// What is written to an ephemeral disk.
    scratch: Option<File>,
    limits: Limits,
    /// The page with the limits of its group.
    group: Option<Rc<OwnedFd>>,
    line: Option<Line>,
    jobs: VecDeque<Job>,
    done: Vec<(Ticket, Answer)>,
    happened: Vec<Event>,
}

/// What a process is started with.
#[derive(Debug)]
pub struct Handed {
    /// Arguments.
    pub args: Vec<OsString>,
    /// Descriptors, each with its number there.
    pub fds: Vec<(OwnedFd, i32)>,
}

impl Handed {
    fn descriptor(&mut self, flag: &str, fd: OwnedFd, first: i32) {
        let number = self.fds.last().map_or(first, |(_, number)| *number + 1);
        self.args.extend([flag.into(), number.to_string().into()]);
        self.fds.push((fd, number));
    }
}

impl<'a> Drive<'a> {
    /// As the machine file has it.
    pub fn new(name: &'a str, disk: &'a Disk) -> Self {
        Self {
            name,
            disk,
            images: disk.images.clone(),
            scratch: None,
            limits: disk.limits,
            group: None,
            line: None,
            jobs: VecDeque::new(),
            done: Vec::new(),
            happened: Vec::new(),
        }
    }

    /// Gives each group of disks the page with the limits that they share.
    pub fn join_groups<'b>(drives: impl Iterator<Item = &'b mut Self>) -> Result<()>
    where
        'a: 'b,
    {
        let mut groups: BTreeMap<&str, Rc<OwnedFd>> = BTreeMap::new();
        for drive in drives {
            let Some(name) = &drive.disk.limit_group else { continue };
            if !groups.contains_key(name.as_str()) {
                let page = words::make("limits").with_context(|| format!("Cannot make the limits of the group `{name}`"))?;
                groups.insert(name, Rc::new(page));
            }
            drive.group = groups.get(name.as_str()).cloned();
        }
        Ok(())
    }

    /// What a new process is to be given, with descriptors from this number on.
    pub fn hand(&mut self, first: i32) -> Result<Handed> {
        self.lost();
        let mut handed = Handed { args: Vec::new(), fds: Vec::new() };
        let (ours, theirs) = Line::pair()?;
        handed.descriptor("--control-fd", theirs, first);
        self.hand_images(&mut handed, first)?;
        for (rate, flag) in [(self.limits.operations, "--limit-ops"), (self.limits.bytes, "--limit-bytes")] {
            if rate.per_second != 0 {
                handed.args.extend([flag.into(), rate.argument().into()]);
            }
        }
        if let Some(page) = &self.group {
            // They are set already, unless this is the first of the group.
            handed.descriptor("--limit-fd", page.try_clone().context("Cannot share the limits of a group")?, first);
        }
        self.line = Some(ours);
        self.go();
        Ok(handed)
    }

    fn hand_images(&mut self, handed: &mut Handed, first: i32) -> Result<()> {
        if let (Some(dir), None, Some(base)) = (&self.disk.ephemeral, &self.scratch, self.images.first()) {
            self.scratch = Some(overlay::unnamed(dir, overlay::disk_size(base)?, base)?);
        }
        let mut images = self.images.iter();
        if let Some(file) = &self.scratch {
            handed.descriptor("--blk-fd", overlay::again(file, false)?, first);
            if self.disk.direct {
                handed.descriptor("--direct-fd", overlay::again(file, true)?, first);
            }
            handed.args.extend(["--format".into(), ImageFormat::Qcow2.name().into()]);
        } else if let Some(top) = images.next() {
            handed.args.extend(["--blk-file".into(), top.path.clone().into(), "--format".into(), top.format.name().into()]);
        }
        for image in images {
            handed.args.extend(["--backing-file".into(), image.path.clone().into()]);
            handed.args.extend(["--backing-format".into(), image.format.name().into()]);
        }
        if let Some(path) = &self.disk.data_file {
            handed.args.extend(["--data-file".into(), path.into()]);
        }
        Ok(())
    }

    /// What to wait for.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        self.line.as_ref().map(Line::source)
    }

    /// Its process has said something, or is gone.
    pub fn hear(&mut self) {
        let Some(line) = &mut self.line else { return };
        let (answers, more) = line.hear();
        for answer in answers {
            self.answered(&answer);
        }
        if !more {
            self.line = None;
        }
        self.go();
    }

    /// Its process is gone. What it has said before counts.
    pub fn lost(&mut self) {
        self.hear();
        self.line = None;
        self.interrupted();
    }

    /// There will be no other process.
    pub fn give_up(&mut self) {
        self.lost();
        let says = "The disk's process has ended, and is not started again";
        self.done.extend(self.jobs.drain(..).filter_map(|job| job.refuse(says)));
    }

    /// When somebody has waited long enough.
    pub fn due(&self) -> Option<Instant> {
        self.jobs.iter().filter_map(Job::due).min()
    }

    /// What has become of the disk since this was asked last.
    pub fn take_happened(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.happened)
    }

    /// Answers that are ready.
    pub fn take_done(&mut self) -> Vec<(Ticket, Answer)> {
        std::mem::take(&mut self.done)
    }
}
