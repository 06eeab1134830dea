//! Which clusters of the file are free, and which are about to be.
//!
//! # Theory of operation
//!
//! **Ahead of use.** Clusters are taken from a reserve. What is in the reserve has, durably, a refcount of one and zeroes as its
//! content. So whoever points at such a cluster needs no barrier: at whatever moment the power goes, the cluster is counted, and
//! it reads as the zeroes that were there before, or as what was written. A refill writes the refcounts of a whole run, punches
//! what is inside the file or lengthens it, and then waits once. A crash leaks at most the reserve.
//!
//! **Behind use.** A cluster that nothing points at any more may still be pointed at by what is durable. It waits in `freed` until
//! a barrier that began later has passed, and until nobody is at its guest range who may have looked it up before; then its
//! refcount goes down and its space is given back. It is used again only through a refill, whose barrier makes both durable first.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::qcow2::header::{Header, MAX_REFCOUNT_TABLE};
use crate::qcow2::mark;
use crate::qcow2::refcounts::Refcounts;
use crate::qcow2::tables::Tables;
use crate::range::Ranges;
use crate::storage::Storage;

/// Clusters of the first reserve. It doubles with each refill, so that a busy image waits rarely and an idle one leaks little.
const FIRST_RESERVE: u64 = 16;
/// Most clusters of a reserve.
const MOST_RESERVE: u64 = 1024;
/// Most bytes of a reserve: what a crash may leak.
const MOST_RESERVE_BYTES: u64 = 64 << 20;
/// Clusters whose refcounts are looked at in one refill: a full image is not searched all at once.
const SCAN: u64 = 64 << 10;
/// Runs in `freed` that make the next discard wait for a barrier, so that the list stays small.
pub(crate) const MOST_FREED: usize = 1024;

/// Clusters that are given back in one step, so that the list of them stays small.
const AT_ONCE: u64 = 1024;

/// Clusters that nothing in memory points at any more.
#[derive(Clone, Copy, Debug)]
struct Freed {
    /// The guest range they were for, where somebody may be reading them.
    guest: Option<(u64, u64)>,
    first: u64,
    count: u64,
    ticket: u64,
}

/// The free space of an image that is written to.
#[derive(Debug)]
pub(crate) struct Space {
    file: Arc<dyn Storage>,
    header: Header,
    pub(crate) refs: Refcounts,
    reserve: VecDeque<(u64, u64)>,
    step: u64,
    hint: u64,
    /// Clusters of the file.
    end: u64,
    freed: VecDeque<Freed>,
    tickets: u64,
    marked: bool,
    failed: bool,
}

impl Space {
    pub(crate) fn new(file: Arc<dyn Storage>, header: Header, refs: Refcounts, tables: &Tables) -> Space {
        let end = header.geometry.cluster(tables.end());
        let (reserve, freed) = (VecDeque::new(), VecDeque::new());
        Space { file, header, refs, reserve, step: FIRST_RESERVE, hint: 0, end, freed, tickets: 0, marked: false, failed: false }
    }

    /// Before the first change of metadata: the image is marked as in use, durably.
    pub(crate) fn touch(&mut self) -> Result<()> {
        if !self.marked {
            mark::set(&*self.file, &mut self.header, true)?;
            self.marked = true;
        }
        Ok(())
    }

    /// The image is as it should be, and says so.
    pub(crate) fn close(&mut self, tables: &Tables) -> Result<()> {
        if !self.marked || self.failed {
            return Ok(());
        }
        let all: Vec<_> = self.reserve.drain(..).collect();
        for (first, count) in all.into_iter().rev() {
            self.refs.set(first, count, 0)?;
            self.hint = self.hint.min(first);
            if first.saturating_add(count) == self.end {
                self.end = first;
            }
        }
        let bytes = self.header.geometry.start(self.end);
        if bytes < tables.end() {
            self.file.set_len(bytes).map_err(Error::io("Cannot shorten the image"))?;
            tables.set_end(bytes);
        }
        self.sync()?;
        mark::set(&*self.file, &mut self.header, false)?;
        self.marked = false;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.file.sync().map_err(Error::io("Cannot make the metadata of the image durable"))
    }

    /// Takes up to so many clusters that follow each other. They are counted and zero, durably.
    pub(crate) fn take(&mut self, most: u64, tables: &Tables) -> Result<(u64, u64)> {
        self.touch()?;
        self.recover(tables)?;
        loop {
            if let Some((first, count)) = self.reserve.pop_front() {
                let taken = count.min(most.max(1));
                if taken < count {
                    self.reserve.push_front((first.saturating_add(taken), count.saturating_sub(taken)));
                }
                return Ok((first, taken));
            }
            let filled = self.refill(tables);
            self.failed |= filled.is_err();
            filled?;
        }
    }

    /// After a refill that failed, perhaps because the disk was full: what is in the file is what counts.
    fn recover(&mut self, tables: &Tables) -> Result<()> {
        if !self.failed {
            return Ok(());
        }
        self.header = Header::read(&*self.file)?;
        self.refs = Refcounts::open(Arc::clone(&self.file), &self.header)?;
        let len = self.file.len().map_err(Error::io("Cannot find the size of the image"))?;
        self.end = self.header.geometry.clusters(len);
        tables.set_end(self.header.geometry.start(self.end));
        self.failed = false;
        Ok(())
    }

    fn refill(&mut self, tables: &Tables) -> Result<()> {
        let geometry = self.header.geometry;
        let most = MOST_RESERVE.min(geometry.cluster(MOST_RESERVE_BYTES)).max(1);
        let wanted = self.step.min(most);
        self.step = wanted.saturating_mul(2).min(most);
        let mut runs = self.find(wanted)?;
        let found: u64 = runs.iter().map(|(_, count)| *count).sum();
        for (first, count) in &runs {
            // It may be free for reasons of others, so its content may be anything.
            let (offset, bytes) = (geometry.start(*first), geometry.start(*count));
            self.file.punch(offset, bytes).map_err(Error::io("Cannot give space of the image back"))?;
        }
        if found < wanted {
            runs.push(self.lengthen(wanted.saturating_sub(found), tables)?);
        }
        let end = runs.iter().map(|(first, count)| first.saturating_add(*count)).max().unwrap_or(0);
        self.reach(end, tables)?;
        let (mut new, mut ready) = (Vec::new(), Vec::new());
        for (first, count) in runs {
            self.count_run((first, count), &mut new, &mut ready)?;
        }
        self.sync()?;
        self.link(&new, tables)?;
        self.reserve.extend(ready);
        Ok(())
    }

    /// Gives each cluster of a run a refcount of one, and puts what can be used into `ready`. Where there is no block for a part of
    /// it, the first cluster of that part becomes the block: it counts itself, so it may be linked before or after any other.
    fn count_run(&mut self, run: (u64, u64), new: &mut Vec<usize>, ready: &mut Vec<(u64, u64)>) -> Result<()> {
        let per_block = 1_u64.checked_shl(self.header.geometry.block_bits()).unwrap_or(1);
        let (mut first, end) = (run.0, run.0.saturating_add(run.1));
        while first < end {
            let stop = first.checked_div(per_block).unwrap_or(0).saturating_add(1).saturating_mul(per_block).min(end);
            let mut usable = first;
            if !self.refs.covers(first) {
                new.push(self.place_block(first, first));
                usable = first.saturating_add(1);
            }
            self.refs.set(first, stop.saturating_sub(first), 1)?;
            if usable < stop {
                ready.push((usable, stop.saturating_sub(usable)));
            }
            first = stop;
        }
        Ok(())
    }

    /// Points the table of the file at new blocks, which are durable, and waits until that is.
    fn link(&mut self, new: &[usize], tables: &Tables) -> Result<()> {
        if new.is_empty() {
            return Ok(());
        }
        self.refs.write_entries(new, tables)?;
        self.sync()
    }

    /// Free clusters inside the file.
    fn find(&mut self, wanted: u64) -> Result<Vec<(u64, u64)>> {
        let (mut runs, mut found) = (Vec::<(u64, u64)>::new(), 0_u64);
        let stop = self.end.min(self.hint.saturating_add(SCAN));
        while self.hint < stop && found < wanted {
            let cluster = self.hint;
            self.hint = cluster.saturating_add(1);
            if self.refs.get(cluster)? != 0 {
                continue;
            }
            found = found.saturating_add(1);
            match runs.last_mut() {
                Some((first, count)) if first.saturating_add(*count) == cluster => *count = count.saturating_add(1),
                _ => runs.push((cluster, 1)),
            }
        }
        Ok(runs)
    }

    /// Makes the file longer by so many clusters, past whatever claims to be beyond its end.
    fn lengthen(&mut self, count: u64, tables: &Tables) -> Result<(u64, u64)> {
        let mut first = self.end;
        let mut free = 0;
        let most = first.saturating_add(SCAN);
        while free < count {
            let cluster = first.saturating_add(free);
            if first > most {
                return Error::corrupt("its refcounts say that what is behind its end is in use");
            }
            if self.refs.covers(cluster) && self.refs.get(cluster)? != 0 {
                (first, free) = (cluster.saturating_add(1), 0);
            } else {
                free = free.saturating_add(1);
            }
        }
        self.end = first.saturating_add(count);
        let bytes = self.header.geometry.start(self.end);
        self.file.set_len(bytes).map_err(Error::io("Cannot lengthen the image"))?;
        tables.set_end(bytes);
        if self.hint >= first {
            self.hint = self.end;
        }
        Ok((first, count))
    }

    /// Makes a cluster the block that counts `counted`, in memory. Its number in the table.
    fn place_block(&mut self, counted: u64, cluster: u64) -> usize {
        let (block, offset) = (self.refs.block_of(counted), self.header.geometry.start(cluster));
        self.refs.forget(offset);
        if let Some(entry) = self.refs.table.get_mut(block) {
            *entry = offset;
        }
        block
    }

    /// Sees to it that the table is long enough for all clusters before `end`. No block may be half made.
    fn reach(&mut self, end: u64, tables: &Tables) -> Result<()> {
        let block = self.refs.block_of(end.saturating_sub(1));
        if block < self.refs.table.len() { Ok(()) } else { self.grow_table(block, tables) }
    }

    /// Makes blocks for a run of clusters, and for these blocks, at the end of the file. Nothing points at them yet, so their order
    /// does not matter: all of them are counted when this returns.
    fn cover(&mut self, first: u64, count: u64, new: &mut Vec<usize>, tables: &Tables) -> Result<()> {
        let last = self.refs.block_of(first.saturating_add(count.max(1)).saturating_sub(1));
        for block in self.refs.block_of(first)..=last {
            let entry = self.refs.table.get(block).copied();
            match entry {
                None => return Error::corrupt("its refcounts say that what is behind its end is in use"),
                Some(0) => {}
                Some(_) => continue,
            }
            let (cluster, _) = self.lengthen(1, tables)?;
            let counted = (block as u64).checked_shl(self.header.geometry.block_bits()).unwrap_or(u64::MAX);
            new.push(self.place_block(counted, cluster));
            if !self.refs.covers(cluster) {
                self.cover(cluster, 1, new, tables)?;
            }
            self.refs.set(cluster, 1, 1)?;
        }
        Ok(())
    }

    /// Moves the refcount table to where it can be at least twice as long. The header points at the new one when all of it, and
    /// the blocks that count it, are durable.
    fn grow_table(&mut self, block: usize, tables: &Tables) -> Result<()> {
        let geometry = self.header.geometry;
        let per_cluster = geometry.cluster_size() >> 3;
        let old = (geometry.cluster(self.refs.table_offset), geometry.clusters((self.refs.table.len() as u64).saturating_mul(8)));
        // Room for the blocks that count the table itself, and those of the next doubling.
        let entries = (block as u64).saturating_add(2).max((self.refs.table.len() as u64).saturating_mul(2));
        let clusters = entries.div_ceil(per_cluster.max(1)).saturating_add(1);
        if geometry.start(clusters) > MAX_REFCOUNT_TABLE.max(geometry.start(2)) {
            return Error::refused("The image's refcount table would be larger than 8 MiB");
        }
        let (first, count) = self.lengthen(clusters, tables)?;
        let entries = usize::try_from(clusters.saturating_mul(per_cluster)).unwrap_or(usize::MAX);
        self.refs.table.resize(entries, 0);
        self.refs.table_offset = geometry.start(first);
        let mut new = Vec::new();
        self.cover(first, count, &mut new, tables)?;
        self.refs.set(first, count, 1)?;
        let bytes: Vec<u8> = self.refs.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_at(&bytes, self.refs.table_offset).map_err(Error::io("Cannot write the refcount table of the image"))?;
        self.sync()?;
        let mut fields = self.refs.table_offset.to_be_bytes().to_vec();
        fields.extend(u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes());
        self.file.write_at(&fields, 48).map_err(Error::io("Cannot write the header of the image"))?;
        self.sync()?;
        let blocks = new.iter().filter_map(|block| self.refs.table.get(*block)).map(|entry| geometry.cluster(*entry));
        for cluster in (first..first.saturating_add(count)).chain(blocks) {
            tables.add_metadata(cluster);
        }
        for cluster in old.0..old.0.saturating_add(old.1) {
            tables.remove_metadata(cluster);
        }
        self.refs.change(old.0, old.1, |count| count.checked_sub(1))?;
        self.hint = self.hint.min(old.0);
        Ok(())
    }

    /// A run of clusters that follow each other, counted and zero, durably. For tables.
    pub(crate) fn take_run(&mut self, count: u64, tables: &Tables) -> Result<u64> {
        self.touch()?;
        self.recover(tables)?;
        let run = self.new_run(count, tables);
        self.failed |= run.is_err();
        run
    }

    fn new_run(&mut self, count: u64, tables: &Tables) -> Result<u64> {
        let (first, _) = self.lengthen(count, tables)?;
        self.reach(first.saturating_add(count), tables)?;
        let mut new = Vec::new();
        for block in self.refs.block_of(first)..=self.refs.block_of(first.saturating_add(count).saturating_sub(1)) {
            if self.refs.table.get(block).is_some_and(|entry| *entry == 0) {
                // From the reserve: it is counted already, durably, wherever it is.
                let counted = (block as u64).checked_shl(self.header.geometry.block_bits()).unwrap_or(u64::MAX);
                let (cluster, _) = self.take(1, tables)?;
                if self.refs.covers(counted) {
                    // A refill came to the same place.
                    self.reserve.push_front((cluster, 1));
                } else {
                    new.push(self.place_block(counted, cluster));
                }
            }
        }
        self.refs.set(first, count, 1)?;
        self.sync()?;
        self.link(&new, tables)?;
        Ok(first)
    }

    /// Nothing points at these clusters any more, as of now. `guest`: for which range they may still be read.
    pub(crate) fn free(&mut self, guest: Option<(u64, u64)>, first: u64, count: u64) {
        self.tickets = self.tickets.saturating_add(1);
        // What may still be read is kept apart, cluster by cluster: one busy reader should not keep all the rest.
        if let (None, Some(last)) = (guest, self.freed.back_mut())
            && last.guest.is_none()
            && last.first.saturating_add(last.count) == first
        {
            (last.count, last.ticket) = (last.count.saturating_add(count), self.tickets);
            return;
        }
        self.freed.push_back(Freed { guest, first, count, ticket: self.tickets });
    }

    /// Ticket of what was freed last.
    pub(crate) fn ticket(&self) -> u64 {
        self.tickets
    }

    pub(crate) fn freed(&self) -> usize {
        self.freed.len()
    }

    /// A barrier has passed that began when `ticket` was the last one: what was freed until then is given back.
    pub(crate) fn settle(&mut self, ticket: u64, ranges: Option<&Ranges>) -> Result<()> {
        for _ in 0..self.freed.len() {
            let Some(freed) = self.freed.pop_front() else { break };
            let quiet = freed.guest.is_none_or(|(offset, len)| ranges.is_none_or(|ranges| ranges.is_quiet(offset, len)));
            if freed.ticket > ticket || !quiet {
                self.freed.push_back(freed);
                continue;
            }
            let (mut first, mut count) = (freed.first, freed.count);
            while count > 0 {
                let step = count.min(AT_ONCE);
                self.give_back(first, step)?;
                (first, count) = (first.saturating_add(step), count.saturating_sub(step));
            }
        }
        Ok(())
    }

    fn give_back(&mut self, first: u64, count: u64) -> Result<()> {
        self.refs.change(first, count, |old| old.checked_sub(1))?;
        let mut all = Vec::new();
        for cluster in first..first.saturating_add(count) {
            if self.refs.get(cluster)? == 0 {
                all.push(cluster);
            }
        }
        let Some(lowest) = all.first().copied() else { return Ok(()) };
        self.hint = self.hint.min(lowest);
        for run in all.chunk_by(|a, b| a.saturating_add(1) == *b) {
            let (Some(start), len) = (run.first(), run.len() as u64) else { continue };
            let geometry = self.header.geometry;
            let punched = self.file.punch(geometry.start(*start), geometry.start(len));
            punched.map_err(Error::io("Cannot give space of the image back"))?;
        }
        Ok(())
    }

    /// The size and the L1 table as the header has them: one write, in the first sector.
    pub(crate) fn write_shape(&mut self, size: u64, l1: (u64, u64)) -> Result<()> {
        let mut bytes = size.to_be_bytes().to_vec();
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(u32::try_from(l1.1).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(l1.0.to_be_bytes());
        self.file.write_at(&bytes, 24).map_err(Error::io("Cannot write the header of the image"))?;
        self.sync()
    }
}
