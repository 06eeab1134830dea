//! What each option of our server does, as far as no other test is about it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};
use serde_json::Value;
use suite::virtiofsd::Whose;
use suite::{Scratch, program, run};

use super::mounted::{Mounted, can_mount, serve};

/// What a guest is offered.
fn offered(words: &[&str]) -> (Vec<String>, u64) {
    let scratch = Scratch::new();
    let (server, _) = serve(Whose::Ours, &scratch, words);
    let ended = run(Command::new(program("outboard-probe")).args(["fs", "info", "--json"]).arg(&server.socket));
    let told: Value = serde_json::from_str(&ended.out).unwrap();
    let flags = told["fuse_flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap().to_owned()).collect();
    (flags, told["request_queues"].as_u64().unwrap())
}

#[test]
fn a_guest_is_offered_what_was_asked_for() {
    let plain = offered(&["--thread-pool-size", "1", "--poll-limit", "0"]);
    assert_eq!(plain.1, 1);
    let cases: [(&[&str], &str, bool); 11] = [
        (&["--no-readdirplus"], "DO_READDIRPLUS", false),
        (&["--no-announce-submounts"], "SUBMOUNTS", false),
        (&["--no-announce-submounts", "--announce-submounts"], "SUBMOUNTS", true),
        (&["--writeback"], "WRITEBACK_CACHE", true),
        (&["--posix-acl"], "POSIX_ACL", true),
        (&["--posix-acl=never"], "POSIX_ACL", false),
        (&["--killpriv-v2"], "HANDLE_KILLPRIV_V2", true),
        (&["--killpriv-v2", "--no-killpriv-v2"], "HANDLE_KILLPRIV_V2", false),
        (&["--allow-mmap", "--cache", "never"], "DIRECT_IO_ALLOW_MMAP", true),
        (&["--locks", "host"], "POSIX_LOCKS", true),
        (&["--cache", "always"], "NO_OPENDIR_SUPPORT", true),
    ];
    for (words, flag, expected) in cases {
        let has = |flags: &[String]| flags.iter().any(|one| one == flag);
        assert_eq!(has(&offered(words).0), expected, "{words:?}");
        // The last word counts, and these say what is so without them.
        let usual = [
            &["--no-announce-submounts", "--announce-submounts"][..],
            &["--posix-acl=never"],
            &["--killpriv-v2", "--no-killpriv-v2"],
        ];
        assert_eq!(has(&plain.0) == expected, usual.contains(&words), "{words:?}");
    }
    assert_eq!(offered(&["--num-request-queues", "3"]).1, 3);
}

#[test]
fn what_a_guest_believes_and_for_how_long() {
    if !can_mount("what a guest believes") {
        return;
    }
    let mut mounted = Mounted::ours(&["--timeout", "60", "--negative-timeout", "60"], &[]);
    let (here, there) = mounted.both("later");
    assert!(fs::metadata(&here).is_err());
    fs::write(&there, "x").unwrap();
    assert!(fs::metadata(&here).is_err(), "it was told that there is none");
    let (here, there) = mounted.both("grows");
    fs::write(&there, "x").unwrap();
    assert_eq!(fs::metadata(&here).unwrap().len(), 1);
    fs::write(&there, "xyz").unwrap();
    sleep(Duration::from_millis(1500));
    assert_eq!(fs::metadata(&here).unwrap().len(), 1, "it was told how long it is");
    mounted.unmount();
    let mut mounted = Mounted::ours(&[], &[]);
    let (here, there) = mounted.both("soon");
    assert!(fs::metadata(&here).is_err());
    fs::write(&there, "x").unwrap();
    assert_eq!(fs::metadata(&here).unwrap().len(), 1, "otherwise it asks each time");
    fs::write(&there, "xyz").unwrap();
    sleep(Duration::from_millis(1500));
    assert_eq!(fs::metadata(&here).unwrap().len(), 3, "and a second later");
    mounted.unmount();
}

#[test]
fn users_are_translated_both_ways() {
    if !can_mount("users that are translated") {
        return;
    }
    let words = [
        "--translate-uid",
        "map:1000:2000:10",
        "--translate-gid",
        "squash-host:0:77:100000",
        "--translate-uid",
        "forbid-guest:5:1",
    ];
    let mut mounted = Mounted::ours(&words, &[]);
    let (here, there) = mounted.both("file");
    fs::write(&there, "").unwrap();
    chown(&there, Some(2005), Some(3)).unwrap();
    let about = fs::metadata(&here).unwrap();
    assert_eq!((about.uid(), about.gid()), (1005, 77));
    chown(&here, Some(1003), None).unwrap();
    assert_eq!(fs::metadata(&there).unwrap().uid(), 2003);
    assert_eq!(chown(&here, Some(5), None).unwrap_err().raw_os_error(), Some(libc::EPERM));
    mounted.unmount();
}

/// Mounts in the directory are not in the share, where that is asked for.
#[test]
fn mounts_that_are_not_shared() {
    if !can_mount("mounts that are not shared") {
        return;
    }
    let scratch = Scratch::new();
    let inner = scratch.path("house").join("inner");
    fs::create_dir_all(&inner).unwrap();
    assert_eq!(run(Command::new("mount").args(["-t", "tmpfs", "inner"]).arg(&inner)).code, Some(0));
    fs::write(inner.join("file"), "x").unwrap();
    for (words, seen) in [(&["--no-submounts"][..], false), (&[], true)] {
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.arg("--shared-dir").arg(scratch.path("house")).args(words);
        let place = Scratch::new();
        let server = suite::virtiofsd::Virtiofsd::launch_ours(command, place.path("fs.sock"));
        let socket = server.socket.clone();
        let mut mounted = Mounted::of(place, &socket, Some(server), &[]);
        assert_eq!(fs::metadata(mounted.seen.join("inner/file")).is_ok(), seen, "{words:?}");
        mounted.unmount();
    }
    assert_eq!(run(Command::new("umount").arg(&inner)).code, Some(0));
}

/// Who does not want the time of access changed is obeyed, where that is asked for.
#[test]
fn the_time_of_access() {
    if !can_mount("the time of access") {
        return;
    }
    for (words, kept) in [(&["--preserve-noatime", "--cache", "never"][..], true), (&["--cache", "never"], false)] {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("file");
        fs::write(&there, "content").unwrap();
        let long_ago = Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
        let times = Timestamps { last_access: long_ago, last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT } };
        utimensat(CWD, &there, &times, rustix::fs::AtFlags::empty()).unwrap();
        let mut file = File::options().read(true).custom_flags(libc::O_NOATIME).open(&here).unwrap();
        file.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(fs::metadata(&there).unwrap().atime() == 1_000_000_000, kept, "{words:?}");
        drop(file);
        mounted.unmount();
    }
}

#[test]
fn what_cannot_be_had_is_told_with_what_to_do() {
    let cases: [(&[&str], &str); 16] = [
        (&["--sandbox", "none"], "no way to run unconfined"),
        (&["--sandbox", "chroot"], "leave it out"),
        (&["--seccomp", "none"], "is ended, always"),
        (&["--modcaps=+sys_admin"], "--owner-map"),
        (&["--socket-group", "kvm"], "--fd"),
        (&["--syslog"], "standard error"),
        (&["-o", "source=/"], "by its own name"),
        (&["--xattrmap", ":ok:all:::"], "not known yet"),
        (&["--security-label"], "Leave it out"),
        (&["--migration-mode", "file-handles"], "in the share or not"),
        (&["--migration-mode", "names"], "only find-paths"),
        (&["--rlimit-nofile", "100"], "at least"),
        (&["--posix-acl", "--translate-uid", "guest:0:1:1"], "not translated"),
        (&["--writeback", "--cache", "never"], "--cache never"),
        (&["--owner-map", "mine"], "neither me, nor squash, nor exact"),
        (&["--max-inodes", "5"], "1024"),
    ];
    let scratch = Scratch::new();
    for (words, expected) in cases {
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.arg("--shared-dir").arg(scratch.path("")).arg("--socket-path").arg(scratch.path("s"));
        let ended = run(command.args(words));
        assert!(ended.code.is_some_and(|code| code != 0) && ended.err.contains(expected), "{words:?}: {}", ended.err);
        assert!(!scratch.path("s").exists(), "{words:?}");
    }
    let fine = ["--sandbox", "namespace", "--seccomp", "kill", "--inode-file-handles", "prefer", "-f", "--security-label=never"];
    assert_eq!(offered(&fine).1, 1);
}
