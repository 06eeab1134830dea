//! A driver for virtio-rng (virtio 1.3, 5.4).

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::device::{Device, Shape};
use crate::ring::Buffer;

/// How long a request may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Fetches `count` random bytes, `piece` at a time.
///
/// # Errors
/// When the device breaks a rule.
pub fn fetch(stream: UnixStream, count: usize, piece: u32, shape: Shape) -> Result<Vec<u8>> {
    let mut device = Device::connect(stream, shape, 0)?;
    let at = device.memory_mut().take(piece.into(), 1, 0)?;
    device.start()?;
    let mut bytes = Vec::with_capacity(count);
    while bytes.len() < count {
        let used = device.exchange(0, &[Buffer { addr: at, len: piece, write: true }], LIMIT)?;
        if used.len > piece {
            bail!("The device says it wrote {} bytes into a buffer of {piece}", used.len);
        }
        let mut got = vec![0; usize::try_from(used.len)?];
        device.memory().read(at, &mut got);
        bytes.append(&mut got);
    }
    bytes.truncate(count);
    device.session().stop()?;
    Ok(bytes)
}
