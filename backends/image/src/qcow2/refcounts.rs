//! How many point at each cluster of the file. Everything is written through; what is kept in memory is a small cache to read.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::qcow2::geometry::{Geometry, SLICE};
use crate::qcow2::header::Header;
use crate::qcow2::tables::{Tables, read_words};
use crate::storage::Storage;

/// Pieces of refcount blocks in memory: 128 KiB, which is 4 GiB of disk at 64 KiB clusters, so that a search for room reads each
/// piece once.
const PIECES: usize = 32;

/// The bits of a refcount table entry that are no offset.
const RESERVED: u64 = 0x1ff;

/// The refcounts of one image.
#[derive(Debug)]
pub(crate) struct Refcounts {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    pieces: Vec<(u64, Box<[u8]>)>,
    next: usize,
    /// The piece that was looked at last, which is most often the next one, too.
    last: usize,
}

impl Refcounts {
    pub(crate) fn open(file: Arc<dyn Storage>, header: &Header) -> Result<Refcounts> {
        let geometry = header.geometry;
        let words = geometry.start(header.table_clusters) >> 3;
        let table = read_words(&*file, header.table_offset, words);
        let mut table = table.map_err(Error::io("Cannot read the refcount table of the image"))?;
        let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
        for block in table.iter_mut().filter(|block| **block >= len) {
            *block |= RESERVED;
        }
        Ok(Refcounts { file, geometry, table, table_offset: header.table_offset, pieces: Vec::new(), next: 0, last: 0 })
    }

    /// The number of the block a cluster's refcount is in.
    pub(crate) fn block_of(&self, cluster: u64) -> usize {
        usize::try_from(cluster.checked_shr(self.geometry.block_bits()).unwrap_or(0)).unwrap_or(usize::MAX)
    }

    /// Whether there is a block for a cluster.
    pub(crate) fn covers(&self, cluster: u64) -> bool {
        self.table.get(self.block_of(cluster)).is_some_and(|block| *block != 0)
    }

    fn mask(&self) -> u64 {
        1_u64.checked_shl(self.geometry.block_bits()).unwrap_or(1).saturating_sub(1)
    }

    /// The offset of the piece of a block that a cluster's refcount is in, and the refcount's number there.
    fn place(&self, cluster: u64) -> Result<Option<(u64, u64)>> {
        let Some(block) = self.table.get(self.block_of(cluster)).copied().filter(|block| *block != 0) else { return Ok(None) };
        if block & RESERVED != 0 || !self.geometry.is_aligned(block) {
            return Error::corrupt(format!("a refcount block is said to be at {block:#x}, where none can be"));
        }
        let bits = self.geometry.slice_size().trailing_zeros().saturating_add(3).saturating_sub(self.geometry.refcount_order);
        let number = cluster & self.mask();
        let piece = number.checked_shr(bits).unwrap_or(0);
        let mask = 1_u64.checked_shl(bits).unwrap_or(1).saturating_sub(1);
        Ok(Some((block.saturating_add(piece.saturating_mul(self.geometry.slice_size())), number & mask)))
    }

    fn piece(&mut self, offset: u64) -> Result<&mut [u8]> {
        let same = self.pieces.get(self.last).is_some_and(|(one, _)| *one == offset);
        let found = if same { Some(self.last) } else { self.pieces.iter().position(|(one, _)| *one == offset) };
        let at = match found {
            Some(at) => at,
            None => {
                let mut bytes = vec![0; usize::try_from(self.geometry.slice_size().min(SLICE)).unwrap_or(0)].into_boxed_slice();
                self.file.read_padded(&mut bytes, offset).map_err(Error::io("Cannot read a refcount block of the image"))?;
                self.keep(offset, bytes)
            }
        };
        self.last = at;
        Ok(self.pieces.get_mut(at).map(|(_, bytes)| &mut **bytes).unwrap_or_default())
    }

    fn keep(&mut self, offset: u64, bytes: Box<[u8]>) -> usize {
        if self.pieces.len() < PIECES {
            self.pieces.push((offset, bytes));
            return self.pieces.len().saturating_sub(1);
        }
        self.next = self.next.saturating_add(1) % PIECES;
        if let Some(piece) = self.pieces.get_mut(self.next) {
            *piece = (offset, bytes);
        }
        self.next
    }

    /// Forgets what is in memory of a cluster: it was written to as something else.
    pub(crate) fn forget(&mut self, offset: u64) {
        let geometry = self.geometry;
        self.pieces.retain(|(one, _)| geometry.cluster(*one) != geometry.cluster(offset));
        self.next = 0;
    }

    pub(crate) fn get(&mut self, cluster: u64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let Some((offset, number)) = self.place(cluster)? else { return Ok(0) };
        Ok(read(self.piece(offset)?, order, number))
    }

    /// Changes the refcounts of a run of clusters, in the file at once. There have to be blocks for them.
    pub(crate) fn change(&mut self, first: u64, count: u64, to: impl Fn(u64) -> Option<u64>) -> Result<()> {
        let order = self.geometry.refcount_order;
        let (mut cluster, end) = (first, first.saturating_add(count));
        while cluster < end {
            let Some((offset, number)) = self.place(cluster)? else {
                return Error::corrupt(format!("cluster {cluster} is used, but there is no refcount for it"));
            };
            let file = Arc::clone(&self.file);
            let piece = self.piece(offset)?;
            let most = ((piece.len() as u64) << 3).checked_shr(order).unwrap_or(0).saturating_sub(number);
            let steps = end.saturating_sub(cluster).min(most.max(1));
            for step in 0..steps {
                let at = number.saturating_add(step);
                let new = to(read(piece, order, at));
                let Some(new) = new else {
                    return Error::corrupt(format!("the refcount of cluster {} cannot be right", cluster.saturating_add(step)));
                };
                write(piece, order, at, new);
            }
            let (from, to) = (byte(order, number), byte(order, number.saturating_add(steps).saturating_sub(1)));
            let width = 1_usize.checked_shl(order.saturating_sub(3)).unwrap_or(1);
            let bytes = piece.get(from..to.saturating_add(width)).unwrap_or_default();
            let written = file.write_at(bytes, offset.saturating_add(from as u64));
            if written.is_err() {
                self.pieces.clear();
            }
            written.map_err(Error::io("Cannot write a refcount of the image"))?;
            cluster = cluster.saturating_add(steps);
        }
        Ok(())
    }

    pub(crate) fn set(&mut self, first: u64, count: u64, value: u64) -> Result<()> {
        self.change(first, count, |_| Some(value))
    }

    /// Notes the clusters of this structure among the metadata. False where they overlap with other metadata.
    pub(crate) fn note(&self, clusters: u64, tables: &mut std::collections::BTreeSet<u64>) -> bool {
        let first = self.geometry.cluster(self.table_offset);
        let mut fits = true;
        for cluster in first..first.saturating_add(clusters) {
            fits &= tables.insert(cluster);
        }
        for block in self.table.iter().filter(|block| **block != 0) {
            fits &= tables.insert(self.geometry.cluster(*block));
        }
        fits
    }

    /// Writes the table entries of some blocks.
    pub(crate) fn write_entries(&self, blocks: &[usize], tables: &Tables) -> Result<()> {
        for index in blocks {
            let entry = self.table.get(*index).copied().unwrap_or(0);
            let at = self.table_offset.saturating_add((*index as u64).saturating_mul(8));
            self.file.write_at(&entry.to_be_bytes(), at).map_err(Error::io("Cannot write the refcount table of the image"))?;
            tables.add_metadata(self.geometry.cluster(entry));
        }
        Ok(())
    }
}

/// The byte of a piece that a refcount begins in.
fn byte(order: u32, number: u64) -> usize {
    let bits = number.checked_shl(order).unwrap_or(0);
    usize::try_from(bits >> 3).unwrap_or(usize::MAX)
}

fn sub_byte(order: u32, number: u64) -> (u32, u8) {
    let bits = number.checked_shl(order).unwrap_or(0) & 7;
    let width = 1_u32.checked_shl(order).unwrap_or(1);
    let mask = u8::try_from(1_u32.checked_shl(width).unwrap_or(0).saturating_sub(1)).unwrap_or(u8::MAX);
    (u32::try_from(bits).unwrap_or(0), mask)
}

/// One refcount of a piece. Below a byte, the first is in the lowest bits.
pub(crate) fn read(piece: &[u8], order: u32, number: u64) -> u64 {
    let at = byte(order, number);
    if order < 3 {
        let (shift, mask) = sub_byte(order, number);
        return u64::from(piece.get(at).copied().unwrap_or(0).checked_shr(shift).unwrap_or(0) & mask);
    }
    let width = 1_usize.checked_shl(order.saturating_sub(3)).unwrap_or(1);
    let bytes = piece.get(at..at.saturating_add(width)).unwrap_or_default();
    bytes.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

pub(crate) fn write(piece: &mut [u8], order: u32, number: u64, value: u64) {
    let at = byte(order, number);
    if order < 3 {
        let (shift, mask) = sub_byte(order, number);
        if let Some(byte) = piece.get_mut(at) {
            let new = u8::try_from(value & u64::from(mask)).unwrap_or(0).checked_shl(shift).unwrap_or(0);
            *byte = (*byte & !mask.checked_shl(shift).unwrap_or(0)) | new;
        }
        return;
    }
    let width = 1_usize.checked_shl(order.saturating_sub(3)).unwrap_or(1);
    if let Some(bytes) = piece.get_mut(at..at.saturating_add(width)) {
        let all = value.to_be_bytes();
        bytes.copy_from_slice(all.get(all.len().saturating_sub(width)..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests;
