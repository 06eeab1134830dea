//! The names of system calls, for people and for the machines that read policies.

macro_rules! names {
    ($($name:ident)*) => {
        const NAMES: &[(i64, &str)] = &[$((libc::$name, stringify!($name))),*];
    };
}

// Those that a policy of ours has, or had.
names! {
    SYS_accept4 SYS_brk SYS_capget SYS_capset SYS_clock_gettime SYS_close SYS_copy_file_range SYS_dup SYS_eventfd2 SYS_exit
    SYS_exit_group SYS_fallocate SYS_fanotify_mark SYS_fchmod SYS_fchmodat SYS_fchmodat2 SYS_fchown SYS_fchownat SYS_fcntl
    SYS_fdatasync
    SYS_fgetxattr SYS_flistxattr SYS_flock SYS_fremovexattr SYS_fsetxattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate
    SYS_futex SYS_getdents64 SYS_getpid SYS_getrandom SYS_gettid SYS_io_uring_enter SYS_ioctl SYS_linkat SYS_lseek SYS_madvise
    SYS_mkdirat SYS_mknodat SYS_mmap SYS_mprotect SYS_mremap SYS_munmap SYS_name_to_handle_at SYS_open_by_handle_at SYS_openat
    SYS_openat2 SYS_pidfd_send_signal SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv2 SYS_pwrite64 SYS_pwritev2 SYS_read
    SYS_readlinkat SYS_recvmsg SYS_renameat2 SYS_restart_syscall SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_yield
    SYS_sendfile SYS_sendmsg SYS_sendto SYS_setfsgid SYS_setfsuid SYS_setgroups SYS_setresgid SYS_setresuid SYS_sigaltstack
    SYS_socketpair SYS_statx SYS_symlinkat SYS_syncfs SYS_tgkill SYS_umask SYS_unlinkat SYS_utimensat SYS_waitid SYS_write
}

/// Extended attributes by path. The C library's crate does not have them yet; their numbers are the same on all architectures whose
/// calls we know by number.
pub const SETXATTRAT: i64 = 463;
/// Reads one.
pub const GETXATTRAT: i64 = 464;
/// Lists their names.
pub const LISTXATTRAT: i64 = 465;
/// Removes one.
pub const REMOVEXATTRAT: i64 = 466;

const NEWER: [(i64, &str); 4] =
    [(SETXATTRAT, "setxattrat"), (GETXATTRAT, "getxattrat"), (LISTXATTRAT, "listxattrat"), (REMOVEXATTRAT, "removexattrat")];

/// The name of a system call, as the manual has it.
pub fn name(number: i64) -> String {
    let known = NAMES.iter().chain(&NEWER).find(|(known, _)| *known == number);
    known.map_or_else(|| format!("number {number}"), |(_, name)| name.trim_start_matches("SYS_").to_owned())
}
