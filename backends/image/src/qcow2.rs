//! One qcow2 image, open.
//!
//! # What a power cut may take
//!
//! Writes that no barrier (`fdatasync`) separates may reach the disk in any order, or not at all. So:
//!
//! | what is written | has to be durable before |
//! |---|---|
//! | the refcount of a cluster, and zeroes in it | anything points at it: the reserve, refilled ahead of use (`space.rs`) |
//! | data that replaces older data in another place | the L2 entry points at it: one barrier for a batch, in `commit` |
//! | a copy of an L2 table that a snapshot shares | the L1 entry points at it |
//! | an entry that points elsewhere | the refcount of what it pointed at goes down, and its space is given back |
//! | a new L1 or refcount table | the header points at it |
//!
//! A first write to a cluster that reads as zeroes needs no barrier at all. What a crash leaves are clusters that are counted and
//! not used: a leak, which `check` repairs and no other program minds.
//!
//! # Locks
//!
//! `meta` (claims, free space) before the cache of `tables` before its L1 and metadata. Data is never moved under any of them but
//! a piece of an L2 table that is copied. Refills wait for the disk under `meta`: who allocates at that moment would have to wait
//! anyway, and who does not allocate does not take it.
//!
//! # What is refused, and what is done about bitmaps
//!
//! Dirty, corrupt and encrypted images, and features nobody here knows, are refused. So is *writing* to an image with persistent
//! bitmaps that are in force: their whole purpose is to notice each change, and to clear the bit that says they are valid would
//! quietly break somebody's incremental backups.
//!
//! A claim is also what a job (commit, stream, mirror) needs to move one cluster while guests go on: it is exclusive against
//! allocation and copying, and an in-place write of others finds nothing to write in place until it is released.

pub(crate) mod check;
pub(crate) mod create;
pub(crate) mod geometry;
pub(crate) mod header;
mod mark;
mod refcounts;
mod space;
pub(crate) mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::inflate::inflate;
use crate::qcow2::geometry::{COPIED, Entry, Geometry, Kind, OFFSET};
use crate::qcow2::header::{BITMAPS, Header, RAW_EXTERNAL};
use crate::qcow2::refcounts::Refcounts;
use crate::qcow2::space::{MOST_FREED, Space};
use crate::qcow2::tables::{L1, Slice, Tables};
use crate::range::Ranges;
use crate::storage::Storage;

/// Bytes that are copied in one step.
const COPY: usize = 64 << 10;

/// An open image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    pub(crate) file: Arc<dyn Storage>,
    pub(crate) data: Option<Arc<dyn Storage>>,
    pub(crate) header: Header,
    pub(crate) tables: Tables,
    size: AtomicU64,
    /// What is beyond is not in the files: zeroes. Files of an image that is written to are as long as they have to be.
    readable: AtomicU64,
    writable: AtomicBool,
    meta: Mutex<Meta>,
    released: Condvar,
}

/// What only those look at who change where things are.
#[derive(Debug)]
pub(crate) struct Meta {
    /// Only of an image that is written to.
    space: Option<Space>,
    /// Guest clusters that somebody is allocating or copying.
    pub(crate) claims: BTreeMap<u64, u64>,
}

impl Meta {
    pub(crate) fn space(&mut self) -> Result<&mut Space> {
        self.space.as_mut().ok_or(Error::ReadOnly)
    }

    /// Nothing points at these clusters any more, as of now.
    pub(crate) fn free(&mut self, guest: Option<(u64, u64)>, first: u64, count: u64) {
        if let Some(space) = &mut self.space {
            space.free(guest, first, count);
        }
    }

    /// What was freed last, and how much waits to be given back.
    fn freed(&self) -> (u64, usize) {
        self.space.as_ref().map_or((0, 0), |space| (space.ticket(), space.freed()))
    }
}

impl Qcow2 {
    /// Opens an image whose header has been read. `room`: slices to keep in memory.
    pub(crate) fn open(layer: &Layer, mut header: Header, writable: bool, room: usize) -> Result<Qcow2> {
        header.usable()?;
        let (file, data) = (Arc::clone(&layer.file), layer.data.clone());
        match (header.geometry.external, data.is_some()) {
            (true, false) => return Error::refused("Its data is in another file, which was not given"),
            (false, true) => return Error::refused("A data file was given, but its header knows of none"),
            _ => {}
        }
        if writable {
            prepare(&file, data.as_deref(), &mut header)?;
        }
        let readable =
            if writable { u64::MAX } else { data.as_ref().unwrap_or(&file).len().map_err(Error::io("Cannot find its size"))? };
        let refs = if writable { Some(Refcounts::open(Arc::clone(&file), &header)?) } else { None };
        let (metadata, sound) = metadata(&header, refs.as_ref(), &*file)?;
        let tables = Tables::open(Arc::clone(&file), header.geometry, (header.l1_offset, header.l1_size), metadata, room)?;
        if !sound {
            tables.mark_corrupt();
        }
        let space = refs.map(|refs| Space::new(Arc::clone(&file), header.clone(), refs, &tables));
        Ok(Qcow2 {
            size: AtomicU64::new(header.size),
            readable: AtomicU64::new(readable),
            writable: AtomicBool::new(writable),
            meta: Mutex::new(Meta { space, claims: BTreeMap::new() }),
            released: Condvar::new(),
            file,
            data,
            tables,
            header,
        })
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The file that guest data is in.
    pub(crate) fn data_file(&self) -> &Arc<dyn Storage> {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// Where data that can be read ends in its file.
    pub(crate) fn readable(&self) -> u64 {
        self.readable.load(Ordering::Relaxed)
    }

    /// Whether it may be written to, now.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if !self.writable.load(Ordering::Relaxed) {
            return Err(Error::ReadOnly);
        }
        if self.tables.is_corrupt() {
            Error::corrupt("it was found to contradict itself, and is not written to any more")
        } else {
            Ok(())
        }
    }

    pub(crate) fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wait<'a>(&self, meta: MutexGuard<'a, Meta>) -> MutexGuard<'a, Meta> {
        self.released.wait(meta).unwrap_or_else(PoisonError::into_inner)
    }

    /// An entry, from a slice that is in memory afterwards.
    pub(crate) fn entry(&self, cluster: u64) -> Result<(Entry, Arc<Slice>)> {
        let (number, index) = self.geometry().slice_of(cluster);
        loop {
            let slice = self.tables.slice(number)?;
            if let Some(entry) = slice.entry(index, self.geometry()) {
                return Ok((entry, slice));
            }
        }
    }

    /// Sees to it that the L2 table of a cluster is there and ours alone.
    pub(crate) fn own_table(&self, meta: &mut Meta, cluster: u64) -> Result<()> {
        let index = self.geometry().l1_index(cluster);
        let old = self.tables.with_l1(|l1| l1.entries.get(index).copied()).ok_or(Error::Range)?;
        if old & COPIED != 0 {
            return Ok(());
        }
        let (table, _) = meta.space()?.take(1, &self.tables)?;
        let offset = self.geometry().start(table);
        if old == 0 {
            // It is zeroes, durably: no entry is there, whatever else a crash takes.
            return self.tables.link(index, offset);
        }
        // An internal snapshot has the same table.
        copy(&*self.file, old & OFFSET, offset, self.geometry().cluster_size())?;
        self.file.sync().map_err(Error::io("Cannot make an L2 table of the image durable"))?;
        self.tables.link(index, offset)?;
        let old = self.geometry().cluster(old & OFFSET);
        self.tables.remove_metadata(old);
        meta.free(None, old, 1);
        Ok(())
    }

    /// Nothing points at what this entry pointed at, as of now. `alone`: nobody can be reading it, since the caller has the range
    /// for itself.
    pub(crate) fn free(&self, meta: &mut Meta, cluster: u64, old: Entry, alone: bool) {
        let g = self.geometry();
        let guest = (!alone).then(|| (g.start(cluster), g.cluster_size()));
        match old.kind(g) {
            Kind::Data(host) | Kind::Zero(Some(host)) if !g.external => meta.free(guest, g.cluster(host), 1),
            Kind::Compressed => {
                let (offset, len) = g.compressed(old.word);
                let (first, last) = (g.cluster(offset), g.cluster(offset.saturating_add(len).saturating_sub(1)));
                meta.free(guest, first, last.saturating_sub(first).saturating_add(1));
            }
            _ => {}
        }
    }

    /// Lets claims go, and wakes who waits for them.
    pub(crate) fn release(&self, meta: &mut Meta, clusters: impl Iterator<Item = u64>) {
        for cluster in clusters {
            meta.claims.remove(&cluster);
        }
        self.released.notify_all();
    }

    /// A barrier: what was written is durable, and what was freed before is given back.
    pub(crate) fn flush(&self, ranges: &Ranges) -> Result<()> {
        let ticket = self.ticket();
        if let Some(data) = &self.data {
            data.sync().map_err(Error::io("Cannot make the data of the image durable"))?;
        }
        self.file.sync().map_err(Error::io("Cannot make the image durable"))?;
        self.give_back(ticket, ranges)
    }

    /// What was freed last. A barrier that begins now covers it.
    pub(crate) fn ticket(&self) -> u64 {
        self.meta().freed().0
    }

    /// A barrier has passed that began when this was freed last.
    pub(crate) fn give_back(&self, ticket: u64, ranges: &Ranges) -> Result<()> {
        let mut meta = self.meta();
        if meta.freed().1 > 0 && !self.tables.is_corrupt() {
            match meta.space()?.settle(ticket, Some(ranges)) {
                // Everything of the guest's is durable; only space cannot be given back.
                Err(Error::Corrupt(_)) => self.tables.mark_corrupt(),
                other => other?,
            }
        }
        Ok(())
    }

    /// A barrier, if so much was freed that the list of it grows long.
    pub(crate) fn settle(&self, ranges: &Ranges) -> Result<()> {
        if self.meta().freed().1 > MOST_FREED { self.flush(ranges) } else { Ok(()) }
    }

    /// Gives the reserve back, takes the mark away, and is read-only from now on. Nothing may be in flight.
    pub(crate) fn close(&self) -> Result<()> {
        if !self.writable.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(data) = &self.data {
            data.sync().map_err(Error::io("Cannot make the data of the image durable"))?;
        }
        self.file.sync().map_err(Error::io("Cannot make the image durable"))?;
        if self.tables.is_corrupt() {
            return Ok(());
        }
        let mut meta = self.meta();
        let (ticket, _) = meta.freed();
        if let Some(mut space) = meta.space.take() {
            space.settle(ticket, None)?;
            space.close(&self.tables)?;
        }
        let len = self.data_file().len().map_err(Error::io("Cannot find the size of the image"))?;
        self.readable.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// Reads a compressed cluster.
    pub(crate) fn inflate(&self, word: u64, cluster: &mut [u8]) -> Result<()> {
        let (offset, len) = self.geometry().compressed(word);
        let mut packed = vec![0; usize::try_from(len).unwrap_or(0)];
        let read = self.file.read_at(&mut packed, offset).map_err(Error::io("Cannot read a compressed cluster"))?;
        inflate(self.header.compression, packed.get(..read).unwrap_or_default(), cluster)
    }

    /// Makes the disk larger. What is new reads as zeroes, or as what the backing file has there.
    pub(crate) fn grow(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let g = self.geometry();
        let mut meta = self.meta();
        meta.space()?.touch()?;
        let entries = g.l1_entries(size);
        let (offset, len) = self.tables.with_l1(|l1| (l1.offset, l1.entries.len() as u64));
        if entries.saturating_mul(8) > header::MAX_L1 {
            return Error::refused("The image's L1 table would be larger than 32 MiB");
        }
        if let Some(data) = &self.data {
            data.set_len(g.start(g.clusters(size))).map_err(Error::io("Cannot lengthen the data file of the image"))?;
        }
        if entries <= len {
            meta.space()?.write_shape(size, (offset, len))?;
        } else {
            let clusters = g.clusters(entries.saturating_mul(8));
            let first = meta.space()?.take_run(clusters, &self.tables)?;
            let mut all = self.tables.with_l1(|l1| l1.entries.clone());
            all.resize(usize::try_from(entries).unwrap_or(usize::MAX), 0);
            let bytes: Vec<u8> = all.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.file.write_at(&bytes, g.start(first)).map_err(Error::io("Cannot write the L1 table of the image"))?;
            self.file.sync().map_err(Error::io("Cannot make the L1 table of the image durable"))?;
            meta.space()?.write_shape(size, (g.start(first), entries))?;
            self.tables.set_l1(L1 { offset: g.start(first), entries: all });
            for cluster in first..first.saturating_add(clusters) {
                self.tables.add_metadata(cluster);
            }
            let (old, count) = (g.cluster(offset), g.clusters(len.saturating_mul(8)));
            (old..old.saturating_add(count)).for_each(|cluster| self.tables.remove_metadata(cluster));
            if count > 0 {
                meta.free(None, old, count);
            }
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

/// Before an image is written to: what a crash left is repaired, and its files are as long as they have to be.
fn prepare(file: &Arc<dyn Storage>, data: Option<&dyn Storage>, header: &mut Header) -> Result<()> {
    if header.autoclear & BITMAPS != 0 {
        // They would have to be kept up to date with each write.
        return Error::refused(
            "It has persistent bitmaps, which would miss what is written here; remove them with `qemu-img bitmap --remove`",
        );
    }
    if file.fixed() {
        return Error::refused("It is on a block device, where it cannot grow; only files can be written to");
    }
    let g = header.geometry;
    let longer = |file: &dyn Storage, to: u64| match file.len() {
        Ok(len) if len < to => file.set_len(to),
        other => other.map(drop),
    };
    let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
    longer(&**file, g.start(g.clusters(len))).map_err(Error::io("Cannot lengthen the image"))?;
    if let Some(data) = data {
        longer(data, g.start(g.clusters(header.size))).map_err(Error::io("Cannot lengthen the data file of the image"))?;
    }
    mark::clear_autoclear(&**file, header, RAW_EXTERNAL)?;
    // What is too long to be checked keeps its leaks.
    if mark::is_unclean(header) && check::is_possible(g.clusters(len)) {
        let report = check::check(file, true)?;
        if let Some(error) = report.errors.first() {
            return Error::refused(format!("It was not closed, and cannot be repaired by itself: {error}"));
        }
    }
    Ok(())
}

/// The clusters that hold metadata other than L2 tables, and whether none is said to hold two things.
fn metadata(header: &Header, refs: Option<&Refcounts>, file: &dyn Storage) -> Result<(BTreeSet<u64>, bool)> {
    let g = &header.geometry;
    let mut all = BTreeSet::from([0]);
    let mut add = |offset: u64, len: u64| {
        let first = g.cluster(offset);
        (first..first.saturating_add(g.clusters(len))).fold(true, |fits, cluster| all.insert(cluster) & fits)
    };
    let mut sound = add(header.l1_offset, header.l1_size.saturating_mul(8));
    if header.snapshots > 0 {
        let (snapshots, bytes) = check::snapshots(header, file)?;
        sound &= add(header.snapshots_offset, bytes);
        for snapshot in snapshots {
            // One overlap is enough to know; a hostile image has as many as it likes.
            sound = sound && add(snapshot.l1_offset, snapshot.l1_size.saturating_mul(8));
        }
    }
    // What is only read needs no refcounts, and a long chain should not keep them.
    if let Some(refs) = refs {
        sound &= refs.note(header.table_clusters, &mut all);
    }
    Ok((all, sound))
}

fn copy(file: &dyn Storage, from: u64, to: u64, len: u64) -> Result<()> {
    let mut bytes = vec![0; COPY.min(usize::try_from(len).unwrap_or(COPY))];
    let mut done = 0;
    while done < len {
        file.read_padded(&mut bytes, from.saturating_add(done)).map_err(Error::io("Cannot read an L2 table of the image"))?;
        file.write_at(&bytes, to.saturating_add(done)).map_err(Error::io("Cannot write an L2 table of the image"))?;
        done = done.saturating_add(bytes.len() as u64);
    }
    Ok(())
}
