//! The ACPI tables: everything the guest is told about the machine that it cannot find by itself.
//!
//! RSDP -> XSDT -> { FADT -> DSDT, MADT, MCFG }, one after the other from [`BASE`] on, where the memory map keeps
//! the kernel away. They are written once per boot and nothing in the VMM reads them again.
//!
//! The FADT is chosen for few exits: no SMI, no 8042 controller, no VGA to be probed, ACPI already on. The machine is
//! not "hardware reduced", because the fixed power button and PM1a control register are what every guest understands.

pub(crate) mod dsdt;

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::memory::{self, ECAM, Memory, Span};
use crate::pci::{RESET_PORT, RESET_VALUE};
use crate::pm;

/// Where the tables begin: inside the area of a PC's firmware, which older guests search by themselves.
pub const BASE: u64 = 0xe_0000;
/// The root pointer is the first thing there.
pub const RSDP: u64 = BASE;
const END: u64 = 0x10_0000;

const OEM: [u8; 6] = *b"OUTBRD";
const TABLE: [u8; 8] = *b"OUTBOARD";
const REVISION: u32 = 1;

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;

/// What the tables depend on.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Number of processors; their APIC ids are 0, 1, 2, ...
    pub cpus: u8,
    /// The PCI window above RAM.
    pub mmio64: Option<Span>,
    /// Whether COM1 is there.
    pub serial: bool,
}

/// Writes the tables into guest memory.
pub fn write(memory: &Memory, platform: &Platform) -> Result<(), memory::Error> {
    let mut place = Placer { memory, next: (RSDP + Rsdp::len() as u64).next_multiple_of(64) };
    let dsdt = place.put(&dsdt::table(platform))?;
    let tables = [place.put(&bytes(&fadt(dsdt)))?, place.put(&bytes(&madt(platform.cpus)))?, place.put(&bytes(&mcfg()))?];
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = place.put(&bytes(&xsdt))?;
    memory.write(RSDP, &bytes(&Rsdp::new(OEM, xsdt)))
}

struct Placer<'a> {
    memory: &'a Memory,
    next: u64,
}

impl Placer<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, memory::Error> {
        let (at, len) = (self.next, table.len() as u64);
        if at.saturating_add(len) > END {
            return Err(memory::Error::Range { addr: at, len });
        }
        self.memory.write(at, table)?;
        self.next = (at + len).next_multiple_of(64);
        Ok(at)
    }
}

#[derive(Default)]
struct Sink(Vec<u8>);

impl AmlSink for Sink {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
    fn vec(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Sink::default();
    table.to_aml_bytes(&mut sink);
    sink.0
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(address))
}

fn fadt(dsdt: u64) -> FADT {
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        // No power button *device*: the bit left clear says that the fixed one is there.
        .flag(Flags::Wbinvd)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::from(pm::SCI).into();
    fadt.pm1a_evt_blk = u32::from(pm::EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(pm::CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(pm::EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(pm::CONTROL_PORT, 16, AccessSize::WordAccess);
    // Beyond these latencies a guest knows that states C2 and C3 are not there.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch = VGA_NOT_PRESENT.into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// A line of the old interrupt controllers that arrives elsewhere, or differently, at the I/O APIC.
fn source_override(source: u8, gsi: u32, flags: u16) -> Vec<u8> {
    let mut entry = vec![2, 10, 0, source];
    entry.extend(gsi.to_le_bytes());
    entry.extend(flags.to_le_bytes());
    entry
}

/// The MADT builder of the library knows no source overrides, so the table is put together here.
struct Table(Sdt);

impl Aml for Table {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn madt(cpus: u8) -> Table {
    const LEVEL_ACTIVE_HIGH: u16 = 0xd;
    const CONFORMS: u16 = 0;
    const PC_COMPATIBLE: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, TABLE, REVISION);
    madt.write_u32(36, LAPIC);
    madt.write_u32(40, PC_COMPATIBLE);
    for id in 0..cpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, IOAPIC, 0)));
    madt.append_slice(&source_override(0, 2, CONFORMS));
    madt.append_slice(&source_override(pm::SCI, u32::from(pm::SCI), LEVEL_ACTIVE_HIGH));
    Table(madt)
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLATFORM: Platform = Platform { cpus: 64, mmio64: Some(Span { start: 8 << 30, size: 4 << 30 }), serial: true };

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    fn table(memory: &Memory, at: u64) -> Vec<u8> {
        let mut len = [0; 4];
        memory.read(at + 4, &mut len).unwrap();
        let mut table = vec![0; u32::from_le_bytes(len) as usize];
        memory.read(at, &mut table).unwrap();
        table
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let memory = Memory::new(2 << 20).unwrap();
        write(&memory, &PLATFORM).unwrap();
        let mut rsdp = [0; 36];
        memory.read(RSDP, &mut rsdp).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let mut found = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let table = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&table), 0);
            found.push(String::from_utf8(table[..4].to_vec()).unwrap());
        }
        assert_eq!(found, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn the_fadt_leads_to_the_dsdt() {
        let fadt = bytes(&fadt(0xe_1000));
        assert_eq!(u64::from_le_bytes(fadt[140..148].try_into().unwrap()), 0xe_1000);
        let dsdt = dsdt::table(&PLATFORM);
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
    }
}
