//! The machine: KVM, memory, processors, PCI, and ONE virtio device type, served by other processes.
//!
//! What lives where:
//!
//! | file | what it is |
//! |---|---|
//! | `args`, `classes` | the command line; the table of device classes |
//! | `machine` | start-up in three types: opened, built, started |
//! | `control` | the control thread's poll loop, the control socket |
//! | `cpu`, `events` | processors: state, thread, orders to them and reports from them |
//! | `kvm`, `memory`, `sandbox` | everything `unsafe`; guest RAM; what each thread may do |
//! | `metrics` | what is counted |
//! | `kernel`, `boot`, `acpi` | what the guest finds in memory when it starts |
//! | `bus`, `pci`, `virtio` | what it finds when it looks around |
//! | `serial`, `cmos`, `i8042`, `pm`, `pvpanic` | the rest of a PC |
//!
//! Two kinds of threads exist. Each processor has one, which runs the guest and touches registers; the control thread has
//! everything else. Processors never wait for a process, a socket or a terminal.

pub mod acpi;
pub mod args;
pub mod boot;
pub mod bus;
pub mod classes;
pub mod cmos;
pub mod control;
pub mod cpu;
pub mod events;
pub mod i8042;
pub mod kernel;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod pci;
pub mod pm;
pub mod pvpanic;
pub mod sandbox;
pub mod serial;
pub mod virtio;
