//! Disk image formats: raw, and qcow2 with an engine of our own. A ground crate: it depends on nothing of ours.
//!
//! # Theory of operation
//!
//! ```text
//! Image ── Chain (top first) ── Node: raw file | qcow2 ── Storage: one open file, positional calls only
//!   │
//!   └── Lookup, one per queue thread: where do these guest bytes live?  map_read, map_write, commit, zero, discard, flush
//! ```
//!
//! This crate says *where* data is; the caller moves it, straight between the file and guest memory. A lookup that hits a table
//! already in memory takes no lock: the tables are shared arrays of atomics, and each queue keeps references to those it used.
//!
//! **A write has two phases.** [`Lookup::map_write`] gives a place. If the cluster was not there, it is claimed: nobody else may
//! allocate or copy it. The caller writes its bytes, for as many requests as it likes, and then calls [`Lookup::commit`], which
//! makes the clusters visible, with at most one barrier for all of them. Only then is a write acknowledged. Nobody ever waits
//! while it holds claims or ranges: such a call gives [`Error::Busy`], the caller commits and lets go, and tries again. That is
//! why there is no deadlock.
//!
//! ```no_run
//! # use image::{Error, Lookup, Place, Result};
//! # fn transfer(_: std::os::fd::BorrowedFd<'_>, _: u64, _: u64) {}
//! /// Some requests of one queue, one commit for all: how an engine writes.
//! fn write(lookup: &mut Lookup, requests: &[(u64, u64)]) -> Result<()> {
//!     let mut ranges = Vec::new();
//!     for (start, len) in requests {
//!         let range = loop {
//!             match lookup.share(*start, *len) {
//!                 Err(Error::Busy) => {
//!                     lookup.commit()?;
//!                     ranges.clear(); // all that was in flight has ended
//!                 }
//!                 other => break other?,
//!             }
//!         };
//!         ranges.push(range);
//!         let mut done = 0;
//!         while done < *len {
//!             let extent = match lookup.map_write(start + done, len - done) {
//!                 Err(Error::Busy) => {
//!                     lookup.commit()?; // the data of what is pending has been written
//!                     continue;
//!                 }
//!                 other => other?,
//!             };
//!             if let Place::Data { file, offset } = extent.place
//!                 && let Some(fd) = lookup.file(file).and_then(|file| file.fd())
//!             {
//!                 transfer(fd, offset, extent.len); // from guest memory
//!             }
//!             done += extent.len;
//!         }
//!     }
//!     lookup.commit() // and only then the requests are completed
//! }
//! ```
//!
//! If moving the data fails, [`Lookup::abort`] takes the place of the commit.
//!
//! **Nothing is written back later.** Every change of metadata is a write call at once, before others can see it in memory, so a
//! process that is killed loses no acknowledged write. What a *power cut* may take is decided by order alone (`qcow2.rs`).
//!
//! **Formats are declared, never probed, and nothing here opens a path.** The caller hands in an open file for each link of the
//! chain; the names in headers are only reported. What an image says is hostile until it is checked: sizes are capped by the file
//! that is there, a mapping that points into metadata or beyond the file is an error of that request, and the image is then not
//! written to any more.
//!
//! # The calls a process makes through this crate
//!
//! `preadv2`, `pwritev2`, `fdatasync`, `fallocate` (punch a hole, zero a range), `ftruncate`, and `fstat` and `lseek` when a file
//! is handed in. Memory and threads' waiting aside, there is no other.

#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod chain;
mod error;
mod image;
mod inflate;
mod lookup;
mod qcow2;
mod range;
mod storage;

pub use chain::{Format, Info, Layer, MAX_DEPTH};
pub use error::{Error, Result};
pub use image::{Barrier, Image, Options};
pub use lookup::{Compressed, Extent, Lookup, Place};
pub use qcow2::check::{Report, check};
pub use qcow2::create::{Create, create};
pub use range::{Exclusive, Shared};
pub use storage::{FileId, FileStorage, Storage, read_at, write_at};
