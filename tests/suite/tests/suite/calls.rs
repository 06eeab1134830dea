//! Which system calls each thread may make, that each of them is made, and how many they are.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;

use probe::blk::{Disk, Kind, Status};
use probe::device::{Device, Shape};
use probe::ring::Buffer;
use serde_json::Value;
use suite::tracer::{Filters, Tracer, can_trace};
use suite::{Scratch, Server, program, root, run, wait_for};

/// Each program, and how many different calls it may make: all of its threads together, or each kind.
const BUDGETS: [(&str, &[(&str, usize)]); 5] = [
    ("outboard-blk", &[("", 22), ("erasing queue", 18)]),
    ("outboard-console", &[("", 25)]),
    ("outboard-rng", &[("", 22)]),
    ("outboard-virtiofsd", &[("", 60), ("control", 22), ("queue", 52), ("slow", 50)]),
    ("outboard-vmm", &[("control", 35), ("cpu", 18)]),
];

/// Threads that take the place of others in the same program, where the host has what they are for: counted apart.
const INSTEAD: [&str; 1] = ["erasing queue"];

/// Calls that no test can bring about when it likes, and when they are made.
const RARE: [(&str, &str); 4] = [
    ("futex", "only while another thread has the same lock"),
    ("clock_gettime", "only where the kernel offers no faster way: in the nested machine"),
    ("brk", "only when the heap has no room left"),
    ("exit_group", "in threads besides the first: only a panic"),
];

/// Calls of the threads that serve queues which only follow a stop that waited in vain for a minute: then they, and not the control
/// thread, have guest memory and descriptors last.
const AFTER_A_STUCK_STOP: [&str; 3] = ["munmap", "close", "fcntl"];

type Calls = BTreeMap<i64, String>;

/// What a program says of itself: for each kind of thread, its calls.
fn policy(name: &str) -> BTreeMap<String, Calls> {
    let said = run(Command::new(program(name)).arg("--print-sandbox"));
    assert_eq!(said.code, Some(0), "{}", said.err);
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let threads = value["threads"].as_array().unwrap().iter();
    let rules = |thread: &Value| {
        let rules = thread["rules"].as_array().unwrap().iter();
        rules
            .map(|rule| {
                assert!(!rule["why"].as_str().unwrap().is_empty(), "each rule has a reason: {rule}");
                (rule["number"].as_i64().unwrap(), rule["call"].as_str().unwrap().to_owned())
            })
            .collect()
    };
    threads.map(|thread| (thread["thread"].as_str().unwrap().to_owned(), rules(thread))).collect()
}

/// What the documents show: for each program and thread, how many calls there are, and which.
fn table() -> String {
    let mut text = "| program | thread | calls | which |\n|---|---|---|---|\n".to_owned();
    for (name, _) in BUDGETS {
        let policy = policy(name);
        let usual = policy.iter().filter(|(thread, _)| !INSTEAD.contains(&thread.as_str()));
        let union: Calls = usual.flat_map(|(_, calls)| calls.clone()).collect();
        writeln!(text, "| `{name}` | all | {} | |", union.len()).unwrap();
        for (thread, calls) in policy {
            let mut names: Vec<String> = calls.into_values().collect();
            names.sort();
            writeln!(text, "| | {thread} | {} | {} |", names.len(), names.join(" ")).unwrap();
        }
    }
    text
}

#[test]
fn the_filters_are_within_their_budgets() {
    for (name, budgets) in BUDGETS {
        let policy = policy(name);
        for (thread, budget) in budgets {
            let is_counted = |name: &str| if thread.is_empty() { !INSTEAD.contains(&name) } else { name == *thread };
            let counted = policy.iter().filter(|(name, _)| is_counted(name));
            let union: BTreeSet<i64> = counted.flat_map(|(_, calls)| calls.keys().copied()).collect();
            assert!(union.len() <= *budget && !union.is_empty(), "{name} {thread}: {} of {budget}", union.len());
        }
    }
}

#[test]
fn the_calls_in_the_documents_are_these() {
    let page = fs::read_to_string(root().join("docs/sandbox.md")).unwrap();
    assert!(page.contains(&table()), "docs/sandbox.md should contain:\n{}", table());
}

/// Traces a server while `work` is done with it, until it has ended, and adds the calls of its first thread and of the others.
fn traced(server: Server, made: &mut [BTreeSet<i64>; 2], work: impl FnOnce(&Path)) {
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
    work(&server.socket);
    assert_eq!(server.terminate(), Some(0));
    for (all, new) in made.iter_mut().zip(tracer.join().unwrap()) {
        all.extend(new);
    }
}

/// Everything that is allowed was made, but for what is rare, and what `elsewhere` says is made by another test.
fn all_made(name: &str, thread: &str, made: &[BTreeSet<i64>; 2], elsewhere: &[&str]) {
    let policy = policy(name);
    for (kind, made) in [("control", &made[0]), (thread, &made[1])] {
        let stuck = |call: &str| kind != "control" && AFTER_A_STUCK_STOP.contains(&call);
        let excused = |call: &str| RARE.iter().any(|(rare, _)| *rare == call) || stuck(call) || elsewhere.contains(&call);
        let idle: Vec<&String> = policy[kind].iter().filter(|(number, _)| !made.contains(number)).map(|(_, name)| name).collect();
        let idle: Vec<_> = idle.into_iter().filter(|call| !excused(call)).collect();
        assert!(idle.is_empty(), "{name} {kind}: allowed and never made: {idle:?}");
    }
}

fn probe(words: &[&str], socket: &Path) {
    let ended = run(Command::new(program("outboard-probe")).args(words).arg(socket));
    assert_eq!(ended.code, Some(0), "{words:?}: {}{}", ended.out, ended.err);
}

#[test]
fn a_disk_makes_every_call_it_may_make() {
    if !can_trace() {
        return;
    }
    for (engine, thread) in [("io-uring", "queue"), ("threads", "disk")] {
        let mut made = Default::default();
        for (format, direct, owned) in
            [("raw", None, false), ("raw", Some("--direct"), false), ("qcow2", None, false), ("qcow2", None, true)]
        {
            a_disk([format, engine], direct, owned, &mut made);
        }
        // The control thread reads when it closes an image whose reference counts have left the cache by then, and a queue asks for
        // the length of an image that could not grow.
        all_made("outboard-blk", thread, &made, &["preadv2", "fstat"]);
        // The thread that reads the image does so before anybody can look at it; only a block device has a length to be sought.
        all_made("outboard-blk", "image", &made, &["preadv2", "lseek"]);
    }
}

/// Tells a disk something, perhaps with an overlay, and gives its answer.
fn tell(control: &Path, line: &str, overlay: Option<&fs::File>) -> String {
    let mut stream = probe::owner::say(control, line, overlay.map(AsFd::as_fd)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// An overlay, a new size.
fn owner(scratch: &Scratch, control: &Path) {
    let overlay = scratch.path("overlay.qcow2");
    let words = ["image", "create", "--format", "qcow2", "--backing", "disk.img", "--backing-format", "qcow2"];
    assert_eq!(run(Command::new(program("outboard")).args(words).arg(&overlay)).code, Some(0));
    let file = fs::File::options().read(true).write(true).open(&overlay).unwrap();
    for (line, overlay) in
        [(r#"{"command":"snapshot"}"#, Some(&file)), (r#"{"command":"resize","bytes":8388608}"#, None), ("nonsense", None)]
    {
        let answer = tell(control, line, overlay);
        assert_eq!(answer.contains(r#""ok":true"#), line != "nonsense", "{line}: {answer}");
    }
}

/// A disk in use, with all that makes a difference to its calls.
fn a_disk([format, engine]: [&str; 2], direct: Option<&str>, owned: bool, made: &mut [BTreeSet<i64>; 2]) {
    let scratch = Scratch::new();
    let image = scratch.path("disk.img");
    let made_it =
        run(Command::new(program("outboard")).args(["image", "create", "--size", "4M", "--format", format]).arg(&image));
    assert_eq!(made_it.code, Some(0), "{}", made_it.err);
    let mut words = vec!["--format", format, "--engine", engine, "--blk-file", image.to_str().unwrap()];
    words.extend(direct);
    let control = scratch.path("control");
    words.extend(["--control-path", control.to_str().unwrap()]);
    let server = Server::start("outboard-blk", &scratch, &words);
    traced(server, made, |socket| {
        probe(&["info"], socket);
        probe(&["blk", "verify"], socket);
        let mut disk = Disk::open(UnixStream::connect(socket).unwrap(), Shape::default(), 1, 4096, 1).unwrap();
        let mut range = [0; 16];
        range[8] = 8;
        for kind in [Kind::Discard, Kind::WriteZeroes] {
            assert_eq!(disk.request(kind, 0, &mut range).unwrap(), Status::Ok);
        }
        assert_eq!(disk.request(Kind::Flush, 0, &mut []).unwrap(), Status::Ok);
        if owned {
            owner(&scratch, &control);
        }
    });
}

#[test]
fn an_entropy_source_makes_every_call_it_may_make() {
    if !can_trace() {
        return;
    }
    let scratch = Scratch::new();
    let mut made = Default::default();
    traced(Server::start("outboard-rng", &scratch, &[]), &mut made, |socket| {
        probe(&["info"], socket);
        probe(&["rng", "--bytes", "4096"], socket);
    });
    all_made("outboard-rng", "queue", &made, &[]);
}

#[test]
fn a_console_makes_every_call_it_may_make() {
    if !can_trace() {
        return;
    }
    let scratch = Scratch::new();
    let mut made = Default::default();
    let say = |socket: &Path| {
        let shape = Shape { queues: 2, ..Shape::default() };
        let mut device = Device::connect(UnixStream::connect(socket).unwrap(), shape, 0).unwrap();
        let at = device.memory_mut().take(64, 1, 0).unwrap();
        device.start().unwrap();
        device.submit(1, &[Buffer { addr: at, len: 64, write: false }]).unwrap();
        device.kick(1);
        wait_for("the bytes to be taken", || device.completion(1).unwrap());
    };
    let port = scratch.path("port.sock");
    let server = Server::start("outboard-console", &scratch, &["--socket", port.to_str().unwrap()]);
    traced(server, &mut made, |socket| {
        let _client = UnixStream::connect(&port).unwrap();
        say(socket);
        probe(&["info"], socket);
    });
    let server = Server::start("outboard-console", &scratch, &["--file", scratch.path("log").to_str().unwrap()]);
    traced(server, &mut made, say);
    // A terminal's: `suite::console` has terminals, and sizes that change.
    all_made("outboard-console", "port", &made, &["ioctl", "sendmsg"]);
}
