//! A guest moves from one server to another, as it does between two hosts: it goes on with the inodes and the open files that it has.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use libc::{EBADF, ESTALE, O_APPEND, O_RDONLY, O_RDWR, O_WRONLY};
use probe::device::Device;
use probe::fs::message::{self, Message, ROOT, op};
use probe::fs::raw::{Raw, Told, URGENT, long, node_of, word};
use suite::share::{Canary, Shared};
use suite::virtiofsd::Virtiofsd;
use suite::{Scratch, Server, program, run};

/// Servers of some folders.
struct Hosts {
    scratch: Scratch,
    count: usize,
}

/// One of them.
struct Host {
    server: Server,
    log: File,
    _own: Scratch,
}

impl Hosts {
    fn new() -> Hosts {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path("house")).unwrap();
        Hosts { scratch, count: 0 }
    }

    fn house(&self) -> PathBuf {
        self.scratch.path("house")
    }

    /// The same files, on another host's disk.
    fn copy(&mut self) -> PathBuf {
        self.count += 1;
        let there = self.scratch.path(&format!("copy{}", self.count));
        assert_eq!(run(Command::new("cp").arg("-a").arg(self.house()).arg(&there)).code, Some(0));
        there
    }

    fn serve(&self, folder: &Path, words: &[&str]) -> Host {
        let own = Scratch::new();
        let path = folder.display().to_string();
        let fixed = ["--log-level", "warn", "--shared-dir", &path, "--num-request-queues", "2"];
        let log = File::options().read(true).write(true).create(true).truncate(true).open(own.path("log")).unwrap();
        let all = [&fixed, words].concat();
        let server = Server::start_with_log("outboard-virtiofsd", &own, &all, log.try_clone().unwrap());
        Host { server, log, _own: own }
    }
}

impl Host {
    fn guest(&self) -> Raw {
        Raw::begin(self.connect(), 2).unwrap()
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.server.socket).unwrap()
    }

    /// A guest that comes with a state, and is taken.
    fn take(&self, state: &[u8]) -> Raw {
        let taken = |device: &mut Device| {
            assert!(device.load_state(state)?, "the state is taken: {}", self.said());
            Ok(())
        };
        Raw::open_after(self.connect(), 2, taken).unwrap()
    }

    /// A guest that comes with a state which is not taken.
    fn refuse(&self, state: &[u8]) -> Raw {
        let refused = |device: &mut Device| {
            assert!(!device.load_state(state)?, "the state is not taken");
            Ok(())
        };
        Raw::open_after(self.connect(), 2, refused).unwrap()
    }

    fn said(&self) -> String {
        let mut log = self.log.try_clone().unwrap();
        let mut text = String::new();
        log.rewind().unwrap();
        log.read_to_string(&mut text).unwrap();
        text
    }
}

fn names(reply: &[u8]) -> Vec<(String, u64)> {
    let mut rest = reply;
    let mut found = Vec::new();
    while rest.len() >= 24 {
        let (place, len) = (long(rest, 8), usize::try_from(word(rest, 16)).unwrap());
        found.push((String::from_utf8_lossy(&rest[24..24 + len]).into_owned(), place));
        rest = &rest[(24 + len).next_multiple_of(8)..];
    }
    found
}

/// Reads a directory from a place on, in small pieces.
fn list(guest: &mut Raw, node: u64, handle: u64, from: u64) -> Vec<String> {
    let (mut all, mut at) = (Vec::new(), from);
    loop {
        let piece = names(&guest.ask(&message::readdir(node, handle, at, 512, false)).unwrap());
        let Some((_, last)) = piece.last() else { return all };
        at = *last;
        all.extend(piece.into_iter().map(|(name, _)| name));
    }
}

fn told(guest: &mut Raw, node: u64) -> Told {
    Told::attr(&guest.ask(&message::getattr(node)).unwrap())
}

fn forget(guest: &mut Raw, node: u64, count: u64) {
    let bytes = message::forget(node, count).bytes(guest.next_unique());
    let ticket = guest.post_bytes(URGENT, &bytes).unwrap();
    guest.wait(ticket).unwrap();
}

#[test]
fn a_guest_goes_on_with_what_it_has() {
    goes_on(&[]);
}

/// Who talks to the frontend may not open files by handles, and finds all by their names.
#[test]
fn a_guest_goes_on_whose_inodes_are_found_by_handles() {
    if rustix::process::geteuid().is_root() {
        goes_on(&["--inode-file-handles", "mandatory", "--rlimit-nofile", "600"]);
    }
}

fn goes_on(words: &[&str]) {
    for same in [true, false] {
        let mut hosts = Hosts::new();
        let house = hosts.house();
        fs::create_dir_all(house.join("a/b/c/d/e/f")).unwrap();
        fs::write(house.join("a/b/c/d/e/f/deep"), "deep down").unwrap();
        fs::write(house.join("read"), "to be read").unwrap();
        fs::write(house.join("write"), "to be written").unwrap();
        fs::write(house.join("add"), "begin").unwrap();
        fs::create_dir(house.join("many")).unwrap();
        (0..200).for_each(|n| drop(File::create(house.join(format!("many/file-{n}"))).unwrap()));
        std::os::unix::fs::symlink("read", house.join("link")).unwrap();

        let source = hosts.serve(&house, words);
        let mut guest = source.guest();
        let mut at = ROOT;
        for name in ["a", "b", "c", "d", "e", "f"] {
            at = guest.lookup(at, name).unwrap();
        }
        let (folder, deep) = (at, guest.lookup(at, "deep").unwrap());
        let [read, write, add, link, many] =
            ["read", "write", "add", "link", "many"].map(|name| guest.lookup(ROOT, name).unwrap());
        let reading = guest.open_file(read, O_RDONLY).unwrap();
        let writing = guest.open_file(write, O_RDWR).unwrap();
        let adding = guest.open_file(add, O_WRONLY | O_APPEND).unwrap();
        let (made, making) = guest.create(folder, "made", O_RDWR, 0o640).unwrap();
        guest.ask(&message::write(made, making, 0, b"made there")).unwrap();
        let listing = long(&guest.ask(&message::opendir(many)).unwrap(), 0);
        let first = names(&guest.ask(&message::readdir(many, listing, 0, 2048, false)).unwrap());
        let state = guest.device.save_state().unwrap();

        let there = if same { house.clone() } else { hosts.copy() };
        let target = hosts.serve(&there, words);
        drop(guest);
        let mut guest = target.take(&state);
        let about = told(&mut guest, deep);
        assert_eq!((about.size, about.ino), (9, fs::metadata(there.join("a/b/c/d/e/f/deep")).unwrap().ino()));
        assert_eq!(guest.lookup(folder, "deep").unwrap(), deep, "the number of a file stays");
        assert_eq!(guest.lookup(ROOT, "many").unwrap(), many);
        assert_eq!(guest.ask(&message::read(read, reading, 0, 100)).unwrap(), b"to be read");
        guest.ask(&message::write(write, writing, 6, b"was")).unwrap();
        assert_eq!(fs::read(there.join("write")).unwrap(), b"to be wastten");
        guest.ask(&message::write(add, adding, 0, b", end")).unwrap();
        assert_eq!(fs::read(there.join("add")).unwrap(), b"begin, end", "it was opened to be added to");
        assert_ne!(guest.call(&message::write(read, reading, 0, b"x")).unwrap().error, 0, "it was opened to be read");
        assert_eq!(guest.ask(&message::read(made, making, 0, 100)).unwrap(), b"made there");
        assert_eq!(guest.ask(&Message::new(op::READLINK, link, [])).unwrap(), b"read");
        let new = guest.create(folder, "new", O_RDWR, 0o600).unwrap();
        assert!(there.join("a/b/c/d/e/f/new").exists());
        assert!(![deep, folder, made, read, write, add, many, link].contains(&new.0));
        assert!(![reading, writing, adding, making, listing].contains(&new.1));

        // A directory is read on where it is the same one; where it is not, the guest is told so, and begins again.
        let from = first.last().unwrap().1;
        if same {
            let rest = list(&mut guest, many, listing, from);
            let mut all: Vec<_> =
                first.into_iter().map(|(name, _)| name).chain(rest).filter(|name| !name.starts_with('.')).collect();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), 200);
        } else {
            assert_eq!(guest.call(&message::readdir(many, listing, from, 512, false)).unwrap().error, ESTALE);
        }
        assert_eq!(list(&mut guest, many, listing, 0).len(), 202);

        for (node, handle) in [(read, reading), (write, writing), (add, adding), (made, making)] {
            guest.ask(&message::release(node, handle)).unwrap();
            assert_eq!(guest.call(&message::release(node, handle)).unwrap().error, EBADF);
        }
        forget(&mut guest, deep, 2);
        assert_eq!(
            guest.call(&message::getattr(deep)).unwrap().error,
            ESTALE,
            "its references have come along, and were given back"
        );
        // And on to a third, or back.
        let state = guest.device.save_state().unwrap();
        let third = hosts.serve(&there, &[]);
        let mut guest = third.take(&state);
        assert_eq!(told(&mut guest, made).size, 10);
        assert_eq!(guest.ask(&message::read(new.0, new.1, 0, 10)).unwrap(), b"");
    }
}

/// What the host does while the guest runs: whoever has a descriptor of a file finds it under its new name.
#[test]
fn names_that_the_host_has_changed() {
    let hosts = Hosts::new();
    let house = hosts.house();
    fs::create_dir_all(house.join("old/inner")).unwrap();
    fs::create_dir_all(house.join("some/where")).unwrap();
    fs::write(house.join("old/inner/file"), "content").unwrap();
    fs::write(house.join("other"), "another").unwrap();
    let source = hosts.serve(&house, &[]);
    let mut guest = source.guest();
    let old = guest.lookup(ROOT, "old").unwrap();
    let inner = guest.lookup(old, "inner").unwrap();
    let file = guest.lookup(inner, "file").unwrap();
    let other = guest.lookup(ROOT, "other").unwrap();
    let open = guest.open_file(file, O_RDWR).unwrap();
    let open_other = guest.open_file(other, O_RDWR).unwrap();
    fs::rename(house.join("old"), house.join("some/where/new")).unwrap();
    fs::rename(house.join("other"), house.join("some/strange \n name")).unwrap();
    fs::write(house.join("other"), "not this one").unwrap();
    let state = guest.device.save_state().unwrap_or_else(|error| panic!("{error:#}: {}", source.said()));
    let target = hosts.serve(&house, &[]);
    let mut guest = target.take(&state);
    assert_eq!(guest.ask(&message::read(file, open, 0, 100)).unwrap(), b"content");
    assert_eq!(guest.ask(&message::read(other, open_other, 0, 100)).unwrap(), b"another");
    let some = guest.lookup(ROOT, "some").unwrap();
    let place = guest.lookup(some, "where").unwrap();
    assert_eq!(guest.lookup(place, "new").unwrap(), old);
    assert_eq!(guest.lookup(inner, "file").unwrap(), file);
}

#[test]
fn what_has_no_name_cannot_move() {
    for (words, moves) in
        [(&[][..], false), (&["--migration-on-error", "abort"], false), (&["--migration-on-error", "guest-error"], true)]
    {
        let hosts = Hosts::new();
        let house = hosts.house();
        fs::write(house.join("gone"), "unlinked").unwrap();
        fs::write(house.join("taken"), "moved away").unwrap();
        fs::write(house.join("here"), "stays").unwrap();
        let source = hosts.serve(&house, words);
        let mut guest = source.guest();
        let [gone, taken, here] = ["gone", "taken", "here"].map(|name| guest.lookup(ROOT, name).unwrap());
        let [open, open_taken, open_here] = [gone, taken, here].map(|node| guest.open_file(node, O_RDWR).unwrap());
        guest.ask(&message::unlink(ROOT, "gone")).unwrap();
        fs::rename(house.join("taken"), hosts.scratch.path("outside")).unwrap();
        let saved = guest.device.save_state();
        if !moves {
            saved.unwrap_err();
            assert!(source.said().contains("\\\"gone\\\"") || source.said().contains("\"gone\""), "{}", source.said());
            assert!(source.said().contains("no name any more"), "{}", source.said());
            // The guest stays, and goes on.
            guest.device.start().unwrap();
            assert_eq!(guest.ask(&message::read(gone, open, 0, 100)).unwrap(), b"unlinked");
            guest.ask(&message::release(gone, open)).unwrap();
            guest.ask(&message::release(taken, open_taken)).unwrap();
            forget(&mut guest, gone, 1);
            forget(&mut guest, taken, 1);
            guest.device.save_state().expect("now it can move");
            continue;
        }
        let target = hosts.serve(&house, words);
        let mut guest = target.take(&saved.unwrap());
        for (node, handle) in [(gone, open), (taken, open_taken)] {
            assert_eq!(guest.call(&message::getattr(node)).unwrap().error, ESTALE);
            assert_eq!(guest.call(&message::read(node, handle, 0, 10)).unwrap().error, EBADF);
        }
        assert_eq!(guest.ask(&message::read(here, open_here, 0, 100)).unwrap(), b"stays");
        let (new, _) = guest.create(ROOT, "gone", O_RDWR, 0o600).unwrap();
        assert_ne!(new, gone);
        assert_eq!(guest.call(&message::getattr(gone)).unwrap().error, ESTALE);
    }
}

#[test]
fn what_is_not_on_the_other_host() {
    for (words, moves) in [(&[][..], false), (&["--migration-on-error", "guest-error"], true)] {
        let mut hosts = Hosts::new();
        let house = hosts.house();
        fs::create_dir_all(house.join("dir/sub")).unwrap();
        for name in ["missing", "kept", "changed", "dir/sub/file"] {
            fs::write(house.join(name), name).unwrap();
        }
        let source = hosts.serve(&house, &[]);
        let mut guest = source.guest();
        let [missing, kept, changed, dir] = ["missing", "kept", "changed", "dir"].map(|name| guest.lookup(ROOT, name).unwrap());
        let sub = guest.lookup(dir, "sub").unwrap();
        let file = guest.lookup(sub, "file").unwrap();
        let [open_missing, open_kept, open_changed, open_file] =
            [missing, kept, changed, file].map(|node| guest.open_file(node, O_RDWR).unwrap());
        let state = guest.device.save_state().unwrap();
        let there = hosts.copy();
        fs::remove_file(there.join("missing")).unwrap();
        fs::remove_file(there.join("changed")).unwrap();
        assert_eq!(run(Command::new("mkfifo").arg(there.join("changed"))).code, Some(0));
        fs::remove_dir_all(there.join("dir/sub")).unwrap();
        std::os::unix::fs::symlink("/etc", there.join("dir/sub")).unwrap();
        let target = hosts.serve(&there, words);
        if !moves {
            let mut guest = target.refuse(&state);
            assert!(target.said().contains("is not the same here"), "{}", target.said());
            guest.init(!0).unwrap();
            assert_eq!(guest.call(&message::getattr(kept)).unwrap().error, ESTALE, "nothing is known of what was refused");
            guest.lookup(ROOT, "kept").unwrap();
            continue;
        }
        let mut guest = target.take(&state);
        for (node, handle) in [(missing, open_missing), (changed, open_changed), (file, open_file)] {
            assert_eq!(guest.call(&message::getattr(node)).unwrap().error, ESTALE);
            assert_eq!(guest.call(&message::read(node, handle, 0, 10)).unwrap().error, EBADF);
        }
        assert_eq!(guest.call(&message::getattr(sub)).unwrap().error, ESTALE);
        assert_eq!(guest.ask(&message::read(kept, open_kept, 0, 10)).unwrap(), b"kept");
        assert_ne!(told(&mut guest, dir).ino, 0);
    }
}

/// Servers of an ordinary user, who is the guest's root.
#[test]
fn a_guest_of_an_ordinary_user() {
    const USER: u32 = 1000;
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir_all(house.join("dir")).unwrap();
    fs::write(house.join("dir/file"), "content").unwrap();
    for path in ["", "house", "house/dir", "house/dir/file"] {
        chown(scratch.path(path), Some(USER), Some(USER)).unwrap();
    }
    let serve = |name: &str| {
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.args(["--migration-verify-handles", "--num-request-queues", "2", "--shared-dir"]).arg(&house);
        command.uid(USER).gid(USER);
        Virtiofsd::launch_ours(command, scratch.path(name))
    };
    let (source, target) = (serve("a"), serve("b"));
    let mut guest = Raw::begin(UnixStream::connect(&source.socket).unwrap(), 2).unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let file = guest.lookup(dir, "file").unwrap();
    let open = guest.open_file(file, O_RDWR).unwrap();
    fs::rename(house.join("dir/file"), house.join("renamed")).unwrap();
    let state = guest.device.save_state().unwrap();
    let taken = |device: &mut Device| {
        assert!(device.load_state(&state)?);
        Ok(())
    };
    let mut guest = Raw::open_after(UnixStream::connect(&target.socket).unwrap(), 2, taken).unwrap();
    guest.ask(&message::write(file, open, 0, b"CON")).unwrap();
    assert_eq!(fs::read(house.join("renamed")).unwrap(), b"CONtent");
    assert_eq!(guest.lookup(ROOT, "renamed").unwrap(), file);
}

/// Its file system calls a file the same in both places, or it is not taken.
#[test]
fn only_the_same_files_are_taken_where_that_is_asked_for() {
    let mut hosts = Hosts::new();
    let house = hosts.house();
    fs::write(house.join("file"), "content").unwrap();
    let source =
        hosts.serve(&house, &["--migration-verify-handles", "--migration-confirm-paths", "--migration-mode", "find-paths"]);
    let mut guest = source.guest();
    let file = guest.lookup(ROOT, "file").unwrap();
    let state = guest.device.save_state().unwrap();
    let there = hosts.copy();
    let copy = hosts.serve(&there, &[]);
    drop(copy.refuse(&state));
    let same = hosts.serve(&house, &[]);
    let mut guest = same.take(&state);
    assert_eq!(told(&mut guest, file).size, 7);
}

/// Locks that are the host's stay behind, or the guest does.
#[test]
fn locks_of_the_host_cannot_move() {
    let hosts = Hosts::new();
    let house = hosts.house();
    fs::write(house.join("file"), "content").unwrap();
    let source = hosts.serve(&house, &["--locks", "host"]);
    let mut guest = source.guest();
    let file = guest.lookup(ROOT, "file").unwrap();
    let open = guest.open_file(file, O_RDWR).unwrap();
    let lock = |kind: i32, flock: bool| {
        let kind = u32::try_from(kind).unwrap();
        let body = [message::longs(&[open, 7, 0, u64::MAX >> 1]), message::words(&[kind, 0, u32::from(flock), 0])].concat();
        Message::new(32, file, body)
    };
    guest.ask(&lock(libc::F_WRLCK, true)).unwrap();
    guest.device.save_state().unwrap_err();
    assert!(source.said().contains("locks of this host cannot move"), "{}", source.said());
    guest.device.start().unwrap();
    guest.ask(&lock(libc::F_UNLCK, true)).unwrap();
    guest.device.save_state().unwrap();
    guest.device.start().unwrap();
    guest.ask(&lock(libc::F_WRLCK, false)).unwrap();
    guest.device.save_state().unwrap_err();
}

#[test]
fn a_server_with_other_options_takes_no_guest_that_relies_on_these() {
    let hosts = Hosts::new();
    let source = hosts.serve(&hosts.house(), &["--writeback"]);
    let mut guest = source.guest();
    let state = guest.device.save_state().unwrap();
    let target = hosts.serve(&hosts.house(), &[]);
    let mut guest = target.refuse(&state);
    assert!(target.said().contains("start both with the same options"), "{}", target.said());
    guest.init(!0).unwrap();
}

/// Many more than a pipe holds, and than there are descriptors for inodes.
#[test]
fn a_hundred_thousand_files() {
    const FOLDERS: usize = 200;
    const FILES: usize = 500;
    let hosts = Hosts::new();
    let house = hosts.house();
    for folder in 0..FOLDERS {
        let folder = house.join(folder.to_string());
        fs::create_dir(&folder).unwrap();
        (0..FILES).for_each(|n| drop(File::create(folder.join(format!("a-file-with-number-{n}"))).unwrap()));
    }
    let source = hosts.serve(&house, &[]);
    let mut guest = source.guest();
    let mut known = Vec::new();
    for folder in 0..FOLDERS {
        let node = guest.lookup(ROOT, folder.to_string()).unwrap();
        let handle = long(&guest.ask(&message::opendir(node)).unwrap(), 0);
        let mut at = 0;
        loop {
            let reply = guest.ask(&message::readdir(node, handle, at, 1 << 20, true)).unwrap();
            let mut rest = &reply[..];
            while rest.len() >= 152 {
                let len = usize::try_from(word(rest, 128 + 16)).unwrap();
                at = long(rest, 128 + 8);
                if node_of(rest) != 0 {
                    known.push(node_of(rest));
                }
                rest = &rest[(152 + len).next_multiple_of(8)..];
            }
            if reply.is_empty() {
                break;
            }
        }
        guest.ask(&Message::new(op::RELEASEDIR, node, message::longs(&[handle, 0, 0]))).unwrap();
    }
    assert_eq!(known.len(), FOLDERS * FILES);
    let begun = Instant::now();
    let state = guest.device.save_state().unwrap();
    let saved = begun.elapsed();
    assert!(state.len() > FOLDERS * FILES * 40, "{} bytes", state.len());
    let target = hosts.serve(&house, &[]);
    let begun = Instant::now();
    let mut guest = target.take(&state);
    println!("{} bytes, saved in {saved:?}, loaded in {:?}", state.len(), begun.elapsed());
    assert!(saved + begun.elapsed() < Duration::from_secs(20));
    for node in known.iter().step_by(997) {
        assert_eq!(told(&mut guest, *node).size, 0);
    }
    // More than it has room for is refused, and leaves it as it was.
    let small = hosts.serve(&house, &["--max-inodes", "1024"]);
    let mut guest = small.refuse(&state);
    guest.init(!0).unwrap();
    guest.lookup(ROOT, "1").unwrap();
}

/// A state, written by somebody who may say anything: the format is that of `virtiofsd::state`.
#[derive(Clone, Default)]
struct Forged {
    agreed: u64,
    inodes: Vec<(u64, u64, u8, Vec<u8>)>,
    opens: Vec<(u64, u64, u32)>,
    counts: Option<(u32, u32)>,
}

/// Types of inodes.
const DIRECTORY: u8 = 0o4;
const REGULAR: u8 = 0o10;
const SYMLINK: u8 = 0o12;
const PIPE: u8 = 0o1;

/// Numbers as a server could have given them.
const fn number(place: u64) -> u64 {
    77 << 32 | place << 6 | 3
}

impl Forged {
    fn inode(mut self, id: u64, parent: u64, kind: u8, name: &str) -> Forged {
        self.inodes.push((id, parent, kind, name.into()));
        self
    }

    fn open(mut self, handle: u64, node: u64, flags: i32) -> Forged {
        self.opens.push((handle, node, flags.cast_unsigned()));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let (inodes, opens) = (u32::try_from(self.inodes.len()).unwrap(), u32::try_from(self.opens.len()).unwrap());
        let (inodes, opens) = self.counts.unwrap_or((inodes, opens));
        let mut bytes = [&b"outbfs\x01\0"[..], &self.agreed.to_le_bytes(), &inodes.to_le_bytes()].concat();
        for (id, parent, kind, name) in &self.inodes {
            bytes.extend(message::longs(&[*id, *parent, 1]));
            bytes.extend([*kind, 0, u8::try_from(name.len()).unwrap()]);
            bytes.extend([&name[..], &[0]].concat());
        }
        bytes.extend(opens.to_le_bytes());
        for (handle, node, flags) in &self.opens {
            bytes.extend([message::longs(&[*handle, *node]), message::words(&[*flags]), vec![0; 12]].concat());
        }
        bytes
    }
}

fn furnish(house: &Path) {
    fs::create_dir_all(house.join("dir/sub")).unwrap();
    fs::write(house.join("file"), "content").unwrap();
    fs::write(house.join("dir/other"), "content").unwrap();
    fs::hard_link(house.join("file"), house.join("same")).unwrap();
    std::os::unix::fs::symlink("../beside", house.join("link")).unwrap();
    assert_eq!(run(Command::new("mkfifo").arg(house.join("pipe"))).code, Some(0));
}

/// After whatever it was given, a server serves.
fn serves(shared: &Shared, worker: u32) {
    assert_eq!(shared.server.worker(), worker, "it is still the same process");
    let mut guest = shared.guest();
    let file = guest.lookup(ROOT, "file").unwrap();
    let open = guest.open_file(file, O_RDONLY).unwrap();
    assert_eq!(guest.ask(&message::read(file, open, 0, 10)).unwrap(), b"content");
}

/// Gives a server these states one after the other, and says which it took.
fn give(shared: &Shared, states: impl IntoIterator<Item = Vec<u8>>) -> Vec<bool> {
    let mut taken = Vec::new();
    let give = |device: &mut Device| {
        for state in states {
            taken.push(device.load_state(&state)?);
        }
        Ok(())
    };
    Raw::open_after(shared.connect(), 1, give).unwrap();
    taken
}

#[test]
fn states_that_lead_nowhere_good_are_refused() {
    let [one, two, three] = [number(0), number(1), number(2)];
    let new = Forged::default;
    let file = || new().inode(one, ROOT, REGULAR, "file");
    let dir = || new().inode(one, ROOT, DIRECTORY, "dir");
    let bad: Vec<(&str, Forged)> = vec![
        ("no such flags", Forged { agreed: !0, ..new() }),
        ("..", new().inode(one, ROOT, DIRECTORY, "..")),
        (".", new().inode(one, ROOT, DIRECTORY, ".")),
        ("no name", new().inode(one, ROOT, DIRECTORY, "")),
        ("a path upwards", new().inode(one, ROOT, DIRECTORY, "../beside")),
        ("a path downwards", new().inode(one, ROOT, DIRECTORY, "dir/sub")),
        ("a path from the top", new().inode(one, ROOT, DIRECTORY, "/etc")),
        ("a zero in a name", new().inode(one, ROOT, REGULAR, "fi\0e")),
        ("the root's number", new().inode(ROOT, ROOT, DIRECTORY, "dir")),
        ("number 0", new().inode(0, ROOT, DIRECTORY, "dir")),
        ("a place that is none", new().inode(number((1 << 26) - 1), ROOT, DIRECTORY, "dir")),
        ("itself", new().inode(one, one, DIRECTORY, "dir")),
        ("each other", new().inode(one, two, DIRECTORY, "dir").inode(two, one, DIRECTORY, "sub")),
        ("a directory that comes later", new().inode(two, one, DIRECTORY, "sub").inode(one, ROOT, DIRECTORY, "dir")),
        ("a directory that does not come", new().inode(two, one, DIRECTORY, "sub")),
        ("a file as a directory", file().inode(two, one, REGULAR, "other")),
        ("a link as a directory", new().inode(one, ROOT, SYMLINK, "link").inode(two, one, REGULAR, "file")),
        ("one number twice", file().inode(one, ROOT, DIRECTORY, "dir")),
        ("a missing number again", new().inode(one, ROOT, REGULAR, "no").inode(one, ROOT, REGULAR, "none")),
        ("a pipe that is open", new().inode(one, ROOT, PIPE, "pipe").open(number(0), one, O_RDWR)),
        ("a link that is open", new().inode(one, ROOT, SYMLINK, "link").open(number(0), one, O_RDONLY)),
        ("what is not known is open", file().open(number(0), two, O_RDONLY)),
        ("one handle twice", file().open(number(0), one, O_RDONLY).open(number(0), one, O_RDONLY)),
        ("a handle beyond all", file().open(77 << 32 | 0x0fff_ffff << 4, one, O_RDONLY)),
        ("handle 0", file().open(0, one, O_RDONLY)),
        ("more inodes than there are", Forged { counts: Some((u32::MAX, 0)), ..file() }),
        ("more handles than there are", Forged { counts: Some((1, u32::MAX)), ..file() }),
        ("fewer inodes than there are", Forged { counts: Some((0, 0)), ..file() }),
    ];
    // What a share may lack, and what stands in the place of something else.
    let lacking: Vec<(&str, Forged)> = vec![
        ("a link for a directory", new().inode(one, ROOT, DIRECTORY, "link").inode(two, one, REGULAR, "file")),
        ("a pipe for a file", new().inode(one, ROOT, REGULAR, "pipe").open(number(0), one, O_RDWR)),
        ("a directory for a file", new().inode(one, ROOT, REGULAR, "dir").open(number(0), one, O_RDWR)),
        ("one file twice", file().inode(two, ROOT, REGULAR, "same")),
        ("nothing there", dir().inode(two, one, REGULAR, "nothing").open(number(3), two, O_RDWR)),
        ("no way to open it", file().open(number(0), one, O_RDWR | O_WRONLY)),
    ];
    let fine: Vec<(&str, Forged)> = vec![
        ("nothing", new()),
        ("a pipe", new().inode(one, ROOT, PIPE, "pipe").inode(two, ROOT, SYMLINK, "link")),
        ("the share itself is open", new().open(number(0), ROOT, O_RDONLY)),
        ("down", dir().inode(two, one, DIRECTORY, "sub").inode(three, one, REGULAR, "other").open(number(0), three, O_RDWR)),
        ("flags of opening that do more", file().open(number(0), one, O_RDWR | libc::O_TRUNC | libc::O_CREAT | libc::O_PATH)),
    ];
    for (words, lossy) in [(&[][..], false), (&["--migration-on-error", "guest-error"], true)] {
        let shared = Shared::new(words, furnish);
        let (canary, worker) = (Canary::new(&shared.beside), shared.server.worker());
        for (cases, expected) in [(&bad, false), (&lacking, lossy), (&fine, true)] {
            let taken = give(&shared, cases.iter().map(|(_, forged)| forged.bytes()));
            for ((what, _), taken) in cases.iter().zip(taken) {
                assert_eq!(taken, expected, "{what}, {words:?}");
            }
            serves(&shared, worker);
        }
        assert_eq!(fs::read(shared.house.join("file")).unwrap(), b"content");
        canary.check();
    }
}

#[test]
fn states_with_any_mistake_in_them() {
    for words in [&[][..], &["--migration-on-error", "guest-error"]] {
        let shared = Shared::new(words, furnish);
        let (canary, worker) = (Canary::new(&shared.beside), shared.server.worker());
        let mut guest = shared.guest();
        let dir = guest.lookup(ROOT, "dir").unwrap();
        for (parent, name) in [(ROOT, "file"), (dir, "other")] {
            let node = guest.lookup(parent, name).unwrap();
            guest.open_file(node, O_RDWR).unwrap();
        }
        guest.ask(&message::opendir(dir)).unwrap();
        let state = guest.device.save_state().unwrap();
        drop(guest);
        let cut = give(&shared, (0..state.len()).map(|len| state[..len].to_vec()));
        assert!(cut.iter().all(|taken| !taken));
        serves(&shared, worker);
        let flipped = |bit: usize| {
            let mut state = state.clone();
            state[bit / 8] ^= 1 << (bit % 8);
            state
        };
        let taken = give(&shared, (0..state.len() * 8).map(flipped)).into_iter().filter(|taken| *taken).count();
        assert!(taken < state.len() * 8, "what was changed may be a number that means nothing, but not always");
        serves(&shared, worker);
        assert_eq!(
            give(&shared, [state.clone(), [&state[..], &[0]].concat(), vec![], state.clone()]),
            [true, false, false, true]
        );
        // More than any state has.
        assert_eq!(give(&shared, [vec![0; 300 << 20]]), [false]);
        serves(&shared, worker);
        canary.check();
    }
}
