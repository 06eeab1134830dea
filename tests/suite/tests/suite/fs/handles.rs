//! Inodes that are reached by handles of their file system, whatever happens to their names.

use std::fs;
use std::path::Path;
use std::process::Command;

use libc::{ESTALE, O_RDWR};
use probe::fs::message::{self, ROOT};
use probe::fs::raw::{Raw, Told};
use rustix::process::geteuid;
use suite::share::Shared;
use suite::{Scratch, program, run, status};

fn is_root(test: &str) -> bool {
    if !geteuid().is_root() {
        println!("skipped: {test} takes root, as which files are reached by handles");
    }
    geteuid().is_root()
}

/// More inodes than descriptors are kept for.
const MANY: usize = 500;

fn furnish(house: &Path) {
    fs::create_dir_all(house.join("above/folder/below")).unwrap();
    fs::write(house.join("above/folder/file"), "content").unwrap();
    for number in 0..MANY {
        fs::write(house.join(format!("other {number}")), "").unwrap();
    }
}

/// What a guest finds of things it knows, after the host has given another name to each and to what is above.
fn renamed(guest: &mut Raw, house: &Path, expected: i32) {
    let above = guest.lookup(ROOT, "above").unwrap();
    let folder = guest.lookup(above, "folder").unwrap();
    let file = guest.lookup(folder, "file").unwrap();
    let handle = guest.open_file(file, O_RDWR).unwrap();
    guest.ask(&message::release(file, handle)).unwrap();
    // What was opened is evicted: asked about twice, each of the others has had a descriptor.
    for number in 0..MANY {
        let other = guest.lookup(ROOT, format!("other {number}")).unwrap();
        for _ in 0..2 {
            guest.ask(&message::getattr(other)).unwrap();
        }
    }
    fs::rename(house.join("above/folder/file"), house.join("above/folder/moved file")).unwrap();
    fs::rename(house.join("above/folder"), house.join("moved folder")).unwrap();
    fs::rename(house.join("above"), house.join("moved above")).unwrap();
    let requests = [
        message::getattr(folder),
        message::getattr(file),
        message::lookup(folder, "below"),
        message::mkdir(folder, "made", 0o755),
        message::truncate(file, 3),
        message::open(file, O_RDWR),
        message::setxattr(file, "user.own", b"1"),
        message::opendir(folder),
    ];
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(guest.call(request).unwrap().error, expected, "{index}");
    }
}

#[test]
fn what_the_host_renames_is_not_lost() {
    if !is_root("--inode-file-handles") {
        return;
    }
    let few = ["--rlimit-nofile", "500", "--xattr"];
    for (how, expected) in [("mandatory", 0), ("prefer", 0), ("never", ESTALE)] {
        let shared = Shared::new(&[&few[..], &["--inode-file-handles", how]].concat(), furnish);
        let mut guest = shared.guest();
        renamed(&mut guest, &shared.house, expected);
        assert_eq!(shared.house.join("moved folder/made").is_dir(), expected == 0, "{how}");
        let content = fs::read_to_string(shared.house.join("moved folder/moved file")).unwrap();
        assert_eq!(content, if expected == 0 { "con" } else { "content" }, "{how}");
        let open = fs::read_dir(format!("/proc/{}/fd", shared.server.worker())).unwrap().count();
        assert!(open < 400, "{open} descriptors");
    }
}

/// What is gone is gone, and what has its name is something else.
#[test]
fn a_name_that_leads_to_another_file() {
    if !is_root("--inode-file-handles") {
        return;
    }
    let shared = Shared::new(&["--inode-file-handles", "mandatory"], |house| {
        fs::write(house.join("replaced"), "old").unwrap();
        fs::write(house.join("kept"), "kept").unwrap();
    });
    let mut guest = shared.guest();
    let (replaced, kept) = (guest.lookup(ROOT, "replaced").unwrap(), guest.lookup(ROOT, "kept").unwrap());
    fs::rename(shared.house.join("kept"), shared.house.join("away")).unwrap();
    fs::write(shared.house.join("kept"), "another").unwrap();
    fs::remove_file(shared.house.join("replaced")).unwrap();
    fs::write(shared.house.join("replaced"), "new").unwrap();
    for request in [message::getattr(replaced), message::open(replaced, O_RDWR), message::truncate(replaced, 0)] {
        assert_eq!(guest.call(&request).unwrap().error, ESTALE);
    }
    assert_eq!(Told::attr(&guest.ask(&message::getattr(kept)).unwrap()).size, 4);
    let handle = guest.open_file(kept, O_RDWR).unwrap();
    assert_eq!(guest.ask(&message::read(kept, handle, 0, 100)).unwrap(), b"kept");
    assert_eq!(fs::read_to_string(shared.house.join("replaced")).unwrap(), "new");
}

#[test]
fn where_there_are_no_handles() {
    if !is_root("--inode-file-handles") {
        return;
    }
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    assert_eq!(run(Command::new("mount").args(["-t", "ramfs", "none"]).arg(&house)).code, Some(0));
    let refused = |words: &[&str]| {
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.arg("--shared-dir").arg(&house).arg("--socket-path").arg(scratch.path("s"));
        let ended = run(command.args(["--inode-file-handles", "mandatory"]).args(words));
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        ended.err
    };
    let without = refused(&[]);
    let ended = run(Command::new("umount").arg(&house));
    assert!(without.contains("by their handles (--inode-file-handles=mandatory)"), "{without}");
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for words in [&["--owner-map", "me"][..], &["--uid-map", ":0:0:65536:", "--gid-map", ":0:0:65536:"]] {
        assert!(refused(words).contains("takes root as itself"), "{words:?}");
    }
    // Whoever would only prefer them is served, and has no right to them.
    let words = ["--inode-file-handles", "prefer", "--owner-map", "me", "--xattr", "--rlimit-nofile", "500"];
    let shared = Shared::new(&words, furnish);
    renamed(&mut shared.guest(), &shared.house, ESTALE);
}

/// The numbers of the file system are small, and kept in the table.
#[test]
fn memory_of_an_inode() {
    const INODES: u64 = 40_000;
    if !is_root("--inode-file-handles") {
        return;
    }
    let resident = |shared: &Shared| -> u64 {
        status(shared.server.worker(), "RssAnon").trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    };
    let shared = Shared::new(&["--inode-file-handles", "mandatory", "--cache", "never"], |house| {
        for number in 0..INODES {
            fs::write(house.join(format!("file-{number:05}")), "").unwrap();
        }
    });
    let mut guest = shared.guest();
    guest.lookup(ROOT, "file-00000").unwrap();
    let before = resident(&shared);
    for number in 0..INODES {
        guest.lookup(ROOT, format!("file-{number:05}")).unwrap();
    }
    let each = resident(&shared).saturating_sub(before) / INODES;
    println!("{each} bytes for each inode");
    assert!((60..=160).contains(&each), "{each} bytes for each inode");
}
