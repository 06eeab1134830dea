//! How much memory a large disk takes. A process of its own: what is measured is the whole process.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::sync::Arc;

use image::{Create, FileStorage, Format, Image, Layer, Options, Storage, check, create};

/// Resident memory that a disk may add, whatever its size: the cache of 2 MiB, the tables of 1 TiB, four queues.
const MOST: u64 = 4 << 20;

fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap() * 4096
}

/// 1 TiB at 64 KiB clusters, written to all over the place: each write has a slice of its own.
#[test]
fn a_large_disk_is_small_in_memory() {
    let path = std::env::temp_dir().join(format!("outboard-image-memory-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    fs::remove_file(path).unwrap();
    let file: Arc<dyn Storage> = Arc::new(FileStorage::new(file.into()).unwrap().without_sync());
    create(&*file, &Create { size: 1 << 40, ..Create::default() }).unwrap();
    let before = resident();
    let image = Image::open(&[Layer { format: Format::Qcow2, file: Arc::clone(&file), data: None }], Options::default()).unwrap();
    let mut queues: Vec<_> = (0..4).map(|_| image.lookup()).collect();
    for number in 0..3000_u64 {
        let at = number * 357_913_600 / 512 * 512;
        queues.iter_mut().for_each(|queue| queue.write(&[1; 512], at).unwrap());
    }
    let grown = resident().saturating_sub(before);
    println!("{grown} bytes");
    assert!(grown < MOST, "{grown} bytes");
    drop(queues);
    image.close().unwrap();
    let report = check(&file, true).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let checked = resident().saturating_sub(before);
    println!("{checked} bytes with a check");
    assert!(checked < MOST, "{checked} bytes with a check");
}
