//! Our probe as the go-between of this host's kernel and a virtio-fs server, mounted here without a machine: upstream's, and ours.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, removexattr, setxattr};
use rustix::process::{Signal, kill_process};
use suite::virtiofsd::{Virtiofsd, Whose};
use suite::{Ended, Scratch, program, run, wait_for};

mod attributes;
mod contents;
mod exercise;
mod far;
mod given;
mod handles;
mod killed;
mod labels;
mod locks;
mod made_here;
mod mapped;
mod mounted;
mod names;
mod open_files;
mod options;
mod owners;
mod posix;
mod programs;
mod room;
mod several;
mod single;
mod subordinate;
mod watched;

use mounted::{Mounted, can_mount, is_mounted, random, serve};

/// The same for each server.
macro_rules! with_both {
    ($($test:ident),* $(,)?) => {
        mod upstreams {
            $(#[test] fn $test() { super::$test(super::Whose::Upstreams) })*
        }
        mod ours {
            $(#[test] fn $test() { super::$test(super::Whose::Ours) })*
        }
    };
}

with_both!(
    info_says_what_the_server_is,
    files_are_the_same_on_both_sides,
    layouts_that_no_guest_has,
    a_big_file_both_ways,
    data_lies_on_pages,
    a_folder_with_thousands_of_files,
    extended_attributes,
    writers_beside_each_other,
    a_server_with_fewer_queues_than_asked_for,
    places_where_nothing_can_be_mounted,
    a_server_that_dies,
    signals_end_it_whatever_the_server_does,
    who_waits_can_be_killed,
    open_files_outlive_the_mount_for_a_while,
);

/// Most of what can be done to files, each looked at from the other side.
fn use_it(house: &Path, seen: &Path, seed: u64) {
    let bytes = random(300_001, seed);
    fs::write(seen.join("one"), &bytes).unwrap();
    assert!(fs::read(house.join("one")).unwrap() == bytes, "written");
    fs::write(house.join("two"), &bytes).unwrap();
    assert!(fs::read(seen.join("two")).unwrap() == bytes, "read");
    fs::create_dir(seen.join("folder")).unwrap();
    fs::rename(seen.join("one"), seen.join("folder/moved")).unwrap();
    assert!(!house.join("one").exists() && fs::read(house.join("folder/moved")).unwrap() == bytes);
    fs::hard_link(seen.join("folder/moved"), seen.join("linked")).unwrap();
    assert_eq!(fs::metadata(house.join("linked")).unwrap().nlink(), 2);
    symlink("folder/moved", seen.join("pointer")).unwrap();
    assert_eq!(fs::read_link(house.join("pointer")).unwrap(), Path::new("folder/moved"));
    assert_eq!(fs::read_link(seen.join("pointer")).unwrap(), Path::new("folder/moved"));
    let file = OpenOptions::new().read(true).write(true).open(seen.join("pointer")).unwrap();
    file.set_len(5000).unwrap();
    file.write_all_at(b"in the middle", 2000).unwrap();
    file.sync_all().unwrap();
    let mut part = [0; 13];
    file.read_exact_at(&mut part, 2000).unwrap();
    assert_eq!(&part, b"in the middle");
    let there = fs::read(house.join("linked")).unwrap();
    assert_eq!((there.len(), &there[2000..2013], there[..2000] == bytes[..2000]), (5000, &b"in the middle"[..], true));
    fs::set_permissions(seen.join("two"), PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(fs::metadata(house.join("two")).unwrap().mode() & 0o7777, 0o640);
    assert!(fs::remove_dir(seen.join("folder")).is_err(), "it is not empty");
    for name in ["folder/moved", "linked", "pointer", "two"] {
        fs::remove_file(seen.join(name)).unwrap();
    }
    fs::remove_dir(seen.join("folder")).unwrap();
    assert_eq!(fs::read_dir(house).unwrap().count(), 0);
    assert!(fs::read(seen.join("two")).is_err());
}

fn probe(words: &[&str]) -> Ended {
    run(Command::new(program("outboard-probe")).arg("fs").args(words))
}

fn info_says_what_the_server_is(whose: Whose) {
    let scratch = Scratch::new();
    let (mut server, _) = serve(whose, &scratch, &["--xattr"]);
    let socket = server.socket.clone();
    let socket = socket.to_str().unwrap();
    let ended = probe(&["info", socket, "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let info: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!((&info["tag"], &info["request_queues"]), (&"house".into(), &1.into()));
    assert!(info["fuse"].as_str().unwrap().starts_with("7."), "{info}");
    assert_eq!((&info["max_write"], &info["max_pages"], &info["time_gran"]), (&(1 << 20).into(), &256.into(), &1.into()));
    for flag in ["MAX_PAGES", "INIT_EXT", "BIG_WRITES"] {
        assert!(info["fuse_flags"].as_array().unwrap().contains(&flag.into()), "{flag}: {info}");
    }
    assert!(info["features"].as_array().unwrap().contains(&"VERSION_1".into()), "{info}");
    server.end();
    let (mut server, _) = serve(whose, &scratch, &[]);
    let ended = probe(&["info", socket]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let lines: Vec<&str> = ended.out.lines().collect();
    assert_eq!(lines[..2], ["tag             house", "request queues  1"], "{}", ended.out);
    assert!(lines.iter().any(|line| line.starts_with("FUSE flags      ASYNC_READ ")), "{}", ended.out);
    server.end();
    let _of_the_earlier_one = fs::remove_file(socket);
    let _without_a_tag = Virtiofsd::start(whose, PathBuf::from(socket), &scratch.path("house"), &[]);
    let ended = probe(&["info", socket]);
    assert!(ended.out.starts_with("tag             none\nrequest queues  1\n"), "{}{}", ended.out, ended.err);
}

fn files_are_the_same_on_both_sides(whose: Whose) {
    if !can_mount("fs") {
        return;
    }
    let mut mounted = Mounted::new(whose, &[], &[]);
    let said = fs::read_to_string(&mounted.said).unwrap();
    assert!(
        said.starts_with("\"house\" is mounted at /") && said.contains("FUSE 7.") && said.contains("1 request queue"),
        "{said}"
    );
    let list = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let place = mounted.seen.to_str().unwrap().replace(' ', "\\040");
    let line = list.lines().find(|line| line.contains(&place)).unwrap();
    assert!(line.contains("nosuid,nodev") && line.contains(" - fuse.virtiofs house "), "{line}");
    use_it(&mounted.house, &mounted.seen, 1);
    mounted.unmount();
}

/// Byte by byte, page by page, anywhere: the server has to take what it gets.
fn layouts_that_no_guest_has(whose: Whose) {
    if !can_mount("fs --scatter") {
        return;
    }
    let rings: [&[&str]; 5] = [
        &["--scatter", "--seed", "1"],
        &["--scatter", "--seed", "2", "--indirect"],
        &["--scatter", "--seed", "3", "--queue-size", "512", "--no-event-idx"],
        &["--scatter", "--seed", "4", "--queue-size", "8"],
        &["--indirect", "--queue-size", "32"],
    ];
    for (seed, words) in (0..).zip(rings) {
        let mut mounted = Mounted::new(whose, &[], words);
        use_it(&mounted.house, &mounted.seen, seed);
        let bytes = random(5 << 20, seed);
        fs::write(mounted.seen.join("big"), &bytes).unwrap();
        assert!(fs::read(mounted.house.join("big")).unwrap() == bytes, "{words:?}");
        assert!(fs::read(mounted.seen.join("big")).unwrap() == bytes, "{words:?}");
        mounted.unmount();
    }
}

fn a_big_file_both_ways(whose: Whose) {
    if !can_mount("fs, a big file") {
        return;
    }
    // A new file each time: nothing of it is in the kernel's cache of the mount.
    let mut mounted = Mounted::new(whose, &[], &[]);
    let sum = |path: &Path| run(Command::new("sha256sum").arg(path)).out.split(' ').next().unwrap().to_owned();
    for (name, seed) in [("out", 5), ("in", 6)] {
        let (from, to) = if name == "out" { (&mounted.seen, &mounted.house) } else { (&mounted.house, &mounted.seen) };
        fs::write(from.join(name), random(64 << 20, seed)).unwrap();
        assert_eq!(sum(&to.join(name)), sum(&from.join(name)), "{name}");
        assert_eq!(fs::metadata(to.join(name)).unwrap().len(), 64 << 20);
    }
    mounted.unmount();
}

/// Past the page cache on both sides: the server hands our buffers to its disk, which wants them aligned.
fn data_lies_on_pages(whose: Whose) {
    if !can_mount("fs with O_DIRECT") {
        return;
    }
    let mut mounted = Mounted::new(whose, &["--allow-direct-io", "--cache", "never"], &[]);
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    let opened = OpenOptions::new().create(true).write(true).custom_flags(flags).open(mounted.house.join("direct"));
    if opened.is_err() {
        println!("skipped: the folder's file system has no O_DIRECT");
        return;
    }
    let ended = run(Command::new("dd")
        .args(["if=/dev/urandom", "bs=1M", "count=4", "iflag=fullblock", "oflag=direct"])
        .arg(of(&mounted.seen.join("direct"))));
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let copy = mounted.house.join("copy");
    let from = format!("if={}", mounted.seen.join("direct").display());
    let ended = run(Command::new("dd").args([&from, "bs=64k", "iflag=direct"]).arg(of(&copy)));
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let there = fs::read(mounted.house.join("direct")).unwrap();
    assert!(there.len() == 4 << 20 && there == fs::read(&copy).unwrap());
    mounted.unmount();
}

fn of(path: &Path) -> String {
    format!("of={}", path.display())
}

fn a_folder_with_thousands_of_files(whose: Whose) {
    if !can_mount("fs, a big folder") {
        return;
    }
    let mut mounted = Mounted::new(whose, &[], &[]);
    let names: BTreeSet<String> = (0..4000).map(|number| format!("{number:04}-{}", "n".repeat(number % 200))).collect();
    let (here, there) = (mounted.seen.join("many"), mounted.house.join("many"));
    fs::create_dir(&there).unwrap();
    names.iter().for_each(|name| drop(File::create(there.join(name)).unwrap()));
    let listed = |folder: &Path| -> BTreeSet<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert!(listed(&here) == names);
    assert!(names.iter().all(|name| fs::symlink_metadata(here.join(name)).unwrap().is_file()));
    fs::remove_dir_all(&here).unwrap();
    assert!(!there.exists());
    mounted.unmount();
}

fn extended_attributes(whose: Whose) {
    if !can_mount("fs, extended attributes") {
        return;
    }
    let mut mounted = Mounted::new(whose, &["--xattr"], &[]);
    let (here, there) = (mounted.seen.join("file"), mounted.house.join("file"));
    fs::write(&here, "x").unwrap();
    if setxattr(&there, "user.probe", b"", XattrFlags::empty()).is_err() {
        println!("skipped: the folder's file system has no extended attributes");
        return;
    }
    let value = random(1500, 7);
    setxattr(&here, "user.outboard", &value, XattrFlags::CREATE).unwrap();
    for path in [&here, &there] {
        let mut buffer = vec![0; 2000];
        let len = getxattr(path, "user.outboard", &mut buffer[..]).unwrap();
        assert!(buffer[..len] == value);
    }
    assert_eq!(getxattr_query(&here, "user.outboard").unwrap(), 1500, "asked for its size alone");
    let mut list = [0u8; 200];
    let len = listxattr(&here, &mut list[..]).unwrap();
    let names: BTreeSet<&[u8]> = list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    assert!(names.contains(&b"user.outboard"[..]) && names.contains(&b"user.probe"[..]));
    removexattr(&here, "user.outboard").unwrap();
    assert!(getxattr(&there, "user.outboard", &mut [0u8; 2000][..]).is_err());
    mounted.unmount();
}

fn writers_beside_each_other(whose: Whose) {
    if !can_mount("fs, parallel writers") {
        return;
    }
    let mut mounted = Mounted::new(whose, &["--thread-pool-size", "4"], &["--scatter"]);
    thread::scope(|scope| {
        for writer in 0..8u64 {
            let (house, seen) = (&mounted.house, &mounted.seen);
            scope.spawn(move || {
                for round in 0..20u64 {
                    let name = format!("{writer}-{round}");
                    let bytes = random(1 + usize::try_from(round * 20_011).unwrap(), writer * 100 + round);
                    let mut file = File::create(seen.join(&name)).unwrap();
                    bytes.chunks(7000).for_each(|part| file.write_all(part).unwrap());
                    drop(file);
                    assert!(fs::read(house.join(&name)).unwrap() == bytes, "{name}");
                    assert!(fs::read(seen.join(&name)).unwrap() == bytes, "{name}");
                }
            });
        }
    });
    assert_eq!(fs::read_dir(&mounted.seen).unwrap().count(), 160);
    mounted.unmount();
}

fn a_server_with_fewer_queues_than_asked_for(whose: Whose) {
    let scratch = Scratch::new();
    let (server, house) = serve(whose, &scratch, &[]);
    let ended = probe(&["mount", server.socket.to_str().unwrap(), house.to_str().unwrap(), "--queues", "2"]);
    assert_eq!(ended.code, Some(1));
    assert_eq!(ended.err, "outboard-probe: The backend has 2 queues, 3 are needed\n");
    assert!(!is_mounted(&house));
}

fn places_where_nothing_can_be_mounted(whose: Whose) {
    let scratch = Scratch::new();
    let nowhere = scratch.path("nowhere");
    let ended = probe(&["mount", scratch.path("no.sock").to_str().unwrap(), nowhere.to_str().unwrap()]);
    assert!(ended.code == Some(1) && ended.err.contains("Cannot connect to "), "{}", ended.err);
    let (server, house) = serve(whose, &scratch, &[]);
    let ended = probe(&["mount", server.socket.to_str().unwrap(), nowhere.to_str().unwrap()]);
    let said = format!("outboard-probe: Cannot mount at {}: No such file or directory (os error 2)\n", nowhere.display());
    assert_eq!((ended.code, ended.err), (Some(1), said));
    drop(server);
    let file = house.join("file");
    fs::write(&file, "").unwrap();
    let (server, _) = serve(whose, &scratch, &[]);
    let ended = probe(&["mount", server.socket.to_str().unwrap(), file.to_str().unwrap()]);
    let said = format!("outboard-probe: Cannot mount at {}: it is no folder\n", file.display());
    assert_eq!((ended.code, ended.err), (Some(1), said));
}

/// Whoever waits gets an error, whoever comes later too, and nothing stays.
fn a_server_that_dies(whose: Whose) {
    if !can_mount("fs, a server that dies") {
        return;
    }
    let mut mounted = Mounted::new(whose, &[], &[]);
    fs::write(mounted.house.join("big"), random(32 << 20, 9)).unwrap();
    let mut open = File::open(mounted.seen.join("big")).unwrap();
    // Below the mount there is no such folder: what comes after the end fails, too.
    let (held, work) = (File::create(mounted.seen.join("held")).unwrap(), mounted.seen.join("work"));
    fs::create_dir(&work).unwrap();
    let reader = thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let mut wrote = 0u64;
        loop {
            if open.read(&mut buffer).is_err() || fs::write(work.join(format!("new-{}", wrote % 10)), &buffer).is_err() {
                return;
            }
            wrote += 1;
        }
    });
    wait_for("some work", || mounted.house.join("work/new-9").exists().then_some(()));
    mounted.server.as_mut().unwrap().kill();
    let (code, said) = mounted.ended();
    assert_eq!((code, said.lines().nth(1)), (Some(1), Some("outboard-probe: The server has gone away")), "{said}");
    reader.join().unwrap();
    assert!(held.write_all_at(b"x", 0).is_err(), "a file that was open is dead");
    assert_eq!(fs::read_dir(&mounted.seen).unwrap().count(), 0, "what was below the mount is seen again");
}

/// A server that is stopped answers nobody, and is not dead. A signal ends the mount all the same.
fn signals_end_it_whatever_the_server_does(whose: Whose) {
    if !can_mount("fs, signals") {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut mounted = Mounted::new(whose, &[], &[]);
        fs::write(mounted.seen.join("file"), "written").unwrap();
        mounted.signal(signal);
        assert_eq!(mounted.ended().0, Some(0), "{signal:?}");
        assert_eq!(fs::read_to_string(mounted.house.join("file")).unwrap(), "written");
        mounted.server.as_mut().unwrap().end();
    }
    let mut mounted = Mounted::new(whose, &[], &[]);
    let mut open = File::create(mounted.seen.join("open")).unwrap();
    kill_process(mounted.server.as_ref().unwrap().pid(), Signal::STOP).unwrap();
    let waiting = thread::spawn(move || open.write_all(b"never there").and_then(|()| open.sync_all()).is_err());
    mounted.signal(Signal::TERM);
    let (code, said) = mounted.ended();
    assert_eq!((code, said.lines().count()), (Some(0), 2), "{said}");
    assert!(said.ends_with("outboard-probe: Files are still open after 5 s; they get errors now\n"), "{said}");
    assert!(waiting.join().unwrap());
}

/// The kernel says INTERRUPT when the process dies that waits for an answer; the answer that comes later is nobody's.
fn who_waits_can_be_killed(whose: Whose) {
    if !can_mount("fs, a killed reader") {
        return;
    }
    let mut mounted = Mounted::new(whose, &[], &[]);
    let bytes = random(16 << 20, 11);
    fs::write(mounted.house.join("big"), &bytes).unwrap();
    let server = mounted.server.as_ref().unwrap().pid();
    for _ in 0..3 {
        kill_process(server, Signal::STOP).unwrap();
        let mut reader = Command::new("cat").arg(mounted.seen.join("big")).stdout(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(100));
        reader.kill().unwrap();
        thread::sleep(Duration::from_millis(50));
        kill_process(server, Signal::CONT).unwrap();
        assert!(!reader.wait().unwrap().success());
    }
    assert!(fs::read(mounted.seen.join("big")).unwrap() == bytes);
    mounted.unmount();
}

/// Files that are open when a signal comes are served on for a while.
fn open_files_outlive_the_mount_for_a_while(whose: Whose) {
    if !can_mount("fs, open files") {
        return;
    }
    let mut mounted = Mounted::new(whose, &[], &[]);
    let file = File::create(mounted.seen.join("open")).unwrap();
    mounted.signal(Signal::TERM);
    wait_for("the unmount", || (!is_mounted(&mounted.seen)).then_some(()));
    file.write_all_at(b"still there", 0).unwrap();
    drop(file);
    let (code, said) = mounted.ended();
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    assert_eq!(fs::read_to_string(mounted.house.join("open")).unwrap(), "still there");
}

fn truth(_answer: &mut Vec<u8>, _used: &mut u32) {}

#[test]
fn requests_take_turns_in_several_queues() {
    if !can_mount("fs --queues") {
        return;
    }
    let scratch = Scratch::new();
    let socket = scratch.path("made.sock");
    let (seen, server) = made_here::start(&socket, 3, truth);
    let mut mounted = Mounted::of(scratch, &socket, None, &["--queues", "3"]);
    let said = fs::read_to_string(&mounted.said).unwrap();
    assert!(said.starts_with("\"made here\" is mounted at ") && said.ends_with(": FUSE 7.38, 3 request queues\n"), "{said}");
    thread::scope(|scope| {
        for reader in 0..6 {
            let file = mounted.seen.join("file");
            scope.spawn(move || {
                let file = File::open(file).unwrap();
                // Longer than a request may be, and of an odd length.
                for (step, len) in [4096, 100_001, 3 << 20].into_iter().enumerate() {
                    let (offset, mut bytes) = ((reader * 8192 + step * 64) as u64, vec![0; len]);
                    file.read_exact_at(&mut bytes, offset).unwrap();
                    assert!(bytes == made_here::content(offset, len), "{len} at {offset}");
                }
            });
        }
    });
    for _ in 0..3 {
        assert!(fs::metadata(mounted.seen.join("changing")).unwrap().is_file());
    }
    wait_for("a FORGET", || (seen.forgotten.load(Ordering::SeqCst) > 0).then_some(()));
    mounted.unmount();
    server.join().unwrap();
    let requests: Vec<u32> = seen.requests.iter().map(|count| count.load(Ordering::SeqCst)).collect();
    assert!(requests.iter().all(|count| *count > 0), "{requests:?}");
    assert_eq!(seen.destroyed.load(Ordering::SeqCst), 1);
}

/// What a server says against the rules ends the mount with a sentence, and whoever asked gets an error.
#[test]
fn a_server_that_lies() {
    if !can_mount("fs, a server that lies") {
        return;
    }
    let lies: [(made_here::Lie, &str); 6] = [
        (|_, used| *used = 1 << 30, "wrote 1073741824 bytes in answer to READ, and "),
        (|_, used| *used = 0, "answered READ with 0 bytes: that is less than a header"),
        (|_, used| *used = 20, "wrote 20 bytes in answer to READ, and in them that there are "),
        (|answer, _| answer[8] ^= 1, " with an answer to number "),
        (|answer, _| answer[4] = 5, "answered READ with an error that is none (0x5)"),
        (|answer, _| answer[4..8].fill(0xff), "answered READ with error 1 and with "),
    ];
    for (lie, sentence) in lies {
        let scratch = Scratch::new();
        let socket = scratch.path("made.sock");
        let (_seen, server) = made_here::start(&socket, 3, lie);
        let mut mounted = Mounted::of(scratch, &socket, None, &[]);
        let read = File::open(mounted.seen.join("file")).and_then(|file| file.read_at(&mut [0; 100], 0));
        assert!(read.is_err(), "{sentence}");
        let (code, said) = mounted.ended();
        assert!(code == Some(1) && said.lines().nth(1).unwrap().contains(sentence), "{sentence}: {said}");
        server.join().unwrap();
    }
}

#[test]
fn a_server_that_says_it_has_fewer_queues_than_it_has() {
    let scratch = Scratch::new();
    let socket = scratch.path("made.sock");
    let (_seen, server) = made_here::start(&socket, 1, truth);
    let ended = probe(&["mount", socket.to_str().unwrap(), "/", "--queues", "2"]);
    assert_eq!(ended.err, "outboard-probe: The server has 1 request queue, and 2 are asked for\n");
    server.join().unwrap();
}
