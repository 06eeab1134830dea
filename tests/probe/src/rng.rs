//! A driver for virtio-rng (virtio 1.3, 5.4).

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::device::{Device, Shape};
use crate::ring::Buffer;

/// How long a request may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What came, and how long each request took.
#[derive(Debug)]
pub struct Fetched {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// From kick to interrupt, the shortest first.
    pub times: Vec<Duration>,
}

impl Fetched {
    /// So many percent of the requests took no longer.
    pub fn took(&self, percent: usize) -> Duration {
        let at = (self.times.len() * percent / 100).min(self.times.len().saturating_sub(1));
        self.times.get(at).copied().unwrap_or_default()
    }
}

/// Fetches `count` random bytes, `piece` at a time.
///
/// # Errors
/// When the device breaks a rule.
pub fn fetch(stream: UnixStream, count: usize, piece: u32, shape: Shape) -> Result<Fetched> {
    let mut device = Device::connect(stream, shape, 0)?;
    let at = device.memory_mut().take(piece.into(), 1, 0)?;
    device.start()?;
    let (mut bytes, mut times) = (Vec::with_capacity(count), Vec::new());
    while bytes.len() < count {
        let began = Instant::now();
        let used = device.exchange(0, &[Buffer { addr: at, len: piece, write: true }], LIMIT)?;
        times.push(began.elapsed());
        if used.len > piece {
            bail!("The device says it wrote {} bytes into a buffer of {piece}", used.len);
        }
        let mut got = vec![0; usize::try_from(used.len)?];
        device.memory().read(at, &mut got);
        bytes.append(&mut got);
    }
    bytes.truncate(count);
    device.session().stop()?;
    times.sort_unstable();
    Ok(Fetched { bytes, times })
}
