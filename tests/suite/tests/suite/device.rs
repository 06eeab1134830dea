//! What a guest would notice of rng and blk: the right bytes, the right errors, with every feature that is offered.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use probe::blk::{Disk, Kind, Status, verify};
use probe::device::{Device, Shape};
use probe::ring::Buffer;
use probe::rng;
use suite::{Scratch, Server};

/// All ways in which rings can be negotiated.
pub(super) fn shapes(queues: u16) -> Vec<Shape> {
    let both = [false, true];
    let all = both.into_iter().flat_map(|event_idx| both.into_iter().map(move |indirect| (event_idx, indirect)));
    all.map(|(event_idx, indirect)| Shape { queues, size: 64, event_idx, indirect, memory: 32 << 20 }).collect()
}

pub(super) fn disk(server: &Server, shape: Shape) -> Disk {
    let stream = UnixStream::connect(&server.socket).unwrap();
    Disk::open(stream, shape, 16, 64 * 1024, 7).unwrap()
}

fn blk(scratch: &Scratch, size: u64, args: &[&str]) -> Server {
    let image = scratch.image("disk.img", size);
    let mut all = vec!["--blk-file", image.to_str().unwrap(), "--format", "raw"];
    all.extend(args);
    Server::start("outboard-blk", scratch, &all)
}

#[test]
fn random_bytes_are_random_with_every_ring() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let mut seen = BTreeSet::new();
    for shape in shapes(1) {
        let bytes = rng::fetch(UnixStream::connect(&server.socket).unwrap(), 4096, 1000, shape).unwrap().bytes;
        let values: BTreeSet<u8> = bytes.iter().copied().collect();
        assert!(values.len() > 200, "4096 random bytes have nearly all values");
        assert!(seen.insert(bytes), "never twice the same");
    }
}

#[test]
fn a_share_of_randomness_is_kept_without_sleeping_on_a_request() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--max-bytes", "1000", "--period", "200"]);
    let start = Instant::now();
    let bytes = rng::fetch(UnixStream::connect(&server.socket).unwrap(), 5000, 64, Shape::default()).unwrap().bytes;
    assert_eq!(bytes.len(), 5000);
    let periods = start.elapsed().as_millis() / 200;
    assert!((3..100).contains(&periods), "5000 bytes take four refills of 1000, not {periods}");
}

#[test]
fn a_request_of_the_wrong_kind_is_given_back_empty() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let mut device = Device::connect(UnixStream::connect(&server.socket).unwrap(), Shape::default(), 0).unwrap();
    let at = device.memory_mut().take(64, 1, 0).unwrap();
    device.start().unwrap();
    let limit = std::time::Duration::from_secs(10);
    let used = device.exchange(0, &[Buffer { addr: at, len: 64, write: false }], limit).unwrap();
    assert_eq!(used.len, 0);
    let used = device.exchange(0, &[Buffer { addr: at, len: 64, write: true }], limit).unwrap();
    assert_eq!(used.len, 64, "and the next one is served");
}

#[test]
fn a_disk_keeps_what_is_written_with_every_ring() {
    let scratch = Scratch::new();
    let server = blk(&scratch, 8 << 20, &["--num-queues", "3"]);
    for (index, shape) in shapes(3).into_iter().enumerate() {
        let mut disk = disk(&server, shape);
        let report = verify::run(&mut disk, 1024, 4096, index as u64).unwrap();
        assert_eq!((report.blocks, report.wrong), (1024, 0));
    }
    let mut one = disk(&server, Shape::default());
    assert_eq!(verify::run(&mut one, 128, 64 * 1024, 9).unwrap().wrong, 0);
}

#[test]
fn a_disk_says_what_it_is() {
    let scratch = Scratch::new();
    let server = blk(&scratch, (1 << 20) + 100, &["--serial", "outboard-0123456789", "--num-queues", "2"]);
    let mut disk = disk(&server, Shape::default());
    assert_eq!(disk.geometry.capacity, 2048, "whole sectors");
    assert_eq!(disk.geometry.block_size, 512);
    assert_eq!(disk.geometry.queues, 2);
    assert!(disk.geometry.seg_max > 0);
    assert_eq!(disk.serial().unwrap(), "outboard-0123456789");
    disk.flush().unwrap();
}

#[test]
fn requests_that_cannot_be_are_answered_and_change_nothing() {
    let scratch = Scratch::new();
    let server = blk(&scratch, 1 << 20, &[]);
    let mut disk = disk(&server, Shape::default());
    let mut sector = [7; 512];
    assert_eq!(disk.request(Kind::Out, 0, &mut sector).unwrap(), Status::Ok);
    assert_eq!(disk.request(Kind::In, 2048, &mut sector).unwrap(), Status::IoError, "behind the end");
    assert_eq!(disk.request(Kind::Out, 2047, &mut [0; 1024]).unwrap(), Status::IoError, "over the end");
    assert_eq!(disk.request(Kind::Out, u64::MAX / 512, &mut sector).unwrap(), Status::IoError, "an address that wraps");
    assert_eq!(disk.request(Kind::In, 0, &mut [0; 100]).unwrap(), Status::IoError, "not a whole sector");
    assert_eq!(disk.request(Kind::Other(99), 0, &mut []).unwrap(), Status::Unsupported);
    let mut read = [0; 512];
    assert_eq!(disk.request(Kind::In, 0, &mut read).unwrap(), Status::Ok);
    assert_eq!(read, [7; 512]);
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let scratch = Scratch::new();
    let server = blk(&scratch, 4 << 20, &[]);
    let mut disk = disk(&server, Shape::default());
    let mut full = vec![0xaa; 64 * 1024];
    for kind in [Kind::WriteZeroes, Kind::Discard] {
        disk.write(0, &mut full).unwrap();
        let mut ranges = [range(8, 8, 0), range(32, 16, 0)].concat();
        assert_eq!(disk.request(kind, 0, &mut ranges).unwrap(), Status::Ok);
        let mut read = vec![0; 64 * 1024];
        disk.read(0, &mut read).unwrap();
        for (sector, bytes) in read.chunks(512).enumerate() {
            let zero = (8..16).contains(&sector) || (32..48).contains(&sector);
            assert!(bytes.iter().all(|byte| *byte == if zero { 0 } else { 0xaa }), "{kind:?}: sector {sector}");
        }
    }
    assert_eq!(disk.request(Kind::WriteZeroes, 0, &mut range(0, 8, 1)).unwrap(), Status::Ok, "zeroes may give space back");
    assert_eq!(disk.request(Kind::Discard, 0, &mut range(0, 8, 1)).unwrap(), Status::Unsupported, "a discard has no such flag");
    assert_eq!(disk.request(Kind::WriteZeroes, 0, &mut range(0, 8, 2)).unwrap(), Status::Unsupported);
    assert_eq!(disk.request(Kind::Discard, 0, &mut range(8191, 2, 0)).unwrap(), Status::IoError);
    assert_eq!(disk.request(Kind::Discard, 0, &mut [0; 15]).unwrap(), Status::IoError, "half a range");
    let mut many = range(0, 1, 0).repeat(17);
    assert_eq!(disk.request(Kind::Discard, 0, &mut many).unwrap(), Status::IoError, "more ranges than announced");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let scratch = Scratch::new();
    let server = blk(&scratch, 1 << 20, &["--read-only"]);
    let mut disk = disk(&server, Shape::default());
    assert_ne!(disk.device.features() & (1 << 5), 0, "the driver is told");
    assert_eq!(disk.request(Kind::Out, 0, &mut [1; 512]).unwrap(), Status::IoError);
    assert_eq!(disk.request(Kind::WriteZeroes, 0, &mut range(0, 8, 0)).unwrap(), Status::IoError);
    assert_eq!(disk.request(Kind::In, 0, &mut [0; 512]).unwrap(), Status::Ok);
    disk.flush().unwrap();
}

#[test]
fn a_raw_disk_may_hold_any_bytes() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 1 << 20);
    let args = ["--blk-file", image.to_str().unwrap(), "--format", "raw"];
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    let server = Server::start("outboard-blk", &scratch, &args);
    disk(&server, Shape::default()).write(0, &mut header).unwrap();
    assert_eq!(server.terminate(), Some(0));
    let server = Server::start("outboard-blk", &scratch, &args);
    let mut again = disk(&server, Shape::default());
    assert_eq!(again.geometry.capacity, 2048, "it is still a raw disk");
    let mut read = [0; 512];
    again.read(0, &mut read).unwrap();
    assert_eq!(read, header);
}
