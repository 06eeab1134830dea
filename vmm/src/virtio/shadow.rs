//! The VMM's copy of a device's configuration space.
//!
//! Processors read it at the speed of a lock. It is read from the backend when that connects and again when it says that
//! something has changed; what the driver writes is applied here first and sent after.
//!
//! Some configuration is an answer: the driver writes a selector into the first two bytes and reads the rest at once.
//! Since nobody waits for a backend, all answers are fetched beforehand ([`Shadow::banks`]).

use std::collections::BTreeMap;

/// One configuration space, or one per selector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shadow {
    bytes: Vec<u8>,
    /// Answers by selector; a selector that is not here has an empty answer.
    banks: Option<BTreeMap<[u8; 2], Vec<u8>>>,
}

impl Shadow {
    /// A plain configuration space. One that is shorter than `len` is filled up with zeroes.
    pub fn new(mut bytes: Vec<u8>, len: u16) -> Self {
        bytes.resize(usize::from(len), 0);
        Self { bytes, banks: None }
    }

    /// A configuration space of answers, each `len` bytes with the selector in front.
    pub fn banks(len: u16, banks: BTreeMap<[u8; 2], Vec<u8>>) -> Self {
        Self { bytes: vec![0; usize::from(len)], banks: Some(banks) }
    }

    /// How many bytes the driver sees.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no configuration at all.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Reads; beyond the end is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(self.bytes.iter().skip(skip)) {
            *byte = *value;
        }
    }

    /// Writes; beyond the end is ignored. Says whether the backend has to be told: not of a selector, whose answer is
    /// already here.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(at) = usize::try_from(offset).ok().filter(|at| *at < self.bytes.len()) else { return false };
        if self.banks.is_some() && at >= 2 {
            return false;
        }
        for (byte, value) in self.bytes.iter_mut().skip(at).zip(data) {
            *byte = *value;
        }
        let Some(banks) = &self.banks else { return true };
        if let [select, subselect, answer @ ..] = self.bytes.as_mut_slice() {
            answer.fill(0);
            let found = banks.get(&[*select, *subselect]).map_or(&[][..], |b| b.get(2..).unwrap_or_default());
            for (byte, value) in answer.iter_mut().zip(found) {
                *byte = *value;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_stay_inside_and_have_to_be_sent() {
        let mut shadow = Shadow::new(vec![1, 2], 4);
        assert!(shadow.write(1, &[9, 9, 9, 9, 9, 9]));
        assert!(!shadow.write(4, &[9]));
        assert!(!shadow.write(u64::MAX, &[9]));
        let mut all = [7; 6];
        shadow.read(0, &mut all);
        assert_eq!(all, [1, 9, 9, 9, 0, 0]);
        shadow.read(u64::MAX, &mut all);
        assert_eq!(all, [0; 6]);
    }

    #[test]
    fn a_selector_answers_at_once_and_unknown_ones_are_empty() {
        let mut shadow = Shadow::banks(6, BTreeMap::from([([1, 0], vec![1, 0, 3, 0, b'k', b'b'])]));
        assert!(!shadow.write(0, &[1]));
        let mut all = [0; 6];
        shadow.read(0, &mut all);
        assert_eq!(all, [1, 0, 3, 0, b'k', b'b']);
        shadow.write(1, &[5]);
        shadow.read(0, &mut all);
        assert_eq!(all, [1, 5, 0, 0, 0, 0]);
        assert!(!shadow.write(2, &[5]), "the answer itself is read only");
    }
}
