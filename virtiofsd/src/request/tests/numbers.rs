//! Sizes, offsets, flags, times.

use super::*;
use crate::abi::errno::{EFBIG, EINVAL, ENXIO};

const LAST: u64 = i64::MAX as u64;

fn io(offset: u64, size: u32) -> Vec<u8> {
    [q(&[5, offset]), w(&[size, 0]), q(&[0]), w(&[0, 0])].concat()
}

fn operation(bytes: &[u8], writable: u32) -> Operation<'_> {
    parsed(bytes, writable).unwrap().operation
}

#[test]
fn answers_fit_their_room() {
    for (asked, writable, expected) in [(4096, 16 + 4096, 4096), (4096, 16 + 100, 100), (u32::MAX, 16, 0), (0, 4096, 0)] {
        let bytes = message(opcode::READ, &io(0, asked));
        assert!(matches!(operation(&bytes, writable), Operation::Read { size, .. } if size == expected));
        for opcode in [opcode::READDIR, opcode::READDIRPLUS] {
            let bytes = message(opcode, &io(0, asked));
            assert!(matches!(operation(&bytes, writable), Operation::ReadDir { size, .. } if size == expected));
        }
    }
    for (asked, writable, expected) in [(u32::MAX, AMPLE, 65536), (256, 16 + 100, 100), (100, AMPLE, 100), (1, 17, 1)] {
        let bytes = message(opcode::LISTXATTR, &w(&[asked, 0]));
        assert_eq!(operation(&bytes, writable), Operation::ListXattr { size: expected });
        let bytes = message(opcode::GETXATTR, &[w(&[asked, 0]), b"user.x\0".to_vec()].concat());
        assert_eq!(operation(&bytes, writable), Operation::GetXattr { name: c"user.x", size: expected });
    }
}

/// With room for nothing, a question for the value must not become one for its length.
#[test]
fn no_room_is_not_a_question() {
    let bytes = message(opcode::LISTXATTR, &w(&[256, 0]));
    assert_eq!(errno(parsed(&bytes, 16)), EINVAL);
}

#[test]
fn ioctls_are_small() {
    let ioctl = |input: u32, output: u32, data: usize| {
        let head = [q(&[5]), w(&[0, 1]), q(&[0]), w(&[input, output])].concat();
        message(opcode::IOCTL, &[head, vec![0; data]].concat())
    };
    assert_eq!(errno(parsed(&ioctl(5, 0, 4), AMPLE)), EINVAL);
    assert_eq!(errno(parsed(&ioctl(4097, 0, 5000), AMPLE)), EINVAL);
    assert_eq!(errno(parsed(&ioctl(u32::MAX, 0, 4), AMPLE)), EINVAL);
    for (output, writable, expected) in [(8, AMPLE, 8), (8, 32 + 4, 4), (u32::MAX, AMPLE, 4096), (8, 32, 0)] {
        let bytes = ioctl(4096, output, 4096);
        let Operation::Ioctl { input, output, .. } = operation(&bytes, writable) else { panic!() };
        assert_eq!((input.len(), output), (4096, expected));
    }
}

#[test]
fn a_write_has_its_data() {
    let write = |offset: u64, size: u32, data: usize| message(opcode::WRITE, &[io(offset, size), vec![0; data]].concat());
    assert_eq!(errno(parsed(&write(0, 5, 4), AMPLE)), EINVAL);
    assert_eq!(errno(parsed(&write(0, u32::MAX, 4), AMPLE)), EINVAL);
    assert!(matches!(operation(&write(0, 3, 4), AMPLE), Operation::Write { size: 3, .. }));
    assert!(matches!(operation(&write(LAST - 4, 4, 4), AMPLE), Operation::Write { size: 4, .. }));
    for offset in [u64::MAX, LAST + 1, LAST - 3, u64::MAX - 3] {
        assert_eq!(errno(parsed(&write(offset, 4, 4), AMPLE)), EFBIG, "{offset}");
    }
}

#[test]
fn offsets_are_those_of_files() {
    for offset in [u64::MAX, LAST + 1, LAST - 3, u64::MAX - 3] {
        assert_eq!(refused(opcode::READ, &io(offset, 4)), EINVAL);
    }
    assert!(parsed(&message(opcode::READ, &io(LAST - 4, 4)), AMPLE).is_ok());
    for opcode in [opcode::READDIR, opcode::READDIRPLUS] {
        assert_eq!(refused(opcode, &io(LAST + 1, 4)), EINVAL);
        assert!(parsed(&message(opcode, &io(LAST, 4)), AMPLE).is_ok());
    }
    let fallocate = |offset: u64, length: u64| [q(&[5, offset, length]), w(&[0, 0])].concat();
    for (offset, length, expected) in
        [(LAST, 1, EFBIG), (0, LAST + 1, EFBIG), (u64::MAX, 1, EFBIG), (u64::MAX, u64::MAX, EFBIG), (0, 0, EINVAL)]
    {
        assert_eq!(refused(opcode::FALLOCATE, &fallocate(offset, length)), expected);
    }
    assert!(parsed(&message(opcode::FALLOCATE, &fallocate(0, LAST)), AMPLE).is_ok());
    let lseek = |offset: u64, whence: u32| [q(&[5, offset]), w(&[whence, 0])].concat();
    for (offset, whence, expected) in
        [(0, 5, EINVAL), (0, u32::MAX, EINVAL), (LAST + 1, 0, EINVAL), (LAST + 1, 3, ENXIO), (u64::MAX, 4, ENXIO)]
    {
        assert_eq!(refused(opcode::LSEEK, &lseek(offset, whence)), expected, "{offset} {whence}");
    }
}

#[test]
fn copies_end_where_files_can() {
    let copy = |from: u64, to: u64, length: u64, flags: u64| q(&[5, from, 9, 6, to, length, flags]);
    for opcode in [opcode::COPY_FILE_RANGE, opcode::COPY_FILE_RANGE_64] {
        assert_eq!(refused(opcode, &copy(LAST + 1, 0, 1, 0)), EINVAL);
        assert_eq!(refused(opcode, &copy(0, u64::MAX, 1, 0)), EINVAL);
        assert_eq!(refused(opcode, &copy(0, 0, 1, 1)), EINVAL);
        let bytes = message(opcode, &copy(LAST - 10, 5, u64::MAX, 0));
        assert!(matches!(operation(&bytes, AMPLE), Operation::CopyFileRange { length: 10, .. }));
    }
}

#[test]
fn flags_of_a_renaming() {
    let renaming = |flags: u32| [q(&[9]), w(&[flags, 0]), b"a\0b\0".to_vec()].concat();
    for good in [0, 1, 2, 4, 5] {
        let bytes = message(opcode::RENAME2, &renaming(good));
        assert!(matches!(operation(&bytes, AMPLE), Operation::Rename { flags, .. } if flags == good));
    }
    for bad in [3, 6, 7, 8, 9, u32::MAX] {
        assert_eq!(refused(opcode::RENAME2, &renaming(bad)), EINVAL, "{bad}");
    }
}

/// SETATTR with these flags; times, owners and length as they are given.
fn setattr(valid: u32, size: u64, nanoseconds: u32, owner: [u32; 2]) -> Vec<u8> {
    let times = w(&[nanoseconds, nanoseconds, nanoseconds]);
    [w(&[valid, 0]), q(&[5, size, 0, 1, 1, 1]), times, w(&[0o107_777, 0, owner[0], owner[1], 0])].concat()
}

#[test]
fn nonsense_counts_only_where_it_is_meant() {
    let bytes = message(opcode::SETATTR, &setattr(0, u64::MAX, u32::MAX, [u32::MAX; 2]));
    assert_eq!(operation(&bytes, AMPLE), Operation::SetAttr(SetAttr::default()));
    assert_eq!(refused(opcode::SETATTR, &setattr(1 << 1, 0, 0, [u32::MAX, 0])), EINVAL);
    assert_eq!(refused(opcode::SETATTR, &setattr(1 << 2, 0, 0, [0, u32::MAX])), EINVAL);
    assert_eq!(refused(opcode::SETATTR, &setattr(1 << 3, LAST + 1, 0, [0, 0])), EFBIG);
    assert_eq!(refused(opcode::SETATTR, &setattr(1 << 4, 0, 1_000_000_000, [0, 0])), EINVAL);
    assert_eq!(refused(opcode::SETATTR, &setattr(1 << 5, 0, u32::MAX, [0, 0])), EINVAL);
    let now = message(opcode::SETATTR, &setattr(1 << 4 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 9 | 1, 0, u32::MAX, [0, 0]));
    let expected = SetAttr { mode: Some(0o7777), atime: Some(Time::Now), mtime: Some(Time::Now), ..SetAttr::default() };
    assert_eq!(operation(&now, AMPLE), Operation::SetAttr(expected));
}

#[test]
fn locks_have_a_range_and_a_kind() {
    let lock = |start: u64, end: u64, kind: u32| [q(&[5, 6, start, end]), w(&[kind, 1, 0, 0])].concat();
    for opcode in [opcode::GETLK, opcode::SETLK, opcode::SETLKW] {
        for (start, end, kind) in [(0, 1, 3), (0, 1, u32::MAX), (2, 1, 0), (LAST + 1, u64::MAX, 0), (0, LAST + 1, 0)] {
            assert_eq!(refused(opcode, &lock(start, end, kind)), EINVAL);
        }
        for end in [0, 1, LAST, u64::MAX] {
            assert!(parsed(&message(opcode, &lock(0, end, 1)), AMPLE).is_ok());
        }
    }
    assert_eq!(refused(opcode::GETLK, &lock(0, 1, 2)), EINVAL);
}

#[test]
fn access_is_of_three_kinds() {
    assert_eq!(refused(opcode::ACCESS, &w(&[8, 0])), EINVAL);
}

#[test]
fn the_first_message_may_be_an_old_one() {
    // Before 7.6 it had but its version; before 7.36 one word of flags, in which the mark of a second one may not stand.
    assert_eq!(refused(opcode::INIT, &w(&[7, 5])), EINVAL);
    assert_eq!(refused(opcode::INIT, &w(&[7, 36, 0, 1 << 30])), EINVAL);
    let bytes = message(opcode::INIT, &[w(&[7, 36, 0, 0, u32::MAX]), vec![0; 44]].concat());
    assert!(matches!(operation(&bytes, AMPLE), Operation::Init { flags: 0, .. }));
}
