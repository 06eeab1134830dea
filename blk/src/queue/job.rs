//! A request that is begun, and the pieces of data that are on their way for it.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::time::Instant;

use virtio::worker::Ticket;
use virtio::{Buffer, Chain};

use crate::engine::{File, Work};
use crate::metrics;
use crate::request::{self, Status};
use crate::volume::{Barrier, Guard};

use super::batch::Sort;

/// An operation's id is its job's ticket above, and its number among those of its job in these lower bits.
const PIECE_BITS: u32 = 32;

/// The job and the piece an id stands for.
pub(super) fn parts(id: u64) -> Option<(Ticket, usize)> {
    let ticket = usize::try_from(id >> PIECE_BITS).ok().and_then(Ticket::from_index)?;
    Some((ticket, usize::try_from(id & u64::from(u32::MAX)).ok()?))
}

/// A request that is begun.
#[derive(Debug, Default)]
pub(super) struct Job {
    /// Operations that are begun and not done.
    pub(super) left: usize,
    /// Bytes the guest gets if it goes well.
    pub(super) answer: u32,
    pub(super) failed: bool,
    /// It wrote to places that are not yet part of the image.
    pub(super) claimed: bool,
    /// It has to be on the disk before the guest hears of it.
    pub(super) through: bool,
    pub(super) guard: Option<Guard>,
    /// What was given up before it is free when its syncs are done.
    pub(super) barrier: Option<Barrier>,
    pub(super) sort: Sort,
    /// When it was taken, as [`Batch`](super::batch::Batch) counts.
    pub(super) began: Option<Instant>,
    moves: Vec<Move>,
}

impl Job {
    /// Becomes one that is being begun: that counts as an operation, so that it does not end before all of it was begun.
    pub(super) fn begin(&mut self, answer: u32, sort: Sort, began: Instant) {
        let mut moves = std::mem::take(&mut self.moves);
        // Its memory serves one request after the other.
        moves.clear();
        *self = Job { answer, left: 1, sort, began: Some(began), moves, ..Job::default() };
    }

    /// All of it is begun.
    pub(super) fn begun(&mut self) {
        self.one_less();
    }

    /// Something that counted as an operation is over.
    pub(super) fn one_less(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    /// The id of the operation that is begun next.
    pub(super) fn id(&self, ticket: Ticket) -> u64 {
        (ticket.index() as u64) << PIECE_BITS | self.moves.len() as u64
    }

    /// That operation is begun.
    pub(super) fn awaits(&mut self, what: Move) {
        self.moves.push(what);
        self.left += 1;
    }

    /// An operation is done.
    pub(super) fn take(&mut self, piece: usize, outcome: io::Result<u32>) -> Moved {
        self.one_less();
        match (outcome, self.moves.get(piece)) {
            (Ok(moved), Some(what)) if moved < what.len => Moved::Part(what.clone(), moved),
            (Ok(_), _) => Moved::All,
            (Err(error), Some(what)) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
                if what.len == 0 { Moved::Nothing } else { Moved::Part(what.clone(), 0) }
            }
            (Err(error), _) => Moved::Failed(error),
        }
    }

    /// Whether an operation moves no data.
    pub(super) fn is_sync(&self, piece: usize) -> bool {
        self.moves.get(piece).is_some_and(|what| what.len == 0)
    }

    /// How a part of it ended.
    pub(super) fn note(&mut self, outcome: io::Result<()>) {
        let Err(error) = outcome else { return };
        if !self.failed {
            metrics::FAILED.add(1);
            tracing::warn!(target: virtio::GUEST, "The image gives an error: {error}");
        }
        self.failed = true;
    }

    pub(super) fn status(&self) -> Status {
        if self.failed { Status::IoError } else { Status::Ok }
    }
}

/// How an operation ended.
pub(super) enum Moved {
    All,
    /// So many bytes of it.
    Part(Move, u32),
    /// It moves no data, and is to be done again.
    Nothing,
    Failed(io::Error),
}

/// A piece of a request's data, and where it moves.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) file: File,
    /// Where in the file.
    pub(super) offset: u64,
    /// Where in the request's data.
    pub(super) from: u32,
    pub(super) len: u32,
    pub(super) write: bool,
}

impl Move {
    /// An operation that moves no data.
    pub(super) fn nothing(file: File) -> Move {
        Move { file, offset: 0, from: 0, len: 0, write: false }
    }

    /// As the engine wants it.
    pub(super) fn work<'a>(&self, data: Buffer<'a>) -> Work<'a> {
        let offset = self.offset;
        if self.write { Work::Write { offset, data } } else { Work::Read { offset, data } }
    }

    /// So many bytes of it are moved. Gives the number, which is never more than there were.
    pub(super) fn advance(&mut self, moved: usize) -> u32 {
        let moved = u32::try_from(moved).unwrap_or(u32::MAX).min(self.len);
        self.offset = self.offset.saturating_add(moved.into());
        self.from = self.from.saturating_add(moved);
        self.len = self.len.saturating_sub(moved);
        moved
    }

    /// Moves what is left of it after the first `done` bytes, and waits for that. `data` is all of it.
    pub(super) fn finish(mut self, data: Buffer<'_>, done: u32) -> io::Result<()> {
        let mut rest = data.split_at(self.advance(usize::try_from(done).unwrap_or(usize::MAX))).1;
        while !rest.is_empty() {
            let at = Some(self.offset);
            let moved = if self.write { rest.write_to(self.file.as_fd(), at) } else { rest.read_from(self.file.as_fd(), at) };
            match moved {
                Ok(0) if self.write => return Err(ErrorKind::WriteZero.into()),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(moved) => rest = rest.split_at(self.advance(moved)).1,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The same for a request in hand, whose data is found in its chain.
    pub(super) fn rest(self, chain: &Chain, done: u32) -> io::Result<()> {
        let all = request::data(chain, self.write);
        let piece = all.split_at(self.from).1.split_at(self.len).0;
        self.finish(piece, done)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// A flush that was interrupted has made nothing durable.
    #[test]
    fn an_interrupted_sync_is_not_taken_for_done() {
        let mut job = Job::default();
        job.begin(0, Sort::Flush, Instant::now());
        job.awaits(Move::nothing(File::new(Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()))));
        assert!(matches!(job.take(0, Err(ErrorKind::Interrupted.into())), Moved::Nothing));
        assert!(matches!(job.take(0, Ok(0)), Moved::All));
    }
}
