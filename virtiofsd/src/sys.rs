//! System calls that no safe wrapper offers, each behind a function that is safe to call.
//!
//! All of them work on descriptors: on the file of one, or on a name in the directory of one.

#![expect(unsafe_code, reason = "calls that no safe wrapper offers")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::io::Errno;

const SETXATTRAT: i64 = 463;
const GETXATTRAT: i64 = 464;
const LISTXATTRAT: i64 = 465;
const REMOVEXATTRAT: i64 = 466;

/// `struct xattr_args`.
#[repr(C)]
struct XattrArgs {
    value: u64,
    size: u32,
    flags: u32,
}

/// Gives the calling thread a mask for new files, a root and a current directory of its own.
///
/// # Errors
/// The system's.
pub(crate) fn own_mask() -> Result<(), Errno> {
    // SAFETY: takes a number. What is not shared any more are properties of this thread that no memory depends on.
    check(unsafe { libc::unshare(libc::CLONE_FS) }.into()).map(drop)
}

/// Closes a descriptor, and gives what its file system has to say to that. It is closed in any case.
///
/// # Errors
/// The system's.
pub(crate) fn close(file: OwnedFd) -> Result<(), Errno> {
    // SAFETY: the descriptor was owned by nobody else, and is by nobody from here on.
    check(unsafe { libc::close(file.into_raw_fd()) }.into()).map(drop)
}

/// Changes the permissions of what a descriptor refers to, also of one that was opened as a path only (Linux 6.6).
///
/// # Errors
/// The system's; `ENOSYS` if it has no such call.
pub(crate) fn fchmodat2(file: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    // SAFETY: the path is a constant, the rest are numbers; `file` is open as it is borrowed.
    check(unsafe { libc::syscall(libc::SYS_fchmodat2, file.as_raw_fd(), c"".as_ptr(), mode, libc::AT_EMPTY_PATH) }).map(drop)
}

/// Sets an extended attribute of the file of a name (Linux 6.13). A magic link is followed.
///
/// # Errors
/// As above.
pub(crate) fn setxattrat(dir: BorrowedFd<'_>, path: &CStr, name: &CStr, value: &[u8], flags: u32) -> Result<(), Errno> {
    let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
    let args = XattrArgs { value: value.as_ptr().addr() as u64, size, flags };
    let (fd, path, name) = (dir.as_raw_fd(), path.as_ptr(), name.as_ptr());
    // SAFETY: the strings end in NUL; the structure and the `size` bytes it points to are only read, and outlive the call.
    let done = unsafe { libc::syscall(SETXATTRAT, fd, path, 0, name, &raw const args, size_of::<XattrArgs>()) };
    check(done).map(drop)
}

/// Gets an extended attribute, or its length if there is no room at all.
///
/// # Errors
/// As above.
pub(crate) fn getxattrat(dir: BorrowedFd<'_>, path: &CStr, name: &CStr, value: &mut [u8]) -> Result<usize, Errno> {
    let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
    let args = XattrArgs { value: value.as_mut_ptr().addr() as u64, size, flags: 0 };
    value.as_mut_ptr().expose_provenance();
    let (fd, path, name) = (dir.as_raw_fd(), path.as_ptr(), name.as_ptr());
    // SAFETY: as above; the kernel writes at most `size` bytes to where the structure points, which is `value`, borrowed until then.
    let got = unsafe { libc::syscall(GETXATTRAT, fd, path, 0, name, &raw const args, size_of::<XattrArgs>()) };
    check(got)
}

/// Gets the names of all extended attributes, or how long they are in all.
///
/// # Errors
/// As above.
pub(crate) fn listxattrat(dir: BorrowedFd<'_>, path: &CStr, list: &mut [u8]) -> Result<usize, Errno> {
    let (fd, path) = (dir.as_raw_fd(), path.as_ptr());
    // SAFETY: the kernel writes at most as many bytes as `list` has.
    check(unsafe { libc::syscall(LISTXATTRAT, fd, path, 0, list.as_mut_ptr(), list.len()) })
}

/// Removes an extended attribute.
///
/// # Errors
/// As above.
pub(crate) fn removexattrat(dir: BorrowedFd<'_>, path: &CStr, name: &CStr) -> Result<(), Errno> {
    let (fd, path) = (dir.as_raw_fd(), path.as_ptr());
    // SAFETY: both strings end in NUL.
    check(unsafe { libc::syscall(REMOVEXATTRAT, fd, path, 0, name.as_ptr()) }).map(drop)
}

/// Most bytes of a file handle (`MAX_HANDLE_SZ`).
const MAX_HANDLE: usize = 128;

const AT_HANDLE_FID: i32 = 0x200;

/// How a file is opened by its handle: as a path only.
pub(crate) const BY_HANDLE: i32 = libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW;

/// `struct file_handle`, with as much room as there may have to be.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RawHandle {
    len: u32,
    pub(crate) kind: i32,
    bytes: [u8; MAX_HANDLE],
}

impl RawHandle {
    /// One with this content.
    pub(crate) fn new(kind: i32, content: &[u8]) -> Result<RawHandle, Errno> {
        let mut bytes = [0; MAX_HANDLE];
        bytes.get_mut(..content.len()).ok_or(Errno::OVERFLOW)?.copy_from_slice(content);
        Ok(RawHandle { len: u32::try_from(content.len()).map_err(|_| Errno::OVERFLOW)?, kind, bytes })
    }

    /// Kind and content, to be compared.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        [&self.kind.to_le_bytes(), self.content()].concat()
    }

    /// What it consists of.
    pub(crate) fn content(&self) -> &[u8] {
        usize::try_from(self.len).ok().and_then(|len| self.bytes.get(..len)).unwrap_or_default()
    }
}

/// The handle of the file of a name, or of a descriptor if the name is empty. No link is followed.
///
/// # Errors
/// `EOPNOTSUPP` if its file system has none.
pub(crate) fn name_to_handle_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<RawHandle, Errno> {
    ask_for_handle(dir, name, 0)
}

/// The same of a descriptor, only to tell its file apart from others: more file systems have those (Linux 6.5).
///
/// # Errors
/// As above.
pub(crate) fn handle_to_tell_apart(file: BorrowedFd<'_>) -> Result<RawHandle, Errno> {
    match ask_for_handle(file, c"", AT_HANDLE_FID) {
        Err(Errno::INVAL) => name_to_handle_at(file, c""),
        handle => handle,
    }
}

fn ask_for_handle(dir: BorrowedFd<'_>, name: &CStr, how: i32) -> Result<RawHandle, Errno> {
    let mut handle = RawHandle { len: u32::try_from(MAX_HANDLE).unwrap_or_default(), kind: 0, bytes: [0; MAX_HANDLE] };
    let mut mount = 0_i32;
    let flags = how | if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    let (fd, name) = (dir.as_raw_fd(), name.as_ptr());
    // SAFETY: the name ends in NUL; the kernel writes at most as many bytes of the handle as its length says, which are there, and one number.
    check(unsafe { libc::syscall(libc::SYS_name_to_handle_at, fd, name, &raw mut handle, &raw mut mount, flags) })?;
    Ok(handle)
}

/// Opens the file of a handle, as a path only. `mount` is open for reading on its mount.
///
/// # Errors
/// `ESTALE` if it is gone, `EPERM` without the right over the whole host that this takes.
pub(crate) fn open_by_handle_at(mount: BorrowedFd<'_>, handle: &RawHandle) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel reads the handle, which has as many bytes as it says: it is made above, and nowhere else.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw const *handle, BY_HANDLE) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::OVERFLOW)?;
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A place where the kernel reports changes of files, as the handles of the directories they are in.
///
/// # Errors
/// The system's.
pub(crate) fn fanotify() -> Result<OwnedFd, Errno> {
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_REPORT_DIR_FID;
    // SAFETY: takes numbers.
    let fd = check(unsafe { libc::syscall(libc::SYS_fanotify_init, flags, libc::O_RDONLY) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has changes of what a name leads to reported. A magic link is followed.
///
/// # Errors
/// The system's.
pub(crate) fn watch(group: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &CStr, changes: u64) -> Result<(), Errno> {
    let (group, flags, dir) = (group.as_raw_fd(), libc::FAN_MARK_ADD | libc::FAN_MARK_ONLYDIR, dir.as_raw_fd());
    // SAFETY: the path ends in NUL, the rest are numbers.
    check(unsafe { libc::syscall(libc::SYS_fanotify_mark, group, flags, changes, dir, path.as_ptr()) }).map(drop)
}

/// Has nothing reported any more.
///
/// # Errors
/// The system's.
pub(crate) fn unwatch_all(group: BorrowedFd<'_>) -> Result<(), Errno> {
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: takes numbers; there is no path, and none is asked for.
    check(unsafe { libc::syscall(libc::SYS_fanotify_mark, group.as_raw_fd(), libc::FAN_MARK_FLUSH, 0_u64, -1, nothing) })
        .map(drop)
}

/// What to do with a lock of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockCall {
    /// Take it or give it up, without waiting.
    Set,
    /// Say what is in the way.
    Get,
}

/// Locks, unlocks, or asks about a range of a file on behalf of an open file description. `kind` is `F_RDLCK`, `F_WRLCK` or `F_UNLCK`;
/// `len` 0 is "to the end". Gives what is in the way of a [`LockCall::Get`].
///
/// # Errors
/// `EAGAIN` when somebody else has it.
pub(crate) fn ofd_lock(file: BorrowedFd<'_>, call: LockCall, kind: i32, start: i64, len: i64) -> Result<libc::flock, Errno> {
    let l_type = i16::try_from(kind).map_err(|_| Errno::INVAL)?;
    let l_whence = i16::try_from(libc::SEEK_SET).map_err(|_| Errno::INVAL)?;
    let mut range = libc::flock { l_type, l_whence, l_start: start, l_len: len, l_pid: 0 };
    let command = if call == LockCall::Set { libc::F_OFD_SETLK } else { libc::F_OFD_GETLK };
    // SAFETY: the structure is initialised, outlives the call, and is not looked at meanwhile.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut range) };
    check(done.into()).map(|_| range)
}

/// Commands of a file system that take or give a buffer of a length that is part of the command.
///
/// # Errors
/// The system's.
pub(crate) fn ioctl(file: BorrowedFd<'_>, command: u32, buffer: &mut [u8]) -> Result<u32, Errno> {
    // The size is in bits 16 to 29 of the command: more than that the kernel neither reads nor writes.
    let size = usize::try_from((command >> 16) & 0x3fff).map_err(|_| Errno::INVAL)?;
    if buffer.len() < size {
        return Err(Errno::INVAL);
    }
    // SAFETY: callers give commands of a list of those that do what their number says; the buffer is as large as the number says.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), command.into(), buffer.as_mut_ptr()) };
    check(done.into()).and_then(|done| u32::try_from(done).map_err(|_| Errno::OVERFLOW))
}

fn check(result: i64) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}
