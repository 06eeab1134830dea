//! Rings in places where none can be, descriptors that notify in strange ways, and changes under a running ring.

use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::ReadWriteFlags;

use super::foe::{
    Foe, Result, SET_FEATURES, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR, SET_VRING_KICK,
    SET_VRING_NUM, event, pair, words,
};
use super::guest::{AVAIL, BASE, DESC, END, HALF, SIZE, USED, addresses, sealed, user};
use super::wire::worst;
use super::{Case, Halt, Seen};

/// How long a ring is put under load.
const LOAD: Duration = Duration::from_millis(300);

pub(super) const CASES: &[Case] = &[
    Case::new("kick-semaphore", "A kick in semaphore mode with a count of 4 billion", |foe| {
        let fd = eventfd(u32::MAX, EventfdFlags::SEMAPHORE | EventfdFlags::NONBLOCK).map_err(|_| Halt::Closed)?;
        let _more = rustix::io::write(&fd, &(u64::MAX - 1 - u64::from(u32::MAX)).to_ne_bytes());
        kicked_by(foe, fd.as_fd())
    }),
    Case::new("kick-full", "A kick that is counted to its end", |foe| {
        let fd = event(0)?;
        let _full = rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes());
        kicked_by(foe, fd.as_fd())
    }),
    Case::new("kick-blocking", "A kick that blocks", |foe| {
        let fd = eventfd(1, EventfdFlags::CLOEXEC).map_err(|_| Halt::Closed)?;
        kicked_by(foe, fd.as_fd())
    }),
    Case::new("kick-pipe", "A pipe as kick, full", |foe| {
        let (reader, writer) = full_pipe()?;
        let seen = kicked_by(foe, reader.as_fd());
        drop(writer);
        seen
    }),
    Case::new("kick-hung-up", "A pipe as kick whose writer is gone", |foe| {
        let (reader, writer) = rustix::pipe::pipe().map_err(|_| Halt::Closed)?;
        drop(writer);
        kicked_by(foe, reader.as_fd())
    }),
    Case::new("kick-socket", "A socket as kick, with bytes in it", |foe| {
        let (ours, theirs) = UnixStream::pair().map_err(|_| Halt::Closed)?;
        (&ours).write_all(&[1; 100]).map_err(|_| Halt::Closed)?;
        kicked_by(foe, theirs.as_fd())
    }),
    Case::new("kick-file", "A file as kick", |foe| {
        let fd = sealed(4096)?;
        kicked_by(foe, fd.as_fd())
    }),
    Case::new("kick-epoll", "An epoll that is always ready as kick", |foe| {
        use rustix::event::epoll;
        let ready = event(1)?;
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|_| Halt::Closed)?;
        let added = epoll::add(&fd, &ready, epoll::EventData::new_u64(0), epoll::EventFlags::IN);
        added.map_err(|_| Halt::Closed)?;
        kicked_by(foe, fd.as_fd())
    }),
    Case::new("kick-absent", "A ring without a kick", |foe| {
        foe.prepare()?;
        let ring = foe.target.queue;
        let seen = worst([
            foe.tell(SET_VRING_KICK, &words(&[u64::from(ring) | 0x100]), &[]),
            foe.tell(SET_VRING_ENABLE, &pair(ring, 1), &[]),
        ])?;
        worst([Ok(seen), Ok(foe.stop())])
    }),
    Case::new("kick-changes", "2000 kicks, each another descriptor, under load", |foe| {
        foe.start()?;
        let mut seen = Seen::Taken;
        for _ in 0..2000 {
            let fd = event(1)?;
            seen = worst([Ok(seen), foe.tell(SET_VRING_KICK, &words(&[foe.target.queue.into()]), &[fd.as_fd()])])?;
        }
        foe.must(SET_VRING_KICK, &words(&[foe.target.queue.into()]), &[foe.kick.as_fd()])?;
        worst([Ok(seen), foe.ring_outcome()])
    }),
    Case::new("kick-storm", "A million kicks for nothing", |foe| {
        foe.start()?;
        let start = Instant::now();
        while start.elapsed() < LOAD {
            (0..1000).for_each(|_| foe.ring());
        }
        foe.ring_outcome()
    }),
    Case::new("kick-early", "Kicks before there is memory, and a ring that is enabled before it is anywhere", |foe| {
        foe.greet()?;
        let seen = worst([
            foe.tell(SET_VRING_ENABLE, &pair(foe.target.queue, 1), &[]),
            foe.tell(SET_VRING_KICK, &words(&[foe.target.queue.into()]), &[foe.kick.as_fd()]),
        ])?;
        foe.ring();
        worst([Ok(seen), Ok(foe.still_answers())])
    }),
    Case::new("call-blocking", "A call that would block", |foe| {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).map_err(|_| Halt::Closed)?;
        let _full = rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes());
        called_by(foe, SET_VRING_CALL, fd.as_fd())
    }),
    Case::new("call-unblocked", "A full call that is made to block after it was looked at", |foe| {
        foe.start()?;
        let _full = rustix::io::write(&foe.call, &(u64::MAX - 1).to_ne_bytes());
        block(&foe.call)?;
        foe.submit();
        std::thread::sleep(Duration::from_millis(20));
        worst([Ok(foe.still_answers()), Ok(foe.stop())])
    }),
    Case::new("kick-unblocked", "A kick that is made to block, and taken back before it is read", |foe| {
        foe.start()?;
        block(&foe.kick)?;
        let start = Instant::now();
        while start.elapsed() < LOAD {
            foe.ring();
            // Whoever comes second finds nothing; this side does not wait for it.
            let mut count = [0; 8];
            let into = &mut [IoSliceMut::new(&mut count)];
            let _whoever_was_first = rustix::io::preadv2(&foe.kick, into, u64::MAX, ReadWriteFlags::NOWAIT);
        }
        worst([Ok(foe.still_answers()), Ok(foe.stop())])
    }),
    Case::new("call-pipe", "A full pipe as call", |foe| {
        let (reader, writer) = full_pipe()?;
        let seen = called_by(foe, SET_VRING_CALL, writer.as_fd());
        drop(reader);
        seen
    }),
    Case::new("call-socket", "A socket that nobody reads as call", |foe| {
        let (ours, theirs) = UnixStream::pair().map_err(|_| Halt::Closed)?;
        drop(ours);
        called_by(foe, SET_VRING_CALL, theirs.as_fd())
    }),
    Case::new("call-file", "A file as call", |foe| {
        let fd = sealed(4096)?;
        called_by(foe, SET_VRING_CALL, fd.as_fd())
    }),
    Case::new("error-pipe", "A full pipe for errors, and an error", |foe| {
        let (reader, writer) = full_pipe()?;
        foe.prepare()?;
        let seen = foe.tell(SET_VRING_ERR, &words(&[foe.target.queue.into()]), &[writer.as_fd()])?;
        foe.run()?;
        foe.guest.jump(0x8000);
        let outcome = foe.ring_outcome();
        drop(reader);
        worst([Ok(seen), outcome])
    }),
    Case::new("size-0", "A ring of no descriptors", |foe| sized(foe, 0)),
    Case::new("size-3", "A ring of 3 descriptors", |foe| sized(foe, 3)),
    Case::new("size-65535", "A ring of 65535 descriptors", |foe| sized(foe, 65535)),
    Case::new("size-2g", "A ring of 2 billion descriptors", |foe| sized(foe, 0x8000_0000)),
    Case::new("base-65535", "A ring that begins at 65535", |foe| based(foe, 0xffff)),
    Case::new("base-4g", "A ring that begins at 4 billion", |foe| based(foe, u32::MAX)),
    Case::new("outside", "A ring outside of memory", |foe| placed(foe, 1 << 60, user(USED), user(AVAIL))),
    Case::new("outside-used", "A used ring outside of memory", |foe| placed(foe, user(DESC), 1 << 60, user(AVAIL))),
    Case::new("straddle", "A descriptor table that reaches over the end of memory", |foe| {
        placed(foe, user(END - 16), user(USED), user(AVAIL))
    }),
    Case::new("straddle-used", "A used ring that reaches over the end of memory", |foe| {
        placed(foe, user(DESC), user(END - 4), user(AVAIL))
    }),
    Case::new("straddle-region", "A table that reaches from one region into the next", |foe| {
        placed(foe, user(BASE + HALF - 16), user(USED), user(AVAIL))
    }),
    Case::new("misaligned-table", "A descriptor table at an odd address", |foe| {
        placed(foe, user(DESC) + 1, user(USED), user(AVAIL))
    }),
    Case::new("misaligned-avail", "An available ring at an odd address", |foe| {
        placed(foe, user(DESC), user(USED), user(AVAIL) + 1)
    }),
    Case::new("misaligned-used", "A used ring at an odd address", |foe| placed(foe, user(DESC), user(USED) + 1, user(AVAIL))),
    Case::new("wrap", "A ring whose addresses wrap", |foe| placed(foe, u64::MAX - 15, u64::MAX - 3, u64::MAX - 1)),
    Case::new("on-itself", "A table, an available and a used ring at the same address", |foe| {
        placed(foe, user(DESC), user(DESC), user(DESC))
    }),
    Case::new("running-size", "Another size while the ring runs", |foe| {
        foe.start()?;
        changed(foe, SET_VRING_NUM, &pair(foe.target.queue, 256))
    }),
    Case::new("running-place", "Another place while the ring runs", |foe| {
        foe.start()?;
        changed(foe, SET_VRING_ADDR, &addresses(foe.target.queue, user(END - 16), user(END - 4), user(END - 2)))
    }),
    Case::new("running-base", "Another base while the ring runs", |foe| {
        foe.start()?;
        changed(foe, SET_VRING_BASE, &pair(foe.target.queue, 0x7fff))
    }),
    Case::new("running-features", "No features while the ring runs", |foe| {
        foe.start()?;
        changed(foe, SET_FEATURES, &(1u64 << 30).to_ne_bytes())
    }),
    Case::new("running-packed", "A packed ring, while a split one runs", |foe| {
        foe.start()?;
        changed(foe, SET_FEATURES, &(1u64 << 30 | 1 << 32 | 1 << 34).to_ne_bytes())
    }),
    Case::new("load-enable", "A ring disabled and enabled 200 times under load", |foe| {
        foe.start()?;
        for _ in 0..200 {
            load(foe);
            foe.must(SET_VRING_ENABLE, &pair(foe.target.queue, 0), &[])?;
            foe.must(SET_VRING_ENABLE, &pair(foe.target.queue, 1), &[])?;
        }
        std::thread::sleep(Duration::from_millis(20));
        foe.ring_outcome()
    }),
    Case::new("load-stop", "A ring stopped and started 100 times under load", |foe| {
        foe.start()?;
        for _ in 0..100 {
            load(foe);
            if let Some(seen) = foe.begin_again()? {
                return Ok(seen);
            }
        }
        foe.ring_outcome()
    }),
    Case::new("load-call", "500 other calls under load", |foe| {
        foe.start()?;
        for _ in 0..500 {
            load(foe);
            let fd = event(0)?;
            foe.must(SET_VRING_CALL, &words(&[foe.target.queue.into()]), &[fd.as_fd()])?;
        }
        foe.must(SET_VRING_CALL, &words(&[foe.target.queue.into()]), &[foe.call.as_fd()])?;
        std::thread::sleep(Duration::from_millis(20));
        foe.ring_outcome()
    }),
    Case::new("stop-twice", "A ring that is stopped, twice, and one that never ran", |foe| {
        foe.start()?;
        worst([Ok(foe.stop()), Ok(foe.stop()), Ok(foe.stop())])
    }),
];

/// A ring that is kicked by this.
fn kicked_by(foe: &mut Foe, fd: BorrowedFd<'_>) -> Result<Seen> {
    foe.prepare()?;
    let ring = foe.target.queue;
    let seen = foe.tell(SET_VRING_KICK, &words(&[ring.into()]), &[fd])?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    // The ring is left running: whoever spins does so while it runs.
    worst([foe.tell(SET_VRING_ENABLE, &pair(ring, 1), &[]), Ok(foe.still_answers())])
}

/// A ring that signals by this, with a request to signal about.
fn called_by(foe: &mut Foe, request: u32, fd: BorrowedFd<'_>) -> Result<Seen> {
    foe.prepare()?;
    let seen = foe.tell(request, &words(&[foe.target.queue.into()]), &[fd])?;
    foe.run()?;
    worst([Ok(seen), foe.ring_outcome(), Ok(foe.stop())])
}

/// Lets a descriptor block again, for everybody who shares it.
fn block(fd: &OwnedFd) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd).context("Cannot look at an event descriptor")?;
    Ok(rustix::fs::fcntl_setfl(fd, flags - rustix::fs::OFlags::NONBLOCK).context("Cannot change an event descriptor")?)
}

fn full_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe().context("Cannot make a pipe")?;
    let flags = rustix::fs::fcntl_getfl(&writer).context("Cannot look at a pipe")?;
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).context("Cannot change a pipe")?;
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).context("Cannot change a pipe")?;
    Ok((reader, writer))
}

fn sized(foe: &mut Foe, size: u32) -> Result<Seen> {
    foe.prepare()?;
    let seen = foe.tell(SET_VRING_NUM, &pair(foe.target.queue, size), &[])?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    started(foe)
}

fn based(foe: &mut Foe, base: u32) -> Result<Seen> {
    foe.prepare()?;
    let seen = foe.tell(SET_VRING_BASE, &pair(foe.target.queue, base), &[])?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    started(foe)
}

fn placed(foe: &mut Foe, desc: u64, used: u64, avail: u64) -> Result<Seen> {
    foe.prepare()?;
    let seen = foe.tell(SET_VRING_ADDR, &addresses(foe.target.queue, desc, used, avail), &[])?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    started(foe)
}

/// Starts what should not be startable.
fn started(foe: &mut Foe) -> Result<Seen> {
    let ring = foe.target.queue;
    let kick = foe.tell(SET_VRING_KICK, &words(&[ring.into()]), &[foe.kick.as_fd()]);
    let seen = worst([kick, foe.tell(SET_VRING_ENABLE, &pair(ring, 1), &[])])?;
    if seen != Seen::Taken {
        return Ok(seen);
    }
    (0..SIZE).for_each(|head| foe.guest.offer(head));
    foe.ring_outcome()
}

fn changed(foe: &mut Foe, request: u32, body: &[u8]) -> Result<Seen> {
    let seen = foe.tell(request, body, &[])?;
    let outcome = foe.ring_outcome()?;
    // A refusal that leaves the ring as it was is a refusal.
    worst([Ok(seen), Ok(outcome), Ok(foe.stop())])
}

fn load(foe: &mut Foe) {
    if foe.guest.available().wrapping_sub(foe.guest.used()) >= 2 {
        return;
    }
    if !foe.submit() {
        foe.ring();
    }
}
