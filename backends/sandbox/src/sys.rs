//! System calls that no safe wrapper offers, each behind a function that is safe to call.

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Pid;

/// Descriptors are parked from here on while they are moved to where they belong.
const PARKING: RawFd = 512;

/// Most descriptors passed to a program besides the standard ones.
const MAX_PASSED: usize = 64;

const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_MDWE_REFUSE_EXEC_GAIN: u64 = 1;
const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;

/// What a new process does not share with its parent.
#[derive(Clone, Copy)]
pub(crate) struct Clone(u64);

impl Clone {
    pub(crate) const NEW_USER: Clone = Clone(0x1000_0000);
    pub(crate) const NEW_NET: Clone = Clone(0x4000_0000);
    /// The new process becomes a child of our parent.
    pub(crate) const SIBLING: Clone = Clone(0x8000);
    /// Mount, UTS, IPC and PID namespaces.
    pub(crate) const WORKER: Clone = Clone(0x2_0000 | 0x400_0000 | 0x800_0000 | 0x2000_0000);

    pub(crate) const fn empty() -> Clone {
        Clone(0)
    }
}

impl std::ops::BitOr for Clone {
    type Output = Clone;

    fn bitor(self, other: Clone) -> Clone {
        Clone(self.0 | other.0)
    }
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// Makes a process that is a copy of this one. `None` in the copy, which must neither allocate nor take a lock, since another
/// thread of the original may have been holding one.
pub(crate) fn clone3(flags: Clone) -> rustix::io::Result<Option<Pid>> {
    // A sibling inherits the signal of its creator and must not name one.
    let exit_signal = if flags.0 & Clone::SIBLING.0 == 0 { libc::SIGCHLD.unsigned_abs().into() } else { 0 };
    let args = CloneArgs { flags: flags.0, exit_signal, ..CloneArgs::default() };
    // SAFETY: the structure is the kernel's first version of it, fully initialised, and outlives the call. Neither memory nor
    // stack is shared (no CLONE_VM), so the child runs on its own copy like after fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match i32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        _ => Err(last_error()),
    }
}

/// Ends this process without running anything on the way out: not even what would need another system call.
pub fn exit(status: i32) -> ! {
    // SAFETY: `_exit` takes a number and does not return.
    unsafe { libc::_exit(status) }
}

/// Lets a fault in memory end the process as what it is. Rust's own handler finds out whether a stack was too small, and needs two
/// system calls for the rest.
pub fn plain_faults() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: sets the default action; no handler is named.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Makes the allocator serve all threads from the one heap that grows with `brk`. With a heap for each thread and a mapping for each
/// large block it would need `mprotect`, `madvise` and `mremap` in every filter. To be called while there is one thread.
pub fn one_heap() {
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_MAX, 0)] {
        // SAFETY: takes two numbers; no other thread is in the allocator.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives back the memory that holds the program's code. Most of it was needed to start, and never is again; what is comes back page by
/// page, out of the page cache, as it is run.
pub fn leave_start_behind() {
    // SAFETY: the callback is one that fits, and needs no data.
    unsafe { libc::dl_iterate_phdr(Some(leave_code), std::ptr::null_mut()) };
}

/// For each object that is loaded.
extern "C" fn leave_code(object: *mut libc::dl_phdr_info, _size: usize, _data: *mut libc::c_void) -> i32 {
    // SAFETY: the C library hands the description of an object over, for as long as this runs.
    let object = unsafe { &*object };
    // SAFETY: it has so many headers, where it says, and they do not change.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    let base = object.dlpi_addr;
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags == libc::PF_R | libc::PF_X) {
        let start = base.wrapping_add(header.p_vaddr) & !(PAGE - 1);
        let end = base.wrapping_add(header.p_vaddr).wrapping_add(header.p_memsz);
        let (Ok(address), Ok(len)) = (usize::try_from(start), usize::try_from(end.saturating_sub(start))) else { continue };
        // SAFETY: this is code of a file, mapped without the right to write it, and has no relocations: what is read or run there next
        // is what the file has.
        let _a_hint = unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(address), len, libc::MADV_DONTNEED) };
    }
    0
}

/// Bytes of a page of memory.
const PAGE: u64 = 4096;

/// Closes a descriptor of the original in the copy, where nothing runs destructors.
pub(crate) fn close(fd: &OwnedFd) {
    // SAFETY: this is called between clone and exec only, in a process that ends in exec or `_exit` without dropping `fd`, so
    // the number is never closed a second time.
    unsafe { libc::close(fd.as_raw_fd()) };
}

/// Another descriptor of the same file, with a number that no program is given.
pub(crate) fn park(fd: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    // SAFETY: duplicates an open descriptor to a free number from here on.
    let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, PARKING) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Whether the other end of this pipe is closed everywhere.
pub(crate) fn nobody_reads(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut fds, Some(&now));
    let [fd] = fds;
    polled.is_ok() && fd.revents().contains(PollFlags::ERR)
}

/// Gives descriptors the numbers they are to have in the program, and marks all others to be closed when it is executed.
pub(crate) fn pass_on<'a>(
    standard: impl Iterator<Item = (BorrowedFd<'a>, RawFd)>,
    fds: &[(BorrowedFd<'a>, RawFd)],
) -> rustix::io::Result<()> {
    let mut parked = [(0, 0); MAX_PASSED + 3];
    let mut count = 0;
    for (fd, target) in standard.chain(fds.iter().copied()) {
        // SAFETY: duplicates a descriptor that is open, as `fd` borrows it, to a free number.
        let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, PARKING) })?;
        *parked.get_mut(count).ok_or(Errno::MFILE)? = (copy, target);
        count += 1;
    }
    // SAFETY: marks descriptors to be closed on exec; closes none.
    check(unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) })?;
    for (copy, target) in parked.into_iter().take(count) {
        // SAFETY: only between clone and exec. Whatever had the number `target` is closed here; it belongs to the original's
        // objects, none of which is used or dropped in this process any more.
        check(unsafe { libc::dup2(copy, target) })?;
    }
    unblock_signals()
}

fn unblock_signals() -> rustix::io::Result<()> {
    let mut none = empty_set();
    // SAFETY: `none` is an initialised set that outlives the call; the old set is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw mut none, ptr::null_mut()) }).map(drop)
}

/// Becomes another program. Returns only if that fails.
pub(crate) fn execute(program: &CStr, argv: &[CString], envp: &[CString]) -> Errno {
    const MAX: usize = 512;
    let pointers = |strings: &[CString]| {
        let mut list: [*const c_char; MAX] = [ptr::null(); MAX];
        // The last one stays null.
        for (place, string) in list.iter_mut().take(MAX - 1).zip(strings) {
            *place = string.as_ptr();
        }
        list
    };
    if argv.len() >= MAX || envp.len() >= MAX {
        return Errno::TOOBIG;
    }
    let (argv, envp) = (pointers(argv), pointers(envp));
    // SAFETY: the path and both lists are made of strings that outlive the call, and the lists end in a null pointer.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    last_error()
}

/// Closes every descriptor from 3 on that is not in `keep`. For the first moment of a program, before it has opened anything.
///
/// # Errors
/// The system's.
pub fn close_all_but(keep: &[RawFd]) -> std::io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        close_range(from, fd)?;
        from = fd + 1;
    }
    close_range(from, u32::MAX)
}

/// Closes descriptors from `from` to before `to`.
fn close_range(from: u32, to: u32) -> std::io::Result<()> {
    let Some(last) = to.checked_sub(1).filter(|last| *last >= from) else { return Ok(()) };
    // SAFETY: called before the program has opened anything, so no object of ours owns a descriptor in the range.
    Ok(check(unsafe { libc::close_range(from, last, 0) }).map(drop)?)
}

/// Takes a descriptor over that this process was started with.
///
/// `None` if there is nothing open under the number.
pub fn inherited(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: asks about a number; an invalid one is an error, not undefined.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return None;
    }
    // SAFETY: the descriptor is open, and was passed to this process to be its own; callers take each number once.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Locks a whole file, for writing or for reading, without waiting. The lock belongs to the open file: it lasts until the last
/// copy of this descriptor is closed, and is noticed by QEMU's image locks and notices them.
///
/// # Errors
/// `EAGAIN` when someone else has it.
pub fn lock_file(fd: BorrowedFd<'_>, exclusive: bool) -> std::io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let kind = i16::try_from(kind).unwrap_or_default();
    let whence = i16::try_from(libc::SEEK_SET).unwrap_or_default();
    let range = libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: `fd` is open as it is borrowed; the structure is initialised and outlives the call.
    Ok(check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) }).map(drop)?)
}

/// The request to erase a range of a block device so that nobody finds what was there, for filters (`BLKSECDISCARD` in the kernel's
/// `linux/fs.h`).
pub const SECURE_ERASE: u32 = 0x127d;

/// Erases a range of a block device, and whatever copies of it the device has kept. The kernel's cache forgets it, too.
///
/// # Errors
/// `EOPNOTSUPP` when the device cannot, whatever the range is.
pub fn secure_erase(device: BorrowedFd<'_>, offset: u64, len: u64) -> std::io::Result<()> {
    let range = [offset, len];
    // SAFETY: `device` is open as it is borrowed; the kernel reads two numbers from `range`, which outlives the call.
    Ok(check(unsafe { libc::ioctl(device.as_raw_fd(), SECURE_ERASE.into(), &raw const range) }).map(drop)?)
}

/// Blocks these signals in the calling thread, and in all it starts from now on, and gives a descriptor from which they are read.
///
/// # Errors
/// The system's.
pub fn signal_fd(signals: &[i32]) -> std::io::Result<OwnedFd> {
    let mut set = empty_set();
    for signal in signals {
        // SAFETY: `set` is an initialised set; an invalid number is an error.
        check(unsafe { libc::sigaddset(&raw mut set, *signal) })?;
    }
    // SAFETY: `set` is initialised and outlives the call; the old set is not asked for.
    check(unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) })?;
    // SAFETY: as above; the call makes a new descriptor.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn empty_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: initialises the set it is given and cannot fail.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the call above.
    unsafe { set.assume_init() }
}

/// The version of Landlock the kernel offers; 0 if it has none.
pub(crate) fn landlock_version() -> u32 {
    let none = ptr::null::<u8>();
    // SAFETY: with this flag the call takes a null pointer and a size of 0, and only returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, LANDLOCK_CREATE_RULESET_VERSION) };
    u32::try_from(version).unwrap_or(0)
}

/// Takes the meaning of set-user-id bits and device files from a tree of mounts that is attached nowhere, and what would pass on
/// mounts to it and from it; and the right to write, too, if that is asked.
pub(crate) fn restrict_mounts(root: BorrowedFd<'_>, read_only: bool) -> rustix::io::Result<()> {
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let new = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    let size = size_of::<libc::mount_attr>();
    // SAFETY: the descriptor is open as it is borrowed, the path is an empty string with its zero, and the structure is initialised
    // and outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_mount_setattr, root.as_raw_fd(), c"".as_ptr(), flags, &raw const new, size) };
    if done < 0 { Err(last_error()) } else { Ok(()) }
}

/// Whether the kernel knows `PR_SET_MDWE`.
pub(crate) fn has_mdwe() -> bool {
    // SAFETY: takes numbers, returns one.
    let mode = unsafe { libc::prctl(PR_GET_MDWE, 0u64, 0u64, 0u64, 0u64) };
    mode >= 0
}

/// From now on no memory becomes executable.
pub(crate) fn refuse_executable_memory() -> rustix::io::Result<()> {
    // SAFETY: takes numbers; what is executable already stays so.
    check(unsafe { libc::prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0u64, 0u64, 0u64) }).map(drop)
}

fn check(result: i32) -> rustix::io::Result<i32> {
    if result < 0 { Err(last_error()) } else { Ok(result) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
