//! The one copy of a message.

use std::{fmt, iter};

use virtio::{Buffer, Chain};

use super::{Bad, Dialect, MAX_LABEL, MAX_NAME, MAX_TARGET, MAX_XATTR, Operation, Request, Room, parse};
use crate::abi::{opcode, sent};

/// Bytes of a header, as an index.
const HEADER: usize = 40;

/// Most bytes of arguments in front of a name or a value; those of SETATTR are more, and alone.
const ARGUMENTS: usize = 88;

/// Most bytes of the extensions that there may be: a group; and a label with its two headers, its name, and up to a whole unit.
const EXTENSIONS: usize = 16 + 16 + MAX_NAME + 1 + MAX_LABEL + 8;

/// Most bytes of any message but the three below: a symbolic link. An ioctl and a renaming have less.
const USUAL: usize = HEADER + ARGUMENTS + MAX_NAME + 1 + MAX_TARGET + 1 + EXTENSIONS;

/// Most bytes of a message with the value of an attribute.
const LONGEST: usize = HEADER + ARGUMENTS + MAX_NAME + 1 + MAX_XATTR as usize;

/// Room for the copy of a message, made once per thread: as large as the longest message that is usual, and from the first value of an
/// attribute on as the longest that is no nonsense, without the data of writes (66 KiB).
pub struct Scratch(Vec<u8>);

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::new()
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

impl Scratch {
    /// Allocates it.
    pub fn new() -> Scratch {
        Scratch(vec![0; USUAL])
    }
}

/// A message as it was copied, unparsed.
#[derive(Clone, Copy, Debug)]
pub struct Fetched<'a> {
    bytes: &'a [u8],
    room: Room,
}

impl<'a> Fetched<'a> {
    /// What was copied: the header, and as much behind it as the message may need, its data excepted.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What it asks for, as it says.
    pub fn opcode(&self) -> u32 {
        self.bytes.get(4..8).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// The bytes of both sides of the chain.
    pub fn room(&self) -> Room {
        self.room
    }

    /// See [`parse()`].
    ///
    /// # Errors
    /// As there.
    pub fn parse(&self, dialect: Dialect) -> Result<Request<'a>, Bad> {
        parse(self.bytes, self.room, dialect)
    }

    /// A copy that can go to another thread, to be parsed there again.
    pub fn boxed(&self) -> BoxedRequest {
        BoxedRequest { bytes: self.bytes.into(), room: self.room }
    }
}

/// A message of its own memory, of whatever is slow.
#[derive(Clone, Debug)]
pub struct BoxedRequest {
    bytes: Box<[u8]>,
    room: Room,
}

impl BoxedRequest {
    /// See [`parse()`]. The answer is that of [`Fetched::parse`], if the dialect is.
    ///
    /// # Errors
    /// As there.
    pub fn parse(&self, dialect: Dialect) -> Result<Request<'_>, Bad> {
        parse(&self.bytes, self.room, dialect)
    }
}

/// Copies a message out of its chain, each byte once: the header, which says what it is, then as much as that may need.
///
/// # Errors
/// [`Bad::Unanswerable`], if there is no whole header.
pub fn fetch_bytes<'a>(chain: &Chain, scratch: &'a mut Scratch) -> Result<Fetched<'a>, Bad> {
    let (header, rest) = chain.readable().take_array::<HEADER>().ok_or(Bad::Unanswerable)?;
    let [l0, l1, l2, l3, o0, o1, o2, o3, ..] = header;
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    let most = most(u32::from_le_bytes([o0, o1, o2, o3]));
    let wanted = len.min(most).saturating_sub(HEADER);
    if most > USUAL && scratch.0.len() < LONGEST {
        // Few guests ever send one of these, and a thread that never got one need not have the memory.
        scratch.0.resize(LONGEST, 0);
    }
    let (front, back) = scratch.0.split_at_mut_checked(HEADER).ok_or(Bad::Unanswerable)?;
    front.copy_from_slice(&header);
    let copied = rest.copy_to(back.get_mut(..wanted).unwrap_or_default());
    let bytes = scratch.0.get(..HEADER.saturating_add(copied)).unwrap_or_default();
    Ok(Fetched { bytes, room: Room { readable: chain.readable().len(), writable: chain.writable().len() } })
}

/// Copies a message and parses it.
///
/// # Errors
/// [`Bad`]: whatever is wrong with it.
pub fn fetch<'a>(chain: &Chain, dialect: Dialect, scratch: &'a mut Scratch) -> Result<Request<'a>, Bad> {
    fetch_bytes(chain, scratch)?.parse(dialect)
}

/// What follows the arguments of a request in its chain: the data of a write, the pairs of a BATCH_FORGET. Of all others nothing.
pub fn data<'a>(chain: &'a Chain, operation: &Operation<'_>) -> Buffer<'a> {
    let before = match operation {
        Operation::Write { .. } => sent::WRITE,
        Operation::BatchForget { .. } => sent::BATCH_FORGET,
        _ => u32::MAX,
    };
    chain.readable().split_at(sent::HEADER.saturating_add(before)).1
}

/// The pairs of a BATCH_FORGET: a node, and how many references to it are gone. Each is read when it is asked for, and once. There may be
/// more of them in the chain than the request counts, which is to be kept to.
pub fn forgotten(data: Buffer<'_>) -> impl Iterator<Item = (u64, u64)> + use<'_> {
    let mut rest = data;
    iter::from_fn(move || {
        let (pair, after) = rest.take_array::<16>()?;
        rest = after;
        let [n0, n1, n2, n3, n4, n5, n6, n7, count @ ..] = pair;
        Some((u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]), u64::from_le_bytes(count)))
    })
}

/// Bytes of the longest message of a kind that is no nonsense; of those with data in the chain, what stands in front of that.
fn most(opcode: u32) -> usize {
    let before_data = |arguments: u32| HEADER.saturating_add(usize::try_from(arguments).unwrap_or(0));
    match opcode {
        opcode::WRITE => before_data(sent::WRITE),
        opcode::BATCH_FORGET => before_data(sent::BATCH_FORGET),
        opcode::SETXATTR => LONGEST,
        _ => USUAL,
    }
}
