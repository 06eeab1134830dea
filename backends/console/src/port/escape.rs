//! The keys that are not for the guest: `Ctrl-] q` leaves, `Ctrl-] Ctrl-]` is one `Ctrl-]`.

/// `Ctrl-]`.
const KEY: u8 = 0x1d;

/// Looks for the sequence in what is typed. It may come in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Escape {
    seen: bool,
}

impl Escape {
    /// Takes the sequence's keys out of the first `count` bytes. Gives the number of bytes that are left for the guest; `None`:
    /// leave.
    pub(crate) fn filter(&mut self, bytes: &mut [u8], count: usize) -> Option<usize> {
        let mut kept = 0;
        for at in 0..count.min(bytes.len()) {
            let byte = bytes.get(at).copied()?;
            match (std::mem::take(&mut self.seen), byte) {
                (true, b'q' | b'Q') => return None,
                (false, KEY) => self.seen = true,
                // Any other key after it is for the guest, and so is a second one of its kind.
                (_, other) => {
                    *bytes.get_mut(kept)? = other;
                    kept += 1;
                }
            }
        }
        Some(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(escape: &mut Escape, keys: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = keys.to_vec();
        let kept = escape.filter(&mut bytes, keys.len())?;
        bytes.truncate(kept);
        Some(bytes)
    }

    #[test]
    fn the_sequence_leaves_also_in_pieces() {
        let mut escape = Escape::default();
        assert_eq!(typed(&mut escape, b"ls\r"), Some(b"ls\r".to_vec()));
        assert_eq!(typed(&mut escape, b"a\x1d"), Some(b"a".to_vec()));
        assert_eq!(typed(&mut escape, b"q"), None);
    }

    #[test]
    fn twice_is_one_for_the_guest() {
        let mut escape = Escape::default();
        assert_eq!(typed(&mut escape, b"\x1d\x1dq"), Some(b"\x1dq".to_vec()));
        assert_eq!(typed(&mut escape, b"\x1dzq"), Some(b"zq".to_vec()), "another key cancels it");
    }
}
