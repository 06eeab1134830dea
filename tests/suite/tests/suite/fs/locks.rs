//! Locks. They are the guest's own, its kernel keeps them, and neither the host nor another guest has anything to do with them, unless the
//! server is told to keep them as locks of the host.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use suite::run;

use super::mounted::{Mounted, can_mount, in_each_mode};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// A lock of some bytes.
fn bytes(kind: i32, start: i64, len: i64) -> libc::flock {
    let short = |number: i32| i16::try_from(number).unwrap();
    libc::flock { l_type: short(kind), l_whence: short(libc::SEEK_SET), l_start: start, l_len: len, l_pid: 0 }
}

fn whole_files(one: &Path, other: &Path) -> Result<(), Errno> {
    let (first, second) = (open(one), open(other));
    flock(&first, FlockOperation::LockExclusive)?;
    let refused = flock(&second, FlockOperation::NonBlockingLockShared);
    let waits = run(Command::new("flock").args(["--timeout", "0.1"]).arg(other).arg("true")).code;
    assert_eq!(waits, Some(if refused.is_err() { 1 } else { 0 }));
    flock(&first, FlockOperation::LockShared)?;
    assert_eq!(flock(&second, FlockOperation::NonBlockingLockShared), Ok(()));
    drop(first);
    flock(&second, FlockOperation::NonBlockingLockExclusive).unwrap();
    refused
}

fn parts_of_files(one: &Path, other: &Path) -> nix::Result<()> {
    let (first, second) = (open(one), open(other));
    // One is the process's, the others are of whoever has the file open.
    fcntl(&first, FcntlArg::F_SETLK(&bytes(libc::F_WRLCK, 10, 10)))?;
    let refused = fcntl(&second, FcntlArg::F_OFD_SETLK(&bytes(libc::F_RDLCK, 19, 1))).map(drop);
    fcntl(&second, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 20, 0)))?;
    fcntl(&first, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 0, 10)))?;
    if refused.is_err() {
        let mut found = bytes(libc::F_WRLCK, 12, 1);
        fcntl(&second, FcntlArg::F_OFD_GETLK(&mut found))?;
        assert_eq!((i32::from(found.l_type), found.l_start, found.l_len), (libc::F_WRLCK, 10, 10));
        assert_eq!(found.l_pid.cast_unsigned(), std::process::id());
    }
    // A part of it, then all.
    fcntl(&first, FcntlArg::F_SETLK(&bytes(libc::F_UNLCK, 15, 5)))?;
    fcntl(&second, FcntlArg::F_OFD_SETLK(&bytes(libc::F_RDLCK, 19, 1)))?;
    drop(open(one));
    // The process has closed the file once: that was the end of its lock.
    fcntl(&second, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 10, 10)))?;
    refused
}

#[test]
fn who_shares_a_mount_is_kept_out() {
    in_each_mode("locks", |mounted| {
        let file = mounted.seen.join("file");
        fs::write(&file, "x".repeat(100)).unwrap();
        assert_eq!(whole_files(&file, &file), Err(Errno::WOULDBLOCK));
        assert_eq!(parts_of_files(&file, &file), Err(nix::errno::Errno::EAGAIN));
    });
}

#[test]
fn neither_the_host_nor_another_guest_is() {
    if !can_mount("locks of two guests") {
        return;
    }
    let mut one = Mounted::ours(&[], &[]);
    let mut two = one.beside(&[], &[]);
    fs::write(one.seen.join("file"), "x".repeat(100)).unwrap();
    let [first, second, own] = [&one.seen, &two.seen, &one.house].map(|top| top.join("file"));
    for other in [&second, &own] {
        let (locked, free) = (open(&first), open(other));
        flock(&locked, FlockOperation::NonBlockingLockExclusive).unwrap();
        flock(&free, FlockOperation::NonBlockingLockExclusive).unwrap();
        fcntl(&locked, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 0, 0))).unwrap();
        fcntl(&free, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 0, 0))).unwrap();
    }
    two.unmount();
    one.unmount();
}

/// Where the server keeps them (`--locks host`), the host's programs and other guests are kept out, too, and who waits gets the lock in the end.
#[test]
fn whoever_uses_the_directory_is_kept_out_where_the_host_keeps_them() {
    if !can_mount("locks of the host") {
        return;
    }
    let mut one = Mounted::ours(&["--locks", "host"], &[]);
    let mut two = one.beside(&["--locks", "host"], &[]);
    fs::write(one.seen.join("file"), "x".repeat(100)).unwrap();
    let [first, second, own] = [&one.seen, &two.seen, &one.house].map(|top| top.join("file"));
    for (a, b) in [(&first, &first), (&first, &second), (&first, &own), (&own, &second)] {
        let (locked, kept_out) = (open(a), open(b));
        flock(&locked, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_eq!(flock(&kept_out, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK));
        let waits = run(Command::new("flock").args(["--timeout", "0.1"]).arg(b).arg("true"));
        assert_eq!(waits.code, Some(1), "{}", waits.err);
        let waiting = thread::spawn({
            let b = b.clone();
            move || run(Command::new("flock").arg(b).arg("true")).code
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(locked);
        assert_eq!(waiting.join().unwrap(), Some(0));
        let (locked, kept_out) = (open(a), open(b));
        fcntl(&locked, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 10, 10))).unwrap();
        let refused = fcntl(&kept_out, FcntlArg::F_OFD_SETLK(&bytes(libc::F_RDLCK, 19, 5)));
        assert_eq!(refused, Err(nix::errno::Errno::EAGAIN));
        fcntl(&kept_out, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 20, 5))).unwrap();
        let mut found = bytes(libc::F_RDLCK, 0, 0);
        fcntl(&kept_out, FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
        assert_eq!((i32::from(found.l_type), found.l_start, found.l_len), (libc::F_WRLCK, 10, 10));
        fcntl(&locked, FcntlArg::F_OFD_SETLK(&bytes(libc::F_UNLCK, 0, 0))).unwrap();
        fcntl(&kept_out, FcntlArg::F_OFD_SETLK(&bytes(libc::F_RDLCK, 19, 1))).unwrap();
    }
    two.unmount();
    one.unmount();
}
