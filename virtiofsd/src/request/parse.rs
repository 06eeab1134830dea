//! Each message, in the order of its number. What stands in a message behind the arguments that are known here is passed over where no
//! name and no data follows them: that is where later versions put more.

use super::extension::Extensions;
use super::message::{Header, Message, Wrong, invalid};
use super::{Bad, Dialect, Lock, LockKind, MAX_IOCTL, MAX_NAME, MAX_XATTR, Operation, Request, Room, SetAttr, Time, extension};
use crate::abi::errno::{E2BIG, EFBIG, EINVAL, ENOSYS, ENXIO};
use crate::abi::{answer, fattr, flag, init, lock, opcode, rename, seek, sent};

/// Last offset that a file can have.
const LAST: u64 = i64::MAX as u64;

/// Most bytes of a copy whose answer has 32 bits for their number: whole pages.
const MAX_SHORT_COPY: u64 = 0xffff_f000;

const NANOSECONDS: u32 = 1_000_000_000;

/// Parses a message, or as much of one as [`Fetched`](super::Fetched) has of it: its data may be missing, and stands in the chain.
///
/// # Errors
/// [`Bad`]: whatever is wrong with it.
pub fn parse<'a>(bytes: &'a [u8], room: Room, dialect: Dialect) -> Result<Request<'a>, Bad> {
    let (header, body) = Header::split(bytes).filter(|_| room.readable >= sent::HEADER).ok_or(Bad::Unanswerable)?;
    if !header.silent() && room.writable < answer::HEADER {
        return Err(Bad::Unanswerable);
    }
    request(&header, body, room, dialect).map_err(|Wrong { errno, why }| {
        if header.silent() { Bad::Unanswerable } else { Bad::Refused { unique: header.unique, errno, why } }
    })
}

fn request<'a>(header: &Header, body: &'a [u8], room: Room, dialect: Dialect) -> Result<Request<'a>, Wrong> {
    let mut message = Message::new(header, body, room)?;
    message.answered_with(least_answer(header.opcode))?;
    let mut extensions = Extensions::default();
    if header.makes() {
        // Elsewhere it is normal: an inode may be looked at by somebody whom a mapped mount knows no number for.
        if header.uid == u32::MAX || header.gid == u32::MAX {
            return invalid("a user or group that is none makes something");
        }
        extensions = extension::all(message.cut_extensions(header.extensions)?, dialect.security_ctx)?;
    }
    let Header { unique, node, uid, gid, .. } = *header;
    let Extensions { group, label } = extensions;
    Ok(Request { unique, node, uid, gid, group, label, operation: operation(header.opcode, &mut message, dialect)? })
}

/// Bytes of the answer to a message that went well, without the header and without what has a length of its own.
fn least_answer(opcode: u32) -> u32 {
    match opcode {
        opcode::LOOKUP | opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::LINK => answer::ENTRY,
        opcode::CREATE | opcode::TMPFILE => answer::ENTRY.saturating_add(answer::OPEN),
        opcode::GETATTR | opcode::SETATTR => answer::ATTR,
        opcode::STATX => answer::STATX,
        opcode::OPEN | opcode::OPENDIR => answer::OPEN,
        opcode::WRITE | opcode::COPY_FILE_RANGE => answer::WRITE,
        opcode::STATFS => answer::STATFS,
        opcode::INIT => answer::INIT,
        opcode::GETLK => answer::LOCK,
        opcode::IOCTL => answer::IOCTL,
        opcode::LSEEK => answer::LSEEK,
        opcode::COPY_FILE_RANGE_64 => answer::COPY_64,
        _ => 0,
    }
}

fn operation<'a>(opcode: u32, m: &mut Message<'a>, dialect: Dialect) -> Result<Operation<'a>, Wrong> {
    Ok(match opcode {
        opcode::LOOKUP => Operation::Lookup { name: m.last_name()? },
        opcode::FORGET => Operation::Forget { count: m.u64()? },
        opcode::GETATTR => get_attr(m)?,
        opcode::SETATTR => Operation::SetAttr(set_attr(m)?),
        opcode::READLINK => Operation::ReadLink,
        opcode::SYMLINK => symlink(m)?,
        opcode::MKNOD => mknod(m)?,
        opcode::MKDIR => Operation::MkDir { mode: m.u32()?, umask: m.u32()?, name: m.last_name()? },
        opcode::UNLINK => Operation::Unlink { name: m.last_name()? },
        opcode::RMDIR => Operation::RmDir { name: m.last_name()? },
        opcode::RENAME => rename(m, false)?,
        opcode::LINK => Operation::Link { old: m.u64()?, name: m.last_name()? },
        opcode::OPEN => Operation::Open { flags: m.u32()?, open_flags: m.u32()? },
        opcode::READ => read(m)?,
        opcode::WRITE => write(m)?,
        opcode::STATFS => Operation::StatFs,
        opcode::RELEASE => release(m)?,
        opcode::FSYNC => fsync(m, |handle, data_only| Operation::FSync { handle, data_only })?,
        opcode::SETXATTR => set_xattr(m, dialect)?,
        opcode::GETXATTR => get_xattr(m)?,
        opcode::LISTXATTR => Operation::ListXattr { size: xattr_size(m)? },
        opcode::REMOVEXATTR => remove_xattr(m)?,
        opcode::FLUSH => flush(m)?,
        opcode::INIT => init(m)?,
        opcode::OPENDIR => Operation::OpenDir { flags: m.u32()? },
        opcode::READDIR => read_dir(m, false)?,
        opcode::RELEASEDIR => Operation::ReleaseDir { handle: m.u64()? },
        opcode::FSYNCDIR => fsync(m, |handle, data_only| Operation::FSyncDir { handle, data_only })?,
        opcode::GETLK => get_lock(m)?,
        opcode::SETLK => set_lock(m, false)?,
        opcode::SETLKW => set_lock(m, true)?,
        opcode::ACCESS => access(m)?,
        opcode::CREATE => create(m)?,
        opcode::INTERRUPT => Operation::Interrupt { unique: m.u64()? },
        opcode::DESTROY => Operation::Destroy,
        opcode::IOCTL => ioctl(m)?,
        opcode::BATCH_FORGET => batch_forget(m)?,
        opcode::FALLOCATE => fallocate(m)?,
        opcode::READDIRPLUS => read_dir(m, true)?,
        opcode::RENAME2 => rename(m, true)?,
        opcode::LSEEK => lseek(m)?,
        opcode::COPY_FILE_RANGE => copy(m, false)?,
        opcode::SYNCFS => Operation::SyncFs,
        opcode::TMPFILE => tmpfile(m)?,
        opcode::STATX => statx(m)?,
        opcode::COPY_FILE_RANGE_64 => copy(m, true)?,
        // BMAP, POLL, NOTIFY_REPLY, SETUPMAPPING and REMOVEMAPPING among them: a guest asks once and makes do without.
        _ => return Err(Wrong { errno: ENOSYS, why: "a message of an unknown kind" }),
    })
}

fn get_attr<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    Ok(Operation::GetAttr { handle: if_asked(m)? })
}

fn statx<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    Ok(Operation::Statx { handle: if_asked(m)?, flags: m.u32()?, mask: m.u32()? })
}

/// Flags, a gap, and the handle that is valid if the flags say so.
fn if_asked(m: &mut Message<'_>) -> Result<Option<u64>, Wrong> {
    let (flags, _, handle) = (m.u32()?, m.u32()?, m.u64()?);
    Ok((flags & flag::GETATTR_FH != 0).then_some(handle))
}

fn set_attr(m: &mut Message<'_>) -> Result<SetAttr, Wrong> {
    let (valid, _) = (m.u32()?, m.u32()?);
    let (handle, size, _lock_owner) = (m.u64()?, m.u64()?, m.u64()?);
    // The last change of an inode is the host's to say: no file system lets it be set.
    let (atime, mtime, _ctime) = (m.u64()?, m.u64()?, m.u64()?);
    let (atime_nsec, mtime_nsec, _ctime_nsec) = (m.u32()?, m.u32()?, m.u32()?);
    let (mode, _, uid, gid, _) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?, m.u32()?);
    let has = |bit: u32| valid & bit != 0;
    if has(fattr::UID) && uid == u32::MAX || has(fattr::GID) && gid == u32::MAX {
        return invalid("an owner that is none");
    }
    if has(fattr::SIZE) && size > LAST {
        return Err(Wrong { errno: EFBIG, why: "a length that no file can have" });
    }
    Ok(SetAttr {
        handle: has(fattr::FH).then_some(handle),
        mode: has(fattr::MODE).then_some(mode & 0o7777),
        uid: has(fattr::UID).then_some(uid),
        gid: has(fattr::GID).then_some(gid),
        size: has(fattr::SIZE).then_some(size),
        atime: time(has(fattr::ATIME), has(fattr::ATIME_NOW), atime, atime_nsec)?,
        mtime: time(has(fattr::MTIME), has(fattr::MTIME_NOW), mtime, mtime_nsec)?,
        kill_suidgid: has(fattr::KILL_SUIDGID),
    })
}

/// A time to be set. "Now" counts whether or not the guest also says that there is a time at all.
fn time(given: bool, now: bool, seconds: u64, nanoseconds: u32) -> Result<Option<Time>, Wrong> {
    match (given, now) {
        (_, true) => Ok(Some(Time::Now)),
        (true, false) if nanoseconds >= NANOSECONDS => invalid("more nanoseconds than a second has"),
        (true, false) => Ok(Some(Time::At(seconds.cast_signed(), nanoseconds))),
        (false, false) => Ok(None),
    }
}

fn symlink<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (name, target) = (m.name()?, m.target()?);
    m.end()?;
    Ok(Operation::Symlink { name, target })
}

fn mknod<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (mode, device, umask, _) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
    Ok(Operation::MkNod { name: m.last_name()?, mode, device, umask })
}

fn rename<'a>(m: &mut Message<'a>, with_flags: bool) -> Result<Operation<'a>, Wrong> {
    let to = m.u64()?;
    let flags = if with_flags { m.u32()? } else { 0 };
    if with_flags {
        m.u32()?;
    }
    let known = rename::NOREPLACE | rename::WHITEOUT;
    if flags & !known != 0 && flags != rename::EXCHANGE {
        return invalid("flags of a renaming that are unknown or contradict each other");
    }
    Ok(Operation::Rename { name: m.name()?, to, new_name: m.last_name()?, flags })
}

fn read<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, offset, size) = (m.u64()?, m.u64()?, m.u32()?);
    let (_read_flags, _lock_owner, flags, _) = (m.u32()?, m.u64()?, m.u32()?, m.u32()?);
    if !ends(offset, size.into()) {
        return invalid("a read behind the end of all files");
    }
    Ok(Operation::Read { handle, offset, size: size.min(m.room()), flags })
}

fn write<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, offset, size) = (m.u64()?, m.u64()?, m.u32()?);
    let (write_flags, _lock_owner, flags, _) = (m.u32()?, m.u64()?, m.u32()?, m.u32()?);
    if size > m.left() {
        return invalid("less data than there is said to be");
    }
    if !ends(offset, size.into()) {
        return Err(Wrong { errno: EFBIG, why: "a write behind the end of all files" });
    }
    Ok(Operation::Write { handle, offset, size, write_flags, flags })
}

/// So many bytes from there end where a file can end.
fn ends(offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= LAST)
}

fn release<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, flags, release_flags, owner) = (m.u64()?, m.u32()?, m.u32()?, m.u64()?);
    let owned = release_flags & (flag::RELEASE_FLUSH | flag::RELEASE_FLOCK_UNLOCK) != 0;
    Ok(Operation::Release { handle, owner: owned.then_some(owner), flags, release_flags })
}

fn flush<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, _, owner) = (m.u64()?, m.u64()?, m.u64()?);
    Ok(Operation::Flush { handle, owner })
}

fn fsync<'a>(m: &mut Message<'a>, which: impl Fn(u64, bool) -> Operation<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, flags) = (m.u64()?, m.u32()?);
    Ok(which(handle, flags & flag::FSYNC_FDATASYNC != 0))
}

fn set_xattr<'a>(m: &mut Message<'a>, dialect: Dialect) -> Result<Operation<'a>, Wrong> {
    let (size, flags) = (m.u32()?, m.u32()?);
    let more = if dialect.setxattr_ext { (m.u32()?, m.u32()?).0 } else { 0 };
    if size > MAX_XATTR {
        return Err(Wrong { errno: E2BIG, why: "a value of more than 64 KiB" });
    }
    let (name, value) = (m.attribute()?, m.bytes(size)?);
    m.end()?;
    Ok(Operation::SetXattr { name, value, flags, clear_sgid: more & flag::SETXATTR_ACL_KILL_SGID != 0 })
}

fn get_xattr<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (size, name) = (xattr_size(m)?, m.attribute()?);
    m.end()?;
    Ok(Operation::GetXattr { name, size })
}

fn remove_xattr<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let name = m.attribute()?;
    m.end()?;
    Ok(Operation::RemoveXattr { name })
}

/// Bytes wanted of an attribute or a list. Zero asks how many there are, so without any room a number must not become zero.
fn xattr_size(m: &mut Message<'_>) -> Result<u32, Wrong> {
    let (size, _) = (m.u32()?, m.u32()?);
    m.answered_with(if size == 0 { answer::XATTR_SIZE } else { 1 })?;
    Ok(size.min(MAX_XATTR).min(m.room()))
}

/// The second half of the flags is there if the first says so.
fn init<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (major, minor, max_readahead, low) = (m.u32()?, m.u32()?, m.u32()?, u64::from(m.u32()?));
    let high = if low & init::INIT_EXT != 0 { u64::from(m.u32()?) } else { 0 };
    Ok(Operation::Init { major, minor, max_readahead, flags: high << 32 | low })
}

fn read_dir<'a>(m: &mut Message<'a>, plus: bool) -> Result<Operation<'a>, Wrong> {
    let (handle, offset, size) = (m.u64()?, m.u64()?, m.u32()?);
    let (_read_flags, _lock_owner, _flags, _) = (m.u32()?, m.u64()?, m.u32()?, m.u32()?);
    if offset > LAST {
        return invalid("a place in a directory that none has");
    }
    Ok(Operation::ReadDir { handle, offset, size: size.min(m.room()), plus })
}

fn get_lock<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, owner, lock, _flags) = lock_of(m)?;
    if lock.kind == LockKind::None {
        return invalid("a question for the lock that is none");
    }
    Ok(Operation::GetLock { handle, owner, lock })
}

fn set_lock<'a>(m: &mut Message<'a>, wait: bool) -> Result<Operation<'a>, Wrong> {
    let (handle, owner, lock, flags) = lock_of(m)?;
    Ok(Operation::SetLock { handle, owner, lock, wait, flock: flags & flag::LK_FLOCK != 0 })
}

fn lock_of(m: &mut Message<'_>) -> Result<(u64, u64, Lock, u32), Wrong> {
    let (handle, owner, start, end) = (m.u64()?, m.u64()?, m.u64()?, m.u64()?);
    let (kind, pid, flags, _) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
    let kind = match kind {
        lock::F_RDLCK => LockKind::Shared,
        lock::F_WRLCK => LockKind::Exclusive,
        lock::F_UNLCK => LockKind::None,
        _ => return invalid("a lock of an unknown kind"),
    };
    if start > LAST || end < start || (end > LAST && end != u64::MAX) {
        return invalid("a lock on a range that no file has");
    }
    Ok((handle, owner, Lock { start, end, kind, pid }, flags))
}

fn access<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let mask = m.u32()?;
    if mask & !0o7 != 0 {
        return invalid("access of an unknown kind");
    }
    Ok(Operation::Access { mask })
}

fn create<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (flags, mode, umask, open_flags) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
    Ok(Operation::Create { name: m.last_name()?, flags, mode, umask, open_flags })
}

/// Linux sends a name with it, of no meaning: a slash. More than a name is nonsense.
fn tmpfile<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (flags, mode, umask, open_flags) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
    if usize::try_from(m.left()).is_ok_and(|left| left > MAX_NAME.saturating_add(1)) {
        return invalid("bytes behind the end of a message");
    }
    Ok(Operation::TmpFile { flags, mode, umask, open_flags })
}

fn ioctl<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, flags, command, argument) = (m.u64()?, m.u32()?, m.u32()?, m.u64()?);
    let (input, output) = (m.u32()?, m.u32()?);
    if input > MAX_IOCTL {
        return invalid("an ioctl with more than 4096 bytes");
    }
    let output = output.min(MAX_IOCTL).min(m.room().saturating_sub(answer::IOCTL));
    Ok(Operation::Ioctl { handle, flags, command, argument, input: m.bytes(input)?, output })
}

fn batch_forget<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (count, _) = (m.u32()?, m.u32()?);
    if count > m.left().checked_div(sent::FORGET_ONE).unwrap_or(0) {
        return invalid("fewer inodes to forget than there are said to be");
    }
    Ok(Operation::BatchForget { count })
}

fn fallocate<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, offset, length, mode) = (m.u64()?, m.u64()?, m.u64()?, m.u32()?);
    if length == 0 {
        return invalid("a range of no bytes");
    }
    if !ends(offset, length) {
        return Err(Wrong { errno: EFBIG, why: "a range behind the end of all files" });
    }
    Ok(Operation::FAllocate { handle, offset, length, mode })
}

fn lseek<'a>(m: &mut Message<'a>) -> Result<Operation<'a>, Wrong> {
    let (handle, offset, whence) = (m.u64()?, m.u64()?, m.u32()?);
    if whence > seek::HOLE {
        return invalid("a seek from an unknown place");
    }
    if offset > LAST {
        let errno = if whence >= seek::DATA { ENXIO } else { EINVAL };
        return Err(Wrong { errno, why: "a seek behind the end of all files" });
    }
    Ok(Operation::LSeek { handle, offset, whence })
}

/// A copy may be shorter than was asked for, so what cannot be done or told is not refused but left.
fn copy<'a>(m: &mut Message<'a>, long: bool) -> Result<Operation<'a>, Wrong> {
    let (handle, offset, to) = (m.u64()?, m.u64()?, m.u64()?);
    let (to_handle, to_offset, length, flags) = (m.u64()?, m.u64()?, m.u64()?, m.u64()?);
    if flags != 0 {
        return invalid("flags of a copy that are unknown");
    }
    let Some(most) = LAST.checked_sub(offset.max(to_offset)) else { return invalid("a copy behind the end of all files") };
    let length = length.min(most).min(if long { u64::MAX } else { MAX_SHORT_COPY });
    Ok(Operation::CopyFileRange { handle, offset, to, to_handle, to_offset, length, flags, long })
}
