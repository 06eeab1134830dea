//! The DSDT: the devices of the machine, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::sdt::Sdt;

use super::{OEM, Platform, REVISION, TABLE, bytes};
use crate::memory::{ECAM, MMIO32, Span};
use crate::{cmos, pm, pvpanic, serial};

/// The whole table.
pub(crate) fn table(platform: &Platform) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&pci_root(platform.mmio64));
    dsdt.append_slice(&board());
    dsdt.append_slice(&clock());
    dsdt.append_slice(&panic_port());
    if platform.serial {
        dsdt.append_slice(&com1());
    }
    dsdt.append_slice(&soft_off());
    dsdt.as_slice().to_vec()
}

fn system_bus(device: &dyn Aml) -> Vec<u8> {
    bytes(&Scope::new("_SB_".into(), vec![device]))
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

/// The root of PCI, with every range a base address may take.
fn pci_root(mmio64: Option<Span>) -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let mechanism1 = IO::new(0xcf8, 0xcf8, 1, 8);
    let io_low = AddressSpace::new_io(0u16, 0xcf7, None);
    let io_high = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let window32 = AddressSpace::new_memory(cacheable, true, low(MMIO32.start), low(MMIO32.end() - 1), None);
    let window64 = mmio64.map(|w| AddressSpace::new_memory(cacheable, true, w.start, w.end() - 1, None));
    let mut resources: Vec<&dyn Aml> = vec![&buses, &mechanism1, &io_low, &io_high, &window32];
    if let Some(window) = &window64 {
        resources.push(window);
    }
    let (express, conventional) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    system_bus(&Device::new(
        "PCI0".into(),
        vec![
            &name("_HID", &express),
            &name("_CID", &conventional),
            &name("_SEG", &0u8),
            &name("_UID", &0u8),
            &name("_ADR", &0u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
        ],
    ))
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

/// Motherboard resources: with these Linux believes the MCFG and uses memory-mapped configuration space.
fn board() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, low(ECAM.start), low(ECAM.size));
    let power = IO::new(pm::EVENT_PORT, pm::EVENT_PORT, 1, 8);
    let id = EISAName::new("PNP0C02");
    let resources = ResourceTemplate::new(vec![&ecam, &power]);
    system_bus(&Device::new("MBRD".into(), vec![&name("_HID", &id), &name("_UID", &0u8), &name("_CRS", &resources)]))
}

fn clock() -> Vec<u8> {
    let ports = IO::new(cmos::PORT, cmos::PORT, 1, 2);
    let id = EISAName::new("PNP0B00");
    let resources = ResourceTemplate::new(vec![&ports]);
    system_bus(&Device::new("RTC_".into(), vec![&name("_HID", &id), &name("_CRS", &resources)]))
}

fn panic_port() -> Vec<u8> {
    let ports = IO::new(pvpanic::PORT, pvpanic::PORT, 1, 1);
    let resources = ResourceTemplate::new(vec![&ports]);
    system_bus(&Device::new("PEVT".into(), vec![&name("_HID", &"QEMU0001"), &name("_STA", &0xfu8), &name("_CRS", &resources)]))
}

fn com1() -> Vec<u8> {
    let ports = IO::new(serial::PORT, serial::PORT, 1, 8);
    let line = Interrupt::new(true, true, false, false, serial::IRQ);
    let id = EISAName::new("PNP0501");
    let resources = ResourceTemplate::new(vec![&ports, &line]);
    system_bus(&Device::new("COM1".into(), vec![&name("_HID", &id), &name("_UID", &0u8), &name("_CRS", &resources)]))
}

/// `_S5`: what goes into SLP_TYP for "off".
fn soft_off() -> Vec<u8> {
    bytes(&name("_S5_", &Package::new(vec![&pm::SOFT_OFF, &0u8])))
}
