//! The header, as hostile bytes and as meant. No I/O here but for reading them.

use crate::error::{Error, Result};
use crate::inflate::Method;
use crate::qcow2::geometry::Geometry;
use crate::storage::Storage;

/// The first four bytes.
pub(crate) const MAGIC: u32 = 0x5146_49fb;

pub(crate) const DIRTY: u64 = 1;
pub(crate) const CORRUPT: u64 = 1 << 1;
pub(crate) const EXTERNAL: u64 = 1 << 2;
pub(crate) const COMPRESSION: u64 = 1 << 3;
pub(crate) const EXTENDED: u64 = 1 << 4;
/// Autoclear: the bitmaps are consistent.
pub(crate) const BITMAPS: u64 = 1;
/// Autoclear: the data file can be read without us.
pub(crate) const RAW_EXTERNAL: u64 = 1 << 1;

pub(crate) const EXTENSION_END: u32 = 0;
pub(crate) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
pub(crate) const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Ours, `OBIU`: eight bytes, of which the first is one while a process writes to the image. Others keep it as they find it.
pub(crate) const EXTENSION_IN_USE: u32 = 0x4f42_4955;

/// Clusters from 512 bytes to 2 MiB: what the format, and QEMU, allow.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Most bytes of the header and its extensions that are looked at: the rest of a cluster is a backing file's name.
const MOST: usize = 64 << 10;

/// Most bytes of an L1 table: QEMU's own limit, 4,194,304 entries.
pub(crate) const MAX_L1: u64 = 32 << 20;

/// Most bytes of a refcount table: QEMU's own limit.
pub(crate) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// Most internal snapshots, QEMU's own limit.
pub(crate) const MAX_SNAPSHOTS: u32 = 65_536;

/// Longest name of a backing file, by the format.
pub(crate) const MAX_NAME: u64 = 1023;

/// The header, checked.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    pub(crate) size: u64,
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u64,
    pub(crate) table_offset: u64,
    pub(crate) table_clusters: u64,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Method,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) backing_offset: u64,
    /// Bytes of the name, which need not be text.
    pub(crate) backing_len: u64,
    pub(crate) data_file: Option<String>,
    pub(crate) bitmaps: bool,
    /// Where our mark has its data, and whether it says that the image is in use.
    pub(crate) mark: Option<(u64, bool)>,
    /// Where the extensions end: the offset of the end marker.
    pub(crate) extensions_end: u64,
}

/// Bytes that may be too few. What is not there is an error.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let end = at.saturating_add(N);
        let found = self.0.get(at..end).and_then(|bytes| <[u8; N]>::try_from(bytes).ok());
        found.ok_or_else(|| Error::Refused("It is too short to be a qcow2 image".into()))
    }

    fn u32(&self, at: u64) -> Result<u32> {
        self.take(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: u64) -> Result<u64> {
        self.take(at).map(u64::from_be_bytes)
    }

    fn text(&self, at: u64, len: u64) -> Result<String> {
        let range = at.checked_add(len).and_then(|end| Some(usize::try_from(at).ok()?..usize::try_from(end).ok()?));
        let bytes = range.and_then(|range| self.0.get(range));
        let bytes = bytes.ok_or_else(|| Error::Refused("A name in its header is outside of the header".into()))?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }
}

impl Header {
    /// Reads and checks the header of a file.
    pub(crate) fn read(file: &dyn Storage) -> Result<Header> {
        let len = file.len().map_err(Error::io("Cannot find the size of the image"))?;
        let most = usize::try_from(len).unwrap_or(usize::MAX).min(MOST);
        let mut bytes = vec![0; most];
        file.read_padded(&mut bytes, 0).map_err(Error::io("Cannot read the header of the image"))?;
        Header::parse(&bytes, len)
    }

    /// The header that these bytes are the beginning of, in a file of so many.
    pub(crate) fn parse(bytes: &[u8], file_len: u64) -> Result<Header> {
        let b = Bytes(bytes);
        if b.u32(0)? != MAGIC {
            return Error::refused("It is not a qcow2 image");
        }
        let version = b.u32(4)?;
        if !(2..=3).contains(&version) {
            return Error::refused(format!("Its qcow2 version is {version}; 2 and 3 are known"));
        }
        let v3 = version == 3;
        let header_length = if v3 { u64::from(b.u32(100)?) } else { 72 };
        if v3 && (header_length < 104 || !header_length.is_multiple_of(8)) {
            return Error::refused(format!("Its header claims a length of {header_length} bytes, which no header has"));
        }
        let number = |at| if v3 { b.u64(at) } else { Ok(0) };
        let incompatible = number(72)?;
        let geometry = geometry(&b, v3, incompatible)?;
        if header_length > geometry.cluster_size() {
            return Error::refused("Its header is longer than a cluster");
        }
        let compression = compression(&b, incompatible, header_length)?;
        let mut header = Header {
            version,
            geometry,
            size: b.u64(24)?,
            l1_offset: b.u64(40)?,
            l1_size: b.u32(36)?.into(),
            table_offset: b.u64(48)?,
            table_clusters: b.u32(56)?.into(),
            snapshots: b.u32(60)?,
            snapshots_offset: b.u64(64)?,
            incompatible,
            autoclear: number(88)?,
            compression,
            backing: None,
            backing_format: None,
            backing_offset: 0,
            backing_len: 0,
            data_file: None,
            bitmaps: false,
            mark: None,
            extensions_end: header_length,
        };
        header.backing_name(&b)?;
        header.extensions(&b, header_length)?;
        header.check(file_len)?;
        Ok(header)
    }

    fn backing_name(&mut self, b: &Bytes<'_>) -> Result<()> {
        let (offset, len) = (b.u64(8)?, u64::from(b.u32(16)?));
        if offset == 0 || len == 0 {
            return Ok(());
        }
        if len > MAX_NAME || offset.saturating_add(len) > self.geometry.cluster_size() {
            return Error::refused("The name of its backing file is longer than the format allows");
        }
        (self.backing, self.backing_offset, self.backing_len) = (Some(b.text(offset, len)?), offset, len);
        Ok(())
    }

    fn extensions(&mut self, b: &Bytes<'_>, start: u64) -> Result<()> {
        let end = if self.backing_offset > start { self.backing_offset } else { self.geometry.cluster_size() };
        let mut at = start;
        while at.saturating_add(8) <= end {
            let (Ok(kind), Ok(len)) = (b.u32(at), b.u32(at.saturating_add(4))) else { break };
            if kind == EXTENSION_END {
                break;
            }
            let (data, len) = (at.saturating_add(8), u64::from(len));
            if data.saturating_add(len) > end {
                return Error::refused("An extension of its header is longer than the header");
            }
            match kind {
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(b.text(data, len)?),
                EXTENSION_DATA_FILE => self.data_file = Some(b.text(data, len)?),
                EXTENSION_BITMAPS => self.bitmaps = true,
                EXTENSION_IN_USE if len == 8 => self.mark = Some((data, b.take::<1>(data)? != [0])),
                _ => {}
            }
            at = data.saturating_add(len.next_multiple_of(8));
        }
        self.extensions_end = at;
        Ok(())
    }

    /// What has to be true before any table is read: above all that no table is larger than the file can hold.
    fn check(&self, file_len: u64) -> Result<()> {
        let g = &self.geometry;
        let (size, entries) = (self.size, g.l1_entries(self.size));
        if self.l1_size < entries || size > (1 << 62) {
            return Error::refused(format!("Its L1 table has {} entries, but {entries} are needed for its size", self.l1_size));
        }
        let l1 = self.l1_size.saturating_mul(8);
        let table = g.start(self.table_clusters);
        let inside = |offset: u64, len: u64| g.is_aligned(offset) && offset != 0 && offset.saturating_add(len) <= file_len;
        let beyond = self.table_offset.saturating_add(table) > g.start(g.clusters(file_len));
        if l1 > MAX_L1 || (l1 > 0 && !inside(self.l1_offset, l1)) {
            return Error::refused("Its L1 table is outside of the file, or larger than 32 MiB");
        }
        if self.table_clusters == 0 || table > MAX_REFCOUNT_TABLE.max(g.cluster_size()) || !inside(self.table_offset, 8) || beyond
        {
            return Error::refused("Its refcount table is outside of the file, or larger than 8 MiB");
        }
        if self.snapshots > MAX_SNAPSHOTS || (self.snapshots > 0 && !inside(self.snapshots_offset, 40)) {
            return Error::refused("Its snapshot table is outside of the file, or has more than 65,536 snapshots");
        }
        if self.autoclear & RAW_EXTERNAL != 0 && (!g.external || self.backing.is_some()) {
            return Error::refused("Its data file is declared to be raw, which does not go with the rest of its header");
        }
        Ok(())
    }

    /// Whether guests may be served from this image.
    pub(crate) fn usable(&self) -> Result<()> {
        if self.incompatible & DIRTY != 0 {
            return Error::refused(
                "It is marked dirty: its refcounts may be wrong; repair it with `outboard image check --repair`",
            );
        }
        if self.incompatible & CORRUPT != 0 {
            return Error::refused("It is marked corrupt; `outboard image check` says what is wrong");
        }
        Ok(())
    }

    /// Whether the data file can be read without the image, and has to stay so.
    pub(crate) fn is_raw_external(&self) -> bool {
        self.autoclear & RAW_EXTERNAL != 0
    }
}

fn geometry(b: &Bytes<'_>, v3: bool, incompatible: u64) -> Result<Geometry> {
    let known = DIRTY | CORRUPT | EXTERNAL | COMPRESSION | EXTENDED;
    if incompatible & !known != 0 {
        return Error::refused(format!("It has features that are not known here (bits {:#x})", incompatible & !known));
    }
    match b.u32(32)? {
        0 => {}
        1 | 2 => return Error::refused("It is encrypted, which is not supported"),
        other => return Error::refused(format!("Its encryption method {other} is not known")),
    }
    let (cluster_bits, refcount_order) = (b.u32(20)?, if v3 { b.u32(96)? } else { 4 });
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Error::refused(format!("Its clusters have 2^{cluster_bits} bytes; 512 bytes to 2 MiB are possible"));
    }
    if refcount_order > 6 {
        return Error::refused(format!("Its refcounts have 2^{refcount_order} bits; at most 64 are possible"));
    }
    let extended = incompatible & EXTENDED != 0;
    if extended && cluster_bits < 14 {
        return Error::refused("It has extended L2 entries with clusters smaller than 16 KiB");
    }
    Ok(Geometry { cluster_bits, refcount_order, extended, external: incompatible & EXTERNAL != 0, zeroes: v3 })
}

fn compression(b: &Bytes<'_>, incompatible: u64, header_length: u64) -> Result<Method> {
    let byte = if header_length > 104 { u8::from_be_bytes(b.take(104)?) } else { 0 };
    match (incompatible & COMPRESSION != 0, byte) {
        (false, 0) => Ok(Method::Deflate),
        (true, 1) => Ok(Method::Zstd),
        _ => Error::refused(format!("Its compression type {byte} is not known, or not declared as it should be")),
    }
}
