//! The image as a whole: opening, closing, and what happens to all of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::chain::{Chain, Format, Layer, Node};
use crate::error::{Error, Result};
use crate::lookup::Lookup;
use crate::qcow2::geometry::SLICE_BYTES;
use crate::range::Ranges;
use crate::storage::{FileId, Storage};

/// Bytes of L2 tables kept in memory unless told otherwise: 512 slices, which map 16 GiB at 64 KiB clusters.
const CACHE_BYTES: usize = 2 << 20;

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The top of the chain is written to. Everything below is only ever read.
    pub writable: bool,
    /// Most bytes of L2 tables in memory, all links together.
    pub cache_bytes: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { writable: true, cache_bytes: CACHE_BYTES }
    }
}

/// A flush that somebody else makes: see [`Image::barrier`].
#[derive(Debug)]
pub struct Barrier {
    node: Arc<Node>,
    /// What was freed last when it began.
    ticket: u64,
}

/// A disk image, for all queues together.
#[derive(Debug)]
pub struct Image {
    chain: RwLock<Arc<Chain>>,
    generation: AtomicU64,
    pub(crate) ranges: Arc<Ranges>,
    owners: AtomicU64,
    /// Queues there are.
    queues: AtomicUsize,
    options: Options,
    /// One change of the whole image at a time.
    changing: Mutex<()>,
}

impl Image {
    /// Opens a chain, the top first. An image that was not closed is checked and repaired first, if it is to be written to.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    pub fn open(layers: &[Layer], options: Options) -> Result<Arc<Image>> {
        let chain = Chain::open(layers, options.writable, options.cache_bytes)?;
        let size = chain.nodes.first().map_or(0, |node| node.size());
        Ok(Arc::new(Image {
            chain: RwLock::new(Arc::new(chain)),
            generation: AtomicU64::new(0),
            ranges: Ranges::new(size),
            owners: AtomicU64::new(1),
            queues: AtomicUsize::new(0),
            options,
            changing: Mutex::new(()),
        }))
    }

    pub(crate) fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.chain.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn top(&self) -> Result<Arc<Node>> {
        self.chain().nodes.first().map(Arc::clone).ok_or(Error::Range)
    }

    /// Bytes of the disk: whole sectors.
    pub fn size(&self) -> u64 {
        self.top().map_or(0, |top| top.size())
    }

    /// Whether it can be written to.
    pub fn is_writable(&self) -> bool {
        self.options.writable
    }

    /// Bytes of the unit that space is given out and back in; 0 where the file system decides.
    pub fn cluster_size(&self) -> u64 {
        match self.top().as_deref() {
            Ok(Node::Qcow2(image)) => image.geometry().cluster_size(),
            _ => 0,
        }
    }

    /// The file that guest data is written to.
    ///
    /// # Errors
    /// There always is one.
    pub fn top_file(&self) -> Result<FileId> {
        Ok(self.top()?.data_file().id())
    }

    /// The files that guest data is in, the top first.
    pub fn files(&self) -> Vec<Arc<dyn Storage>> {
        self.chain().nodes.iter().map(|node| Arc::clone(node.data_file())).collect()
    }

    /// The file with this number.
    pub fn file(&self, id: FileId) -> Option<Arc<dyn Storage>> {
        self.chain().file(id).cloned()
    }

    /// What one queue looks things up with. It belongs to one thread at a time.
    pub fn lookup(self: &Arc<Self>) -> Lookup {
        let owner = self.owners.fetch_add(1, Ordering::Relaxed);
        self.queues.fetch_add(1, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
        Lookup::new(Arc::clone(self), owner)
    }

    /// A queue is gone; the others may keep more.
    pub(crate) fn left(&self) {
        self.queues.fetch_sub(1, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Slices of the cache that each queue may keep references to.
    pub(crate) fn slices_each(&self) -> usize {
        let slices = self.options.cache_bytes / SLICE_BYTES;
        slices.checked_div(self.queues.load(Ordering::Relaxed)).unwrap_or(slices)
    }

    /// Makes everything durable that was written and committed before.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> Result<()> {
        match &*self.top()? {
            Node::Raw { file, .. } => file.sync().map_err(Error::io("Cannot make the image durable")),
            Node::Qcow2(image) => image.flush(&self.ranges),
        }
    }

    /// Begins a flush whose waiting is the caller's: it syncs [`top_file`](Image::top_file), which has to hold data and tables, and then says
    /// so, with [`settle`](Image::settle). If that sync fails, it says [`lost`](Image::lost). `None`: the sync is all there is to do.
    ///
    /// # Errors
    /// There always is a top image.
    pub fn barrier(&self) -> Result<Option<Barrier>> {
        let node = self.top()?;
        let ticket = match &*node {
            Node::Raw { .. } => return Ok(None),
            Node::Qcow2(image) => image.ticket(),
        };
        Ok(Some(Barrier { node, ticket }))
    }

    /// The sync of a flush is done, which began after [`barrier`](Image::barrier): what was freed before that is given back. It is the image
    /// of that moment that is meant. If an overlay was put on it meanwhile, it was closed, and there is nothing to do.
    ///
    /// # Errors
    /// The system's.
    pub fn settle(&self, barrier: Barrier) -> Result<()> {
        match &*barrier.node {
            Node::Raw { .. } => Ok(()),
            Node::Qcow2(image) => image.give_back(barrier.ticket, &self.ranges),
        }
    }

    /// A sync has failed that the caller has made. The system tells of that once; from now on the image's own syncs fail, too.
    pub fn lost(&self) {
        if let Ok(top) = self.top() {
            top.files().for_each(|file| file.lost());
        }
    }

    /// No sync of the top image's files has failed.
    ///
    /// # Errors
    /// When one has.
    pub fn nothing_lost(&self) -> Result<()> {
        let top = self.top()?;
        top.files().try_for_each(|file| file.nothing_lost()).map_err(Error::io("Cannot make the image durable"))
    }

    /// Ends writing: what was reserved is given back, and the image no longer says that it is in use. Nothing may be in flight.
    ///
    /// # Errors
    /// The system's. The image is consistent all the same, and is repaired when it is opened again.
    pub fn close(&self) -> Result<()> {
        match &*self.top()? {
            Node::Raw { file, writable: true, .. } => file.sync().map_err(Error::io("Cannot make the image durable")),
            Node::Raw { .. } => Ok(()),
            Node::Qcow2(image) => image.close(),
        }
    }

    /// Makes the disk larger. What is new reads as zeroes. The caller holds no range, and has nothing pending.
    ///
    /// # Errors
    /// When it would become smaller, or when a backing file would show through at its end.
    pub fn resize(self: &Arc<Self>, size: u64) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let chain = self.chain();
        let old = self.size();
        if !size.is_multiple_of(512) {
            return Error::refused("The size of a disk is a multiple of 512 bytes");
        }
        if size < old {
            return Error::refused("An image cannot be made smaller: what is at its end would be lost");
        }
        if chain.nodes.get(1).is_some_and(|below| below.size() > old) {
            return Error::refused("Its backing file is larger than the image, and would show through at the new end");
        }
        match &*self.top()? {
            Node::Raw { writable: false, .. } => Err(Error::ReadOnly),
            Node::Raw { file, size: bytes, .. } => {
                let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
                // A device grows by itself; we only take notice.
                if len < size {
                    file.set_len(size).map_err(Error::io("Cannot lengthen the image"))?;
                }
                bytes.store(size, Ordering::Release);
                Ok(())
            }
            Node::Qcow2(image) => {
                image.grow(size)?;
                // Nobody has looked after what was behind the end in the last cluster.
                let tail = old.next_multiple_of(image.geometry().cluster_size()).min(size).saturating_sub(old);
                self.lookup().zero(old, tail, true)
            }
        }
    }

    /// An external snapshot: the image as it is becomes the backing image of `layer`, a fresh overlay of the same size, and is only
    /// read from now on. The caller has seen to it that nothing is in flight, and nothing is pending.
    ///
    /// # Errors
    /// When the overlay does not fit: the image is then as it was, and can be written to as before. When the image cannot be closed
    /// durably, it can only be read from then on.
    pub fn overlay(&self, layer: &Layer) -> Result<()> {
        self.put(layer, 0)
    }

    /// A fresh start: what was written to the top since it was made is given up, and `layer`, a fresh overlay, takes its place on the
    /// image below it. As for [`overlay`](Image::overlay), nothing is in flight or pending.
    ///
    /// # Errors
    /// When there is no image below, or the overlay does not fit. The image is then as it was.
    pub fn replace(&self, layer: &Layer) -> Result<()> {
        self.put(layer, 1)
    }

    /// Puts a fresh overlay on the chain without its first `away` links.
    fn put(&self, layer: &Layer, away: usize) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let chain = self.chain();
        if !self.options.writable {
            return Err(Error::ReadOnly);
        }
        if chain.nodes.len() >= crate::chain::MAX_DEPTH {
            return Error::refused(format!("The chain would be longer than {} images", crate::chain::MAX_DEPTH));
        }
        let format = match chain.nodes.get(away).map(|node| &**node) {
            Some(Node::Raw { .. }) => Format::Raw,
            Some(Node::Qcow2(_)) => Format::Qcow2,
            None => return Error::refused("There is no image below it to start from"),
        };
        let top = Chain::overlay(layer, format, self.options.cache_bytes)?;
        if top.size() != self.size() {
            return Error::refused("The overlay has another size than the image");
        }
        self.close()?;
        let nodes = std::iter::once(Arc::new(top)).chain(chain.nodes.iter().skip(away).cloned()).collect();
        *self.chain.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Chain { nodes });
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }
}
