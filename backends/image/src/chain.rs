//! A disk image and what is below it: each link an open file that the caller handed in, and a format it declared.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::qcow2::Qcow2;
use crate::qcow2::geometry::SLICE_BYTES;
use crate::qcow2::header::{CORRUPT, DIRTY, Header};
use crate::storage::{FileId, Storage};

/// Most links of a chain: what QEMU and libvirt agree on as deep enough. Loops cannot be, since no name is followed.
pub const MAX_DEPTH: usize = 200;

/// Fewest slices of L2 tables kept in memory for each link: 32 KiB.
const FEWEST_SLICES: usize = 8;

/// What an image is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk, byte for byte.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// As headers and people name it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// One link of a chain, as the caller declares it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// What it is written in. It is never guessed.
    pub format: Format,
    /// The image.
    pub file: Arc<dyn Storage>,
    /// The file its data is in, where that is another one.
    pub data: Option<Arc<dyn Storage>>,
}

/// What a header says, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// What it is written in.
    pub format: Format,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the file.
    pub file_size: u64,
    /// qcow2's version, or 0.
    pub version: u32,
    /// Bytes of a cluster, or 0.
    pub cluster_size: u64,
    /// Bits of a refcount, or 0.
    pub refcount_bits: u32,
    /// Clusters have subclusters.
    pub extended_l2: bool,
    /// How clusters are compressed, if any are.
    pub compression: &'static str,
    /// The backing file it names.
    pub backing: Option<String>,
    /// The format it says its backing file has.
    pub backing_format: Option<String>,
    /// The data file it names; an empty name if it only says that there is one.
    pub data_file: Option<String>,
    /// Internal snapshots.
    pub snapshots: u32,
    /// It has persistent bitmaps.
    pub bitmaps: bool,
    /// Its refcounts may be wrong.
    pub dirty: bool,
    /// It is said to be corrupt.
    pub corrupt: bool,
    /// A process writes to it, or did so until it died.
    pub in_use: bool,
}

impl Info {
    /// Reads what the header of a file says. Damaged images are welcome.
    ///
    /// # Errors
    /// When it is no such image at all.
    pub fn read(format: Format, file: &dyn Storage) -> Result<Info> {
        let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
        let mut info = Info {
            format,
            size: len,
            file_size: len,
            version: 0,
            cluster_size: 0,
            refcount_bits: 0,
            extended_l2: false,
            compression: "none",
            backing: None,
            backing_format: None,
            data_file: None,
            snapshots: 0,
            bitmaps: false,
            dirty: false,
            corrupt: false,
            in_use: false,
        };
        if format == Format::Qcow2 {
            info.fill(Header::read(file)?);
        }
        Ok(info)
    }

    fn fill(&mut self, header: Header) {
        let g = header.geometry;
        (self.size, self.version, self.cluster_size) = (header.size, header.version, g.cluster_size());
        self.refcount_bits = 1_u32.checked_shl(g.refcount_order).unwrap_or(0);
        self.extended_l2 = g.extended;
        self.compression = if header.compression == crate::inflate::Method::Zstd { "zstd" } else { "zlib" };
        self.dirty = header.incompatible & DIRTY != 0;
        self.corrupt = header.incompatible & CORRUPT != 0;
        self.in_use = header.mark.is_some_and(|(_, in_use)| in_use);
        (self.snapshots, self.bitmaps) = (header.snapshots, header.bitmaps);
        self.data_file = if g.external { Some(header.data_file.unwrap_or_default()) } else { None };
        (self.backing, self.backing_format) = (header.backing, header.backing_format);
    }
}

/// One link, open.
#[derive(Debug)]
pub(crate) enum Node {
    Raw { file: Arc<dyn Storage>, size: AtomicU64, writable: bool },
    Qcow2(Box<Qcow2>),
}

impl Node {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Node::Raw { size, .. } => size.load(Ordering::Acquire),
            Node::Qcow2(image) => image.size(),
        }
    }

    /// Its files: tables and data may have one each.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Arc<dyn Storage>> {
        let (first, other) = match self {
            Node::Raw { file, .. } => (file, None),
            Node::Qcow2(image) => (&image.file, image.data.as_ref()),
        };
        [first].into_iter().chain(other)
    }

    /// The file that guest data is in.
    pub(crate) fn data_file(&self) -> &Arc<dyn Storage> {
        match self {
            Node::Raw { file, .. } => file,
            Node::Qcow2(image) => image.data_file(),
        }
    }
}

/// The links, the top first.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) nodes: Vec<Arc<Node>>,
}

impl Chain {
    /// Opens all of them, and compares what headers declare with what was given.
    pub(crate) fn open(layers: &[Layer], writable: bool, cache_bytes: usize) -> Result<Chain> {
        if layers.len() > MAX_DEPTH {
            return Error::refused(format!("A chain of {} images is longer than {MAX_DEPTH}", layers.len()));
        }
        let slices = cache_bytes / SLICE_BYTES;
        let below = layers.len().saturating_sub(1);
        let rooms = [if below == 0 { slices } else { slices / 2 }, (slices / 2).checked_div(below).unwrap_or(0)];
        let mut nodes = Vec::new();
        for (depth, layer) in layers.iter().enumerate() {
            let top = depth == 0;
            let room = if top { rooms.first() } else { rooms.get(1) }.copied().unwrap_or(0).max(FEWEST_SLICES);
            let node = open(layer, layers.get(depth.saturating_add(1)), writable && top, room);
            nodes.push(Arc::new(node.map_err(|error| within(depth, error))?));
        }
        if nodes.is_empty() { Error::refused("No image was given") } else { Ok(Chain { nodes }) }
    }

    /// Opens one more link, to be put on top of an image of this format.
    pub(crate) fn overlay(layer: &Layer, below: Format, cache_bytes: usize) -> Result<Node> {
        if layer.format != Format::Qcow2 {
            return Error::refused("Only a qcow2 image can be an overlay");
        }
        let below = Layer { format: below, file: Arc::clone(&layer.file), data: None };
        let room = (cache_bytes / SLICE_BYTES / 2).max(FEWEST_SLICES);
        open(layer, Some(&below), true, room)
    }

    /// The file with this number.
    pub(crate) fn file(&self, id: FileId) -> Option<&Arc<dyn Storage>> {
        self.nodes.iter().map(|node| node.data_file()).find(|file| file.id() == id)
    }
}

fn within(depth: usize, error: Error) -> Error {
    match (depth, error) {
        (1.., Error::Refused(why)) => Error::Refused(format!("Backing image {depth} cannot be used: {why}")),
        (_, error) => error,
    }
}

fn open(layer: &Layer, below: Option<&Layer>, writable: bool, room: usize) -> Result<Node> {
    match layer.format {
        Format::Raw => {
            if below.is_some() {
                return Error::refused("A raw image has no backing file, but one was given");
            }
            let len = layer.file.len().map_err(Error::io("Cannot find the size of the image"))?;
            // A disk has whole sectors. Below another image, the rest of the last one still counts.
            let size = if writable { len & !511 } else { len };
            Ok(Node::Raw { file: Arc::clone(&layer.file), size: size.into(), writable })
        }
        Format::Qcow2 => {
            let header = Header::read(&*layer.file)?;
            match (&header.backing, below) {
                (Some(name), None) => return Error::refused(format!("It has the backing file {name:?}, which was not given")),
                (None, Some(_)) => return Error::refused("A backing file was given, but its header knows of none"),
                (Some(_), Some(below)) => {
                    let named = header.backing_format.as_deref().filter(|named| *named != below.format.name());
                    if let Some(named) = named {
                        let given = below.format.name();
                        return Error::refused(format!("Its backing file is {named:?} by its header, but was given as {given}"));
                    }
                }
                (None, None) => {}
            }
            Ok(Node::Qcow2(Box::new(Qcow2::open(layer, header, writable, room)?)))
        }
    }
}
