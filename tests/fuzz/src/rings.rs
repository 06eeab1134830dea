//! Rings in memory that the fuzzer has written, and rewrites while they are served.

use std::cell::OnceCell;
use std::sync::Arc;

use virtio::inflight::{Log, region_size};
use virtio::memory::{Memory, RegionFile, Trust, sealed_memfd};
use virtio::queue::Config;
use virtio::{Chain, Queue, Token};

use crate::bytes::Bytes;

/// Two regions that touch and one that stands alone: chains can cross one border and miss another.
const REGIONS: [(u64, u64); 3] = [(0, 0x2000), (0x2000, 0x1000), (0x8000, 0x1000)];

const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;

/// Where a message lies that is spread over descriptors: from before the border of two regions to the end of the second.
const MESSAGE: u64 = 0x1000;
/// The region that stands alone.
const APART: u64 = 0x8000;
/// The device may write there.
const WRITE: u16 = 2;

thread_local! {
    static MEMORY: OnceCell<Arc<Memory>> = const { OnceCell::new() };
    static LOG: OnceCell<Arc<Memory>> = const { OnceCell::new() };
}

/// The memory of all inputs, emptied: mapping it anew each time would be most of the work.
pub(crate) fn memory() -> Arc<Memory> {
    kept(&MEMORY, &REGIONS)
}

fn kept(cell: &'static std::thread::LocalKey<OnceCell<Arc<Memory>>>, regions: &[(u64, u64)]) -> Arc<Memory> {
    let memory = cell.with(|cell| Arc::clone(cell.get_or_init(|| Arc::new(map(regions)))));
    for (addr, size) in regions {
        memory.zero(memory.span(*addr, u32::try_from(*size).expect("small")).expect("mapped"));
    }
    memory
}

fn map(regions: &[(u64, u64)]) -> Memory {
    regions.iter().fold(Memory::default(), |memory, (guest_addr, size)| {
        let fd = sealed_memfd("fuzz", *size).expect("a memfd");
        let region = RegionFile { guest_addr: *guest_addr, size: *size, user_addr: guest_addr + (1 << 52), offset: 0, fd };
        memory.with(region, Trust::Sealed).expect("a valid region")
    })
}

/// Writes bytes where they fit.
pub(crate) fn put(memory: &Memory, addr: u64, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap_or(0);
    if len > 0
        && let Ok(span) = memory.span(addr, len)
    {
        memory.write(span, bytes);
    }
}

/// A chain that the input describes: 16 bytes a descriptor, then what lies behind them.
pub(crate) fn described(bytes: &mut Bytes<'_>) -> Option<Chain> {
    let memory = memory();
    let size = 1u16 << (bytes.byte() % 6);
    let (head, table, elsewhere) = (bytes.u16(), usize::from(bytes.byte()), bytes.u16());
    put(&memory, DESC, bytes.take(table.min(64) * 16));
    put(&memory, u64::from(elsewhere), bytes.take(256));
    let span = memory.span(DESC, u32::from(size) * 16).expect("mapped");
    let mut chain = Chain::new(Arc::clone(&memory), size);
    chain.walk(span, size, head).ok()?;
    assert!(chain.descriptors() <= size, "{} descriptors of {size}", chain.descriptors());
    Some(chain)
}

/// A chain of these bytes, cut at some of their places, and some room: what the input leaves open is how they are spread. Between two
/// pieces a border of regions may lie. Long messages are made of many pieces of the same memory.
pub(crate) fn spread(layout: &mut Bytes<'_>, message: &[u8]) -> Option<Chain> {
    const SIZE: u16 = 64;
    let memory = memory();
    let message = &message[..message.len().min(0x2000)];
    let mut pieces = Vec::new();
    let mut at = 0;
    for _ in 0..layout.byte() % 16 {
        let len = usize::from(layout.byte()).min(message.len() - at);
        pieces.push((MESSAGE + at as u64, u32::try_from(len).expect("small"), 0));
        at += len;
    }
    pieces.push((MESSAGE + at as u64, u32::try_from(message.len() - at).expect("small"), 0));
    pieces.extend((0..layout.byte() % 24).map(|_| (APART, 0x1000, 0)));
    for _ in 0..layout.byte() % 20 {
        pieces.push((APART, u32::from(layout.u16() % 0x1001), WRITE));
    }
    let last = pieces.len() - 1;
    for (index, (addr, len, flags)) in (0u16..).zip(pieces) {
        let flags = flags | u16::from(usize::from(index) < last);
        let descriptor = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &(index + 1).to_le_bytes()];
        put(&memory, DESC + u64::from(index) * 16, &descriptor.concat());
    }
    put(&memory, MESSAGE, message);
    let span = memory.span(DESC, u32::from(SIZE) * 16).expect("mapped");
    let mut chain = Chain::new(Arc::clone(&memory), SIZE);
    chain.walk(span, SIZE, 0).ok()?;
    Some(chain)
}

/// The walk over descriptors.
pub fn chain(mut bytes: Bytes<'_>) {
    let Some(chain) = described(&mut bytes) else { return };
    let mut buf = vec![0; 0x4000];
    for buffer in [chain.readable(), chain.writable()] {
        let (front, back) = buffer.split_at(bytes.u32());
        assert_eq!(u64::from(front.len()) + u64::from(back.len()), u64::from(buffer.len()));
        let copied = buffer.copy_to(&mut buf);
        assert_eq!(copied, buf.len().min(buffer.len() as usize), "all of it is guest memory");
    }
}

/// A whole ring.
pub fn queue(mut bytes: Bytes<'_>) {
    let memory = memory();
    let size = 1u16 << (bytes.byte() % 5);
    let log_size = region_size(1, size);
    let region = kept(&LOG, &[(0, 0x1000)]);
    let log = (bytes.byte() & 1 != 0 && log_size <= 0x1000).then(|| Log::new(region, 0, size, size).expect("it fits"));
    let event_idx = bytes.byte() & 1 != 0;
    let config = Config {
        index: 0,
        size,
        desc: DESC,
        avail: AVAIL,
        used: USED,
        event_idx,
        next_avail: 0,
        kick: None,
        call: None,
        error: None,
        log,
        dirty: None,
        used_address: None,
    };
    let mut queue = Queue::new(Arc::clone(&memory), config).expect("a ring that is where it can be");
    let mut chain = queue.chain();
    let mut held: Vec<Token> = Vec::new();
    while !bytes.is_empty() {
        match bytes.byte() % 8 {
            0..=2 => {
                let (at, len) = (bytes.u16() % 0x1000, usize::from(bytes.byte() % 48));
                put(&memory, at.into(), bytes.take(len));
            }
            3 | 4 => {
                if let Some(token) = queue.pop(&mut chain) {
                    assert!(held.iter().all(|other| other.head() != token.head()), "a head is in hand once");
                    held.push(token);
                }
            }
            5 => {
                if !held.is_empty() {
                    let which = usize::from(bytes.byte()) % held.len();
                    queue.complete(held.swap_remove(which), bytes.u32());
                }
            }
            6 => queue.publish(),
            _ => {
                queue.arm();
            }
        }
        assert!(held.len() <= usize::from(size), "more in hand than the ring holds");
    }
    held.drain(..).for_each(|token| queue.complete(token, 0));
    queue.into_state();
}

/// Recovery from a log with any content.
pub fn inflight(mut bytes: Bytes<'_>) {
    let size = 1u16 << (bytes.byte() % 6);
    let used = bytes.u16();
    let region = kept(&LOG, &[(0, 0x1000)]);
    put(&region, 0, bytes.rest());
    let log = || Log::new(Arc::clone(&region), 0, size, size).expect("it fits");
    let Ok(heads) = log().recover(used) else { return };
    assert!(heads.len() <= usize::from(size));
    assert!(heads.iter().all(|head| *head < size));
    let mut sorted = heads.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), heads.len(), "each head once");
    assert_eq!(log().recover(used).expect("what was made consistent is"), heads, "twice is once");
    // Give everything back as a device does, die before the marks are struck out, and recover from that.
    let mut last = log();
    last.recover(used).expect("as before");
    heads.iter().for_each(|head| last.join_batch(*head));
    let published = used.wrapping_add(u16::try_from(heads.len()).expect("bounded"));
    let left = log().recover(published).expect("a batch that was published");
    assert!(left.is_empty(), "nothing is served again: {left:?}");
}
