//! Into which buffers a request and the room for its answer are cut: as Linux does it, or at random.

use crate::random::Random;
use crate::ring::Buffer;

use super::wire::{BEFORE_DATA, IN_HEADER, OUT_HEADER, WRITE};

const PAGE: u64 = 4096;

/// How buffers are cut.
#[derive(Clone, Debug)]
pub enum Layout {
    /// Headers, arguments and data apart, as Linux has them.
    Linux,
    /// A server must not rely on that (virtio 1.3, 2.7.4): anything goes, each side of a request for itself.
    Scatter(Random),
}

/// One side of a request.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

impl Layout {
    /// The buffers of a side, at most `most` of them.
    pub fn cut(&mut self, side: Side, opcode: u32, most: usize) -> Vec<Buffer> {
        let natural = match (side.write, opcode) {
            (true, _) => vec![OUT_HEADER],
            (false, WRITE) => vec![IN_HEADER, BEFORE_DATA],
            (false, _) => vec![IN_HEADER],
        };
        let cuts = match self {
            Layout::Linux => natural,
            Layout::Scatter(random) => match random.below(4) {
                0 => natural,
                1 => bytes(random, side.len),
                2 => pages(side),
                _ => anywhere(random, side.len),
            },
        };
        pieces(side, &cuts, most)
    }
}

/// The header in single bytes, and perhaps what follows it.
fn bytes(random: &mut Random, len: u32) -> Vec<u32> {
    let count = u32::try_from(1 + random.below(u64::from(BEFORE_DATA) + 8)).unwrap_or(1);
    (1..=count.min(len)).collect()
}

/// At every page of memory.
fn pages(side: Side) -> Vec<u32> {
    let first = side.addr.next_multiple_of(PAGE) - side.addr;
    (0..).map(|index| first + index * PAGE).map_while(|cut| u32::try_from(cut).ok().filter(|cut| *cut < side.len)).collect()
}

fn anywhere(random: &mut Random, len: u32) -> Vec<u32> {
    let count = random.below(12);
    // Half of them near the headers, where there is most to be got wrong.
    let mut cuts: Vec<u32> = (0..count)
        .filter_map(|index| {
            let limit = if index % 2 == 0 { len.min(128) } else { len };
            u32::try_from(random.below(limit.into())).ok()
        })
        .collect();
    cuts.sort_unstable();
    cuts
}

fn pieces(side: Side, cuts: &[u32], most: usize) -> Vec<Buffer> {
    let (mut buffers, mut done) = (Vec::new(), 0);
    for cut in cuts.iter().copied().chain([side.len]) {
        let last = cut == side.len || buffers.len() + 1 >= most;
        let end = if last { side.len } else { cut };
        if end > done && end <= side.len {
            buffers.push(Buffer { addr: side.addr + u64::from(done), len: end - done, write: side.write });
            done = end;
        }
    }
    buffers
}

#[cfg(test)]
mod tests {
    use super::{Layout, Side};
    use crate::fs::wire::WRITE;
    use crate::random::Random;

    fn lengths(layout: &mut Layout, side: Side, opcode: u32, most: usize) -> Vec<u32> {
        let buffers = layout.cut(side, opcode, most);
        let mut at = side.addr;
        for buffer in &buffers {
            assert!(buffer.addr == at && buffer.len > 0 && buffer.write == side.write, "{buffer:?}");
            at += u64::from(buffer.len);
        }
        assert_eq!(at, side.addr + u64::from(side.len));
        buffers.iter().map(|buffer| buffer.len).collect()
    }

    #[test]
    fn as_linux_does_it() {
        let write = Side { addr: 4096 - 80, len: 80 + 8192, write: false };
        assert_eq!(lengths(&mut Layout::Linux, write, WRITE, 60), [40, 40, 8192]);
        assert_eq!(lengths(&mut Layout::Linux, write, WRITE, 2), [40, 8232]);
        assert_eq!(lengths(&mut Layout::Linux, write, WRITE, 1), [8272]);
        assert_eq!(lengths(&mut Layout::Linux, Side { len: 40, ..write }, 38, 60), [40]);
        assert_eq!(lengths(&mut Layout::Linux, Side { addr: 4080, len: 16 + 4096, write: true }, 15, 60), [16, 4096]);
        assert_eq!(lengths(&mut Layout::Linux, Side { addr: 4080, len: 16, write: true }, 38, 60), [16]);
    }

    #[test]
    fn whatever_the_cuts_nothing_is_lost() {
        let (mut layout, mut most, mut single) = (Layout::Scatter(Random::new(3)), 0, false);
        for round in 0..2000u32 {
            let side = Side { addr: 4080, len: 16 + (round * 37) % 20_000, write: round % 2 == 0 };
            let lengths = lengths(&mut layout, side, 15, 1 + usize::try_from(round % 64).unwrap());
            assert!(lengths.len() <= 1 + usize::try_from(round % 64).unwrap());
            most = most.max(lengths.len());
            single |= lengths.iter().take(16).filter(|len| **len == 1).count() == 16;
        }
        assert!(most > 40 && single, "{most} {single}");
    }
}
