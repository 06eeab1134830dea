//! What stands behind the header: too little, too much, and numbers that cannot be.

use libc::{E2BIG, EBADF, EFBIG, EINVAL, ENODATA, ENOMEM, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EPROTO, ERANGE, O_RDONLY, O_RDWR};

use super::Good::{Done, Error, Nothing};
use super::{Case, Foe, Good, ROOM};
use crate::fs::message::{self, Message, ROOT, longs, op, span, text, words};

const INVALID: &[Good] = &[Error(EINVAL)];

pub(super) fn cases() -> Vec<Case> {
    [bodies(), names(), numbers(), sessions()].into_iter().flatten().collect()
}

/// Arguments that end too soon.
fn bodies() -> Vec<Case> {
    const SHORT: [(&str, u32, usize); 24] = [
        ("getattr-short", op::GETATTR, 8),
        ("setattr-short", op::SETATTR, 40),
        ("read-short", op::READ, 20),
        ("write-short", op::WRITE, 20),
        ("open-short", op::OPEN, 4),
        ("release-short", op::RELEASE, 4),
        ("mkdir-short", op::MKDIR, 4),
        ("mknod-short", op::MKNOD, 8),
        ("create-short", op::CREATE, 8),
        ("rename-short", op::RENAME, 4),
        ("rename2-short", op::RENAME2, 12),
        ("link-short", op::LINK, 4),
        ("getxattr-short", op::GETXATTR, 4),
        ("setxattr-short", op::SETXATTR, 4),
        ("listxattr-short", op::LISTXATTR, 4),
        ("fallocate-short", op::FALLOCATE, 8),
        ("lseek-short", op::LSEEK, 8),
        ("copy-short", op::COPY_FILE_RANGE, 16),
        ("readdir-short", op::READDIR, 8),
        ("opendir-short", op::OPENDIR, 0),
        ("ioctl-short", op::IOCTL, 8),
        ("init-short", op::INIT, 4),
        ("lookup-empty-body", op::LOOKUP, 0),
        ("symlink-empty-body", op::SYMLINK, 0),
    ];
    let case = |(name, opcode, len): (&'static str, u32, usize)| {
        Case::new(name, INVALID, move |foe| {
            let node = foe.file;
            foe.say(&Message::new(opcode, node, vec![1; len]))
        })
    };
    SHORT.into_iter().map(case).collect()
}

fn say(name: &'static str, good: &'static [Good], message: impl Fn(&Foe) -> Message + 'static) -> Case {
    Case::new(name, good, move |foe| {
        let message = message(foe);
        foe.say(&message)
    })
}

/// One name where two should be, attributes with odd names, extensions.
fn names() -> Vec<Case> {
    vec![
        say("rename-one-name", INVALID, |_| Message::new(op::RENAME, ROOT, [longs(&[ROOT]), text("file")].concat())),
        say("rename-second-without-end", INVALID, |_| {
            Message::new(op::RENAME, ROOT, [longs(&[ROOT]), text("file"), b"new".to_vec()].concat())
        }),
        say("symlink-one-name", INVALID, |_| Message::new(op::SYMLINK, ROOT, text("new"))),
        say("symlink-target-without-end", INVALID, |_| {
            Message::new(op::SYMLINK, ROOT, [text("new"), b"target".to_vec()].concat())
        }),
        say("setxattr-not-utf8", &[Done, Error(ENOSYS), Error(EOPNOTSUPP)], |foe| {
            message::setxattr(foe.file, b"user.\xff\xfe\x80", b"value")
        }),
        say("getxattr-not-utf8", &[Error(ENODATA), Error(ENOSYS), Error(EOPNOTSUPP)], |foe| {
            message::getxattr(foe.file, b"user.\xff\xfe\x80", 100)
        }),
        say("setxattr-size-too-big", INVALID, |foe| {
            Message::new(op::SETXATTR, foe.file, [words(&[100, 0]), text("user.a"), b"short".to_vec()].concat())
        }),
        say("setxattr-size-4g", &[Error(E2BIG), Error(EINVAL)], |foe| {
            Message::new(op::SETXATTR, foe.file, [words(&[u32::MAX, 0]), text("user.a"), b"short".to_vec()].concat())
        }),
        say("setxattr-name-empty", INVALID, |foe| message::setxattr(foe.file, "", b"value")),
        say("setxattr-name-too-long", &[Error(ERANGE)], |foe| message::setxattr(foe.file, [b'x'; 256], b"value")),
        say("extension-list", INVALID, |_| extended(&words(&[24, 32, 2, 1000, 1001, 0]))),
        say("extension-size-0", INVALID, |_| extended(&words(&[0, 32, 1, 1000]))),
        say("extension-size-too-big", INVALID, |_| extended(&words(&[4096, 32, 1, 1000]))),
        say("extension-count-lies", INVALID, |_| extended(&words(&[16, 32, 9999, 1000]))),
        say("extension-unknown", INVALID, |_| extended(&words(&[16, 77, 1, 1000]))),
        Case::new("extension-cut", INVALID, |foe| {
            let mut bytes = message::mkdir(ROOT, "new", 0o755).in_group(1000).bytes(foe.raw.next_unique());
            let short = bytes.len() - 6;
            bytes.truncate(short);
            foe.say_bytes(&said(bytes), ROOM)
        }),
        Case::new("extension-longer-than-all", INVALID, |foe| {
            let mut bytes = message::mkdir(ROOT, "new", 0o755).bytes(foe.raw.next_unique());
            bytes.splice(36..38, [0xff, 0xff]);
            foe.say_bytes(&bytes, ROOM)
        }),
        say("group-nobody", INVALID, |_| message::mkdir(ROOT, "new", 0o755).in_group(u32::MAX)),
        say("uid-nobody", INVALID, |_| message::mkdir(ROOT, "new", 0o755).by(u32::MAX, 0)),
        say("gid-nobody", INVALID, |_| message::mkdir(ROOT, "new", 0o755).by(0, u32::MAX)),
        say("chown-nobody", INVALID, |foe| {
            message::setattr(foe.file, message::Set { valid: message::set::UID, uid: u32::MAX, ..message::Set::default() })
        }),
    ]
}

/// A MKDIR with these bytes as its extension.
fn extended(extension: &[u8]) -> Message {
    Message { extension: extension.to_vec(), ..message::mkdir(ROOT, "new", 0o755) }
}

/// Corrects the length in a header to that of the bytes.
fn said(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap_or(0);
    bytes.splice(..4, len.to_le_bytes());
    bytes
}

/// Offsets, sizes and counts that cannot be.
fn numbers() -> Vec<Case> {
    let with = |name, flags, good, message: fn(u64, u64) -> Message| {
        Case::new(name, good, move |foe: &mut Foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, flags)?);
            foe.say(&message(node, handle))
        })
    };
    vec![
        with("write-at-the-end-of-numbers", O_RDWR, &[Error(EFBIG), Error(EINVAL)], |node, handle| {
            message::write(node, handle, u64::MAX, b"data")
        }),
        with("write-at-i64-max", O_RDWR, &[Error(EFBIG), Error(EINVAL)], |node, handle| {
            message::write(node, handle, i64::MAX as u64, b"data")
        }),
        with("write-size-lies", O_RDWR, INVALID, |node, handle| {
            Message::new(op::WRITE, node, [&span(handle, 0, 4096, 0)[..], b"short"].concat())
        }),
        with("write-size-4g", O_RDWR, INVALID, |node, handle| {
            Message::new(op::WRITE, node, [&span(handle, 0, u32::MAX, 0)[..], b"short"].concat())
        }),
        with("read-at-the-end-of-numbers", O_RDONLY, INVALID, |node, handle| message::read(node, handle, u64::MAX, 100)),
        with("read-4g", O_RDONLY, &[Done, Error(ENOMEM), Error(EINVAL)], |node, handle| message::read(node, handle, 0, u32::MAX)),
        with("fallocate-overflow", O_RDWR, &[Error(EFBIG), Error(EINVAL)], |node, handle| {
            message::fallocate(node, handle, i64::MAX as u64, u64::MAX)
        }),
        with("fallocate-nothing", O_RDWR, INVALID, |node, handle| message::fallocate(node, handle, 0, 0)),
        with("lseek-whence", O_RDONLY, INVALID, |node, handle| {
            Message::new(op::LSEEK, node, [longs(&[handle, 0]), words(&[99, 0])].concat())
        }),
        with("lseek-far", O_RDONLY, &[Error(ENXIO), Error(EINVAL)], |node, handle| {
            Message::new(op::LSEEK, node, [longs(&[handle, u64::MAX]), words(&[3, 0])].concat())
        }),
        with("copy-4g-over-itself", O_RDWR, INVALID, |node, handle| message::copy((node, handle), (node, handle), u64::MAX)),
        with("ioctl-unknown", O_RDONLY, &[Error(ENOTTY), Error(ENOSYS)], |node, handle| {
            Message::new(op::IOCTL, node, [longs(&[handle]), words(&[0, 0x1234_5678]), longs(&[0]), words(&[0, 0])].concat())
        }),
        with("ioctl-in-4g", O_RDONLY, &[Error(EINVAL), Error(ENOTTY), Error(ENOSYS)], |node, handle| {
            Message::new(
                op::IOCTL,
                node,
                [longs(&[handle]), words(&[0, 0x8008_6601]), longs(&[0]), words(&[u32::MAX, u32::MAX])].concat(),
            )
        }),
        say("getxattr-4g", &[Error(ENODATA), Error(ENOMEM), Error(ENOSYS), Error(EOPNOTSUPP)], |foe| {
            message::getxattr(foe.file, "user.none", u32::MAX)
        }),
        say("listxattr-4g", &[Done, Error(ENOMEM), Error(ENOSYS)], |foe| {
            Message::new(op::LISTXATTR, foe.file, words(&[u32::MAX, 0]))
        }),
        say("truncate-at-the-end-of-numbers", &[Error(EFBIG), Error(EINVAL)], |foe| message::truncate(foe.file, u64::MAX)),
        say("mknod-no-type", INVALID, |_| message::mknod(ROOT, "new", libc::S_IFLNK | 0o644, 0)),
        say("mknod-directory", INVALID, |_| message::mknod(ROOT, "new", libc::S_IFDIR | 0o644, 0)),
        say("rename2-flags", INVALID, |_| message::rename(ROOT, "file", ROOT, "new", 0xffff)),
        say("opcode-unknown", &[Error(ENOSYS)], |_| Message::new(12345, ROOT, [0; 64])),
        say("opcode-0", &[Error(ENOSYS)], |_| Message::new(0, ROOT, [0; 64])),
        say("opcode-max", &[Error(ENOSYS)], |_| Message::new(u32::MAX, ROOT, [0; 64])),
        Case::new("readdir-bad-offset", &[Error(EINVAL), Error(ENXIO)], |foe| {
            let handle = foe.open_dir(ROOT)?;
            foe.say(&message::readdir(ROOT, handle, u64::MAX, 1000, false))
        }),
        Case::new("readdir-4g", &[Done, Error(ENOMEM), Error(EINVAL)], |foe| {
            let handle = foe.open_dir(ROOT)?;
            foe.say(&message::readdir(ROOT, handle, 0, u32::MAX, false))
        }),
        Case::new("readdir-no-room", &[Done, Error(EINVAL)], |foe| {
            let handle = foe.open_dir(ROOT)?;
            foe.say_with(&message::readdir(ROOT, handle, 0, 4096, false), 16)
        }),
        Case::new("setlk-unknown-kind", &[Error(EINVAL), Error(ENOSYS), Error(EBADF)], |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDWR)?);
            foe.say(&Message::new(32, node, [longs(&[handle, 1, 0, u64::MAX]), words(&[9, 1, 0, 0])].concat()))
        }),
    ]
}

/// FORGET and INIT.
fn sessions() -> Vec<Case> {
    vec![
        say("forget-short", &[Nothing], |foe| Message::new(op::FORGET, foe.file, [1; 4])),
        say("batch-forget-count-lies", &[Nothing], |foe| message::forget_many(3, &[(foe.file, 1)])),
        say("batch-forget-count-max", &[Nothing], |foe| message::forget_many(u32::MAX, &[(foe.file, 1)])),
        say("batch-forget-short", &[Nothing], |_| Message::new(op::BATCH_FORGET, 0, [1; 4])),
        // 7.5 had no more than the version: it may be answered, and it may be refused as too old.
        say("init-7.5", &[Error(EPROTO), Error(EINVAL)], |_| Message::new(op::INIT, 0, words(&[7, 5]))),
        say("init-6", &[Error(EPROTO), Error(EINVAL)], |_| init(6, 0)),
        say("init-8", &[Done], |_| init(8, 0)),
        say("init-twice", &[Done, Error(EINVAL)], |_| init(7, 38)),
        Case::new("destroy-twice", &[Done, Nothing], |foe| {
            foe.say(&Message::new(op::DESTROY, 0, []))?;
            let heard = foe.say(&Message::new(op::DESTROY, 0, []))?;
            foe.raw.init(!0)?;
            Ok(heard)
        }),
    ]
}

fn init(major: u32, minor: u32) -> Message {
    Message::new(op::INIT, 0, [words(&[major, minor, 1 << 17, 0]), vec![0; 48]].concat())
}
