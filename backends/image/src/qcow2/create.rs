//! Makes an empty image: a header, a refcount table with its first blocks, and an empty L1 table.

use crate::error::{Error, Result};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{
    CLUSTER_BITS, EXTENDED, EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE, EXTENSION_IN_USE, EXTERNAL, MAGIC, MAX_L1, MAX_NAME,
};
use crate::qcow2::refcounts;
use crate::storage::Storage;

/// Header bytes of version 3, with the compression type and its padding.
const HEADER_3: u32 = 112;

/// What an image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Bytes of the disk.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Clusters have 32 subclusters.
    pub extended_l2: bool,
    /// The name of the backing file, and its format.
    pub backing: Option<(String, String)>,
    /// The name of the file that data goes to.
    pub data_file: Option<String>,
}

impl Default for Create {
    fn default() -> Create {
        Create {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            extended_l2: false,
            backing: None,
            data_file: None,
        }
    }
}

impl Create {
    fn geometry(&self) -> Result<Geometry> {
        let (bits, order) = (self.cluster_size.trailing_zeros(), self.refcount_bits.trailing_zeros());
        if !self.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return Error::refused("The size of a cluster is a power of two from 512 bytes to 2 MiB");
        }
        if !self.refcount_bits.is_power_of_two() || order > 6 {
            return Error::refused("The width of a refcount is 1, 2, 4, 8, 16, 32 or 64 bits");
        }
        if !self.size.is_multiple_of(512) {
            return Error::refused("The size of a disk is a multiple of 512 bytes");
        }
        let plain = self.refcount_bits == 16 && !self.extended_l2 && self.data_file.is_none();
        match self.version {
            2 if plain => {}
            2 => return Error::refused("A version 2 image has refcounts of 16 bits, and neither subclusters nor a data file"),
            3 => {}
            other => return Error::refused(format!("There is no qcow2 version {other}; 2 and 3 are known")),
        }
        if self.extended_l2 && bits < 14 {
            return Error::refused("Extended L2 entries need clusters of at least 16 KiB");
        }
        let external = self.data_file.is_some();
        Ok(Geometry {
            cluster_bits: bits,
            refcount_order: order,
            extended: self.extended_l2,
            external,
            zeroes: self.version == 3,
        })
    }

    /// The first cluster.
    fn header(&self, geometry: &Geometry, layout: &Layout) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        let features = if self.extended_l2 { EXTENDED } else { 0 } | if self.data_file.is_some() { EXTERNAL } else { 0 };
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(self.version.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.extend(geometry.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(u32::try_from(layout.l1_entries).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(geometry.start(layout.l1).to_be_bytes());
        bytes.extend(geometry.start(1).to_be_bytes());
        bytes.extend(u32::try_from(layout.table).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend([0; 12]);
        if self.version == 3 {
            bytes.extend(features.to_be_bytes());
            bytes.extend([0; 16]);
            bytes.extend(geometry.refcount_order.to_be_bytes());
            bytes.extend(HEADER_3.to_be_bytes());
            bytes.extend([0; 8]);
        }
        if let Some((_, format)) = &self.backing {
            extension(&mut bytes, EXTENSION_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extension(&mut bytes, EXTENSION_DATA_FILE, name.as_bytes());
        }
        extension(&mut bytes, EXTENSION_IN_USE, &[0; 8]);
        bytes.extend([0; 8]);
        if let Some((name, _)) = &self.backing {
            if name.is_empty() || name.len() as u64 > MAX_NAME {
                return Error::refused("The name of a backing file has 1 to 1023 bytes");
            }
            let at = bytes.len() as u64;
            bytes.extend(name.as_bytes());
            let fields = [&at.to_be_bytes()[..], &u32::try_from(name.len()).unwrap_or(0).to_be_bytes()[..]].concat();
            bytes.iter_mut().skip(8).zip(fields).for_each(|(byte, field)| *byte = field);
        }
        if bytes.len() as u64 > geometry.cluster_size() {
            return Error::refused("The names do not fit into the first cluster; a larger cluster size has room for them");
        }
        Ok(bytes)
    }
}

fn extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// Which clusters hold what: the header, then the refcount table, its blocks, and the L1 table.
struct Layout {
    table: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
    end: u64,
}

impl Layout {
    fn of(geometry: &Geometry, size: u64) -> Layout {
        // QEMU does not open a disk of no bytes that has no L1 table at all.
        let l1_entries = geometry.l1_entries(size).max(1);
        let l1 = geometry.clusters(l1_entries.saturating_mul(8));
        let per_block = 1_u64.checked_shl(geometry.block_bits()).unwrap_or(1);
        let (mut table, mut blocks) = (1_u64, 1_u64);
        loop {
            let end = 1_u64.saturating_add(table).saturating_add(blocks).saturating_add(l1);
            let needed = end.div_ceil(per_block);
            let room = geometry.clusters(needed.saturating_mul(8));
            if needed <= blocks && room <= table {
                return Layout { table, blocks, l1: end.saturating_sub(l1), l1_entries, end };
            }
            (table, blocks) = (table.max(room), blocks.max(needed));
        }
    }
}

/// Makes an empty image of a file that has nothing in it.
///
/// # Errors
/// When the file is not empty, when such an image cannot be, or the system's.
pub fn create(file: &dyn Storage, options: &Create) -> Result<()> {
    let geometry = options.geometry()?;
    if geometry.l1_entries(options.size).saturating_mul(8) > MAX_L1 {
        return Error::refused("Such a disk would need an L1 table of more than 32 MiB; larger clusters make it smaller");
    }
    let layout = Layout::of(&geometry, options.size);
    let header = options.header(&geometry, &layout)?;
    if !file.is_empty().map_err(Error::io("Cannot find the size of the new image"))? {
        return Error::refused("The file is not empty");
    }
    let write = |bytes: &[u8], at: u64| file.write_at(bytes, at).map_err(Error::io("Cannot write the new image"));
    file.set_len(geometry.start(layout.end)).map_err(Error::io("Cannot write the new image"))?;
    let first_block = 1_u64.saturating_add(layout.table);
    for number in 0..layout.blocks {
        let block = geometry.start(first_block.saturating_add(number));
        write(&block.to_be_bytes(), geometry.start(1).saturating_add(number.saturating_mul(8)))?;
        write(&counts(&geometry, number, layout.end), block)?;
    }
    // The header at last: what has none is not an image.
    file.sync().map_err(Error::io("Cannot make the new image durable"))?;
    write(&header, 0)?;
    file.sync().map_err(Error::io("Cannot make the new image durable"))
}

/// The refcounts of a block: one for each cluster before `end`.
fn counts(geometry: &Geometry, block: u64, end: u64) -> Vec<u8> {
    let per_block = 1_u64.checked_shl(geometry.block_bits()).unwrap_or(1);
    let used = end.saturating_sub(block.saturating_mul(per_block)).min(per_block);
    let mut bytes = vec![0; usize::try_from(geometry.cluster_size()).unwrap_or(0)];
    for number in 0..used {
        refcounts::write(&mut bytes, geometry.refcount_order, number, 1);
    }
    bytes
}
