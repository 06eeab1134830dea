//! Wrong usage and wrong files: one clear sentence each, and the right exit status.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use suite::{Ended, Scratch, Server, program, run};

fn refuse(name: &str, args: &[&str]) -> Ended {
    let ended = run(Command::new("timeout").arg("20").arg(program(name)).args(args));
    assert!(!ended.err.contains("panicked"), "{}", ended.err);
    ended
}

fn fails(name: &str, args: &[&str], says: &[&str]) {
    let ended = refuse(name, args);
    assert_eq!(ended.code, Some(1), "{args:?}: {}", ended.err);
    assert_eq!(ended.err.trim_end().lines().count(), 1, "one line: {}", ended.err);
    assert!(ended.err.starts_with(&format!("{name}: ")), "{}", ended.err);
    for part in says {
        assert!(ended.err.contains(part), "{part:?} in {}", ended.err);
    }
}

#[test]
fn images_that_cannot_be_used() {
    let scratch = Scratch::new();
    let image = |name: &str, size| scratch.image(name, size).to_str().unwrap().to_owned();
    let socket = scratch.path("s").to_str().unwrap().to_owned();
    let blk = |path: &str, says: &[&str]| {
        fails("outboard-blk", &["--socket-path", &socket, "--blk-file", path, "--format", "raw"], says);
    };
    blk("/nonexistent/disk.img", &["Cannot open image /nonexistent/disk.img: No such file or directory (os error 2)"]);
    blk("/", &["Cannot open image /: It is neither a file nor a block device"]);
    blk("/dev/null", &["neither a file nor a block device"]);
    blk(&image("empty.img", 0), &["less than one sector"]);
    blk(&image("tiny.img", 511), &["less than one sector"]);
    let used = image("used.img", 1 << 20);
    let _server = Server::start("outboard-blk", &scratch, &["--blk-file", &used, "--format", "raw"]);
    blk(&used, &["Cannot use image ", "Another process has it open for writing"]);
}

#[test]
fn readers_share_an_image() {
    let scratch = Scratch::new();
    let image = scratch.image("shared.img", 1 << 20);
    let args = ["--blk-file", image.to_str().unwrap(), "--format", "raw", "--read-only"];
    let (one, two) = (Scratch::new(), Scratch::new());
    let _first = Server::start("outboard-blk", &one, &args);
    let _second = Server::start("outboard-blk", &two, &args);
}

#[test]
fn sockets_that_cannot_be_used() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    fails("outboard-rng", &["--fd", "77"], &["Descriptor 77 of --fd is not open"]);
    fails("outboard-rng", &["--socket-path", "/nonexistent/s"], &["Cannot listen on /nonexistent/s: No such file or directory"]);
    let _busy = UnixListener::bind(scratch.path("busy")).unwrap();
    fails("outboard-rng", &["--socket-path", &path("busy")], &["another process listens there"]);
    fails("outboard-console", &["--socket-path", &path("c"), "--file", "/nonexistent/log"], &["Cannot open /nonexistent/log"]);
    fails("outboard-console", &["--socket-path", &path("c"), "--socket", "/nonexistent/c"], &["Cannot listen on /nonexistent/c"]);
}

#[test]
fn a_socket_left_behind_is_replaced() {
    let scratch = Scratch::new();
    drop(UnixListener::bind(scratch.path("outboard-rng.sock")).unwrap());
    let server = Server::start("outboard-rng", &scratch, &[]);
    std::thread::sleep(Duration::from_millis(200));
    let socket = server.socket.clone();
    assert_eq!(server.terminate(), Some(0));
    assert!(!socket.exists(), "it is removed at the end");
}

#[test]
fn wrong_usage_is_status_two() {
    for args in [
        &[][..],
        &["--frobnicate"],
        &["--socket-path", "a", "--fd", "3"],
        &["--fd", "1"],
        &["--socket-path", "a", "--period", "5"],
        &["--socket-path", "a", "--max-bytes", "0"],
        &["--socket-path", "a", "--sandbox-floor", "none"],
        &["--socket-path", "a", "--log-level", "loud"],
    ] {
        assert_eq!(refuse("outboard-rng", args).code, Some(2), "{args:?}");
    }
    let blk = |more: &[&str]| refuse("outboard-blk", &[&["--socket-path", "a"][..], more].concat()).code;
    assert_eq!(blk(&["--blk-file", "x"]), Some(2), "a format is never guessed");
    assert_eq!(blk(&["--blk-file", "x", "--format", "qcow3"]), Some(2));
    assert_eq!(blk(&["--blk-file", "x", "--format", "raw", "--num-queues", "0"]), Some(2));
    assert_eq!(blk(&["--blk-file", "x", "--format", "raw", "--serial", "a serial number that is too long"]), Some(2));
}

#[test]
fn the_inner_flag_is_not_believed() {
    let scratch = Scratch::new();
    let socket = scratch.path("s").to_str().unwrap().to_owned();
    fails("outboard-rng", &["--socket-path", &socket, "--namespaced"], &["--namespaced is for processes that outboard starts"]);
}

#[test]
fn help_and_capabilities_need_nothing_else() {
    for (name, kind) in [("outboard-rng", "rng"), ("outboard-blk", "block"), ("outboard-console", "console")] {
        let help = refuse(name, &["--help"]);
        assert_eq!(help.code, Some(0));
        for word in [
            "--socket-path",
            "--fd",
            "--print-capabilities",
            "--log-level",
            "--log-format",
            "--sandbox-floor",
            "--allow-unsealed-memory",
        ] {
            assert!(help.out.contains(word), "{name} {word}");
        }
        let capabilities = refuse(name, &["--print-capabilities"]);
        assert_eq!(capabilities.code, Some(0));
        let json: serde_json::Value = serde_json::from_str(&capabilities.out).unwrap();
        assert_eq!(json["type"], kind);
        assert!(json["features"].is_array());
    }
}

#[test]
fn errors_for_machines_are_json() {
    let ended = refuse("outboard-blk", &["--socket-path", "s", "--blk-file", "/none", "--format", "raw", "--log-format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&ended.err).unwrap();
    assert_eq!(json["level"], "ERROR");
    assert!(json["message"].as_str().unwrap().starts_with("Cannot open image /none: "), "{json}");
}

#[test]
fn a_lower_floor_is_accepted_by_name() {
    let wrong = run(Command::new(program("outboard-rng")).args(["--socket-path", "a"]).env("OUTBOARD_SANDBOX_FLOOR", "none"));
    assert_eq!(wrong.code, Some(2), "the variable is read: {}", wrong.err);
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &["--sandbox-floor", "linux-5.15"]);
    assert_eq!(server.terminate(), Some(0));
}

/// A refused program once removed what it had found there: a user's file, or the socket of whoever served.
#[test]
fn what_is_in_the_way_of_a_socket_stays() {
    let scratch = Scratch::new();
    let (file, socket) = (scratch.path("file"), scratch.path("outboard-rng.sock"));
    fs::write(&file, "precious").unwrap();
    fails("outboard-rng", &["--socket-path", file.to_str().unwrap()], &["there is a file that is no socket"]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let server = Server::start("outboard-rng", &scratch, &[]);
    fails("outboard-rng", &["--socket-path", socket.to_str().unwrap()], &["another process listens there"]);
    UnixStream::connect(&server.socket).unwrap();
    assert_eq!(server.terminate(), Some(0));
    let left: Vec<_> = fs::read_dir(scratch.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["file"], "its own is gone");
}

/// Whoever finds the path finds a disk behind it: nobody can come while an image is read that is then refused.
#[test]
fn a_disk_that_is_refused_never_has_a_socket() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("image", 511), scratch.path("s"));
    let over = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = false;
            while !over.load(Ordering::Relaxed) {
                seen |= socket.exists();
            }
            seen
        });
        let words = ["--socket-path", socket.to_str().unwrap(), "--format", "raw", "--blk-file", image.to_str().unwrap()];
        let ended = (0..10).map(|_| refuse("outboard-blk", &words)).find(|ended| !ended.err.contains("less than one sector"));
        over.store(true, Ordering::Relaxed);
        assert!(ended.is_none(), "{ended:?}");
        watcher.join().unwrap()
    });
    assert!(!seen, "somebody could have come");
    assert_eq!(fs::read_dir(scratch.path("")).unwrap().count(), 1, "nothing is left");
}

/// So all disks of a run of tests, or of a host, can have another engine; what is said of one disk counts more.
#[test]
fn an_engine_can_be_chosen_for_all_disks() {
    let with = |variable: &str, more: &[&str]| {
        let mut command = Command::new(program("outboard-blk"));
        command.args(["--socket-path", "/nowhere/s", "--format", "null", "--size", "4096"]).args(more);
        run(command.env("OUTBOARD_BLK_ENGINE", variable))
    };
    assert_eq!(with("none", &[]).code, Some(2), "the variable is read");
    for (variable, more) in [("threads", &[][..]), ("none", &["--engine", "threads"])] {
        let ended = with(variable, more);
        assert!(ended.code == Some(1) && ended.err.contains("Cannot listen on /nowhere/s"), "{}", ended.err);
    }
}

#[test]
fn the_probe_says_what_is_wrong() {
    let scratch = Scratch::new();
    let nothing = scratch.path("nothing").to_str().unwrap().to_owned();
    for verb in
        [&["info"][..], &["rng"], &["blk", "info"], &["blk", "read"], &["blk", "write"], &["blk", "verify"], &["blk", "bench"]]
    {
        fails("outboard-probe", &[verb, &[&nothing]].concat(), &["Cannot connect to ", "No such file or directory"]);
    }
    let rng = Server::start("outboard-rng", &scratch, &[]);
    fails("outboard-probe", &["blk", "read", rng.socket.to_str().unwrap(), "--offset", "7"], &["multiples of 512"]);
    let listener = UnixListener::bind(scratch.path("deaf")).unwrap();
    fails("outboard-probe", &["info", scratch.path("deaf").to_str().unwrap()], &["did not answer GET_FEATURES within"]);
    drop(listener);
}

#[test]
fn every_program_prints_its_manual_page() {
    for (name, option) in [
        ("outboard-vmm", "--cpus"),
        ("outboard-blk", "--blk-file"),
        ("outboard-rng", "--max-bytes"),
        ("outboard-console", "--keep"),
    ] {
        let ended = run(Command::new(program(name)).arg("--print-man"));
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{name}");
        let page = ended.out.replace("\\-", "-");
        assert!(page.contains(&format!(".TH {name} 8")) && page.contains(option), "{page}");
        assert!(!page.contains("--namespaced"), "{page}");
    }
}

#[test]
fn asking_what_a_program_can_do_needs_nothing_else_and_help_says_so() {
    for name in ["outboard-blk", "outboard-rng", "outboard-console"] {
        let help = run(Command::new(program(name)).arg("--help")).out;
        let usage: Vec<&str> = help.lines().skip_while(|line| !line.starts_with("Usage:")).take(2).collect();
        assert!(usage[0].ends_with("<--socket-path <PATH>|--fd <FD>>"), "{help}");
        assert_eq!(usage[1].trim(), format!("{name} --print-capabilities"));
        assert_eq!(run(Command::new(program(name)).arg("--print-capabilities")).code, Some(0));
    }
}
