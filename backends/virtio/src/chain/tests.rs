//! The walker against a reference that is written from the specification and works on plain vectors.

#![expect(clippy::cast_possible_truncation, reason = "patterns and small counts")]

use proptest::prelude::*;

use super::*;
use crate::memory::tests::guest;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const TABLES: u64 = 0x4000;
const DATA: u64 = 0x10000;

#[derive(Clone, Copy, Debug)]
struct Raw {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Raw {
    fn bytes(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.addr.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

fn memory() -> Arc<Memory> {
    // Data lies in two regions that touch and one behind a hole.
    Arc::new(guest(&[(0, 0x10000), (DATA, 0x1000), (DATA + 0x1000, 0x1000), (DATA + 0x8000, 0x1000)]))
}

fn put(memory: &Memory, at: u64, table: &[Raw]) {
    for (index, raw) in table.iter().enumerate() {
        let span = memory.span(at + index as u64 * 16, 16).unwrap();
        memory.write(span, &raw.bytes());
    }
}

fn mapped(addr: u64, len: u32) -> bool {
    let inside = |a: u64| a < DATA + 0x2000 || (DATA + 0x8000..DATA + 0x9000).contains(&a);
    len == 0 || (addr.checked_add(u64::from(len)).is_some() && (0..u64::from(len)).all(|i| inside(addr + i)))
}

/// What the specification makes of a chain: its buffers with their direction, or nothing.
fn reference(table: &[Raw], tables: &[Vec<Raw>], head: u16) -> Option<Vec<(u64, u32, bool)>> {
    let mut out: Vec<(u64, u32, bool)> = Vec::new();
    let (mut current, mut index, mut nested) = (table.to_vec(), head, false);
    loop {
        let raw = *current.get(usize::from(index))?;
        if out.len() >= usize::from(SIZE) {
            return None;
        }
        if raw.flags & 4 != 0 {
            if nested || raw.flags & 1 != 0 || raw.len % 16 != 0 || raw.len == 0 || raw.len / 16 > u32::from(SIZE) {
                return None;
            }
            let which = raw.addr.checked_sub(TABLES)? / 0x100;
            let inner = tables.get(usize::try_from(which).ok()?).filter(|_| raw.addr % 0x100 == 0)?;
            current = inner.iter().copied().take(raw.len as usize / 16).collect();
            (index, nested) = (0, true);
            continue;
        }
        let write = raw.flags & 2 != 0;
        if !mapped(raw.addr, raw.len) || (!write && out.iter().any(|(_, len, w)| *w && *len > 0)) {
            return None;
        }
        out.push((raw.addr, raw.len, write));
        if raw.flags & 1 == 0 {
            return Some(out);
        }
        index = raw.next;
    }
}

fn raw() -> impl Strategy<Value = Raw> {
    let data = (0u64..0x2000, 0u32..0x200).prop_map(|(at, len)| (DATA + at, len));
    let hole = (0x1f00u64..0x8100, 0u32..0x200).prop_map(|(at, len)| (DATA + at, len));
    let indirect = (0u64..3, 0u32..10).prop_map(|(which, entries)| (TABLES + which * 0x100, entries * 16));
    let flags = prop_oneof![4 => Just(1u16), 2 => Just(3), 1 => Just(0), 1 => Just(2)];
    let plain = (prop_oneof![8 => data, 1 => hole], flags, 0..SIZE + 1);
    let table = (indirect, prop_oneof![6 => Just(4u16), 1 => Just(5), 1 => Just(6)], 0..SIZE);
    prop_oneof![6 => plain.boxed(), 1 => table.boxed()].prop_map(|((addr, len), flags, next)| Raw { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_walker_agrees_with_the_specification(
        table in prop::collection::vec(raw(), usize::from(SIZE)),
        tables in prop::collection::vec(prop::collection::vec(raw(), usize::from(SIZE) + 2), 3),
        head in 0..SIZE,
    ) {
        let memory = memory();
        put(&memory, TABLE, &table);
        for (which, inner) in tables.iter().enumerate() {
            put(&memory, TABLES + which as u64 * 0x100, inner);
        }
        let span = memory.span(TABLE, u32::from(SIZE) * 16).unwrap();
        let mut chain = Chain::new(Arc::clone(&memory), SIZE);
        let walked = chain.walk(span, SIZE, head);
        match reference(&table, &tables, head) {
            None => prop_assert!(walked.is_err()),
            Some(buffers) => {
                prop_assert!(walked.is_ok(), "{:?}", walked);
                let bytes = |write| buffers.iter().filter(|(_, _, w)| *w == write).map(|(_, len, _)| len).sum::<u32>();
                prop_assert_eq!(chain.readable().len(), bytes(false));
                prop_assert_eq!(chain.writable().len(), bytes(true));
                prop_assert_eq!(usize::from(chain.descriptors()), buffers.len());
            }
        }
    }

    #[test]
    fn cutting_a_buffer_loses_no_byte(lens in prop::collection::vec(1u32..300, 1..SIZE as usize), cut in 0u32..2000, last in 0u32..40) {
        let memory = memory();
        let mut at = DATA + 0xe80;
        let mut table: Vec<Raw> = Vec::new();
        for (index, len) in lens.iter().enumerate() {
            table.push(Raw { addr: at, len: *len, flags: 1, next: u16::try_from(index).unwrap() + 1 });
            at += u64::from(*len);
        }
        table.last_mut().unwrap().flags = 0;
        put(&memory, TABLE, &table);
        let total: u32 = lens.iter().sum();
        let content: Vec<u8> = (0..total).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        let mut chain = Chain::new(Arc::clone(&memory), SIZE);
        chain.walk(memory.span(TABLE, u32::from(SIZE) * 16).unwrap(), SIZE, 0).unwrap();
        prop_assert_eq!(chain.readable().copy_from(&content), content.len());
        let (front, back) = chain.readable().split_at(cut);
        let mut read = vec![0; content.len()];
        let n = front.copy_to(&mut read);
        prop_assert_eq!(n as u32, cut.min(total));
        prop_assert_eq!(back.copy_to(&mut read[n..]), content.len() - n);
        prop_assert_eq!(&read, &content);
        if let Some((_, tail)) = back.split_last(last) {
            let mut end = vec![0; last as usize];
            prop_assert_eq!(tail.copy_to(&mut end), end.len());
            prop_assert_eq!(&end[..], &content[content.len() - end.len()..]);
        }
    }
}

#[test]
fn a_loop_ends_with_an_error() {
    let memory = memory();
    put(&memory, TABLE, &[Raw { addr: DATA, len: 1, flags: 1, next: 0 }]);
    let mut chain = Chain::new(Arc::clone(&memory), SIZE);
    let table = memory.span(TABLE, u32::from(SIZE) * 16).unwrap();
    assert!(matches!(chain.walk(table, SIZE, 0), Err(Error::TooLong(SIZE))));
}

#[test]
fn four_gigabytes_in_one_chain_are_too_much() {
    let memory = memory();
    let half = Raw { addr: DATA, len: 0, flags: 1, next: 1 };
    put(&memory, TABLE, &[Raw { len: u32::MAX, ..half }, Raw { len: 2, flags: 2, ..half }]);
    let mut chain = Chain::new(Arc::clone(&memory), SIZE);
    let table = memory.span(TABLE, u32::from(SIZE) * 16).unwrap();
    assert!(chain.walk(table, SIZE, 0).is_err());
}

#[test]
fn files_are_read_and_written_in_place() {
    let memory = memory();
    let file = crate::memory::sealed_memfd("file", 8192).unwrap();
    let two = [Raw { addr: DATA + 0xf80, len: 256, flags: 1, next: 1 }, Raw { addr: DATA + 0x8000, len: 100, flags: 0, next: 0 }];
    put(&memory, TABLE, &two);
    let mut chain = Chain::new(Arc::clone(&memory), SIZE);
    chain.walk(memory.span(TABLE, u32::from(SIZE) * 16).unwrap(), SIZE, 0).unwrap();
    let content: Vec<u8> = (0..356u32).map(|i| i as u8).collect();
    chain.readable().copy_from(&content);
    use std::os::fd::AsFd;
    assert_eq!(chain.readable().write_to(file.as_fd(), Some(10)).unwrap(), 356);
    chain.readable().zero();
    assert_eq!(chain.readable().read_from(file.as_fd(), Some(10)).unwrap(), 356);
    let mut read = vec![0; 356];
    chain.readable().copy_to(&mut read);
    assert_eq!(read, content);
}
