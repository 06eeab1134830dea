//! What each option of our server does, as far as no other test is about it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};
use rustix::process::geteuid;
use serde_json::Value;
use suite::counters::Counters;
use suite::virtiofsd::{Virtiofsd, Whose};
use suite::{Scratch, Server, program, run};

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
    let cases: [(&[&str], &str, bool); 15] = [
        (&["--no-readdirplus"], "DO_READDIRPLUS", false),
        (&["--no-announce-submounts"], "SUBMOUNTS", false),
        (&["--no-announce-submounts", "--announce-submounts"], "SUBMOUNTS", true),
        (&["--writeback"], "WRITEBACK_CACHE", true),
        (&["--posix-acl"], "POSIX_ACL", true),
        (&["--posix-acl=never"], "POSIX_ACL", false),
        (&["--security-label"], "SECURITY_CTX", true),
        (&["--security-label=auto"], "SECURITY_CTX", true),
        (&["--security-label=never"], "SECURITY_CTX", false),
        (&["--killpriv-v2"], "HANDLE_KILLPRIV_V2", true),
        (&["--killpriv-v2", "--no-killpriv-v2"], "HANDLE_KILLPRIV_V2", false),
        (&["--allow-mmap", "--cache", "never"], "DIRECT_IO_ALLOW_MMAP", true),
        (&["--locks", "host"], "POSIX_LOCKS", true),
        (&["--cache", "always"], "NO_OPENDIR_SUPPORT", true),
        (&["--cache", "always", "--readonly"], "NO_OPEN_SUPPORT", true),
    ];
    for (words, flag, expected) in cases {
        let has = |flags: &[String]| flags.iter().any(|one| one == flag);
        assert_eq!(has(&offered(words).0), expected, "{words:?}");
        // The last word counts, and these say what is so without them.
        let usual = [
            &["--no-announce-submounts", "--announce-submounts"][..],
            &["--posix-acl=never"],
            &["--security-label=never"],
            &["--killpriv-v2", "--no-killpriv-v2"],
        ];
        assert_eq!(has(&plain.0) == expected, usual.contains(&words), "{words:?}");
    }
    for words in [&["--cache", "always"][..], &["--readonly"], &["--cache", "always", "--readonly", "--locks", "host"]] {
        assert!(!offered(words).0.contains(&"NO_OPEN_SUPPORT".to_owned()), "{words:?}");
    }
    assert_eq!(offered(&["--num-request-queues", "3"]).1, 3);
}

/// As libvirt and others wrote it once.
#[test]
fn options_as_they_were_once_written() {
    if !can_mount("-o source=") {
        return;
    }
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    let mut command = Command::new(program("outboard-virtiofsd"));
    command.args(["--tag", "house", "-o"]).arg(format!("source={},cache=none,no_readdirplus", house.display()));
    command.args(["-oxattr,no_posix_lock", "-f"]);
    let server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
    let ended = run(Command::new(program("outboard-probe")).args(["fs", "info"]).arg(&server.socket));
    assert!(ended.code == Some(0) && !ended.out.contains("READDIRPLUS"), "{}", ended.out);
    let socket = server.socket.clone();
    let mut mounted = Mounted::of(scratch, &socket, Some(server), &[]);
    let (here, there) = mounted.both("file");
    fs::write(&there, "x").unwrap();
    assert_eq!(fs::metadata(&here).unwrap().len(), 1);
    fs::write(&there, "xyz").unwrap();
    assert_eq!(fs::metadata(&here).unwrap().len(), 3, "nothing is kept");
    rustix::fs::setxattr(&here, "user.own", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    mounted.unmount();
}

#[test]
fn files_that_are_only_read_and_kept_need_not_be_opened() {
    if !can_mount("files that are not opened") {
        return;
    }
    const FILES: usize = 200;
    let counters = Counters::new();
    let mut mounted = Mounted::ours(&["--readonly", "--cache", "always", "--metrics-fd", &counters.fd()], &[]);
    let requests = || counters.count("virtiofsd_requests");
    let content = |number: usize| format!("{number} ").repeat(1 + number).into_bytes();
    for number in 0..FILES {
        fs::write(mounted.house.join(number.to_string()), content(number)).unwrap();
    }
    // The first file tells the guest that it need not open any, and that what it would tell at the end nobody wants to hear.
    assert_eq!(fs::read(mounted.seen.join("0")).unwrap(), content(0));
    let before = requests();
    for number in 1..FILES {
        // To read all of it, the library would ask for the time of birth, too.
        let mut bytes = [0; 4096];
        let len = File::open(mounted.seen.join(number.to_string())).unwrap().read(&mut bytes).unwrap();
        assert_eq!(bytes[..len], content(number), "{number}");
    }
    let each = (requests() - before) as f64 / FILES as f64;
    assert!(each < 2.5, "a lookup and a read, not {each}");
    let file = File::open(mounted.seen.join("7")).unwrap();
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)), Ok(content(7).len() as u64));
    file.sync_all().unwrap();
    assert_eq!(file.metadata().unwrap().len(), content(7).len() as u64);
    assert!(File::open(mounted.seen.join("none")).is_err());
    drop(file);
    let refused = |done: std::io::Result<()>| done.unwrap_err().raw_os_error() == Some(libc::EROFS);
    assert!(refused(File::create(mounted.seen.join("7")).map(drop)), "it cannot be emptied");
    // Nobody is asked when it is opened, so the error comes with the first byte.
    let mut file = OpenOptions::new().append(true).open(mounted.seen.join("7")).unwrap();
    assert!(refused(file.write_all(b"x")));
    assert_eq!(fs::read(mounted.house.join("7")).unwrap(), content(7));
    drop(file);
    mounted.unmount();
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
        let server = Virtiofsd::launch_ours(command, place.path("fs.sock"));
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

/// Whoever is in the group may connect, and nobody else but the owner.
#[test]
fn a_socket_of_a_group() {
    const OWNER: u32 = 1234;
    const GROUP: u32 = 4567;
    if !geteuid().is_root() {
        println!("skipped: groups of a socket need root");
        return;
    }
    let scratch = Scratch::new();
    let (house, place, programs) = (scratch.path("house"), scratch.path("place"), scratch.path("programs"));
    for folder in [&house, &place, &programs] {
        fs::create_dir(folder).unwrap();
        chown(folder, Some(OWNER), None).unwrap();
        fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(scratch.path(""), Permissions::from_mode(0o755)).unwrap();
    let copy = |name: &str| {
        fs::copy(program(name), programs.join(name)).unwrap();
        programs.join(name)
    };
    let (server, probe, socket) = (copy("outboard-virtiofsd"), copy("outboard-probe"), place.join("fs.sock"));
    let by = |user: u32, groups: &str, program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user.to_string(), "--regid", "99", "--groups", groups]).arg(program);
        command
    };
    let serve = |groups: &str, group: &str| {
        let mut command = by(OWNER, groups, &server);
        command.arg("--shared-dir").arg(&house).args(["--tag", "house", "--socket-group", group]);
        command
    };
    let (root, number) = ("root".to_owned(), GROUP.to_string());
    let mut refused = serve("98", &number);
    let ended = run(refused.arg("--socket-path").arg(&socket));
    assert_eq!(ended.code, Some(1));
    let said = "to the group 4567 of --socket-group, which its user has to be a member of (usermod -aG), or root: ";
    assert!(ended.err.contains(said) && fs::read_dir(&place).unwrap().count() == 0, "{}", ended.err);
    let mut unknown = serve("98", "no such group");
    let ended = run(unknown.arg("--socket-path").arg(&socket));
    assert!(ended.err.contains("/etc/group has no such group"), "{}", ended.err);
    let ended = run(serve("98", &number).args(["--fd", "3"]));
    assert!(ended.code == Some(2) && ended.err.contains("--socket-path"), "{}", ended.err);
    for (group, gid) in [(number, GROUP), (root, 0)] {
        let mut server = Virtiofsd::launch_ours(serve(&gid.to_string(), &group), socket.clone());
        let about = fs::metadata(&socket).unwrap();
        assert_eq!((about.uid(), about.gid(), about.mode() & 0o7777), (OWNER, gid, 0o660));
        let info = |user: u32, groups: &str| run(by(user, groups, &probe).args(["fs", "info"]).arg(&socket)).code;
        assert_eq!([info(77, &gid.to_string()), info(OWNER, "98"), info(77, "98")], [Some(0), Some(0), Some(1)]);
        server.end();
        assert!(!socket.exists());
    }
}

/// Lines arrive as datagrams, and a log that nobody reads holds nothing up.
#[test]
fn the_log_of_the_host() {
    if !geteuid().is_root() {
        println!("skipped: a /dev/log of its own needs root");
        return;
    }
    let scratch = Scratch::new();
    let (house, old) = (scratch.path("house"), scratch.path("dev"));
    for folder in [&house, &old] {
        fs::create_dir(folder).unwrap();
    }
    let log = scratch.path("log");
    let script = format!(
        "mount --rbind /dev {0}; mount -t tmpfs tmpfs /dev; touch /dev/null; mount --bind {0}/null /dev/null; ln -s {1} /dev/log",
        old.display(),
        log.display()
    );
    let house = house.to_str().unwrap();
    let start = |words: &[&str]| {
        let words = [&["--shared-dir", house, "--tag", "house", "--syslog", "--log-level", "info"], words].concat();
        Server::start_after(&script, "outboard-virtiofsd", &scratch, &words)
    };
    let lines = |words: &[&str]| {
        let receiver = UnixDatagram::bind(&log).unwrap();
        let server = start(words);
        let pid = server.worker();
        // More than the kernel keeps for a receiver that does not look.
        for _ in 0..40 {
            assert_eq!(run(Command::new(program("outboard-probe")).args(["fs", "info"]).arg(&server.socket)).code, Some(0));
        }
        assert_eq!(server.terminate(), Some(0));
        receiver.set_nonblocking(true).unwrap();
        let mut room = [0; 4096];
        let lines =
            std::iter::from_fn(|| receiver.recv(&mut room).ok().map(|len| String::from_utf8_lossy(&room[..len]).into_owned()));
        let lines: Vec<String> = lines.collect();
        fs::remove_file(&log).unwrap();
        (pid, lines)
    };
    let (pid, text) = lines(&[]);
    assert_eq!(text[0], format!("<30>outboard-virtiofsd[{pid}]: a frontend has come"));
    let (pid, json) = lines(&["--log-format", "json"]);
    let start = format!("<30>outboard-virtiofsd[{pid}]: ");
    let line: Value = serde_json::from_str(json[0].strip_prefix(&start).unwrap()).unwrap();
    assert_eq!(line["message"], "a frontend has come");
    let mut nobody = Command::new("unshare");
    nobody.args(["--mount", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]).arg(program("outboard-virtiofsd"));
    let ended = run(nobody.args(["--shared-dir", house, "--syslog"]).arg("--socket-path").arg(scratch.path("s")));
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.err.contains("Cannot reach the host's log at /dev/log (without --syslog it is standard error)"),
        "{}",
        ended.err
    );
    assert!(!scratch.path("s").exists());
}

#[test]
fn what_cannot_be_had_is_told_with_what_to_do() {
    let cases: [(&[&str], &str); 17] = [
        (&["--sandbox", "none"], "no way to run unconfined"),
        (&["--sandbox", "chroot"], "leave it out"),
        (&["--seccomp", "none"], "is ended, always"),
        (&["--modcaps=+sys_admin"], "--owner-map"),
        (&["-o", "source=/"], "-o source=/ cannot be used with --shared-dir"),
        (&["-osandbox=none"], "no way to run unconfined"),
        (&["-o", "xattr", "-fo", "no_xattr"], "a word by itself"),
        (&["-o", "xattr,vhost_user_socket=/s"], "-o vhost_user_socket=/s: there is no such option"),
        (&["--xattrmap", ":ok:all::: :map:user.:"], "rule 2: it ends before its prepend does"),
        (&["--xattrmap", ":map::user.virtiofs.:", "--posix-acl"], "/ok/all/system.posix_acl_/system.posix_acl_/"),
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
