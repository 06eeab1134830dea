//! Handles, references and memory of a share: what a guest was not given it does not get, and what it takes too much of it alone misses.

use std::fs::{self, File};

use libc::{ENFILE, ENOMEM, ESTALE, O_RDONLY, O_RDWR};
use probe::fs::message::{self, Message, ROOT, op};
use probe::fs::raw::{FIRST, Raw, SECOND, URGENT, long, node_of};
use suite::share::Shared;
use suite::{status, wait_for};

/// Most memory of a server that a guest has asked for all that it could, in KiB.
const MOST_MEMORY: u64 = 200 << 10;

fn memory(shared: &Shared) -> u64 {
    status(shared.server.worker(), "VmRSS").trim_end_matches(" kB").parse().unwrap()
}

fn descriptors(shared: &Shared) -> usize {
    fs::read_dir(format!("/proc/{}/fd", shared.server.worker())).unwrap().count()
}

fn forget(guest: &mut Raw, node: u64, count: u64) {
    let bytes = message::forget(node, count).bytes(guest.next_unique());
    let ticket = guest.post_bytes(URGENT, &bytes).unwrap();
    guest.wait(ticket).unwrap();
}

#[test]
fn a_guest_that_opens_too_much_is_told_so_and_goes_on() {
    let shared = Shared::new(&["--rlimit-nofile", "4096"], |house| {
        fs::write(house.join("file"), "content").unwrap();
        fs::create_dir(house.join("dir")).unwrap();
    });
    let mut guest = shared.guest();
    let node = guest.lookup(ROOT, "file").unwrap();
    let (mut handles, mut refused) = (Vec::new(), 0);
    for _ in 0..10_000 {
        let reply = guest.call(&message::open(node, O_RDONLY)).unwrap();
        match reply.error {
            0 => handles.push(long(&reply.body, 0)),
            ENFILE => refused += 1,
            error => panic!("error {error}"),
        }
    }
    assert!(handles.len() > 1000 && refused > 1000, "{} open, {refused} refused", handles.len());
    assert_eq!(guest.call(&message::opendir(ROOT)).unwrap().error, ENFILE);
    assert_eq!(guest.call(&message::create(ROOT, "new", O_RDWR, 0o644)).unwrap().error, ENFILE);
    // What needs no handle goes on.
    let dir = guest.lookup(ROOT, "dir").unwrap();
    guest.ask(&message::mkdir(dir, "sub", 0o755)).unwrap();
    guest.ask(&message::truncate(node, 3)).unwrap();
    guest.ask(&message::rmdir(dir, "sub")).unwrap();
    let last = *handles.last().unwrap();
    assert_eq!(guest.ask(&message::read(node, last, 0, 100)).unwrap(), b"con");
    assert!(memory(&shared) < MOST_MEMORY, "{} KiB", memory(&shared));
    for handle in handles {
        guest.ask(&message::release(node, handle)).unwrap();
    }
    let handle = guest.open_file(node, O_RDWR).unwrap();
    guest.ask(&message::write(node, handle, 0, b"well")).unwrap();
    assert!(descriptors(&shared) < 300, "{} descriptors", descriptors(&shared));
}

#[test]
fn a_guest_that_knows_too_much_is_told_so_and_goes_on() {
    const FILES: usize = 4000;
    let shared = Shared::new(&["--max-inodes", "1024"], |house| {
        (0..FILES).for_each(|number| drop(File::create(house.join(number.to_string())).unwrap()));
        fs::create_dir(house.join("dir")).unwrap();
    });
    let mut guest = shared.guest();
    for round in 0..3 {
        let mut known = Vec::new();
        let mut refused = 0;
        for number in 0..FILES {
            let reply = guest.call(&message::lookup(ROOT, number.to_string())).unwrap();
            match reply.error {
                0 => known.push(node_of(&reply.body)),
                ENOMEM => refused += 1,
                error => panic!("error {error}"),
            }
        }
        assert!(known.len() > 500 && known.len() <= 1024 && refused > 0, "round {round}: {} known", known.len());
        // What is known stays of use.
        let handle = guest.open_file(known[7], O_RDWR).unwrap();
        guest.ask(&message::write(known[7], handle, 0, b"content")).unwrap();
        guest.ask(&message::release(known[7], handle)).unwrap();
        let listed = guest.ask(&message::opendir(ROOT)).unwrap();
        let handle = long(&listed, 0);
        assert!(guest.ask(&message::readdir(ROOT, handle, 0, 60_000, true)).unwrap().len() > 1000);
        guest.ask(&message::release(ROOT, handle)).unwrap();
        // Whatever has told of them has given references.
        known.iter().for_each(|node| forget(&mut guest, *node, 100));
        assert_eq!(guest.call(&message::getattr(known[7])).unwrap().error, ESTALE);
    }
    assert!(memory(&shared) < MOST_MEMORY, "{} KiB", memory(&shared));
}

/// Names are taken away faster than the guest forgets the files: those that it still knows each keep a descriptor, and there are not so
/// many. A file whose name could not be taken away is what it was.
#[test]
fn a_file_whose_name_stays_is_not_lost() {
    const FILES: usize = 1500;
    let shared = Shared::new(&["--rlimit-nofile", "512"], |house| {
        (0..FILES).for_each(|number| fs::write(house.join(number.to_string()), "content").unwrap());
    });
    let mut guest = shared.guest();
    let nodes: Vec<u64> = (0..FILES).map(|number| guest.lookup(ROOT, number.to_string()).unwrap()).collect();
    let mut kept = Vec::new();
    for number in 0..FILES {
        let reply = guest.call(&message::unlink(ROOT, number.to_string())).unwrap();
        if reply.error != 0 {
            assert_eq!(reply.error, ENFILE);
            kept.push(number);
        }
    }
    for number in &kept {
        let reply = guest.call(&message::getattr(nodes[*number])).unwrap();
        assert_eq!(reply.error, 0, "file {number}, whose name is still there");
    }
    println!("{} of {FILES} names could not be taken away", kept.len());
    nodes.iter().for_each(|node| forget(&mut guest, *node, 1));
    for number in kept {
        guest.ask(&message::unlink(ROOT, number.to_string())).unwrap();
    }
    assert_eq!(fs::read_dir(&shared.house).unwrap().count(), 0);
}

/// Two at once take the same name away: one is told that it is gone, and the file stays what it was to whoever knows it.
#[test]
fn a_file_whose_name_is_taken_away_twice_is_not_lost() {
    let shared = Shared::new(&["--rlimit-nofile", "512"], |house| {
        (0..2000).for_each(|number| fs::write(house.join(format!("f{number}")), "content").unwrap());
    });
    let mut guest = shared.guest();
    let mut both = 0;
    for round in 0..500 {
        fs::write(shared.house.join("twice"), "content").unwrap();
        let node = guest.lookup(ROOT, "twice").unwrap();
        let name = message::unlink(ROOT, "twice");
        let (one, other) = guest.both(&name, &name).unwrap();
        assert!((one.error == 0) != (other.error == 0), "round {round}: {one:?} {other:?}");
        both += u32::from(one.error != 0);
        // Others are looked at, until there is no room for descriptors that are only kept to be faster.
        for number in 0..12 {
            let name = format!("f{}", (round * 12 + number) % 2000);
            let other = guest.lookup(ROOT, name).unwrap();
            guest.ask(&message::chmod(other, 0o600)).unwrap();
            forget(&mut guest, other, 1);
        }
        assert_eq!(guest.call(&message::getattr(node)).unwrap().error, 0, "round {round}");
        forget(&mut guest, node, 1);
    }
    println!("the second one was faster {both} times");
}

/// What is in flight when its node is forgotten, its handle released or the session ended is done, or refused; nothing is mixed up.
#[test]
fn what_is_in_flight_outlives_what_it_is_about() {
    let shared = Shared::new(&[], |house| fs::write(house.join("file"), vec![7; 1 << 20]).unwrap());
    let mut guest = shared.guest();
    let big = vec![7; 1 << 20];
    for round in 0..120 {
        let node = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open_file(node, O_RDWR).unwrap();
        let read = guest.post(FIRST, &message::read(node, handle, 0, 1 << 20)).unwrap();
        let write = guest.post(SECOND, &message::write(node, handle, 0, &big)).unwrap();
        match round % 4 {
            0 => forget(&mut guest, node, u64::MAX),
            1 => drop(guest.ask(&message::release(node, handle)).unwrap()),
            2 => drop(guest.ask(&Message::new(op::DESTROY, 0, [])).unwrap()),
            _ => drop(guest.init(!0).unwrap()),
        }
        let (read, write) = (guest.wait(read).unwrap(), guest.wait(write).unwrap());
        assert!(read.error != 0 || (read.body.len() == 1 << 20 && read.body.iter().all(|byte| *byte == 7)));
        assert!(write.error != 0 || write.body.starts_with(&(1u32 << 20).to_le_bytes()));
        let _may_be_gone = guest.call(&message::release(node, handle)).unwrap();
        if round % 4 == 2 {
            guest.init(!0).unwrap();
        }
    }
    guest.ask(&Message::new(op::DESTROY, 0, [])).unwrap();
    wait_for("what was open to be closed", || (descriptors(&shared) < 300).then_some(()));
    assert!(memory(&shared) < MOST_MEMORY, "{} KiB", memory(&shared));
}
