//! A running device process, looked at from outside: confined, alone, and holding only what it needs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use suite::{Scratch, Server, status};

/// What each program is started with, and the descriptors it may hold: what they are, and how many.
fn servers(scratch: &Scratch) -> Vec<(Server, Vec<&'static str>)> {
    let image = scratch.image("disk.img", 1 << 20);
    let file = scratch.path("console.log");
    let plain = vec![
        "/dev/null",
        "pipe:",
        "socket:",
        "anon_inode:[signalfd]",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "memfd:inflight",
    ];
    let with = |more: &'static str| [plain.clone(), vec![more]].concat();
    vec![
        (Server::start("outboard-rng", scratch, &[]), plain.clone()),
        (
            Server::start("outboard-blk", scratch, &["--blk-file", image.to_str().unwrap(), "--format", "raw"]),
            [with("disk.img"), vec!["anon_inode:[io_uring]"]].concat(),
        ),
        (Server::start("outboard-console", scratch, &["--file", file.to_str().unwrap()]), with("console.log")),
    ]
}

fn namespaces(pid: &str) -> Vec<(String, String)> {
    ["user", "mnt", "uts", "ipc", "pid", "net"]
        .into_iter()
        .map(|name| (name.to_owned(), fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap().display().to_string()))
        .collect()
}

/// A process that refuses to be traced shows its namespaces, mounts and descriptors to root alone. The guest suite looks at them
/// as root in any case.
fn can_look() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("Namespaces, mounts and descriptors are looked at by root only.");
    }
    root
}

#[test]
fn every_process_is_confined() {
    let scratch = Scratch::new();
    for (server, _) in servers(&scratch) {
        let pid = server.worker();
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set}");
        }
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let text = fs::read_to_string(task.path().join("status")).unwrap();
            let seccomp = text.lines().find(|line| line.starts_with("Seccomp:")).unwrap();
            assert!(seccomp.ends_with('2'), "each thread has its filter: {seccomp}");
        }
        assert_eq!(status(pid, "NSpid").split_whitespace().last(), Some("1"), "it is alone in its PID namespace");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core")).unwrap();
        assert!(core.contains(" 0 "), "{core}");
        if !can_look() {
            continue;
        }
        let (own, ours) = (namespaces(&pid.to_string()), namespaces("self"));
        for (inside, outside) in own.iter().zip(&ours) {
            assert_ne!(inside, outside);
        }
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "one empty file system: {mounts}");
        assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
        let root = fs::read_dir(format!("/proc/{pid}/root/"));
        assert!(root.is_err() || root.unwrap().count() == 0, "nothing is in it");
    }
}

#[test]
fn every_process_holds_only_what_it_needs() {
    let scratch = Scratch::new();
    for (server, allowed) in servers(&scratch) {
        let pid = server.worker();
        if !can_look() {
            continue;
        }
        let mut seen = BTreeSet::new();
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap().display().to_string();
            let number: u32 = fd.file_name().to_str().unwrap().parse().unwrap();
            let known = allowed.iter().any(|part| target.contains(part));
            assert!(number < 3 || known, "{}: descriptor {number} is {target}", server.socket.display());
            seen.insert(target);
        }
        assert!(seen.iter().any(|target| target.contains("memfd:inflight")));
    }
}

#[test]
fn the_waiting_parent_is_confined_as_well() {
    let scratch = Scratch::new();
    for (server, _) in servers(&scratch) {
        let pid = server.id();
        let _ready = server.worker();
        suite::wait_for("its filter", || (status(pid, "Seccomp") == "2").then_some(()));
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(status(pid, "CapEff"), "0000000000000000");
    }
}

#[test]
fn a_killed_parent_takes_its_child_along() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let worker = server.worker();
    drop(server);
    suite::wait_for("the worker's end", || (!Path::new(&format!("/proc/{worker}")).exists()).then_some(()));
}
