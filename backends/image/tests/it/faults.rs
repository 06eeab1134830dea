//! Writes, barriers and lengthenings that fail, wherever they are: the disk is full for a while. What failed was not acknowledged; what
//! was acknowledged stays; and when there is room again, everything goes on.

use std::fs;
use std::sync::Arc;

use image::{Error, Format, Layer, Lookup, Storage, check};

use crate::differential::{Backing, Kind};
use crate::support::{Model, Ram, Scratch, Seeded, assert_clean, assert_same, open, qemu_reads, read_all};

/// A step that may fail. Then each sector is what it was, or what it was to become, or zeroes.
fn step(random: &mut Seeded, lookup: &mut Lookup, model: &mut Model, most: u64, what: &str) -> bool {
    let size = model.0.len() as u64;
    let offset = random.below(size / 512) * 512;
    let len = ((random.below(most / 512) + 1) * 512).min(size - offset);
    let (byte, choice) = (random.below(255) as u8 + 1, random.below(8));
    let (new, done): (u8, Result<(), Error>) = match choice {
        0 => (0, lookup.zero(offset, len, true)),
        1 => (0, lookup.zero(offset, len, false)),
        2 => (0, lookup.discard(offset, len)),
        3 => return lookup.flush().is_ok(),
        _ => (byte, lookup.write(&vec![byte; len as usize], offset)),
    };
    let mut now = vec![0xee; len as usize];
    lookup.read(&mut now, offset).unwrap_or_else(|error| panic!("{what}: {error}"));
    if done.is_ok() && choice != 2 {
        model.write(&vec![new; len as usize], offset);
        assert_same(&now, model.at(offset, len), what);
        return true;
    }
    for (block, old) in now.chunks(512).zip(model.at(offset, len).chunks(512)) {
        assert!(block == old || block == [new; 512] || block == [0; 512], "{what}: {} of {len} at {offset:#x}", block[0]);
    }
    model.write(&now, offset);
    done.is_ok()
}

fn faults(kind: Kind, seed: u64) {
    let scratch = Scratch::new();
    kind.make(&scratch, &mut Seeded::new(seed));
    let bytes = fs::read(scratch.path("top.qcow2")).unwrap();
    let start = qemu_reads(&scratch, "top.qcow2", &[]);
    let below = kind.layers(&scratch).split_off(1);
    let mut all = 0;
    for round in 0..40 {
        let what = format!("{kind:?}, round {round}");
        let (ram, mut random, mut model) = (Ram::new(bytes.clone()), Seeded::new(seed * 100 + round), Model(start.clone()));
        let layers = [vec![Layer { format: Format::Qcow2, file: ram.clone(), data: None }], below.clone()].concat();
        let image = open(&layers);
        let mut lookup = image.lookup();
        let mut failed = 0;
        for episode in 0..4 {
            ram.fail(random.below(60), random.below(4) + 1);
            for _ in 0..12 {
                failed += u64::from(!step(
                    &mut random,
                    &mut lookup,
                    &mut model,
                    kind.cluster * 3,
                    &format!("{what}, episode {episode}"),
                ));
            }
            ram.fail(0, 0);
            lookup.write(&[7; 512], 0).unwrap_or_else(|error| panic!("{what}: there is room again, but {error}"));
            model.write(&[7; 512], 0);
        }
        all += failed;
        assert_same(&read_all(&mut lookup), &model.0, &what);
        drop(lookup);
        image.close().unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = check(&(ram.clone() as Arc<dyn Storage>), true).unwrap();
        assert_eq!(report.corruptions, 0, "{what}: {failed} failed: {:?}", report.errors);
        if round % 8 == 0 {
            fs::write(scratch.path("top.qcow2"), ram.bytes()).unwrap();
            assert_clean(&scratch, "top.qcow2", &what);
            assert_same(&qemu_reads(&scratch, "top.qcow2", &[]), &model.0, &what);
        }
    }
    println!("{kind:?}: {all} steps failed");
    assert!(all > 40, "{kind:?}: {all} steps failed");
}

#[test]
fn a_disk_that_is_full_for_a_while_loses_nothing() {
    faults(Kind { cluster: 4096, clusters: Some(200), ..Kind::PLAIN }, 61);
    faults(Kind { cluster: 512, refcount_bits: 64, clusters: Some(1500), ..Kind::PLAIN }, 62);
    faults(Kind { cluster: 4096, clusters: Some(200), backing: Backing::Raw, ..Kind::PLAIN }, 63);
    faults(Kind { cluster: 4096, clusters: Some(200), snapshot: true, compressed: Some("zlib"), ..Kind::PLAIN }, 64);
    faults(Kind { extended: true, cluster: 16384, clusters: Some(60), backing: Backing::Raw, ..Kind::PLAIN }, 65);
}
