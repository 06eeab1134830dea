//! Discarding and zeroing: the range is had alone, rounded out to clusters.
//!
//! A discard gives whole clusters back. Over a backing file they become explicit zero clusters: what was hidden stays hidden.
//! Where the format cannot say that (version 2), and where the guest asked for less than a cluster, a discard does nothing.
//! Zeroing always ends in zeroes: by a zero cluster, by giving the cluster back where nothing is below, or by writing them.

use std::sync::Arc;

use crate::chain::Node;
use crate::error::{Error, Result};
use crate::lookup::{Lookup, Place};
use crate::qcow2::geometry::{Entry, Kind};
use crate::qcow2::{Meta, Qcow2};
use crate::range::Exclusive;
use crate::storage::{FileId, Storage};

/// Clusters that are changed in one step, so that other queues are held up for a bounded time.
const AT_ONCE: u64 = 512;

/// What is to become of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Their content does not matter.
    Discard,
    /// Zeroes, without space.
    Unmap,
    /// Zeroes, with the space they have.
    Keep,
}

impl Lookup {
    /// Makes all that was committed durable.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&mut self) -> Result<()> {
        self.image.flush()
    }

    /// The file in which a range of the disk lies as it is, where the top is a raw image: there the file system itself can zero it, and a device erase it. The
    /// caller shares the range until it has.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], or that there is no such range.
    pub fn plain(&mut self, offset: u64, len: u64) -> Result<Option<FileId>> {
        self.refresh();
        self.check_range(offset, len)?;
        Ok(self.raw_top()?.map(|file| file.id()))
    }

    /// Has a range alone, rounded out to clusters, until the guard is dropped: for whatever must see no I/O there. Do not call
    /// [`zero`](Lookup::zero) or [`discard`](Lookup::discard) while it lives: they take the range themselves.
    ///
    /// # Errors
    /// [`Error::Busy`]: this queue holds ranges or claims.
    pub fn exclude(&mut self, offset: u64, len: u64) -> Result<Exclusive> {
        if !self.pending.is_empty() {
            return Err(Error::Busy);
        }
        loop {
            self.refresh();
            let range = self.exclude_now(offset, len)?;
            // Who had it until now may have put an overlay on the image: it is that one's clusters that count.
            if self.image.generation() == self.generation {
                return Ok(range);
            }
        }
    }

    fn exclude_now(&self, offset: u64, len: u64) -> Result<Exclusive> {
        let Some(Node::Qcow2(image)) = self.chain.nodes.first().map(|node| &**node) else {
            return self.lane.exclude(offset, len);
        };
        let g = image.geometry();
        let (first, end) = (g.cluster(offset), g.clusters(offset.saturating_add(len)));
        let range = self.lane.exclude(g.start(first), g.start(end.saturating_sub(first)))?;
        // Who has a claim there never waits before it is committed.
        let mut meta = image.meta();
        while meta.claims.range(first..end.max(first)).next().is_some() {
            meta = image.wait(meta);
        }
        drop(meta);
        Ok(range)
    }

    /// Turns a range into zeroes. With `unmap`, its space may be given back.
    ///
    /// # Errors
    /// [`Error::Busy`]: this queue holds ranges or claims. Let them go, and try again.
    pub fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(offset, len, if unmap { How::Unmap } else { How::Keep })
    }

    /// The content of a range does not matter any more. It reads as before, or as zeroes.
    ///
    /// # Errors
    /// As for [`zero`](Lookup::zero).
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.change(offset, len, How::Discard)
    }

    fn change(&mut self, offset: u64, len: u64, how: How) -> Result<()> {
        self.refresh();
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        if let Some(image) = self.top_qcow2() {
            let Node::Qcow2(image) = &*image else { return Err(Error::ReadOnly) };
            let (first, last) = whole(image, offset, len);
            if how == How::Discard && first >= last {
                return match image.check_writable() {
                    // Only by an overlay that comes at this moment: there is nothing to do in that one, either.
                    Err(Error::ReadOnly) if self.image.is_writable() => Ok(()),
                    other => other,
                };
            }
        } else if let Some(done) = self.change_raw(offset, len, how)? {
            return Ok(done);
        }
        // Until the range is ours alone an overlay may come: which image it is, is known only then.
        let _alone = self.exclude(offset, len)?;
        let Some(node) = self.top_qcow2() else { return Err(Error::ReadOnly) };
        let Node::Qcow2(image) = &*node else { return Err(Error::ReadOnly) };
        image.check_writable()?;
        match self.change_in(image, offset, len, how) {
            Ok(()) => self.commit()?,
            Err(error) => {
                self.abort();
                return Err(error);
            }
        }
        image.settle(&self.image.ranges)
    }

    /// The top image, if it is qcow2.
    fn top_qcow2(&self) -> Option<Arc<Node>> {
        self.chain.nodes.first().filter(|node| matches!(***node, Node::Qcow2(_))).map(Arc::clone)
    }

    /// A range of a raw image, which is shared: the file system itself sees to it that bytes beside it stay as they are. `None`: there
    /// is an overlay on it now.
    fn change_raw(&mut self, offset: u64, len: u64, how: How) -> Result<Option<()>> {
        let _range = self.share(offset, len)?;
        self.refresh();
        let Some(file) = self.raw_top()? else { return Ok(None) };
        let done = if how == How::Keep { file.zero(offset, len) } else { file.punch(offset, len) };
        done.map(Some).map_err(Error::io("Cannot zero a range of the image"))
    }

    /// The file of the top image, where that is raw and written.
    fn raw_top(&self) -> Result<Option<Arc<dyn Storage>>> {
        match self.chain.nodes.first().map(|node| &**node) {
            Some(Node::Raw { file, writable: true, .. }) => Ok(Some(Arc::clone(file))),
            Some(Node::Raw { .. }) | None => Err(Error::ReadOnly),
            Some(Node::Qcow2(_)) => Ok(None),
        }
    }

    fn change_in(&mut self, image: &Qcow2, offset: u64, len: u64, how: How) -> Result<()> {
        let g = *image.geometry();
        let end = offset.saturating_add(len);
        let (first, last) = whole(image, offset, len);
        if first >= last {
            return self.zero_parts(image, offset, len);
        }
        if how != How::Discard {
            self.zero_parts(image, offset, g.start(first).saturating_sub(offset))?;
            self.zero_parts(image, g.start(last), end.saturating_sub(g.start(last)))?;
        }
        let mut cluster = first;
        while cluster < last {
            let step = self.skippable(image, cluster).clamp(0, last.saturating_sub(cluster));
            if step > 0 {
                cluster = cluster.saturating_add(step);
                continue;
            }
            let count = AT_ONCE.min(last.saturating_sub(cluster));
            self.change_clusters(image, cluster, count, how)?;
            cluster = cluster.saturating_add(count);
        }
        Ok(())
    }

    /// Clusters from here on that have no L2 table and nothing below: there is nothing to do.
    fn skippable(&self, image: &Qcow2, cluster: u64) -> u64 {
        let g = image.geometry();
        let index = g.l1_index(cluster);
        if self.chain.nodes.len() > 1
            || image.header.is_raw_external()
            || image.tables.with_l1(|l1| l1.entries.get(index) != Some(&0))
        {
            return 0;
        }
        let table = 1_u64.checked_shl(g.l2_bits()).unwrap_or(1);
        table.saturating_sub(cluster & table.saturating_sub(1))
    }

    /// Less than a cluster: zeroes are written where anything else is seen.
    fn zero_parts(&mut self, image: &Qcow2, offset: u64, len: u64) -> Result<()> {
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let seen = self.resolve(0, at, end.saturating_sub(at))?;
            let stop = at.saturating_add(seen.len);
            while seen.place != Place::Zero && at < stop {
                let extent = self.map_write_in(image, at, stop.saturating_sub(at))?;
                let Place::Data { offset, .. } = extent.place else { return Err(Error::ReadOnly) };
                image.data_file().zero(offset, extent.len).map_err(Error::io("Cannot zero a range of the image"))?;
                at = at.saturating_add(extent.len.max(1));
            }
            at = at.max(stop);
        }
        Ok(())
    }

    fn change_clusters(&mut self, image: &Qcow2, first: u64, count: u64, how: How) -> Result<()> {
        let mut meta = image.meta();
        let (mut changes, mut olds) = (Vec::new(), Vec::new());
        for cluster in first..first.saturating_add(count) {
            let old = self.entry(0, image, cluster)?;
            if self.change_in_file(image, cluster, old, how)? {
                continue;
            }
            if let Some(new) = self.new_entry(image, &mut meta, cluster, old, how)? {
                image.own_table(&mut meta, cluster)?;
                changes.push((cluster, new));
                olds.push((cluster, old));
            }
        }
        if !changes.is_empty() {
            meta.space()?.touch()?;
        }
        image.tables.update(&changes)?;
        olds.into_iter().for_each(|(cluster, old)| image.free(&mut meta, cluster, old, true));
        Ok(())
    }

    /// What is done in the file itself. Whether that was all.
    fn change_in_file(&self, image: &Qcow2, cluster: u64, old: Entry, how: How) -> Result<bool> {
        let g = image.geometry();
        let (file, raw) = (image.data_file(), image.header.is_raw_external());
        let done = match old.kind(g) {
            // Whatever reads the data file alone has to see the same.
            _ if raw && how == How::Keep => file.zero(g.start(cluster), g.cluster_size()),
            _ if raw => file.punch(g.start(cluster), g.cluster_size()),
            Kind::Data(host) if how == How::Keep && old.is_copied() && !g.extended => file.zero(host, g.cluster_size()),
            Kind::Data(host) if g.external => {
                file.punch(host, g.cluster_size()).map_err(Error::io("Cannot zero a range of the image"))?;
                return Ok(false);
            }
            _ => return Ok(false),
        };
        done.map_err(Error::io("Cannot zero a range of the image"))?;
        Ok(true)
    }

    /// The entry a cluster is to have from now on, if another one.
    fn new_entry(&mut self, image: &Qcow2, meta: &mut Meta, cluster: u64, old: Entry, how: How) -> Result<Option<Entry>> {
        let g = *image.geometry();
        match old.kind(&g) {
            Kind::Bad => {
                image.tables.mark_corrupt();
                return Error::corrupt(format!("guest cluster {cluster} is said to be where it cannot be"));
            }
            Kind::Zero(None) => return Ok(None),
            Kind::Zero(Some(_)) if how == How::Keep => return Ok(None),
            Kind::Unallocated if how == How::Discard => return Ok(None),
            _ => {}
        }
        let nothing_below = self.is_zero_below(image, cluster)?;
        if nothing_below {
            return Ok(Some(Entry::NONE).filter(|new| *new != old));
        }
        match (Entry::zeroes(&g), how) {
            (Some(zeroes), _) => Ok(Some(zeroes)),
            (None, How::Discard) => Ok(None),
            (None, _) if g.external => Error::refused("A version 2 image cannot have a data file"),
            // A cluster from the reserve is zeroes.
            (None, _) => {
                image.own_table(meta, cluster)?;
                let (host, _) = meta.space()?.take(1, &image.tables)?;
                Ok(Some(Entry::data(g.start(host), &g)))
            }
        }
    }

    /// Whether a cluster would read as zeroes if it were not there.
    fn is_zero_below(&mut self, image: &Qcow2, cluster: u64) -> Result<bool> {
        let g = image.geometry();
        if self.chain.nodes.len() < 2 {
            return Ok(true);
        }
        let start = g.start(cluster);
        let len = g.cluster_size().min(image.size().saturating_sub(start));
        let below = self.resolve(1, start, len)?;
        Ok(below.place == Place::Zero && below.len >= len)
    }
}

/// The first whole cluster of a range, and the one after the last. At the disk's end, a cluster that is cut short is whole.
fn whole(image: &Qcow2, offset: u64, len: u64) -> (u64, u64) {
    let (g, end) = (image.geometry(), offset.saturating_add(len));
    (g.clusters(offset), if end >= image.size() { g.clusters(end) } else { g.cluster(end) })
}
