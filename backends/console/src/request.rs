//! Requests of the guest: bytes to be shown, or room for bytes that were typed. No I/O here.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use virtio::{Buffer, Chain};

/// Most bytes of one output request that are looked at. The driver sends a page at most.
pub const MAX_BYTES: u32 = 64 * 1024;

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A buffer in the other direction than its queue.
    #[error("A buffer in the wrong direction")]
    Direction,
}

/// Bytes the guest wants to show.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a>(pub Buffer<'a>);

impl<'a> Output<'a> {
    /// Reads the request of a chain of the transmit queue.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(chain: &'a Chain) -> Result<Output<'a>, Error> {
        if chain.writable().is_empty() { Ok(Output(chain.readable().split_at(MAX_BYTES).0)) } else { Err(Error::Direction) }
    }
}

/// Room for bytes that were typed.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub Buffer<'a>);

impl<'a> Input<'a> {
    /// Reads the request of a chain of the receive queue.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(chain: &'a Chain) -> Result<Input<'a>, Error> {
        if chain.readable().is_empty() { Ok(Input(chain.writable())) } else { Err(Error::Direction) }
    }
}
