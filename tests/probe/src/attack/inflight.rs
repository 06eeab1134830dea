//! In-flight regions that lie: a successor believes them about what its predecessor had in hand.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::ftruncate;
use vhost_user::features;

use super::foe::{Foe, GET_INFLIGHT_FD, Result, SET_INFLIGHT_FD, SET_VRING_ENABLE, SET_VRING_KICK, pair};
use super::guest::{DATA, DESC, SIZE, WRITE, desc, sealed, unsealed};
use super::wire::worst;
use super::{Case, Halt, Seen};

/// Bytes of a region for every ring that is attacked here.
const ROOM: u64 = 1 << 16;

/// Bytes before the first entry of a queue's log, and of an entry (vhost-user, "Inflight I/O tracking").
const HEADER: u64 = 16;
const ENTRY: u64 = 16;

pub(super) const CASES: &[Case] = &[
    Case::new("get-none", "A region for no queues", |foe| get(foe, 0, SIZE)),
    Case::new("get-absurd", "A region for 65535 queues of 65535", |foe| get(foe, 0xffff, 0xffff)),
    Case::new("get-size-0", "A region for queues of no descriptors", |foe| get(foe, 1, 0)),
    Case::new("get-often", "200 regions, one after the other", |foe| {
        offered(foe)?;
        for _ in 0..200 {
            if let Err(seen) = foe.ask(GET_INFLIGHT_FD, &body(0, 0, 1, SIZE)) {
                return Ok(seen);
            }
        }
        Ok(Seen::Taken)
    }),
    Case::new("short", "A region that its file does not have", |foe| {
        offered(foe)?;
        let fd = sealed(64)?;
        used_in_spite(foe, &fd, ROOM, 0)
    }),
    Case::new("size-0", "A region of no bytes", |foe| {
        offered(foe)?;
        let fd = sealed(ROOM)?;
        used_in_spite(foe, &fd, 0, 0)
    }),
    Case::new("small", "A region too small for its queues", |foe| {
        offered(foe)?;
        let fd = sealed(ROOM)?;
        used_in_spite(foe, &fd, 32, 0)
    }),
    Case::new("offset", "A region whose place in the file wraps", |foe| {
        offered(foe)?;
        let fd = sealed(ROOM)?;
        used_in_spite(foe, &fd, ROOM, u64::MAX - 4095)
    }),
    Case::new("huge", "A region of 2^63 bytes", |foe| {
        offered(foe)?;
        let fd = sealed(ROOM)?;
        used_in_spite(foe, &fd, 1 << 63, 0)
    }),
    Case::new("unsealed", "A region that could be cut off", |foe| {
        offered(foe)?;
        let fd = unsealed(ROOM)?;
        used_in_spite(foe, &fd, ROOM, 0)
    }),
    Case::new("cut", "A region that is cut off under a running ring", |foe| {
        offered(foe)?;
        let fd = unsealed(ROOM)?;
        let seen = set(foe, &fd, ROOM, 0)?;
        if seen != Seen::Taken {
            return Ok(seen);
        }
        run(foe)?;
        ftruncate(&fd, 0).map_err(|_| Halt::Closed)?;
        foe.ring_outcome()
    }),
    Case::new("pipe", "A pipe as a region", |foe| {
        offered(foe)?;
        let (reader, _writer) = rustix::pipe::pipe().map_err(|_| Halt::Closed)?;
        used_in_spite(foe, &reader, ROOM, 0)
    }),
    Case::new("no-descriptor", "A region without a descriptor", |foe| {
        offered(foe)?;
        foe.tell(SET_INFLIGHT_FD, &body(ROOM, 0, 8, 256), &[])
    }),
    Case::new("garbage", "A region of garbage", |foe| logged(foe, |fd| fill(fd, 0, &[0xa5; 8192]))),
    Case::new("ones", "A region of ones", |foe| logged(foe, |fd| fill(fd, 0, &[0xff; 8192]))),
    Case::new("other-size", "A log for a ring of another size", |foe| logged(foe, |fd| begin(fd, 4 * SIZE, 0, 0))),
    Case::new("version", "A log of an unknown version", |foe| {
        logged(foe, |fd| {
            begin(fd, SIZE, 0, 0);
            fill(fd, 8, &7u16.to_le_bytes());
        })
    }),
    Case::new("all-taken", "A log in which every descriptor is in flight, and none is a request", |foe| {
        logged(foe, |fd| {
            begin(fd, SIZE, 0, 0);
            (0..SIZE).for_each(|head| mark(fd, head, 0, u64::from(head)));
        })
    }),
    Case::new("taken-valid", "A log in which descriptors are in flight that point into memory", |foe| {
        (0..SIZE).for_each(|head| foe.guest.describe(DESC, head, desc(DATA, 64, WRITE, 0)));
        logged(foe, |fd| {
            begin(fd, SIZE, 0, 0);
            (0..SIZE).for_each(|head| mark(fd, head, 0, u64::MAX));
        })
    }),
    Case::new("list-loop", "A log whose last batch goes round", |foe| {
        logged(foe, |fd| {
            begin(fd, SIZE, 3, 0xfff0);
            mark(fd, 3, 3, 0);
        })
    }),
    Case::new("list-outside", "A log whose last batch leads out of it", |foe| {
        logged(foe, |fd| {
            begin(fd, SIZE, 0xffff, 0xfffe);
            mark(fd, 3, 0xffff, 0);
        })
    }),
    Case::new("used-jump", "A log that has given back more than the ring holds", |foe| {
        logged(foe, |fd| begin(fd, SIZE, 0, 0x8000))
    }),
    Case::new("rewrite", "A log that is rewritten under a running ring", |foe| {
        offered(foe)?;
        let fd = sealed(ROOM)?;
        let seen = set(foe, &fd, ROOM, 0)?;
        if seen != Seen::Taken {
            return Ok(seen);
        }
        run(foe)?;
        for round in 0..100u8 {
            fill(&fd, 0, &[round.wrapping_mul(37); 512]);
            if !foe.exchange(std::time::Duration::from_millis(100)) {
                break;
            }
        }
        foe.ring_outcome()
    }),
    Case::new("running", "Another region while a ring runs", |foe| {
        foe.start()?;
        foe.needs(features::INFLIGHT_SHMFD, "an in-flight log")?;
        let fd = sealed(ROOM)?;
        worst([set(foe, &fd, ROOM, 0), foe.ring_outcome()])
    }),
];

fn offered(foe: &mut Foe) -> Result<()> {
    foe.greet()?;
    foe.needs(features::INFLIGHT_SHMFD, "an in-flight log")
}

fn body(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut body = [size, offset].map(u64::to_ne_bytes).concat();
    body.extend([queues, queue_size, 0, 0].map(u16::to_ne_bytes).concat());
    body
}

fn get(foe: &mut Foe, queues: u16, size: u16) -> Result<Seen> {
    offered(foe)?;
    match foe.ask(GET_INFLIGHT_FD, &body(0, 0, queues, size)) {
        Ok(message) if message.fds.is_empty() => Ok(Seen::Refused),
        Ok(_) => Ok(Seen::Taken),
        Err(seen) => Ok(seen),
    }
}

/// Hands a region over: for as many queues as the attacked ring needs.
fn set(foe: &Foe, fd: &OwnedFd, size: u64, offset: u64) -> Result<Seen> {
    let queues = u16::try_from(foe.target.queue + 1).unwrap_or(1);
    foe.tell(SET_INFLIGHT_FD, &body(size, offset, queues, SIZE), &[fd.as_fd()])
}

fn run(foe: &mut Foe) -> Result<()> {
    foe.send_memory()?;
    foe.place_ring()?;
    foe.run()
}

fn used_in_spite(foe: &mut Foe, fd: &OwnedFd, size: u64, offset: u64) -> Result<Seen> {
    let seen = set(foe, fd, size, offset)?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    run(foe)?;
    foe.ring_outcome()
}

/// A ring that is to continue from a log with this content.
fn logged(foe: &mut Foe, write: impl FnOnce(&OwnedFd)) -> Result<Seen> {
    offered(foe)?;
    let fd = sealed(ROOM)?;
    write(&fd);
    let seen = set(foe, &fd, ROOM, 0)?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    foe.send_memory()?;
    foe.place_ring()?;
    let ring = foe.target.queue;
    let kicked = foe.tell(SET_VRING_KICK, &u64::from(ring).to_ne_bytes(), &[foe.kick.as_fd()]);
    match worst([kicked, foe.tell(SET_VRING_ENABLE, &pair(ring, 1), &[])])? {
        Seen::Taken => foe.ring_outcome(),
        other => Ok(other),
    }
}

/// Writes the same into the log of every queue: both layouts of neighbouring logs lie within it.
fn fill(fd: &OwnedFd, at: u64, bytes: &[u8]) {
    let log = (HEADER + u64::from(SIZE) * ENTRY).next_multiple_of(64);
    for queue in [0, log] {
        let _whole = rustix::io::pwrite(fd, bytes, queue + at);
    }
}

/// The head of a log: features, version 1, entries, the head of the last batch, the used index.
fn begin(fd: &OwnedFd, entries: u16, last: u16, used: u16) {
    fill(fd, 0, &[0; 8]);
    fill(fd, 8, &[1, entries, last, used].map(u16::to_le_bytes).concat());
}

/// A descriptor that is in flight.
fn mark(fd: &OwnedFd, head: u16, next: u16, counter: u64) {
    let at = HEADER + u64::from(head) * ENTRY;
    fill(fd, at, &[1]);
    fill(fd, at + 6, &next.to_le_bytes());
    fill(fd, at + 8, &counter.to_le_bytes());
}
