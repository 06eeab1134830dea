//! A write of a killed process that reaches the disk after the process is gone: it must not land on top of what its successor writes.
//!
//! The disk here takes two seconds for a block that begins with an `A`, and no time for others, so a successor that did not wait would have
//! its own write overtaken. (Here the kernel's FUSE would keep the two in order; a disk would not. So it is measured that the
//! successor waits before it serves at all.)

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use probe::blk::{Disk, Kind};
use probe::device::Shape;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdFlags, pidfd_open};
use suite::disktools::{BlockDevice, Running, can_make_block_devices, nbdkit};
use suite::{Scratch, Server, wait_for};

const BLOCK: usize = 4096;

/// How long the disk takes.
const SLOW: Duration = Duration::from_secs(2);

/// How long the write is on its way when the process is killed.
const BEFORE: Duration = Duration::from_millis(500);

/// A script for nbdkit: the bytes are in a file, and some take their time to get there.
fn slow_disk(scratch: &Scratch) -> (Running, PathBuf, PathBuf) {
    let (content, begun, script) = (scratch.image("content", 16 << 20), scratch.path("begun"), scratch.path("disk.sh"));
    let text = format!(
        "#!/bin/bash\ncase $1 in\nget_size) echo 16M;;\nthread_model) echo parallel;;\ncan_write|can_flush) exit 0;;\nflush) exit 0;;\n\
         pread) dd if={0} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none;;\n\
         pwrite) t=$(mktemp -p {2}); cat >$t; if [ $(head -c1 $t) = A ]; then touch {1}; sleep 2; fi 2>/dev/null\n\
         dd if=$t of={0} conv=notrunc oflag=seek_bytes seek=$4 status=none;;\n*) exit 2;;\nesac\n",
        content.display(),
        begun.display(),
        scratch.path("").display(),
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    let socket = scratch.path("nbd.sock");
    (nbdkit(&socket, "sh", &[], &[script.to_str().unwrap()]), socket, begun)
}

fn connect(server: &Server) -> Disk {
    Disk::open_aligned(UnixStream::connect(&server.socket).unwrap(), Shape::default(), 1, 4096, 1, 4096).unwrap()
}

/// Kills a process, and gives the time until it is gone: all of its threads, with all that they had open.
fn gone_after(pid: u32) -> Duration {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap());
    let fd = pidfd_open(rustix::process::Pid::from_raw(pid.as_raw()).unwrap(), PidfdFlags::empty()).unwrap();
    let start = Instant::now();
    kill(pid, Signal::SIGKILL).unwrap();
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap(), 1, "the process does not die");
    start.elapsed()
}

fn first_byte(path: &Path) -> u8 {
    let mut byte = [0];
    fs::File::open(path).unwrap().read_exact(&mut byte).unwrap();
    byte[0]
}

/// Kills a server while a write is on its way to the disk; its successor writes the same block. Gives the time from the kill to the end of
/// the process, and to the moment when the successor has the image.
fn overtaken(words: &[&str]) -> (Duration, Duration) {
    let (scratch, ours) = (Scratch::new(), Scratch::new());
    let (_nbdkit, socket, begun) = slow_disk(&scratch);
    let device = BlockDevice::new(&socket, scratch.path("nbd"));
    let args = [&["--blk-file", device.path.as_str(), "--format", "raw"], words].concat();
    let server = Server::start("outboard-blk", &ours, &args);
    let mut disk = connect(&server);
    if words.contains(&"--direct") {
        disk.fill(0, &[b'A'; BLOCK]);
        assert!(disk.submit(0, 0, Kind::Out, 0, 4096));
    } else {
        // The page cache takes it at once; it is the flush that is on its way.
        disk.write(0, &mut [b'A'; BLOCK]).unwrap();
        assert!(disk.submit(0, 0, Kind::Flush, 0, 0));
    }
    disk.device.kick(0);
    wait_for("the write's beginning", || begun.exists().then_some(()));
    sleep(BEFORE);
    let killed = Instant::now();
    let gone = gone_after(server.worker());
    drop(server);
    let _removed_by_its_parent = fs::remove_file(ours.path("outboard-blk.sock"));
    let successor = Server::start("outboard-blk", &ours, &args);
    let serves = killed.elapsed();
    let mut disk = connect(&successor);
    disk.write(0, &mut [b'B'; BLOCK]).unwrap();
    disk.flush().unwrap();
    // Whatever is still on its way has its time to arrive.
    sleep(SLOW);
    let mut bytes = [0; BLOCK];
    disk.read(0, &mut bytes).unwrap();
    assert!(bytes == [b'B'; BLOCK] && first_byte(&scratch.path("content")) == b'B', "the late write came last: {:?}", bytes[0]);
    (gone, serves)
}

#[test]
fn a_write_of_a_killed_ring_lands_before_its_successor_writes() {
    if !can_make_block_devices("a write of a killed ring") {
        return;
    }
    let (gone, serves) = overtaken(&["--direct", "--engine", "io-uring"]);
    println!("io_uring: gone after {gone:?}, its successor has the image after {serves:?}");
    assert!(gone < Duration::from_secs(1), "the process goes without its write: {gone:?}");
    assert!(serves > SLOW - BEFORE * 2, "the successor has waited for the image: {serves:?}");
}

/// A thread that waits for the disk cannot be killed before the disk has answered, so it is the process that goes late.
#[test]
fn a_write_of_a_killed_thread_lands_before_its_successor_writes() {
    if !can_make_block_devices("a write of a killed thread") {
        return;
    }
    let (gone, serves) = overtaken(&["--direct", "--engine", "threads"]);
    println!("threads: gone after {gone:?}, its successor has the image after {serves:?}");
    assert!(serves > SLOW - BEFORE * 2, "the successor has waited for the image: {serves:?}");
}

/// Through the page cache it is a flush that outlives its process. Until it has ended, the device is not its successor's to open alone.
#[test]
fn a_flush_of_a_killed_process_keeps_its_successor_waiting_and_not_out() {
    if !can_make_block_devices("a flush of a killed process") {
        return;
    }
    for engine in ["io-uring", "threads"] {
        let (gone, serves) = overtaken(&["--engine", engine]);
        println!("{engine}: gone after {gone:?}, its successor has the image after {serves:?}");
    }
}

/// The kernel lets a device go a moment after the process that had it alone: met on a busy host, made here.
#[test]
fn a_device_that_is_still_taken_is_waited_for() {
    if !can_make_block_devices("a device that is still taken") {
        return;
    }
    let (scratch, ours) = (Scratch::new(), Scratch::new());
    let socket = scratch.path("nbd.sock");
    let _nbdkit = nbdkit(&socket, "memory", &[], &["4M"]);
    let device = BlockDevice::new(&socket, scratch.path("nbd"));
    let alone = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    let taken = rustix::fs::open(device.path.as_str(), alone, Mode::empty()).unwrap();
    let letting_go = thread::spawn(move || {
        sleep(Duration::from_millis(700));
        drop(taken);
    });
    let start = Instant::now();
    let server = Server::start("outboard-blk", &ours, &["--blk-file", &device.path, "--format", "raw"]);
    assert!(start.elapsed() >= Duration::from_millis(500), "it was not taken");
    letting_go.join().unwrap();
    connect(&server).write(0, &mut [1; BLOCK]).unwrap();
}
