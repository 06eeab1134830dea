//! Thousands of requests in random order against a model of a tree, on two queues; and requests that change while they are read.
//!
//! `OUTBOARD_SEED` begins elsewhere; the seed of a run is printed when something is wrong.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use libc::{EEXIST, EINVAL, EISDIR, ENOENT, ENOTDIR, ENOTEMPTY, ESTALE, O_EXCL, O_RDWR};
use probe::fs::message::{self, Message, ROOT};
use probe::fs::raw::{FIRST, Raw, Reply, SECOND, Told, URGENT, long, node_of, word};
use probe::random::Random;
use suite::share::Shared;

/// Requests of one run.
const STEPS: u64 = 2500;

/// Names are few, so that they are met again.
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// What is in a directory: names, and what each is.
type Entries = BTreeMap<&'static str, u64>;

/// What a file or directory should be.
#[derive(Clone, Debug)]
enum Thing {
    Dir(Entries),
    File { data: Vec<u8>, links: u32 },
}

/// The tree as it should be: things by numbers of the model's own, and the nodes and handles by which the guest knows them.
struct Model {
    guest: Raw,
    random: Random,
    things: BTreeMap<u64, Thing>,
    /// Node and number of references.
    known: BTreeMap<u64, (u64, u64)>,
    /// Handle and thing.
    open: Vec<(u64, u64)>,
    next: u64,
    log: Vec<String>,
}

impl Model {
    fn new(shared: &Shared, seed: u64) -> Model {
        let things = [(ROOT, Thing::Dir(Entries::new()))].into();
        let known = [(ROOT, (ROOT, 1))].into();
        Model { guest: shared.guest(), random: Random::new(seed), things, known, open: Vec::new(), next: 2, log: Vec::new() }
    }

    fn pick(&mut self, wanted: impl Fn(&Thing) -> bool) -> u64 {
        let fit: Vec<u64> = self.known.keys().copied().filter(|id| self.things.get(id).is_some_and(&wanted)).collect();
        let at = usize::try_from(self.random.below(fit.len() as u64)).unwrap();
        fit.get(at).copied().unwrap_or(ROOT)
    }

    fn dir(&mut self) -> u64 {
        self.pick(|thing| matches!(thing, Thing::Dir(_)))
    }

    fn file(&mut self) -> u64 {
        self.pick(|thing| matches!(thing, Thing::File { .. }))
    }

    fn name(&mut self) -> &'static str {
        NAMES[usize::try_from(self.random.below(NAMES.len() as u64)).unwrap()]
    }

    fn node(&self, id: u64) -> u64 {
        self.known[&id].0
    }

    fn call(&mut self, message: &Message) -> Reply {
        let queue = if self.random.below(2) == 0 { FIRST } else { SECOND };
        let ticket = self.guest.post(queue, message).unwrap();
        let reply = self.guest.wait(ticket).unwrap();
        self.log.push(format!("{} of {:#x} {:?}: {}", message.opcode, message.node, message.body.get(..24), reply.error));
        reply
    }

    fn entries(&mut self, dir: u64) -> Option<&mut Entries> {
        match self.things.get_mut(&dir) {
            Some(Thing::Dir(entries)) => Some(entries),
            _ => None,
        }
    }

    fn at(&mut self, dir: u64, name: &str) -> Option<u64> {
        self.entries(dir)?.get(name).copied()
    }

    /// The guest has learned of a thing under a node: a new one, or the same as ever.
    fn learn(&mut self, id: u64, reply: &Reply) {
        let node = node_of(&reply.body);
        let known = self.known.entry(id).or_insert((node, 0));
        assert_eq!(known.0, node, "a file has one node");
        known.1 += 1;
        let told = Told::entry(&reply.body);
        match &self.things[&id] {
            Thing::Dir(_) => assert_eq!(told.mode & libc::S_IFMT, libc::S_IFDIR),
            Thing::File { data, links } => assert_eq!((told.size, told.links), (data.len() as u64, *links)),
        }
    }

    fn lookup(&mut self) {
        let (dir, name) = (self.dir(), self.name());
        let reply = self.call(&message::lookup(self.node(dir), name));
        match self.at(dir, name) {
            Some(id) => {
                assert_eq!(reply.error, 0);
                self.learn(id, &reply);
            }
            None => assert_eq!(reply.error, ENOENT),
        }
    }

    fn make(&mut self, directory: bool) {
        let (dir, name) = (self.dir(), self.name());
        let node = self.node(dir);
        let message =
            if directory { message::mkdir(node, name, 0o755) } else { message::create(node, name, O_RDWR | O_EXCL, 0o644) };
        let reply = self.call(&message);
        if self.at(dir, name).is_some() {
            assert_eq!(reply.error, EEXIST);
            return;
        }
        assert_eq!(reply.error, 0);
        let id = self.next;
        self.next += 1;
        let thing = if directory { Thing::Dir(Entries::new()) } else { Thing::File { data: Vec::new(), links: 1 } };
        self.things.insert(id, thing);
        self.entries(dir).unwrap().insert(name, id);
        self.learn(id, &reply);
        if !directory {
            self.open.push((long(&reply.body, 128), id));
        }
    }

    /// A name is gone. A directory is gone with it; a file is there as long as somebody knows it.
    fn dropped(&mut self, id: u64) {
        match self.things.get_mut(&id) {
            Some(Thing::File { links, .. }) => *links -= 1,
            Some(Thing::Dir(_)) => {
                self.things.remove(&id);
                self.forget(id);
            }
            None => {}
        }
    }

    fn remove(&mut self, directory: bool) {
        let (dir, name) = (self.dir(), self.name());
        let node = self.node(dir);
        let reply = self.call(&if directory { message::rmdir(node, name) } else { message::unlink(node, name) });
        let Some(id) = self.at(dir, name) else {
            assert_eq!(reply.error, ENOENT);
            return;
        };
        let expected = match (&self.things[&id], directory) {
            (Thing::Dir(_), false) => EISDIR,
            (Thing::File { .. }, true) => ENOTDIR,
            (Thing::Dir(entries), true) if !entries.is_empty() => ENOTEMPTY,
            _ => 0,
        };
        assert_eq!(reply.error, expected);
        if expected == 0 {
            self.entries(dir).unwrap().remove(name);
            self.dropped(id);
        }
    }

    fn is_within(&self, id: u64, within: u64) -> bool {
        id == within
            || matches!(self.things.get(&within), Some(Thing::Dir(entries)) if entries.values().any(|entry| self.is_within(id, *entry)))
    }

    fn renamed(&mut self, from: (u64, &'static str), to: (u64, &'static str)) -> i32 {
        let Some(id) = self.at(from.0, from.1) else { return ENOENT };
        let over = self.at(to.0, to.1);
        // A directory into itself, or over one that it is in.
        if self.is_within(to.0, id) {
            return EINVAL;
        }
        if over.is_some_and(|over| matches!(self.things[&over], Thing::Dir(_)) && self.is_within(from.0, over)) {
            return ENOTEMPTY;
        }
        match over.map(|over| (&self.things[&id], &self.things[&over])) {
            _ if over == Some(id) => return 0,
            Some((Thing::Dir(_), Thing::File { .. })) => return ENOTDIR,
            Some((Thing::File { .. }, Thing::Dir(_))) => return EISDIR,
            Some((Thing::Dir(_), Thing::Dir(entries))) if !entries.is_empty() => return ENOTEMPTY,
            _ => {}
        }
        self.entries(from.0).unwrap().remove(from.1);
        self.entries(to.0).unwrap().insert(to.1, id);
        if let Some(over) = over {
            self.dropped(over);
        }
        0
    }

    fn rename(&mut self) {
        let (from, to) = ((self.dir(), self.name()), (self.dir(), self.name()));
        let (one, other) = (self.node(from.0), self.node(to.0));
        let reply = self.call(&message::rename(one, from.1, other, to.1, 0));
        assert_eq!(reply.error, self.renamed(from, to), "{from:?} to {to:?}");
    }

    fn link(&mut self) {
        let (dir, name, file) = (self.dir(), self.name(), self.file());
        let Some(Thing::File { links, .. }) = self.things.get(&file).cloned() else { return };
        let reply = self.call(&message::link(self.node(dir), name, self.node(file)));
        if self.at(dir, name).is_some() {
            assert!(reply.error == EEXIST || links == 0 && reply.error == ENOENT);
            return;
        }
        if links == 0 {
            assert!([ENOENT, ESTALE].contains(&reply.error), "error {}", reply.error);
            return;
        }
        assert_eq!(reply.error, 0);
        if let Some(Thing::File { links, .. }) = self.things.get_mut(&file) {
            *links += 1;
        }
        self.entries(dir).unwrap().insert(name, file);
        self.learn(file, &reply);
    }

    fn open(&mut self) {
        let file = self.file();
        let reply = self.call(&message::open(self.node(file), O_RDWR));
        if file == ROOT {
            assert_eq!(reply.error, EISDIR);
            return;
        }
        assert_eq!(reply.error, 0, "what is known can be opened, with a name or without");
        self.open.push((long(&reply.body, 0), file));
    }

    fn with_handle(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let at = usize::try_from(self.random.below(self.open.len() as u64)).unwrap();
        let (handle, file) = self.open[at];
        let (node, what) = (self.node(file), self.random.below(3));
        let (offset, byte) = (self.random.below(3000), u8::try_from(self.random.below(256)).unwrap());
        let len = usize::try_from(self.random.below(2000) + 1).unwrap();
        if what == 0 {
            let reply = self.call(&message::release(node, handle));
            assert_eq!(reply.error, 0);
            self.open.swap_remove(at);
            return;
        }
        let start = usize::try_from(offset).unwrap();
        if what == 1 {
            let reply = self.call(&message::write(node, handle, offset, &vec![byte; len]));
            assert_eq!((reply.error, long(&reply.body, 0) & 0xffff_ffff), (0, len as u64));
            let Some(Thing::File { data, .. }) = self.things.get_mut(&file) else { return };
            data.resize(data.len().max(start + len), 0);
            data[start..start + len].fill(byte);
            return;
        }
        let reply = self.call(&message::read(node, handle, offset, u32::try_from(len).unwrap()));
        let Some(Thing::File { data, .. }) = self.things.get(&file) else { return };
        let expected = data.get(start..(start + len).min(data.len()).max(start)).unwrap_or_default();
        assert!(reply.error == 0 && reply.body == expected, "{} bytes read at {offset}", reply.body.len());
    }

    fn look(&mut self) {
        let id = self.pick(|_| true);
        let reply = self.call(&message::getattr(self.node(id)));
        assert_eq!(reply.error, 0);
        let told = Told::attr(&reply.body);
        if let Thing::File { data, links } = &self.things[&id] {
            assert_eq!((told.size, told.links), (data.len() as u64, *links));
        }
    }

    fn truncate(&mut self) {
        let (file, size) = (self.file(), self.random.below(4000));
        let reply = self.call(&message::truncate(self.node(file), size));
        match self.things.get_mut(&file) {
            Some(Thing::File { data, .. }) => {
                assert_eq!(reply.error, 0);
                data.resize(usize::try_from(size).unwrap(), 0);
            }
            _ => assert_eq!(reply.error, EISDIR),
        }
    }

    fn list(&mut self) {
        let dir = self.dir();
        let node = self.node(dir);
        let opened = self.call(&message::opendir(node));
        assert_eq!(opened.error, 0);
        let handle = long(&opened.body, 0);
        let reply = self.call(&message::readdir(node, handle, 0, 4096, false));
        assert_eq!((reply.error, self.call(&message::release(node, handle)).error), (0, 0));
        let mut names = Vec::new();
        let mut rest = &reply.body[..];
        while rest.len() >= 24 {
            let len = usize::try_from(word(rest, 16)).unwrap();
            names.push(String::from_utf8_lossy(&rest[24..24 + len]).into_owned());
            rest = rest.get((24 + len).next_multiple_of(8)..).unwrap_or_default();
        }
        names.retain(|name| name != "." && name != "..");
        names.sort();
        let entries: Vec<String> = self.entries(dir).unwrap().keys().map(|name| (*name).to_owned()).collect();
        assert_eq!(names, entries);
    }

    /// The guest gives all references to a thing back.
    fn forget(&mut self, id: u64) {
        let Some((node, count)) = self.known.remove(&id) else { return };
        let bytes = message::forget(node, count).bytes(self.guest.next_unique());
        let ticket = self.guest.post_bytes(URGENT, &bytes).unwrap();
        self.guest.wait(ticket).unwrap();
        let reply = self.call(&message::getattr(node));
        // As long as something in it is known, so is a directory.
        assert!(reply.error == ESTALE || reply.error == 0 && count > 0);
    }

    fn forget_one(&mut self) {
        let id = self.pick(|_| true);
        // What a guest has open it does not forget.
        if id != ROOT && self.open.iter().all(|(_, open)| *open != id) {
            self.forget(id);
        }
    }

    fn step(&mut self) {
        match self.random.below(16) {
            0..=2 => self.lookup(),
            3 | 4 => self.make(false),
            5 => self.make(true),
            6 => self.remove(false),
            7 => self.remove(true),
            8 | 9 => self.rename(),
            10 => self.link(),
            11 => self.open(),
            12 => self.with_handle(),
            13 => self.look(),
            14 => self.truncate(),
            _ if self.random.below(2) == 0 => self.list(),
            _ => self.forget_one(),
        }
    }
}

#[test]
fn a_tree_is_what_a_model_of_it_is() {
    let first: u64 = std::env::var("OUTBOARD_SEED").ok().map_or(1, |seed| seed.parse().unwrap());
    // With few descriptors, most of what is known is reached by its name.
    for (seed, words) in (first..).zip([&[][..], &["--rlimit-nofile", "1600"], &["--cache", "never"]]) {
        let shared = Shared::new(words, |_| {});
        let mut model = Model::new(&shared, seed);
        for step in 0..STEPS {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| model.step()));
            if let Err(panic) = done {
                let last = model.log.len().saturating_sub(12);
                eprintln!("seed {seed}, step {step}, {words:?}; before that:\n{}", model.log[last..].join("\n"));
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// Header and name change while the server reads them: the outcome is that of one of the two, or of a mixture that is checked as a whole.
#[test]
fn a_request_that_changes_is_read_once() {
    let shared = Shared::new(&[], |house| {
        fs::write(house.join("aa"), "one").unwrap();
        fs::write(house.join("bb"), "another").unwrap();
    });
    fs::write(shared.beside.join("victim"), "beside").unwrap();
    let mut guest = shared.guest();
    let (one, other) = (guest.ask(&message::lookup(ROOT, "aa")).unwrap(), guest.ask(&message::lookup(ROOT, "bb")).unwrap());
    let inodes = [Told::entry(&one).ino, Told::entry(&other).ino];
    let pairs: [(Message, Message); 5] = [
        (message::lookup(ROOT, "aa"), message::lookup(ROOT, "bb")),
        (message::lookup(ROOT, "aa"), message::lookup(ROOT, "..")),
        (message::lookup(ROOT, "aa/../../beside"), message::lookup(ROOT, "aaxxxxxxxxxxxxx")),
        (message::mkdir(ROOT, "new/../victim", 0o755), message::mkdir(ROOT, "newnewnewnew!", 0o755)),
        (message::unlink(ROOT, "../beside/victim"), message::unlink(ROOT, "xxxbesidexvictim")),
    ];
    let view = guest.view();
    for (good, bad) in pairs {
        let mut outcomes = BTreeMap::new();
        for _ in 0..800 {
            let unique = guest.next_unique();
            let (first, second) = (good.bytes(unique), bad.bytes(unique));
            let end = AtomicBool::new(false);
            let ticket = thread::scope(|scope| {
                let ticket = guest.post_bytes(FIRST, &first).unwrap();
                let at = guest.place_of(ticket).request;
                let (view, end) = (&view, &end);
                scope.spawn(move || {
                    while !end.load(Ordering::Relaxed) {
                        // All but the number, by which the answer is known.
                        view.write(at + 16, &second[16..]);
                        view.write(at + 16, &first[16..]);
                    }
                });
                let reply = guest.wait(ticket).unwrap();
                end.store(true, Ordering::Relaxed);
                reply
            });
            if ticket.error == 0 && good.opcode == message::op::LOOKUP {
                assert!(inodes.contains(&Told::entry(&ticket.body).ino));
            }
            *outcomes.entry(ticket.error).or_insert(0) += 1;
        }
        println!("{}: {outcomes:?}", good.opcode);
    }
    assert_eq!(fs::read_to_string(shared.beside.join("victim")).unwrap(), "beside");
    assert_eq!(fs::read_dir(&shared.beside).unwrap().count(), 1);
    let within = fs::read_dir(&shared.house).unwrap().count();
    // Whole names, and mixtures of the two of one length.
    assert!(within >= 2);
}
