//! The names of system calls, for people and for the machines that read policies.

macro_rules! names {
    ($($name:ident)*) => {
        const NAMES: &[(i64, &str)] = &[$((libc::$name, stringify!($name))),*];
    };
}

// Those that a policy of ours has, or had.
names! {
    SYS_accept4 SYS_brk SYS_clock_gettime SYS_close SYS_eventfd2 SYS_exit SYS_exit_group SYS_fallocate SYS_fcntl SYS_fdatasync
    SYS_fstat SYS_ftruncate SYS_futex SYS_getpid SYS_getrandom SYS_gettid SYS_io_uring_enter SYS_ioctl SYS_lseek SYS_madvise SYS_mmap SYS_mprotect SYS_mremap
    SYS_munmap SYS_pidfd_send_signal SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv2 SYS_pwrite64 SYS_pwritev2 SYS_read SYS_recvmsg
    SYS_restart_syscall SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_yield SYS_sendfile SYS_sendmsg SYS_sendto SYS_sigaltstack
    SYS_socketpair SYS_tgkill SYS_unlinkat SYS_waitid SYS_write
}

/// The name of a system call, as the manual has it.
pub fn name(number: i64) -> String {
    let known = NAMES.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| format!("number {number}"), |(_, name)| name.trim_start_matches("SYS_").to_owned())
}
