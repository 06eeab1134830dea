//! A message, from which one field after the other is taken.

use std::ffi::CStr;

use super::{Name, Room, name};
use crate::abi::{answer, errno::EINVAL, extension, opcode, sent};

/// What is wrong with a message, and how it is answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wrong {
    pub(super) errno: i32,
    pub(super) why: &'static str,
}

/// The usual answer to nonsense.
pub(super) fn invalid<T>(why: &'static str) -> Result<T, Wrong> {
    Err(Wrong { errno: EINVAL, why })
}

/// What every message begins with. Whoever asks is known by user and group; the number of the process means nothing here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) len: u32,
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// In units of [`extension::UNIT`].
    pub(super) extensions: u16,
}

impl Header {
    /// The header, and what follows it.
    pub(super) fn split(bytes: &[u8]) -> Option<(Header, &[u8])> {
        let (header, body) = bytes.split_at_checked(usize::try_from(sent::HEADER).ok()?)?;
        let mut fields = Message { rest: header, uncopied: 0, room: 0 };
        let (len, opcode) = (fields.u32().ok()?, fields.u32().ok()?);
        let (unique, node) = (fields.u64().ok()?, fields.u64().ok()?);
        let (uid, gid, _pid) = (fields.u32().ok()?, fields.u32().ok()?, fields.u32().ok()?);
        let extensions = u16::from_le_bytes(fields.array().ok()?);
        Some((Header { len, opcode, unique, node, uid, gid, extensions }, body))
    }

    /// The message has no answer, whatever becomes of it.
    pub(super) fn silent(&self) -> bool {
        matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET)
    }

    /// It makes something that belongs to whoever asks.
    pub(super) fn makes(&self) -> bool {
        matches!(self.opcode, opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::CREATE | opcode::TMPFILE)
    }
}

/// What is left of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    rest: &'a [u8],
    /// Bytes that stayed in the chain, behind `rest`.
    uncopied: u32,
    /// Bytes for an answer, without its header.
    room: u32,
}

impl<'a> Message<'a> {
    /// What follows a header, up to where it says.
    pub(super) fn new(header: &Header, body: &'a [u8], room: Room) -> Result<Message<'a>, Wrong> {
        let Some(len) = header.len.checked_sub(sent::HEADER) else { return invalid("a length of less than a header") };
        if header.len > room.readable {
            return invalid("a length of more than the chain");
        }
        let body = usize::try_from(len).ok().and_then(|len| body.get(..len)).unwrap_or(body);
        let uncopied = len.saturating_sub(u32::try_from(body.len()).unwrap_or(u32::MAX));
        Ok(Message { rest: body, uncopied, room: room.writable.saturating_sub(answer::HEADER) })
    }

    /// Bytes of an answer that the guest has room for, without its header.
    pub(super) fn room(&self) -> u32 {
        self.room
    }

    /// Bytes that were not taken yet, whether they were copied or not.
    pub(super) fn left(&self) -> u32 {
        self.uncopied.saturating_add(u32::try_from(self.rest.len()).unwrap_or(u32::MAX))
    }

    /// The answer has to have room for so many bytes: what cannot be answered is better not done.
    pub(super) fn answered_with(&self, bytes: u32) -> Result<(), Wrong> {
        if self.room < bytes { invalid("no room for the answer") } else { Ok(()) }
    }

    /// Nothing may be left.
    pub(super) fn end(&self) -> Result<(), Wrong> {
        if self.left() > 0 { invalid("bytes behind the end of a message") } else { Ok(()) }
    }

    pub(super) fn u32(&mut self) -> Result<u32, Wrong> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Wrong> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Wrong> {
        let Some((bytes, rest)) = self.rest.split_first_chunk() else { return invalid("arguments that are cut short") };
        self.rest = rest;
        Ok(*bytes)
    }

    /// So many bytes, all of them copied.
    pub(super) fn bytes(&mut self, len: u32) -> Result<&'a [u8], Wrong> {
        let taken = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let Some((bytes, rest)) = taken else { return invalid("less data than there is said to be") };
        self.rest = rest;
        Ok(bytes)
    }

    /// A name in a directory.
    pub(super) fn name(&mut self) -> Result<Name<'a>, Wrong> {
        let (name, rest) = name::name(self.rest)?;
        self.rest = rest;
        Ok(name)
    }

    /// A name in a directory, and nothing behind it.
    pub(super) fn last_name(&mut self) -> Result<Name<'a>, Wrong> {
        let name = self.name()?;
        self.end()?;
        Ok(name)
    }

    /// Where a symbolic link leads.
    pub(super) fn target(&mut self) -> Result<&'a CStr, Wrong> {
        let (target, rest) = name::target(self.rest)?;
        self.rest = rest;
        Ok(target)
    }

    /// The name of an extended attribute.
    pub(super) fn attribute(&mut self) -> Result<&'a CStr, Wrong> {
        let (name, rest) = name::attribute(self.rest)?;
        self.rest = rest;
        Ok(name)
    }

    /// Cuts the extensions off. Of a message that is too long to be copied whole they are not there, but in that one there is a name that
    /// is too long, or something behind it, which says better what is wrong.
    pub(super) fn cut_extensions(&mut self, units: u16) -> Result<&'a [u8], Wrong> {
        let len = u32::from(units).saturating_mul(extension::UNIT);
        if len > self.left() {
            return invalid("extensions that are cut short");
        }
        if self.uncopied > 0 {
            return Ok(&[]);
        }
        let at = usize::try_from(self.left().saturating_sub(len)).unwrap_or(0);
        let (rest, extensions) = self.rest.split_at_checked(at).unwrap_or((self.rest, &[]));
        self.rest = rest;
        Ok(extensions)
    }
}
