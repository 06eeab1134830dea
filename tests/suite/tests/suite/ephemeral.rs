//! Disks whose image comes as a descriptor, and disks that forget what was written.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use probe::blk::{Disk, Kind, Status};
use probe::device::Shape;
use suite::{Scratch, Server, program, wait_for};

use super::device::disk;

fn read(disk: &mut Disk, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    assert_eq!(disk.request(Kind::In, sector, &mut bytes).unwrap(), Status::Ok);
    bytes
}

fn write(disk: &mut Disk, sector: u64, byte: u8) {
    assert_eq!(disk.request(Kind::Out, sector, &mut [byte; 512]).unwrap(), Status::Ok);
}

#[test]
fn an_ephemeral_disk_begins_as_its_image_is_and_leaves_it_so() {
    let scratch = Scratch::new();
    let image = scratch.path("base.img");
    fs::write(&image, vec![5; 1 << 20]).unwrap();
    let name = image.to_str().unwrap().to_owned();
    let dir = format!("--ephemeral={}", scratch.path("").display());
    for more in [&[dir.as_str()][..], &[dir.as_str(), "--direct"], &["--ephemeral"]] {
        let server = Server::start("outboard-blk", &scratch, &[&["--blk-file", &name, "--format", "raw"], more].concat());
        {
            let mut disk = disk(&server, Shape::default());
            assert_eq!((disk.geometry.capacity, read(&mut disk, 7)), (2048, [5; 512]), "{more:?}");
            write(&mut disk, 7, 9);
            assert_eq!(read(&mut disk, 7), [9; 512]);
        }
        assert_eq!(read(&mut disk(&server, Shape::default()), 7), [9; 512], "another frontend of the same process");
        assert_eq!(server.terminate(), Some(0));
    }
    assert!(fs::read(&image).unwrap().iter().all(|byte| *byte == 5));
    assert_eq!(fs::read_dir(scratch.path("")).unwrap().count(), 1, "nothing is left but the image");
}

/// A disk process that gets its image under a number, from a shell.
fn with_descriptor(scratch: &Scratch, image: &Path, flags: &str) -> (Child, UnixStream) {
    let socket = scratch.path(&format!("{}.sock", image.file_stem().unwrap().display()));
    let _gone = fs::remove_file(&socket);
    let script = format!("exec \"$1\" --socket-path \"$2\" {flags} 8<>\"$3\" 9<>\"$3\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh"]).arg(program("outboard-blk")).arg(&socket).arg(image).stdin(Stdio::null());
    let child = command.spawn().unwrap();
    (child, wait_for("the disk", || UnixStream::connect(&socket).ok()))
}

#[test]
fn an_image_may_come_as_a_descriptor() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base.img"), scratch.path("top.qcow2"));
    fs::write(&base, vec![5; 1 << 20]).unwrap();
    let mut make = Command::new(program("outboard"));
    make.args(["image", "create", "--format", "qcow2", "--backing-format", "raw", "--backing"]);
    let made = make.arg(&base).arg(&top).status().unwrap();
    assert!(made.success());
    let below = format!("--format qcow2 --backing-file {} --backing-format raw", base.display());
    for (round, flags) in ["--blk-fd 8", "--blk-fd 8 --direct-fd 9 --direct"].into_iter().enumerate() {
        let (mut child, stream) = with_descriptor(&scratch, &top, &format!("{flags} {below}"));
        let mut disk = Disk::open(stream, Shape::default(), 4, 4096, 1).unwrap();
        let before = [[5; 512], [9; 512]][round];
        assert_eq!(read(&mut disk, 7), before, "{flags}: what its predecessor has written is there");
        write(&mut disk, 7, 9);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 5));
}

#[test]
fn descriptors_and_flags_that_do_not_fit_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.image("a.img", 1 << 20);
    for (flags, says) in [
        ("--blk-fd 8 --direct --format raw", "--blk-fd with --direct needs --direct-fd"),
        ("--blk-fd 8 --direct-fd 9 --format raw", "--direct"),
        ("--blk-fd 8 --ephemeral --format qcow2", "cannot be used with"),
        ("--blk-fd 5 --format raw", "Descriptor 5 is not open"),
        ("--blk-file \"$3\" --ephemeral --read-only --format raw", "cannot be used with"),
        ("--blk-file \"$3\" --ephemeral=/nowhere --format raw", "Cannot make an overlay in /nowhere"),
    ] {
        let script = format!("exec \"$1\" --socket-path \"$2\" {flags} 8<>\"$3\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).arg(program("outboard-blk")).arg(scratch.path("s")).arg(&image);
        let outcome = command.stdin(Stdio::null()).output().unwrap();
        let err = String::from_utf8_lossy(&outcome.stderr).into_owned();
        assert!(!outcome.status.success() && err.contains(says), "{flags}: {err}");
    }
}

#[test]
fn disks_of_a_group_are_limited_together() {
    let scratch = Scratch::new();
    let page = scratch.image("page", 4096);
    let mut members = Vec::new();
    for (name, ops) in [("one", "40:20"), ("other", "1000000")] {
        let image = scratch.image(name, 1 << 20);
        // The limits of the first count; those of the other would be none.
        let flags = format!("--limit-fd 7 --limit-ops {ops} --blk-fd 8 --format raw 7<>\"{}\"", page.display());
        let (child, stream) = with_descriptor(&scratch, &image, &flags);
        members.push((child, Disk::open(stream, Shape::default(), 4, 4096, 1).unwrap()));
    }
    let began = Instant::now();
    for (_, disk) in &mut members {
        for sector in 0..20 {
            read(disk, sector);
        }
    }
    // Twenty at once and twenty in half a second; each for itself, all forty would be at once.
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
    for (mut child, _) in members {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
