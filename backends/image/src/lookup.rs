//! Where guest bytes live, for one queue.
//!
//! # Theory of operation
//!
//! A lookup keeps references to the slices of L2 tables it used last, in a table with one place for each hash: a warm lookup is
//! two loads, one of an entry and one of the flag that says whether the slice still counts. It also holds what this queue has
//! pending (`write.rs`), its lane of ranges, and the compressed cluster it read last.
//!
//! The order for whoever moves data: [`share`](Lookup::share) the range, map, move the data, let the range go. A range that is
//! shared keeps what was looked up true: nothing is discarded under it, and no cluster that it may lead to is given away.

mod write;
mod zero;

use std::ops::{Deref, RangeInclusive};
use std::sync::Arc;

use crate::chain::{Chain, Node};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::lookup::write::Pending;
use crate::qcow2::Qcow2;
use crate::qcow2::geometry::{Entry, Piece};
use crate::qcow2::tables::Slice;
use crate::range::{Lane, Shared};
use crate::storage::{FileId, Storage};

/// Fewest and most slices a queue keeps references to: 16 map 512 MiB at 64 KiB clusters, 512 are all of an ordinary cache. In between,
/// all queues together hold no more than the cache has: what it has let go is in memory for as long as one of them holds it.
const HELD: RangeInclusive<usize> = 16..=512;

/// Where some guest bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// For how many bytes that is so.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file, as they are.
    Data {
        /// The file's number; see [`Lookup::file`].
        file: FileId,
        /// Where in the file.
        offset: u64,
    },
    /// They are zeroes.
    Zero,
    /// In a compressed cluster; see [`Lookup::inflate`].
    Compressed(Compressed),
}

/// Some bytes of a compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    node: usize,
    word: u64,
    within: u64,
}

/// One queue's view of an image.
#[derive(Debug)]
pub struct Lookup {
    image: Arc<Image>,
    chain: Arc<Own>,
    generation: u64,
    owner: u64,
    held: Vec<Option<Held>>,
    lane: Arc<Lane>,
    pending: Vec<Pending>,
    inflated: Option<(FileId, u64, Box<[u8]>)>,
}

/// A queue's own reference to the chain: to keep it alive for a moment counts in a word that no other queue writes to.
#[derive(Debug)]
#[repr(align(128))]
struct Own(Arc<Chain>);

impl Deref for Own {
    type Target = Chain;

    fn deref(&self) -> &Chain {
        &self.0
    }
}

/// A slice that was used, with the depth of its image and its number there.
#[derive(Debug)]
struct Held {
    depth: usize,
    number: u64,
    slice: Arc<Slice>,
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.abort();
        self.image.ranges.forget(&self.lane);
        self.image.left();
    }
}

impl Lookup {
    pub(crate) fn new(image: Arc<Image>, owner: u64) -> Lookup {
        let (chain, lane) = (Arc::new(Own(image.chain())), image.ranges.lane());
        // No generation is this one: the first call takes notice of everything.
        let generation = u64::MAX;
        Lookup { image, chain, generation, owner, held: Vec::new(), lane, pending: Vec::new(), inflated: None }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The file with this number.
    pub fn file(&self, id: FileId) -> Option<&Arc<dyn Storage>> {
        self.chain.file(id)
    }

    /// Shares a range with other readers and writers, until the guard is dropped.
    ///
    /// # Errors
    /// [`Error::Busy`]: somebody has it alone, and this queue holds other ranges or claims. Let them go, and try again.
    pub fn share(&mut self, offset: u64, len: u64) -> Result<Shared> {
        self.lane.share(offset, len, self.pending.is_empty())
    }

    /// Where so many bytes are, or the first of them.
    ///
    /// # Errors
    /// Of the image, or [`Error::Range`].
    pub fn map_read(&mut self, offset: u64, len: u64) -> Result<Extent> {
        self.refresh();
        self.check_range(offset, len)?;
        self.resolve(0, offset, len)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.chain.nodes.first().map_or(0, |node| node.size());
        if offset.checked_add(len).is_none_or(|end| end > size) { Err(Error::Range) } else { Ok(()) }
    }

    /// Takes notice of a chain that was switched, and of queues that came or went.
    fn refresh(&mut self) {
        let generation = self.image.generation();
        if generation != self.generation {
            (self.chain, self.generation) = (Arc::new(Own(self.image.chain())), generation);
            let room = self.image.slices_each().clamp(*HELD.start(), *HELD.end()).next_power_of_two();
            self.held = (0..room).map(|_| None).collect();
            self.inflated = None;
        }
    }

    fn resolve(&mut self, first: usize, offset: u64, len: u64) -> Result<Extent> {
        let mut extent = self.resolve_piece(first, offset, len)?;
        // Neighbours that continue in the same place are given together.
        while extent.len < len {
            let next = self.resolve_piece(first, offset.saturating_add(extent.len), len.saturating_sub(extent.len))?;
            let joined = match (extent.place, next.place) {
                (Place::Zero, Place::Zero) => true,
                (Place::Data { file: a, offset: at }, Place::Data { file: b, offset: then }) => {
                    a == b && at.saturating_add(extent.len) == then
                }
                _ => false,
            };
            if !joined {
                break;
            }
            extent.len = extent.len.saturating_add(next.len);
        }
        Ok(extent)
    }

    /// Looks from the link `first` on downwards.
    fn resolve_piece(&mut self, first: usize, offset: u64, len: u64) -> Result<Extent> {
        let chain = Arc::clone(&self.chain);
        let mut len = len;
        for (depth, node) in chain.nodes.iter().enumerate().skip(first) {
            let rest = node.size().saturating_sub(offset);
            if rest == 0 {
                return Ok(Extent { len, place: Place::Zero });
            }
            len = len.min(rest);
            match &**node {
                Node::Raw { file, .. } => return Ok(Extent { len, place: Place::Data { file: file.id(), offset } }),
                Node::Qcow2(image) => {
                    let entry = self.entry(depth, image, image.geometry().cluster(offset))?;
                    let (piece, some) = self.piece(image, entry, offset, len)?;
                    len = some;
                    match piece {
                        Piece::Backing => {}
                        Piece::Zero => return Ok(Extent { len, place: Place::Zero }),
                        Piece::Data(host) => return Ok(in_file(image, host, len)),
                        Piece::Compressed(word) => {
                            let within = image.geometry().within(offset);
                            return Ok(Extent { len, place: Place::Compressed(Compressed { node: depth, word, within }) });
                        }
                    }
                }
            }
        }
        Ok(Extent { len, place: Place::Zero })
    }

    fn piece(&self, image: &Qcow2, entry: Entry, offset: u64, len: u64) -> Result<(Piece, u64)> {
        let g = image.geometry();
        let piece = entry.piece(g, g.within(offset), len);
        piece.ok_or_else(|| {
            image.tables.mark_corrupt();
            Error::Corrupt(format!("guest cluster {} is said to be where it cannot be", g.cluster(offset)))
        })
    }

    /// An entry of the image at this depth. Without a lock, if this queue has seen its slice.
    fn entry(&mut self, depth: usize, image: &Qcow2, cluster: u64) -> Result<Entry> {
        let (number, index) = image.geometry().slice_of(cluster);
        let mask = (self.held.len() as u64).saturating_sub(1);
        let place = usize::try_from(number.wrapping_add((depth as u64).wrapping_mul(11)) & mask).unwrap_or(0);
        if let Some(Some(held)) = self.held.get(place)
            && (held.depth, held.number) == (depth, number)
            && let Some(entry) = held.slice.entry(index, image.geometry())
        {
            return Ok(entry);
        }
        let (entry, slice) = image.entry(cluster)?;
        if let Some(held) = self.held.get_mut(place) {
            *held = Some(Held { depth, number, slice });
        }
        Ok(entry)
    }

    /// The bytes of a compressed cluster from where the extent begins to the cluster's end.
    ///
    /// # Errors
    /// When it cannot be decompressed.
    pub fn inflate(&mut self, place: Compressed) -> Result<&[u8]> {
        let chain = Arc::clone(&self.chain);
        let Some(Node::Qcow2(image)) = chain.nodes.get(place.node).map(|node| &**node) else { return Err(Error::Range) };
        let key = (image.file.id(), place.word);
        if self.inflated.as_ref().is_none_or(|(file, word, _)| (*file, *word) != key) {
            let size = usize::try_from(image.geometry().cluster_size()).unwrap_or(0);
            let mut cluster = match self.inflated.take() {
                Some((_, _, cluster)) if cluster.len() == size => cluster,
                _ => vec![0; size].into_boxed_slice(),
            };
            image.inflate(place.word, &mut cluster)?;
            self.inflated = Some((key.0, key.1, cluster));
        }
        let within = usize::try_from(place.within).unwrap_or(usize::MAX);
        let cluster = self.inflated.as_ref().map(|(_, _, cluster)| &**cluster).unwrap_or_default();
        Ok(cluster.get(within..).unwrap_or_default())
    }

    /// Reads: the range is shared meanwhile. For whoever has no engine of its own.
    ///
    /// # Errors
    /// Of the image or the system.
    pub fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let _range = self.share(offset, buffer.len() as u64)?;
        self.refresh();
        self.check_range(offset, buffer.len() as u64)?;
        self.read_from(0, buffer, offset)
    }

    fn read_from(&mut self, first: usize, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            let extent = self.resolve(first, at, rest.len() as u64)?;
            let (now, later) =
                rest.split_at_mut_checked(usize::try_from(extent.len).unwrap_or(usize::MAX)).ok_or(Error::Range)?;
            if now.is_empty() {
                return Err(Error::Range);
            }
            self.read_place(extent.place, now)?;
            (rest, at) = (later, at.saturating_add(extent.len));
        }
        Ok(())
    }

    fn read_place(&mut self, place: Place, into: &mut [u8]) -> Result<()> {
        match place {
            Place::Zero => into.fill(0),
            Place::Data { file, offset } => {
                let file = self.chain.file(file).ok_or(Error::Range)?;
                file.read_padded(into, offset).map_err(Error::io("Cannot read the image"))?;
            }
            Place::Compressed(compressed) => {
                let cluster = self.inflate(compressed)?;
                into.copy_from_slice(cluster.get(..into.len()).ok_or(Error::Range)?);
            }
        }
        Ok(())
    }
}

/// Data in a file, or the zeroes behind its end.
fn in_file(image: &Qcow2, host: u64, len: u64) -> Extent {
    let there = image.readable().saturating_sub(host);
    if there == 0 {
        return Extent { len, place: Place::Zero };
    }
    Extent { len: len.min(there), place: Place::Data { file: image.data_file().id(), offset: host } }
}
