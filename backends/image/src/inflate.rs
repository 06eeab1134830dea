//! Compressed clusters: deflate without a header, and zstd. Decoders are other people's, in plain Rust; the bounds are ours.

use flate2::{Decompress, FlushDecompress};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::error::{Error, Result};

/// Most memory a zstd frame may ask for as its window: what the format says every decoder should have, and 4 times the largest
/// cluster.
const MAX_WINDOW: u64 = 8 << 20;

/// How clusters of an image are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// Deflate, which QEMU calls zlib.
    Deflate,
    /// zstd.
    Zstd,
}

/// Fills `cluster` with what `packed` contains. Bytes of `packed` after the stream's end belong to others.
pub(crate) fn inflate(method: Method, packed: &[u8], cluster: &mut [u8]) -> Result<()> {
    let full = match method {
        Method::Deflate => deflate(packed, cluster),
        Method::Zstd => zstd(packed, cluster),
    };
    if full { Ok(()) } else { Error::corrupt("a compressed cluster cannot be decompressed") }
}

fn deflate(packed: &[u8], cluster: &mut [u8]) -> bool {
    let mut state = Decompress::new(false);
    let ended = state.decompress(packed, cluster, FlushDecompress::Finish);
    ended.is_ok() && state.total_out() == cluster.len() as u64
}

fn zstd(packed: &[u8], cluster: &mut [u8]) -> bool {
    if window(packed).is_none_or(|window| window > MAX_WINDOW) {
        return false;
    }
    let (mut source, mut decoder) = (packed, FrameDecoder::new());
    if decoder.init(&mut source).is_err() {
        return false;
    }
    let mut done = 0_usize;
    while done < cluster.len() {
        let wanted = cluster.len().saturating_sub(done);
        if !decoder.is_finished() && decoder.decode_blocks(&mut source, BlockDecodingStrategy::UptoBytes(wanted)).is_err() {
            return false;
        }
        let Some(rest) = cluster.get_mut(done..) else { return false };
        match std::io::Read::read(&mut decoder, rest) {
            Ok(0) if decoder.is_finished() => return false,
            Ok(read) => done = done.saturating_add(read),
            Err(_) => return false,
        }
    }
    true
}

/// The window a zstd frame asks for (RFC 8878, 3.1.1.1), read before a decoder makes room for it.
fn window(packed: &[u8]) -> Option<u64> {
    let [_, _, _, _, descriptor, rest @ ..] = packed else { return None };
    let single = descriptor & 0x20 != 0;
    if !single {
        let byte = u64::from(*rest.first()?);
        let base = 1_u64.checked_shl(u32::try_from(byte >> 3).ok()?.saturating_add(10))?;
        return base.checked_add((base >> 3).checked_mul(byte & 7)?);
    }
    let dictionary = [0_usize, 1, 2, 4].get(usize::from(descriptor & 3)).copied()?;
    let size = [1_usize, 2, 4, 8].get(usize::from(descriptor >> 6)).copied()?;
    let bytes = rest.get(dictionary..dictionary.checked_add(size)?)?;
    let value = bytes.iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte));
    Some(if size == 2 { value.saturating_add(256) } else { value })
}

#[cfg(test)]
mod tests;
