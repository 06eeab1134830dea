//! `outboard-probe attack`: every hostile frontend and guest that is scripted, against each of our device processes.

use std::process::Command;

use serde_json::Value;
use suite::{Ended, Scratch, Server, program, run, status};

fn attack(words: &[&str]) -> Ended {
    run(Command::new(program("outboard-probe")).arg("attack").args(words))
}

/// All attacks, on one process that outlives them.
fn survives_all(name: &str, device: &str, args: &[&str]) {
    let scratch = Scratch::new();
    let server = Server::start(name, &scratch, &[&["--log-level", "error"], args].concat());
    let worker = server.worker();
    let ended = attack(&["--json", "--device", device, server.socket.to_str().unwrap()]);
    let report: Value = serde_json::from_str(&ended.out).unwrap_or_else(|_| panic!("{}{}", ended.out, ended.err));
    let cases = report["cases"].as_array().unwrap();
    let bad: Vec<_> = cases.iter().filter(|case| case["survived"] == false).collect();
    assert!(bad.is_empty() && ended.code == Some(0), "{bad:#?}");
    assert!(cases.len() > 200, "all of them: {}", cases.len());
    let met = cases.iter().filter(|case| case["outcome"] != "not offered").count();
    assert!(met > 185, "and nearly all find something to attack: {met}");
    assert_eq!((server.worker(), status(worker, "Seccomp").as_str()), (worker, "2"), "by one confined process");
}

#[test]
fn the_entropy_source_survives_every_attack() {
    survives_all("outboard-rng", "rng", &[]);
}

#[test]
fn the_disk_survives_every_attack() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 8 << 20);
    survives_all("outboard-blk", "blk", &["--blk-file", image.to_str().unwrap(), "--format", "raw"]);
}

#[test]
fn the_console_survives_every_attack() {
    let scratch = Scratch::new();
    let file = scratch.path("console.log");
    survives_all("outboard-console", "console", &["--file", file.to_str().unwrap()]);
}

/// Memory that can be taken away takes a process with it that was told to trust its owner: the judge has to see that.
#[test]
fn a_backend_that_dies_is_told_from_one_that_does_not() {
    let rng = program("outboard-rng");
    let words = |case: &'static str| {
        ["--device", "rng", "--case", case, "--", rng.to_str().unwrap(), "--allow-unsealed-memory", "--socket-path", "{socket}"]
    };
    let ended = attack(&words("memory/cut-ring"));
    assert_eq!(ended.code, Some(1), "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("died"), "{}", ended.out);
    assert!(ended.out.contains("signal 7"), "as what it is, and not as a system call that is not allowed: {}", ended.out);
    let ended = attack(&words("memory/unsealed"));
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
}

#[test]
fn attacks_are_listed_and_chosen_by_name() {
    let list = attack(&["--list", "--case", "chains/"]);
    assert!(list.code == Some(0) && list.out.lines().all(|line| line.starts_with("chains/")), "{}", list.out);
    let none = attack(&["--list", "--case", "no-such-thing"]);
    assert_eq!(none.code, Some(1));
    assert!(none.err.contains("no-such-thing"), "{}", none.err);
    assert_eq!(attack(&[]).code, Some(2), "nobody to attack");
}
