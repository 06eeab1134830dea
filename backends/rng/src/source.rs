//! The host resource: random numbers, and the share of them that the guest may use.

use std::io;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use virtio::Buffer;

/// Bytes fetched from the kernel at once. Larger pieces do not make it faster.
const PIECE: usize = 1024;

/// What a guest may use: so many bytes in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Bytes, at least 1.
    pub bytes: u32,
    /// The period.
    pub period: Duration,
}

/// A token bucket that holds one period's bytes and is refilled as a whole.
#[derive(Debug)]
struct Bucket {
    share: Share,
    left: u32,
    refill: Instant,
}

impl Bucket {
    fn new(share: Share, now: Instant) -> Bucket {
        Bucket { share, left: share.bytes, refill: now + share.period }
    }

    fn left(&mut self, now: Instant) -> u32 {
        if now >= self.refill {
            self.left = self.share.bytes;
            self.refill = now + self.share.period;
        }
        self.left
    }
}

/// The host's random numbers, within the share.
#[derive(Debug)]
pub struct Source {
    bucket: Option<Bucket>,
}

impl Source {
    /// All the host has, or a share.
    pub fn new(share: Option<Share>) -> Source {
        Source { bucket: share.map(|share| Bucket::new(share, Instant::now())) }
    }

    /// How many bytes may be given now; 0: come back after [`Source::wait`].
    pub fn available(&mut self) -> u32 {
        self.bucket.as_mut().map_or(u32::MAX, |bucket| bucket.left(Instant::now()))
    }

    /// How long until there is something again, if there is nothing now.
    pub fn wait(&self) -> Option<Duration> {
        let bucket = self.bucket.as_ref().filter(|bucket| bucket.left == 0)?;
        // At least a millisecond, so that a rounding down does not make the thread spin.
        Some(bucket.refill.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
    }

    /// Fills a buffer.
    ///
    /// # Errors
    /// The system's.
    pub fn fill(&mut self, buffer: Buffer<'_>) -> io::Result<u32> {
        let mut piece = [0; PIECE];
        let (mut rest, mut done) = (buffer, 0);
        while !rest.is_empty() {
            let want = piece.len().min(usize::try_from(rest.len()).unwrap_or(usize::MAX));
            let Some(space) = piece.get_mut(..want) else { break };
            let got = getrandom(&mut *space, GetRandomFlags::empty())?;
            let put = u32::try_from(rest.copy_from(space.get(..got).unwrap_or_default())).unwrap_or_default();
            if put == 0 {
                break;
            }
            rest = rest.split_at(put).1;
            done += put;
        }
        if let Some(bucket) = &mut self.bucket {
            bucket.left = bucket.left.saturating_sub(done);
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_once_in_a_period() {
        let start = Instant::now();
        let share = Share { bytes: 100, period: Duration::from_secs(1) };
        let mut bucket = Bucket::new(share, start);
        assert_eq!(bucket.left(start), 100);
        bucket.left = 0;
        assert_eq!(bucket.left(start + Duration::from_millis(999)), 0);
        assert_eq!(bucket.left(start + Duration::from_millis(1000)), 100);
        bucket.left = 30;
        assert_eq!(bucket.left(start + Duration::from_secs(60)), 100, "what was not used is not saved up");
    }
}
