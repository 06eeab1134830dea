//! Images made to hurt: nothing panics, nothing is written where metadata is, nothing takes memory without end.

use std::sync::Arc;

use image::{Create, Error, Format, Image, Info, Layer, Options, Storage, check, create};

use crate::support::{Model, Ram, Seeded, read_all, step};

const CLUSTER: usize = 65536;

/// An image with one cluster of data: header, refcount table, its block, L1, L2, data.
fn ordinary() -> Vec<u8> {
    let ram = Ram::new(Vec::new());
    create(&*ram, &Create { size: 1 << 30, ..Create::default() }).unwrap();
    let image = Image::open(&[layer(&ram)], Options::default()).unwrap();
    image.lookup().write(&[7; 512], 0).unwrap();
    image.close().unwrap();
    let bytes = ram.bytes();
    assert_eq!(bytes.len(), 6 * CLUSTER);
    bytes
}

fn layer(ram: &Arc<Ram>) -> Layer {
    Layer { format: Format::Qcow2, file: ram.clone(), data: None }
}

fn with(patches: &[(usize, &[u8])]) -> Arc<Ram> {
    let mut bytes = ordinary();
    for (at, patch) in patches {
        bytes[*at..*at + patch.len()].copy_from_slice(patch);
    }
    Ram::new(bytes)
}

fn refused(what: &str, patches: &[(usize, &[u8])]) {
    let ram = with(patches);
    for writable in [false, true] {
        let opened = Image::open(&[layer(&ram)], Options { writable, ..Options::default() });
        assert!(matches!(opened, Err(Error::Refused(_) | Error::Corrupt(_))), "{what}: {opened:?}");
    }
    // Whatever the others say, they say something.
    drop(Info::read(Format::Qcow2, &*ram));
    drop(check(&(ram as Arc<dyn Storage>), true));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let be = |number: u64| number.to_be_bytes();
    refused("no magic", &[(0, b"QFI ")]);
    refused("version 4", &[(7, &[4])]);
    refused("clusters of 8 bytes", &[(23, &[3])]);
    refused("clusters of 2^63 bytes", &[(23, &[63])]);
    refused("refcounts of 2^63 bits", &[(99, &[63])]);
    refused("a header longer than a cluster", &[(100, &[0xff, 0xff, 0xff, 0xf8])]);
    refused("a header shorter than a header", &[(103, &[8])]);
    refused("2^63 bytes", &[(24, &be(1 << 63))]);
    refused("an L1 table that is too short", &[(24, &be(1 << 40))]);
    refused("an L1 table of 32 GiB", &[(36, &[0xff; 4])]);
    refused("an L1 table beyond the end", &[(40, &be(1 << 50))]);
    refused("an L1 table in the middle of a cluster", &[(40, &be(CLUSTER as u64 * 3 + 512))]);
    refused("an L1 table in the header", &[(40, &be(0))]);
    refused("a refcount table beyond the end", &[(48, &be(1 << 50))]);
    refused("a refcount table of 2^32 clusters", &[(56, &[0xff; 4])]);
    refused("no refcount table", &[(56, &[0; 4])]);
    refused("2^32 snapshots", &[(60, &[0xff; 4]), (64, &be(CLUSTER as u64 * 3))]);
    refused("a snapshot table beyond the end", &[(63, &[1]), (64, &be(1 << 50))]);
    refused("a snapshot with an L1 table of 32 GiB", &[(63, &[1]), (64, &be(3 * CLUSTER as u64)), (3 * CLUSTER + 8, &[0xff; 8])]);
    refused("a name beyond the cluster", &[(8, &be(CLUSTER as u64 - 4)), (19, &[200])]);
    refused("an extension beyond the cluster", &[(116, &[0xff; 4])]);
    refused("extended entries in small clusters", &[(79, &[0x10]), (23, &[13])]);
    refused("a compression nobody knows", &[(79, &[8]), (104, &[9])]);
    refused("a raw data file without a data file", &[(95, &[2])]);
}

#[test]
fn headers_cut_short_are_refused() {
    let bytes = ordinary();
    for len in (0..200).chain([511, 512, 4096, CLUSTER - 1, CLUSTER, CLUSTER * 2]) {
        let ram = Ram::new(bytes[..len].to_vec());
        assert!(Image::open(&[layer(&ram)], Options::default()).is_err(), "{len} bytes");
        drop(check(&(ram as Arc<dyn Storage>), true));
    }
}

/// Mappings that lead into metadata or nowhere: that request fails, and nothing is written any more.
#[test]
fn mappings_that_cannot_be_are_errors_and_end_all_writing() {
    let copied = 1_u64 << 63;
    let cluster = CLUSTER as u64;
    let entries = [
        ("the header", copied),
        ("the refcount table", cluster | copied),
        ("a refcount block", (2 * cluster) | copied),
        ("the L1 table", (3 * cluster) | copied),
        ("its own table", (4 * cluster) | copied),
        ("the middle of a cluster", (5 * cluster + 512) | copied),
        ("beyond the end", (100 * cluster) | copied),
        ("far beyond the end", 0x00ff_ffff_ffff_0000 | copied),
        ("reserved bits", (5 * cluster) | copied | 4),
        ("compressed and copied", copied | (1 << 62) | (5 * cluster)),
        ("compressed beyond the end", (1 << 62) | (100 * cluster)),
    ];
    for (what, entry) in entries {
        let ram = with(&[(4 * CLUSTER, &entry.to_be_bytes())]);
        let image = Image::open(&[layer(&ram)], Options::default()).unwrap();
        let mut lookup = image.lookup();
        assert!(lookup.read(&mut [0; 512], 0).is_err(), "{what}");
        let before = ram.bytes();
        assert!(lookup.write(&[1; 512], 0).is_err(), "{what}");
        assert!(lookup.write(&[1; 512], 1 << 20).is_err(), "{what}: elsewhere");
        assert!(lookup.zero(0, 1 << 20, true).is_err(), "{what}: zeroes");
        assert!(ram.bytes() == before, "{what}: something was written");
        assert!(lookup.read(&mut [0; 512], 1 << 20).is_ok(), "{what}: what is sound can be read");
        assert!(!check(&(ram as Arc<dyn Storage>), false).unwrap().errors.is_empty(), "{what}");
    }
}

#[test]
fn tables_that_cannot_be_are_errors_and_end_all_writing() {
    let copied = 1_u64 << 63;
    let cluster = CLUSTER as u64;
    let patches = [
        ("an L2 table in the header", 3 * CLUSTER, copied),
        ("an L2 table in the refcount table", 3 * CLUSTER, cluster | copied),
        ("an L2 table in the L1 table", 3 * CLUSTER, (3 * cluster) | copied),
        ("an L2 table beyond the end", 3 * CLUSTER, (9 * cluster) | copied),
        ("an L2 table in the middle of a cluster", 3 * CLUSTER, (4 * cluster + 512) | copied),
        ("one L2 table twice", 3 * CLUSTER + 8, (4 * cluster) | copied),
        ("a refcount block in the header's place, by a bit", CLUSTER, 4),
        ("a refcount block beyond the end", CLUSTER, 1 << 40),
        ("a refcount block in the L1 table", CLUSTER, 3 * cluster),
        ("a refcount block in the refcount table", CLUSTER, cluster),
    ];
    for (what, at, word) in patches {
        let ram = with(&[(at, &word.to_be_bytes())]);
        let Ok(image) = Image::open(&[layer(&ram)], Options::default()) else { continue };
        let mut lookup = image.lookup();
        let before = ram.bytes();
        assert!(lookup.write(&[1; 512], 600 << 20).is_err(), "{what}");
        // The mark in the header may have been set before it was noticed.
        assert!(ram.bytes()[CLUSTER..before.len()] == before[CLUSTER..], "{what}: something was written");
        drop(lookup.read(&mut [0; 512], 0));
        assert!(!check(&(ram as Arc<dyn Storage>), false).unwrap().errors.is_empty(), "{what}");
    }
}

/// A file that is nothing but long.
#[test]
fn a_length_alone_takes_no_memory() {
    let path = std::env::temp_dir().join(format!("outboard-image-long-{}", std::process::id()));
    std::fs::write(&path, ordinary()).unwrap();
    let long = crate::support::file(&path);
    std::fs::remove_file(path).unwrap();
    long.set_len(15 << 40).unwrap();
    assert!(check(&long, false).unwrap().is_clean());
    long.write_at(&[1], 120).unwrap();
    long.write_at(&[9], 23).unwrap();
    assert!(check(&long, true).is_err());
    drop(Image::open(&[Layer { format: Format::Qcow2, file: long, data: None }], Options::default()));
}

/// A refcount of zero for what is in use: it is never given out again while this process knows better, and `check` says so.
#[test]
fn refcounts_that_lie_are_found() {
    let ram = with(&[(2 * CLUSTER + 8, &[0; 4])]);
    let report = check(&(ram.clone() as Arc<dyn Storage>), true).unwrap();
    assert!(report.corruptions >= 2, "{report:?}");
    let ram = with(&[(2 * CLUSTER + 12, &[0, 9])]);
    let report = check(&(ram.clone() as Arc<dyn Storage>), true).unwrap();
    assert_eq!((report.leaks, report.repaired, report.corruptions), (1, 1, 0));
    assert!(check(&(ram as Arc<dyn Storage>), false).unwrap().is_clean());
}

/// Random damage: whatever happens, it is a result.
#[test]
fn noise_does_no_harm() {
    let bytes = ordinary();
    let mut random = Seeded::new(99);
    for _ in 0..400 {
        let mut bytes = bytes.clone();
        for _ in 0..random.below(6) + 1 {
            let place = [0, CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 4 * CLUSTER][random.below(5) as usize];
            let at = place + random.below(128) as usize;
            bytes[at] = if random.chance(2) { 1 << random.below(8) } else { random.below(256) as u8 };
        }
        let ram = Ram::new(bytes);
        drop(check(&(Ram::new(ram.bytes()) as Arc<dyn Storage>), true));
        let Ok(image) = Image::open(&[layer(&ram)], Options::default()) else { continue };
        if image.size() > 1 << 31 {
            continue;
        }
        let mut lookup = image.lookup();
        for at in [0, 512, 1 << 20, 600 << 20] {
            drop(lookup.read(&mut [0; 4096], at));
            drop(lookup.write(&[1; 4096], at));
            drop(lookup.zero(at, CLUSTER as u64 * 2, true));
            drop(lookup.discard(at, CLUSTER as u64 * 2));
        }
        drop(lookup.flush());
        drop(lookup);
        drop(image.close());
    }
    let ram = Ram::new(ordinary());
    let image = Image::open(&[layer(&ram)], Options::default()).unwrap();
    let mut lookup = image.lookup();
    let mut model = Model(vec![0; 4 << 20]);
    model.write(&[7; 512], 0);
    (0..20).for_each(|_| step(&mut random, &mut lookup, &mut model, 65536));
    assert!(read_all(&mut lookup)[..4 << 20] == model.0);
}
