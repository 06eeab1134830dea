//! What is counted is shown, and what is shown is not believed.

use std::os::fd::AsFd;

use proptest::prelude::*;

use super::page::{SIZE, make, parse, read};
use super::*;

static ONE: Counter = Counter::new();
static MANY: Each<3> = Each::new();

fn families() -> [Family; 2] {
    [
        Family { name: "test_one", help: "One", kind: Kind::Counter, label: Label::None, values: std::slice::from_ref(&ONE) },
        Family { name: "test_many", help: "Some", kind: Kind::Gauge, label: Label::Device, values: MANY.first(3) },
    ]
}

#[test]
fn what_was_counted_before_and_after_is_shown() {
    ONE.add(2);
    let page = make().unwrap();
    show(Some(page.try_clone().unwrap()), &families()).unwrap();
    ONE.add(3);
    MANY.set(2, 7);
    MANY.add(3, 1);
    let shown = read(page.as_fd());
    assert_eq!(shown.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["test_one", "test_many"]);
    assert_eq!(shown[0].values, [5]);
    assert_eq!((shown[1].values.as_slice(), shown[1].kind, shown[1].label), ([0, 0, 7].as_slice(), Kind::Gauge, Label::Device));
    assert_eq!(ONE.get(), 5);
}

#[test]
fn a_page_cannot_be_cut_short_under_its_reader() {
    let page = make().unwrap();
    rustix::fs::ftruncate(&page, 1).unwrap_err();
    let (short, _) = rustix::pipe::pipe().unwrap();
    assert!(read(short.as_fd()).is_empty());
}

/// A page with one family, changed by `change`.
fn changed(change: impl Fn(&mut [u8])) -> Vec<page::Shown> {
    let mut bytes = vec![0; SIZE];
    bytes[..8].copy_from_slice(b"outbmet1");
    bytes[8] = 1;
    bytes[64..72].copy_from_slice(b"blk_read");
    bytes[64 + 48..64 + 52].copy_from_slice(b"Help");
    bytes[64 + 178] = 1;
    change(&mut bytes);
    parse(&bytes)
}

#[test]
fn names_and_help_cannot_forge_a_line() {
    assert_eq!(changed(|_| ()).len(), 1);
    for (at, byte) in [(64, b'9'), (66, b'\n'), (66, b'{'), (66, b'A'), (112, b'\n'), (112, b'"'), (112, 0x1b), (112, 0xff)] {
        assert!(changed(|bytes| bytes[at] = byte).is_empty(), "{at} {byte}");
    }
    assert!(changed(|bytes| bytes[64 + 178] = 2).is_empty(), "one value has no label");
    assert!(changed(|bytes| bytes[64 + 176] = 9).is_empty());
    let twice = changed(|bytes| {
        bytes[8] = 2;
        bytes.copy_within(64..256, 256);
    });
    assert_eq!(twice.len(), 1, "a name stands once");
}

proptest! {
    #[test]
    fn any_bytes_are_read(mut bytes in proptest::collection::vec(any::<u8>(), SIZE), families in any::<u64>()) {
        bytes[..8].copy_from_slice(b"outbmet1");
        bytes[8..16].copy_from_slice(&families.to_le_bytes());
        let shown = parse(&bytes);
        let values: usize = shown.iter().map(|one| one.values.len()).sum();
        prop_assert!(shown.len() <= 42 && values <= 1024);
    }
}
