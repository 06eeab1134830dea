//! Layouts, against the offsets in linux/fuse.h.

#![expect(clippy::arithmetic_side_effects, clippy::indexing_slicing, reason = "the numbers here are ours")]

use super::*;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

const TIMES: Timeouts = Timeouts { entry: Duration::new(1, 2), attr: Duration::new(3, 4) };

fn inode() -> Attr {
    Attr {
        ino: 11,
        size: 12,
        blocks: 13,
        atime: (14, 20),
        mtime: (-15, 21),
        ctime: (16, 22),
        mode: 23,
        nlink: 24,
        uid: 25,
        gid: 26,
        rdev: 27,
        blksize: 28,
        flags: 29,
    }
}

#[test]
fn headers() {
    let bytes = header(0x1234, 0, 16);
    assert_eq!((u32_at(&bytes, 0), u32_at(&bytes, 4), u64_at(&bytes, 8)), (16, 0, 0x1234));
    assert_eq!(u32_at(&header(0, 22, 16), 4).cast_signed(), -22);
}

#[test]
fn attributes() {
    let bytes = inode().to_bytes();
    let longs: Vec<u64> = (0..6).map(|index| u64_at(&bytes, index * 8)).collect();
    assert_eq!(longs, [11, 12, 13, 14, (-15i64).cast_unsigned(), 16]);
    let words: Vec<u32> = (0..10).map(|index| u32_at(&bytes, 48 + index * 4)).collect();
    assert_eq!(words, (20..30).collect::<Vec<u32>>());
    let answer = attr(&inode(), TIMES.attr);
    assert_eq!((u64_at(&answer, 0), u32_at(&answer, 8), u32_at(&answer, 12)), (3, 4, 0));
    assert_eq!(answer[16..], bytes);
}

#[test]
fn entries() {
    let bytes = entry(5, 6, &inode(), TIMES);
    let longs: Vec<u64> = (0..4).map(|index| u64_at(&bytes, index * 8)).collect();
    assert_eq!((longs, u32_at(&bytes, 32), u32_at(&bytes, 36)), (vec![5, 6, 1, 3], 2, 4));
    assert_eq!(bytes[40..], inode().to_bytes());
    let nothing = negative(Duration::new(9, 8));
    assert_eq!((u64_at(&nothing, 0), u64_at(&nothing, 16), u32_at(&nothing, 32)), (0, 9, 8));
    assert_eq!(nothing[40..], [0; 88]);
}

#[test]
fn small_answers() {
    assert_eq!((u64_at(&open(7, 3), 0), u32_at(&open(7, 3), 8)), (7, 3));
    assert_eq!(write(9), [9, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(copy64(1 << 40), (1u64 << 40).to_le_bytes());
    assert_eq!(xattr_size(9), [9, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(lseek(1 << 40), (1u64 << 40).to_le_bytes());
    assert_eq!((u32_at(&ioctl(-25, 2), 0).cast_signed(), u32_at(&ioctl(-25, 2), 4)), (-25, 2));
    let bytes = lock(&Lock { start: 1, end: 2, kind: LockKind::None, pid: 4 });
    assert_eq!((u64_at(&bytes, 0), u64_at(&bytes, 8), u32_at(&bytes, 16), u32_at(&bytes, 20)), (1, 2, 2, 4));
}

#[test]
fn file_systems() {
    let of = StatFs { blocks: 1, bfree: 2, bavail: 3, files: 4, ffree: 5, bsize: 6, namelen: 7, frsize: 8 };
    let bytes = statfs(&of);
    assert_eq!((0..5).map(|index| u64_at(&bytes, index * 8)).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!((0..4).map(|index| u32_at(&bytes, 40 + index * 4)).collect::<Vec<_>>(), [6, 7, 8, 0]);
}

#[test]
fn inodes_in_full() {
    let of = Statx {
        mask: 1,
        blksize: 2,
        attributes: 3,
        attributes_mask: 4,
        nlink: 5,
        uid: 6,
        gid: 7,
        mode: 8,
        ino: 9,
        size: 10,
        blocks: 11,
        atime: (12, 13),
        btime: (-14, 15),
        ctime: (16, 17),
        mtime: (18, 19),
        rdev: (20, 21),
        dev: (22, 23),
    };
    let bytes = statx(&of, TIMES.attr);
    assert_eq!((u64_at(&bytes, 0), u32_at(&bytes, 8), &bytes[12..32]), (3, 4, &[0; 20][..]));
    let inode = &bytes[32..];
    assert_eq!((u32_at(inode, 0), u32_at(inode, 4), u64_at(inode, 8)), (1, 2, 3));
    assert_eq!((0..4).map(|index| u32_at(inode, 16 + index * 4)).collect::<Vec<_>>(), [5, 6, 7, 8]);
    assert_eq!((0..4).map(|index| u64_at(inode, 32 + index * 8)).collect::<Vec<_>>(), [9, 10, 11, 4]);
    let time = |index: usize| (u64_at(inode, 64 + index * 16).cast_signed(), u32_at(inode, 72 + index * 16));
    assert_eq!((0..4).map(time).collect::<Vec<_>>(), [(12, 13), (-14, 15), (16, 17), (18, 19)]);
    assert_eq!((0..4).map(|index| u32_at(inode, 128 + index * 4)).collect::<Vec<_>>(), [20, 21, 22, 23]);
    assert_eq!(inode[144..], [0; 112]);
}

#[test]
fn sessions() {
    let of = InitReply {
        minor: 38,
        max_readahead: 1,
        flags: 1 << 34 | 1,
        max_background: 2,
        congestion_threshold: 3,
        max_write: 4,
        time_gran: 5,
        max_pages: 6,
        map_alignment: 7,
        max_stack_depth: 8,
        request_timeout: 9,
    };
    let bytes = init(&of);
    let words: Vec<u32> = (0..11).map(|index| u32_at(&bytes, index * 4)).collect();
    assert_eq!(words, [7, 38, 1, 1 << 30 | 1, 3 << 16 | 2, 4, 5, 7 << 16 | 6, 4, 8, 9]);
    assert_eq!(bytes[44..], [0; 20]);
    assert_eq!(u32_at(&init(&InitReply { flags: 1, ..of }), 12), 1, "there is no upper half");
}

#[test]
fn names() {
    let mut buffer = [0xff; 200];
    let mut names = Dirents::new(&mut buffer, 72);
    assert!(names.is_empty());
    assert!(names.push(1, 2, 4, b"a"));
    assert_eq!(names.len(), 32);
    assert!(names.has_room(false, 16) && !names.has_room(false, 17) && !names.has_room(true, 0));
    assert!(!names.push(3, 4, 8, &[b'n'; 17]), "40 bytes are left, and these take 48");
    assert!(names.push(3, 4, 8, &[b'n'; 16]));
    assert!(!names.push(3, 4, 8, b""));
    assert_eq!(names.len(), 72);
    let bytes = names.as_bytes();
    assert_eq!((u64_at(bytes, 0), u64_at(bytes, 8), u32_at(bytes, 16), u32_at(bytes, 20)), (1, 2, 1, 4));
    assert_eq!(bytes[24..32], *b"a\0\0\0\0\0\0\0");
    assert_eq!((u64_at(bytes, 32), u32_at(bytes, 48), &bytes[56..72]), (3, 16, &[b'n'; 16][..]));
    assert_eq!(buffer[72..], [0xff; 128], "behind the limit");
}

#[test]
fn names_with_inodes() {
    let mut buffer = [0xff; 200];
    let mut names = Dirents::new(&mut buffer, u32::MAX);
    let what = entry(5, 6, &inode(), TIMES);
    assert!(names.push_plus(&what, 1, 2, 4, b"abc"));
    assert!(!names.push_plus(&what, 1, 2, 4, b"abc"));
    assert_eq!(names.len(), 160);
    assert_eq!(buffer[..128], what);
    assert_eq!((u64_at(&buffer, 128), u32_at(&buffer, 144)), (1, 3));
    assert_eq!(buffer[152..161], *b"abc\0\0\0\0\0\xff");
}
