//! Which system calls each thread may make, which it makes, and how many they are.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;

use serde_json::Value;
use suite::tracer::{Filters, Tracer, can_trace};
use suite::{Scratch, Server, program, run};

/// What a program says of itself: for each kind of thread, its calls and the reasons.
fn policy(name: &str) -> BTreeMap<String, BTreeMap<i64, String>> {
    let said = run(Command::new(program(name)).arg("--print-sandbox"));
    assert_eq!(said.code, Some(0), "{}", said.err);
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let threads = value["threads"].as_array().unwrap().iter();
    let rules = |thread: &Value| {
        let rules = thread["rules"].as_array().unwrap().iter();
        rules.map(|rule| (rule["number"].as_i64().unwrap(), rule["call"].as_str().unwrap().to_owned())).collect()
    };
    threads.map(|thread| (thread["thread"].as_str().unwrap().to_owned(), rules(thread))).collect()
}

/// Traces a server while `work` is done with it, until it has ended, and gives the calls of its first thread and of the others.
fn traced(server: Server, work: impl FnOnce(&Server)) -> [BTreeSet<i64>; 2] {
    let pid = server.worker();
    let (ready, wait) = channel();
    let tracer = thread::spawn(move || {
        let mut tracer = Tracer::seize(pid, Filters::InForce);
        ready.send(()).unwrap();
        let mut calls = [BTreeSet::new(), BTreeSet::new()];
        tracer.run(|tid, call| {
            calls[usize::from(tid.as_raw().unsigned_abs() != pid)].insert(call);
        });
        calls
    });
    wait.recv().unwrap();
    work(&server);
    assert_eq!(server.terminate(), Some(0));
    tracer.join().unwrap()
}

fn probe(words: &[&str], socket: &str) {
    let ended = run(Command::new(program("outboard-probe")).args(words).arg(socket));
    assert_eq!(ended.code, Some(0), "{words:?}: {}{}", ended.out, ended.err);
}

#[test]
fn look() {
    if !can_trace() {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 4 << 20);
    let server = Server::start("outboard-blk", &scratch, &["--format", "raw", "--blk-file", image.to_str().unwrap()]);
    let calls = traced(server, |server| {
        let socket = server.socket.to_str().unwrap();
        probe(&["info"], socket);
        probe(&["blk", "verify"], socket);
        probe(&["blk", "verify", "--block-size", "524288", "--depth", "4"], socket);
    });
    show("outboard-blk", "queue", &calls);
    let server = Server::start("outboard-rng", &scratch, &[]);
    let calls = traced(server, |server| {
        let socket = server.socket.to_str().unwrap();
        probe(&["info"], socket);
        probe(&["rng", "--bytes", "100000"], socket);
    });
    show("outboard-rng", "queue", &calls);
}

fn show(name: &str, thread: &str, calls: &[BTreeSet<i64>; 2]) {
    let policy = policy(name);
    for (thread, calls) in [("control", &calls[0]), (thread, &calls[1])] {
        let allowed = &policy[thread];
        let (mut used, mut unused) = (Vec::new(), Vec::new());
        for (number, name) in allowed {
            if calls.contains(number) { used.push(name.as_str()) } else { unused.push(name.as_str()) }
        }
        println!("{name} {thread}: used {} [{}], unused [{}]", used.len(), used.join(" "), unused.join(" "));
    }
}
