//! How long a warm lookup takes; run by hand: `cargo test -p image --release --test speed -- --ignored --nocapture`.

use std::fs::File;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use image::{Create, FileStorage, Format, Image, Layer, Options, Storage, create};

#[test]
#[ignore = "a measurement, not a check"]
fn warm_lookups() {
    const LOOKUPS: u64 = 5_000_000;
    let path = std::env::temp_dir().join(format!("outboard-image-speed-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let file: Arc<dyn Storage> = Arc::new(FileStorage::new(file.into()).unwrap());
    create(&*file, &Create { size: 1 << 30, ..Create::default() }).unwrap();
    let image = Image::open(&[Layer { format: Format::Qcow2, file, data: None }], Options::default()).unwrap();
    let bytes = vec![1; 1 << 20];
    (0..1024).for_each(|at| image.lookup().write(&bytes, at << 20).unwrap());
    for threads in [1, 2] {
        let start = Instant::now();
        let all: Vec<_> = (0..threads)
            .map(|number: u64| {
                let mut lookup = image.lookup();
                thread::spawn(move || {
                    let mut at = number * 12345;
                    for _ in 0..LOOKUPS {
                        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let offset = (at >> 34) & 0x3fff_f000;
                        let _range = lookup.share(offset, 4096).unwrap();
                        assert_eq!(lookup.map_write(offset, 4096).unwrap().len, 4096);
                    }
                })
            })
            .collect();
        all.into_iter().for_each(|one| one.join().unwrap());
        let each = start.elapsed().as_nanos() / u128::from(LOOKUPS);
        println!("{threads} threads: {each} ns for a range and a lookup");
    }
    std::fs::remove_file(path).unwrap();
}

/// Beside `qemu-img bench -w -f qcow2 -s 4096 -S 69632 -d 1 -t writeback`: the same writes, each to a cluster of its own.
#[test]
#[ignore = "a measurement, not a check"]
fn first_writes_and_rewrites() {
    const CLUSTERS: u64 = 100_000;
    let path = std::env::temp_dir().join(format!("outboard-image-writes-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let file: Arc<dyn Storage> = Arc::new(FileStorage::new(file.into()).unwrap());
    create(&*file, &Create { size: 8 << 30, ..Create::default() }).unwrap();
    let image = Image::open(&[Layer { format: Format::Qcow2, file, data: None }], Options::default()).unwrap();
    let mut lookup = image.lookup();
    for what in ["first writes", "rewrites"] {
        let start = Instant::now();
        for number in 0..CLUSTERS {
            lookup.write(&[1; 4096], number * 69632).unwrap();
        }
        println!("{what}: {} a second", u128::from(CLUSTERS) * 1000 / start.elapsed().as_millis().max(1));
    }
}
