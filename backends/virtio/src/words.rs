//! Numbers that several processes of a machine share: a sealed file of fixed size that each of them has mapped.
//!
//! Whoever has the file can write any number there at any moment: a number that was read is checked like one of a peer's.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::memory::sealed_memfd;

/// Bytes of the file: a page.
const SIZE: usize = 4096;

/// The numbers of a file, in the order in which they lie there. They stay mapped for as long as the process lives.
pub type Words<const N: usize> = [&'static AtomicU64; N];

/// A new file: all zero.
///
/// # Errors
/// The system's.
pub fn make(name: &str) -> io::Result<OwnedFd> {
    sealed_memfd(name, u64::try_from(SIZE).unwrap_or_default())
}

/// Maps the first numbers of a file.
///
/// # Errors
/// The system's, or that the file has less than a page.
pub fn map<const N: usize>(file: OwnedFd) -> io::Result<Words<N>> {
    let page = map_for_ever(file, SIZE)?;
    let places = (0..N).map(|index| page.get_atomic_ref(index.saturating_mul(8)).map_err(io::Error::other));
    let places = places.collect::<io::Result<Vec<_>>>()?;
    places.try_into().map_err(|_| io::Error::other("The file has no room for so many numbers"))
}

/// Maps the first bytes of a file for as long as the process lives.
pub(crate) fn map_for_ever(file: OwnedFd, bytes: usize) -> io::Result<&'static MmapRegion> {
    let file = File::from(file);
    if file.metadata()?.len() < bytes.try_into().unwrap_or(u64::MAX) {
        return Err(io::Error::other("it is too short"));
    }
    let region = MmapRegion::from_file(FileOffset::new(file, 0), bytes).map_err(io::Error::other)?;
    Ok(Box::leak(Box::new(region)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_one_writes_the_other_reads() {
        let file = make("words").unwrap();
        let [first, second] = map::<2>(file.try_clone().unwrap()).unwrap();
        let [_, other, last] = map::<3>(file).unwrap();
        second.store(7, Ordering::Relaxed);
        assert_eq!((other.load(Ordering::Relaxed), first.load(Ordering::Relaxed), last.load(Ordering::Relaxed)), (7, 0, 0));
        assert!(map::<1>(sealed_memfd("short", 8).unwrap()).is_err());
        assert!(map::<513>(make("many").unwrap()).is_err());
    }
}
