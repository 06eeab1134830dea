//! Discards and zeroes. In a raw image the file system makes them, as operations of the engine: that may take it seconds, and the requests
//! behind them go on meanwhile.
//!
//! They are made one after the other. A file system that locks the file for each of them gains nothing by more, and a guest that sends
//! hundreds at once keeps one of the engine's threads busy, and not all that other requests wait for.
//!
//! Not every file system can punch or zero. Where it cannot, a discard does nothing, zeroes keep their space, and in the end are written,
//! piece by piece.
//!
//! In a qcow2 image they change tables, and have clusters for themselves: the queue's thread does that, after it has let go of everything.

use std::io::{self, ErrorKind};

use rustix::io::Errno;
use virtio::worker::{Attempt, Ticket};

use super::DiskQueue;
use crate::engine::{Clear, File, Work};
use crate::request::{Range, Ranges};

/// What is to become of ranges of a raw image.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) ticket: Ticket,
    file: File,
    ranges: Ranges,
    discard: bool,
    /// The range it is at, and how much of that is done.
    at: usize,
    done: u64,
    how: Clear,
}

impl Change {
    fn new(ticket: Ticket, file: File, ranges: Ranges, discard: bool) -> Change {
        let how = ranges.get(0).map_or(Clear::Punch, |range| first_try(range, discard));
        Change { ticket, file, ranges, discard, at: 0, done: 0, how }
    }

    /// What to do next, if anything is left.
    fn work(&self) -> Option<Work<'static>> {
        let range = self.ranges.get(self.at)?;
        let len = u32::try_from(range.len.saturating_sub(self.done)).unwrap_or(u32::MAX);
        Some(Work::Clear { offset: range.offset.saturating_add(self.done), len, how: self.how })
    }

    /// Takes the outcome of that.
    fn take(&mut self, outcome: io::Result<u32>) -> io::Result<()> {
        match outcome {
            Ok(0) if self.how == Clear::Write => return Err(ErrorKind::WriteZero.into()),
            Ok(written) if self.how == Clear::Write => self.done = self.done.saturating_add(written.into()),
            Ok(_) => self.done = u64::MAX,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(error) if is_unknown(&error) => match self.how {
                _ if self.discard => self.done = u64::MAX,
                Clear::Punch => self.how = Clear::Zero,
                Clear::Zero => self.how = Clear::Write,
                Clear::Write => return Err(error),
            },
            Err(error) => return Err(error),
        }
        if self.ranges.get(self.at).is_some_and(|range| self.done >= range.len) {
            (self.at, self.done) = (self.at + 1, 0);
            self.how = self.ranges.get(self.at).map_or(self.how, |range| first_try(range, self.discard));
        }
        Ok(())
    }
}

fn first_try(range: &Range, discard: bool) -> Clear {
    if discard || range.unmap { Clear::Punch } else { Clear::Zero }
}

/// The file system, or the device, cannot do that.
fn is_unknown(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::NOSYS))
}

impl DiskQueue {
    /// Gives the space of ranges back, or turns them into zeroes.
    pub(super) fn change(&mut self, ticket: Ticket, ranges: &Ranges, discard: bool, attempt: &Attempt<'_>) -> io::Result<()> {
        let Some((offset, len)) = ranges.span() else { return Ok(()) };
        if self.volume.is_plain() {
            self.guard(ticket, offset, len, attempt)?;
            if let Some(file) = self.volume.plain(offset, len)? {
                return self.begin_change(Change::new(ticket, file, *ranges, discard));
            }
            // An overlay has come meanwhile.
            self.job(ticket).guard = None;
        }
        self.let_go(|ticket| attempt.held(ticket));
        let mut all = ranges.iter();
        if discard {
            all.try_for_each(|range| self.volume.discard(range))
        } else {
            all.try_for_each(|range| self.volume.write_zeroes(range))
        }
    }

    fn begin_change(&mut self, change: Change) -> io::Result<()> {
        let ticket = change.ticket;
        self.changes.push_back(change);
        if self.changes.len() == 1
            && let Err(error) = self.next_step()
        {
            self.changes.clear();
            return Err(error);
        }
        self.job(ticket).left += 1;
        Ok(())
    }

    /// Hands the next step of the first change on. `false`: there is none.
    fn next_step(&mut self) -> io::Result<bool> {
        let Some(change) = self.changes.front() else { return Ok(false) };
        let (ticket, Some(work)) = (change.ticket, change.work()) else { return Ok(false) };
        let file = change.file.clone();
        let id = self.job(ticket).id(ticket);
        self.engine.begin(id, &file, work).map(|()| true)
    }

    /// Whether an outcome is that of a change.
    pub(super) fn is_changing(&self, ticket: Ticket) -> bool {
        self.changes.front().is_some_and(|change| change.ticket == ticket)
    }

    /// A step of the first change is done: the next one is begun, of this change or another.
    pub(super) fn changed(&mut self, outcome: io::Result<u32>) {
        let Some(change) = self.changes.front_mut() else { return };
        let mut last = change.take(outcome);
        while !self.changes.is_empty() {
            let ended = match last {
                Ok(()) => match self.next_step() {
                    Ok(true) => return,
                    other => other.map(drop),
                },
                Err(error) => Err(error),
            };
            if let Some(Change { ticket, .. }) = self.changes.pop_front() {
                let job = self.job(ticket);
                job.note(ended);
                job.one_less();
                if self.advance(ticket) {
                    self.finished.push(ticket);
                }
            }
            last = Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn change(ranges: &[(u64, u64, bool)], discard: bool) -> Change {
        let mut all = Ranges::default();
        ranges.iter().for_each(|(offset, len, unmap)| all.push(Range { offset: *offset, len: *len, unmap: *unmap }).unwrap());
        let file = File::new(Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()));
        Change::new(Ticket::from_index(0).unwrap(), file, all, discard)
    }

    /// Carries a change out: what is asked for, until nothing is.
    fn asked(mut change: Change, answer: impl Fn(Clear, u32) -> io::Result<u32>) -> (Vec<(u64, u32, Clear)>, io::Result<()>) {
        let mut asked = Vec::new();
        while let Some(Work::Clear { offset, len, how }) = change.work() {
            asked.push((offset, len, how));
            if let Err(error) = change.take(answer(how, len)) {
                return (asked, Err(error));
            }
        }
        (asked, Ok(()))
    }

    #[test]
    fn ranges_are_cleared_one_after_the_other() {
        let ranges = [(0, 0, true), (512, 1024, true), (4096, 512, false), (0, 0, false)];
        let (steps, ended) = asked(change(&ranges, false), |_, _| Ok(0));
        assert_eq!(steps, [(512, 1024, Clear::Punch), (4096, 512, Clear::Zero)]);
        assert!(ended.is_ok());
        let (steps, _) = asked(change(&ranges, true), |_, _| Ok(0));
        assert_eq!(steps, [(512, 1024, Clear::Punch), (4096, 512, Clear::Punch)]);
        assert_eq!(asked(change(&[(512, 0, false)], false), |_, _| Ok(0)).0, []);
    }

    #[test]
    fn what_a_file_system_cannot_is_done_in_another_way() {
        let cannot = |_, _| Err(Errno::OPNOTSUPP.into());
        let (steps, ended) = asked(change(&[(0, 512, false), (1024, 512, false)], true), cannot);
        assert_eq!((steps.len(), ended.is_ok()), (2, true), "a discard need not do anything");
        let writes = |how, len: u32| if how == Clear::Write { Ok(len.min(400)) } else { Err(Errno::NOSYS.into()) };
        let (steps, ended) = asked(change(&[(0, 1000, true), (4096, 100, false)], false), writes);
        let of_first = [
            (0, 1000, Clear::Punch),
            (0, 1000, Clear::Zero),
            (0, 1000, Clear::Write),
            (400, 600, Clear::Write),
            (800, 200, Clear::Write),
        ];
        assert_eq!(steps[..5], of_first);
        assert_eq!(steps[5..], [(4096, 100, Clear::Zero), (4096, 100, Clear::Write)], "each range is tried anew");
        assert!(ended.is_ok());
    }

    #[test]
    fn an_error_ends_a_change_and_an_interruption_does_not() {
        assert!(asked(change(&[(0, 512, true), (1024, 512, true)], true), |_, _| Err(Errno::IO.into())).1.is_err());
        assert!(
            asked(change(&[(0, 512, false)], false), |how, _| if how == Clear::Write {
                Ok(0)
            } else {
                Err(Errno::OPNOTSUPP.into())
            })
            .1
            .is_err()
        );
        let times = std::cell::Cell::new(0);
        let (steps, ended) = asked(change(&[(0, 512, true)], true), |_, _| {
            times.set(times.get() + 1);
            if times.get() < 3 { Err(Errno::INTR.into()) } else { Ok(0) }
        });
        assert_eq!((steps.len(), ended.is_ok()), (3, true));
    }
}
