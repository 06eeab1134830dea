//! Directories in which this host changes something.
//!
//! A guest believes what it was told for as long as it was told to, and Linux has no way to take it back. So what it is told of a directory in
//! which this host has just changed something is to be believed for a moment only, and the longer nothing more happens there, the longer:
//! as long as it has been quiet, up to the time that is usual. Where nothing ever happens, the usual time is right from the start.
//!
//! The kernel reports changes of directories that were looked into (fanotify, which an ordinary user may use for his own files). What this
//! process does itself, for its guest, is reported with its own number, and does not count: the guest knows. Directories are watched
//! until there are [`MOST`]; then all are given up, and those that are looked into are watched anew.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::magic::Magic;
use crate::metrics;
use crate::sys::{self, RawHandle};

/// Most directories. The kernel keeps each in memory.
const MOST: usize = 8192;

/// How long a guest believes what it is told of a directory that cannot be watched.
const UNWATCHED: Duration = Duration::from_secs(1);

/// Room for what is read at a time.
const BUFFER: usize = 16 * 1024;

/// What is reported.
const CHANGES: u64 = libc::FAN_MODIFY
    | libc::FAN_ATTRIB
    | libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MOVED_FROM
    | libc::FAN_MOVED_TO
    | libc::FAN_EVENT_ON_CHILD
    | libc::FAN_ONDIR;

/// What is watched.
#[derive(Debug)]
pub(crate) struct Watch {
    group: OwnedFd,
    /// This process.
    own: u32,
    began: Instant,
    directories: RwLock<Directories>,
    /// When reports were lost, or could not be read: everything may have changed.
    lost: AtomicU64,
}

/// When something changed in each: milliseconds since the beginning, and one more; zero for never.
#[derive(Debug, Default)]
struct Directories {
    /// How often one was watched since all were given up.
    asked: usize,
    changed: Vec<AtomicU64>,
    by_node: HashMap<u64, Option<usize>>,
    by_file: HashMap<RawHandle, usize>,
}

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// When the kernel does not report changes.
    pub(crate) fn new() -> Result<Watch, Errno> {
        let group = sys::fanotify()?;
        let (own, began) = (std::process::id(), Instant::now());
        Ok(Watch { group, own, began, directories: RwLock::default(), lost: AtomicU64::new(0) })
    }

    /// How long nothing has been changed in a directory by this host. It is watched from now on.
    pub(crate) fn quiet(&self, node: u64, magic: &Magic, open: impl FnOnce() -> Option<std::sync::Arc<OwnedFd>>) -> Duration {
        let known = |directories: &Directories| directories.by_node.get(&node).map(|place| self.since(directories, *place));
        if let Some(quiet) = known(&self.directories.read().unwrap_or_else(PoisonError::into_inner)) {
            return quiet;
        }
        let place = open().and_then(|fd| self.watch(magic, fd.as_fd()));
        let mut directories = self.directories.write().unwrap_or_else(PoisonError::into_inner);
        if directories.asked >= MOST {
            let _what_stays_is_of_no_use = sys::unwatch_all(self.group.as_fd());
            directories.asked = 0;
            directories.clear();
        }
        directories.asked = directories.asked.saturating_add(1);
        let place = place.map(|file| directories.place(file));
        directories.by_node.insert(node, place);
        self.since(&directories, place)
    }

    /// The guest begins anew, perhaps with other numbers. Whoever calls this may not have what is watched given up; that comes when there
    /// is too much of it.
    pub(crate) fn clear(&self) {
        self.directories.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// As [`Watch::quiet`], of one that is watched already; any other is as quiet as can be.
    pub(crate) fn quiet_if_known(&self, node: u64) -> Duration {
        let directories = self.directories.read().unwrap_or_else(PoisonError::into_inner);
        directories.by_node.get(&node).map_or(Duration::MAX, |place| self.since(&directories, *place))
    }

    fn watch(&self, magic: &Magic, fd: BorrowedFd<'_>) -> Option<RawHandle> {
        let file = sys::handle_to_tell_apart(fd).ok()?;
        let (dir, name) = magic.name(fd);
        sys::watch(self.group.as_fd(), dir, name.as_c_str(), CHANGES).ok()?;
        Some(file)
    }

    fn since(&self, directories: &Directories, place: Option<usize>) -> Duration {
        let Some(place) = place else { return UNWATCHED };
        let changed = directories.changed.get(place).map_or(0, |changed| changed.load(Ordering::Relaxed));
        match changed.max(self.lost.load(Ordering::Relaxed)) {
            0 => Duration::MAX,
            changed => Duration::from_millis(self.now().saturating_sub(changed)),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// Takes reports for as long as the process lives.
    pub(crate) fn work(&self) {
        let mut bytes = vec![0; BUFFER];
        loop {
            match rustix::io::read(&self.group, &mut *bytes) {
                Ok(len) => self.hear(bytes.get(..len).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("Changes of the host are not reported any more: {errno}");
                    self.lost.store(u64::MAX, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    fn hear(&self, mut reports: &[u8]) {
        let now = self.now();
        let directories = self.directories.read().unwrap_or_else(PoisonError::into_inner);
        while let Some((report, rest)) = Report::take(reports) {
            reports = rest;
            if report.by == self.own {
                continue;
            }
            metrics::CHANGES.add(1);
            match report.file {
                None => self.lost.store(now, Ordering::Relaxed),
                Some(file) => {
                    if let Some(changed) = directories.by_file.get(&file).and_then(|place| directories.changed.get(*place)) {
                        changed.store(now, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

impl Directories {
    fn clear(&mut self) {
        self.changed.clear();
        self.by_node.clear();
        self.by_file.clear();
    }

    /// Two directories of different file systems may have the same handle: they share a place, and are not quiet if one of them is not.
    fn place(&mut self, file: RawHandle) -> usize {
        *self.by_file.entry(file).or_insert_with(|| {
            self.changed.push(AtomicU64::new(0));
            self.changed.len().saturating_sub(1)
        })
    }
}

/// One report of the kernel (`struct fanotify_event_metadata`, and `struct fanotify_event_info_fid` behind it).
#[derive(Debug, PartialEq, Eq)]
struct Report {
    /// The process that did it, as far as this one may know.
    by: u32,
    /// The directory; none if it is not said.
    file: Option<RawHandle>,
}

impl Report {
    /// Takes the first of several.
    fn take(bytes: &[u8]) -> Option<(Report, &[u8])> {
        let number = |at: usize| bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
        let len = usize::try_from(number(0)?).ok()?;
        let (this, rest) = bytes.split_at_checked(len.max(24))?;
        // The header, then kind and length of what follows, and which file system it is on.
        let file = this.get(24 + 4 + 8..).and_then(|handle| {
            let len = usize::try_from(u32::from_ne_bytes(*handle.first_chunk()?)).ok()?;
            let kind = i32::from_ne_bytes(*handle.get(4..)?.first_chunk()?);
            RawHandle::new(kind, handle.get(8..)?.get(..len)?).ok()
        });
        Some((Report { by: number(20)?, file }, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(by: u32, handle: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[20..24].copy_from_slice(&by.to_ne_bytes());
        if let Some(handle) = handle {
            bytes.extend([3, 0, 0, 0]);
            bytes.extend([7; 8]);
            bytes.extend(u32::try_from(handle.len()).unwrap().to_ne_bytes());
            bytes.extend(1_i32.to_ne_bytes());
            bytes.extend(handle);
        }
        let len = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes
    }

    #[test]
    fn reports_are_taken_one_by_one() {
        let bytes = [report(5, Some(b"a directory")), report(6, None)].concat();
        let (first, rest) = Report::take(&bytes).unwrap();
        assert_eq!(first, Report { by: 5, file: RawHandle::new(1, b"a directory").ok() });
        let (second, rest) = Report::take(rest).unwrap();
        assert_eq!((second, rest), (Report { by: 6, file: None }, &[][..]));
        assert!(Report::take(&[]).is_none() && Report::take(&bytes[..30]).is_none());
    }

    #[test]
    fn a_change_is_remembered_and_what_the_process_does_itself_is_not_one() {
        let Ok(watch) = Watch::new() else { return };
        let watch = Watch { own: 9, ..watch };
        let file = |name: &[u8]| RawHandle::new(1, name).unwrap();
        {
            let mut directories = watch.directories.write().unwrap();
            let (a, b) = (directories.place(file(b"a")), directories.place(file(b"b")));
            directories.by_node.extend([(10, Some(a)), (11, Some(b)), (12, None)]);
        }
        watch.hear(&[report(5, Some(b"a")), report(9, Some(b"b")), report(5, Some(b"c"))].concat());
        assert!(watch.quiet_if_known(10) < Duration::from_secs(60));
        assert_eq!(watch.quiet_if_known(11), Duration::MAX);
        assert_eq!((watch.quiet_if_known(12), watch.quiet_if_known(13)), (UNWATCHED, Duration::MAX));
        watch.hear(&report(5, None));
        assert!(watch.quiet_if_known(11) < Duration::from_secs(60), "reports were lost");
    }
}
