//! What a disk offers, bit by bit: what the guest's driver would see, and what the host's files show for it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use probe::blk::{Disk, Kind, Status, range, verify};
use probe::device::Shape;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use suite::counters::Counters;
use suite::disktools::done;
use suite::tracer::{Event, Filters, Tracer, argument, can_trace};
use suite::{Scratch, Server};
use vhost_user::session::BackendEvent;

use super::device::disk;

/// Bits of the features of virtio-blk.
const FLUSH: u32 = 9;
const TOPOLOGY: u32 = 10;
const CONFIG_WCE: u32 = 11;
const LIFETIME: u32 = 15;
const SECURE_ERASE: u32 = 16;

/// Where the configuration space says whether writes may wait for a flush.
const WRITEBACK: u32 = 32;
const CONFIG: u32 = 72;

fn blk(scratch: &Scratch, words: &[&str]) -> Server {
    let image = scratch.path("disk.img");
    if !image.exists() {
        scratch.image("disk.img", 8 << 20);
    }
    Server::start("outboard-blk", scratch, &[&["--format", "raw", "--blk-file", image.to_str().unwrap()], words].concat())
}

fn open(server: &Server) -> Disk {
    disk(server, Shape::default())
}

fn offers(disk: &mut Disk, bit: u32) -> bool {
    disk.device.session().offered() >> bit & 1 == 1
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The calls with which a server makes data durable, until it has ended: the file of each, or nothing where a ring is entered.
fn syncs(server: Server, work: impl FnOnce(&Server)) -> Vec<Option<PathBuf>> {
    let pid = server.worker();
    let (ready, wait) = channel();
    let tracer = thread::spawn(move || {
        let mut tracer = Tracer::seize(pid, Filters::InForce);
        ready.send(()).unwrap();
        let mut made = Vec::new();
        while let Some(event) = tracer.event() {
            match event {
                Event::Call(tid, call) => {
                    match call {
                        libc::SYS_fdatasync | libc::SYS_fsync => {
                            let fd = argument(tid, 0);
                            made.push(fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok());
                        }
                        // Everything else that these disks do goes through the page cache, so a ring is entered for nothing else.
                        libc::SYS_io_uring_enter => made.push(None),
                        _ => {}
                    }
                    tracer.go(tid);
                }
                Event::Return(tid, _) => tracer.go(tid),
                Event::Died(..) => {}
            }
        }
        made
    });
    wait.recv().unwrap();
    work(&server);
    assert_eq!(server.terminate(), Some(0));
    tracer.join().unwrap()
}

/// A driver that asks for write-through has each write on the disk before it is answered, without a flush.
#[test]
fn each_write_is_made_durable_where_the_driver_wants_that() {
    const WRITES: usize = 20;
    if !can_trace() {
        return;
    }
    for engine in ["threads", "io-uring"] {
        let count = |writeback: Option<u8>| {
            let scratch = Scratch::new();
            syncs(blk(&scratch, &["--engine", engine]), |server| {
                let mut disk = open(server);
                assert!(offers(&mut disk, CONFIG_WCE) && offers(&mut disk, FLUSH));
                assert_eq!(disk.device.session().config(CONFIG).unwrap()[32], 1, "at first, a flush is needed");
                if let Some(choice) = writeback {
                    disk.device.session().write_config(WRITEBACK, &[choice]).unwrap();
                    assert_eq!(disk.device.session().config(CONFIG).unwrap()[32], choice);
                }
                for index in 0..WRITES as u64 {
                    disk.write(index * 4096, &mut [1; 4096]).unwrap();
                }
            })
        };
        let (back, through) = (count(None).len(), count(Some(0)).len());
        println!("{engine}: {back} syncs with write-back, {through} with write-through");
        assert!(back < 5, "{engine}: {back} syncs that nobody asked for");
        assert!(through >= WRITES, "{engine}: {through} syncs of {WRITES} writes");
    }
}

/// Data and tables in two files: a write is durable when both are.
#[test]
fn both_files_of_an_image_are_made_durable() {
    const WRITES: usize = 10;
    if !can_trace() {
        return;
    }
    let scratch = Scratch::new();
    let (image, data) = (scratch.path("disk.qcow2"), scratch.path("disk.data"));
    let options = format!("data_file={}", data.display());
    done("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, image.to_str().unwrap(), "8M"]);
    let words = ["--format", "qcow2", "--blk-file", image.to_str().unwrap(), "--data-file", data.to_str().unwrap()];
    let server = Server::start("outboard-blk", &scratch, &[&words[..], &["--engine", "threads"]].concat());
    let made = syncs(server, |server| {
        let mut disk = open(server);
        disk.device.session().write_config(WRITEBACK, &[0]).unwrap();
        for index in 0..WRITES as u64 {
            disk.write(index * 65536, &mut [1; 4096]).unwrap();
        }
    });
    for file in [image, data] {
        let name = file.file_name();
        let count = made.iter().flatten().filter(|path| path.file_name() == name).count();
        println!("{count} syncs of {}", file.display());
        assert!(count >= WRITES, "{count} syncs of {} for {WRITES} writes", file.display());
    }
}

#[test]
fn the_driver_writes_one_byte_of_the_configuration_and_no_other() {
    let scratch = Scratch::new();
    let server = blk(&scratch, &[]);
    let mut disk = open(&server);
    let before = disk.device.session().config(CONFIG).unwrap();
    for at in (0..CONFIG).filter(|at| *at != WRITEBACK) {
        assert!(disk.device.session().write_config(at, &[0x5a]).is_err(), "byte {at}");
    }
    assert!(disk.device.session().write_config(WRITEBACK, &[2]).is_err(), "neither yes nor no");
    assert!(disk.device.session().write_config(0, &[0; 8]).is_err());
    assert_eq!(disk.device.session().config(CONFIG).unwrap(), before);
    disk.flush().unwrap();
    drop(disk);
    drop(server);
    let read_only = Scratch::new();
    let server = blk(&read_only, &["--read-only"]);
    let mut disk = open(&server);
    assert!(!offers(&mut disk, CONFIG_WCE) && disk.device.session().write_config(WRITEBACK, &[0]).is_err());
}

#[test]
fn sizes_of_blocks_are_those_that_were_given() {
    let scratch = Scratch::new();
    let sizes = ["--logical-block-size", "1024", "--physical-block-size", "8192", "--opt-io-size", "1048576"];
    let server = blk(&scratch, &sizes);
    let mut disk = open(&server);
    assert!(offers(&mut disk, TOPOLOGY));
    let config = disk.device.session().config(CONFIG).unwrap();
    assert_eq!(word(&config, 20), 1024, "blocks");
    assert_eq!((config[24], config[25]), (3, 0), "2^3 of them are written at once, from the beginning");
    assert_eq!(u16::from_le_bytes([config[26], config[27]]), 8, "the least that is done well, in blocks");
    assert_eq!(word(&config, 28), 1024, "the best, in blocks");
    assert_eq!(disk.geometry.capacity, (8 << 20) / 512, "still in sectors");
}

#[test]
fn what_a_file_cannot_is_not_offered_and_not_done() {
    let scratch = Scratch::new();
    let server = blk(&scratch, &[]);
    let mut disk = open(&server);
    assert!(!offers(&mut disk, LIFETIME) && !offers(&mut disk, SECURE_ERASE));
    // SCSI commands of two sorts, barriers, wear, secure erase, zones, and what nobody has thought of.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 20, 22, 24, 99, 1 << 31, u32::MAX] {
        assert_eq!(disk.request(Kind::Other(kind), 0, &mut [0; 512]).unwrap(), Status::Unsupported, "request {kind}");
    }
    disk.flush().unwrap();
}

#[test]
fn sectors_beyond_all_disks_are_no_places() {
    let scratch = Scratch::new();
    let server = blk(&scratch, &[]);
    let mut disk = open(&server);
    let end = disk.geometry.capacity;
    for sector in [end, end + 1, 1 << 54, (1 << 55) - 1, 1 << 55, 1 << 63, u64::MAX - 1, u64::MAX] {
        for kind in [Kind::In, Kind::Out] {
            assert_eq!(disk.request(kind, sector, &mut [0; 512]).unwrap(), Status::IoError, "{kind:?} at {sector:#x}");
        }
        for kind in [Kind::Discard, Kind::WriteZeroes] {
            let mut one = range(sector, 1, 0);
            assert_eq!(disk.request(kind, 0, &mut one).unwrap(), Status::IoError, "{kind:?} at {sector:#x}");
            // A good range beside a bad one is not carried out either.
            disk.write(0, &mut [7; 512]).unwrap();
            let mut two = [range(0, 1, 0), range(sector, 1, 0)].concat();
            assert_eq!(disk.request(kind, 0, &mut two).unwrap(), Status::IoError);
            let mut kept = [0; 512];
            disk.read(0, &mut kept).unwrap();
            assert_eq!(kept, [7; 512]);
        }
    }
    for sectors in [(2 << 20) + 1, u32::MAX] {
        assert_eq!(disk.request(Kind::Discard, 0, &mut range(0, sectors, 0)).unwrap(), Status::IoError, "{sectors} at once");
    }
}

/// Past the page cache, buffers have to lie and end at certain multiples. Drivers need not know.
#[test]
fn buffers_may_lie_anywhere_also_past_the_page_cache() {
    for engine in ["io-uring", "threads"] {
        let scratch = Scratch::new();
        let server = blk(&scratch, &["--direct", "--engine", engine, "--num-queues", "2"]);
        for alignment in [1, 2, 512, 4096] {
            let stream = UnixStream::connect(&server.socket).unwrap();
            let shape = Shape { queues: 2, indirect: true, ..Shape::default() };
            let mut disk = Disk::open_aligned(stream, shape, 16, 64 * 1024, alignment, alignment).unwrap();
            assert_eq!(verify::run(&mut disk, 512, 4096, alignment).unwrap().wrong, 0, "{engine}, at {alignment}");
            assert_eq!(verify::run(&mut disk, 64, 64 * 1024, alignment).unwrap().wrong, 0, "{engine}, at {alignment}");
        }
    }
}

/// A write that is longer than a piece of the detour, from where nothing fits.
#[test]
fn what_goes_past_the_page_cache_is_in_the_file() {
    let scratch = Scratch::new();
    let server = blk(&scratch, &["--direct"]);
    let stream = UnixStream::connect(&server.socket).unwrap();
    let mut disk = Disk::open(stream, Shape { memory: 64 << 20, ..Shape::default() }, 1, 1 << 20, 3).unwrap();
    let mut bytes: Vec<u8> = (0..1u32 << 20).map(|at| (at / 512 + at % 251).to_le_bytes()[0]).collect();
    let written = bytes.clone();
    disk.write(512, &mut bytes).unwrap();
    disk.flush().unwrap();
    let content = fs::read(scratch.path("disk.img")).unwrap();
    assert!(content[512..512 + (1 << 20)] == written[..] && content[..512] == [0; 512]);
}

#[test]
fn a_disk_that_keeps_nothing_answers_everything() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-blk", &scratch, &["--format", "null", "--size", "1073741824", "--num-queues", "2"]);
    let mut disk = disk(&server, Shape { queues: 2, ..Shape::default() });
    assert_eq!(disk.geometry.capacity, (1 << 30) / 512);
    for (kind, data) in [(Kind::Out, &mut [1; 4096][..]), (Kind::In, &mut [1; 4096]), (Kind::Flush, &mut [])] {
        assert_eq!(disk.request(kind, 8, data).unwrap(), Status::Ok, "{kind:?}");
    }
    assert_eq!(disk.request(Kind::In, 1 << 30, &mut [0; 512]).unwrap(), Status::IoError, "it has an end all the same");
}

/// A client of the control socket.
struct Control(BufReader<UnixStream>);

impl Control {
    fn new(path: &Path) -> Control {
        Control(BufReader::new(UnixStream::connect(path).unwrap()))
    }

    fn ask(&mut self, command: &str) -> Value {
        self.0.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

#[test]
fn a_disk_grows_while_it_is_used_and_its_driver_is_told() {
    for format in ["raw", "qcow2"] {
        let scratch = Scratch::new();
        let (image, control) = (scratch.path("image"), scratch.path("control.sock"));
        let mut create = std::process::Command::new(suite::program("outboard"));
        create.args(["image", "create", "--size", "8M", "--format", format]).arg(&image);
        assert_eq!(suite::run(&mut create).code, Some(0));
        let words = ["--blk-file", image.to_str().unwrap(), "--format", format, "--control-path", control.to_str().unwrap()];
        let server = Server::start("outboard-blk", &scratch, &words);
        let mut disk = open(&server);
        let mut control = Control::new(&control);
        assert_eq!(disk.request(Kind::Out, 20 << 11, &mut [9; 512]).unwrap(), Status::IoError, "behind the end");
        let answer = control.ask(r#"{"command": "resize", "bytes": 33554432}"#);
        assert_eq!((&answer["ok"], &answer["bytes"]), (&true.into(), &33_554_432.into()), "{answer}");
        let requests = disk.device.session().backend_requests().unwrap().try_clone_to_owned().unwrap();
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&requests, PollFlags::IN)], Some(&limit)).unwrap(), 1, "{format}: nobody is told");
        let event = disk.device.session().handle_backend_request().unwrap();
        assert!(matches!(event, BackendEvent::ConfigChanged), "{event:?}");
        let config = disk.device.session().config(CONFIG).unwrap();
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 65536);
        assert_eq!(disk.request(Kind::Out, 20 << 11, &mut [9; 512]).unwrap(), Status::Ok);
        for bytes in ["8388608", "33554433", "18446744073709551615"] {
            let answer = control.ask(&format!(r#"{{"command": "resize", "bytes": {bytes}}}"#));
            assert_eq!(answer["ok"], false, "{format}, {bytes}: {answer}");
        }
        let mut read = [0; 512];
        assert_eq!(disk.request(Kind::In, 20 << 11, &mut read).unwrap(), Status::Ok);
        assert_eq!(read, [9; 512]);
        assert_eq!(server.terminate(), Some(0));
        let again = Scratch::new();
        let server = Server::start("outboard-blk", &again, &words[..4]);
        assert_eq!(open(&server).geometry.capacity, 65536, "{format}: it stays as large");
    }
}

/// How long so many reads take, of which many are out at once.
fn time(disk: &mut Disk, reads: usize) -> Duration {
    let start = Instant::now();
    let (mut begun, mut done) = (0, 0);
    while done < reads {
        while begun < reads
            && let Some(slot) = disk.idle()
        {
            assert!(disk.submit(0, slot, Kind::In, 0, 4096));
            disk.device.kick(0);
            begun += 1;
        }
        assert_eq!(disk.wait().unwrap().status, Status::Ok);
        done += 1;
    }
    start.elapsed()
}

#[test]
fn a_limited_disk_keeps_to_its_rate_and_is_freed_while_it_runs() {
    let scratch = Scratch::new();
    let control = scratch.path("control.sock");
    let server = blk(&scratch, &["--limit-ops", "100:20", "--control-path", control.to_str().unwrap()]);
    let (mut disk, mut control) = (open(&server), Control::new(&control));
    let burst = time(&mut disk, 20);
    assert!(burst < Duration::from_millis(150), "a burst passes at once: {burst:?}");
    let rest = time(&mut disk, 100);
    println!("a burst of 20 took {burst:?}, 100 more at 100 a second {rest:?}");
    assert!((0.8..2.0).contains(&rest.as_secs_f64()), "100 operations at 100 a second: {rest:?}");
    let free = control.ask(r#"{"command": "limit"}"#);
    assert_eq!(free["ok"], true, "{free}");
    let free = time(&mut disk, 1000);
    assert!(free < Duration::from_secs(2), "1000 operations without a limit: {free:?}");
    // Bytes: a megabyte a second, so 100 reads of 4 KiB take 0.4 s, less the burst.
    let answer = control.ask(r#"{"command": "limit", "bytes": {"per_second": 1048576, "burst": 65536}}"#);
    assert_eq!(answer["limits"]["bytes"]["per_second"], 1_048_576, "{answer}");
    let bytes = time(&mut disk, 100);
    assert!((0.25..1.5).contains(&bytes.as_secs_f64()), "400 KiB at a megabyte a second: {bytes:?}");
    let nonsense = control.ask(r#"{"command": "limit", "bytes": {"per_second": -1}}"#);
    assert_eq!(nonsense["ok"], false, "{nonsense}");
    assert_eq!(control.ask(r#"{"command": "status"}"#)["ok"], true, "and the next command is heard");
}

#[test]
fn how_long_requests_take_is_in_the_metrics() {
    let scratch = Scratch::new();
    let counters = Counters::new();
    let server = blk(&scratch, &["--metrics-fd", &counters.fd()]);
    let mut disk = open(&server);
    for index in 0..10u64 {
        disk.write(index * 4096, &mut [1; 4096]).unwrap();
    }
    for index in 0..7u64 {
        disk.read(index * 4096, &mut [1; 4096]).unwrap();
    }
    for _ in 0..3 {
        disk.flush().unwrap();
    }
    let values = |name| counters.values(name);
    assert_eq!((values("blk_writes"), values("blk_reads"), values("blk_flushes")), (vec![10], vec![7], vec![3]));
    assert_eq!((values("blk_written_bytes"), values("blk_read_bytes")), (vec![40960], vec![28672]));
    // The last value of a histogram is the sum of all times, the others are how many took how long.
    for (name, count) in [("blk_write_seconds", 10), ("blk_read_seconds", 7), ("blk_flush_seconds", 3), ("blk_other_seconds", 0)]
    {
        let values = values(name);
        let (sum, buckets) = values.split_last().unwrap();
        assert_eq!(buckets.iter().sum::<u64>(), count, "{name}: {values:?}");
        assert_eq!(*sum > 0, count > 0, "{name}: {values:?}");
    }
}
