//! What the guest wrote and nobody has taken yet: the last bytes, and no more than was asked for.

use std::collections::VecDeque;

/// The bytes, oldest first.
#[derive(Debug)]
pub(crate) struct Kept {
    bytes: VecDeque<u8>,
    most: usize,
}

impl Kept {
    /// Room for so many.
    pub(crate) fn new(most: usize) -> Kept {
        Kept { bytes: VecDeque::with_capacity(most), most }
    }

    /// Adds bytes at the end. Gives how many at the beginning had to go for them.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> usize {
        let skipped = bytes.len().saturating_sub(self.most);
        let bytes = bytes.get(skipped..).unwrap_or_default();
        let over = self.bytes.len().saturating_add(bytes.len()).saturating_sub(self.most);
        self.bytes.drain(..over.min(self.bytes.len()));
        self.bytes.extend(bytes);
        skipped.saturating_add(over)
    }

    /// The oldest ones, as many as lie in one piece.
    pub(crate) fn first(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// The oldest ones were taken.
    pub(crate) fn take(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(kept: &mut Kept) -> Vec<u8> {
        let mut all = Vec::new();
        while !kept.first().is_empty() {
            all.extend_from_slice(kept.first());
            kept.take(kept.first().len());
        }
        all
    }

    #[test]
    fn the_last_bytes_stay() {
        let mut kept = Kept::new(8);
        assert_eq!(kept.add(b"abcdef"), 0);
        kept.take(2);
        assert_eq!(kept.add(b"ghijk"), 1);
        assert_eq!(all(&mut kept), b"defghijk");
        assert_eq!(kept.add(b"0123456789"), 2);
        assert_eq!(kept.add(b"A"), 1);
        assert_eq!(all(&mut kept), b"3456789A");
    }
}
