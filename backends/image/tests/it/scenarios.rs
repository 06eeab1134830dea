//! What went wrong elsewhere, and what has to be refused: one test each.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use image::{Create, Error, Format, Image, Info, Layer, Options, Place, Storage, check, create};

use crate::support::{
    Event, Ram, Scratch, Seeded, assert_clean, assert_same, file, layer, open, qemu_img, qemu_io, qemu_reads, read_all,
};

const CLUSTER: u64 = 65536;

fn fresh(options: &Create) -> Arc<Ram> {
    let ram = Ram::new(Vec::new());
    create(&*ram, options).unwrap();
    ram
}

fn plain(clusters: u64) -> Arc<Ram> {
    fresh(&Create { size: clusters * CLUSTER, ..Create::default() })
}

fn qcow2(ram: &Arc<Ram>) -> Layer {
    Layer { format: Format::Qcow2, file: ram.clone(), data: None }
}

fn raw(ram: &Arc<Ram>) -> Layer {
    Layer { format: Format::Raw, file: ram.clone(), data: None }
}

fn refusal(layers: &[Layer], writable: bool) -> String {
    let opened = Image::open(layers, Options { writable, ..Options::default() });
    opened.err().unwrap_or_else(|| panic!("it was not refused")).to_string()
}

fn clean(ram: &Arc<Ram>) {
    let report = check(&(ram.clone() as Arc<dyn Storage>), false).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// Each queue had a cache of its own, and the caches did not agree.
#[test]
fn what_one_queue_does_every_queue_sees_at_once() {
    let image = open(&[qcow2(&plain(8))]);
    let (mut a, mut b) = (image.lookup(), image.lookup());
    let read = |lookup: &mut image::Lookup, at: u64| {
        let mut bytes = [0xee; 512];
        lookup.read(&mut bytes, at).unwrap();
        bytes[0]
    };
    assert_eq!(read(&mut b, 4096), 0);
    a.write(&[1; 512], 4096).unwrap();
    assert_eq!(read(&mut b, 4096), 1);
    b.write(&[2; 512], 8192).unwrap();
    assert_eq!((read(&mut a, 4096), read(&mut a, 8192)), (1, 2));
    a.zero(0, CLUSTER, true).unwrap();
    assert_eq!((read(&mut b, 4096), read(&mut b, 8192)), (0, 0));
    b.write(&[3; 512], 0).unwrap();
    assert_eq!((read(&mut a, 0), read(&mut a, 4096)), (3, 0));
}

/// A discard gave a cluster away that a request in flight still wrote to.
#[test]
fn a_discard_waits_for_whoever_is_there() {
    let image = open(&[qcow2(&plain(8))]);
    let (mut a, mut b) = (image.lookup(), image.lookup());
    a.write(&[1; 4096], 0).unwrap();
    let range = a.share(0, 4096).unwrap();
    let Place::Data { file, offset } = a.map_read(0, 4096).unwrap().place else { panic!("it is not there") };
    let done = Arc::new(AtomicBool::new(false));
    let other = thread::spawn({
        let done = Arc::clone(&done);
        move || {
            // The last byte of the cluster: it is rounded out.
            b.zero(CLUSTER - 512, 512, true).unwrap();
            b.zero(0, CLUSTER, true).unwrap();
            done.store(true, Ordering::SeqCst);
        }
    });
    thread::sleep(Duration::from_millis(100));
    assert!(!done.load(Ordering::SeqCst));
    let mut bytes = [0; 4096];
    a.file(file).unwrap().read_at(&mut bytes, offset).unwrap();
    assert_eq!(bytes, [1; 4096]);
    drop(range);
    other.join().unwrap();
    assert!(done.load(Ordering::SeqCst));
}

/// A cluster was given back while somebody read it through what he had looked up before.
#[test]
fn what_a_reader_looked_up_stays_until_he_is_done() {
    let scratch = Scratch::new();
    qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "top.qcow2", "1M"]);
    qemu_io(&scratch, "top.qcow2", &["write -c -P 7 0 64k".to_owned()]);
    let ram = Ram::new(fs::read(scratch.path("top.qcow2")).unwrap());
    let image = open(&[qcow2(&ram)]);
    let (mut reader, mut writer) = (image.lookup(), image.lookup());
    let range = reader.share(4096, 4096).unwrap();
    let Place::Compressed(place) = reader.map_read(4096, 4096).unwrap().place else { panic!("it is not compressed") };
    writer.write(&[9; 512], 0).unwrap();
    for _ in 0..3 {
        writer.flush().unwrap();
    }
    assert_eq!(reader.inflate(place).unwrap()[..4096], [7; 4096]);
    drop(range);
    writer.flush().unwrap();
    drop((reader, writer));
    image.close().unwrap();
    clean(&ram);
}

/// The allocator handed out live tables, and a hole was punched into a cluster after it was in use again.
#[test]
fn space_that_goes_round_is_never_used_twice() {
    let ram = fresh(&Create { size: 4 << 20, cluster_size: 4096, refcount_bits: 64, ..Create::default() });
    let image = open(&[qcow2(&ram)]);
    let mut lookup = image.lookup();
    let mut random = Seeded::new(5);
    let mut model = vec![0; 4 << 20];
    for round in 0..60_u64 {
        for _ in 0..40 {
            let at = random.below(1024) * 4096;
            let (byte, range) = (random.below(255) as u8 + 1, at as usize..at as usize + 4096);
            if random.chance(3) {
                lookup.zero(at, 4096, true).unwrap();
                model[range].fill(0);
            } else {
                lookup.write(&[byte; 4096], at).unwrap();
                model[range].fill(byte);
            }
        }
        if round % 3 == 0 {
            lookup.flush().unwrap();
        }
        let report = check(&(ram.clone() as Arc<dyn Storage>), false).unwrap();
        assert_eq!(report.corruptions, 0, "round {round}: {:?}", report.errors);
        assert_same(&read_all(&mut lookup), &model, &format!("round {round}"));
    }
    drop(lookup);
    image.close().unwrap();
    clean(&ram);
    // What is free is used again: the file does not grow for ever.
    assert!(ram.bytes().len() < 12 << 20, "{}", ram.bytes().len());
}

/// Zeroing, or discarding, in an overlay showed what was below.
#[test]
fn zeroing_over_a_backing_file_does_not_show_it() {
    for version in [2, 3] {
        let base = Ram::new(vec![0x55; 8 * CLUSTER as usize]);
        let backing = Some(("base".to_owned(), "raw".to_owned()));
        let top = fresh(&Create { size: 8 * CLUSTER, version, backing, ..Create::default() });
        let image = open(&[qcow2(&top), raw(&base)]);
        let mut lookup = image.lookup();
        let byte = |lookup: &mut image::Lookup, at: u64| {
            let mut bytes = [0xee; 512];
            lookup.read(&mut bytes, at).unwrap();
            bytes[0]
        };
        lookup.zero(0, CLUSTER, true).unwrap();
        lookup.zero(CLUSTER, CLUSTER, false).unwrap();
        lookup.zero(2 * CLUSTER + 512, 512, true).unwrap();
        lookup.write(&[1; 512], 3 * CLUSTER).unwrap();
        lookup.discard(3 * CLUSTER, CLUSTER).unwrap();
        assert_eq!((byte(&mut lookup, 0), byte(&mut lookup, CLUSTER)), (0, 0));
        assert_eq!((byte(&mut lookup, 2 * CLUSTER), byte(&mut lookup, 2 * CLUSTER + 512)), (0x55, 0));
        assert_ne!(byte(&mut lookup, 3 * CLUSTER), 0x55, "version {version}: a discard shows what was hidden");
        image.close().unwrap();
        clean(&top);
    }
}

/// An image was destroyed by being closed.
#[test]
fn opening_and_closing_changes_nothing() {
    let scratch = Scratch::new();
    qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "top.qcow2", "64M"]);
    qemu_io(&scratch, "top.qcow2", &["write -P 7 1M 1M".to_owned()]);
    let before = fs::read(scratch.path("top.qcow2")).unwrap();
    let ram = Ram::new(before.clone());
    let image = open(&[qcow2(&ram)]);
    read_all(&mut image.lookup());
    image.lookup().flush().unwrap();
    image.close().unwrap();
    image.close().unwrap();
    assert_eq!(ram.bytes()[..before.len()], before);
    assert_eq!(image.lookup().write(&[1; 512], 0).unwrap_err().to_string(), "The image is read-only");
}

/// Who waits while it holds something waits for ever.
#[test]
fn nobody_waits_with_something_in_his_hands() {
    let image = open(&[qcow2(&plain(8))]);
    let (mut a, mut b) = (image.lookup(), image.lookup());
    a.map_write(0, 512).unwrap();
    b.map_write(CLUSTER, 512).unwrap();
    assert!(matches!(a.map_write(CLUSTER, 512), Err(Error::Busy)));
    assert!(matches!(b.map_write(0, 512), Err(Error::Busy)));
    assert!(matches!(a.zero(4 * CLUSTER, CLUSTER, true), Err(Error::Busy)));
    a.commit().unwrap();
    b.map_write(0, 512).unwrap();
    let _range = a.share(0, 512).unwrap();
    assert!(matches!(a.discard(5 * CLUSTER, CLUSTER), Err(Error::Busy)));
}

/// A write that failed is not there, and its cluster is not lost for ever.
#[test]
fn what_is_given_up_was_never_there() {
    let ram = plain(8);
    let image = open(&[qcow2(&ram)]);
    let mut lookup = image.lookup();
    let Place::Data { file, offset } = lookup.map_write(0, 512).unwrap().place else { panic!("it is not there") };
    lookup.file(file).unwrap().write_at(&[1; 512], offset).unwrap();
    lookup.abort();
    assert_eq!(lookup.map_read(0, 512).unwrap().place, Place::Zero);
    lookup.write(&[2; 512], 512).unwrap();
    drop(lookup);
    image.close().unwrap();
    clean(&ram);
}

fn patched(at: usize, bytes: &[u8]) -> Arc<Ram> {
    let ram = plain(8);
    ram.write_at(bytes, at as u64).unwrap();
    ram
}

#[test]
fn what_cannot_be_served_is_refused_with_a_sentence() {
    assert!(refusal(&[qcow2(&patched(79, &[1]))], true).contains("marked dirty"));
    assert!(refusal(&[qcow2(&patched(79, &[2]))], true).contains("marked corrupt"));
    assert!(refusal(&[qcow2(&patched(79, &[0x40]))], true).contains("features that are not known here (bits 0x40)"));
    assert!(refusal(&[qcow2(&patched(35, &[2]))], true).contains("encrypted"));
    assert!(refusal(&[qcow2(&patched(95, &[1]))], true).contains("persistent bitmaps"));
    assert!(Image::open(&[qcow2(&patched(95, &[1]))], Options { writable: false, ..Options::default() }).is_ok());
    let base = Ram::new(vec![0; 4096]);
    let overlay =
        |format: &str| fresh(&Create { backing: Some(("/some/base".into(), format.into())), size: 4096, ..Create::default() });
    assert_eq!(refusal(&[qcow2(&overlay("raw"))], true), "It has the backing file \"/some/base\", which was not given");
    assert_eq!(refusal(&[qcow2(&plain(1)), raw(&base)], true), "A backing file was given, but its header knows of none");
    assert!(refusal(&[qcow2(&overlay("qcow2")), raw(&base)], true).contains("was given as raw"));
    assert!(refusal(&[raw(&base), raw(&base)], true).contains("no backing file"));
    assert!(refusal(&[Layer { data: Some(base.clone()), ..qcow2(&plain(1)) }], true).contains("data file"));
    assert!(refusal(&vec![raw(&base); 201], true).contains("longer than 200"));
    assert_eq!(refusal(&[qcow2(&base)], false), "It is not a qcow2 image");
    assert!(refusal(&[], false).contains("No image"));
}

/// QEMU counts lazily if asked to, and says so: then the counts are wrong after a crash, not just too high.
#[test]
fn a_dirty_image_is_refused_until_it_is_repaired() {
    let scratch = Scratch::new();
    qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,compat=1.1", "i.qcow2", "64M"]);
    let args = ["-f", "qcow2", "-t", "writeback", "-c", "write -P 7 1M 3M", "-c", "flush", "-c", "abort", "i.qcow2"];
    crate::support::qemu("qemu-io", &scratch, &args);
    let ram = Ram::new(fs::read(scratch.path("i.qcow2")).unwrap());
    assert!(Info::read(Format::Qcow2, &*ram).unwrap().dirty);
    assert!(refusal(&[qcow2(&ram)], true).contains("marked dirty"));
    let report = check(&(ram.clone() as Arc<dyn Storage>), true).unwrap();
    assert!(report.corruptions == 0 && report.repaired > 40, "{report:?}");
    fs::write(scratch.path("i.qcow2"), ram.bytes()).unwrap();
    assert_clean(&scratch, "i.qcow2", "after the repair");
    let image = open(&[qcow2(&ram)]);
    let mut bytes = [0; 512];
    image.lookup().read(&mut bytes, 2 << 20).unwrap();
    assert_eq!(bytes, [7; 512]);
}

/// What we make is what QEMU makes: it finds nothing wrong, before and after it has been written to by both.
#[test]
fn what_we_make_qemu_accepts() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base.raw"), vec![0x33; 1 << 20]).unwrap();
    let base = || Some(("base.raw".to_owned(), "raw".to_owned()));
    let large = Create { size: 4 << 20, ..Create::default() };
    let kinds = [
        large.clone(),
        Create { version: 2, ..large.clone() },
        Create { version: 2, backing: base(), ..large.clone() },
        Create { cluster_size: 512, refcount_bits: 64, ..large.clone() },
        Create { cluster_size: 512, refcount_bits: 1, backing: base(), ..large.clone() },
        Create { cluster_size: 2 << 20, refcount_bits: 8, ..large.clone() },
        Create { cluster_size: 16 << 10, extended_l2: true, backing: base(), ..large.clone() },
        Create { data_file: Some("data.raw".to_owned()), ..large.clone() },
        Create { size: 0, ..large.clone() },
        Create { size: 8 << 30, cluster_size: 512, refcount_bits: 64, ..large },
    ];
    for kind in kinds {
        let path = scratch.path("i.qcow2");
        fs::write(&path, b"").unwrap();
        fs::write(scratch.path("data.raw"), b"").unwrap();
        create(&*file(&path), &kind).unwrap();
        assert_clean(&scratch, "i.qcow2", &format!("{kind:?}"));
        let info = Info::read(Format::Qcow2, &*file(&path)).unwrap();
        assert_eq!(
            (info.size, info.cluster_size, info.version, info.in_use),
            (kind.size, kind.cluster_size, kind.version, false)
        );
        if kind.size == 0 {
            continue;
        }
        qemu_io(&scratch, "i.qcow2", &["write -P 8 1M 300k".to_owned(), "write -z 100k 70k".to_owned()]);
        let data = kind.data_file.as_ref().map(|name| file(&scratch.path(name)));
        let below = kind.backing.as_ref().map(|(name, _)| layer(Format::Raw, &scratch.path(name)));
        let top = Layer { data, ..layer(Format::Qcow2, &path) };
        let image = open(&[Some(top), below].into_iter().flatten().collect::<Vec<_>>());
        let mut lookup = image.lookup();
        lookup.write(&[9; 100_000], kind.size - (1 << 20)).unwrap();
        let mut bytes = [0; 1024];
        lookup.read(&mut bytes, 1 << 20).unwrap();
        assert_eq!(bytes, [8; 1024]);
        lookup.read(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [if kind.backing.is_some() { 0x33 } else { 0 }; 1024]);
        drop(lookup);
        image.close().unwrap();
        assert_clean(&scratch, "i.qcow2", &format!("{kind:?}, written to"));
    }
}

/// An image that was not closed is repaired when it is opened again, and not before it is to be written to.
#[test]
fn a_crash_leaves_a_mark_and_the_next_one_cleans_up() {
    let scratch = Scratch::new();
    for (made_by_us, version) in [(true, 3), (true, 2), (false, 3), (false, 2)] {
        let ram = if made_by_us {
            fresh(&Create { size: 64 << 20, version, ..Create::default() })
        } else {
            let compat = if version == 2 { "compat=0.10" } else { "compat=1.1" };
            let _none_before = fs::remove_file(scratch.path("i.qcow2"));
            qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "-o", compat, "i.qcow2", "64M"]);
            Ram::new(fs::read(scratch.path("i.qcow2")).unwrap())
        };
        let image = open(&[qcow2(&ram)]);
        image.lookup().write(&[1; 4096], 1 << 20).unwrap();
        let left = Ram::new(ram.bytes());
        assert!(Info::read(Format::Qcow2, &*left).unwrap().in_use, "version {version}");
        fs::write(scratch.path("i.qcow2"), left.bytes()).unwrap();
        let (code, said) = crate::support::qemu_check(&scratch, "i.qcow2");
        assert_eq!(code, Some(3), "only leaks: {said}");
        // Whatever QEMU does to it meanwhile, the mark stays.
        qemu_io(&scratch, "i.qcow2", &["write -P 9 2M 64k".to_owned()]);
        qemu_img(&scratch, &["rebase", "-u", "-f", "qcow2", "-b", "", "i.qcow2"]);
        let left = Ram::new(fs::read(scratch.path("i.qcow2")).unwrap());
        assert!(Info::read(Format::Qcow2, &*left).unwrap().in_use, "version {version}: after QEMU");
        let again = open(&[qcow2(&left)]);
        clean(&left);
        again.close().unwrap();
    }
}

/// A queue that waits to zero a range while the overlay is put on top zeroes it in the overlay, and not below.
#[test]
fn who_waits_for_a_range_while_an_overlay_comes_has_it_in_the_overlay() {
    for below in [Format::Raw, Format::Qcow2] {
        let base = if below == Format::Raw { Ram::new(vec![7; 4 * CLUSTER as usize]) } else { plain(4) };
        let top = Ram::new(Vec::new());
        let backing = Some(("below".to_owned(), below.name().to_owned()));
        // Larger clusters than below: the range that is had alone is another one.
        create(&*top, &Create { size: 4 * CLUSTER, backing, cluster_size: 2 << 20, ..Create::default() }).unwrap();
        let image = open(&[Layer { format: below, file: base.clone(), data: None }]);
        image.lookup().write(&[7; 8192], 0).unwrap();
        let (waiting, started) = (Arc::clone(&image), Arc::new(Barrier::new(2)));
        let alone = image.lookup().exclude(0, image.size()).unwrap();
        let begun = Arc::clone(&started);
        let zeroes = thread::spawn(move || {
            begun.wait();
            waiting.lookup().zero(0, 4096, true)
        });
        started.wait();
        thread::sleep(Duration::from_millis(100));
        image.overlay(&qcow2(&top)).unwrap();
        let kept = base.bytes();
        drop(alone);
        zeroes.join().unwrap().unwrap();
        let mut bytes = [0; 8192];
        image.lookup().read(&mut bytes, 0).unwrap();
        assert!(bytes[..4096] == [0; 4096] && bytes[4096..] == [7; 4096], "{below:?}: zeroed, and nothing else");
        assert!(base.bytes() == kept, "{below:?}: what is below is only read");
    }
}

#[test]
fn an_overlay_is_put_on_top_while_queues_go_on() {
    let (base, top, second) = (plain(8), Ram::new(Vec::new()), Ram::new(Vec::new()));
    let over = |ram: &Arc<Ram>, size: u64| {
        let backing = Some(("below".to_owned(), "qcow2".to_owned()));
        create(&**ram, &Create { size, backing, extended_l2: true, ..Create::default() }).unwrap();
    };
    over(&top, 8 * CLUSTER);
    over(&second, 4 * CLUSTER);
    let image = open(&[qcow2(&base)]);
    let mut lookup = image.lookup();
    lookup.write(&[1; 8192], 0).unwrap();
    assert!(image.overlay(&qcow2(&second)).unwrap_err().to_string().contains("another size"));
    assert!(image.overlay(&raw(&second)).is_err());
    lookup.write(&[2; 512], 8192).unwrap();
    let other = image.lookup();
    image.overlay(&qcow2(&top)).unwrap();
    let below = base.bytes();
    lookup.write(&[3; 512], 512).unwrap();
    drop(other);
    let mut bytes = [0; 1536];
    lookup.read(&mut bytes, 0).unwrap();
    assert_eq!((bytes[0], bytes[512], bytes[1024]), (1, 3, 1));
    lookup.zero(0, CLUSTER, true).unwrap();
    lookup.read(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 1536]);
    assert_eq!(base.bytes(), below, "what is below is only read");
    image.close().unwrap();
    clean(&base);
    clean(&top);
}

#[test]
fn a_disk_grows_and_its_table_moves() {
    let scratch = Scratch::new();
    let path = scratch.path("i.qcow2");
    fs::write(&path, b"").unwrap();
    create(&*file(&path), &Create { size: 1 << 20, cluster_size: 512, ..Create::default() }).unwrap();
    let image = open(&[layer(Format::Qcow2, &path)]);
    let mut lookup = image.lookup();
    lookup.write(&[1; 4096], (1 << 20) - 4096).unwrap();
    assert!(image.resize(512).is_err());
    assert!(image.resize(1000).is_err());
    for size in [2_u64 << 20, 16 << 20, 17 << 20] {
        image.resize(size).unwrap();
        assert_eq!(image.size(), size);
        lookup.write(&[2; 512], size - 512).unwrap();
    }
    let model = read_all(&mut lookup);
    assert_eq!((model[(1 << 20) - 1], model[1 << 20], model[(2 << 20) - 1]), (1, 0, 2));
    image.close().unwrap();
    assert_clean(&scratch, "i.qcow2", "after growing");
    assert_same(&qemu_reads(&scratch, "i.qcow2", &[]), &model, "after growing");
}

/// No data is written to a cluster before it is counted, durably; see `space.rs`.
#[test]
fn first_writes_need_no_barrier() {
    let ram = plain(64);
    let image = open(&[qcow2(&ram)]);
    let mut lookup = image.lookup();
    lookup.write(&[1; 512], 0).unwrap();
    ram.record();
    for cluster in 1..10 {
        lookup.write(&[1; 512], cluster * CLUSTER).unwrap();
    }
    let syncs = ram.take_log().iter().filter(|(_, event)| matches!(event, Event::Sync)).count();
    assert_eq!(syncs, 0);
}

/// A flush was on its way when an overlay came. What was freed before it began is the old top's affair.
#[test]
fn a_flush_that_an_overlay_overtakes_gives_nothing_of_the_overlay_back() {
    let below = plain(8);
    let image = open(&[qcow2(&below)]);
    let mut lookup = image.lookup();
    // The tickets of the old top are far ahead of those of the new one.
    for _ in 0..8 {
        lookup.write(&[1; 4096], 0).unwrap();
        lookup.zero(0, CLUSTER, true).unwrap();
    }
    let barrier = image.barrier().unwrap().unwrap();
    below.sync().unwrap();
    let backing = Some(("below".to_owned(), "qcow2".to_owned()));
    let top = fresh(&Create { size: image.size(), backing, ..Create::default() });
    image.overlay(&qcow2(&top)).unwrap();
    lookup.write(&[2; 4096], 0).unwrap();
    lookup.zero(0, CLUSTER, true).unwrap();
    let before = top.bytes();
    image.settle(barrier).unwrap();
    assert!(top.bytes() == before, "space of the overlay was given back without a barrier");
    lookup.flush().unwrap();
    assert!(top.bytes() != before, "after one it is");
    drop(lookup);
    image.close().unwrap();
}

/// The system tells of a lost write once. Whoever was told, all syncs fail from then on.
#[test]
fn a_sync_that_failed_elsewhere_is_not_forgotten() {
    let scratch = Scratch::new();
    for format in [Format::Raw, Format::Qcow2] {
        let path = scratch.path("image");
        let file = fs::File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
        let file = Arc::new(image::FileStorage::new(file.into()).unwrap());
        match format {
            Format::Raw => file.set_len(1 << 20).unwrap(),
            Format::Qcow2 => create(&*file, &Create { size: 1 << 20, ..Create::default() }).unwrap(),
        }
        let image = open(&[Layer { format, file, data: None }]);
        image.flush().unwrap();
        assert!(image.nothing_lost().is_ok() && image.barrier().unwrap().is_some() == (format == Format::Qcow2));
        image.lost();
        assert!(image.nothing_lost().is_err() && image.flush().is_err());
    }
}
