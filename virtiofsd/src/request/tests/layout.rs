//! Messages in chains: how they are spread says nothing, and what is written into them afterwards is not seen.

use std::sync::Arc;

use virtio::Chain;
use virtio::memory::{Memory, RegionFile, Trust, sealed_memfd};

use super::*;
use crate::request::tests::wellformed::{Example, all};

const SIZE: u64 = 1 << 20;
/// The table of descriptors lies at 0; then what is sent, and where the answer goes.
const SENT: u64 = 0x1_0000;
const ROOM: u64 = 0x8_0000;

fn memory() -> Arc<Memory> {
    let fd = sealed_memfd("requests", SIZE).unwrap();
    let region = RegionFile { guest_addr: 0, size: SIZE, user_addr: 1 << 52, offset: 0, fd };
    Arc::new(Memory::default().with(region, Trust::Sealed).unwrap())
}

fn put(memory: &Memory, at: u64, bytes: &[u8]) {
    let span = memory.span(at, u32::try_from(bytes.len()).unwrap()).unwrap();
    memory.write(span, bytes);
}

/// A chain of this message, cut at these places, and room for an answer.
fn chain(memory: &Arc<Memory>, bytes: &[u8], cuts: &[usize], writable: u32) -> Chain {
    put(memory, SENT, bytes);
    let ends = cuts.iter().copied().chain([bytes.len()]);
    let mut from = 0;
    let mut pieces = Vec::new();
    for end in ends {
        pieces.push((SENT + from as u64, u32::try_from(end - from).unwrap(), 0u16));
        from = end;
    }
    if writable > 0 {
        pieces.push((ROOM, writable, 2));
    }
    let last = pieces.len() - 1;
    for (index, (addr, len, flags)) in pieces.iter().enumerate() {
        let next = u16::from(index < last);
        let descriptor = [
            &addr.to_le_bytes()[..],
            &len.to_le_bytes(),
            &(flags | next).to_le_bytes(),
            &u16::try_from(index + 1).unwrap().to_le_bytes(),
        ];
        put(memory, index as u64 * 16, &descriptor.concat());
    }
    let mut chain = Chain::new(Arc::clone(memory), 64);
    chain.walk(memory.span(0, 64 * 16).unwrap(), 64, 0).unwrap();
    chain
}

#[test]
fn a_message_may_be_spread_over_descriptors() {
    let memory = memory();
    let mut scratch = Scratch::new();
    for Example { opcode, body, meaning, .. } in all() {
        let bytes = message(opcode, &body);
        for cut in (1..bytes.len()).filter(|cut| *cut < 40 || cut % 7 == 0) {
            let chain = chain(&memory, &bytes, &[cut], 0x1_0000);
            let request = fetch(&chain, LONG, &mut scratch).unwrap();
            assert_eq!((request.unique, request.operation), (UNIQUE, meaning), "{opcode} cut at {cut}");
        }
        let every: Vec<usize> = (1..bytes.len().min(40)).collect();
        let chain = chain(&memory, &bytes, &every, 0x1_0000);
        assert_eq!(fetch(&chain, LONG, &mut scratch).unwrap().operation, meaning, "{opcode}, byte by byte");
    }
}

#[test]
fn what_was_copied_stays() {
    let memory = memory();
    let mut scratch = Scratch::new();
    for Example { opcode, body, meaning, .. } in all() {
        let bytes = message(opcode, &body);
        let chain = chain(&memory, &bytes, &[], 0x1_0000);
        let fetched = fetch_bytes(&chain, &mut scratch).unwrap();
        put(&memory, SENT, &vec![0xff; bytes.len()]);
        let boxed = fetched.boxed();
        assert_eq!(fetched.parse(LONG).unwrap().operation, meaning);
        assert_eq!(boxed.parse(LONG), fetched.parse(LONG));
    }
}

#[test]
fn data_stays_in_the_chain() {
    let memory = memory();
    let mut scratch = Scratch::new();
    let args = [q(&[5, 0]), w(&[0x1_0000, 0]), q(&[0]), w(&[0, 0])].concat();
    let bytes = message(opcode::WRITE, &[args, vec![1; 0x1_0000]].concat());
    let fetched = fetch_bytes(&chain(&memory, &bytes, &[40, 80], 0x100), &mut scratch).unwrap();
    assert_eq!(fetched.bytes(), &bytes[..80]);
    assert_eq!(fetched.room(), Room { readable: 80 + 0x1_0000, writable: 0x100 });
    let operation = fetched.parse(LONG).unwrap().operation;
    assert!(matches!(operation, Operation::Write { size: 0x1_0000, .. }));
    let chain = chain(&memory, &bytes, &[40, 80], 0x100);
    let mut copy = vec![0; 0x1_0001];
    assert_eq!(data(&chain, &operation).copy_to(&mut copy), 0x1_0000);
    assert!(data(&chain, &Operation::SyncFs).is_empty());
    assert_eq!((copy[0], copy[0xffff]), (1, 1));
}

#[test]
fn what_is_forgotten_stays_in_the_chain() {
    let memory = memory();
    let mut scratch = Scratch::new();
    let pairs: Vec<(u64, u64)> = (0..100).map(|index| (index + 1, 1 << 40 | index)).collect();
    let body = [w(&[100, 0]), pairs.iter().flat_map(|(node, count)| q(&[*node, *count])).collect()].concat();
    let chain = chain(&memory, &message(opcode::BATCH_FORGET, &body), &[40, 50, 61], 0);
    let fetched = fetch_bytes(&chain, &mut scratch).unwrap();
    assert_eq!(fetched.bytes().len(), 48);
    let operation = fetched.parse(LONG).unwrap().operation;
    assert_eq!(operation, Operation::BatchForget { count: 100 });
    assert_eq!(forgotten(data(&chain, &operation)).collect::<Vec<_>>(), pairs);
}

/// The longest messages that are none too long, and far longer ones.
#[test]
fn the_scratch_is_large_enough() {
    let memory = memory();
    let mut scratch = Scratch::new();
    let group = w(&[16, 32, 1, 42]);
    let name = [vec![b'n'; 255], vec![0]].concat();
    let link = [&name, &vec![b't'; 4095], &b"\0"[..], &group].concat();
    let bytes = message_of(40 + link.len(), opcode::SYMLINK, [UID, GID], 2, &link);
    assert_eq!(fetch(&chain(&memory, &bytes, &[], 1024), LONG, &mut scratch).unwrap().group, Some(42));
    let value = [w(&[65536, 0, 0, 0]), name.clone(), vec![7; 65536]].concat();
    let bytes = message(opcode::SETXATTR, &value);
    assert!(fetch(&chain(&memory, &bytes, &[], 1024), LONG, &mut scratch).is_ok());
    let both = [q(&[9, 0]), name.clone(), name].concat();
    assert!(fetch(&chain(&memory, &message(opcode::RENAME2, &both), &[], 1024), LONG, &mut scratch).is_ok());
    for opcode in 0..60 {
        for fill in [b'n', 0] {
            let bytes = message(opcode, &vec![fill; 200_000]);
            let chain = chain(&memory, &bytes, &[], 1024);
            let whole = Room { readable: chain.readable().len(), writable: 1024 };
            assert_eq!(fetch(&chain, LONG, &mut scratch), parse(&bytes, whole, LONG), "{opcode}");
        }
    }
}

#[test]
fn without_a_whole_header_there_is_nothing() {
    let memory = memory();
    let mut scratch = Scratch::new();
    let bytes = message(opcode::LOOKUP, b"name\0");
    for len in 0..40 {
        let chain = chain(&memory, &bytes[..len], &[], 1024);
        assert_eq!(fetch_bytes(&chain, &mut scratch).err(), Some(Bad::Unanswerable));
    }
    let longer = message_of(400, opcode::LOOKUP, [UID, GID], 0, b"name\0");
    assert_eq!(errno(fetch(&chain(&memory, &longer, &[], 1024), LONG, &mut scratch)), 22);
}
