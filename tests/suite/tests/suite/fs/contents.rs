//! What is in files: far ends, holes, room, copies, mappings, and times.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, SeekFrom, StatxFlags, Timespec, Timestamps, copy_file_range, fallocate, seek, statx, utimensat,
};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::mounted::{Mounted, can_mount, in_each_mode, random};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

#[test]
fn far_beyond_four_gigabytes() {
    in_each_mode("big offsets", |mounted| {
        let (here, there) = mounted.both("far");
        let (file, far) = (open(&here), (5 << 30) + 3);
        file.write_all_at(b"far away", far).unwrap();
        file.sync_all().unwrap();
        assert_eq!(fs::metadata(&there).unwrap().len(), far + 8);
        let mut bytes = [0; 9];
        File::open(&there).unwrap().read_exact_at(&mut bytes, far - 1).unwrap();
        assert_eq!(&bytes, b"\0far away");
        file.read_exact_at(&mut bytes, far - 1).unwrap();
        assert_eq!(&bytes, b"\0far away");
        file.set_len((6 << 30) + 1).unwrap();
        assert_eq!(fs::metadata(&there).unwrap().len(), (6 << 30) + 1);
    });
}

/// The same is done to a file of the directory itself, and the same has to come of it.
#[test]
fn holes_and_room() {
    const KIB: u64 = 1024;
    let steps: [(FallocateFlags, u64, u64); 5] = [
        (FallocateFlags::empty(), 300 * KIB, 100 * KIB),
        (FallocateFlags::KEEP_SIZE, 900 * KIB, 100 * KIB),
        (FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE), 64 * KIB, 64 * KIB + 5),
        (FallocateFlags::ZERO_RANGE, 10 * KIB + 1, 7 * KIB),
        (FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE), 390 * KIB, 20 * KIB),
    ];
    in_each_mode("fallocate", |mounted| {
        let (here, there) = mounted.both("file");
        let natively = mounted.house.join("natively");
        let (ours, own) = (open(&here), open(&natively));
        for file in [&ours, &own] {
            file.write_all_at(&random(256 << 10, 31), 0).unwrap();
        }
        for (flags, at, len) in steps {
            let come = [&ours, &own].map(|file| fallocate(file, flags, at, len));
            assert_eq!(come[0], come[1], "{flags:?}");
        }
        [&ours, &own].into_iter().for_each(|file| file.sync_all().unwrap());
        assert!(fs::read(&here).unwrap() == fs::read(&natively).unwrap());
        assert!(fs::read(&there).unwrap() == fs::read(&natively).unwrap());
        let places = |file: &File| -> Vec<_> {
            let ask = |at: u64| [seek(file, SeekFrom::Data(at)), seek(file, SeekFrom::Hole(at))];
            [0, 64 * KIB, 100 * KIB, 200 * KIB, 399 * KIB, 500 * KIB].into_iter().flat_map(ask).collect()
        };
        assert_eq!(places(&ours), places(&own));
        assert!(places(&ours).contains(&Err(Errno::NXIO)), "past the end there is no data");
        assert_eq!(fs::metadata(&there).unwrap().blocks(), fs::metadata(&natively).unwrap().blocks());
        // What the kernel's FUSE does not pass on.
        for flags in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
            assert_eq!(fallocate(&ours, flags, 0, 4096), Err(Errno::OPNOTSUPP));
        }
    });
}

#[test]
fn copies_that_the_server_makes() {
    in_each_mode("copy_file_range", |mounted| {
        let bytes = random(3 << 20, 41);
        let (from, to) = (open(&mounted.seen.join("from")), open(&mounted.seen.join("to")));
        from.write_all_at(&bytes, 0).unwrap();
        let (mut at, mut there, mut left) = (1001, 70_000, bytes.len() - 1001);
        while left > 0 {
            let copied = copy_file_range(&from, Some(&mut at), &to, Some(&mut there), left).unwrap();
            assert!(copied > 0);
            left -= copied;
        }
        to.sync_all().unwrap();
        let copy = fs::read(mounted.house.join("to")).unwrap();
        assert!(copy[..70_000].iter().all(|byte| *byte == 0) && copy[70_000..] == bytes[1001..]);
        assert!(fs::read(mounted.seen.join("to")).unwrap() == copy);
        // Within one file.
        copy_file_range(&to, Some(&mut 100_000), &to, Some(&mut 0), 50_000).unwrap();
        to.sync_all().unwrap();
        assert!(fs::read(mounted.house.join("to")).unwrap()[..50_000] == copy[100_000..150_000]);
    });
}

fn map(file: &File, len: usize) -> Result<MmapRegion, vm_memory::mmap::MmapRegionError> {
    MmapRegion::from_file(FileOffset::from_arc(Arc::new(file.try_clone().unwrap()), 0), len)
}

#[test]
fn mapped_files_are_those_of_the_host() {
    if !can_mount("mapped files") {
        return;
    }
    for words in [
        &[][..],
        &["--cache", "always", "--writeback"],
        &["--cache", "never", "--allow-mmap"],
        &["--cache", "metadata", "--allow-mmap"],
    ] {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("mapped");
        let (file, bytes) = (open(&here), random(20_000, 51));
        file.write_all_at(&bytes, 0).unwrap();
        let mapping = map(&file, 20_000).unwrap();
        let volatile = mapping.as_volatile_slice();
        let mut seen = vec![0; 20_000];
        volatile.read_slice(&mut seen, 0).unwrap();
        assert!(seen == bytes, "{words:?}");
        volatile.write_slice(b"by way of memory", 9000).unwrap();
        file.sync_all().unwrap();
        let expected = [&bytes[..9000], b"by way of memory", &bytes[9016..]].concat();
        assert!(fs::read(&there).unwrap() == expected && fs::read(&here).unwrap() == expected, "{words:?}");
        drop(mapping);
        drop(file);
        mounted.unmount();
    }
    let mut mounted = Mounted::ours(&["--cache", "never"], &[]);
    let file = open(&mounted.seen.join("file"));
    file.set_len(4096).unwrap();
    assert!(map(&file, 4096).is_err(), "a guest that keeps no data cannot map it");
    drop(file);
    mounted.unmount();
}

#[test]
fn times_to_the_nanosecond() {
    in_each_mode("times", |mounted| {
        let (here, there) = mounted.both("file");
        fs::write(&here, "x").unwrap();
        for (sec, nsec) in [(1_700_000_000, 123_456_789), (-2, 999_999_999), (5_000_000_000, 1), (0, 0)] {
            let times = Timestamps {
                last_access: Timespec { tv_sec: sec + 1, tv_nsec: nsec },
                last_modification: Timespec { tv_sec: sec, tv_nsec: nsec },
            };
            utimensat(CWD, &here, &times, AtFlags::empty()).unwrap();
            // What the directory's own file system makes of it.
            let natively = mounted.house.join("natively");
            fs::write(&natively, "x").unwrap();
            utimensat(CWD, &natively, &times, AtFlags::empty()).unwrap();
            let of = |path: &Path| {
                let about = fs::metadata(path).unwrap();
                (about.atime(), about.atime_nsec(), about.mtime(), about.mtime_nsec())
            };
            assert_eq!((of(&here), of(&there)), (of(&natively), of(&natively)));
        }
        let flags = StatxFlags::BTIME | StatxFlags::BASIC_STATS;
        let [ours, own] = [&here, &there].map(|path| statx(CWD, path, AtFlags::empty(), flags).unwrap());
        assert_eq!(ours.stx_mask & StatxFlags::BTIME.bits(), own.stx_mask & StatxFlags::BTIME.bits());
        assert_eq!((ours.stx_btime.tv_sec, ours.stx_btime.tv_nsec), (own.stx_btime.tv_sec, own.stx_btime.tv_nsec));
        assert_eq!((ours.stx_ino, ours.stx_blocks), (own.stx_ino, own.stx_blocks));
    });
}

/// What the host does to a file is seen after the second for which a guest believes what it knows.
#[test]
fn what_the_host_writes_is_seen_by_who_opens_the_file_again() {
    if !can_mount("changes by the host") {
        return;
    }
    for (words, pause) in [(&["--cache", "never"][..], 0), (&["--timeout", "0.1"], 150), (&[], 1100)] {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("file");
        for round in 0..3 {
            let text = format!("{round} ").repeat(2000 - round * 100);
            fs::write(&there, &text).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(pause));
            assert_eq!(fs::metadata(&here).unwrap().len(), text.len() as u64);
            assert!(fs::read_to_string(&here).unwrap() == text, "{words:?}");
            let mut more = OpenOptions::new().append(true).open(&here).unwrap();
            more.write_all(b"more").unwrap();
            drop(more);
            assert!(fs::read_to_string(&there).unwrap() == format!("{text}more"), "{words:?}");
        }
        mounted.unmount();
    }
}
