//! What a disk costs where it is large, and when nobody asks for anything.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use probe::blk::{Disk, Kind, SECTOR, Status};
use probe::device::Shape;
use suite::{Scratch, Server, program, run, status};

/// Kilobytes of its own that a process may have with a qcow2 image of a tebibyte: the tables it may keep, twice a queue's stack, and what
/// every process of ours has. The program's own pages, which come on top, are three more megabytes in a release build.
const PRIVATE: u64 = 3584;

fn private(pid: u32) -> u64 {
    status(pid, "RssAnon").trim_end_matches(" kB").trim().parse().unwrap()
}

/// How often each thread has gone to sleep of its own accord.
fn sleeps(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let one = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("status")).unwrap();
        text.lines().find(|line| line.starts_with("voluntary")).unwrap().to_owned()
    };
    let mut all: Vec<String> = tasks.map(one).collect();
    all.sort();
    all
}

#[test]
fn a_tebibyte_of_qcow2_fits_into_little_memory_and_an_idle_disk_never_wakes() {
    let scratch = Scratch::new();
    let image = scratch.path("large.qcow2");
    let made = run(Command::new(program("outboard")).args(["image", "create", "--format", "qcow2", "--size", "1T"]).arg(&image));
    assert_eq!(made.code, Some(0), "{}", made.err);
    let server = Server::start("outboard-blk", &scratch, &["--format", "qcow2", "--blk-file", image.to_str().unwrap()]);
    let pid = server.worker();
    let mut disk = Disk::open(UnixStream::connect(&server.socket).unwrap(), Shape::default(), 1, 4096, 1).unwrap();
    // One write into each of as many tables as the cache holds four times over, all over the disk.
    let step = disk.geometry.capacity / 2048;
    for number in 0..2048 {
        assert_eq!(disk.request(Kind::Out, number * step / 8 * 8, &mut [7; 4096]).unwrap(), Status::Ok);
    }
    assert!(step * SECTOR >= 512 << 20, "each of them is in a table of its own");
    let resident = private(pid);
    println!("{resident} KiB of its own");
    assert!(resident <= PRIVATE, "{resident} KiB");

    assert_eq!(disk.request(Kind::Flush, 0, &mut []).unwrap(), Status::Ok);
    sleep(Duration::from_millis(200));
    let before = sleeps(pid);
    sleep(Duration::from_secs(2));
    assert_eq!(sleeps(pid), before, "nobody asked for anything");
}
