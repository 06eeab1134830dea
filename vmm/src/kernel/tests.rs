//! Kernels made of headers only, each wrong in one way.

use std::io::Write;

use super::*;

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("outboard-kernel-{}-{name}", std::process::id()));
    File::create(&path).unwrap().write_all(bytes).unwrap();
    path
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn bzimage(body: usize) -> Vec<u8> {
    let mut image = vec![0; 2 * 512 + body];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &u32::try_from(body / 16).unwrap().to_le_bytes());
    put(&mut image, 0x200, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x200_0000u32.to_le_bytes());
    image
}

fn elf(note: bool) -> Vec<u8> {
    let mut image = vec![0; 4096];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &2u16.to_le_bytes());
    put(&mut image, 64, &1u32.to_le_bytes());
    put(&mut image, 64 + 8, &1024u64.to_le_bytes());
    put(&mut image, 64 + 24, &0x100_0000u64.to_le_bytes());
    put(&mut image, 64 + 32, &512u64.to_le_bytes());
    put(&mut image, 64 + 40, &0x10_0000u64.to_le_bytes());
    if note {
        put(&mut image, 120, &4u32.to_le_bytes());
        put(&mut image, 120 + 8, &2048u64.to_le_bytes());
        put(&mut image, 120 + 32, &32u64.to_le_bytes());
        put(&mut image, 2048, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(&mut image, 2060, b"Xen\0");
        put(&mut image, 2064, &0x100_0100u32.to_le_bytes());
    }
    image
}

fn open(name: &str, image: &[u8]) -> Result<Images, Error> {
    let path = file(name, image);
    let result = Images::open(&path, None, "");
    std::fs::remove_file(path).unwrap();
    result
}

#[test]
fn a_bzimage_is_planned_at_its_preferred_address() {
    let images = open("good", &bzimage(4096)).unwrap();
    assert_eq!(images.plan.entry, 0x100_0200);
    assert_eq!(images.plan.end, 0x300_0000);
    assert!(matches!(images.plan.protocol, Protocol::Linux64 { .. }));
}

#[test]
fn an_elf_kernel_is_entered_by_its_note() {
    let images = open("elf", &elf(true)).unwrap();
    assert_eq!(images.plan.entry, 0x100_0100);
    assert_eq!(images.plan.protocol, Protocol::Pvh);
}

#[test]
fn every_cut_of_a_kernel_is_a_sentence() {
    for whole in [bzimage(4096), elf(true)] {
        for len in [0, 1, 5, 63, 64, 100, 0x202, 0x210, 1023, 1024, 1400, 2047] {
            let error = open("cut", &whole[..len]).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. } | Error::Unknown { .. } | Error::Unusable { .. }), "{len}: {error}");
        }
    }
}

#[test]
fn an_elf_file_without_a_note_says_so() {
    let error = open("nonote", &elf(false)).unwrap_err();
    assert!(error.to_string().contains("PVH"), "{error}");
}

#[test]
fn text_is_not_a_kernel() {
    assert!(matches!(open("text", b"#!/bin/sh\n").unwrap_err(), Error::Unknown { .. }));
}

#[test]
fn hostile_numbers_are_refused_and_do_not_panic() {
    for at in (0..0x2a0).step_by(2) {
        let mut image = bzimage(4096);
        put(&mut image, at, &[0xff; 8]);
        let _ = open("fuzz", &image).map(|i| i.place(u64::MAX));
        let mut image = elf(true);
        put(&mut image, at, &[0xff; 8]);
        let _ = open("fuzz", &image).map(|i| i.place(u64::MAX));
    }
}

#[test]
fn too_little_memory_names_both_needs() {
    let kernel = file("mem", &bzimage(4096));
    let initrd = file("initrd", &vec![1; 3 << 20]);
    let images = Images::open(&kernel, Some(&initrd), "").unwrap();
    let error = images.place(50 << 20).unwrap_err().to_string();
    assert!(error.contains("48 MiB") && error.contains("3 MiB"), "{error}");
    assert_eq!(images.place(64 << 20).unwrap(), Some((61 << 20, 3 << 20)));
    std::fs::remove_file(kernel).unwrap();
    std::fs::remove_file(initrd).unwrap();
}

#[test]
fn a_long_command_line_is_refused() {
    let path = file("cmdline", &bzimage(64));
    let error = Images::open(&path, None, &"x".repeat(3000)).unwrap_err();
    assert!(matches!(error, Error::Cmdline { len: 3000, max: 2047 }));
    std::fs::remove_file(path).unwrap();
}
