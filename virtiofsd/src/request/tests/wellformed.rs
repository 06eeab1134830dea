//! One message of each kind, as Linux sends it.

use std::collections::BTreeSet;

use super::*;
use crate::abi::errno::{EINVAL, ENOSYS};

/// A message, what is made of it, how much of it has to be there, and how many bytes of room its answer has to have.
pub(super) struct Example {
    pub(super) opcode: u32,
    pub(super) body: Vec<u8>,
    pub(super) meaning: Operation<'static>,
    pub(super) needs: usize,
    pub(super) answer: u32,
}

fn example(opcode: u32, body: Vec<u8>, answer: u32, meaning: Operation<'static>) -> Example {
    Example { opcode, needs: body.len(), body, meaning, answer }
}

pub(super) fn all() -> Vec<Example> {
    [names(), attributes(), files(), directories(), places(), the_rest()].into_iter().flatten().collect()
}

fn with(head: Vec<u8>, text: &[u8]) -> Vec<u8> {
    [&head, text].concat()
}

fn names() -> Vec<Example> {
    use Operation::{Create, Link, Lookup, MkDir, MkNod, Rename, RmDir, Symlink, TmpFile, Unlink};
    let (a, b) = (name(c"a"), name(c"bc"));
    let made = || w(&[0o102, 0o644, 0o22, 1]);
    let tmpfile = TmpFile { flags: 0o102, mode: 0o644, umask: 0o22, open_flags: 1 };
    vec![
        example(opcode::LOOKUP, b"a\0".to_vec(), 128, Lookup { name: a }),
        example(opcode::SYMLINK, b"a\0../x/y\0".to_vec(), 128, Symlink { name: a, target: c"../x/y" }),
        example(
            opcode::MKNOD,
            with(w(&[0o010_644, 0x103, 0o22, 0]), b"a\0"),
            128,
            MkNod { name: a, mode: 0o010_644, device: 0x103, umask: 0o22 },
        ),
        example(opcode::MKDIR, with(w(&[0o755, 0o22]), b"a\0"), 128, MkDir { name: a, mode: 0o755, umask: 0o22 }),
        example(opcode::UNLINK, b"a\0".to_vec(), 0, Unlink { name: a }),
        example(opcode::RMDIR, b"a\0".to_vec(), 0, RmDir { name: a }),
        example(opcode::RENAME, with(q(&[9]), b"a\0bc\0"), 0, Rename { name: a, to: 9, new_name: b, flags: 0 }),
        example(
            opcode::RENAME2,
            [q(&[9]), w(&[2, 0]), b"a\0bc\0".to_vec()].concat(),
            0,
            Rename { name: a, to: 9, new_name: b, flags: 2 },
        ),
        example(opcode::LINK, with(q(&[9]), b"bc\0"), 128, Link { old: 9, name: b }),
        example(
            opcode::CREATE,
            with(made(), b"a\0"),
            144,
            Create { name: a, flags: 0o102, mode: 0o644, umask: 0o22, open_flags: 1 },
        ),
        Example { needs: 16, ..example(opcode::TMPFILE, with(made(), b"/\0"), 144, tmpfile) },
    ]
}

fn attributes() -> Vec<Example> {
    use Operation::{GetAttr, GetXattr, ListXattr, RemoveXattr, SetAttr as Set, SetXattr, Statx};
    let set = |valid: u32| {
        let fields = [w(&[valid, 0]), q(&[5, 4096, 6, 7, u64::MAX, 9]), w(&[1, 2, 3, 0o100_755, 0, UID, GID, 0])];
        fields.concat()
    };
    let everything = super::super::SetAttr {
        handle: Some(5),
        mode: Some(0o755),
        uid: Some(UID),
        gid: Some(GID),
        size: Some(4096),
        atime: Some(Time::At(7, 1)),
        mtime: Some(Time::At(-1, 2)),
        kill_suidgid: true,
    };
    let value = [w(&[3, 1, 1, 0]), b"user.x\0abc".to_vec()].concat();
    let what = SetXattr { name: c"user.x", value: b"abc", flags: 1, clear_sgid: true };
    vec![
        example(opcode::GETATTR, [w(&[1, 0]), q(&[5])].concat(), 104, GetAttr { handle: Some(5) }),
        example(
            opcode::STATX,
            [w(&[0, 0]), q(&[5]), w(&[0x100, 0xfff])].concat(),
            288,
            Statx { handle: None, flags: 0x100, mask: 0xfff },
        ),
        example(opcode::SETATTR, set(0x87f), 104, Set(everything)),
        example(opcode::SETXATTR, value, 0, what),
        example(opcode::GETXATTR, [w(&[256, 0]), b"user.x\0".to_vec()].concat(), 1, GetXattr { name: c"user.x", size: 256 }),
        example(opcode::GETXATTR, [w(&[0, 0]), b"user.x\0".to_vec()].concat(), 8, GetXattr { name: c"user.x", size: 0 }),
        example(opcode::LISTXATTR, w(&[0, 0]), 8, ListXattr { size: 0 }),
        example(opcode::REMOVEXATTR, b"user.x\0".to_vec(), 0, RemoveXattr { name: c"user.x" }),
    ]
}

fn files() -> Vec<Example> {
    use Operation::{FSync, Flush, Open, Read, Release, Write};
    let io = |size: u32, flags: u32| [q(&[5, 8192]), w(&[size, flags]), q(&[6]), w(&[0o2, 0])].concat();
    let write = Write { handle: 5, offset: 8192, size: 4, write_flags: 4, flags: 0o2 };
    let release = |flags: u32| [q(&[5]), w(&[0o2, flags]), q(&[6])].concat();
    vec![
        Example { needs: 8, ..example(opcode::OPEN, w(&[0o1002, 1]), 16, Open { flags: 0o1002, open_flags: 1 }) },
        Example { needs: 40, ..example(opcode::READ, io(4096, 2), 0, Read { handle: 5, offset: 8192, size: 4096, flags: 0o2 }) },
        example(opcode::WRITE, with(io(4, 4), b"data"), 8, write),
        example(opcode::RELEASE, release(0), 0, Release { handle: 5, owner: None, flags: 0o2, release_flags: 0 }),
        example(opcode::RELEASE, release(2), 0, Release { handle: 5, owner: Some(6), flags: 0o2, release_flags: 2 }),
        example(opcode::FLUSH, q(&[5, 0, 6]), 0, Flush { handle: 5, owner: 6 }),
        Example { needs: 12, ..example(opcode::FSYNC, [q(&[5]), w(&[1, 0])].concat(), 0, FSync { handle: 5, data_only: true }) },
    ]
}

fn directories() -> Vec<Example> {
    use Operation::{FSyncDir, OpenDir, ReadDir, ReleaseDir};
    let read = || [q(&[5, 3]), w(&[4096, 0]), q(&[0]), w(&[0, 0])].concat();
    let release = [q(&[5]), w(&[0, 0]), q(&[0])].concat();
    vec![
        Example { needs: 4, ..example(opcode::OPENDIR, w(&[0o200_000, 0]), 16, OpenDir { flags: 0o200_000 }) },
        example(opcode::READDIR, read(), 0, ReadDir { handle: 5, offset: 3, size: 4096, plus: false }),
        example(opcode::READDIRPLUS, read(), 0, ReadDir { handle: 5, offset: 3, size: 4096, plus: true }),
        Example { needs: 8, ..example(opcode::RELEASEDIR, release, 0, ReleaseDir { handle: 5 }) },
        Example {
            needs: 12,
            ..example(opcode::FSYNCDIR, [q(&[5]), w(&[0, 0])].concat(), 0, FSyncDir { handle: 5, data_only: false })
        },
    ]
}

fn places() -> Vec<Example> {
    use Operation::{CopyFileRange, FAllocate, GetLock, LSeek, SetLock};
    let range = |kind: u32, flags: u32| [q(&[5, 6, 0, 99]), w(&[kind, 4242, flags, 0])].concat();
    let lock = |kind| Lock { start: 0, end: 99, kind, pid: 4242 };
    let copy = || q(&[5, 4096, 9, 6, 0, 1 << 33, 0]);
    let copied = |length: u64, long: bool| CopyFileRange {
        handle: 5,
        offset: 4096,
        to: 9,
        to_handle: 6,
        to_offset: 0,
        length,
        flags: 0,
        long,
    };
    let set = |kind, wait, flock| SetLock { handle: 5, owner: 6, lock: lock(kind), wait, flock };
    vec![
        Example {
            needs: 28,
            ..example(
                opcode::FALLOCATE,
                [q(&[5, 4096, 512]), w(&[3, 0])].concat(),
                0,
                FAllocate { handle: 5, offset: 4096, length: 512, mode: 3 },
            )
        },
        Example {
            needs: 20,
            ..example(opcode::LSEEK, [q(&[5, 1]), w(&[3, 0])].concat(), 8, LSeek { handle: 5, offset: 1, whence: 3 })
        },
        example(opcode::COPY_FILE_RANGE, copy(), 8, copied(0xffff_f000, false)),
        example(opcode::COPY_FILE_RANGE_64, copy(), 8, copied(1 << 33, true)),
        example(opcode::GETLK, range(1, 0), 24, GetLock { handle: 5, owner: 6, lock: lock(LockKind::Exclusive) }),
        example(opcode::SETLK, range(2, 1), 0, set(LockKind::None, false, true)),
        example(opcode::SETLKW, range(0, 0), 0, set(LockKind::Shared, true, false)),
    ]
}

fn the_rest() -> Vec<Example> {
    use Operation::{Access, BatchForget, Destroy, Forget, Init, Interrupt, Ioctl, ReadLink, StatFs, SyncFs};
    let ioctl = [q(&[5]), w(&[0, 0x4004_6602]), q(&[0x7fff_0000]), w(&[4, 8]), vec![1, 2, 3, 4]].concat();
    let asked = Ioctl { handle: 5, flags: 0, command: 0x4004_6602, argument: 0x7fff_0000, input: &[1, 2, 3, 4], output: 8 };
    let new = [w(&[7, 45, 65536, 1 << 30 | 1, 4]), vec![0; 44]].concat();
    let flags = 4 << 32 | 1 << 30 | 1;
    vec![
        example(opcode::FORGET, q(&[3]), 0, Forget { count: 3 }),
        example(opcode::BATCH_FORGET, [w(&[2, 0]), q(&[3, 1, 4, 2])].concat(), 0, BatchForget { count: 2 }),
        Example { needs: 0, ..example(opcode::READLINK, Vec::new(), 0, ReadLink) },
        Example { needs: 0, ..example(opcode::STATFS, Vec::new(), 80, StatFs) },
        Example { needs: 4, ..example(opcode::ACCESS, w(&[7, 0]), 0, Access { mask: 7 }) },
        example(opcode::INTERRUPT, q(&[33]), 0, Interrupt { unique: 33 }),
        Example { needs: 0, ..example(opcode::DESTROY, Vec::new(), 0, Destroy) },
        example(opcode::IOCTL, ioctl, 16, asked),
        Example { needs: 0, ..example(opcode::SYNCFS, q(&[0]), 0, SyncFs) },
        example(opcode::INIT, w(&[7, 31, 4096, 0x73]), 64, Init { major: 7, minor: 31, max_readahead: 4096, flags: 0x73 }),
        Example { needs: 20, ..example(opcode::INIT, new, 64, Init { major: 7, minor: 45, max_readahead: 65536, flags }) },
    ]
}

#[test]
fn each_kind_means_what_it_says() {
    for Example { opcode, body, meaning, .. } in all() {
        let bytes = message(opcode, &body);
        let request = parsed(&bytes, AMPLE).unwrap_or_else(|bad| panic!("{opcode}: {bad}"));
        let group = None;
        assert_eq!(request, Request { unique: UNIQUE, node: NODE, uid: UID, gid: GID, group, label: None, operation: meaning });
    }
}

#[test]
fn what_is_not_offered_is_unknown() {
    let known: BTreeSet<u32> = all().iter().map(|example| example.opcode).collect();
    let unknown = [opcode::BMAP, opcode::POLL, opcode::NOTIFY_REPLY, opcode::SETUPMAPPING, opcode::REMOVEMAPPING];
    let every: BTreeSet<u32> = (1..=53).filter(|number| ![7, 19].contains(number)).collect();
    assert_eq!(known.iter().copied().chain(unknown).collect::<BTreeSet<_>>(), every);
    for opcode in unknown.into_iter().chain([0, 7, 19, 54, 4096, 26 << 24, u32::MAX]) {
        assert_eq!(refused(opcode, &[0; 64]), ENOSYS, "{opcode}");
    }
}

/// A message that ends early is not one of zeroes. Where an end is enough that Linux does not send, it means the same.
#[test]
fn each_kind_has_to_be_whole() {
    for Example { opcode, body, meaning, needs, .. } in all() {
        for len in 0..=body.len() {
            let bytes = message(opcode, &body[..len]);
            let outcome = parsed(&bytes, AMPLE);
            match (len < needs, outcome) {
                (false, Ok(request)) => assert_eq!(request.operation, meaning, "{opcode} of {len}"),
                (true, Err(Bad::Unanswerable)) if [opcode::FORGET, opcode::BATCH_FORGET].contains(&opcode) => {}
                (true, Err(Bad::Refused { errno: EINVAL, .. })) => {}
                (_, other) => panic!("{opcode} of {len}: {other:?}"),
            }
        }
    }
}

#[test]
fn what_cannot_be_answered_is_not_done() {
    for Example { opcode, body, answer, .. } in all() {
        let bytes = message(opcode, &body);
        assert!(parsed(&bytes, 16 + answer).is_ok(), "{opcode}");
        let silent = [opcode::FORGET, opcode::BATCH_FORGET].contains(&opcode);
        for writable in [0, 8, 15] {
            let outcome = parsed(&bytes, writable);
            assert_eq!(outcome.err(), (!silent).then_some(Bad::Unanswerable), "{opcode}");
        }
        for writable in 16..16 + answer {
            assert_eq!(errno(parsed(&bytes, writable)), EINVAL, "{opcode}");
        }
    }
}
