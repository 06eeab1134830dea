//! Compares what is counted with what is used.
//!
//! # Theory of operation
//!
//! One walk over all tables counts who points at each cluster: one bit for each cluster of the file, and one byte where some have
//! more than one user (internal snapshots, compressed clusters). A second walk compares that with the refcounts. Counted and not used
//! is a leak, which is harmless, and is what a crash leaves. Used and not counted, or used for two things, is corruption: somebody may
//! overwrite it one day.
//!
//! Memory: 2 MiB for a file of 1 TiB at 64 KiB clusters, and as far as clusters are shared up to 16 MiB more; the tables themselves
//! go by in pages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::qcow2::geometry::{COPIED, Entry, Geometry, Kind, OFFSET, SLICE, SLICE_BYTES};
use crate::qcow2::header::{BITMAPS, CORRUPT, DIRTY, Header, MAX_L1};
use crate::qcow2::refcounts::Refcounts;
use crate::storage::Storage;

/// Most sentences of one report. More would say nothing new, and a hostile image has as many as it likes.
const MOST_ERRORS: usize = 32;

/// Most bytes of a snapshot table: 65,536 snapshots with ordinary names.
const MOST_SNAPSHOT_BYTES: u64 = 16 << 20;

/// Most clusters of a file that can be checked: 16 TiB at 64 KiB, which take 32 MiB, and 256 MiB if all of them are shared.
const MOST_CLUSTERS: u64 = 1 << 28;

/// Whether a file of so many clusters can be checked. A longer one may be no more than a large number.
pub(crate) fn is_possible(clusters: u64) -> bool {
    clusters <= MOST_CLUSTERS
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters of the file.
    pub clusters: u64,
    /// Guest clusters that have a place, or are compressed.
    pub allocated: u64,
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// How many of them were repaired.
    pub repaired: u64,
    /// What is wrong beyond that.
    pub corruptions: u64,
    /// The first of these, as sentences.
    pub errors: Vec<String>,
}

impl Report {
    fn error(&mut self, sentence: String) {
        self.corruptions = self.corruptions.saturating_add(1);
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(sentence);
        }
    }

    /// Whether nothing is left to be done.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == self.repaired
    }
}

/// An internal snapshot, as far as its tables go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u64,
}

/// The internal snapshots, and how many bytes their table has.
pub(crate) fn snapshots(header: &Header, file: &dyn Storage) -> Result<(Vec<Snapshot>, u64)> {
    let (mut all, mut at) = (Vec::new(), 0_u64);
    let end = file.len().map_err(Error::io("Cannot find the size of the image"))?;
    for number in 0..header.snapshots {
        let mut bytes = [0; 40];
        let read = file.read_exact(&mut bytes, header.snapshots_offset.saturating_add(at));
        read.map_err(Error::io("Cannot read the snapshot table of the image"))?;
        let [o @ .., _, _, _, _, _, _, _, _] = bytes.first_chunk::<16>().copied().unwrap_or_default();
        let l1_offset = u64::from_be_bytes(o);
        let field = |at: usize| {
            let word = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>).copied().unwrap_or_default();
            u64::from(u32::from_be_bytes(word))
        };
        let (l1_size, names, extra) = (field(8), field(12), field(36));
        let len = 40_u64.saturating_add(extra).saturating_add(names >> 16).saturating_add(names & 0xffff).next_multiple_of(8);
        at = at.saturating_add(len);
        let bytes = l1_size.saturating_mul(8);
        if bytes > MAX_L1
            || l1_offset.saturating_add(bytes) > end
            || at > MOST_SNAPSHOT_BYTES
            || !header.geometry.is_aligned(l1_offset)
        {
            return Error::corrupt(format!("the snapshot table says impossible things of snapshot {number}"));
        }
        all.push(Snapshot { l1_offset, l1_size });
    }
    Ok((all, at))
}

/// How often each cluster is used.
struct Uses {
    once: Vec<u64>,
    /// Uses beyond the first, once there are any. Only pages that are written to are in memory.
    more: Vec<u8>,
    /// Those that do not fit there.
    many: BTreeMap<u64, u64>,
    clusters: u64,
}

impl Uses {
    fn new(clusters: u64) -> Uses {
        let words = usize::try_from(clusters.div_ceil(64)).unwrap_or(usize::MAX);
        Uses { once: vec![0; words], more: Vec::new(), many: BTreeMap::new(), clusters }
    }

    /// False if the cluster is beyond the end.
    fn add(&mut self, cluster: u64) -> bool {
        let (word, bit) = (usize::try_from(cluster >> 6).unwrap_or(usize::MAX), cluster & 63);
        let mask = 1_u64.checked_shl(u32::try_from(bit).unwrap_or(0)).unwrap_or(0);
        match self.once.get_mut(word).filter(|_| cluster < self.clusters) {
            Some(word) if *word & mask == 0 => *word |= mask,
            Some(_) => self.add_more(cluster),
            None => return false,
        }
        true
    }

    fn add_more(&mut self, cluster: u64) {
        if self.more.is_empty() {
            self.more = vec![0; usize::try_from(self.clusters).unwrap_or(0)];
        }
        match usize::try_from(cluster).ok().and_then(|cluster| self.more.get_mut(cluster)) {
            Some(more) if *more < u8::MAX => *more = more.saturating_add(1),
            _ => {
                let many = self.many.entry(cluster).or_insert(0);
                *many = many.saturating_add(1);
            }
        }
    }

    fn get(&self, cluster: u64) -> u64 {
        let (word, bit) = (usize::try_from(cluster >> 6).unwrap_or(usize::MAX), u32::try_from(cluster & 63).unwrap_or(0));
        match self.once.get(word).is_some_and(|word| word.checked_shr(bit).unwrap_or(0) & 1 != 0) {
            true => {
                let more = usize::try_from(cluster).ok().and_then(|cluster| self.more.get(cluster)).copied().unwrap_or(0);
                let many = if more == u8::MAX { self.many.get(&cluster).copied().unwrap_or(0) } else { 0 };
                u64::from(more).saturating_add(many).saturating_add(1)
            }
            false => 0,
        }
    }
}

struct Check<'a> {
    file: &'a dyn Storage,
    header: &'a Header,
    geometry: Geometry,
    refs: Refcounts,
    uses: Uses,
    report: Report,
}

/// Checks an image that nobody uses meanwhile, and gives leaked clusters back if `repair` is set. An image that is marked dirty has
/// its refcounts set right then, too.
///
/// # Errors
/// When it is no qcow2 image, or cannot be read. What is wrong *in* it is in the report.
pub fn check(file: &Arc<dyn Storage>, repair: bool) -> Result<Report> {
    let header = Header::read(&**file)?;
    let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
    let geometry = header.geometry;
    let refs = Refcounts::open(Arc::clone(file), &header)?;
    let clusters = geometry.clusters(len);
    if !is_possible(clusters) {
        return Error::refused(format!("It has {clusters} clusters; at most {MOST_CLUSTERS} can be checked"));
    }
    let report = Report { clusters, ..Report::default() };
    let mut check = Check { file: &**file, header: &header, geometry, refs, uses: Uses::new(clusters), report };
    check.count()?;
    check.compare(repair)?;
    check.finish(repair)?;
    Ok(check.report)
}

impl Check<'_> {
    fn count(&mut self) -> Result<()> {
        let header = self.header;
        let table = self.geometry.start(header.table_clusters);
        self.add(0, 1, "the header");
        self.add(header.table_offset, table, "the refcount table");
        for block in self.refs.table.clone().into_iter().filter(|block| *block != 0) {
            self.add(block, 1, "a refcount block");
        }
        self.add(header.l1_offset, header.l1_size.saturating_mul(8), "the L1 table");
        self.walk(header.l1_offset, header.l1_size, true)?;
        let snapshots = snapshots(header, self.file);
        let (snapshots, bytes) = match snapshots {
            Err(Error::Corrupt(why)) => {
                self.report.error(format!("Of the internal snapshots: {why}"));
                (Vec::new(), 0)
            }
            other => other?,
        };
        self.add(header.snapshots_offset, bytes, "the snapshot table");
        for snapshot in snapshots {
            self.add(snapshot.l1_offset, snapshot.l1_size.saturating_mul(8), "the L1 table of a snapshot");
            if self.uses.get(self.geometry.cluster(snapshot.l1_offset)) > 1 {
                // To walk one table for each of 65,536 snapshots would take for ever.
                self.report.error(format!("The L1 table of a snapshot at {:#x} is something else, too", snapshot.l1_offset));
                continue;
            }
            self.walk(snapshot.l1_offset, snapshot.l1_size, false)?;
        }
        Ok(())
    }

    /// Counts a use of each cluster that a range touches.
    fn add(&mut self, offset: u64, len: u64, what: &str) {
        if len == 0 {
            return;
        }
        let (first, last) = (self.geometry.cluster(offset), self.geometry.cluster(offset.saturating_add(len).saturating_sub(1)));
        for cluster in first..=last {
            if !self.uses.add(cluster) {
                self.report.error(format!("{what} at {offset:#x} is beyond the end of the file"));
                return;
            }
        }
    }

    fn walk(&mut self, offset: u64, entries: u64, active: bool) -> Result<()> {
        let (file, geometry) = (self.file, self.geometry);
        let mut seen = BTreeSet::new();
        words(file, offset, entries, |index, entry| {
            if entry == 0 {
                return Ok(());
            }
            let table = entry & OFFSET;
            let cluster = geometry.cluster(table);
            if entry & !(OFFSET | COPIED) != 0 || table == 0 || !geometry.is_aligned(table) || cluster >= self.uses.clusters {
                self.report.error(format!("L1 entry {index} is {entry:#x}, where no table can be"));
                return Ok(());
            }
            self.copied(active, entry, cluster, || format!("L1 entry {index}"));
            self.add(table, 1, "an L2 table");
            if !seen.insert(cluster) {
                self.report.error(format!("L1 entry {index} has a table that another entry has, too"));
                return Ok(());
            }
            self.table(table, index, active)
        })
    }

    fn table(&mut self, offset: u64, index: u64, active: bool) -> Result<()> {
        let g = self.geometry;
        let first = index.checked_shl(g.l2_bits()).unwrap_or(0);
        let mut before = None;
        words(self.file, offset, g.cluster_size() >> 3, |at, word| {
            // With extended entries, two words are one.
            let (number, entry) = match (g.extended, before.take()) {
                (false, _) => (at, Entry { word, bitmap: 0 }),
                (true, None) => {
                    before = Some(word);
                    return Ok(());
                }
                (true, Some(before)) => (at >> 1, Entry { word: before, bitmap: word }),
            };
            if entry != Entry::NONE {
                self.entry(entry, first.saturating_add(number), active);
            }
            Ok(())
        })
    }

    fn entry(&mut self, entry: Entry, guest: u64, active: bool) {
        let g = self.geometry;
        match entry.kind(&g) {
            Kind::Bad => {
                self.report.error(format!("The L2 entry of guest cluster {guest} is {:#x}, which is impossible", entry.word));
            }
            Kind::Unallocated | Kind::Zero(None) => {}
            Kind::Compressed => {
                let (offset, len) = g.compressed(entry.word);
                // The last sector may be beyond the end: only so much was written.
                let end = g.start(self.uses.clusters).saturating_sub(offset);
                self.add(offset, len.min(end).max(1), "a compressed cluster");
                self.report.allocated = self.report.allocated.saturating_add(u64::from(active));
            }
            Kind::Data(host) | Kind::Zero(Some(host)) if g.external => {
                if host != g.start(guest) {
                    self.report.error(format!("Guest cluster {guest} is at {host:#x} of the data file, not at its own place"));
                }
                self.report.allocated = self.report.allocated.saturating_add(u64::from(active));
            }
            Kind::Data(host) | Kind::Zero(Some(host)) => {
                self.copied(active, entry.word, g.cluster(host), || format!("The L2 entry of guest cluster {guest}"));
                self.add(host, 1, "a cluster of data");
                self.report.allocated = self.report.allocated.saturating_add(u64::from(active));
            }
        }
    }

    /// Who may write in place has to be the only user, and the other way round.
    fn copied(&mut self, active: bool, entry: u64, cluster: u64, whose: impl Fn() -> String) {
        if !active || self.header.incompatible & DIRTY != 0 {
            return;
        }
        let (copied, Ok(count)) = (entry & COPIED != 0, self.refs.get(cluster)) else { return };
        if copied != (count == 1) {
            let says = if copied { "its cluster is its own" } else { "its cluster is shared" };
            self.report.error(format!("{} says that {says}, but the refcount is {count}", whose()));
        }
    }

    fn compare(&mut self, repair: bool) -> Result<()> {
        let entries = 1_u64.checked_shl(self.geometry.block_bits()).unwrap_or(1);
        let blocks = self.uses.clusters.div_ceil(entries.max(1)).max(self.refs.table.len() as u64);
        for block in 0..blocks {
            let (first, end) = (block.saturating_mul(entries), block.saturating_add(1).saturating_mul(entries));
            let place = usize::try_from(block).ok().and_then(|block| self.refs.table.get(block)).copied().unwrap_or(0);
            if place != 0 && self.uses.get(self.geometry.cluster(place)) > 1 {
                self.report.error(format!("Refcount block {block} is something else, too"));
                continue;
            }
            // Without a block there is nothing to compare beyond the end of the file.
            let end = if self.refs.covers(first) { end } else { end.min(self.uses.clusters) };
            for cluster in first..end {
                let used = self.uses.get(cluster);
                match self.refs.get(cluster) {
                    Ok(count) if count == used => {}
                    Ok(count) => self.differs(cluster, count, used, repair)?,
                    Err(Error::Corrupt(why)) => {
                        self.report.error(why);
                        break;
                    }
                    Err(other) => return Err(other),
                }
            }
        }
        Ok(())
    }

    fn differs(&mut self, cluster: u64, count: u64, used: u64, repair: bool) -> Result<()> {
        let dirty = self.header.incompatible & DIRTY != 0;
        // Bitmaps in force use clusters that are not looked at here.
        let bitmaps = self.header.autoclear & BITMAPS != 0;
        if count > used && bitmaps {
            return Ok(());
        }
        let fix = repair && (count > used || (dirty && self.refs.covers(cluster) && used <= self.geometry.max_refcount()));
        if count > used || fix {
            self.report.leaks = self.report.leaks.saturating_add(1);
        } else {
            self.report.error(format!("Cluster {cluster} is used {used} times, but its refcount is {count}"));
        }
        if fix {
            self.refs.set(cluster, 1, used)?;
            self.report.repaired = self.report.repaired.saturating_add(1);
        }
        Ok(())
    }

    fn finish(&mut self, repair: bool) -> Result<()> {
        if !repair || (self.report.repaired == 0 && self.header.incompatible & DIRTY == 0) {
            return Ok(());
        }
        self.file.sync().map_err(Error::io("Cannot make the repair durable"))?;
        let bits = self.header.incompatible;
        if self.report.corruptions == 0 && bits & DIRTY != 0 && bits & CORRUPT == 0 {
            let bytes = (bits & !DIRTY).to_be_bytes();
            self.file.write_at(&bytes, 72).map_err(Error::io("Cannot write the header of the image"))?;
            self.file.sync().map_err(Error::io("Cannot make the header of the image durable"))?;
        }
        Ok(())
    }
}

/// Looks at big-endian words, a page at a time.
fn words(file: &dyn Storage, offset: u64, count: u64, mut each: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let mut page = [0; SLICE_BYTES];
    let mut index = 0_u64;
    while index < count {
        let at = offset.saturating_add(index.saturating_mul(8));
        file.read_padded(&mut page, at).map_err(Error::io("Cannot read a table of the image"))?;
        let most = count.saturating_sub(index).min(SLICE >> 3);
        for (word, step) in page.as_chunks::<8>().0.iter().zip(0..most) {
            each(index.saturating_add(step), u64::from_be_bytes(*word))?;
        }
        index = index.saturating_add(most);
    }
    Ok(())
}
