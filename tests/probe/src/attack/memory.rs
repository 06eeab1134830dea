//! Guest memory that is not what it is said to be.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, ftruncate, open};
use vhost_user::features;

use super::foe::{ADD_MEM_REG, Foe, REM_MEM_REG, Result, SET_MEM_TABLE, event, words};
use super::guest::{BASE, DATA, DESC, END, HALF, USER, WRITE, desc, sealed, table, unsealed};
use super::wire::worst;
use super::{Case, Halt, Seen};

/// Where the lying region lies: behind the rest.
const LIE: u64 = END + 0x1000_0000;
const LIE_USER: u64 = 0x2_0000_0000_0000;
const MIB: u64 = 1 << 20;

pub(super) const CASES: &[Case] = &[
    Case::new("short", "A file of 4 KiB announced with 1 GiB, and a buffer in what is missing", |foe| {
        foe.greet()?;
        let fd = sealed(4096)?;
        lying_region(foe, fd.as_fd(), 1 << 30, |_| Ok(()))
    }),
    Case::new("short-ring", "A ring in memory that its file does not have", |foe| {
        foe.greet()?;
        let fd = sealed(2 * 4096)?;
        let seen = foe.tell(SET_MEM_TABLE, &table(&[[BASE, HALF, USER[0], 0]]), &[fd.as_fd()])?;
        if seen != Seen::Taken {
            return Ok(seen);
        }
        foe.place_ring()?;
        foe.run()?;
        foe.ring_outcome()
    }),
    Case::new("cut", "Memory that is cut off after it was announced, and a buffer in it", |foe| {
        foe.greet()?;
        let fd = unsealed(MIB)?;
        lying_region(foe, fd.as_fd(), MIB, |_| ftruncate(&fd, 0).map_err(|_| Halt::Closed))
    }),
    Case::new("cut-ring", "Memory that is cut off under a running ring", |foe| {
        foe.greet()?;
        let fd = unsealed(2 * HALF)?;
        let body = table(&[[BASE, HALF, USER[0], 0]]);
        let seen = foe.tell(SET_MEM_TABLE, &body, &[fd.as_fd()])?;
        if seen != Seen::Taken {
            return Ok(seen);
        }
        foe.place_ring()?;
        foe.run()?;
        ftruncate(&fd, 0).map_err(|_| Halt::Closed)?;
        foe.ring();
        std::thread::sleep(Duration::from_millis(50));
        worst([foe.ring_outcome(), Ok(foe.stop())])
    }),
    Case::new("unsealed", "Memory that could be cut off", |foe| {
        foe.greet()?;
        let fd = unsealed(MIB)?;
        lying_region(foe, fd.as_fd(), MIB, |_| Ok(()))
    }),
    Case::new("punched", "Holes punched into the memory under a running ring", |foe| {
        foe.start()?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&foe.guest.fd, hole, 0, 2 * HALF).map_err(|_| Halt::Closed)?;
        foe.guest.jump(0);
        foe.ring_outcome()
    }),
    Case::new("pipe", "A pipe as memory", |foe| {
        let (reader, _writer) = rustix::pipe::pipe().map_err(|_| Halt::Closed)?;
        as_memory(foe, reader.as_fd())
    }),
    Case::new("socket", "A socket as memory", |foe| {
        let (one, _other) = UnixStream::pair().map_err(|_| Halt::Closed)?;
        as_memory(foe, one.as_fd())
    }),
    Case::new("event", "An event descriptor as memory", |foe| {
        let fd = event(0)?;
        as_memory(foe, fd.as_fd())
    }),
    Case::new("folder", "A folder as memory", |foe| {
        let fd = file("/", OFlags::RDONLY | OFlags::DIRECTORY)?;
        as_memory(foe, fd.as_fd())
    }),
    Case::new("zero-device", "/dev/zero as memory", |foe| {
        let fd = file("/dev/zero", OFlags::RDWR)?;
        as_memory(foe, fd.as_fd())
    }),
    Case::new("read-only", "A descriptor that may only be read", |foe| {
        let fd = sealed(MIB)?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let again = file(&path, OFlags::RDONLY)?;
        as_memory(foe, again.as_fd())
    }),
    Case::new("path-only", "A descriptor that is only a path", |foe| {
        let fd = file("/dev/null", OFlags::PATH)?;
        as_memory(foe, fd.as_fd())
    }),
    Case::new("overlap", "Two regions at the same addresses", |foe| {
        regions(foe, &[[BASE, HALF, USER[0], 0], [BASE + HALF / 2, HALF, USER[1], HALF]])
    }),
    Case::new("overlap-user", "Two regions with the same names", |foe| {
        regions(foe, &[[BASE, HALF, USER[0], 0], [BASE + HALF, HALF, USER[0], HALF]])
    }),
    Case::new("wrap", "A region whose addresses wrap", |foe| regions(foe, &[[u64::MAX - 4095, 2 * 4096, USER[0], 0]])),
    Case::new("wrap-user", "A region whose names wrap", |foe| regions(foe, &[[BASE, 2 * 4096, u64::MAX - 4095, 0]])),
    Case::new("wrap-offset", "A region whose place in the file wraps", |foe| {
        regions(foe, &[[BASE, HALF, USER[0], u64::MAX - HALF + 4097]])
    }),
    Case::new("empty", "A region of no bytes", |foe| regions(foe, &[[BASE, 0, USER[0], 0]])),
    Case::new("all", "A region of all 64-bit addresses", |foe| regions(foe, &[[0, u64::MAX, 0, 0]])),
    Case::new("no-regions", "A table of no regions, and a ring", |foe| {
        foe.greet()?;
        let seen = foe.tell(SET_MEM_TABLE, &table(&[]), &[])?;
        if matches!(seen, Seen::Closed | Seen::Waits) {
            return Ok(seen);
        }
        foe.place_ring()?;
        foe.run()?;
        foe.ring_outcome()
    }),
    Case::new("misaligned", "A region that begins at byte 1 of its file", |foe| regions(foe, &[[BASE, HALF, USER[0], 1]])),
    Case::new("odd", "A region at odd addresses with an odd size, and a ring in it", |foe| {
        regions(foe, &[[BASE + 1, HALF - 2, USER[0] + 1, HALF + 1]])
    }),
    Case::new("huge", "64 TiB in a sparse file", |foe| {
        foe.greet()?;
        let fd = sealed(1 << 46)?;
        foe.tell(SET_MEM_TABLE, &table(&[[BASE, 1 << 46, USER[0], 0]]), &[fd.as_fd()])
    }),
    Case::new("many", "A table of 32 regions", |foe| {
        let list: Vec<_> = (0..32).map(|n| [BASE + n * 0x10000, 0x4000, USER[0] + n * 0x10000, 0]).collect();
        regions(foe, &list)
    }),
    Case::new("count", "A table that says it has 4 billion regions", |foe| {
        foe.greet()?;
        let mut body = table(&[[BASE, HALF, USER[0], 0]]);
        body[..4].fill(0xff);
        foe.tell(SET_MEM_TABLE, &body, &[foe.guest.fd.as_fd()])
    }),
    Case::new("count-fds", "A table of two regions with one descriptor, and of one with three", |foe| {
        foe.greet()?;
        let (two, fds) = foe.guest.table();
        let one = table(&[[BASE, HALF, USER[0], 0]]);
        worst([foe.tell(SET_MEM_TABLE, &two, &fds[..1]), foe.tell(SET_MEM_TABLE, &one, &[fds[0], fds[0], fds[0]])])
    }),
    Case::new("slots", "600 regions, one by one", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIGURE_MEM_SLOTS, "memory slots")?;
        let mut worst_seen = Seen::Taken;
        for n in 0..600 {
            let body = words(&[0, BASE + n * 0x10000, 0x4000, USER[0] + n * 0x10000, 0]);
            worst_seen = worst([Ok(worst_seen), foe.tell(ADD_MEM_REG, &body, &[foe.guest.fd.as_fd()])])?;
        }
        Ok(worst_seen)
    }),
    Case::new("slots-twice", "One region added 400 times and removed 400 times", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIGURE_MEM_SLOTS, "memory slots")?;
        let body = words(&[0, BASE, HALF, USER[0], 0]);
        let mut all = Vec::new();
        for _ in 0..400 {
            all.push(foe.tell(ADD_MEM_REG, &body, &[foe.guest.fd.as_fd()]));
            all.push(foe.tell(REM_MEM_REG, &body, &[foe.guest.fd.as_fd()]));
        }
        worst(all)
    }),
    Case::new("remove-unknown", "The removal of memory that was never there", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIGURE_MEM_SLOTS, "memory slots")?;
        foe.tell(REM_MEM_REG, &words(&[0, LIE, HALF, LIE_USER, 0]), &[])
    }),
    Case::new("remove-used", "The removal of the memory in which a ring runs", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIGURE_MEM_SLOTS, "memory slots")?;
        foe.start()?;
        let seen = foe.tell(REM_MEM_REG, &words(&[0, BASE, HALF, USER[0], HALF]), &[])?;
        worst([Ok(seen), foe.ring_outcome()])
    }),
    Case::new("change", "Another table under a running ring", |foe| {
        foe.start()?;
        let other = sealed(HALF)?;
        let seen = foe.tell(SET_MEM_TABLE, &table(&[[LIE, HALF, LIE_USER, 0]]), &[other.as_fd()])?;
        worst([Ok(seen), foe.ring_outcome()])
    }),
    Case::new("change-load", "The table sent again and again under a ring with requests in it", |foe| {
        foe.start()?;
        let start = Instant::now();
        let mut seen = Seen::Taken;
        while start.elapsed() < Duration::from_millis(300) && !matches!(seen, Seen::Closed | Seen::Waits) {
            foe.submit();
            let (body, fds) = foe.guest.table();
            seen = worst([Ok(seen), foe.tell(SET_MEM_TABLE, &body, &fds)])?;
        }
        Ok(seen)
    }),
];

/// Adds a region that is not what it seems, lets the guest name a buffer in it, and sees what the ring makes of it.
fn lying_region(foe: &mut Foe, fd: BorrowedFd<'_>, size: u64, then: impl FnOnce(&Foe) -> Result<()>) -> Result<Seen> {
    let (mut body, mut fds) = foe.guest.table();
    body[..4].copy_from_slice(&3u32.to_ne_bytes());
    body.extend(words(&[LIE, size, LIE_USER, 0]));
    fds.push(fd);
    let seen = foe.tell(SET_MEM_TABLE, &body, &fds)?;
    drop(fds);
    if seen != Seen::Taken {
        return Ok(seen);
    }
    foe.place_ring()?;
    foe.run()?;
    then(foe)?;
    // Whatever the device makes of the chain, it has to touch what it may read and what it may write.
    foe.guest.describe(DESC, 0, desc(LIE + size / 2, 512, 1, 1));
    foe.guest.describe(DESC, 1, desc(LIE + size / 2, 512, WRITE, 0));
    foe.guest.describe(DESC, 2, desc(DATA, 16, 1, 3));
    foe.guest.describe(DESC, 3, desc(LIE + size / 2, 512, WRITE | 1, 4));
    foe.guest.describe(DESC, 4, desc(DATA, 1, WRITE, 0));
    foe.guest.describe(DESC, 5, desc(LIE + size / 2, 512, WRITE, 0));
    foe.guest.describe(DESC, 6, desc(LIE + size / 2, 512, 0, 0));
    [0, 2, 5, 6].into_iter().for_each(|head| foe.guest.offer(head));
    foe.ring_outcome()
}

/// Announces a descriptor as memory, alone.
fn as_memory(foe: &mut Foe, fd: BorrowedFd<'_>) -> Result<Seen> {
    foe.greet()?;
    let seen = foe.tell(SET_MEM_TABLE, &table(&[[BASE, HALF, USER[0], 0]]), &[fd])?;
    use_ring(foe, seen)
}

/// Starts a ring in the memory that was announced, if it was taken.
fn use_ring(foe: &mut Foe, seen: Seen) -> Result<Seen> {
    if seen != Seen::Taken {
        return Ok(seen);
    }
    foe.place_ring()?;
    foe.run()?;
    foe.ring();
    worst([Ok(foe.still_answers()), Ok(foe.stop())])
}

/// Announces regions of the ordinary file, and starts a ring in them.
fn regions(foe: &mut Foe, list: &[[u64; 4]]) -> Result<Seen> {
    foe.greet()?;
    let fds: Vec<BorrowedFd<'_>> = list.iter().map(|_| foe.guest.fd.as_fd()).collect();
    let seen = foe.tell(SET_MEM_TABLE, &table(list), &fds)?;
    drop(fds);
    use_ring(foe, seen)
}

fn file(path: &str, flags: OFlags) -> Result<OwnedFd> {
    let fd = open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|_| Halt::NotOffered("such a file"))?;
    Ok(OwnedFd::from(File::from(fd)))
}
