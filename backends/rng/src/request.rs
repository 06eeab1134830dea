//! A request of the guest: a buffer to be filled. No I/O here.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use virtio::Chain;

/// Most bytes that one request is given. The driver asks for 64; the buffers of a chain may overlap, so their sum says nothing
/// about how much memory there is, and a device may always give less than was asked for.
pub const MAX_BYTES: u32 = 64 * 1024;

/// A checked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How many bytes it wants, from 1 to [`MAX_BYTES`].
    pub bytes: u32,
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is nothing to fill.
    #[error("A request without a buffer to fill")]
    Empty,
    /// The driver sends something: this device reads nothing.
    #[error("A request with a buffer to read")]
    Readable,
}

impl Request {
    /// Reads the request of a chain.
    ///
    /// # Errors
    /// When it is none. The guest gets it back with nothing in it.
    pub fn read(chain: &Chain) -> Result<Request, Error> {
        if !chain.readable().is_empty() {
            return Err(Error::Readable);
        }
        match chain.writable().len() {
            0 => Err(Error::Empty),
            bytes => Ok(Request { bytes: bytes.min(MAX_BYTES) }),
        }
    }
}
