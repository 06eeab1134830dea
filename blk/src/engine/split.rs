//! An io_uring for data, and threads for what makes it last and what gives space back.
//!
//! A ring could do those, too. But it has threads of its own for them, and what those have begun when the process is killed keeps the
//! image's lock a tick of the kernel's clock longer than the process lives (`io_fallback_tw` in Linux 6.18): a successor took 9 ms to
//! serve, and not 5. A thread of the process is done with what it does when the process is gone.

use std::io;
use std::os::fd::BorrowedFd;

use virtio::worker::SOURCES;

use crate::engine::pool::Pool;
use crate::engine::uring::Uring;
use crate::engine::{Done, Engine, File, Work};

/// Threads of a device. Each queue gives space back in one place at a time, and a flush must not wait for that.
pub const THREADS: u16 = 4;

/// See the module.
#[derive(Debug)]
pub struct Split {
    ring: Uring,
    pool: Pool,
}

impl Split {
    /// Of these two.
    pub fn new(ring: Uring, pool: Pool) -> Split {
        Split { ring, pool }
    }
}

impl Engine for Split {
    fn begin(&mut self, id: u64, file: &File, work: Work<'_>) -> io::Result<()> {
        match work {
            Work::Read { .. } | Work::Write { .. } => self.ring.begin(id, file, work),
            Work::Clear { .. } | Work::Sync => self.pool.begin(id, file, work),
        }
    }

    fn submit(&mut self) {
        self.ring.submit();
        self.pool.submit();
    }

    fn next(&mut self) -> Option<Done> {
        // Asking the threads for nothing would cost a lock and a system call with every batch.
        self.ring.next().or_else(|| if self.pool.in_flight() > 0 { self.pool.next() } else { None })
    }

    fn wait(&mut self) {
        self.submit();
        // Whoever waits does so again until nothing is in flight, so it does not matter for which of them.
        if self.ring.in_flight() > 0 { self.ring.wait() } else { self.pool.wait() }
    }

    fn in_flight(&self) -> usize {
        self.ring.in_flight() + self.pool.in_flight()
    }

    fn sources(&self) -> [Option<BorrowedFd<'_>>; SOURCES] {
        let [ring, _] = self.ring.sources();
        let [pool, _] = self.pool.sources();
        [ring, pool]
    }
}
