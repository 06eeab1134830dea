//! Locks. They are the guest's own, its kernel keeps them, and neither the host nor another guest has anything to do with them, unless the
//! server is told to keep them as locks of the host.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use suite::{run, wait_for};

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

/// Locks parts of one file and the whole of another, at random. Who has a part for himself writes his number there, and finds it there for as
/// long as he has it; who has one together with others finds that nothing changes. Locks are the process's own or the open file's; he waits for
/// them, or not, or for a moment. Ends with 1 and a sentence when somebody else was there.
const CLAIMANT: &str = r#"
my ($folder, $number, $rounds) = @ARGV;
srand($number * 7919 + $$);
my $kept = 0;
$SIG{ALRM} = sub {};
open my $parts, "+<", "$folder/parts" or die "parts: $!";
open my $whole, "+<", "$folder/whole" or die "whole: $!";
sub rest { select undef, undef, undef, $_[0] / 1e6 }
sub alarm_in { my ($set, $was) = (pack("q4", 0, 0, 0, int $_[0]), "\0" x 32); syscall(38, 0, $set, $was) }
sub lock_part { fcntl($parts, $_[0], pack("s s x4 q q l x4", $_[1], 0, $_[2], $_[3], 0)) }
sub content { sysseek($_[0], $_[1], 0); sysread($_[0], my $bytes, $_[2]) // die "read: $!"; $bytes }
sub put { sysseek($_[0], $_[1], 0); syswrite($_[0], $_[2]) // die "write: $!" }
sub fail { print STDERR "$number ($$): @_\n"; exit 1 }
sub hold {
    my ($file, $alone, $at, $len, $what) = @_;
    my $own = chr($number) x $len;
    put($file, $at, $own) if $alone;
    my $before = content($file, $at, $len);
    rest(rand 1500);
    my $after = content($file, $at, $len);
    fail("$what: somebody has written while it was mine") if $alone && ($before ne $own || $after ne $own);
    fail("$what: somebody has written while I read") if $before ne $after;
    $kept++;
}
for (1..$rounds) {
    my ($alone, $wait) = (int rand 2, int rand 3);
    alarm_in(200 + rand 3000) if $wait == 2;
    if (rand() < 0.3) {
        my $got = flock($whole, ($alone ? 2 : 1) | ($wait ? 0 : 4));
        my $why = $! + 0; alarm_in(0);
        if (!$got) { fail("flock: $why") unless $why == 4 || $why == 11; next }
        hold($whole, $alone, 0, 40, "whole");
        flock($whole, 8) or fail("unlock: $!");
        next;
    }
    my ($at, $len) = (int rand 40, 2 + int rand 12);
    my $open_file = rand() < 0.5;
    my $got = lock_part(($open_file ? 37 : 6) + ($wait ? 1 : 0), $alone ? 1 : 0, $at, $len);
    my $why = $! + 0; alarm_in(0);
    if (!$got) { fail("lock: $why") unless $why == 4 || $why == 11 || $why == 13; next }
    hold($parts, $alone, $at, $len, "part");
    my $set = $open_file ? 37 : 6;
    # Gives up the first part of it, and perhaps shares the rest.
    my $first = int($len / 2);
    lock_part($set, 2, $at, $first) or fail("unlock: $!");
    if ($alone && rand() < 0.3) { lock_part($set, 0, $at + $first, $len - $first) or fail("share: $!"); $alone = 0 }
    hold($parts, $alone, $at + $first, $len - $first, "rest");
    lock_part($set, 2, 0, 0) or fail("unlock all: $!");
}
fail("hardly ever had anything") if $kept < $rounds / 10;
"#;

fn claimant(folder: &Path, number: usize, rounds: usize) -> Child {
    let mut command = Command::new("perl");
    command.args(["-e", CLAIMANT]).arg(folder).args([number.to_string(), rounds.to_string()]);
    command.stderr(Stdio::piped()).spawn().unwrap()
}

/// Two guests and the host want the same, and one of the first guest's programs is killed again and again, whatever it has or waits for.
#[test]
fn many_who_want_the_same_get_it_one_after_the_other() {
    if !can_mount("many who want the same") {
        return;
    }
    let words = ["--locks", "host", "--cache", "never"];
    let mut one = Mounted::ours(&[&words[..], &["--num-request-queues", "2"]].concat(), &["--queues", "2"]);
    let mut two = one.beside(&words, &[]);
    for name in ["parts", "whole"] {
        fs::write(one.house.join(name), [0; 64]).unwrap();
    }
    let folders = [&one.seen, &one.seen, &one.seen, &two.seen, &two.seen, &one.house, &one.house];
    let all: Vec<Child> = folders.iter().enumerate().map(|(number, folder)| claimant(folder, number + 1, 200)).collect();
    for round in 0..15 {
        let mut killed = claimant(&one.seen, 100 + round, 100_000);
        thread::sleep(Duration::from_millis(60 + 7 * round as u64));
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    for child in all {
        let ended = child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
    // Nothing is left of anybody's. That a file is closed the kernel tells a moment later.
    for folder in [&one.seen, &two.seen, &one.house] {
        let (parts, whole) = (open(&folder.join("parts")), open(&folder.join("whole")));
        wait_for("the whole", || flock(&whole, FlockOperation::NonBlockingLockExclusive).ok());
        wait_for("all parts", || fcntl(&parts, FcntlArg::F_OFD_SETLK(&bytes(libc::F_WRLCK, 0, 0))).ok());
    }
    two.unmount();
    one.unmount();
}
