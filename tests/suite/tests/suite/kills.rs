//! Kills under verified load, through the program that users have for it.

use std::process::Command;

use suite::{Ended, Scratch, program, run};

fn storm(words: &[&str], command: &[&str]) -> Ended {
    run(Command::new(program("outboard-probe")).arg("storm").args(words).arg("--").args(command))
}

#[test]
fn a_thousand_kills_lose_nothing_of_a_disk() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 16 << 20);
    let blk = program("outboard-blk");
    let server = [blk.to_str().unwrap(), "--blk-file", image.to_str().unwrap(), "--format", "raw", "--num-queues", "2"];
    let ended = storm(&["blk", "--in-machine", "--kills", "1000", "--queues", "2"], &server);
    println!("{}", ended.out);
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
    assert!(ended.out.starts_with("1000 kills"), "{}", ended.out);
    assert!(ended.out.contains(" 0 lost, 0 duplicated, 0 corrupted, 0 failed"), "{}", ended.out);
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
