//! L1 and L2 tables: which host cluster a guest cluster is in.
//!
//! # Theory of operation
//!
//! L2 tables are kept in slices of 4 KiB, as arrays of atomics in the host's byte order. A slice in the cache *is* the truth, for
//! everybody: whoever changes an entry writes it to the file first and stores it in the one slice then. So a queue may keep
//! references to slices and read them without a lock; a change by another queue is seen at once.
//!
//! When a slice leaves the cache, its `stale` flag is set, before anybody can load it anew. A reader looks at the flag *after* it
//! has read the entry: if it is not set, the entry was the truth at that moment. (The design asked for one generation for the
//! whole image. With a flag in each slice, an eviction costs only those who held that slice.)
//!
//! With extended entries, an entry is two words. A sequence number, odd while they change, keeps a reader from seeing one old and
//! one new word.
//!
//! Each entry is checked once, when its slice is loaded: an entry that is misaligned, beyond the end of the file, or inside of
//! metadata is replaced by [`BAD`] in memory, and the image is not written to any more.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::qcow2::geometry::{BAD, COPIED, Entry, Geometry, Kind, OFFSET, SLICE, SLICE_BYTES};
use crate::storage::Storage;

/// How often a slice is read without holding up others before it is read while they wait.
const TRIES: u32 = 3;

/// A piece of an L2 table.
#[derive(Debug)]
pub(crate) struct Slice {
    words: Box<[AtomicU64]>,
    sequence: AtomicU32,
    stale: AtomicBool,
    used: AtomicBool,
}

/// The tables of one image.
#[derive(Debug)]
pub(crate) struct Tables {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    l1: RwLock<L1>,
    /// Clusters of the file that hold metadata, for as far as the active image goes.
    metadata: RwLock<BTreeSet<u64>>,
    cache: Mutex<Cache>,
    /// The end of the file in bytes, rounded up to clusters. Mappings beyond it are impossible.
    end: AtomicU64,
    corrupt: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct L1 {
    pub(crate) offset: u64,
    pub(crate) entries: Vec<u64>,
}

#[derive(Debug)]
struct Cache {
    slices: BTreeMap<u64, Arc<Slice>>,
    order: VecDeque<u64>,
    room: usize,
    epoch: u64,
}

impl Slice {
    /// An entry, and whether this slice still counts.
    pub(crate) fn entry(&self, index: usize, geometry: &Geometry) -> Option<Entry> {
        let load = |at: usize| self.words.get(at).map_or(BAD, |word| word.load(Ordering::Acquire));
        let entry = if geometry.extended {
            let at = index.saturating_mul(2);
            loop {
                let before = self.sequence.load(Ordering::Acquire);
                let entry = Entry { word: load(at), bitmap: load(at.saturating_add(1)) };
                fence(Ordering::Acquire);
                if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                    break entry;
                }
                std::hint::spin_loop();
            }
        } else {
            Entry { word: load(index), bitmap: 0 }
        };
        (!self.stale.load(Ordering::Acquire)).then_some(entry)
    }

    /// Only while the cache is locked.
    fn store(&self, index: usize, entry: Entry, geometry: &Geometry) {
        let set = |at: usize, value: u64| {
            if let Some(word) = self.words.get(at) {
                word.store(value, Ordering::Release);
            }
        };
        if geometry.extended {
            let at = index.saturating_mul(2);
            self.sequence.fetch_add(1, Ordering::AcqRel);
            set(at, entry.word);
            set(at.saturating_add(1), entry.bitmap);
            self.sequence.fetch_add(1, Ordering::AcqRel);
        } else {
            set(index, entry.word);
        }
    }
}

impl Cache {
    fn insert(&mut self, number: u64, slice: &Arc<Slice>) {
        // A slice that a queue still holds would stay in memory anyway, so others go first.
        let mut tries = self.order.len().saturating_mul(2);
        while self.slices.len() >= self.room.max(1) {
            let Some(oldest) = self.order.pop_front() else { break };
            let keep =
                self.slices.get(&oldest).is_some_and(|old| old.used.swap(false, Ordering::Relaxed) || Arc::strong_count(old) > 1);
            if keep && tries > 0 {
                tries = tries.saturating_sub(1);
                self.order.push_back(oldest);
                continue;
            }
            if let Some(old) = self.slices.remove(&oldest) {
                old.stale.store(true, Ordering::Release);
            }
        }
        self.order.push_back(number);
        self.slices.insert(number, Arc::clone(slice));
    }
}

impl Tables {
    /// Reads the L1 table. `metadata` are the clusters that other structures are in.
    pub(crate) fn open(
        file: Arc<dyn Storage>,
        geometry: Geometry,
        (offset, entries): (u64, u64),
        metadata: BTreeSet<u64>,
        room: usize,
    ) -> Result<Tables> {
        let entries = read_words(&*file, offset, entries).map_err(Error::io("Cannot read the L1 table of the image"))?;
        let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
        let tables = Tables {
            geometry,
            l1: RwLock::new(L1 { offset, entries: Vec::new() }),
            metadata: RwLock::new(metadata),
            cache: Mutex::new(Cache { slices: BTreeMap::new(), order: VecDeque::new(), room, epoch: 0 }),
            end: AtomicU64::new(geometry.start(geometry.clusters(len))),
            corrupt: AtomicBool::new(false),
            file,
        };
        for entry in entries.iter().filter(|entry| **entry != 0) {
            // Two entries with one table, or a table inside of other metadata: writing to one would change the other.
            let fits = tables.l2_is_sound(*entry) && tables.add_metadata(geometry.cluster(entry & OFFSET));
            tables.corrupt.fetch_or(!fits, Ordering::Relaxed);
        }
        tables.l1.write().unwrap_or_else(PoisonError::into_inner).entries = entries;
        Ok(tables)
    }

    pub(crate) fn with_l1<T>(&self, look: impl FnOnce(&L1) -> T) -> T {
        look(&self.l1.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_l1(&self, l1: L1) {
        *self.l1.write().unwrap_or_else(PoisonError::into_inner) = l1;
    }

    /// Whether something impossible was found. It stays so until the image is opened again.
    pub(crate) fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::Relaxed)
    }

    pub(crate) fn mark_corrupt(&self) {
        self.corrupt.store(true, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    pub(crate) fn set_end(&self, bytes: u64) {
        self.end.store(bytes, Ordering::Relaxed);
    }

    /// Notes that a cluster holds metadata. False if it did before.
    pub(crate) fn add_metadata(&self, cluster: u64) -> bool {
        self.metadata.write().unwrap_or_else(PoisonError::into_inner).insert(cluster)
    }

    pub(crate) fn remove_metadata(&self, cluster: u64) {
        self.metadata.write().unwrap_or_else(PoisonError::into_inner).remove(&cluster);
    }

    pub(crate) fn is_metadata(&self, cluster: u64) -> bool {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner).contains(&cluster)
    }

    fn l2_is_sound(&self, entry: u64) -> bool {
        let offset = entry & OFFSET;
        entry & !(OFFSET | COPIED) == 0 && offset != 0 && self.geometry.is_aligned(offset) && offset < self.end()
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slice, counted over the whole disk.
    pub(crate) fn slice(&self, number: u64) -> Result<Arc<Slice>> {
        for _ in 0..TRIES {
            let epoch = {
                let cache = self.cache();
                if let Some(slice) = cache.slices.get(&number) {
                    slice.used.store(true, Ordering::Relaxed);
                    return Ok(Arc::clone(slice));
                }
                cache.epoch
            };
            let loaded = self.load(number)?;
            let mut cache = self.cache();
            if let Some(slice) = cache.slices.get(&number) {
                return Ok(Arc::clone(slice));
            }
            if cache.epoch == epoch {
                cache.insert(number, &loaded);
                return Ok(loaded);
            }
            // Something was changed in the meantime, perhaps what was just read.
        }
        self.slice_in(&mut self.cache(), number)
    }

    fn slice_in(&self, cache: &mut Cache, number: u64) -> Result<Arc<Slice>> {
        if let Some(slice) = cache.slices.get(&number) {
            return Ok(Arc::clone(slice));
        }
        let loaded = self.load(number)?;
        cache.insert(number, &loaded);
        Ok(loaded)
    }

    /// Where a slice is in the file, if its table is there at all.
    fn place(&self, number: u64) -> Result<Option<(u64, bool)>> {
        let (index, within) = self.geometry.l1_of_slice(number);
        let entry = self.with_l1(|l1| l1.entries.get(index).copied()).ok_or(Error::Range)?;
        if entry == 0 {
            return Ok(None);
        }
        if !self.l2_is_sound(entry) {
            self.mark_corrupt();
            return Error::corrupt(format!("L1 entry {index} is {entry:#x}, where no table can be"));
        }
        Ok(Some(((entry & OFFSET).saturating_add(within), entry & COPIED != 0)))
    }

    fn load(&self, number: u64) -> Result<Arc<Slice>> {
        let mut bytes = [0; SLICE_BYTES];
        let size = usize::try_from(self.geometry.slice_size()).unwrap_or(0);
        let bytes = bytes.get_mut(..size).unwrap_or_default();
        if let Some((offset, _)) = self.place(number)? {
            self.file.read_padded(bytes, offset).map_err(Error::io("Cannot read an L2 table of the image"))?;
        }
        let mut words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_be_bytes(*chunk)).collect();
        let first = number.checked_shl(self.geometry.slice_bits()).unwrap_or(0);
        for (at, entry) in words.chunks_mut(if self.geometry.extended { 2 } else { 1 }).enumerate() {
            let found = Entry { word: entry.first().copied().unwrap_or(0), bitmap: entry.get(1).copied().unwrap_or(0) };
            if found != Entry::NONE && !self.is_sound(found, first.saturating_add(at as u64)) {
                self.mark_corrupt();
                entry.iter_mut().zip([Entry::BAD.word, 0]).for_each(|(word, bad)| *word = bad);
            }
        }
        let words = words.into_iter().map(AtomicU64::new).collect();
        Ok(Arc::new(Slice { words, sequence: AtomicU32::new(0), stale: AtomicBool::new(false), used: AtomicBool::new(true) }))
    }

    /// Whether an entry of a file can be true.
    fn is_sound(&self, entry: Entry, guest: u64) -> bool {
        let g = &self.geometry;
        let host = match entry.kind(g) {
            Kind::Bad => return false,
            Kind::Unallocated | Kind::Zero(None) => return true,
            Kind::Zero(Some(host)) | Kind::Data(host) => host,
            Kind::Compressed => return g.compressed(entry.word).0 < self.end(),
        };
        if g.external {
            return host == g.start(guest);
        }
        host < self.end() && !self.is_metadata(g.cluster(host))
    }

    /// Changes entries, given in order of their guest clusters: in the file first, then for all to see. Their tables have to be
    /// there, and to be ours alone.
    pub(crate) fn update(&self, changes: &[(u64, Entry)]) -> Result<()> {
        let g = &self.geometry;
        let mut cache = self.cache();
        cache.epoch = cache.epoch.wrapping_add(1);
        let same = |a: &(u64, Entry), b: &(u64, Entry)| b.0 == a.0.saturating_add(1) && g.slice_of(a.0).0 == g.slice_of(b.0).0;
        for run in changes.chunk_by(same) {
            let Some((first, _)) = run.first() else { continue };
            let (number, index) = g.slice_of(*first);
            let slice = self.slice_in(&mut cache, number)?;
            let Some((offset, true)) = self.place(number)? else {
                return Error::corrupt("an L2 table that is shared would have been changed");
            };
            let mut bytes = Vec::with_capacity(run.len().saturating_mul(16));
            for (_, entry) in run {
                bytes.extend(entry.word.to_be_bytes());
                if g.extended {
                    bytes.extend(entry.bitmap.to_be_bytes());
                }
            }
            let at = offset.saturating_add((index as u64).saturating_mul(g.entry_size()));
            self.file.write_at(&bytes, at).map_err(Error::io("Cannot write an L2 table of the image"))?;
            for (step, (_, entry)) in run.iter().enumerate() {
                slice.store(index.saturating_add(step), *entry, g);
            }
        }
        Ok(())
    }

    /// Points an L1 entry at a table that is ours alone. Its content has to be what the old table's was.
    pub(crate) fn link(&self, index: usize, table: u64) -> Result<()> {
        let entry = table | COPIED;
        let mut cache = self.cache();
        // Who is reading the old table just now may soon read what is there next.
        cache.epoch = cache.epoch.wrapping_add(1);
        let offset = self.with_l1(|l1| l1.offset).saturating_add((index as u64).saturating_mul(8));
        self.file.write_at(&entry.to_be_bytes(), offset).map_err(Error::io("Cannot write the L1 table of the image"))?;
        if let Some(word) = self.l1.write().unwrap_or_else(PoisonError::into_inner).entries.get_mut(index) {
            *word = entry;
        }
        self.add_metadata(self.geometry.cluster(table));
        Ok(())
    }
}

/// Reads so many big-endian words.
pub(crate) fn read_words(file: &dyn Storage, offset: u64, count: u64) -> std::io::Result<Vec<u64>> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let mut words = Vec::with_capacity(count);
    let mut bytes = [0; SLICE_BYTES];
    let mut at = offset;
    while words.len() < count {
        file.read_padded(&mut bytes, at)?;
        let rest = count.saturating_sub(words.len());
        words.extend(bytes.as_chunks::<8>().0.iter().take(rest).map(|chunk| u64::from_be_bytes(*chunk)));
        at = at.saturating_add(SLICE);
    }
    Ok(words)
}
