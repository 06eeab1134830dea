//! Regions are checked before they are mapped; spans never reach outside.

use super::*;

/// Guest memory in which tests build rings: `size` bytes at each of these guest addresses.
pub(crate) fn guest(regions: &[(u64, u64)]) -> Memory {
    regions.iter().fold(Memory::default(), |memory, (guest_addr, size)| {
        let fd = sealed_memfd("test", *size).unwrap();
        let user_addr = guest_addr + (1 << 52);
        memory.with(RegionFile { guest_addr: *guest_addr, size: *size, user_addr, offset: 0, fd }, Trust::Sealed).unwrap()
    })
}

fn region(guest_addr: u64, size: u64, offset: u64, fd: OwnedFd) -> RegionFile {
    RegionFile { guest_addr, size, user_addr: guest_addr + (1 << 52), offset, fd }
}

#[test]
fn a_region_longer_than_its_file_is_refused() {
    let fd = sealed_memfd("short", 4096).unwrap();
    let error = Memory::default().with(region(0, 1 << 30, 0, fd), Trust::Sealed).unwrap_err();
    assert!(matches!(error, Error::TooShort { have: 4096, .. }), "{error}");
    let fd = sealed_memfd("short", 8192).unwrap();
    let error = Memory::default().with(region(0, 8192, 1, fd), Trust::Sealed).unwrap_err();
    assert!(matches!(error, Error::TooShort { .. }), "{error}");
}

#[test]
fn memory_that_can_shrink_is_refused_unless_trusted() {
    let unsealed = || {
        let fd = memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 4096).unwrap();
        fd
    };
    let error = Memory::default().with(region(0, 4096, 0, unsealed()), Trust::Sealed).unwrap_err();
    assert!(matches!(error, Error::Unsealed(0)), "{error}");
    Memory::default().with(region(0, 4096, 0, unsealed()), Trust::Unsealed).unwrap();
}

#[test]
fn a_sealed_memfd_can_neither_change_its_size_nor_be_sealed_further() {
    let fd = sealed_memfd("sealed", 8192).unwrap();
    assert_eq!(ftruncate(&fd, 4096), Err(Errno::PERM));
    assert_eq!(ftruncate(&fd, 16384), Err(Errno::PERM));
    assert_eq!(fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
}

#[test]
fn ranges_that_wrap_overlap_or_are_empty_are_refused() {
    let fd = || sealed_memfd("range", 8192).unwrap();
    let one = Memory::default().with(region(0x1000, 8192, 0, fd()), Trust::Sealed).unwrap();
    assert!(matches!(one.with(region(0x2000, 4096, 0, fd()), Trust::Sealed), Err(Error::Overlap(0x2000))));
    assert!(matches!(one.with(region(0x9000, 0, 0, fd()), Trust::Sealed), Err(Error::Range { .. })));
    let top = RegionFile { guest_addr: u64::MAX - 4095, size: 8192, user_addr: 0, offset: 0, fd: fd() };
    assert!(matches!(one.with(top, Trust::Sealed), Err(Error::Range { .. })));
    let file = RegionFile { guest_addr: 1 << 40, size: 4096, user_addr: 0, offset: u64::MAX - 1, fd: fd() };
    assert!(matches!(one.with(file, Trust::Sealed), Err(Error::Range { .. })));
    assert!(matches!(one.without(0x1000, 4096), Err(Error::Unknown { .. })));
    assert!(one.without(0x1000, 8192).unwrap().is_empty());
}

#[test]
fn a_region_need_not_begin_at_a_page_of_its_file() {
    let fd = sealed_memfd("odd", 12288).unwrap();
    rustix::io::pwrite(&fd, b"odd", 4096 + 100).unwrap();
    let memory = Memory::default().with(region(0x5000, 4096, 4096 + 100, fd), Trust::Sealed).unwrap();
    let mut bytes = [0; 3];
    memory.read(memory.span(0x5000, 3).unwrap(), &mut bytes);
    assert_eq!(&bytes, b"odd");
    assert_eq!(memory.guest_address((1 << 52) + 0x5010), Some(0x5010));
    assert_eq!(memory.guest_address(0x5010), None);
}

#[test]
fn spans_cross_touching_regions_and_stop_at_holes() {
    let memory = guest(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
    let pieces = |addr, len| {
        let mut list = Vec::new();
        memory.spans(addr, len, |span| list.push(span.len())).map(|()| list)
    };
    assert_eq!(pieces(0x1f00, 0x200).unwrap(), [0x100, 0x100]);
    assert!(memory.span(0x1f00, 0x200).is_err());
    assert!(pieces(0x2f00, 0x200).is_err());
    assert!(pieces(0x0, 1).is_err());
    assert!(pieces(u64::MAX, 2).is_err());
    assert_eq!(pieces(0x8000, 0).unwrap(), [0u32; 0]);
}

#[test]
fn a_span_of_another_table_reads_nothing_outside() {
    let big = guest(&[(0, 0x10000)]);
    let small = guest(&[(0, 0x1000)]);
    let span = big.span(0xf000, 0x1000).unwrap();
    let mut bytes = [0xaa; 16];
    assert_eq!(small.read(span, &mut bytes), 0);
    assert_eq!(bytes, [0xaa; 16]);
    assert_eq!(small.write(span, &bytes), 0);
}
