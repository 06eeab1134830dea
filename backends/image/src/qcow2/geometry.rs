//! The arithmetic of an image: clusters, tables, and what an entry of an L2 table says.

/// Bit 63 of an L1 or L2 entry: the refcount of what it points at is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry, version 3.
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55: an offset.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In memory only: an entry that was found to be impossible. No valid entry is both compressed and copied.
pub(crate) const BAD: u64 = COPIED | COMPRESSED;
/// All subclusters read as zeroes.
pub(crate) const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;
/// All subclusters have data.
pub(crate) const ALL_DATA: u64 = 0xffff_ffff;

/// Bytes of a piece of an L2 table, or of a refcount block, as it is kept in memory: a page.
pub(crate) const SLICE: u64 = 4096;
/// The same, for arrays.
pub(crate) const SLICE_BYTES: usize = 4096;

/// The numbers everything else is computed from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    pub(crate) extended: bool,
    /// Data is in another file, at the guest's own offsets.
    pub(crate) external: bool,
    /// Version 3: there are zero clusters.
    pub(crate) zeroes: bool,
}

/// An entry of an L2 table; the bitmap only with extended entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) word: u64,
    pub(crate) bitmap: u64,
}

/// What an entry says of the whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The backing file has it, or it is zeroes.
    Unallocated,
    /// Zeroes. There may be a host cluster in reserve for it.
    Zero(Option<u64>),
    /// A host cluster; with extended entries the bitmap says for what.
    Data(u64),
    /// Bytes somewhere.
    Compressed,
    /// Impossible.
    Bad,
}

/// What an entry says of some bytes of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// They are at this host offset.
    Data(u64),
    /// They are zeroes.
    Zero,
    /// The backing file has them.
    Backing,
    /// The cluster is compressed: its entry.
    Compressed(u64),
}

impl Geometry {
    pub(crate) fn cluster_size(&self) -> u64 {
        1_u64.checked_shl(self.cluster_bits).unwrap_or(u64::MAX)
    }

    /// The number of the cluster a byte is in.
    pub(crate) fn cluster(&self, offset: u64) -> u64 {
        offset.checked_shr(self.cluster_bits).unwrap_or(0)
    }

    /// The first byte of a cluster.
    pub(crate) fn start(&self, cluster: u64) -> u64 {
        cluster.saturating_mul(self.cluster_size())
    }

    /// Where in its cluster a byte is.
    pub(crate) fn within(&self, offset: u64) -> u64 {
        offset & self.cluster_size().saturating_sub(1)
    }

    /// Clusters that so many bytes need.
    pub(crate) fn clusters(&self, bytes: u64) -> u64 {
        self.cluster(bytes.saturating_add(self.cluster_size().saturating_sub(1)))
    }

    pub(crate) fn is_aligned(&self, offset: u64) -> bool {
        self.within(offset) == 0
    }

    /// Bytes of an L2 entry.
    pub(crate) fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table, as a power of two.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits.saturating_sub(if self.extended { 4 } else { 3 })
    }

    /// Bytes of a slice.
    pub(crate) fn slice_size(&self) -> u64 {
        self.cluster_size().min(SLICE)
    }

    /// Entries of a slice, as a power of two.
    pub(crate) fn slice_bits(&self) -> u32 {
        self.l2_bits().min(if self.extended { 8 } else { 9 })
    }

    /// The slice a guest cluster's entry is in, counted over the whole disk, and its place there.
    pub(crate) fn slice_of(&self, cluster: u64) -> (u64, usize) {
        let bits = self.slice_bits();
        let mask = 1_u64.checked_shl(bits).unwrap_or(1).saturating_sub(1);
        (cluster.checked_shr(bits).unwrap_or(0), usize::try_from(cluster & mask).unwrap_or(0))
    }

    /// The L1 entry of a slice, and the first byte of the slice in its L2 table.
    pub(crate) fn l1_of_slice(&self, slice: u64) -> (usize, u64) {
        let bits = self.l2_bits().saturating_sub(self.slice_bits());
        let mask = 1_u64.checked_shl(bits).unwrap_or(1).saturating_sub(1);
        let l1 = usize::try_from(slice.checked_shr(bits).unwrap_or(0)).unwrap_or(usize::MAX);
        (l1, (slice & mask).saturating_mul(self.slice_size()))
    }

    /// The L1 entry of a guest cluster.
    pub(crate) fn l1_index(&self, cluster: u64) -> usize {
        usize::try_from(cluster.checked_shr(self.l2_bits()).unwrap_or(0)).unwrap_or(usize::MAX)
    }

    /// L1 entries that so many bytes of disk need.
    pub(crate) fn l1_entries(&self, bytes: u64) -> u64 {
        let table = 1_u64.checked_shl(self.l2_bits()).unwrap_or(1);
        self.clusters(bytes).div_ceil(table.max(1))
    }

    /// Refcounts of a block, as a power of two.
    pub(crate) fn block_bits(&self) -> u32 {
        self.cluster_bits.saturating_add(3).saturating_sub(self.refcount_order)
    }

    /// The largest refcount.
    pub(crate) fn max_refcount(&self) -> u64 {
        let bits = 1_u32.checked_shl(self.refcount_order).unwrap_or(64);
        if bits >= 64 { u64::MAX } else { 1_u64.checked_shl(bits).unwrap_or(1).saturating_sub(1) }
    }

    /// Bytes of a subcluster, or of a cluster where there are none.
    pub(crate) fn subcluster_size(&self) -> u64 {
        if self.extended { self.cluster_size() >> 5 } else { self.cluster_size() }
    }

    /// The bits of the subclusters that some bytes of a cluster touch.
    pub(crate) fn subclusters(&self, within: u64, len: u64) -> u64 {
        let bits = self.cluster_bits.saturating_sub(5);
        let first = within.checked_shr(bits).unwrap_or(0).min(31);
        let last = within.saturating_add(len.max(1)).saturating_sub(1).checked_shr(bits).unwrap_or(0).min(31);
        let below = |bit: u64| u32::try_from(bit).ok().and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0).saturating_sub(1);
        below(last.saturating_add(1)) & !below(first)
    }

    /// Where a compressed cluster's bytes are: the first one, and how many there may be.
    pub(crate) fn compressed(&self, word: u64) -> (u64, u64) {
        let bits = 62_u32.saturating_sub(self.cluster_bits.saturating_sub(8));
        let mask = 1_u64.checked_shl(bits).unwrap_or(1).saturating_sub(1);
        let offset = word & mask;
        let sectors = (word & (COMPRESSED.saturating_sub(1))).checked_shr(bits).unwrap_or(0).saturating_add(1);
        (offset, sectors.saturating_mul(512).saturating_sub(offset & 511))
    }
}

impl Entry {
    pub(crate) const NONE: Entry = Entry { word: 0, bitmap: 0 };
    pub(crate) const BAD: Entry = Entry { word: BAD, bitmap: 0 };

    /// A cluster of ours: refcount one, all of it data.
    pub(crate) fn data(host: u64, geometry: &Geometry) -> Entry {
        Entry { word: host | COPIED, bitmap: if geometry.extended { ALL_DATA } else { 0 } }
    }

    /// Explicit zeroes, without a host cluster. `None` where the format has no way to say it.
    pub(crate) fn zeroes(geometry: &Geometry) -> Option<Entry> {
        match (geometry.zeroes, geometry.extended) {
            (false, _) => None,
            (true, false) => Some(Entry { word: ZERO, bitmap: 0 }),
            (true, true) => Some(Entry { word: 0, bitmap: ALL_ZERO }),
        }
    }

    pub(crate) fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    pub(crate) fn kind(self, geometry: &Geometry) -> Kind {
        let copied = self.is_copied();
        if self.word & COMPRESSED != 0 {
            return if copied || geometry.external { Kind::Bad } else { Kind::Compressed };
        }
        let host = self.word & OFFSET;
        let zero = self.word & ZERO != 0;
        let reserved = self.word & !(OFFSET | COPIED | ZERO) != 0;
        if reserved || !geometry.is_aligned(host) || (zero && (!geometry.zeroes || geometry.extended)) {
            return Kind::Bad;
        }
        let present = host != 0 || (copied && geometry.external);
        if !present && copied {
            return Kind::Bad;
        }
        match (geometry.extended, present, zero) {
            (true, _, _) if (self.bitmap >> 32) & self.bitmap & ALL_DATA != 0 => Kind::Bad,
            (true, false, _) if self.bitmap & ALL_DATA != 0 => Kind::Bad,
            (true, false, _) if self.bitmap == ALL_ZERO => Kind::Zero(None),
            (_, true, true) => Kind::Zero(Some(host)),
            (_, false, true) => Kind::Zero(None),
            (_, true, false) => Kind::Data(host),
            (_, false, false) => Kind::Unallocated,
        }
    }

    /// What some bytes of the cluster are, and for how many of them that holds.
    pub(crate) fn piece(self, geometry: &Geometry, within: u64, len: u64) -> Option<(Piece, u64)> {
        let len = len.min(geometry.cluster_size().saturating_sub(within));
        let kind = self.kind(geometry);
        if geometry.extended && matches!(kind, Kind::Data(_) | Kind::Unallocated) {
            return self.subclusters(geometry, within, len);
        }
        let piece = match kind {
            Kind::Unallocated => Piece::Backing,
            Kind::Zero(_) => Piece::Zero,
            Kind::Data(host) => Piece::Data(host.saturating_add(within)),
            Kind::Compressed => Piece::Compressed(self.word),
            Kind::Bad => return None,
        };
        Some((piece, len))
    }

    fn subclusters(self, geometry: &Geometry, within: u64, len: u64) -> Option<(Piece, u64)> {
        let host = self.word & OFFSET;
        let state = |at: u64| {
            let bit = geometry.subclusters(at, 1);
            (self.bitmap & bit != 0, (self.bitmap >> 32) & bit != 0)
        };
        let first = state(within);
        let size = geometry.subcluster_size();
        let end = within.saturating_add(len);
        let mut next = within.checked_div(size).unwrap_or(0).saturating_add(1).saturating_mul(size);
        while next < end && state(next) == first {
            next = next.saturating_add(size);
        }
        let piece = match first {
            (true, _) => Piece::Data(host.saturating_add(within)),
            (_, true) => Piece::Zero,
            _ => Piece::Backing,
        };
        Some((piece, next.min(end).saturating_sub(within)))
    }
}

#[cfg(test)]
mod tests;
