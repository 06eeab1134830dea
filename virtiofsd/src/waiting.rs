//! Requests that wait for somebody's lock.
//!
//! One thread of the process tries them again, all in turn and in the order in which they came: at once when a lock was given up in this
//! share, and otherwise after a while that grows, since the host tells nobody that a lock is free. So a waiting request
//! takes no thread of the pool, can be interrupted at any moment, and whoever waits longest is tried first.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use crate::fs::{Done, Share, Thread};
use crate::pool::Errand;

/// Shortest and longest time between two attempts, while nothing is heard of.
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_millis(50);

/// Most requests that wait. More of them would leave no room in the queues for those that give locks up.
const MOST: usize = 128;

/// Interruptions that are remembered which found nothing to interrupt: they may have overtaken what they mean.
const EARLY: usize = 64;

#[derive(Debug, Default)]
struct List {
    /// In the order in which they came.
    waiting: Vec<Errand>,
    /// Numbers of requests that are not wanted any more.
    unwanted: Vec<u64>,
    /// Something has changed since the last attempt.
    changed: bool,
    /// How often all were interrupted: those that are being tried at that moment, too.
    ends: u64,
}

/// The waiting room.
#[derive(Debug, Default)]
pub struct Waiting {
    list: Mutex<List>,
    news: Condvar,
}

impl Waiting {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request waits from now on. If there is no room it is told so.
    pub(crate) fn enter(&self, errand: Errand) {
        let mut list = self.list();
        // All were interrupted after this one was handed on.
        let ended = list.ends != errand.ends;
        if ended || list.waiting.len() >= MOST {
            drop(list);
            return errand.finish(Err(if ended { Errno::INTR } else { Errno::NOLCK }));
        }
        list.waiting.push(errand);
        list.changed = true;
        drop(list);
        self.news.notify_one();
    }

    /// How often all were interrupted.
    pub(crate) fn ends(&self) -> u64 {
        self.list().ends
    }

    /// A lock was given up.
    pub fn look_again(&self) {
        let mut list = self.list();
        if !list.waiting.is_empty() {
            list.changed = true;
            self.news.notify_one();
        }
    }

    /// The request of this number is not wanted any more.
    pub fn interrupt(&self, unique: u64) {
        let mut list = self.list();
        if list.unwanted.len() >= EARLY {
            list.unwanted.remove(0);
        }
        list.unwanted.push(unique);
        list.changed = true;
        drop(list);
        self.news.notify_one();
    }

    /// None is wanted any more: their queue is to stop, or their guest is gone.
    pub fn interrupt_all(&self) {
        let errands = {
            let mut list = self.list();
            list.ends = list.ends.wrapping_add(1);
            std::mem::take(&mut list.waiting)
        };
        for errand in errands {
            errand.finish(Err(Errno::INTR));
        }
    }

    /// Tries, for as long as the process lives.
    pub fn work(&self, share: &Share, mut thread: Thread) {
        let mut pause = SHORTEST;
        loop {
            let mut list = self.list();
            while list.waiting.is_empty() {
                list = self.news.wait(list).unwrap_or_else(PoisonError::into_inner);
            }
            if !std::mem::take(&mut list.changed) {
                list = self.news.wait_timeout(list, pause).unwrap_or_else(PoisonError::into_inner).0;
                pause = if std::mem::take(&mut list.changed) { SHORTEST } else { pause.saturating_mul(2).min(LONGEST) };
            } else {
                pause = SHORTEST;
            }
            let errands = std::mem::take(&mut list.waiting);
            let (unwanted, ends) = (list.unwanted.clone(), list.ends);
            drop(list);
            let mut left = Vec::new();
            let mut gone = Vec::new();
            for errand in errands {
                let unique = errand.unique();
                let done = if unwanted.contains(&unique) { Err(Errno::INTR) } else { errand.attempt(share, &mut thread) };
                if done == Ok(Done::Locked) {
                    left.push(errand);
                } else {
                    gone.push(unique);
                    errand.finish(done);
                }
            }
            let mut list = self.list();
            if list.ends != ends {
                left.drain(..).for_each(|errand| errand.finish(Err(Errno::INTR)));
            }
            // Those that have come meanwhile came later.
            left.append(&mut list.waiting);
            list.waiting = left;
            list.unwanted.retain(|unique| !gone.contains(unique));
        }
    }
}
