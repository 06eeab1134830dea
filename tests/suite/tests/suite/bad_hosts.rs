//! Hosts that fail a disk while it is used, or do not give it what it wants: the guest gets an error for the request that met it, everything
//! else goes on, and the image is whole afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use probe::blk::{Disk, Kind, Status, verify};
use probe::device::Shape;
use seccompiler::{SeccompAction, SeccompFilter, apply_filter};
use suite::disktools::{Running, qemu_finds_no_error, tool};
use suite::{Ended, Scratch, Server, program, run, wait_for};

use super::device::disk;

const BLOCK: usize = 64 * 1024;

fn open(server: &Server) -> Disk {
    disk(server, Shape::default())
}

fn command(name: &str, args: &[&str]) {
    let ended = run(Command::new(name).args(args));
    assert_eq!(ended.code, Some(0), "{name} {args:?}: {}{}", ended.out, ended.err);
}

fn image(folder: &Path, format: &str, size: &str) -> String {
    let path = folder.join(format!("disk.{format}"));
    let made = run(Command::new(program("outboard")).args(["image", "create", "--format", format, "--size", size]).arg(&path));
    assert_eq!(made.code, Some(0), "{}", made.err);
    path.to_str().unwrap().to_owned()
}

fn serve(scratch: &Scratch, image: &str, format: &str, words: &[&str]) -> Server {
    Server::start("outboard-blk", scratch, &[&["--format", format, "--blk-file", image], words].concat())
}

/// What a server says that does not start.
fn refused(image: &str, format: &str, words: &[&str]) -> Ended {
    let mut command = Command::new(program("outboard-blk"));
    let scratch = Scratch::new();
    let ended =
        run(command.arg("--socket-path").arg(scratch.path("s")).args(["--format", format, "--blk-file", image]).args(words));
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.starts_with("outboard-blk: Cannot ") && !ended.err.contains("panicked"), "{}", ended.err);
    assert_eq!(ended.err.trim_end().lines().filter(|line| line.starts_with("outboard-blk: ")).count(), 1, "{}", ended.err);
    ended
}

/// A small file system in memory.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(test: &str, path: PathBuf, size: &str) -> Option<Tmpfs> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: {test} needs root, to mount a small file system");
            return None;
        }
        fs::create_dir(&path).unwrap();
        command("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path.to_str().unwrap()]);
        Some(Tmpfs(path))
    }

    fn remount(&self, option: &str) {
        command("mount", &["-o", &format!("remount,{option}"), self.0.to_str().unwrap()]);
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _gone_with_the_machine_otherwise = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

/// The host's disk is full: writes fail, and what was written stays. When there is room again, everything goes on.
#[test]
fn a_full_disk_of_the_host() {
    for format in ["raw", "qcow2"] {
        for engine in ["io-uring", "threads"] {
            let scratch = Scratch::new();
            let Some(tmpfs) = Tmpfs::new("a full disk of the host", scratch.path("small"), "2M") else { return };
            let image = image(&tmpfs.0, format, "16M");
            let server = serve(&scratch, &image, format, &["--engine", engine]);
            let mut disk = open(&server);
            let write = |disk: &mut Disk, block: u64, byte: u8| {
                disk.request(Kind::Out, block * BLOCK as u64 / 512, &mut vec![byte; BLOCK]).unwrap()
            };
            let answers: Vec<Status> = (0..64).map(|block| write(&mut disk, block, 1)).collect();
            let good = answers.iter().filter(|status| **status == Status::Ok).count();
            assert!((8..=32).contains(&good), "{format}, {engine}: {good} writes of 64 KiB into 2 MiB");
            assert!(answers.iter().all(|status| matches!(status, Status::Ok | Status::IoError)), "{answers:?}");
            let check = |disk: &mut Disk| {
                let mut bytes = vec![0; BLOCK];
                for (block, _) in answers.iter().enumerate().filter(|(_, status)| **status == Status::Ok) {
                    disk.read((block * BLOCK) as u64, &mut bytes).unwrap();
                    assert!(bytes.iter().all(|byte| *byte == 1), "{format}, {engine}: what was written has gone");
                }
            };
            check(&mut disk);
            tmpfs.remount("size=32M");
            let again: Vec<Status> = (64..128).map(|block| write(&mut disk, block, 2)).collect();
            assert!(again.iter().all(|status| *status == Status::Ok), "{format}, {engine}: with room again: {again:?}");
            check(&mut disk);
            disk.flush().unwrap();
            assert_eq!(server.terminate(), Some(0));
            if format == "qcow2" {
                qemu_finds_no_error(&image);
            }
        }
    }
}

/// Somebody cuts the file off under us: what is gone gives errors, what is left is served.
#[test]
fn a_file_that_is_cut_off_while_it_is_used() {
    for format in ["raw", "qcow2"] {
        for words in [&["--engine", "io-uring"][..], &["--engine", "threads"], &["--direct"]] {
            let scratch = Scratch::new();
            let image = image(&scratch.path(""), format, "4M");
            let server = serve(&scratch, &image, format, words);
            let mut disk = open(&server);
            let blocks = (4 << 20) / BLOCK as u64;
            for block in 0..blocks {
                disk.write(block * BLOCK as u64, &mut vec![1; BLOCK]).unwrap();
            }
            disk.flush().unwrap();
            fs::File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
            let mut bytes = vec![0; BLOCK];
            let read = |disk: &mut Disk, block: u64, bytes: &mut Vec<u8>| {
                disk.request(Kind::In, block * BLOCK as u64 / 512, bytes).unwrap()
            };
            assert_eq!(read(&mut disk, 0, &mut bytes), Status::Ok, "{format}, {words:?}: what is left");
            assert!(bytes.iter().all(|byte| *byte == 1));
            assert_eq!(read(&mut disk, blocks - 1, &mut bytes), Status::IoError, "{format}, {words:?}: what is gone");
            let _error_or_not = disk.request(Kind::Out, (blocks - 1) * BLOCK as u64 / 512, &mut bytes).unwrap();
            assert_eq!(read(&mut disk, 1, &mut bytes), Status::Ok, "{format}, {words:?}: the next one is served");
            assert_ne!(server.terminate(), None, "it ends by itself");
        }
    }
}

#[test]
fn files_that_are_too_short_or_no_images() {
    let scratch = Scratch::new();
    for (len, format, says) in [(0, "raw", "less than one sector"), (511, "raw", "less than one sector"), (0, "qcow2", "qcow2")] {
        let image = scratch.image("short", len);
        assert!(refused(image.to_str().unwrap(), format, &[]).err.contains(says), "{len} bytes of {format}");
    }
    let qcow2 = image(&scratch.path(""), "qcow2", "4M");
    let good = fs::read(&qcow2).unwrap();
    let damage: [(&str, usize, &[u8]); 7] = [
        ("another magic number", 0, b"QFJ\xfb"),
        ("version 9", 7, &[9]),
        ("clusters of a byte", 23, &[0]),
        ("a disk of exabytes", 24, &[0x7f]),
        ("an L1 table in the header", 40, &[0, 0, 0, 0, 0, 0, 0, 0]),
        ("an L1 table behind the end", 40, &[0, 0x7f, 0, 0, 0, 0, 0, 0]),
        ("a feature nobody knows", 72, &[0x80]),
    ];
    for (what, at, bytes) in damage {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&qcow2, &bad).unwrap();
        println!("{what}: {}", refused(&qcow2, "qcow2", &[]).err.trim());
        assert!(fs::read(&qcow2).unwrap() == bad, "{what}: it was written to");
    }
}

#[test]
fn media_that_cannot_be_written() {
    let scratch = Scratch::new();
    let Some(tmpfs) = Tmpfs::new("media that cannot be written", scratch.path("small"), "8M") else { return };
    let image = image(&tmpfs.0, "raw", "4M");
    tmpfs.remount("ro");
    assert!(refused(&image, "raw", &[]).err.contains("Read-only file system"));
    let server = serve(&scratch, &image, "raw", &["--read-only"]);
    open(&server).read(0, &mut [0; 512]).unwrap();
}

/// QEMU's locks and ours know of each other.
#[test]
fn images_that_somebody_else_has() {
    for format in ["raw", "qcow2"] {
        let scratch = Scratch::new();
        let image = image(&scratch.path(""), format, "4M");
        let socket = scratch.path("nbd.sock");
        let qemu = Running::start(tool("qemu-nbd").args(["-t", "-f", format, "-k", socket.to_str().unwrap(), &image]));
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        wait_for("qemu-nbd", || (run(tool("nbdinfo").args(["--size", &uri])).code == Some(0)).then_some(()));
        assert!(refused(&image, format, &[]).err.contains("Another process has it open for writing"));
        drop(qemu);
        let server = serve(&scratch, &image, format, &[]);
        let theirs = run(tool("qemu-io").args(["-f", format, "-c", "write 0 512", &image]));
        assert!(theirs.code != Some(0) && theirs.err.contains("lock"), "{}{}", theirs.out, theirs.err);
        open(&server).write(0, &mut [1; 512]).unwrap();
    }
}

/// Starts a server from a thread that may not make an io_uring, as in a container of those that forbid it.
fn without_uring<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    let forbidden = BTreeMap::from([(libc::SYS_io_uring_setup, vec![])]);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let errno = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(forbidden, SeccompAction::Allow, errno, arch).unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    thread::scope(|scope| {
        let started = scope.spawn(|| {
            apply_filter(&program).unwrap();
            start()
        });
        started.join().unwrap()
    })
}

#[test]
fn a_host_without_io_uring() {
    let scratch = Scratch::new();
    let image = image(&scratch.path(""), "raw", "4M");
    let said = without_uring(|| refused(&image, "raw", &["--engine", "io-uring"]));
    assert!(said.err.contains("Cannot use io_uring") && said.err.contains("leave --engine out"), "{}", said.err);
    for words in [&[][..], &["--direct"]] {
        let again = Scratch::new();
        let server = without_uring(|| serve(&again, &image, "raw", words));
        let stream = UnixStream::connect(&server.socket).unwrap();
        let mut disk = Disk::open_aligned(stream, Shape::default(), 16, 4096, 1, 4096).unwrap();
        assert_eq!(verify::run(&mut disk, 1024, 4096, 5).unwrap().wrong, 0, "{words:?}: threads do it");
    }
}

/// Too few descriptors: it starts and serves, or says why not.
#[test]
fn a_host_with_few_descriptors() {
    let scratch = Scratch::new();
    let image = image(&scratch.path(""), "raw", "4M");
    let blk = program("outboard-blk");
    for most in 3..24 {
        let text = format!("ulimit -n {most}; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &text, "sh"]).arg(&blk).args(["--socket-path", "/nowhere/s", "--num-queues", "8"]);
        let ended = run(command.args(["--format", "raw", "--blk-file", &image]));
        assert!(ended.code == Some(1) || ended.code == Some(127), "{most}: {:?} {}", ended.code, ended.err);
        assert!(!ended.err.contains("panicked"), "{most} descriptors: {}", ended.err);
    }
}
