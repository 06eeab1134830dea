//! What devices and the VMM parse: requests, machine files, kernels.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;

use blk::request::{Limits, Request, SECTOR, Status, finish};
use outboard::machine::file;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio::metrics::page;

use crate::bytes::Bytes;
use crate::rings;

/// A disk's request.
pub fn blk(mut bytes: Bytes<'_>) {
    let size = u64::from(bytes.u32() >> (bytes.byte() % 32)) * SECTOR;
    let flags = bytes.byte();
    let limits = Limits { bytes: size, read_only: flags & 1 != 0, lifetime: flags & 4 != 0, secure_erase: flags & 8 != 0 };
    let Some(chain) = rings::described(&mut bytes) else { return };
    let Ok(request) = Request::read(&chain, &limits) else { return };
    let answer = request.as_ref().map_or(0, Request::answer_len);
    let inside = |offset: u64, len: u64| assert!(offset + len <= limits.bytes, "{offset} + {len} of {}", limits.bytes);
    match &request {
        Ok(Request::Read { offset, data }) => inside(*offset, data.len().into()),
        Ok(Request::Write { offset, data }) => {
            inside(*offset, data.len().into());
            assert!(!limits.read_only);
        }
        Ok(Request::Discard(ranges) | Request::WriteZeroes(ranges) | Request::SecureErase(ranges)) => {
            ranges.iter().for_each(|range| inside(range.offset, range.len));
            assert!(!limits.read_only);
        }
        Ok(Request::GetId(room)) => assert!(room.len() <= 20),
        Ok(Request::GetLifetime(room)) => assert!(room.len() <= 4),
        Ok(Request::Flush) | Err(_) => {}
    }
    let written = finish(&chain, Status::Ok, answer);
    assert!(written >= 1 && written <= chain.writable().len(), "the guest is told of bytes it has room for");
}

/// A console's.
pub fn console(mut bytes: Bytes<'_>) {
    let Some(chain) = rings::described(&mut bytes) else { return };
    if let Ok(output) = console::request::Output::read(&chain) {
        assert!(output.0.len() <= console::request::MAX_BYTES);
    }
    if let Ok(input) = console::request::Input::read(&chain) {
        assert_eq!(input.0.len(), chain.writable().len());
    }
}

/// An entropy source's.
pub fn rng(mut bytes: Bytes<'_>) {
    let Some(chain) = rings::described(&mut bytes) else { return };
    if let Ok(request) = rng::request::Request::read(&chain) {
        assert!((1..=rng::request::MAX_BYTES).contains(&request.bytes));
        assert!(request.bytes <= chain.writable().len());
    }
}

/// A machine file. A mistake in it is a sentence that names the file.
pub fn machine_file(bytes: Bytes<'_>) {
    let Ok(text) = std::str::from_utf8(bytes.rest()) else { return };
    match file::parse(text, "fuzz.toml", Path::new("/nowhere")) {
        Ok(machine) => assert!(!machine.name.is_empty() || text.contains("name")),
        Err(error) => assert!(format!("{error:#}").contains("fuzz.toml"), "{error:#}"),
    }
}

/// The page in which a process shows its counters. Where it goes next has a format of its own, which nothing in it may break.
pub fn metrics_page(mut bytes: Bytes<'_>) {
    // In front of the descriptions there is little, and most of it has to be right.
    let magic = if bytes.byte() == 0 { bytes.u64() } else { u64::from_le_bytes(*b"outbmet1") };
    let head = [magic.to_le_bytes(), (bytes.u64() % 64).to_le_bytes()].concat();
    let mut page = [head, vec![0; 48], bytes.rest().to_vec()].concat();
    page.resize(page::SIZE, 0);
    for shown in page::parse(&page) {
        assert!(shown.name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'), "{:?}", shown.name);
        assert!(!shown.help.contains(['"', '\\', '\n']), "{:?}", shown.help);
    }
}

/// A kernel image.
pub fn kernel(mut bytes: Bytes<'_>) {
    const RAM: u64 = 16 << 20;
    let padding = usize::from(bytes.u16());
    let image = memfd_create("kernel", MemfdFlags::CLOEXEC).expect("a memfd");
    let path = format!("/proc/self/fd/{}", image.as_raw_fd());
    fs::write(&path, [bytes.rest(), &vec![0; padding]].concat()).expect("room");
    let Ok(images) = vmm::kernel::Images::open(Path::new(&path), None, "console=ttyS0") else { return };
    let Ok(None) = images.place(RAM) else { return };
    let memory = vmm::memory::Memory::new(RAM).expect("memory");
    let _loaded = images.load(&memory);
}
