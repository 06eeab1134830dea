//! What a server of the same share on another host has to know to go on: the session, the inodes that the guest knows, and its open files.
//!
//! # Format
//!
//! Numbers are little endian.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `outbfs` and the version, [`VERSION`], in two bytes |
//! | 8 | what was agreed on with the guest (`FUSE_INIT`) |
//! | 4 | how many inodes follow |
//! | ... | each: number (8), number of the directory it is in (8), references (8), type (1), length of its file handle (1), length of its name (1), file handle, name, a zero |
//! | 4 | how many open files and directories follow |
//! | ... | each: number (8), number of its inode (8), flags (4), the host's number (8) and time of birth (4) of a directory |
//!
//! Nothing follows. A directory stands before what is in it, so no inode can be in itself. Names are those of requests: one
//! component. File handles are only there if whoever saved was asked for them, and are compared, never opened.
//!
//! What locks there are on the host cannot be told to another one, and files without a name have nothing by which they could be found.
//!
//! [`State::read`] reads all of it once, without making anything; its bytes come from another host, by way of a frontend, and are not
//! believed. What they lead to is for the share to check, which finds every inode by its name as if the guest had looked it up.

use std::ffi::CStr;

use crate::request::Name;

/// Changes with the format.
pub const VERSION: u16 = 1;

const MAGIC: &[u8; 6] = b"outbfs";

/// Most bytes of a file handle (`MAX_HANDLE_SZ`), after its type.
pub const MAX_HANDLE: usize = 4 + 128;

/// An inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode<'a> {
    /// The guest's number for it.
    pub id: u64,
    /// That of the directory it is in, which is the share's own or stands before.
    pub parent: u64,
    /// How many references the guest has.
    pub lookups: u64,
    /// The type, the highest four bits of its mode.
    pub kind: u8,
    /// What the file system calls it; empty if that was not asked for.
    pub handle: &'a [u8],
    /// Its name in that directory.
    pub name: Name<'a>,
}

/// An open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The guest's number for it.
    pub number: u64,
    /// Its inode's.
    pub node: u64,
    /// How it is open (`open(2)`).
    pub flags: u32,
    /// Of a directory: which it is over there. A place in it is a place in no other.
    pub ino: u64,
    /// The same.
    pub birth: u32,
}

/// Bytes that are no state: what is wrong with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// A state whose form was checked.
#[derive(Clone, Copy, Debug)]
pub struct State<'a> {
    /// What was agreed on with the guest.
    pub agreed: u64,
    inodes: (u32, &'a [u8]),
    opens: (u32, &'a [u8]),
}

const SHORT: Malformed = Malformed("the state is cut short");

impl<'a> State<'a> {
    /// Reads a state, all of it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(bytes: &'a [u8]) -> Result<State<'a>, Malformed> {
        let mut rest = bytes;
        if take::<6>(&mut rest)? != *MAGIC {
            return Err(Malformed("it was not saved by such a server"));
        }
        if u16::from_le_bytes(take(&mut rest)?) != VERSION {
            return Err(Malformed("it was saved by a server of another version"));
        }
        let agreed = u64::from_le_bytes(take(&mut rest)?);
        let inodes = records(&mut rest, |rest| inode(rest).map(drop))?;
        let opens = records(&mut rest, |rest| open(rest).map(drop))?;
        if !rest.is_empty() {
            return Err(Malformed("something follows the state"));
        }
        Ok(State { agreed, inodes, opens })
    }

    /// The inodes.
    pub fn inodes(&self) -> impl Iterator<Item = Inode<'a>> + use<'a> {
        let (count, mut rest) = self.inodes;
        (0..count).map_while(move |_| inode(&mut rest).ok())
    }

    /// The open files and directories.
    pub fn opens(&self) -> impl Iterator<Item = Open> + use<'a> {
        let (count, mut rest) = self.opens;
        (0..count).map_while(move |_| open(&mut rest).ok())
    }
}

/// Records, after how many there are. What says that there are more than there are bytes for is found out when those are used up.
fn records<'a>(
    rest: &mut &'a [u8],
    mut skip: impl FnMut(&mut &'a [u8]) -> Result<(), Malformed>,
) -> Result<(u32, &'a [u8]), Malformed> {
    let count = u32::from_le_bytes(take(rest)?);
    let all = *rest;
    for _ in 0..count {
        skip(rest)?;
    }
    let len = all.len().saturating_sub(rest.len());
    Ok((count, all.get(..len).ok_or(SHORT)?))
}

fn inode<'a>(rest: &mut &'a [u8]) -> Result<Inode<'a>, Malformed> {
    let [id, parent, lookups] = [take(rest)?, take(rest)?, take(rest)?].map(u64::from_le_bytes);
    let [kind, handle, name] = take(rest)?;
    let handle = slice(rest, handle.into())?;
    if handle.len() > MAX_HANDLE {
        return Err(Malformed("a file handle is longer than any"));
    }
    let name = slice(rest, usize::from(name).saturating_add(1))?;
    let name = CStr::from_bytes_with_nul(name).ok().and_then(Name::new);
    let name = name.ok_or(Malformed("the name of an inode is none"))?;
    Ok(Inode { id, parent, lookups, kind, handle, name })
}

fn open(rest: &mut &[u8]) -> Result<Open, Malformed> {
    let [number, node] = [take(rest)?, take(rest)?].map(u64::from_le_bytes);
    let flags = u32::from_le_bytes(take(rest)?);
    let (ino, birth) = (u64::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?));
    Ok(Open { number, node, flags, ino, birth })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (taken, after) = rest.split_first_chunk::<N>().ok_or(SHORT)?;
    *rest = after;
    Ok(*taken)
}

fn slice<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], Malformed> {
    let (taken, after) = rest.split_at_checked(len).ok_or(SHORT)?;
    *rest = after;
    Ok(taken)
}

/// Writes a state: inodes first.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    /// Where it says how many of the records there are that are being written, and how many.
    count: (usize, u32),
}

impl Writer {
    /// A state with nothing in it.
    #[must_use]
    pub fn new(agreed: u64) -> Writer {
        let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes(), &agreed.to_le_bytes()].concat();
        let at = bytes.len();
        bytes.extend_from_slice(&[0; 4]);
        Writer { bytes, count: (at, 0) }
    }

    /// One inode more. Of a file handle that is too long nothing is kept.
    pub fn inode(&mut self, inode: &Inode<'_>) {
        let name = inode.name.as_c_str();
        let handle = if inode.handle.len() > MAX_HANDLE { &[] } else { inode.handle };
        let byte = |len: usize| u8::try_from(len).unwrap_or_default();
        for number in [inode.id, inode.parent, inode.lookups] {
            self.bytes.extend_from_slice(&number.to_le_bytes());
        }
        self.bytes.extend_from_slice(&[inode.kind, byte(handle.len()), byte(name.count_bytes())]);
        self.bytes.extend_from_slice(handle);
        self.bytes.extend_from_slice(name.to_bytes_with_nul());
        self.count.1 = self.count.1.saturating_add(1);
    }

    /// After the last inode.
    pub fn end_inodes(&mut self) {
        self.end();
        self.count = (self.bytes.len(), 0);
        self.bytes.extend_from_slice(&[0; 4]);
    }

    /// One open file more.
    pub fn open(&mut self, open: &Open) {
        let (number, node, ino) = (open.number.to_le_bytes(), open.node.to_le_bytes(), open.ino.to_le_bytes());
        for bytes in [&number[..], &node, &open.flags.to_le_bytes(), &ino, &open.birth.to_le_bytes()] {
            self.bytes.extend_from_slice(bytes);
        }
        self.count.1 = self.count.1.saturating_add(1);
    }

    /// How long it is.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// It never is: there is a head.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All of it.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.end();
        self.bytes
    }

    fn end(&mut self) {
        let (at, count) = self.count;
        if let Some(place) = self.bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
            *place = count.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Vec<u8> {
        let mut writer = Writer::new(7);
        let name = Name::new(c"file").unwrap();
        writer.inode(&Inode { id: 64, parent: 1, lookups: 3, kind: 8, handle: &[1, 2, 3], name });
        writer.inode(&Inode { id: 128, parent: 64, lookups: 1, kind: 4, handle: &[], name });
        writer.end_inodes();
        writer.open(&Open { number: 16, node: 64, flags: 2, ino: 0, birth: 0 });
        writer.finish()
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = small();
        let state = State::read(&bytes).unwrap();
        let inodes: Vec<_> = state.inodes().map(|inode| (inode.id, inode.parent, inode.lookups, inode.handle.len())).collect();
        assert_eq!((state.agreed, inodes), (7, vec![(64, 1, 3, 3), (128, 64, 1, 0)]));
        assert_eq!(state.opens().map(|open| (open.number, open.flags)).collect::<Vec<_>>(), [(16, 2)]);
    }

    #[test]
    fn a_state_is_whole_or_none() {
        let bytes = small();
        for len in 0..bytes.len() {
            assert!(State::read(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert!(State::read(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn names_are_one_component() {
        let bytes = small();
        let at = bytes.windows(4).position(|four| four == b"file").unwrap();
        for name in [b"../x", b"a/bc", b"/abc", b"ab\0c"] {
            let mut forged = bytes.clone();
            forged[at..at + 4].copy_from_slice(name);
            assert_eq!(State::read(&forged).unwrap_err(), Malformed("the name of an inode is none"), "{name:?}");
        }
    }

    #[test]
    fn more_records_than_bytes() {
        let mut bytes = small();
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(State::read(&bytes).is_err());
    }
}
