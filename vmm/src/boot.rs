//! What the first processor finds when it enters the kernel: the boot information in low memory, and its registers.
//!
//! Memory below 1 MiB is laid out here and nowhere else. All of it is RAM to the guest, except the ACPI tables:
//!
//! ```text
//! 0x0500 GDT      0x6000 PVH start info, module list, memory map      0x7000 Linux zero page (boot_params)
//! 0x9000 PML4     0xa000 PDPT     0xb000 4 page directories (identity map of 4 GiB, 2 MiB pages)
//! 0x20000 command line            0xe0000 ACPI tables (see `acpi`)
//! ```
//!
//! Both protocols get the same memory map and the same pointer to the ACPI tables. The structures are written byte by
//! byte at the offsets of their specifications (Documentation/arch/x86/boot.rst and zero-page.rst; Xen's
//! include/public/arch-x86/hvm/start_info.h), because that is how the specifications give them.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::acpi;
use crate::kernel::{Loaded, Protocol};
use crate::memory::{self, ECAM, HIGH_RAM_START, LOW_RAM_END, Memory, Span};

const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const PVH_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
/// Where an extended BIOS data area would begin; Linux keeps off what is above.
const BASE_MEMORY_END: u64 = 0x9_fc00;
const EXTENDED_MEMORY: u64 = 0x10_0000;

/// E820 and PVH use the same numbers.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// The registers the first processor starts with, over those KVM gives at reset.
#[derive(Clone, Debug)]
pub struct Entry {
    loaded: Loaded,
}

fn memory_map(ram: u64) -> Vec<(Span, u32)> {
    let span = |start: u64, end: u64| Span { start, size: end - start };
    let mut map = vec![
        (span(0, BASE_MEMORY_END), RAM),
        (span(acpi::BASE, EXTENDED_MEMORY), RESERVED),
        (span(EXTENDED_MEMORY, ram.min(LOW_RAM_END)), RAM),
        // Linux uses memory-mapped configuration space only where firmware has reserved it.
        (ECAM, RESERVED),
    ];
    if ram > LOW_RAM_END {
        map.push((Span { start: HIGH_RAM_START, size: ram - LOW_RAM_END }, RAM));
    }
    map
}

/// Writes the boot information for a kernel that has just been loaded.
pub fn prepare(memory: &Memory, loaded: Loaded, cmdline: &str) -> Result<Entry, memory::Error> {
    memory.write(CMDLINE, cmdline.as_bytes())?;
    memory.write(CMDLINE.saturating_add(cmdline.len() as u64), &[0])?;
    match &loaded.protocol {
        Protocol::Linux64 { header } => {
            zero_page(memory, header, &loaded)?;
            page_tables(memory)?;
        }
        Protocol::Pvh => start_info(memory, &loaded)?,
    }
    Ok(Entry { loaded })
}

/// A page of bytes, written at the offsets a specification names.
struct Page(Vec<u8>);

impl Page {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(to) = self.0.get_mut(at..at.saturating_add(bytes.len())) {
            to.copy_from_slice(bytes);
        }
    }
    fn u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
    fn u64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }
}

fn zero_page(memory: &Memory, header: &[u8], loaded: &Loaded) -> Result<(), memory::Error> {
    const OTHER_LOADER: u8 = 0xff;
    let mut page = Page(vec![0; 4096]);
    page.put(0x1f1, header);
    page.u64(0x070, acpi::RSDP);
    page.put(0x210, &[OTHER_LOADER]);
    page.u32(0x228, u32::try_from(CMDLINE).unwrap_or(0));
    if let Some((addr, size)) = loaded.initrd {
        page.u32(0x218, u32::try_from(addr).unwrap_or(0));
        page.u32(0x21c, u32::try_from(size).unwrap_or(0));
    }
    let map = memory_map(memory.size());
    page.put(0x1e8, &[u8::try_from(map.len()).unwrap_or(0)]);
    for (i, (span, kind)) in map.into_iter().enumerate() {
        let at = 0x2d0 + i * 20;
        page.u64(at, span.start);
        page.u64(at + 8, span.size);
        page.u32(at + 16, kind);
    }
    memory.write(ZERO_PAGE, &page.0)
}

/// The 64-bit entry wants paging on, with everything below 4 GiB where it is.
fn page_tables(memory: &Memory) -> Result<(), memory::Error> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    memory.write(PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes())?;
    for i in 0..DIRECTORIES {
        let directory = PAGE_DIRECTORIES + i * 4096;
        memory.write(PDPT + i * 8, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
    }
    let entries: Vec<u8> = (0..DIRECTORIES * 512).flat_map(|i| ((i << 21) | LARGE | PRESENT_WRITABLE).to_le_bytes()).collect();
    memory.write(PAGE_DIRECTORIES, &entries)?;
    let gdt = [CODE64, DATA, TASK].map(|s| descriptor(&s));
    memory.write(GDT, &[0; 16])?;
    // Boot protocol: __BOOT_CS is 0x10 and __BOOT_DS is 0x18.
    for (i, entry) in gdt.into_iter().enumerate() {
        memory.write(GDT + 16 + 8 * i as u64, &entry.to_le_bytes())?;
    }
    Ok(())
}

fn start_info(memory: &Memory, loaded: &Loaded) -> Result<(), memory::Error> {
    const MAGIC: u32 = 0x336e_c578;
    let map = memory_map(memory.size());
    let mut page = Page(vec![0; 0x1000]);
    page.u32(0, MAGIC);
    page.u32(4, 1);
    page.u64(24, CMDLINE);
    page.u64(32, acpi::RSDP);
    page.u64(40, PVH_MAP);
    page.u32(48, u32::try_from(map.len()).unwrap_or(0));
    if let Some((addr, size)) = loaded.initrd {
        page.u32(12, 1);
        page.u64(16, MODULES);
        page.u64(0x40, addr);
        page.u64(0x48, size);
    }
    for (i, (span, kind)) in map.into_iter().enumerate() {
        let at = 0x100 + i * 24;
        page.u64(at, span.start);
        page.u64(at + 8, span.size);
        page.u32(at + 16, kind);
    }
    memory.write(START_INFO, &page.0)
}

const fn segment(selector: u16, type_: u8, long: bool, system: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if system { 0x67 } else { 0xffff_ffff },
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: !long as u8 & !system as u8,
        s: !system as u8,
        l: long as u8,
        g: !system as u8,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

const EXECUTE_READ: u8 = 11;
const READ_WRITE: u8 = 3;
const BUSY_TSS: u8 = 11;
const CODE64: kvm_segment = segment(0x10, EXECUTE_READ, true, false);
const CODE32: kvm_segment = segment(0x10, EXECUTE_READ, false, false);
const DATA: kvm_segment = segment(0x18, READ_WRITE, false, false);
const TASK: kvm_segment = segment(0x20, BUSY_TSS, false, true);

/// The eight bytes of a segment with base 0 in a descriptor table.
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_) | u64::from(s.s) << 4 | u64::from(s.present) << 7;
    let flags = u64::from(s.l) << 1 | u64::from(s.db) << 2 | u64::from(s.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

impl Entry {
    /// Changes the registers of a processor after reset into those of the entry.
    pub fn registers(&self, sregs: &mut kvm_sregs) -> kvm_regs {
        const PROTECTED: u64 = 1;
        const EXTENSION_TYPE: u64 = 1 << 4;
        const PAGING: u64 = 1 << 31;
        const PAE: u64 = 1 << 5;
        const LONG_ENABLED_ACTIVE: u64 = 1 << 8 | 1 << 10;
        let mut regs = kvm_regs { rflags: 2, rip: self.loaded.entry, rsp: STACK, ..Default::default() };
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *data = DATA;
        }
        sregs.tr = TASK;
        sregs.gdt = kvm_dtable { base: GDT, limit: 0x27, ..Default::default() };
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = PROTECTED | EXTENSION_TYPE;
        match self.loaded.protocol {
            Protocol::Linux64 { .. } => {
                sregs.cs = CODE64;
                sregs.cr3 = PML4;
                sregs.cr4 |= PAE;
                sregs.cr0 |= PAGING;
                sregs.efer |= LONG_ENABLED_ACTIVE;
                regs.rsi = ZERO_PAGE;
            }
            Protocol::Pvh => {
                sregs.cs = CODE32;
                regs.rbx = START_INFO;
            }
        }
        regs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&CODE64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&CODE32), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&TASK), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_map_lists_all_ram_once() {
        for ram in [128 << 20, LOW_RAM_END, LOW_RAM_END + (1 << 30)] {
            let map = memory_map(ram);
            let mut last = 0;
            for (span, _) in &map {
                assert!(span.start >= last, "{map:x?}");
                last = span.end();
            }
            let total: u64 = map.iter().filter(|(_, kind)| *kind == RAM).map(|(s, _)| s.size).sum();
            assert_eq!(total, ram - (EXTENDED_MEMORY - BASE_MEMORY_END));
        }
    }
}
