//! The arithmetic, at its edges.

use super::*;

const PLAIN: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended: false, external: false, zeroes: true };

#[test]
fn clusters_and_tables() {
    assert_eq!((PLAIN.cluster_size(), PLAIN.clusters(1), PLAIN.clusters(65536), PLAIN.clusters(65537)), (65536, 1, 1, 2));
    assert_eq!((PLAIN.l1_entries(1 << 40), PLAIN.l1_index(8192), PLAIN.block_bits()), (2048, 1, 15));
    assert_eq!((PLAIN.slice_of(511), PLAIN.slice_of(512)), ((0, 511), (1, 0)));
    assert_eq!((PLAIN.l1_of_slice(15), PLAIN.l1_of_slice(16)), ((0, 15 * 4096), (1, 0)));
    let tiny = Geometry { cluster_bits: 9, refcount_order: 6, ..PLAIN };
    assert_eq!((tiny.slice_size(), tiny.slice_of(64), tiny.l1_of_slice(1), tiny.block_bits()), (512, (1, 0), (1, 0), 6));
    let extended = Geometry { extended: true, ..PLAIN };
    assert_eq!((extended.slice_of(256), extended.l1_of_slice(16), extended.l1_index(4096)), ((1, 0), (1, 0), 1));
    assert_eq!((PLAIN.max_refcount(), tiny.max_refcount()), (65535, u64::MAX));
}

#[test]
fn nothing_overflows() {
    for bits in [9, 16, 21] {
        let geometry = Geometry { cluster_bits: bits, extended: bits > 9, ..PLAIN };
        for value in [0, 1, u64::MAX / 2, u64::MAX] {
            let _all = (geometry.cluster(value), geometry.start(value), geometry.clusters(value), geometry.l1_entries(value));
            let _more =
                (geometry.slice_of(value), geometry.l1_of_slice(value), geometry.compressed(value), geometry.l1_index(value));
            let entry = Entry { word: value, bitmap: !value };
            let _kind = (entry.kind(&geometry), entry.piece(&geometry, 0, value), geometry.subclusters(value, value));
        }
    }
}

#[test]
fn a_compressed_cluster_has_an_offset_and_sectors() {
    // 54 bits of offset, then the number of further sectors.
    let word = COMPRESSED | (3 << 54) | 0x12345;
    assert_eq!(PLAIN.compressed(word), (0x12345, 4 * 512 - (0x12345 & 511)));
    assert_eq!(Entry { word, bitmap: 0 }.kind(&PLAIN), Kind::Compressed);
    assert_eq!(Entry { word: word | COPIED, bitmap: 0 }.kind(&PLAIN), Kind::Bad);
}

#[test]
fn entries_say_one_thing() {
    let kind = |word| Entry { word, bitmap: 0 }.kind(&PLAIN);
    assert_eq!((kind(0), kind(ZERO), kind(ZERO | 0x10000)), (Kind::Unallocated, Kind::Zero(None), Kind::Zero(Some(0x10000))));
    assert_eq!((kind(0x10000 | COPIED), kind(0x10000), kind(COPIED)), (Kind::Data(0x10000), Kind::Data(0x10000), Kind::Bad));
    assert_eq!((kind(0x10200), kind(0x10000 | 2), kind(1 << 56)), (Kind::Bad, Kind::Bad, Kind::Bad));
    let old = Geometry { zeroes: false, ..PLAIN };
    assert_eq!(Entry { word: ZERO, bitmap: 0 }.kind(&old), Kind::Bad);
    let external = Geometry { external: true, ..PLAIN };
    assert_eq!(Entry { word: COPIED, bitmap: 0 }.kind(&external), Kind::Data(0));
}

#[test]
fn subclusters_are_told_apart() {
    let geometry = Geometry { extended: true, ..PLAIN };
    assert_eq!((geometry.subclusters(0, 1), geometry.subclusters(2047, 2), geometry.subclusters(0, 65536)), (1, 3, ALL_DATA));
    let entry = Entry { word: 0x10000 | COPIED, bitmap: 0b11 | (1 << (32 + 2)) };
    assert_eq!(entry.piece(&geometry, 512, 65024), Some((Piece::Data(0x10200), 4096 - 512)));
    assert_eq!(entry.piece(&geometry, 4096, 61440), Some((Piece::Zero, 2048)));
    assert_eq!(entry.piece(&geometry, 6144, 59392), Some((Piece::Backing, 59392)));
    let both = Entry { bitmap: 1 | (1 << 32), ..entry };
    assert_eq!(both.piece(&geometry, 0, 512), None);
}
