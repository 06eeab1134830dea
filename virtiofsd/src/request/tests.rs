//! Messages as Linux sends them, and as nobody should.

#![expect(clippy::arithmetic_side_effects, clippy::indexing_slicing, reason = "the numbers here are ours")]

mod layout;
mod malformed;
mod numbers;
mod wellformed;

use super::*;
use crate::abi::opcode;

/// Whoever asks in these tests.
const UNIQUE: u64 = 0x1122_3344_5566_7788;
const NODE: u64 = 77;
const UID: u32 = 1000;
const GID: u32 = 100;

/// Room for any answer.
const AMPLE: u32 = 1 << 20;

const LONG: Dialect = Dialect { setxattr_ext: true, security_ctx: false };

/// A header for so many bytes, and those.
fn message_of(len: usize, opcode: u32, owner: [u32; 2], extensions: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(len).unwrap();
    let pid = 4242;
    let head = [w(&[len, opcode]), q(&[UNIQUE, NODE]), w(&[owner[0], owner[1], pid])].concat();
    [&head, &extensions.to_le_bytes()[..], &[0; 2], body].concat()
}

fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
    message_of(40 + body.len(), opcode, [UID, GID], 0, body)
}

/// 32-bit fields.
fn w(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

/// 64-bit fields.
fn q(fields: &[u64]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn parsed(bytes: &[u8], writable: u32) -> Result<Request<'_>, Bad> {
    parse(bytes, Room { readable: u32::try_from(bytes.len()).unwrap(), writable }, LONG)
}

/// The error a message is refused with.
fn errno(outcome: Result<Request<'_>, Bad>) -> i32 {
    match outcome {
        Err(Bad::Refused { unique: UNIQUE, errno, .. }) => errno,
        other => panic!("{other:?}"),
    }
}

/// The error that arguments are refused with.
fn refused(opcode: u32, body: &[u8]) -> i32 {
    errno(parsed(&message(opcode, body), AMPLE))
}

fn name(text: &'static CStr) -> Name<'static> {
    Name::new(text).unwrap()
}
