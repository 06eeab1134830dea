//! Kills under verified load, through the program that users have for it.

use std::fs;
use std::process::Command;

use suite::disktools::qemu_finds_no_error;
use suite::{Ended, Scratch, program, run};

fn storm(words: &[&str], command: &[&str]) -> Ended {
    run(Command::new(program("outboard-probe")).arg("storm").args(words).arg("--").args(command))
}

/// Kills a disk with two queues, started with these words, so often, and gives what the storm said.
fn a_disk(kills: &str, words: &[&str], server: &[&str]) -> String {
    let blk = program("outboard-blk");
    let words = [&["blk", "--in-machine", "--queues", "2", "--kills", kills], words].concat();
    let ended = storm(&words, &[&[blk.to_str().unwrap(), "--num-queues", "2"], server].concat());
    println!("{server:?}: {}", ended.out);
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
    assert!(ended.out.starts_with(&format!("{kills} kills")), "{}", ended.out);
    assert!(ended.out.contains(" 0 lost, 0 duplicated, 0 corrupted, 0 failed"), "{}", ended.out);
    ended.out
}

fn create(args: &[&str]) {
    let made = run(Command::new(program("outboard")).args(["image", "create"]).args(args));
    assert_eq!(made.code, Some(0), "{}", made.err);
}

#[test]
fn a_thousand_kills_lose_nothing_of_a_disk() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 16 << 20);
    a_disk("1000", &[], &["--blk-file", image.to_str().unwrap(), "--format", "raw"]);
}

/// What is in flight when the process dies may still reach the disk afterwards: with either engine, past the page cache and not.
#[test]
fn kills_lose_nothing_of_a_disk_past_the_page_cache() {
    for (engine, more) in [("io-uring", Some("--direct")), ("threads", Some("--direct")), ("threads", None)] {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", 16 << 20);
        let words = ["--blk-file", image.to_str().unwrap(), "--format", "raw", "--engine", engine];
        a_disk("200", &[], &[&words[..], more.as_slice()].concat());
    }
}

/// An image that begins empty, so that clusters are given out, given back and given out again while it is killed.
#[test]
fn kills_lose_nothing_of_an_image_that_grows() {
    for (clusters, more) in [("64K", None), ("4K", None), ("64K", Some("--direct"))] {
        let scratch = Scratch::new();
        let image = scratch.path("disk.qcow2");
        let image = image.to_str().unwrap();
        create(&["--format", "qcow2", "--size", "8M", "--cluster-size", clusters, image]);
        a_disk("200", &[], &[&["--blk-file", image, "--format", "qcow2"], more.as_slice()].concat());
        qemu_finds_no_error(image);
    }
}

/// What is not written comes from below, also the rest of a cluster of which a part is written. What is below stays as it is.
#[test]
fn kills_lose_nothing_of_an_overlay() {
    for clusters in ["64K", "4K"] {
        let scratch = Scratch::new();
        let (below, image) = (scratch.path("below.img"), scratch.path("disk.qcow2"));
        let content: Vec<u8> = (0..8u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        fs::write(&below, &content).unwrap();
        let (base, image) = (below.to_str().unwrap(), image.to_str().unwrap());
        create(&["--format", "qcow2", "--backing", base, "--backing-format", "raw", "--cluster-size", clusters, image]);
        let words = ["--blk-file", image, "--format", "qcow2", "--backing-file", base, "--backing-format", "raw"];
        a_disk("200", &[], &words);
        qemu_finds_no_error(image);
        assert!(fs::read(&below).unwrap() == content, "what is below has changed");
    }
}

/// The overlay that a snapshot puts on top may have become the disk before the kill, or not: the successor gets it in any case.
#[test]
fn kills_during_snapshots_lose_nothing() {
    for more in [&[][..], &["--direct"]] {
        let scratch = Scratch::new();
        let folder = scratch.path("images");
        let said = a_disk(
            "200",
            &["--snapshots", folder.to_str().unwrap()],
            &[&["{disk}", "--control-path", "{control}"], more].concat(),
        );
        let line = said.lines().nth(1).unwrap();
        let numbers: Vec<u32> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        assert!(numbers[0] > 60 && (1..numbers[0]).contains(&numbers[1]), "some were cut off, some not: {line}");
        let images = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let overlays: Vec<_> = images.filter(|path| path.extension().is_some_and(|kind| kind == "qcow2")).collect();
        overlays.iter().for_each(|path| qemu_finds_no_error(path.to_str().unwrap()));
    }
}

#[test]
fn a_thousand_kills_lose_nothing_of_an_entropy_source() {
    let rng = program("outboard-rng");
    let ended = storm(&["rng", "--in-machine", "--kills", "1000"], &[rng.to_str().unwrap()]);
    println!("{}", ended.out);
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
    assert!(ended.out.contains(" 0 lost, 0 duplicated, 0 corrupted, 0 failed"), "{}", ended.out);
}

#[test]
fn a_thousand_kills_lose_nothing_of_a_console() {
    let scratch = Scratch::new();
    let file = scratch.path("console.log");
    let (console, file) = (program("outboard-console"), file.to_str().unwrap());
    let ended =
        storm(&["console", "--in-machine", "--file", file, "--kills", "1000"], &[console.to_str().unwrap(), "--file", file]);
    println!("{}", ended.out);
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
    assert!(ended.out.contains(" 0 lost, 0 duplicated, 0 corrupted, 0 failed"), "{}", ended.out);
}

#[test]
fn every_ring_survives_kills() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 16 << 20);
    let blk = program("outboard-blk");
    let server = [blk.to_str().unwrap(), "--blk-file", image.to_str().unwrap(), "--format", "raw"];
    for rings in [&["--indirect"][..], &["--no-event-idx"], &["--indirect", "--no-event-idx", "--queue-size", "64"]] {
        let words = [&["blk", "--kills", "40", "--json", "--seed", "5", "--depth", "16", "--gap", "5"], rings].concat();
        let ended = storm(&words, &server);
        assert_eq!(ended.code, Some(0), "{rings:?}: {}{}", ended.out, ended.err);
        assert!(ended.out.contains("\"corrupted\":0"), "{}", ended.out);
    }
}

#[test]
fn a_storm_over_a_listening_socket_works_as_well() {
    let rng = program("outboard-rng");
    let ended = storm(&["rng", "--kills", "10"], &[rng.to_str().unwrap(), "--socket-path", "{socket}"]);
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
}

/// The test that can fail: a backend that keeps no in-flight log loses or doubles requests, and the storm says so.
#[test]
fn a_backend_that_loses_requests_is_found_out() {
    let ended = storm(&["rng", "--kills", "3"], &["/bin/false"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.starts_with("outboard-probe: "), "{}", ended.err);
}
