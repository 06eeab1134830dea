//! How long requests take, with two looks at the clock for a whole batch.
//!
//! A request counts from the moment its batch was begun to the moment the batch with its answer is shown: what the guest waits for, too.

use std::time::Instant;

use crate::metrics;
use crate::request::Request;

/// What kinds of requests are counted apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    Read,
    Write,
    Flush,
    #[default]
    Other,
}

impl Sort {
    pub(super) fn of(request: &Request<'_>) -> Sort {
        match request {
            Request::Read { .. } => Sort::Read,
            Request::Write { .. } => Sort::Write,
            Request::Flush => Sort::Flush,
            _ => Sort::Other,
        }
    }

    /// Bytes that count for a limit.
    pub(super) fn bytes(self, request: &Request<'_>) -> u64 {
        match request {
            Request::Read { data, .. } | Request::Write { data, .. } => data.len().into(),
            _ => 0,
        }
    }
}

/// What was done at once since the batch began.
#[derive(Debug, Default)]
pub(super) struct Batch {
    began: Option<Instant>,
    ended: Option<Instant>,
    /// By [`Sort`].
    done: [u64; 4],
}

impl Batch {
    /// When the batch began: now, if this is its first request.
    pub(super) fn began(&mut self) -> Instant {
        *self.began.get_or_insert_with(Instant::now)
    }

    /// A request was done at once.
    pub(super) fn add(&mut self, sort: Sort) {
        if let Some(count) = self.done.get_mut(sort as usize) {
            *count += 1;
        }
    }

    /// A request that was begun, perhaps in an earlier batch, is finished with this one.
    pub(super) fn finished(&mut self, sort: Sort, began: Option<Instant>) {
        let now = *self.ended.get_or_insert_with(Instant::now);
        if let Some(began) = began {
            metrics::TIMES[sort as usize].1.add(now.saturating_duration_since(began), 1);
        }
    }

    /// The batch is about to be shown.
    pub(super) fn end(&mut self) {
        let (began, ended) = (self.began.take(), self.ended.take());
        let Some(began) = began.filter(|_| self.done != [0; 4]) else { return };
        let time = ended.unwrap_or_else(Instant::now).saturating_duration_since(began);
        for ((_, times, _), count) in metrics::TIMES.iter().zip(&mut self.done) {
            if *count > 0 {
                times.add(time, *count);
                *count = 0;
            }
        }
    }
}
