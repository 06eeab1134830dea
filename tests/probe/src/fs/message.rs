//! FUSE requests, built byte by byte, rightly or wrongly (Linux, `include/uapi/linux/fuse.h`).
//!
//! A [`Message`] is what a guest's kernel would send, and each part of it can be changed to what none would.

use super::wire::IN_HEADER;

/// The node of the share itself.
pub const ROOT: u64 = 1;

/// FUSE_EXT_GROUPS.
const EXT_GROUPS: u32 = 32;

/// Kinds of requests, by their numbers.
pub mod op {
    #![expect(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

/// What of an inode SETATTR changes.
pub mod set {
    #![expect(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const FH: u32 = 1 << 6;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// A request.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// What is asked.
    pub opcode: u32,
    /// About which inode.
    pub node: u64,
    /// By whom.
    pub uid: u32,
    /// Of which group.
    pub gid: u32,
    /// All behind the header but the extension.
    pub body: Vec<u8>,
    /// What stands behind all else, at a multiple of eight bytes.
    pub extension: Vec<u8>,
}

impl Message {
    /// About an inode, by the guest's root.
    pub fn new(opcode: u32, node: u64, body: impl Into<Vec<u8>>) -> Message {
        Message { opcode, node, body: body.into(), ..Message::default() }
    }

    /// The same by somebody else.
    #[must_use]
    pub fn by(mut self, uid: u32, gid: u32) -> Message {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// The same by a member of this group.
    #[must_use]
    pub fn in_group(mut self, group: u32) -> Message {
        self.extension = words(&[16, EXT_GROUPS, 1, group]);
        self
    }

    /// The same with a label for what is made, and what else stands behind the message.
    #[must_use]
    pub fn labelled(mut self, name: &str, label: &[u8]) -> Message {
        let mut content = [words(&[u32::try_from(label.len()).unwrap_or(u32::MAX), 0]), text(name), label.to_vec()].concat();
        content.resize(content.len().next_multiple_of(8), 0);
        let size = u32::try_from(8 + content.len()).unwrap_or(u32::MAX);
        self.extension.extend([words(&[size, 1]), content].concat());
        self
    }

    /// As it goes over the wire, under a number.
    pub fn bytes(&self, unique: u64) -> Vec<u8> {
        // As Linux does: the extension begins where the last name ends, aligned to nothing.
        let body = self.body.clone();
        let units = u32::try_from(self.extension.len() / 8).unwrap_or(0);
        let len = IN_HEADER + u32::try_from(body.len() + self.extension.len()).unwrap_or(0);
        [
            words(&[len, self.opcode]),
            longs(&[unique, self.node]),
            words(&[self.uid, self.gid, std::process::id(), units]),
            body,
            self.extension.clone(),
        ]
        .concat()
    }
}

/// Numbers of four bytes.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Numbers of eight bytes.
pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// A text with the zero behind it.
pub fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    [text.as_ref(), &[0]].concat()
}

/// LOOKUP.
pub fn lookup(dir: u64, name: impl AsRef<[u8]>) -> Message {
    Message::new(op::LOOKUP, dir, text(name))
}

/// GETATTR without a handle.
pub fn getattr(node: u64) -> Message {
    Message::new(op::GETATTR, node, [0; 16])
}

/// FORGET.
pub fn forget(node: u64, count: u64) -> Message {
    Message::new(op::FORGET, node, longs(&[count]))
}

/// MKDIR.
pub fn mkdir(dir: u64, name: impl AsRef<[u8]>, mode: u32) -> Message {
    Message::new(op::MKDIR, dir, [words(&[mode, 0]), text(name)].concat())
}

/// MKNOD. `mode` with the type.
pub fn mknod(dir: u64, name: impl AsRef<[u8]>, mode: u32, device: u32) -> Message {
    Message::new(op::MKNOD, dir, [words(&[mode, device, 0, 0]), text(name)].concat())
}

/// SYMLINK.
pub fn symlink(dir: u64, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Message {
    Message::new(op::SYMLINK, dir, [text(name), text(target)].concat())
}

/// LINK: a name for `old`.
pub fn link(dir: u64, name: impl AsRef<[u8]>, old: u64) -> Message {
    Message::new(op::LINK, dir, [longs(&[old]), text(name)].concat())
}

/// UNLINK.
pub fn unlink(dir: u64, name: impl AsRef<[u8]>) -> Message {
    Message::new(op::UNLINK, dir, text(name))
}

/// RMDIR.
pub fn rmdir(dir: u64, name: impl AsRef<[u8]>) -> Message {
    Message::new(op::RMDIR, dir, text(name))
}

/// RENAME2.
pub fn rename(dir: u64, name: impl AsRef<[u8]>, to: u64, new: impl AsRef<[u8]>, flags: u32) -> Message {
    Message::new(op::RENAME2, dir, [longs(&[to]), words(&[flags, 0]), text(name), text(new)].concat())
}

/// CREATE. `flags` are those of open(2).
pub fn create(dir: u64, name: impl AsRef<[u8]>, flags: i32, mode: u32) -> Message {
    Message::new(op::CREATE, dir, [words(&[flags.cast_unsigned(), mode, 0, 0]), text(name)].concat())
}

/// TMPFILE.
pub fn tmpfile(dir: u64, flags: i32, mode: u32) -> Message {
    Message::new(op::TMPFILE, dir, words(&[flags.cast_unsigned(), mode, 0, 0]))
}

/// OPEN.
pub fn open(node: u64, flags: i32) -> Message {
    Message::new(op::OPEN, node, words(&[flags.cast_unsigned(), 0]))
}

/// OPENDIR.
pub fn opendir(node: u64) -> Message {
    Message::new(op::OPENDIR, node, [0; 8])
}

/// RELEASE.
pub fn release(node: u64, handle: u64) -> Message {
    Message::new(op::RELEASE, node, [longs(&[handle]), words(&[0, 0]), longs(&[0])].concat())
}

/// READ.
pub fn read(node: u64, handle: u64, offset: u64, size: u32) -> Message {
    Message::new(op::READ, node, span(handle, offset, size, 0))
}

/// READDIR, or READDIRPLUS.
pub fn readdir(node: u64, handle: u64, offset: u64, size: u32, plus: bool) -> Message {
    Message::new(if plus { op::READDIRPLUS } else { op::READDIR }, node, span(handle, offset, size, 0))
}

/// WRITE.
pub fn write(node: u64, handle: u64, offset: u64, data: &[u8]) -> Message {
    write_as(node, handle, offset, data, 0)
}

/// WRITE with flags of its own.
pub fn write_as(node: u64, handle: u64, offset: u64, data: &[u8], flags: u32) -> Message {
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    Message::new(op::WRITE, node, [&span(handle, offset, size, flags)[..], data].concat())
}

/// `fuse_read_in`, which `fuse_write_in` is, too.
pub fn span(handle: u64, offset: u64, size: u32, flags: u32) -> Vec<u8> {
    [longs(&[handle, offset]), words(&[size, flags]), longs(&[0]), words(&[0, 0])].concat()
}

/// What SETATTR sets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Set {
    /// Bits of [`set`]: which of these.
    pub valid: u32,
    /// By this open file.
    pub handle: u64,
    /// Length.
    pub size: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// SETATTR.
pub fn setattr(node: u64, to: Set) -> Message {
    let Set { valid, handle, size, mode, uid, gid } = to;
    let head = [words(&[valid, 0]), longs(&[handle, size, 0, 0, 0, 0])].concat();
    Message::new(op::SETATTR, node, [head, words(&[0, 0, 0, mode, 0, uid, gid, 0])].concat())
}

/// A new length.
pub fn truncate(node: u64, size: u64) -> Message {
    setattr(node, Set { valid: set::SIZE, size, ..Set::default() })
}

/// New permissions.
pub fn chmod(node: u64, mode: u32) -> Message {
    setattr(node, Set { valid: set::MODE, mode, ..Set::default() })
}

/// FALLOCATE.
pub fn fallocate(node: u64, handle: u64, offset: u64, length: u64) -> Message {
    Message::new(op::FALLOCATE, node, [longs(&[handle, offset, length]), words(&[0, 0])].concat())
}

/// COPY_FILE_RANGE, from the beginning of one file to that of another.
pub fn copy((node, handle): (u64, u64), (to, to_handle): (u64, u64), length: u64) -> Message {
    Message::new(op::COPY_FILE_RANGE, node, longs(&[handle, 0, to, to_handle, 0, length, 0]))
}

/// SETXATTR.
pub fn setxattr(node: u64, name: impl AsRef<[u8]>, value: &[u8]) -> Message {
    let size = u32::try_from(value.len()).unwrap_or(u32::MAX);
    Message::new(op::SETXATTR, node, [words(&[size, 0]), text(name), value.to_vec()].concat())
}

/// GETXATTR.
pub fn getxattr(node: u64, name: impl AsRef<[u8]>, size: u32) -> Message {
    Message::new(op::GETXATTR, node, [words(&[size, 0]), text(name)].concat())
}

/// LISTXATTR.
pub fn listxattr(node: u64, size: u32) -> Message {
    Message::new(op::LISTXATTR, node, words(&[size, 0]))
}

/// REMOVEXATTR.
pub fn removexattr(node: u64, name: impl AsRef<[u8]>) -> Message {
    Message::new(op::REMOVEXATTR, node, text(name))
}

/// BATCH_FORGET of so many, as it says.
pub fn forget_many(count: u32, pairs: &[(u64, u64)]) -> Message {
    let pairs: Vec<u64> = pairs.iter().flat_map(|(node, count)| [*node, *count]).collect();
    Message::new(op::BATCH_FORGET, 0, [words(&[count, 0]), longs(&pairs)].concat())
}
