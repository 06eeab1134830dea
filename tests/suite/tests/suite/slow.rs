//! Disks of the host that take their time, or cannot do everything. What else is asked of a queue goes on, and comes out right.
//!
//! The image is a file whose bytes nbdkit serves. While a file called `hold` is there, everything but reading and writing takes two seconds.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use probe::blk::{Disk, Kind, Status, range};
use probe::device::Shape;
use suite::disktools::{NbdFile, Running, can_make_block_devices, nbdkit};
use suite::{Scratch, Server, program, run, wait_for};

/// How long something takes that is held.
const HELD: Duration = Duration::from_secs(2);

const ENGINES: [&str; 2] = ["io-uring", "threads"];

/// What nbdkit runs for each request. nbdfuse makes several at once only where that is said to be safe.
const SCRIPT: &str = r#"hold() { if [ -e hold ]; then touch held; sleep 2; fi; }
case $1 in
get_size) stat -c %s content;;
thread_model) echo parallel;;
can_write|can_flush|can_trim|can_zero|can_multi_conn) exit 0;;
flush) hold;;
pread) dd if=content iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none;;
pwrite) dd of=content conv=notrunc oflag=seek_bytes seek=$4 status=none;;
trim|zero) hold; dd if=/dev/zero of=content conv=notrunc iflag=count_bytes oflag=seek_bytes seek=$4 count=$3 status=none;;
*) exit 2;;
esac
"#;

/// An image that is served so.
struct Slow {
    file: NbdFile,
    _nbdkit: Running,
    /// Goes last: the others are mounted in it, and listen in it.
    scratch: Scratch,
}

impl Slow {
    /// With this content.
    fn new(content: &[u8]) -> Slow {
        let scratch = Scratch::new();
        let script = scratch.path("disk.sh");
        fs::write(scratch.path("content"), content).unwrap();
        fs::write(&script, format!("#!/bin/bash\ncd {}\n{SCRIPT}", scratch.path("").display())).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        let socket = scratch.path("nbd.sock");
        let nbdkit = nbdkit(&socket, "sh", &[], &[script.to_str().unwrap()]);
        let file = NbdFile::new(&socket, scratch.path("nbd"));
        Slow { scratch, file, _nbdkit: nbdkit }
    }

    fn serve(&self, ours: &Scratch, words: &[&str]) -> Server {
        let image = self.file.path.to_str().unwrap();
        Server::start("outboard-blk", ours, &[&["--blk-file", image], words].concat())
    }

    fn hold(&self) -> Holding {
        let _from_before = fs::remove_file(self.scratch.path("held"));
        let hold = self.scratch.path("hold");
        fs::write(&hold, "").unwrap();
        Holding { hold, held: self.scratch.path("held") }
    }
}

/// Everything is held until this is dropped.
struct Holding {
    hold: PathBuf,
    held: PathBuf,
}

impl Drop for Holding {
    fn drop(&mut self) {
        fs::remove_file(&self.hold).unwrap();
    }
}

fn open(server: &Server) -> Disk {
    Disk::open_aligned(UnixStream::connect(&server.socket).unwrap(), Shape::default(), 2, 64 * 1024, 1, 4096).unwrap()
}

/// Begins something that is held, and reads meanwhile.
fn a_read_goes_on(slow: &Slow, disk: &mut Disk, kind: Kind, data: &[u8], what: &str) {
    let holding = slow.hold();
    disk.fill(0, data);
    assert!(disk.submit(0, 0, kind, 0, u32::try_from(data.len()).unwrap()));
    disk.device.kick(0);
    wait_for("it to be held", || holding.held.exists().then_some(()));
    let start = Instant::now();
    assert!(disk.submit(0, 1, Kind::In, 1024, 4096));
    disk.device.kick(0);
    let first = disk.wait().unwrap();
    assert_eq!((first.slot, first.status), (1, Status::Ok), "{what}: the read is answered first");
    assert!(start.elapsed() < HELD / 2, "{what}: the read took {:?}", start.elapsed());
    let second = disk.wait().unwrap();
    assert_eq!((second.slot, second.status), (0, Status::Ok), "{what}");
}

#[test]
fn a_read_does_not_wait_for_a_discard_zeroes_or_a_flush() {
    if !can_make_block_devices("a read beside a slow discard") {
        return;
    }
    for engine in ENGINES {
        let (slow, ours) = (Slow::new(&[0x5a; 1 << 20]), Scratch::new());
        let server = slow.serve(&ours, &["--format", "raw", "--engine", engine]);
        let mut disk = open(&server);
        disk.write(0, &mut [1; 4096]).unwrap();
        let [discard, zeroes, unmap] = [range(64, 8, 0), range(128, 8, 0), range(192, 8, 1)];
        a_read_goes_on(&slow, &mut disk, Kind::Discard, &discard, engine);
        a_read_goes_on(&slow, &mut disk, Kind::WriteZeroes, &zeroes, engine);
        a_read_goes_on(&slow, &mut disk, Kind::WriteZeroes, &unmap, engine);
        a_read_goes_on(&slow, &mut disk, Kind::Flush, &[], engine);
        let mut bytes = vec![0; 64 * 1024];
        disk.read(128 * 512, &mut bytes).unwrap();
        assert!(bytes[..4096] == [0; 4096] && bytes[4096..8192] == [0x5a; 4096] && bytes[32768..36864] == [0; 4096]);
    }
}

/// Two at once on one queue, and a stop of the ring while they are made: it waits for both.
#[test]
fn a_ring_that_stops_has_its_discards_behind_it() {
    if !can_make_block_devices("a stop beside a slow discard") {
        return;
    }
    for engine in ENGINES {
        let (slow, ours) = (Slow::new(&[0x5a; 1 << 20]), Scratch::new());
        let server = slow.serve(&ours, &["--format", "raw", "--engine", engine]);
        let mut disk = open(&server);
        let holding = slow.hold();
        for slot in 0..2 {
            disk.fill(slot, &range(64 + 64 * slot as u64, 8, 0));
            assert!(disk.submit(0, slot, Kind::WriteZeroes, 0, 16));
        }
        disk.device.kick(0);
        wait_for("it to be held", || holding.held.exists().then_some(()));
        let start = Instant::now();
        disk.device.session().stop().unwrap();
        assert!(start.elapsed() > HELD, "one after the other: {:?}", start.elapsed());
        drop(holding);
        let content = fs::read(slow.scratch.path("content")).unwrap();
        assert!([64, 128].iter().all(|sector| content[sector * 512..sector * 512 + 4096] == [0; 4096]));
        assert_eq!((disk.wait().unwrap().status, disk.wait().unwrap().status), (Status::Ok, Status::Ok));
    }
}

/// What a killed process was zeroing must not be zeroed after its successor has written there: the image is still locked by then. (The
/// kernel's FUSE would keep the two in order; it is measured that the successor waits before it serves at all.)
#[test]
fn zeroes_of_a_killed_process_land_before_its_successor_writes() {
    if !can_make_block_devices("zeroes of a killed process") {
        return;
    }
    for engine in ENGINES {
        let (slow, ours, next) = (Slow::new(&[0x5a; 1 << 20]), Scratch::new(), Scratch::new());
        let words = ["--format", "raw", "--engine", engine];
        let server = slow.serve(&ours, &words);
        let mut disk = open(&server);
        let holding = slow.hold();
        disk.fill(0, &range(0, 8, 1));
        assert!(disk.submit(0, 0, Kind::WriteZeroes, 0, 16));
        disk.device.kick(0);
        wait_for("it to be held", || holding.held.exists().then_some(()));
        let killed = Instant::now();
        drop(server);
        let successor = slow.serve(&next, &words);
        let mut disk = open(&successor);
        assert!(killed.elapsed() > HELD / 2, "{engine}: the successor has waited for the image: {:?}", killed.elapsed());
        drop(holding);
        disk.write(0, &mut [0xbb; 4096]).unwrap();
        disk.flush().unwrap();
        sleep(HELD);
        assert!(fs::read(slow.scratch.path("content")).unwrap()[..4096] == [0xbb; 4096], "{engine}: zeroed afterwards");
    }
}

#[test]
fn a_read_does_not_wait_for_a_flush_of_an_image_with_tables() {
    if !can_make_block_devices("a read beside a slow flush") {
        return;
    }
    for engine in ENGINES {
        let ours = Scratch::new();
        let image = ours.path("image");
        let words = ["image", "create", "--format", "qcow2", "--size", "1M"];
        assert_eq!(run(Command::new(program("outboard")).args(words).arg(&image)).code, Some(0));
        // Such a file cannot grow.
        let mut content = fs::read(&image).unwrap();
        content.resize(8 << 20, 0);
        let slow = Slow::new(&content);
        let server = slow.serve(&ours, &["--format", "qcow2", "--engine", engine]);
        let mut disk = open(&server);
        for round in 1..=2 {
            disk.write(0, &mut vec![round; 64 * 1024]).unwrap();
            disk.write(512 << 10, &mut [round; 4096]).unwrap();
            a_read_goes_on(&slow, &mut disk, Kind::Flush, &[], engine);
            // What is given back waits for the next flush.
            assert_eq!(disk.request(Kind::Discard, 0, &mut range(0, 128, 0)).unwrap(), Status::Ok);
        }
        let mut bytes = [0; 4096];
        disk.read(512 << 10, &mut bytes).unwrap();
        assert_eq!(bytes, [2; 4096]);
    }
}

/// One file system cannot zero, the other one cannot give space back either: then zeroes are written, and discards do nothing.
#[test]
fn a_file_system_that_cannot_zero_has_zeroes_written() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: a file system is mounted by root");
    }
    for (engine, kind) in ENGINES.iter().flat_map(|engine| [(*engine, "tmpfs"), (*engine, "ramfs")]) {
        let ours = Scratch::new();
        let folder = ours.path("mounted");
        fs::create_dir(&folder).unwrap();
        let mounted = format!("mount -t {kind} none {0}; truncate -s 1M {0}/image", folder.display());
        let image = folder.join("image").display().to_string();
        let words = ["--format", "raw", "--engine", engine, "--blk-file", &image];
        let server = Server::start_after(&mounted, "outboard-blk", &ours, &words);
        let mut disk = open(&server);
        (0..16).for_each(|at| disk.write(at << 16, &mut vec![0x5a; 64 * 1024]).unwrap());
        // More than one operation writes, and neighbours; all but whole pages.
        let mut ranges = [range(7, 201, 1), range(208, 8, 0), range(0, 0, 0), range(999, 400, 0)].concat();
        assert_eq!(disk.request(Kind::WriteZeroes, 0, &mut ranges).unwrap(), Status::Ok);
        let mut discarded = [range(400, 8, 0), range(500, 300, 0)].concat();
        assert_eq!(disk.request(Kind::Discard, 0, &mut discarded).unwrap(), Status::Ok);
        let mut content = vec![0; 1 << 20];
        for (at, part) in content.chunks_mut(64 * 1024).enumerate() {
            disk.read(at as u64 * 64 * 1024, part).unwrap();
        }
        for (sector, bytes) in content.chunks(512).enumerate() {
            let zeroes = (7..216).contains(&sector) || (999..1399).contains(&sector);
            let discards = kind == "tmpfs" && ((400..408).contains(&sector) || (500..800).contains(&sector));
            let expected = if zeroes || discards { 0 } else { 0x5a };
            assert!(bytes.iter().all(|byte| *byte == expected), "{kind}, {engine}: sector {sector}");
        }
    }
}
