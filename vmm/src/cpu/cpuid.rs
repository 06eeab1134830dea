//! What a processor says about itself: KVM's list, with the numbers that differ between processors put in.
//!
//! The guest sees one package of single-threaded cores. That is what every scheduler handles well, and it is the truth as
//! far as the guest can use it: where the host runs a processor is not fixed.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm::{Error, call};

/// KVM's list for processors in general.
pub fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    let mut list = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("ask KVM for processor features"))?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        // KVM emulates it wherever it says so, but does not list it.
        const TSC_DEADLINE: u32 = 1 << 24;
        each(&mut list, 1, |entry| entry.ecx |= TSC_DEADLINE);
    }
    Ok(list)
}

fn each(list: &mut CpuId, function: u32, change: impl FnMut(&mut kvm_cpuid_entry2)) {
    list.as_mut_slice().iter_mut().filter(|e| e.function == function).for_each(change);
}

/// How many bits a physical address has.
pub fn physical_bits(list: &CpuId) -> u8 {
    const MINIMUM: u8 = 36;
    let size = list.as_slice().iter().find(|e| e.function == 0x8000_0008);
    size.map_or(MINIMUM, |e| e.eax.to_le_bytes()[0])
}

/// The list of processor `id` of `count`.
pub fn of_processor(supported: &CpuId, id: u8, count: u8) -> Result<CpuId, Error> {
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    let (id, count) = (u32::from(id), u32::from(count));
    // Bits of an APIC id that tell the cores of a package apart.
    let bits = count.next_power_of_two().trailing_zeros();
    let mut list: Vec<_> = supported.as_slice().iter().filter(|e| !TOPOLOGY.contains(&e.function)).copied().collect();
    for entry in &mut list {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0xffff) | count << 16 | id << 24;
                entry.ecx |= HYPERVISOR;
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Intel's cache leaf: no cache is shared by all but the last, and that one by all cores.
            0x4 if entry.eax & 0x1f != 0 => {
                let last_level = entry.eax >> 5 & 7 == 3;
                let sharing = if last_level { count - 1 } else { 0 };
                let cores = count.next_power_of_two() - 1;
                entry.eax = (entry.eax & 0x3fff) | sharing << 14 | cores.min(63) << 26;
            }
            // AMD: number of cores, and how many bits of the APIC id they take.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | bits << 12,
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = (entry.ebx & !0xffff) | id;
                entry.ecx &= !0x7ff;
            }
            _ => {}
        }
    }
    // KVM lists these leaves as empty ones: what is in them is for the VMM to say. Leaf 0x1f is only there for machines with
    // levels that this one has not.
    list.extend((0..2).map(|index| topology(index, id, count, bits)));
    CpuId::from_entries(&list).map_err(|_| Error::Lacks { what: "room for processor features" })
}

const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// The extended topology leaf: one thread in a core, `count` cores in the package.
fn topology(index: u32, id: u32, count: u32, bits: u32) -> kvm_cpuid_entry2 {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let (shift, number, kind) = if index == 0 { (0, 1, THREADS) } else { (bits, count, CORES) };
    kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: number,
        ecx: index | kind << 8,
        edx: id,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 { function, index, ebx: 0xffff_ffff, ..Default::default() };
        CpuId::from_entries(&[entry(1, 0), entry(0xb, 0), entry(0x8000_0008, 0), entry(0x8000_001e, 0)]).unwrap()
    }

    #[test]
    fn each_processor_has_its_own_number_everywhere() {
        for (id, count) in [(0, 1), (0, 2), (5, 6), (63, 64)] {
            let list = of_processor(&list(), id, count).unwrap();
            let [basic, size, extended, threads, cores] = list.as_slice() else { panic!() };
            let id = u32::from(id);
            assert_eq!((basic.ebx >> 24, threads.edx, cores.edx, extended.eax), (id, id, id, id));
            assert_eq!(basic.ebx >> 16 & 0xff, u32::from(count));
            assert_eq!(cores.ebx, u32::from(count));
            assert!(1 << cores.eax >= u32::from(count), "ids fit");
            assert_eq!(size.ecx & 0xff, u32::from(count) - 1);
        }
    }

    #[test]
    fn one_processor_has_no_siblings() {
        let list = of_processor(&list(), 0, 1).unwrap();
        assert_eq!(list.as_slice()[0].edx >> 28 & 1, 0);
    }
}
