//! As whom the threads of a share act, what set-user-id bits are left, and what the process may do, seen from outside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use libc::{EEXIST, EINVAL, ENOENT, ENOTDIR, EPERM, O_EXCL, O_RDWR, O_TRUNC};
use probe::fs::message::{self, Message, ROOT, Set, op, set};
use probe::fs::raw::{Raw, Told, long};
use rustix::process::geteuid;
use suite::share::Shared;
use suite::{program, run, status};

const KEYS: [&str; 4] = ["Uid", "Gid", "Groups", "CapEff"];

fn is_root(test: &str) -> bool {
    if !geteuid().is_root() {
        println!("skipped: {test} needs root");
    }
    geteuid().is_root()
}

fn credentials(shared: &Shared) -> Vec<String> {
    KEYS.iter().flat_map(|key| shared.of_threads(key)).collect()
}

/// Every request that makes something, of somebody who is in another group.
fn makers(dir: u64, name: &str) -> Vec<Message> {
    vec![
        message::mkdir(dir, name, 0o755),
        message::mknod(dir, name, libc::S_IFREG | 0o644, 0),
        message::mknod(dir, name, libc::S_IFIFO | 0o644, 0),
        message::symlink(dir, name, "target"),
        message::create(dir, name, O_RDWR | O_EXCL, 0o644),
    ]
}

#[test]
fn after_an_error_every_thread_is_who_it_was() {
    if !is_root("share owners") {
        return;
    }
    let shared = Shared::new(&[], |house| {
        fs::write(house.join("taken"), "").unwrap();
        fs::create_dir(house.join("gone")).unwrap();
    });
    let before = credentials(&shared);
    let mut guest = shared.guest();
    let (gone, taken) = (guest.lookup(ROOT, "gone").unwrap(), guest.lookup(ROOT, "taken").unwrap());
    guest.ask(&message::opendir(gone)).unwrap();
    fs::remove_dir(shared.house.join("gone")).unwrap();
    let long_target = "t".repeat(4095);
    let mut failing: Vec<(Message, &[i32])> = Vec::new();
    failing.extend(makers(ROOT, "taken").into_iter().map(|message| (message, &[EEXIST][..])));
    failing.extend(makers(gone, "new").into_iter().map(|message| (message, &[ENOENT, libc::ESTALE][..])));
    failing.extend(makers(taken, "new").into_iter().map(|message| (message, &[ENOTDIR][..])));
    failing.push((message::tmpfile(ROOT, libc::O_RDONLY, 0o644), &[EINVAL]));
    // ext4 has an answer of its own for a directory without a name.
    failing.push((message::tmpfile(gone, O_RDWR, 0o644), &[ENOENT, libc::ESTALE, EPERM]));
    failing.push((message::mknod(ROOT, "new", libc::S_IFDIR | 0o755, 0), &[EINVAL]));
    failing.push((message::symlink(ROOT, "taken", long_target), &[EEXIST]));
    for (message, errors) in failing {
        for (uid, gid, group) in [(1000, 1000, None), (1000, 1000, Some(4242)), (0, 0, Some(4242)), (0, 77, None)] {
            let mut message = message.clone().by(uid, gid);
            if let Some(group) = group {
                message = message.in_group(group);
            }
            let reply = guest.call(&message).unwrap();
            assert!(errors.contains(&reply.error), "{message:?} is answered with {}", reply.error);
            assert_eq!(credentials(&shared), before, "after {message:?}");
        }
    }
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX)] {
        let reply = guest.call(&message::mkdir(ROOT, "nobody", 0o755).by(uid, gid)).unwrap();
        assert_eq!(reply.error, EINVAL);
    }
    assert!(!shared.house.join("nobody").exists());
    assert_eq!(credentials(&shared), before);
}

/// A group that came with one request is not there in the next, whoever's that is.
#[test]
fn a_group_is_had_for_one_request() {
    if !is_root("share groups") {
        return;
    }
    let shared = Shared::new(&[], |house| {
        fs::create_dir(house.join("of group")).unwrap();
        chown(house.join("of group"), Some(0), Some(4242)).unwrap();
        fs::set_permissions(house.join("of group"), PermissionsExt::from_mode(0o2777)).unwrap();
    });
    let mut guest = shared.guest();
    let dir = guest.lookup(ROOT, "of group").unwrap();
    let mode = |name: &str| fs::symlink_metadata(shared.house.join("of group").join(name)).unwrap().mode() & 0o7777;
    // A member may make what has the bit; whoever is none may not, also right after a member, and as root without it.
    let cases = [("member", 1000, Some(4242), 0o2775), ("none", 1000, None, 0o775), ("other", 1000, Some(17), 0o775)];
    for round in 0..3 {
        for (who, uid, group, expected) in cases {
            let name = format!("{who}{round}");
            let mut message = message::mknod(dir, &name, libc::S_IFREG | 0o2775, 0).by(uid, uid);
            if let Some(group) = group {
                message = message.in_group(group);
            }
            guest.ask(&message).unwrap();
            let meta = fs::metadata(shared.house.join("of group").join(&name)).unwrap();
            assert_eq!((meta.uid(), meta.gid(), mode(&name)), (uid, 4242, expected), "{name}");
        }
    }
    // A directory made by root with a group leaves that group with nobody.
    guest.ask(&message::mkdir(dir, "by root", 0o755).in_group(4242)).unwrap();
    guest.ask(&message::mknod(dir, "after", libc::S_IFREG | 0o2775, 0).by(1000, 1000)).unwrap();
    assert_eq!(mode("after"), 0o775);
    let failed = guest.call(&message::mkdir(dir, "by root", 0o755)).unwrap();
    assert_eq!(failed.error, EEXIST);
    let groups: Vec<String> = shared.of_threads("Groups").into_iter().filter(|line| line.contains("4242")).collect();
    assert!(groups.is_empty(), "{groups:?}");
}

#[test]
fn ids_that_are_nobody_here_are_refused() {
    if !is_root("share, mapped ids") {
        return;
    }
    let shared = Shared::new(&["--uid-map", ":0:100000:1000:", "--gid-map", ":0:100000:1000:"], |house| {
        chown(house, Some(100_000), Some(100_000)).unwrap();
    });
    let before = credentials(&shared);
    let mut guest = shared.guest();
    for (uid, gid) in [(5000, 0), (0, 5000), (5000, 5000), (999, 1000), (1000, 999)] {
        for message in makers(ROOT, "new") {
            let reply = guest.call(&message.by(uid, gid).in_group(5)).unwrap();
            assert!([EPERM, EINVAL].contains(&reply.error), "{uid}:{gid} is answered with {}", reply.error);
            assert_eq!(credentials(&shared), before, "{uid}:{gid}");
        }
    }
    guest.ask(&message::mkdir(ROOT, "new", 0o755).by(7, 8)).unwrap();
    let meta = fs::metadata(shared.house.join("new")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (100_007, 100_008));
    assert_eq!(fs::read_dir(&shared.house).unwrap().count(), 1);
}

/// What is done to a file with both bits; by whom they are to go, and whether the guest says so.
const DEEDS: [&str; 6] = ["write", "truncate", "chown", "open", "allocate", "copy"];

/// What a file system does if a user does it who may not keep the bits.
fn here(house: &Path, deed: &str) -> u32 {
    let path = house.join("local");
    prepare(&path);
    let name = path.display().to_string();
    let script = match deed {
        "write" => "printf x | dd of=\"$0\" conv=notrunc status=none",
        "truncate" => "truncate -s 3 \"$0\"",
        "open" => ": > \"$0\"",
        "allocate" => "fallocate -l 9000 \"$0\"",
        _ => return fs::metadata(&path).unwrap().mode() & 0o6000,
    };
    let mut command = Command::new("sh");
    command.args(["-ec", script, &name]).uid(1000).gid(1000);
    assert_eq!(run(&mut command).code, Some(0), "{deed}");
    fs::metadata(&path).unwrap().mode() & 0o6000
}

fn prepare(path: &Path) {
    let _of_before = fs::remove_file(path);
    File::create(path).unwrap().write_all_at(b"content of a file", 0).unwrap();
    chown(path, Some(1000), Some(1000)).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(0o6777)).unwrap();
}

/// `kill`: the guest says that the bits are to go.
fn there(guest: &mut Raw, house: &Path, deed: &str, kill: bool) -> u32 {
    let path = house.join("file");
    prepare(&path);
    fs::write(house.join("source"), "more content").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open_file(node, O_RDWR).unwrap();
    let by = |message: Message| message.by(1000, 1000);
    let reply = match deed {
        "write" => guest.call(&by(message::write_as(node, handle, 0, b"x", if kill { 4 } else { 0 }))),
        "truncate" => {
            let valid = set::SIZE | if kill { set::KILL_SUIDGID } else { 0 };
            guest.call(&by(message::setattr(node, Set { valid, size: 3, ..Set::default() })))
        }
        "chown" => {
            let valid = set::UID | set::GID | if kill { set::KILL_SUIDGID } else { 0 };
            guest.call(&by(message::setattr(node, Set { valid, uid: 1000, gid: 1000, ..Set::default() })))
        }
        "open" => {
            let flags = (O_RDWR | O_TRUNC).cast_unsigned();
            guest.call(&by(Message::new(op::OPEN, node, message::words(&[flags, u32::from(kill)]))))
        }
        "allocate" => guest.call(&by(message::fallocate(node, handle, 0, 9000))),
        _ => {
            let source = guest.lookup(ROOT, "source").unwrap();
            let from = guest.open_file(source, O_RDWR).unwrap();
            guest.call(&by(message::copy((source, from), (node, handle), 5)))
        }
    };
    let reply = reply.unwrap();
    assert_eq!(reply.error, 0, "{deed}");
    if deed == "open" {
        guest.ask(&message::release(node, long(&reply.body, 0))).unwrap();
    }
    let told = Told::attr(&guest.ask(&message::getattr(node)).unwrap()).mode;
    let is = fs::metadata(&path).unwrap().mode();
    assert_eq!(told & 0o7777, is & 0o7777);
    guest.ask(&message::release(node, handle)).unwrap();
    is & 0o6000
}

#[test]
fn bits_that_give_away_an_identity_go_as_on_a_local_file_system() {
    if !is_root("share, set-user-id bits") {
        return;
    }
    for words in [&[][..], &["--killpriv-v2"]] {
        let shared = Shared::new(words, |house| fs::set_permissions(house, PermissionsExt::from_mode(0o777)).unwrap());
        // The way to the folder has to be open for the user, too.
        fs::set_permissions(shared.house.parent().unwrap(), PermissionsExt::from_mode(0o755)).unwrap();
        let mut guest = shared.guest();
        for deed in DEEDS {
            for kill in [false, true] {
                let left = there(&mut guest, &shared.house, deed, kill);
                println!("{words:?} {deed}, the guest says kill: {kill}: {left:o} left");
                // Without the agreement, and with the word, nobody keeps them. With the agreement and without the word it is
                // the guest who knows better.
                if words.is_empty() || kill {
                    assert_eq!(left, 0, "{words:?} {deed} {kill}");
                }
            }
            if matches!(deed, "write" | "truncate" | "open" | "allocate") {
                assert_eq!(here(&shared.house, deed), 0, "{deed}, here");
            }
        }
    }
}

/// The process as it runs: what it may do, what it sees, and that each of its threads is held.
fn audit(shared: &Shared, most: u64) {
    let worker = shared.server.worker();
    let capabilities = u64::from_str_radix(&status(worker, "CapEff"), 16).unwrap();
    assert_eq!(capabilities & !most, 0, "{capabilities:x}");
    for (key, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let lines = shared.of_threads(key);
        assert!(lines.len() >= 4 && lines.iter().all(|line| line.ends_with(&format!(" {value}"))), "{key}: {lines:?}");
    }
    for key in ["CapInh", "CapAmb"] {
        assert_eq!(status(worker, key), "0000000000000000", "{key}");
    }
    let mounts = fs::read_to_string(format!("/proc/{worker}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let net = fs::read_to_string(format!("/proc/{worker}/net/dev")).unwrap();
    let names: Vec<&str> = net.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::trim).collect();
    assert_eq!(names, ["lo"]);
}

/// Bits of the capabilities that are kept by a process of many users.
fn of_many() -> u64 {
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP
    [0, 1, 2, 3, 4, 6, 7, 27, 31].iter().fold(0, |all, bit| all | 1 << bit)
}

#[test]
fn the_server_may_do_no_more_than_it_says() {
    let shared = Shared::new(&[], |_| {});
    shared.guest().lookup(ROOT, "nothing").unwrap_err();
    audit(&shared, of_many());
    let mapped = Shared::new(&["--owner-map", "me"], |_| {});
    mapped.guest().lookup(ROOT, "nothing").unwrap_err();
    audit(&mapped, of_many());
}

#[test]
fn every_call_that_names_something_begins_at_a_descriptor() {
    let ended = run(Command::new(program("outboard-virtiofsd")).arg("--print-sandbox"));
    let sandbox: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    let rules = || sandbox["threads"].as_array().unwrap().iter().flat_map(|thread| thread["rules"].as_array().unwrap());
    let mut calls: Vec<u64> = rules().map(|rule| rule["number"].as_u64().unwrap()).collect();
    calls.sort_unstable();
    calls.dedup();
    println!("{} system calls", calls.len());
    assert!(calls.len() <= 60, "{} system calls", calls.len());
    for rule in rules() {
        let name = rule["call"].as_str().unwrap();
        let when: Vec<&str> = rule["when"].as_array().unwrap().iter().filter_map(|when| when.as_str()).collect();
        let which: &[u32] = match name {
            "linkat" | "renameat2" => &[0, 2],
            "symlinkat" => &[1],
            "openat2" | "statx" => &[0],
            "fstat" => &[],
            name if name.contains("at") && (name.ends_with("at") || name.ends_with("at2")) => &[0],
            _ => &[],
        };
        for argument in which {
            assert!(when.contains(&format!("argument {argument} is not 0xffffff9c").as_str()), "{rule}");
        }
        assert!(!["open", "openat", "execve", "socket", "connect", "ptrace", "mount", "bpf", "clone", "kill"].contains(&name));
    }
}
