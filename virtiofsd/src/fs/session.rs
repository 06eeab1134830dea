//! The beginning and the end of a session.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::abi::{self, init};
use crate::fs::{Cache, Done, EMPTY, Io, Outcome, Settings, Share};
use crate::reply::{self, InitReply};
use crate::request::forgotten;

/// Bytes of data of one request.
const MAX_WRITE: u32 = 1 << 20;

impl Share {
    pub(super) fn init(&self, major: u32, minor: u32, max_readahead: u32, flags: u64, io: Io<'_>) -> Outcome {
        if major > abi::MAJOR {
            // The guest is to come again with a version that is known here.
            return io.answer(&reply::init(&InitReply { minor: abi::NEWEST_MINOR, ..InitReply::default() }));
        }
        if major < abi::MAJOR || minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let mut agreed = flags & self.offers;
        if minor < abi::EXTENSIONS_MINOR {
            // Labels would stand where nothing says that they do.
            agreed &= !init::SECURITY_CTX;
        }
        if self.settings.security_label_required && agreed & init::SECURITY_CTX == 0 {
            tracing::warn!(target: "guest", "The guest's files cannot have labels, which it takes Linux 6.3 for: --security-label=auto lets it go on without");
            return Err(Errno::PROTO);
        }
        if self.session.begun.swap(1, Ordering::Relaxed) != 0 {
            // A guest that begins anew has forgotten what it knew.
            self.end();
        }
        self.session.flags.store(agreed, Ordering::Relaxed);
        io.answer(&reply::init(&InitReply {
            minor: abi::NEWEST_MINOR,
            max_readahead,
            flags: agreed,
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: u16::try_from(MAX_WRITE / 4096).unwrap_or(u16::MAX),
            ..InitReply::default()
        }))
    }

    pub(super) fn destroy(&self) -> Outcome {
        self.end();
        Ok(EMPTY)
    }

    /// The guest is gone, or was started anew. What was agreed on stays until something else is: a frontend may come back with a guest
    /// that does not know it was away.
    pub fn end(&self) {
        self.waiting.interrupt_all();
        self.locks.clear();
        self.tree.forget_all();
        if let Some(watch) = &self.watch {
            watch.clear();
        }
    }

    pub(super) fn forget(&self, node: u64, count: u64) -> Outcome {
        self.tree.forget(node, count);
        Ok(Done::Silence)
    }

    pub(super) fn forget_many(&self, count: u32, io: Io<'_>) -> Outcome {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        for (node, lookups) in forgotten(io.data).take(count) {
            self.tree.forget(node, lookups);
        }
        Ok(Done::Silence)
    }
}

/// What a guest is offered, with these settings.
///
/// Not that a file is emptied as it is opened (`ATOMIC_O_TRUNC`): Linux looks whether it is a program that runs after it has been opened, and
/// one that does not open it would believe it was emptied. The request to empty it costs little.
pub(super) fn offers(settings: &Settings) -> u64 {
    let when = |condition: bool, flags: u64| if condition { flags } else { 0 };
    init::ASYNC_READ
        | init::PARALLEL_DIROPS
        | init::BIG_WRITES
        | init::AUTO_INVAL_DATA
        | init::ASYNC_DIO
        | init::MAX_PAGES
        | init::INIT_EXT
        | init::CREATE_SUPP_GROUP
        | init::ALLOW_IDMAP
        | init::HAS_IOCTL_DIR
        | when(settings.announce_submounts, init::SUBMOUNTS)
        | when(settings.readdirplus, init::DO_READDIRPLUS | init::READDIRPLUS_AUTO)
        | when(settings.writeback, init::WRITEBACK_CACHE)
        | when(settings.posix_acl, init::POSIX_ACL | init::DONT_MASK | init::SETXATTR_EXT)
        | when(settings.security_label, init::SECURITY_CTX)
        | when(settings.killpriv_v2, init::HANDLE_KILLPRIV_V2)
        | when(settings.locks, init::POSIX_LOCKS | init::FLOCK_LOCKS)
        | when(settings.allow_mmap, init::DIRECT_IO_ALLOW_MMAP)
        | when(settings.cache == Cache::Always, init::NO_OPENDIR_SUPPORT)
        | when(settings.opens_nothing(), init::NO_OPEN_SUPPORT)
        | when(matches!(settings.cache, Cache::Always | Cache::Metadata), init::CACHE_SYMLINKS)
}
