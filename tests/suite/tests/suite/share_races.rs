//! Names of a share that change while they are used, by the host and by the guest itself: nothing beside the share is reached, and what is
//! done to a file is done to that file or to none.
//!
//! `OUTBOARD_RACES=1000000 cargo test -p suite --test suite share_races -- --nocapture` tries that often, and says what came of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libc::{O_CREAT, O_RDONLY, O_RDWR, O_TRUNC};
use probe::fs::message::{self, Message, ROOT};
use probe::fs::raw::{Raw, Reply, Told, URGENT, long, node_of};
use probe::random::Random;
use rustix::fs::{CWD, FileType, Mode, RenameFlags, XattrFlags, fgetxattr, fsetxattr, mknodat, renameat_with};
use suite::share::{Canary, Shared};

/// Tries of each race, unless told otherwise.
const ROUNDS: u64 = 4_000;

/// `renameat2`'s flag.
const EXCHANGE: u32 = 2;

fn rounds() -> u64 {
    std::env::var("OUTBOARD_RACES").ok().map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

/// Has a thread of the host do something all the time while a guest is at work. Gives how often.
fn beside<T>(again: impl Fn() + Sync, work: impl FnOnce() -> T) -> (T, u64) {
    let (end, count) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                again();
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        end.store(true, Ordering::Relaxed);
        match done {
            Ok(done) => (done, count.load(Ordering::Relaxed)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn exchange(one: &Path, other: &Path) {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
}

/// What came of requests: how often each error.
#[derive(Default)]
struct Tally(BTreeMap<i32, u64>);

impl Tally {
    fn add(&mut self, reply: &Reply) {
        *self.0.entry(reply.error).or_default() += 1;
    }
}

fn forget(guest: &mut Raw, node: u64) {
    let bytes = message::forget(node, 1).bytes(guest.next_unique());
    let ticket = guest.post_bytes(URGENT, &bytes).unwrap();
    guest.wait(ticket).unwrap();
}

/// Names that are in both.
const TRAPPED: [&str; 3] = ["inner", "other", "moved"];

/// A folder `dir`, and beside it `trap`, a link to what is not shared; both folders have the same names in them.
fn lay_trap(target: &str) -> (Shared, Canary) {
    let shared = Shared::new(&["--xattr"], |house| {
        fs::create_dir(house.join("dir")).unwrap();
        fs::write(house.join("dir/inner"), "within").unwrap();
    });
    let target = target.replace("{beside}", &shared.beside.display().to_string());
    symlink(target, shared.house.join("trap")).unwrap();
    for name in TRAPPED {
        fs::write(shared.beside.join(name), "nobody's business").unwrap();
    }
    fs::create_dir(shared.beside.join("sub")).unwrap();
    let canary = Canary::new(&shared.beside);
    (shared, canary)
}

/// Something that is done in the folder.
fn in_folder(guest: &mut Raw, random: &mut Random, dir: u64) -> Message {
    let inner = if random.below(2) == 0 { guest.call(&message::lookup(dir, "inner")).ok() } else { None };
    let inner = inner.filter(|reply| reply.error == 0).map(|reply| node_of(&reply.body));
    match (inner, random.below(7)) {
        (Some(node), 0) => message::open(node, O_RDWR | O_TRUNC),
        (Some(node), 1) => message::open(node, O_RDONLY),
        (Some(node), 2) => message::truncate(node, random.below(100)),
        (Some(node), 3) => message::setxattr(node, "user.mark", b"here"),
        (Some(node), 4) => message::chmod(node, 0o600),
        (Some(node), 5) => message::link(dir, "linked", node),
        (Some(node), _) => message::getattr(node),
        (None, 0) => message::create(dir, "new", O_RDWR | O_CREAT, 0o644),
        (None, 1) => message::mkdir(dir, "sub", 0o755),
        (None, 2) => message::rename(dir, "new", dir, "moved", 0),
        (None, 3) => message::unlink(dir, ["moved", "new", "linked"][usize::try_from(random.below(3)).unwrap()]),
        (None, 4) => message::rmdir(dir, "sub"),
        (None, 5) => message::symlink(dir, "pointer", "inner"),
        (None, _) => message::opendir(dir),
    }
}

/// What the guest got open, it gives back: a million tries would be too many otherwise.
fn give_back(guest: &mut Raw, message: &Message, reply: &Reply) {
    if reply.error != 0 {
        return;
    }
    let body = &reply.body;
    match message.opcode {
        message::op::OPEN | message::op::OPENDIR => {
            guest.call(&message::release(message.node, long(body, 0))).unwrap();
        }
        message::op::CREATE => {
            guest.call(&message::release(node_of(body), long(body, 128))).unwrap();
        }
        _ => {}
    }
}

fn swapped_folder(target: &str, by_guest: bool) {
    let (shared, canary) = lay_trap(target);
    let (dir, trap) = (shared.house.join("dir"), shared.house.join("trap"));
    let foreign = TRAPPED.map(|name| fs::symlink_metadata(shared.beside.join(name)).unwrap().ino());
    let mut guest = shared.guest();
    let mut random = Random::new(1);
    let (mut tally, mut links) = (Tally::default(), 0);
    let swap = message::rename(ROOT, "dir", ROOT, "trap", EXCHANGE);
    let work = || {
        for _ in 0..rounds() {
            let found = guest.call(&message::lookup(ROOT, "dir")).unwrap();
            if found.error != 0 {
                tally.add(&found);
                continue;
            }
            let node = node_of(&found.body);
            assert!(!foreign.contains(&Told::entry(&found.body).ino), "something that is not shared was found");
            links += u64::from(Told::entry(&found.body).mode & libc::S_IFMT == libc::S_IFLNK);
            let message = in_folder(&mut guest, &mut random, node);
            let reply = if by_guest { guest.both(&message, &swap).unwrap().0 } else { guest.call(&message).unwrap() };
            give_back(&mut guest, &message, &reply);
            tally.add(&reply);
            forget(&mut guest, node);
        }
    };
    let idle = || thread::sleep(Duration::from_millis(50));
    let swaps = if by_guest { beside(idle, work).1 } else { beside(|| exchange(&dir, &trap), work).1 };
    println!(
        "to {target}, by {}: {swaps} swaps, {links} links met, outcomes {:?}",
        if by_guest { "guest" } else { "host" },
        tally.0
    );
    canary.check();
    assert!(tally.0.get(&0).is_some_and(|done| *done > rounds() / 20), "some of it went well: {:?}", tally.0);
}

#[test]
fn a_folder_that_becomes_a_link_leads_nowhere() {
    swapped_folder("{beside}", false);
    swapped_folder("../beside", false);
    swapped_folder("{beside}", true);
    swapped_folder("../beside", true);
}

/// A folder that the host takes out of the share while a guest holds it is no way to what is around it.
#[test]
fn a_folder_that_leaves_the_share_leads_no_further() {
    let shared = Shared::new(&[], |house| fs::create_dir_all(house.join("dir/deep")).unwrap());
    fs::write(shared.beside.join("secret"), "nobody's business").unwrap();
    let mut guest = shared.guest();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let deep = guest.lookup(dir, "deep").unwrap();
    // So that there is a descriptor of it, and not only a name.
    guest.ask(&message::opendir(deep)).unwrap();
    fs::rename(shared.house.join("dir"), shared.beside.join("dir")).unwrap();
    for name in ["..", "../secret", "secret", ".", "../../beside"] {
        for node in [dir, deep] {
            assert_ne!(guest.call(&message::lookup(node, name)).unwrap().error, 0, "{name}");
            let made = guest.call(&message::rename(node, "deep", ROOT, name, 0)).unwrap();
            assert_ne!(made.error, 0, "{name}");
        }
    }
    assert_eq!(fs::read_to_string(shared.beside.join("secret")).unwrap(), "nobody's business");
    assert!(guest.lookup(ROOT, "dir").is_err());
    // The share itself is as it was.
    guest.ask(&message::mkdir(ROOT, "dir", 0o755)).unwrap();
    guest.lookup(ROOT, "dir").unwrap();
}

/// One of two files that change places.
struct Marked {
    file: File,
    ino: u64,
    /// What a guest does to it is told from what it does to the other by whether numbers are even.
    odd: u64,
}

impl Marked {
    fn new(path: &Path, odd: u64) -> Marked {
        fs::write(path, if odd == 1 { "1" } else { "00" }).unwrap();
        fs::set_permissions(path, PermissionsExt::from_mode(if odd == 1 { 0o601 } else { 0o600 })).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        fsetxattr(&file, "user.odd", &[u8::try_from(odd).unwrap()], XattrFlags::empty()).unwrap();
        let ino = file.metadata().unwrap().ino();
        Marked { file, ino, odd }
    }

    /// What was done to it that was meant for the other one.
    fn mistakes(&self) -> u64 {
        let meta = self.file.metadata().unwrap();
        let (mut mark, mut first) = ([9], [0]);
        fgetxattr(&self.file, "user.odd", &mut mark).unwrap();
        self.file.read_at(&mut first, 0).unwrap();
        let wrong = [
            meta.len() % 2 != self.odd && meta.len() != 0,
            u64::from(meta.mode()) % 2 != self.odd,
            u64::from(mark[0]) != self.odd,
            ![0, b'0' + u8::try_from(self.odd).unwrap()].contains(&first[0]),
        ];
        u64::try_from(wrong.iter().filter(|wrong| **wrong).count()).unwrap()
    }
}

/// Something that leaves the mark of a file on a node.
fn mark(random: &mut Random, node: u64, odd: u64) -> Message {
    let number = 2 * random.below(100) + 2 + odd;
    match random.below(5) {
        0 => message::truncate(node, number),
        1 => message::chmod(node, if odd == 1 { 0o601 } else { 0o600 } | if number.is_multiple_of(3) { 0o40 } else { 0 }),
        2 => message::setxattr(node, "user.odd", &[u8::try_from(odd).unwrap()]),
        3 => message::open(node, O_RDWR),
        _ => message::open(node, O_RDWR | O_TRUNC),
    }
}

/// Marks a node that was found under `n`, and what was opened of it.
fn mark_one(guest: &mut Raw, random: &mut Random, files: &[Marked; 2], swap: Option<&Message>, tally: &mut Tally) {
    let found = guest.ask(&message::lookup(ROOT, "n")).unwrap();
    let (node, ino) = (node_of(&found), Told::entry(&found).ino);
    let odd = files.iter().find(|file| file.ino == ino).unwrap().odd;
    let message = mark(random, node, odd);
    let reply = match swap {
        Some(swap) => guest.both(&message, swap).unwrap().0,
        None => guest.call(&message).unwrap(),
    };
    if message.opcode == message::op::OPEN && reply.error == 0 {
        let handle = long(&reply.body, 0);
        let digit = [b'0' + u8::try_from(odd).unwrap(); 3];
        let digits = if odd == 1 { &digit[..1] } else { &digit[..2] };
        guest.ask(&message::write(node, handle, 0, digits)).unwrap();
        guest.ask(&message::release(node, handle)).unwrap();
        let told = guest.call(&message::truncate(node, 2 + odd)).unwrap();
        tally.add(&told);
    }
    tally.add(&reply);
    forget(guest, node);
}

#[test]
fn what_is_done_to_a_file_is_done_to_no_other() {
    for by_guest in [false, true] {
        let shared = Shared::new(&["--xattr"], |_| {});
        let (n, m) = (shared.house.join("n"), shared.house.join("m"));
        let files = [Marked::new(&n, 0), Marked::new(&m, 1)];
        let mut guest = shared.guest();
        let swap = message::rename(ROOT, "n", ROOT, "m", EXCHANGE);
        let (mut random, mut tally, mut mistakes) = (Random::new(2), Tally::default(), 0);
        let rounds = rounds().min(100_000);
        let work = || {
            for round in 0..rounds {
                mark_one(&mut guest, &mut random, &files, by_guest.then_some(&swap), &mut tally);
                if round % 16 == 0 {
                    mistakes += files[0].mistakes() + files[1].mistakes();
                }
            }
        };
        let pause = || thread::sleep(Duration::from_millis(50));
        let swaps = if by_guest { beside(pause, work).1 } else { beside(|| exchange(&n, &m), work).1 };
        mistakes += files[0].mistakes() + files[1].mistakes();
        println!("by guest {by_guest}: {rounds} times, {swaps} swaps of the host, outcomes {:?}, {mistakes} mistakes", tally.0);
        assert_eq!(mistakes, 0);
        assert!(tally.0.get(&0).is_some_and(|done| *done > rounds / 4), "some of it reached its file: {:?}", tally.0);
    }
}

/// A name under which there is now a file, now a pipe, now a device: nothing waits, and no driver of the host is reached.
#[test]
fn a_file_that_becomes_a_pipe_is_waited_for_by_nobody() {
    let shared = Shared::new(&[], |house| {
        fs::write(house.join("n"), "a file").unwrap();
        mknodat(CWD, house.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    });
    let (n, pipe) = (shared.house.join("n"), shared.house.join("pipe"));
    let canary = Canary::new(&shared.house.join("pipe"));
    let mut guest = shared.guest();
    let (mut tally, mut longest) = (Tally::default(), Duration::ZERO);
    let work = || {
        for round in 0..rounds() {
            let found = guest.ask(&message::lookup(ROOT, "n")).unwrap();
            let node = node_of(&found);
            let message = match round % 4 {
                0 => message::open(node, O_RDONLY),
                1 => message::open(node, libc::O_WRONLY),
                2 => message::open(node, O_RDWR | O_TRUNC),
                _ => message::truncate(node, 5),
            };
            let start = Instant::now();
            let reply = guest.call(&message).unwrap();
            longest = longest.max(start.elapsed());
            if Told::entry(&found).mode & libc::S_IFMT != libc::S_IFREG {
                assert_ne!(reply.error, 0, "a pipe was opened");
            }
            give_back(&mut guest, &message, &reply);
            tally.add(&reply);
            forget(&mut guest, node);
        }
    };
    let swaps = beside(|| exchange(&n, &pipe), work).1;
    // The pipe may have been opened for a moment before it was seen that it is none of the files that are known; that does not wait.
    println!("{swaps} swaps, longest {longest:?}, {} events, outcomes {:?}", canary.events(), tally.0);
    assert!(longest < Duration::from_secs(5));
    assert!(tally.0.contains_key(&0), "{:?}", tally.0);
}
