//! Writing: a place at once where there is one, and else a claim, which `commit` makes visible.

use std::sync::Arc;

use crate::chain::Node;
use crate::error::{Error, Result};
use crate::lookup::{Extent, Lookup, Place};
use crate::qcow2::geometry::{ALL_DATA, Entry, Geometry, Kind, OFFSET, Piece};
use crate::qcow2::{Meta, Qcow2};

/// Bytes of old data that are copied in one step.
const COPY: usize = 64 << 10;

/// Clusters claimed in one step: with the smallest clusters, as many as a large request has.
const MOST_CLAIMED: u64 = 256;

/// A cluster that is allocated, but not visible yet. Its owner is the only one who may allocate or copy it until then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pending {
    cluster: u64,
    host: u64,
    old: Entry,
    new: Entry,
    /// The host cluster was zeroes, durably.
    fresh: bool,
    /// What had to be copied when it was claimed is there.
    filled: bool,
    /// It replaces something else than zeroes, so its data has to be durable before it is visible.
    barrier: bool,
}

/// Some bytes of a cluster.
#[derive(Clone, Copy)]
struct Span {
    within: u64,
    len: u64,
}

impl Lookup {
    /// Where so many bytes can be written to, or the first of them. If they had no place of their own, they have one now, and
    /// it is pending: [`commit`](Lookup::commit) comes after the data and before the acknowledgement. The range is shared.
    ///
    /// # Errors
    /// [`Error::Busy`]: somebody else is allocating this cluster. Write what was mapped, commit, let go, and try again.
    pub fn map_write(&mut self, offset: u64, len: u64) -> Result<Extent> {
        self.refresh();
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(Extent { len, place: Place::Zero });
        }
        let chain = Arc::clone(&self.chain);
        match chain.nodes.first().map(|node| &**node) {
            Some(Node::Raw { file, writable: true, .. }) => Ok(Extent { len, place: Place::Data { file: file.id(), offset } }),
            Some(Node::Qcow2(image)) => {
                image.check_writable()?;
                self.map_write_in(image, offset, len)
            }
            _ => Err(Error::ReadOnly),
        }
    }

    pub(super) fn map_write_in(&mut self, image: &Qcow2, offset: u64, len: u64) -> Result<Extent> {
        let file = image.data_file().id();
        let extent = |(host, len)| Extent { len, place: Place::Data { file, offset: host } };
        if let Some(found) = self.map_pending(image, offset, len)? {
            return Ok(extent(found));
        }
        if let Some(found) = self.in_place(image, offset, len)? {
            return Ok(extent(found));
        }
        loop {
            if let Some(found) = self.allocate(image, offset, len)? {
                return Ok(extent(found));
            }
            if let Some(found) = self.in_place(image, offset, len)? {
                return Ok(extent(found));
            }
        }
    }

    /// A place that is ours already, in as many clusters as follow each other.
    fn in_place(&mut self, image: &Qcow2, offset: u64, len: u64) -> Result<Option<(u64, u64)>> {
        let mut found: Option<(u64, u64)> = None;
        loop {
            let done = found.map_or(0, |(_, done)| done);
            let at = offset.saturating_add(done);
            if done >= len {
                return Ok(found);
            }
            let entry = self.entry(0, image, image.geometry().cluster(at))?;
            let (piece, some) = self.piece(image, entry, at, len.saturating_sub(done))?;
            let Piece::Data(host) = piece else { return Ok(found) };
            let follows = found.is_none_or(|(first, done)| first.saturating_add(done) == host);
            if !entry.is_copied() || !follows {
                return Ok(found);
            }
            found = Some((found.map_or(host, |(first, _)| first), done.saturating_add(some)));
        }
    }

    /// The same for a cluster that is pending, and ours.
    fn map_pending(&mut self, image: &Qcow2, offset: u64, len: u64) -> Result<Option<(u64, u64)>> {
        let g = *image.geometry();
        let (cluster, within) = (g.cluster(offset), g.within(offset));
        let Some(at) = self.pending.iter().rposition(|pending| pending.cluster == cluster) else { return Ok(None) };
        let span = Span { within, len: len.min(g.cluster_size().saturating_sub(within)) };
        let Some(mut pending) = self.pending.get(at).copied() else { return Ok(None) };
        if g.extended && pending.new.bitmap & g.subclusters(within, span.len) != g.subclusters(within, span.len) {
            self.fill(image, &mut pending, span)?;
            if let Some(kept) = self.pending.get_mut(at) {
                *kept = pending;
            }
        }
        Ok(Some((pending.host.saturating_add(within), span.len)))
    }

    /// Claims clusters and gives them a place. `None`: somebody else has done so in the meantime.
    fn allocate(&mut self, image: &Qcow2, offset: u64, len: u64) -> Result<Option<(u64, u64)>> {
        let g = *image.geometry();
        let first = g.cluster(offset);
        let last = g.cluster(offset.saturating_add(len.max(1)).saturating_sub(1));
        let wanted = last.saturating_sub(first).saturating_add(1).min(MOST_CLAIMED);
        let before = self.pending.len();
        {
            let mut meta = image.meta();
            while meta.claims.contains_key(&first) {
                if !self.pending.is_empty() {
                    return Err(Error::Busy);
                }
                meta = image.wait(meta);
            }
            if !self.needs_place(image, first, g.within(offset), len)? {
                return Ok(None);
            }
            self.claim(image, &mut meta, first, wanted)?;
        }
        let mut done = 0_u64;
        for at in before..self.pending.len() {
            let within = g.within(offset.saturating_add(done));
            let span = Span { within, len: len.saturating_sub(done).min(g.cluster_size().saturating_sub(within)) };
            let Some(mut pending) = self.pending.get(at).copied() else { break };
            let filled = self.fill(image, &mut pending, span);
            if filled.is_err() {
                self.give_up(image, before);
            }
            filled?;
            if let Some(kept) = self.pending.get_mut(at) {
                *kept = pending;
            }
            done = done.saturating_add(span.len);
        }
        let host = self.pending.get(before).map_or(0, |pending| pending.host).saturating_add(g.within(offset));
        Ok(Some((host, done)))
    }

    fn needs_place(&mut self, image: &Qcow2, cluster: u64, within: u64, len: u64) -> Result<bool> {
        let entry = self.entry(0, image, cluster)?;
        let offset = image.geometry().start(cluster).saturating_add(within);
        let (piece, _) = self.piece(image, entry, offset, len)?;
        Ok(!(entry.is_copied() && matches!(piece, Piece::Data(_))))
    }

    /// Claims this cluster, and those after it that need a place too and get one right behind.
    fn claim(&mut self, image: &Qcow2, meta: &mut Meta, first: u64, wanted: u64) -> Result<()> {
        let g = *image.geometry();
        meta.space()?.touch()?;
        image.own_table(meta, first)?;
        let old = self.entry(0, image, first)?;
        let stays = g.extended && old.is_copied() && matches!(old.kind(&g), Kind::Data(_));
        if g.external || stays {
            let host = if g.external { g.start(first) } else { old.word & OFFSET };
            self.pend(meta, &g, (first, host), old, false);
            return Ok(());
        }
        let mut olds = vec![old];
        for cluster in first.saturating_add(1)..first.saturating_add(wanted) {
            // Only in the same table: another may have to be made first.
            if g.l1_index(cluster) != g.l1_index(first) || meta.claims.contains_key(&cluster) {
                break;
            }
            let old = self.entry(0, image, cluster)?;
            if old.is_copied() || matches!(old.kind(&g), Kind::Bad) {
                break;
            }
            olds.push(old);
        }
        let (host, got) = meta.space()?.take(olds.len() as u64, &image.tables)?;
        for (step, old) in (0..got).zip(olds) {
            let place = (first.saturating_add(step), g.start(host.saturating_add(step)));
            self.pend(meta, &g, place, old, true);
        }
        Ok(())
    }

    fn pend(&mut self, meta: &mut Meta, g: &Geometry, place: (u64, u64), old: Entry, fresh: bool) {
        let (cluster, host) = place;
        meta.claims.insert(cluster, self.owner);
        let bitmap = match (g.extended, old.kind(g)) {
            (true, Kind::Compressed) => ALL_DATA,
            (true, _) => old.bitmap,
            (false, _) => 0,
        };
        let new = Entry { bitmap, ..Entry::data(host, g) };
        self.pending.push(Pending { cluster, host, old, new, fresh, filled: false, barrier: !fresh });
    }

    /// Makes the rest of what the cluster will show be there: old data around `span`, which the caller writes.
    fn fill(&mut self, image: &Qcow2, pending: &mut Pending, span: Span) -> Result<()> {
        let g = *image.geometry();
        let first_time = !std::mem::replace(&mut pending.filled, true);
        let had = pending.new.bitmap;
        if g.extended {
            let touched = g.subclusters(span.within, span.len);
            let data = (had | touched) & ALL_DATA;
            pending.new.bitmap = data | (had & !ALL_DATA & !(data << 32));
        }
        let moved = pending.old.word & OFFSET != pending.host || pending.old.kind(&g) == Kind::Compressed;
        let unit = g.subcluster_size();
        let mut at = 0;
        while at < g.cluster_size() {
            let bit = g.subclusters(at, 1);
            let was_there = had & bit != 0;
            let needed = !g.extended || (pending.new.bitmap & bit != 0 && (!was_there || (moved && first_time)));
            let end = at.saturating_add(unit);
            if needed {
                let (from, to) = (span.within.clamp(at, end), span.within.saturating_add(span.len).clamp(at, end));
                self.copy_old(image, pending, Span { within: at, len: from.saturating_sub(at) }, true)?;
                self.copy_old(image, pending, Span { within: from, len: to.saturating_sub(from) }, false)?;
                self.copy_old(image, pending, Span { within: to, len: end.saturating_sub(to) }, true)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Copies what some bytes of a cluster were before. Not to `write` is to look only, whether there was anything but zeroes.
    fn copy_old(&mut self, image: &Qcow2, pending: &mut Pending, span: Span, write: bool) -> Result<()> {
        let g = *image.geometry();
        let start = g.start(pending.cluster);
        let size = image.size();
        let (mut at, end) = (span.within, span.within.saturating_add(span.len));
        while at < end {
            let offset = start.saturating_add(at);
            let (piece, len) = self.piece(image, pending.old, offset, end.saturating_sub(at))?;
            let extent = match piece {
                Piece::Backing if offset >= size => Extent { len, place: Place::Zero },
                Piece::Backing => self.resolve(1, offset, len)?,
                Piece::Zero => Extent { len, place: Place::Zero },
                Piece::Data(host) => super::in_file(image, host, len),
                Piece::Compressed(word) => {
                    Extent { len, place: Place::Compressed(super::Compressed { node: 0, word, within: at }) }
                }
            };
            self.copy_extent(image, pending, at, extent, write)?;
            at = at.saturating_add(extent.len.max(1));
        }
        Ok(())
    }

    fn copy_extent(&mut self, image: &Qcow2, pending: &mut Pending, within: u64, extent: Extent, write: bool) -> Result<()> {
        let (file, to) = (Arc::clone(image.data_file()), pending.host.saturating_add(within));
        if extent.place == Place::Zero {
            if write && !pending.fresh {
                file.zero(to, extent.len).map_err(Error::io("Cannot write to the image"))?;
            }
            return Ok(());
        }
        pending.barrier = true;
        let mut buffer = vec![0; if write { COPY.min(usize::try_from(extent.len).unwrap_or(COPY)) } else { 0 }];
        let mut done = 0;
        while write && done < extent.len {
            let step = usize::try_from(extent.len.saturating_sub(done)).unwrap_or(COPY).min(buffer.len());
            let Some(bytes) = buffer.get_mut(..step) else { break };
            let place = match extent.place {
                Place::Data { file, offset } => Place::Data { file, offset: offset.saturating_add(done) },
                Place::Compressed(place) => {
                    Place::Compressed(super::Compressed { within: place.within.saturating_add(done), ..place })
                }
                Place::Zero => Place::Zero,
            };
            self.read_place(place, bytes)?;
            file.write_at(bytes, to.saturating_add(done)).map_err(Error::io("Cannot write to the image"))?;
            done = done.saturating_add(step as u64);
        }
        Ok(())
    }

    /// Whether something is pending.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Makes what is pending visible. All data that was written there has to have been handed to the system. At most one barrier.
    ///
    /// # Errors
    /// The system's. Nothing is pending afterwards in any case; what failed was not written.
    pub fn commit(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let chain = Arc::clone(&self.chain);
        let Some(Node::Qcow2(image)) = chain.nodes.first().map(|node| &**node) else { return Ok(()) };
        let mut pending = std::mem::take(&mut self.pending);
        pending.sort_unstable_by_key(|one| one.cluster);
        let done = self.publish(image, &pending);
        let mut meta = image.meta();
        if done.is_ok() {
            for one in pending
                .iter()
                .filter(|one| one.old.word & OFFSET != one.host || one.old.kind(image.geometry()) == Kind::Compressed)
            {
                image.free(&mut meta, one.cluster, one.old, false);
            }
        }
        image.release(&mut meta, pending.iter().map(|one| one.cluster));
        drop(meta);
        done?;
        image.settle(&self.image.ranges)
    }

    fn publish(&self, image: &Qcow2, pending: &[Pending]) -> Result<()> {
        image.check_writable()?;
        if pending.iter().any(|one| one.barrier) {
            image.data_file().sync().map_err(Error::io("Cannot make the data of the image durable"))?;
        }
        let changes: Vec<_> = pending.iter().map(|one| (one.cluster, one.new)).collect();
        image.tables.update(&changes)
    }

    /// Gives up what is pending: a write failed, and was not acknowledged.
    pub fn abort(&mut self) {
        let chain = Arc::clone(&self.chain);
        if let Some(Node::Qcow2(image)) = chain.nodes.first().map(|node| &**node)
            && !self.pending.is_empty()
        {
            self.give_up(image, 0);
        }
    }

    fn give_up(&mut self, image: &Qcow2, from: usize) {
        let mut meta = image.meta();
        let given = self.pending.split_off(from.min(self.pending.len()));
        for one in given.iter().filter(|one| one.fresh) {
            meta.free(None, image.geometry().cluster(one.host), 1);
        }
        image.release(&mut meta, given.iter().map(|one| one.cluster));
    }

    /// Writes, and commits. For whoever has no engine of its own.
    ///
    /// # Errors
    /// Of the image or the system.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let range = self.share(offset, bytes.len() as u64)?;
        let written = self.write_pending(bytes, offset);
        let done = match written {
            Ok(()) => self.commit(),
            Err(error) => {
                self.abort();
                Err(error)
            }
        };
        drop(range);
        done
    }

    /// Writes, and leaves new clusters pending.
    pub(crate) fn write_pending(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let extent = match self.map_write(at, rest.len() as u64) {
                Err(Error::Busy) => {
                    self.commit()?;
                    continue;
                }
                other => other?,
            };
            let Place::Data { file, offset } = extent.place else { return Err(Error::ReadOnly) };
            let (now, later) = rest.split_at_checked(usize::try_from(extent.len).unwrap_or(usize::MAX)).ok_or(Error::Range)?;
            let file = self.chain.file(file).ok_or(Error::Range)?;
            file.write_at(now, offset).map_err(Error::io("Cannot write to the image"))?;
            (rest, at) = (later, at.saturating_add(extent.len.max(1)));
        }
        Ok(())
    }
}
