//! What the thread of a queue does with its requests.
//!
//! # Theory of operation
//!
//! ```text
//!   serve ──▶ Request ──▶ where the data is (Volume) ──▶ page cache: moved here and now ──▶ Done
//!                                                   └──▶ the disk: handed to the engine ──▶ Later ──▶ settle ──▶ finish
//! ```
//!
//! A request becomes one operation or several. What can be done without waiting is done at once; the rest is begun, and the request
//! becomes a [`Job`] under its ticket, which ends with its last operation. A batch of requests is handed to the engine in one call,
//! and what it has finished by then is finished in the same round.
//!
//! A write to a place that the image did not have yet is *claimed* first, and becomes part of the image with its batch: all its data is
//! written, then [`Volume::commit`] changes the image's tables, and only then the guest hears of it.
//!
//! Who needs a range alone (discards and zeroes of an image with tables) first lets go of everything this queue is in: of two that wait for
//! each other, one always holds nothing.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use virtio::worker::{Attempt, HELD, Poller, SOURCES, Serve, Served, Slot, Slots, Source, Ticket};
use virtio::{Buffer, Chain};

use crate::engine::{Engine, Work};
use crate::request::{Request, Status, finish};
use crate::shared::Shared;
use crate::volume::{Busy, Flush, Place, Volume};
use crate::{direct, metrics};

mod batch;
mod change;
mod job;

use batch::{Batch, Sort};
use change::Change;
use job::{Job, Move, Moved};

/// The thread of one queue.
#[derive(Debug)]
pub struct DiskQueue {
    volume: Volume,
    engine: Box<dyn Engine>,
    shared: Arc<Shared>,
    /// By ticket.
    jobs: Vec<Job>,
    /// Jobs that wait for the image's tables.
    claimed: Vec<Ticket>,
    /// Discards and zeroes that the engine makes. The first of them is in its hands.
    changes: VecDeque<Change>,
    /// Jobs that are done.
    finished: Vec<Ticket>,
    poller: Poller,
    /// How long the next request has to wait for its limits.
    wait: Option<Duration>,
    /// When the batch began that is being served, and what it was made of.
    batch: Batch,
}

impl DiskQueue {
    /// Of this volume, with this engine.
    pub fn new(volume: Volume, engine: Box<dyn Engine>, shared: Arc<Shared>, poller: Poller) -> DiskQueue {
        let mut jobs = Vec::new();
        jobs.resize_with(HELD, Job::default);
        DiskQueue {
            volume,
            engine,
            shared,
            jobs,
            claimed: Vec::new(),
            changes: VecDeque::new(),
            finished: Vec::new(),
            poller,
            wait: None,
            batch: Batch::default(),
        }
    }

    fn job(&mut self, ticket: Ticket) -> &mut Job {
        // There are as many jobs as tickets.
        let index = ticket.index().min(self.jobs.len().saturating_sub(1));
        &mut self.jobs[index]
    }

    /// Does a request, as far as that can be done without waiting, and begins the rest.
    fn begin(&mut self, ticket: Ticket, request: &Request<'_>, attempt: &Attempt<'_>) -> io::Result<()> {
        match request {
            Request::Read { offset, data } => {
                metrics::READS.add(1);
                metrics::READ_BYTES.add(data.len().into());
                self.guard(ticket, *offset, data.len(), attempt)?;
                self.read(ticket, *offset, *data)?;
            }
            Request::Write { offset, data } => {
                metrics::WRITES.add(1);
                metrics::WRITTEN_BYTES.add(data.len().into());
                self.guard(ticket, *offset, data.len(), attempt)?;
                let written = self.write(ticket, *offset, *data, attempt);
                // If all of it was committed on the way, it waits for another commit, which is none.
                self.job(ticket).claimed = self.volume.has_claims();
                written?;
                if !self.shared.writes_back() {
                    self.job(ticket).through = true;
                }
            }
            Request::Flush => {
                metrics::FLUSHES.add(1);
                if let Flush::Sync(barrier) = self.volume.flush()? {
                    self.job(ticket).barrier = barrier;
                    self.sync(ticket)?;
                }
            }
            Request::Discard(ranges) => {
                metrics::DISCARDS.add(1);
                self.change(ticket, ranges, true, attempt)?;
            }
            Request::WriteZeroes(ranges) => {
                metrics::ZEROES.add(1);
                self.change(ticket, ranges, false, attempt)?;
                self.job(ticket).through = !self.shared.writes_back();
            }
            Request::SecureErase(ranges) => {
                metrics::ERASURES.add(1);
                self.let_go(|ticket| attempt.held(ticket));
                ranges.iter().try_for_each(|range| self.volume.secure_erase(range))?;
            }
            Request::GetId(room) => {
                room.copy_from(&self.shared.serial);
            }
            Request::GetLifetime(room) => {
                room.copy_from(&self.shared.lifetime());
            }
        }
        Ok(())
    }

    /// Keeps others from having the range alone for as long as the job lasts.
    fn guard(&mut self, ticket: Ticket, offset: u64, len: impl Into<u64>, attempt: &Attempt<'_>) -> io::Result<()> {
        let len = len.into();
        let guard = match self.volume.share(offset, len) {
            Err(Busy) => {
                self.let_go(|ticket| attempt.held(ticket));
                self.volume.share(offset, len).map_err(|Busy| ErrorKind::ResourceBusy)?
            }
            Ok(guard) => guard,
        };
        self.job(ticket).guard = Some(guard);
        Ok(())
    }

    fn read(&mut self, ticket: Ticket, offset: u64, data: Buffer<'_>) -> io::Result<()> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let (len, place) = self.volume.map_read(at, rest.len())?;
            let (piece, after) = rest.split_at(len);
            match place {
                Place::File(file, offset) => {
                    let from = data.len().saturating_sub(rest.len());
                    self.move_piece(ticket, Move { file, offset, from, len, write: false }, piece)?;
                }
                Place::Zero => piece.zero(),
                Place::Compressed(place) => {
                    let cluster = self.volume.inflate(place)?;
                    if piece.copy_from(cluster) < piece.len() as usize {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                }
                Place::Nothing => {}
            }
            (at, rest) = (at.saturating_add(len.into()), after);
        }
        Ok(())
    }

    fn write(&mut self, ticket: Ticket, offset: u64, data: Buffer<'_>, attempt: &Attempt<'_>) -> io::Result<()> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let mapped = match self.volume.map_write(at, rest.len()) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                    // Somebody else is at this cluster, and may be waiting for one of ours.
                    self.let_go(|ticket| attempt.held(ticket));
                    self.volume.map_write(at, rest.len())
                }
                other => other,
            };
            let (len, place) = mapped?;
            let (piece, after) = rest.split_at(len);
            let from = data.len().saturating_sub(rest.len());
            if let Place::File(file, offset) = place {
                self.move_piece(ticket, Move { file, offset, from, len, write: true }, piece)?;
            }
            (at, rest) = (at.saturating_add(len.into()), after);
        }
        Ok(())
    }

    /// Moves a piece of a request's data here and now if nothing has to be waited for, and hands it on otherwise.
    fn move_piece(&mut self, ticket: Ticket, mut what: Move, piece: Buffer<'_>) -> io::Result<()> {
        if let Some(alignment) = self.shared.direct {
            if alignment.fits(what.offset, piece) {
                return self.hand_on(ticket, what, piece);
            }
            return direct::detour(&what.file, what.write, what.offset, piece, alignment);
        }
        if what.write {
            return what.finish(piece, 0);
        }
        let mut rest = piece;
        while !rest.is_empty() {
            match rest.read_at_once(what.file.as_fd(), what.offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(moved) => rest = rest.split_at(what.advance(moved)).1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.hand_on(ticket, what, rest),
                // A file system that cannot say whether it would have to wait.
                Err(error) if error.kind() == ErrorKind::Unsupported => return what.finish(rest, 0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn hand_on(&mut self, ticket: Ticket, what: Move, piece: Buffer<'_>) -> io::Result<()> {
        let id = self.job(ticket).id(ticket);
        self.engine.begin(id, &what.file, what.work(piece))?;
        self.job(ticket).awaits(what);
        Ok(())
    }

    fn sync(&mut self, ticket: Ticket) -> io::Result<()> {
        let id = self.job(ticket).id(ticket);
        let Some(file) = self.volume.top() else { return Ok(()) };
        self.shared.nothing_lost()?;
        self.volume.nothing_lost()?;
        self.engine.begin(id, &file, Work::Sync)?;
        self.job(ticket).awaits(Move::nothing(file));
        Ok(())
    }

    /// Makes what a request has changed durable: data and tables.
    fn make_last(&mut self, ticket: Ticket) -> io::Result<()> {
        if self.volume.is_in_two_files() { self.volume.flush_both() } else { self.sync(ticket) }
    }

    /// Looks what is next for a job of which nothing is in flight. `true`: it is done.
    fn advance(&mut self, ticket: Ticket) -> bool {
        let job = self.job(ticket);
        if job.left > 0 {
            return false;
        }
        if job.claimed && !job.failed {
            job.claimed = false;
            self.claimed.push(ticket);
            return false;
        }
        if let Some(barrier) = job.barrier.take().filter(|_| !job.failed) {
            let settled = self.volume.settle(barrier);
            self.job(ticket).note(settled);
        }
        let job = self.job(ticket);
        if job.through && !job.failed {
            job.through = false;
            let last = self.make_last(ticket);
            let job = self.job(ticket);
            job.note(last);
            if job.left > 0 {
                return false;
            }
        }
        self.job(ticket).guard = None;
        true
    }

    /// Takes outcomes from the engine. `held` has the chains of the requests.
    fn reap<'a>(&mut self, held: impl Fn(Ticket) -> Option<&'a Chain>) {
        while let Some((id, outcome)) = self.engine.next() {
            let Some((ticket, piece)) = job::parts(id) else { continue };
            if self.is_changing(ticket) {
                self.changed(outcome);
                continue;
            }
            let job = self.job(ticket);
            match job.take(piece, outcome) {
                Moved::All => {}
                Moved::Part(what, done) => {
                    let rest = held(ticket).map(|chain| what.rest(chain, done));
                    job.note(rest.unwrap_or_else(|| Err(ErrorKind::NotFound.into())));
                }
                Moved::Nothing => {
                    let again = self.sync(ticket);
                    self.job(ticket).note(again);
                }
                Moved::Failed(error) => {
                    if job.is_sync(piece) {
                        self.shared.lost();
                        self.volume.lost();
                    }
                    self.job(ticket).note(Err(error));
                }
            }
            if self.advance(ticket) {
                self.finished.push(ticket);
            }
        }
    }

    /// Finishes all that this queue has begun, so that it is in no range and has claimed nothing.
    fn let_go<'a>(&mut self, held: impl Fn(Ticket) -> Option<&'a Chain>) {
        loop {
            self.engine.submit();
            self.reap(&held);
            if self.engine.in_flight() > 0 {
                self.engine.wait();
            } else if !self.commit() {
                return;
            }
        }
    }

    /// Makes claimed places part of the image, if any are.
    fn commit(&mut self) -> bool {
        if self.claimed.is_empty() && !self.volume.has_claims() {
            return false;
        }
        let outcome = self.volume.commit();
        for ticket in std::mem::take(&mut self.claimed) {
            let again = outcome.as_ref().map_err(|error| io::Error::from(error.kind())).copied();
            self.job(ticket).note(again);
            if self.advance(ticket) {
                self.finished.push(ticket);
            }
        }
        true
    }

    fn answer(&mut self, chain: &Chain, attempt: &Attempt<'_>, request: &Request<'_>) -> Served {
        let ticket = attempt.ticket();
        let answer = request.answer_len();
        let (sort, began) = (Sort::of(request), self.batch.began());
        self.shared.limits.pay(sort.bytes(request));
        self.job(ticket).begin(answer, sort, began);
        let begun = self.begin(ticket, request, attempt);
        self.job(ticket).begun();
        self.job(ticket).note(begun);
        if !self.advance(ticket) {
            return Served::Later;
        }
        self.batch.add(sort);
        let status = self.job(ticket).status();
        Served::Done(finish(chain, status, answer))
    }
}

impl Serve for DiskQueue {
    fn serve(&mut self, _index: u16, chain: &Chain, attempt: &mut Attempt<'_>) -> Served {
        match Request::read(chain, &self.shared.checks()) {
            Ok(Ok(request)) => self.answer(chain, attempt, &request),
            Ok(Err(status)) => {
                metrics::REFUSED.add(1);
                Served::Done(finish(chain, status, 0))
            }
            Err(_) => {
                metrics::BAD_REQUESTS.add(1);
                tracing::warn!(target: virtio::GUEST, "A request without a header or a status byte is given back empty");
                Served::Done(0)
            }
        }
    }

    fn refuse(&mut self, _index: u16, chain: &Chain) -> u32 {
        finish(chain, Status::IoError, 0)
    }

    fn can_serve(&mut self, _index: u16) -> bool {
        self.wait = self.shared.limits.wait();
        self.wait.is_none()
    }

    fn poller(&mut self) -> Option<&mut Poller> {
        Some(&mut self.poller)
    }

    fn timeout(&self, _slots: &Slots) -> Option<Duration> {
        self.wait
    }

    fn settle(&mut self, slot: &mut Slot) {
        self.engine.submit();
        self.reap(|ticket| slot.held(ticket));
        if !self.claimed.is_empty() || self.volume.has_claims() {
            // The data of what is claimed has to be there before the tables say so.
            self.let_go(|ticket| slot.held(ticket));
        }
        self.engine.submit();
        for ticket in std::mem::take(&mut self.finished) {
            let job = self.job(ticket);
            let (status, answer) = (job.status(), job.answer);
            let (sort, began) = (job.sort, job.began);
            self.batch.finished(sort, began);
            slot.finish(ticket, |chain| finish(chain, status, answer));
        }
        self.batch.end();
    }

    fn sources(&self, _slots: &Slots) -> [Option<Source<'_>>; SOURCES] {
        self.engine.sources().map(|source| source.map(|fd| (fd, PollFlags::IN)))
    }

    fn ready(&mut self, _which: usize, _events: PollFlags, slots: &mut Slots) {
        slots.iter_mut().for_each(Slot::wake);
    }

    fn stopping(&mut self, index: u16, slots: &mut Slots) {
        let Some(slot) = slots.get(index) else { return };
        while slot.in_hand() > 0 {
            self.let_go(|ticket| slot.held(ticket));
            self.settle(slot);
        }
    }
}
