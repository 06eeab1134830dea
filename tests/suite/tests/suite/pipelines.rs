//! Other people's clients on our disks, without a guest: nbdkit and its blkio plugin below real file systems of this host, and QEMU's tools
//! with their own driver, which compare every answer with a file's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use probe::random::Random;
use suite::disktools::{BlockDevice, can_make_block_devices, done, nbdkit, qemu_finds_no_error, tool};
use suite::{Scratch, Server, program, run};

const FORMATS: [&str; 2] = ["raw", "qcow2"];

fn image(scratch: &Scratch, format: &str, size: &str) -> PathBuf {
    let path = scratch.path(&format!("disk.{format}"));
    let made = run(Command::new(program("outboard")).args(["image", "create", "--format", format, "--size", size]).arg(&path));
    assert_eq!(made.code, Some(0), "{}", made.err);
    path
}

/// Serves an image to clients whose memory is not sealed, as libblkio's is not.
fn serve(scratch: &Scratch, image: &Path, format: &str) -> Server {
    let words = ["--allow-unsealed-memory", "--format", format, "--blk-file", image.to_str().unwrap()];
    Server::start("outboard-blk", scratch, &words)
}

fn command(name: &str, args: &[&str]) {
    let ended = run(Command::new(name).args(args));
    assert_eq!(ended.code, Some(0), "{name} {args:?}: {}{}", ended.out, ended.err);
}

fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..bytes / 8).flat_map(|_| random.number().to_le_bytes()).collect()
}

/// Does something where a device is mounted: in a mount namespace of its own, as a server that another test starts at this moment would keep
/// a mount that it sees.
fn mounted(device: &str, folder: &Path, script: &str) {
    fs::create_dir_all(folder).unwrap();
    let text = format!("mount -o discard {device} {0}; cd {0}; {script}; cd /; umount {0}", folder.display());
    command("unshare", &["--mount", "sh", "-ec", &text]);
}

/// Makes a file system on a disk of ours, uses it, and looks at what is left: on the device, and in the image itself.
fn a_file_system(format: &str, make: &[&str], check: &[&str]) {
    let (scratch, ours) = (Scratch::new(), Scratch::new());
    let image = image(&ours, format, "320M");
    let server = serve(&ours, &image, format);
    let socket = scratch.path("nbd.sock");
    let path = format!("path={}", server.socket.display());
    let nbdkit = nbdkit(&socket, "blkio", &[], &["virtio-blk-vhost-user", &path]);
    let device = BlockDevice::new(&socket, scratch.path("nbd"));
    let with = |words: &[&str], target: &str| done(words[0], &[&words[1..], &[target]].concat());
    with(make, &device.path);
    let (kept, gone, folder) = (scratch.path("kept"), scratch.path("gone"), scratch.path("mounted"));
    fs::write(&kept, content(1, 6 << 20)).unwrap();
    fs::write(&gone, content(2, 4 << 20)).unwrap();
    let (kept, gone) = (kept.display(), gone.display());
    mounted(&device.path, &folder, &format!("cp {kept} {gone} .; sync -f .; sync kept; rm gone; sync -f ."));
    with(check, &device.path);
    mounted(&device.path, &folder, &format!("cmp kept {kept}; test ! -e gone; fstrim -v ."));
    with(check, &device.path);
    drop(device);
    drop(nbdkit);
    assert_eq!(server.terminate(), Some(0));
    // What is in the image, with none of us in between.
    let raw = ours.path("view.raw");
    if format == "qcow2" {
        qemu_finds_no_error(image.to_str().unwrap());
        done("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
    } else {
        fs::rename(&image, &raw).unwrap();
    }
    with(check, raw.to_str().unwrap());
}

#[test]
fn ext4_lives_on_our_disks() {
    if can_make_block_devices("ext4 on our disks") {
        FORMATS.iter().for_each(|format| a_file_system(format, &["mkfs.ext4", "-q"], &["e2fsck", "-fn"]));
    }
}

#[test]
fn xfs_lives_on_our_disks() {
    if can_make_block_devices("xfs on our disks") {
        FORMATS.iter().for_each(|format| a_file_system(format, &["mkfs.xfs", "-q"], &["xfs_repair", "-n"]));
    }
}

/// Commands for qemu-io, anywhere on a disk of 16 MiB. `zeroes`: also without data.
fn operations(seed: u64, count: u64, zeroes: bool) -> Vec<String> {
    let mut random = Random::new(seed);
    let one = |random: &mut Random| {
        let (at, len) = (random.below(32000) * 512, (1 + random.below(255)) * 512);
        match random.below(8) {
            0 if zeroes => format!("write -q -z {at} {len}"),
            1 if zeroes => format!("write -q -z -u {at} {len}"),
            0..=3 => format!("write -q -P {} {at} {len}", 1 + random.below(255)),
            4 => "flush".to_owned(),
            _ => format!("read -q {at} {len}"),
        }
    };
    (0..count).map(|_| one(&mut random)).collect()
}

fn qemu_io(options: &str, operations: &[String]) {
    let mut command = tool("qemu-io");
    command.args(["--image-opts", options]);
    operations.iter().for_each(|operation| {
        command.args(["-c", operation]);
    });
    let ended = run(&mut command);
    assert!(ended.code == Some(0) && !ended.out.contains("fail"), "{options}: {}{}", ended.out, ended.err);
}

/// QEMU sends everything to our disk and to a file, and stops at the first answer that differs.
#[test]
fn qemu_finds_no_difference_between_our_disks_and_a_file() {
    for format in FORMATS {
        let scratch = Scratch::new();
        let (image, reference) = (image(&scratch, format, "16M"), scratch.image("reference.img", 16 << 20));
        let server = serve(&scratch, &image, format);
        let (path, reference) = (server.socket.to_str().unwrap(), reference.to_str().unwrap());
        let options = format!(
            "driver=blkverify,test.driver=virtio-blk-vhost-user,test.path={path},test.cache.direct=on,raw.driver=file,raw.filename={reference}"
        );
        (0..4).for_each(|round| qemu_io(&options, &operations(round, 150, false)));
        let ours = format!("driver=virtio-blk-vhost-user,path={path},cache.direct=on");
        let file = format!("driver=raw,file.driver=file,file.filename={reference}");
        // blkverify knows no zeroes without data: they go to one after the other.
        for round in 4..8 {
            let operations = operations(round, 150, true);
            qemu_io(&ours, &operations);
            qemu_io(&file, &operations);
            done("qemu-img", &["compare", "--image-opts", &ours, &file]);
        }
        assert_eq!(server.terminate(), Some(0));
        done("qemu-img", &["compare", "-f", format, "-F", "raw", image.to_str().unwrap(), reference]);
    }
}

/// The comparison above can fail.
#[test]
fn qemu_finds_a_difference_where_there_is_one() {
    let scratch = Scratch::new();
    let (image, reference) = (image(&scratch, "raw", "16M"), scratch.image("reference.img", 16 << 20));
    fs::write(&reference, content(3, 16 << 20)).unwrap();
    let server = serve(&scratch, &image, "raw");
    let options = format!(
        "driver=blkverify,test.driver=virtio-blk-vhost-user,test.path={},test.cache.direct=on,raw.driver=file,raw.filename={}",
        server.socket.display(),
        reference.display()
    );
    let ended = run(tool("qemu-io").args(["--image-opts", &options, "-c", "read 0 4096"]));
    assert!(ended.code != Some(0) && ended.err.contains("contents mismatch"), "{:?} {}{}", ended.code, ended.out, ended.err);
}

/// What `qemu-img` copies onto our disk is there, and what it reads from it is what is there.
#[test]
fn qemu_img_copies_to_and_from_our_disks() {
    for format in FORMATS {
        let scratch = Scratch::new();
        let image = image(&scratch, format, "8M");
        let (source, copy) = (scratch.path("source.img"), scratch.path("copy.img"));
        fs::write(&source, [content(4, 3 << 20), vec![0; 5 << 20]].concat()).unwrap();
        let server = serve(&scratch, &image, format);
        let ours = format!("driver=virtio-blk-vhost-user,path={},cache.direct=on", server.socket.display());
        let (source, copy) = (source.to_str().unwrap(), copy.to_str().unwrap());
        let from = format!("driver=raw,file.driver=file,file.filename={source}");
        done("qemu-img", &["convert", "-n", "--image-opts", "--target-image-opts", &from, &ours]);
        done("qemu-img", &["convert", "-O", "raw", "--image-opts", &ours, copy]);
        assert!(fs::read(source).unwrap() == fs::read(copy).unwrap(), "{format}");
    }
}

#[test]
fn an_overlay_of_a_block_device_is_as_large_as_that() {
    if !can_make_block_devices("an overlay of a block device") {
        return;
    }
    let scratch = Scratch::new();
    let base = scratch.image("base", 8 << 20);
    let device = BlockDevice::of(&base);
    let overlay = scratch.path("overlay.qcow2");
    let words = ["image", "create", "--format", "qcow2", "--backing", &device.path, "--backing-format", "raw"];
    let made = run(Command::new(program("outboard")).args(words).arg(&overlay));
    assert_eq!(made.code, Some(0), "{}", made.err);
    let said = run(Command::new(program("outboard")).args(["image", "info", "--json", "--format", "qcow2"]).arg(&overlay));
    let info: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(info["size"], 8 << 20, "{info}");
}
