//! Any vhost-user disk as an NBD export, for clients that speak only that: nbdcopy, nbdfuse, qemu-img, the kernel.
//!
//! The protocol's newstyle handshake, with the options that clients use, and simple replies (<https://github.com/NetworkBlockDevice/nbd>,
//! `doc/proto.md`). Clients are served one after the other, and their requests, too: this is for looking at disks and for testing them, not
//! for speed.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Disk, F_DISCARD, F_FLUSH, F_RO, F_WRITE_ZEROES, Kind, SECTOR, Status, range};

/// A client that has connected says what it wants soon, or makes room for the next one.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Most bytes of an option: a name has at most 4096, and the rest is small.
const MOST_OPTION: u32 = 8192;

/// Most bytes of a request: what clients may ask for without being told.
const MOST_REQUEST: u32 = 32 << 20;

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const EXPORT: u32 = 3;
const UNSUPPORTED: u32 = (1 << 31) + 1;
const INVALID: u32 = (1 << 31) + 3;

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 2;
const SEND_FLUSH: u16 = 4;
const SEND_FUA: u16 = 8;
const SEND_TRIM: u16 = 32;
const SEND_WRITE_ZEROES: u16 = 64;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOTSUP: u32 = 95;

/// Listens at a path that nobody listens at.
///
/// # Errors
/// With the path.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let cannot = || format!("Cannot listen at {}", path.display());
    if UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
        // Somebody who listened here is dead.
        std::fs::remove_file(path).with_context(cannot)?;
    }
    UnixListener::bind(path).with_context(cannot)
}

/// Serves clients for as long as the disk answers.
///
/// # Errors
/// When it does not, or nobody can be listened to any more.
pub fn serve(disk: &mut Disk, listener: &UnixListener) -> Result<()> {
    loop {
        let (client, _) = listener.accept().context("Cannot accept a client")?;
        match Session::new(disk, client).run() {
            Ok(()) => {}
            Err(error) if error.is::<io::Error>() => eprintln!("outboard-probe: A client is gone: {error}"),
            Err(error) => return Err(error),
        }
    }
}

/// A request of a client.
#[derive(Clone, Copy, Debug)]
struct Asked {
    flags: u16,
    kind: u16,
    cookie: [u8; 8],
    offset: u64,
    len: u32,
}

/// One client's turn.
struct Session<'a> {
    disk: &'a mut Disk,
    client: UnixStream,
    bytes: u64,
    flags: u16,
}

impl Session<'_> {
    fn new(disk: &mut Disk, client: UnixStream) -> Session<'_> {
        let features = disk.device.features();
        let has = |feature: u64, flag: u16| if features & feature != 0 { flag } else { 0 };
        let flags = HAS_FLAGS
            | has(F_RO, READ_ONLY)
            | has(F_FLUSH, SEND_FLUSH | SEND_FUA)
            | has(F_DISCARD, SEND_TRIM)
            | has(F_WRITE_ZEROES, SEND_WRITE_ZEROES);
        Session { bytes: disk.geometry.capacity * SECTOR, disk, client, flags }
    }

    fn run(&mut self) -> Result<()> {
        self.client.set_read_timeout(Some(HANDSHAKE))?;
        if !self.greet()? {
            return Ok(());
        }
        self.client.set_read_timeout(None)?;
        while let Some(asked) = self.request()? {
            self.answer(asked)?;
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.client.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The handshake. `true`: requests follow.
    fn greet(&mut self) -> Result<bool> {
        let hello = [&MAGIC.to_be_bytes()[..], &OPTION.to_be_bytes(), &(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes()].concat();
        self.client.write_all(&hello)?;
        let theirs = u32::from_be_bytes(self.take()?);
        loop {
            let magic = u64::from_be_bytes(self.take()?);
            let (option, len) = (u32::from_be_bytes(self.take()?), u32::from_be_bytes(self.take()?));
            if magic != OPTION || len > MOST_OPTION {
                return Err(strange("an option that is none"));
            }
            let mut data = vec![0; usize::try_from(len)?];
            self.client.read_exact(&mut data)?;
            match option {
                EXPORT_NAME => {
                    // The oldest way in, with no way to say no.
                    let padding = if theirs & u32::from(NO_ZEROES) == 0 { 124 } else { 0 };
                    let size = [&self.bytes.to_be_bytes()[..], &self.flags.to_be_bytes(), &vec![0; padding]].concat();
                    self.client.write_all(&size)?;
                    return Ok(true);
                }
                ABORT => {
                    self.reply(option, ACK, &[])?;
                    return Ok(false);
                }
                LIST if data.is_empty() => {
                    self.reply(option, SERVER, &0u32.to_be_bytes())?;
                    self.reply(option, ACK, &[])?;
                }
                INFO | GO if data.len() >= 6 => {
                    self.describe(option)?;
                    self.reply(option, ACK, &[])?;
                    if option == GO {
                        return Ok(true);
                    }
                }
                LIST | INFO | GO => self.reply(option, INVALID, &[])?,
                _ => self.reply(option, UNSUPPORTED, &[])?,
            }
        }
    }

    /// Size and flags (0), and sizes of blocks (3): the least, what is best, the most.
    fn describe(&mut self, option: u32) -> Result<()> {
        let export = [&0u16.to_be_bytes()[..], &self.bytes.to_be_bytes(), &self.flags.to_be_bytes()].concat();
        self.reply(option, EXPORT, &export)?;
        let least = self.least();
        let sizes = [least, least.max(4096), MOST_REQUEST].map(u32::to_be_bytes).concat();
        self.reply(option, EXPORT, &[&3u16.to_be_bytes()[..], &sizes].concat())
    }

    /// Bytes that everything is a multiple of.
    fn least(&self) -> u32 {
        self.disk.geometry.block_size.clamp(512, 65536)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len())?;
        let head = [&OPTION_REPLY.to_be_bytes()[..], &[option, kind, len].map(u32::to_be_bytes).concat(), data].concat();
        Ok(self.client.write_all(&head)?)
    }

    /// The next request, if there is one.
    fn request(&mut self) -> Result<Option<Asked>> {
        let mut head = [0; 28];
        match self.client.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let [m0, m1, m2, m3, f0, f1, k0, k1, c0, c1, c2, c3, c4, c5, c6, c7, rest @ ..] = head;
        let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST {
            return Err(strange("a request that is none"));
        }
        let asked = Asked {
            flags: u16::from_be_bytes([f0, f1]),
            kind: u16::from_be_bytes([k0, k1]),
            cookie: [c0, c1, c2, c3, c4, c5, c6, c7],
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        };
        Ok(Some(asked).filter(|asked| asked.kind != DISCONNECT))
    }

    fn answer(&mut self, asked: Asked) -> Result<()> {
        let moves = matches!(asked.kind, READ | WRITE);
        if moves && asked.len > MOST_REQUEST {
            return Err(strange("a request for more than 32 MiB"));
        }
        let mut data = vec![0; if moves { usize::try_from(asked.len)? } else { 0 }];
        if asked.kind == WRITE {
            self.client.read_exact(&mut data)?;
        }
        let mut error = match self.check(asked) {
            0 => self.carry_out(asked, &mut data)?,
            error => error,
        };
        if error == 0 && asked.kind != READ && asked.kind != FLUSH && asked.flags & FUA != 0 {
            error = told(self.disk.request(Kind::Flush, 0, &mut [])?);
        }
        let head = [&REPLY.to_be_bytes()[..], &error.to_be_bytes(), &asked.cookie].concat();
        self.client.write_all(&head)?;
        if asked.kind == READ && error == 0 {
            self.client.write_all(&data)?;
        }
        Ok(())
    }

    /// What is wrong with a request before the disk is asked; zero: nothing.
    fn check(&self, asked: Asked) -> u32 {
        let (flag, changes) = match asked.kind {
            READ => return if self.fits(asked) { 0 } else { EINVAL },
            FLUSH => return if self.flags & SEND_FLUSH != 0 { 0 } else { ENOTSUP },
            WRITE => (HAS_FLAGS, true),
            TRIM => (SEND_TRIM, true),
            ZEROES => (SEND_WRITE_ZEROES, true),
            _ => return ENOTSUP,
        };
        if changes && self.flags & READ_ONLY != 0 {
            EPERM
        } else if self.flags & flag == 0 {
            ENOTSUP
        } else if self.fits(asked) {
            0
        } else {
            EINVAL
        }
    }

    fn fits(&self, asked: Asked) -> bool {
        let whole = |number: u64| number.is_multiple_of(self.least().into());
        let end = asked.offset.checked_add(asked.len.into());
        whole(asked.offset) && whole(asked.len.into()) && end.is_some_and(|end| end <= self.bytes)
    }

    /// Has the disk do it, in as many requests as it takes, and gives the error's number. What the disk does not answer at all is our end.
    fn carry_out(&mut self, asked: Asked, data: &mut [u8]) -> Result<u32> {
        match asked.kind {
            READ | WRITE => {
                let kind = if asked.kind == READ { Kind::In } else { Kind::Out };
                let piece = usize::try_from(self.disk.slot_bytes)?;
                for (index, part) in data.chunks_mut(piece).enumerate() {
                    let at = asked.offset + index as u64 * u64::from(self.disk.slot_bytes);
                    let error = told(self.disk.request(kind, at / SECTOR, part)?);
                    if error != 0 {
                        return Ok(error);
                    }
                }
                Ok(0)
            }
            TRIM => self.ranges(asked, Kind::Discard, self.disk.geometry.max_discard, 0),
            ZEROES => {
                let unmap = u32::from(asked.flags & NO_HOLE == 0);
                match self.ranges(asked, Kind::WriteZeroes, self.disk.geometry.max_zeroes, unmap)? {
                    // It keeps the space of zeroes in any case.
                    ENOTSUP if unmap == 1 => self.ranges(asked, Kind::WriteZeroes, self.disk.geometry.max_zeroes, 0),
                    other => Ok(other),
                }
            }
            _ => Ok(told(self.disk.request(Kind::Flush, 0, &mut [])?)),
        }
    }

    fn ranges(&mut self, asked: Asked, kind: Kind, most: u32, flags: u32) -> Result<u32> {
        let (mut at, mut left) = (asked.offset / SECTOR, asked.len / 512);
        while left > 0 {
            let count = left.min(most.max(8));
            match told(self.disk.request(kind, 0, &mut range(at, count, flags))?) {
                0 => (at, left) = (at + u64::from(count), left - count),
                error => return Ok(error),
            }
        }
        Ok(0)
    }
}

/// The number of the protocol for what the disk says.
fn told(status: Status) -> u32 {
    match status {
        Status::Ok => 0,
        Status::Unsupported => ENOTSUP,
        Status::IoError | Status::Invalid(_) => EIO,
    }
}

/// What a client says that breaks the protocol ends its turn, as if it had hung up.
fn strange(what: &str) -> anyhow::Error {
    io::Error::new(ErrorKind::InvalidData, format!("It sent {what}")).into()
}
