//! Messages that no frontend sends.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_user::features;

use super::foe::{
    self, Foe, GET_CONFIG, GET_FEATURES, IOTLB, MOST_FDS, POSTCOPY_ADVISE, RESET_DEVICE, RESET_OWNER, SET_BACKEND_REQ_FD,
    SET_CONFIG, SET_DEVICE_STATE_FD, SET_FEATURES, SET_LOG_BASE, SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_BASE,
    SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM, event, pair, words,
};
use super::guest::{sealed, unsealed};
use super::{Case, Halt, Seen};
use crate::link::connect_within;

/// How long silence is kept after half a message.
const SILENCE: Duration = Duration::from_millis(1500);

pub(super) const CASES: &[Case] = &[
    Case::new("half-header", "Half a header, then silence", |foe| {
        foe.raw(&[1, 0, 0, 0, 1, 0])?;
        Ok(foe.wait_for_close(SILENCE))
    }),
    Case::new("header-only", "A header that announces a body, then silence", |foe| {
        foe.header(SET_FEATURES, 1, 8)?;
        Ok(foe.wait_for_close(SILENCE))
    }),
    Case::new("half-body", "Half a body, then silence", |foe| {
        foe.header(SET_FEATURES, 1, 8)?;
        foe.raw(&[0; 4])?;
        Ok(foe.wait_for_close(SILENCE))
    }),
    Case::new("half-header-gone", "Half a header, then the end", |foe| {
        foe.raw(&[1, 0, 0, 0, 1, 0])?;
        end(foe)
    }),
    Case::new("half-body-gone", "Half a body, then the end", |foe| {
        foe.header(SET_FEATURES, 1, 8)?;
        foe.raw(&[0; 4])?;
        end(foe)
    }),
    Case::new("byte-by-byte", "A correct message in single bytes", |foe| {
        let bytes = [GET_FEATURES, 1, 0].map(u32::to_ne_bytes).concat();
        for byte in bytes {
            foe.raw(&[byte])?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(foe.still_answers())
    }),
    Case::new("size-4g", "A body announced with 4 GiB", |foe| {
        foe.header(SET_FEATURES, 1, u32::MAX)?;
        Ok(foe.wait_for_close(SILENCE))
    }),
    Case::new("size-64k", "A body of 64 KiB", |foe| {
        foe.header(SET_FEATURES, 1, 65536)?;
        foe.raw(&[0; 65536])?;
        Ok(foe.still_answers())
    }),
    Case::new("version-0", "A message of version 0", |foe| {
        foe.header(GET_FEATURES, 0, 0)?;
        Ok(foe.still_answers())
    }),
    Case::new("version-3", "A message of version 3", |foe| {
        foe.header(GET_FEATURES, 3, 0)?;
        Ok(foe.still_answers())
    }),
    Case::new("reserved-flags", "All reserved bits of the flags", |foe| {
        foe.header(GET_FEATURES, 0xffff_fff1, 0)?;
        Ok(foe.still_answers())
    }),
    Case::new("reply-flag", "An answer to nothing", |foe| {
        foe.header(GET_FEATURES, 5, 0)?;
        Ok(foe.still_answers())
    }),
    Case::new("request-0", "Request number 0", |foe| unknown(foe, 0)),
    Case::new("request-9999", "An unknown request", |foe| unknown(foe, 9999)),
    Case::new("request-max", "The largest request number", |foe| unknown(foe, u32::MAX)),
    Case::new("every-number", "Every request number to 60, each on a connection of its own, with a body of zeroes", |foe| {
        for number in 0..=60 {
            // Nobody waits for an answer: many backends serve one frontend at a time.
            if let Ok(other) = again(foe) {
                let _gone = other.send(number, &[0; 8], &[]);
            }
        }
        Ok(foe.still_answers())
    }),
    Case::new("body-short", "Bodies that are too short for their requests", |foe| {
        foe.greet()?;
        worst([SET_FEATURES, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_KICK].map(|request| foe.tell(request, &[0; 3], &[])))
    }),
    Case::new("body-long", "Bodies that are too long for their requests", |foe| {
        foe.greet()?;
        worst([SET_FEATURES, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_KICK].map(|request| foe.tell(request, &[0; 400], &[])))
    }),
    Case::new("features-all", "All virtio features, offered or not", |foe| {
        foe.greet()?;
        foe.tell(SET_FEATURES, &u64::MAX.to_ne_bytes(), &[])
    }),
    Case::new("protocol-all", "All protocol features, offered or not", |foe| {
        foe.greet()?;
        foe.tell(SET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes(), &[])
    }),
    Case::new("fds-8", "8 descriptors with a message that takes none", |foe| with_fds(foe, 8)),
    Case::new("fds-32", "32 descriptors with a message that takes none", |foe| with_fds(foe, 32)),
    Case::new("fds-253", "As many descriptors as a message can carry", |foe| with_fds(foe, MOST_FDS)),
    Case::new("fds-flood", "400 messages with 32 descriptors each", |foe| {
        foe.greet()?;
        for _ in 0..400 {
            if let seen @ (Seen::Closed | Seen::Waits) = with_fds(foe, 32)? {
                return Ok(seen);
            }
        }
        Ok(foe.still_answers())
    }),
    Case::new("fds-missing", "A kick that is announced and does not come", |foe| {
        foe.prepare()?;
        foe.tell(SET_VRING_KICK, &words(&[foe.target.queue.into()]), &[])
    }),
    Case::new("fds-unannounced", "A kick that comes and is said not to", |foe| {
        foe.prepare()?;
        let kick = event(0)?;
        foe.tell(SET_VRING_KICK, &words(&[u64::from(foe.target.queue) | 0x100]), &[kick.as_fd()])
    }),
    Case::new("ring-index", "Requests about rings that do not exist", |foe| {
        foe.greet()?;
        let mut seen = Vec::new();
        for ring in [0xff, 0x100, 0xffff, 0x8000_0000, u32::MAX] {
            for request in [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE] {
                seen.push(foe.tell(request, &pair(ring, 1), &[]));
            }
            seen.push(foe.tell(SET_VRING_ADDR, &super::guest::addresses(ring, 0, 0, 0), &[]));
            seen.push(foe.tell(SET_VRING_KICK, &words(&[ring.into()]), &[event(0)?.as_fd()]));
        }
        worst(seen)
    }),
    Case::new("enable-2", "A ring enabled by 2", |foe| {
        foe.start()?;
        foe.tell(SET_VRING_ENABLE, &pair(foe.target.queue, 2), &[])
    }),
    Case::new("config-endless", "20000 questions for the configuration", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIG, "a configuration space")?;
        for _ in 0..20_000 {
            if let Err(seen) = foe.ask(GET_CONFIG, &config(0, 8)) {
                return Ok(seen);
            }
        }
        Ok(Seen::Taken)
    }),
    Case::new("config-unread", "Questions for the configuration whose answers nobody reads", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIG, "a configuration space")?;
        let message = [&[GET_CONFIG, 1, 268].map(u32::to_ne_bytes).concat()[..], &config(0, 256)].concat();
        foe.stream.set_write_timeout(Some(SILENCE)).map_err(|_| Halt::Closed)?;
        for _ in 0..20_000 {
            if foe.stream.write_all(&message).is_err() {
                return Ok(foe.wait_for_close(Duration::ZERO));
            }
        }
        foe.swallow()?;
        Ok(foe.still_answers())
    }),
    Case::new("config-far", "Configuration behind its end", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIG, "a configuration space")?;
        let far = foe.ask(GET_CONFIG, &config(u32::MAX - 8, 16)).map(|_| Seen::Taken);
        worst([Ok(far.unwrap_or_else(|seen| seen)), Ok(foe.still_answers())])
    }),
    Case::new("config-size", "Configuration whose size is a lie", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIG, "a configuration space")?;
        let mut body = config(0, 16);
        body[4..8].copy_from_slice(&0xffff_u32.to_ne_bytes());
        let answer = foe.ask(GET_CONFIG, &body).map(|_| Seen::Taken);
        Ok(answer.unwrap_or_else(|seen| seen))
    }),
    Case::new("config-write", "Garbage written all over the configuration and behind it", |foe| {
        foe.greet()?;
        foe.needs(features::CONFIG, "a configuration space")?;
        let garbage = |offset: u32, len: u32| {
            let mut body = config(offset, len);
            body[12..].fill(0xa5);
            body
        };
        worst([(0, 256), (60, 200), (u32::MAX, 4), (4096, 256)].map(|(at, len)| foe.tell(SET_CONFIG, &garbage(at, len), &[])))
    }),
    Case::new("log-short", "A dirty log that is longer than its file", |foe| {
        foe.prepare()?;
        foe.tell(SET_LOG_BASE, &words(&[1 << 40, 0]), &[sealed(4096)?.as_fd()])
    }),
    Case::new("log-offset", "A dirty log whose offset wraps", |foe| {
        foe.prepare()?;
        foe.tell(SET_LOG_BASE, &words(&[8192, u64::MAX - 4096]), &[sealed(4096)?.as_fd()])
    }),
    Case::new("log-cut", "A dirty log that is cut off under a running ring with logging", |foe| {
        foe.prepare()?;
        let log = unsealed(1 << 20)?;
        let seen = foe.tell(SET_LOG_BASE, &words(&[1 << 20, 0]), &[log.as_fd()])?;
        let _refused = foe.tell(SET_FEATURES, &(1u64 << 26 | 1 << 30 | 1 << 32).to_ne_bytes(), &[])?;
        rustix::fs::ftruncate(&log, 0).map_err(|_| Halt::Closed)?;
        foe.run()?;
        worst([foe.ring_outcome(), Ok(seen)])
    }),
    Case::new("iotlb", "Address translations that nobody asked for", |foe| {
        foe.prepare()?;
        foe.tell(IOTLB, &words(&[0, u64::MAX, 0, 2 << 8]), &[])
    }),
    Case::new("postcopy", "The begin of a migration that was not negotiated", |foe| {
        foe.prepare()?;
        worst([0, 1, 2].map(|step| foe.tell(POSTCOPY_ADVISE + step, &[], &[])))
    }),
    Case::new("device-state", "A pipe for a state that was not negotiated", |foe| {
        foe.prepare()?;
        let (reader, _writer) = rustix::pipe::pipe().map_err(|_| Halt::Closed)?;
        foe.tell(SET_DEVICE_STATE_FD, &words(&[0]), &[reader.as_fd()])
    }),
    Case::new("backend-channel", "A pipe, and a socket that nobody reads, as the backend's own channel", |foe| {
        foe.greet()?;
        foe.needs(features::BACKEND_REQ, "requests of its own")?;
        let (reader, _writer) = rustix::pipe::pipe().map_err(|_| Halt::Closed)?;
        let seen = foe.tell(SET_BACKEND_REQ_FD, &[], &[reader.as_fd()]);
        let (_ours, theirs) = UnixStream::pair().map_err(|_| Halt::Closed)?;
        worst([seen, foe.tell(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])])
    }),
    Case::new("resets", "200 resets of a device that runs", |foe| {
        foe.start()?;
        for _ in 0..200 {
            let _done_or_not = foe.tell(RESET_OWNER, &[], &[])?;
            if let seen @ (Seen::Closed | Seen::Waits) = foe.tell(RESET_DEVICE, &[], &[])? {
                return Ok(seen);
            }
        }
        Ok(foe.still_answers())
    }),
    Case::new("vanish", "The end of the connection with requests in hand", |foe| {
        foe.start()?;
        foe.submit();
        end(foe)
    }),
    Case::new("connections", "50 connections at the same time, and 300 one after the other", |foe| {
        let held: Vec<_> = (0..50).filter_map(|_| again(foe).ok()).collect();
        drop(held);
        for _ in 0..300 {
            let _refused = again(foe);
        }
        Ok(foe.still_answers())
    }),
];

fn end(foe: &mut Foe) -> foe::Result<Seen> {
    foe.stream.shutdown(std::net::Shutdown::Both).map_err(|_| Halt::Closed)?;
    Ok(Seen::Closed)
}

fn unknown(foe: &mut Foe, number: u32) -> foe::Result<Seen> {
    foe.greet()?;
    foe.tell(number, &[0; 8], &[])
}

fn with_fds(foe: &mut Foe, count: usize) -> foe::Result<Seen> {
    let one = event(0)?;
    let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| one.as_fd()).collect();
    foe.send(GET_FEATURES, &[], &fds)?;
    Ok(foe.still_answers())
}

/// One more connection to the same backend, by the address of the first.
fn again(foe: &Foe) -> foe::Result<Foe> {
    let address = foe.stream.peer_addr().map_err(|_| Halt::Closed)?;
    let path = address.as_pathname().ok_or(Halt::NotOffered("a path to connect to"))?;
    // Where one frontend is served at a time, the queue of the others may be full.
    let stream = connect_within(path, Duration::from_millis(1)).map_err(|_| Halt::Closed)?;
    stream.set_write_timeout(Some(Duration::from_secs(1))).map_err(|_| Halt::Closed)?;
    Ok(Foe::new(stream, foe.target)?)
}

/// The body of a request about the configuration space.
fn config(offset: u32, size: u32) -> Vec<u8> {
    let mut body = [offset, size, 0].map(u32::to_ne_bytes).concat();
    body.resize(12 + usize::try_from(size).unwrap_or(0), 0);
    body
}

/// Of several answers the one that says most.
pub(super) fn worst(all: impl IntoIterator<Item = foe::Result<Seen>>) -> foe::Result<Seen> {
    let rank = |seen: &Seen| match seen {
        Seen::Taken => 0,
        Seen::Refused => 1,
        Seen::Broke => 2,
        Seen::Waits => 3,
        Seen::Closed => 4,
    };
    let all = all.into_iter().collect::<foe::Result<Vec<_>>>()?;
    Ok(all.into_iter().max_by_key(rank).unwrap_or(Seen::Taken))
}
