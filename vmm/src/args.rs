//! The command line, twice: as written ([`Args`]) and as meant ([`Config`]).
//!
//! Parsing needs nothing but the words; [`Config::try_from`] checks what only makes sense together. Nothing is opened here.

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use daemon::{Arguments, Base};
use thiserror::Error;

use crate::classes::{self, Class};
use crate::pci::MAX_FUNCTIONS;
use crate::virtio::{MAX_QUEUE_SIZE, MAX_QUEUES};

/// Local APIC identifiers of eight bits would reach to 254; 64 is what is tested.
pub const MAX_CPUS: u8 = 64;
const MIN_MEMORY: u64 = 16 << 20;
const MAX_MEMORY: u64 = 1 << 40;
const PAGE: u64 = 4096;

/// A virtual machine: processors, memory, PCI, and devices that are served by other processes.
#[derive(Clone, Debug, Parser)]
#[command(name = "outboard-vmm", version, about)]
pub struct Args {
    /// Kernel: a bzImage, or an ELF vmlinux with a PVH note
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Guest memory, with K, M, G or T
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    pub cpus: u8,
    /// The devices, in the order of their slots
    #[arg(
        long = "device",
        value_name = "DEVICE",
        help = "A device: NAME,class=CLASS|id=N,fd=N|socket=PATH[,queues=N][,queue-size=N]"
    )]
    pub devices: Vec<DeviceSpec>,
    /// Where COM1 goes: none, stdio or fd=N
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialSpec,
    /// Descriptor of the control socket (SOCK_SEQPACKET)
    #[arg(long, value_name = "N")]
    pub control_fd: Option<RawFd>,
    /// What a reset of the machine does
    #[arg(long, value_enum, value_name = "WHAT", default_value = "restart")]
    pub on_reboot: OnReboot,
    #[command(flatten)]
    base: Base,
}

impl Arguments for Args {
    fn base(&self) -> &Base {
        &self.base
    }

    fn inherited(&self) -> Vec<RawFd> {
        let devices = self.devices.iter().filter_map(|d| match d.reach {
            Reach::Fd(fd) => Some(fd),
            Reach::Socket(_) => None,
        });
        let serial = match self.serial {
            SerialSpec::Fd(fd) => Some(fd),
            SerialSpec::None | SerialSpec::Stdio => None,
        };
        devices.chain(serial).chain(self.control_fd).collect()
    }
}

/// What a reset of the machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnReboot {
    /// The same machine boots again, with every device connected.
    Restart,
    /// The program ends, with status 3.
    Exit,
}

/// Where COM1 goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialSpec {
    /// There is no COM1.
    None,
    /// Standard input and output.
    Stdio,
    /// This descriptor, both ways.
    Fd(RawFd),
}

/// How a device process is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// An inherited, connected socket.
    Fd(RawFd),
    /// A listening socket.
    Socket(PathBuf),
}

/// One `--device`.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    /// Unique in the machine.
    pub name: String,
    /// Virtio id.
    pub id: u16,
    /// Row of the class, or the one for all others.
    pub class: &'static Class,
    /// The process.
    pub reach: Reach,
    /// Number of queues, if not the class's.
    pub queues: Option<u16>,
    /// Size of each ring.
    pub queue_size: Option<u16>,
}

/// A sentence about the command line.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Usage(String);

fn usage<T>(text: impl Into<String>) -> Result<T, Usage> {
    Err(Usage(text.into()))
}

fn parse_size(text: &str) -> Result<u64, Usage> {
    // A bare number is as often meant as MiB as it is as bytes.
    let (digits, unit) = match text.char_indices().last() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (text.get(..at).unwrap_or_default(), unit),
        _ => return usage("write a number and a unit, such as 512M or 2G"),
    };
    let shift = match unit.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return usage(format!("{unit:?} is not one of K, M, G, T")),
    };
    let number: u64 = digits.parse().or_else(|_| usage(format!("{digits:?} is not a number")))?;
    number.checked_mul(1 << shift).map_or_else(|| usage("it is too large"), Ok)
}

impl FromStr for SerialSpec {
    type Err = Usage;
    fn from_str(text: &str) -> Result<Self, Usage> {
        match (text, text.strip_prefix("fd=").map(str::parse)) {
            ("none", _) => Ok(Self::None),
            ("stdio", _) => Ok(Self::Stdio),
            (_, Some(Ok(fd))) if fd >= 0 => Ok(Self::Fd(fd)),
            _ => usage("expected none, stdio or fd=N"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = Usage;
    fn from_str(text: &str) -> Result<Self, Usage> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        if name.is_empty() || name.contains('=') {
            return usage("a device begins with its name");
        }
        let (mut class, mut id, mut reach, mut queues, mut queue_size) = (None, None, None, None, None);
        for part in parts {
            let Some((key, value)) = part.split_once('=') else { return usage(format!("{part:?} has no value")) };
            let twice = match key {
                "class" => class.replace(class_named(value)?).is_some(),
                "id" => id.replace(number(value, 1..=63)?).is_some(),
                "fd" => reach.replace(Reach::Fd(descriptor(value)?)).is_some(),
                "socket" => reach.replace(Reach::Socket(value.into())).is_some(),
                "queues" => queues.replace(number(value, 1..=MAX_QUEUES)?).is_some(),
                "queue-size" => queue_size.replace(ring_size(value)?).is_some(),
                _ => return usage(format!("a device has no {key:?}")),
            };
            if twice {
                return usage(format!("{key} is given twice"));
            }
        }
        let class = match (class, id) {
            (Some(class), None) => class,
            (None, Some(id)) => classes::numbered(id),
            (Some(class), Some(id)) if class.id == id => class,
            (Some(_), Some(_)) => return usage("class and id contradict each other"),
            (None, None) => return usage("a device needs class=CLASS or id=N"),
        };
        let Some(reach) = reach else { return usage("a device needs fd=N or socket=PATH") };
        let id = id.unwrap_or(class.id);
        Ok(Self { name: name.to_owned(), id, class, reach, queues, queue_size })
    }
}

fn class_named(name: &str) -> Result<&'static Class, Usage> {
    let known = || classes::CLASSES.iter().map(|c| c.name).collect::<Vec<_>>().join(", ");
    classes::named(name).map_or_else(|| usage(format!("there is no class {name:?}; known are {}", known())), Ok)
}

fn number(text: &str, range: std::ops::RangeInclusive<u16>) -> Result<u16, Usage> {
    match text.parse() {
        Ok(n) if range.contains(&n) => Ok(n),
        _ => usage(format!("{text:?} is not a number from {} to {}", range.start(), range.end())),
    }
}

fn ring_size(text: &str) -> Result<u16, Usage> {
    let size = number(text, 2..=MAX_QUEUE_SIZE)?;
    if size.is_power_of_two() { Ok(size) } else { usage("the size of a queue is a power of two") }
}

fn descriptor(text: &str) -> Result<RawFd, Usage> {
    match text.parse() {
        Ok(fd) if fd >= 0 => Ok(fd),
        _ => usage(format!("{text:?} is not a descriptor")),
    }
}

/// A machine that makes sense.
#[derive(Clone, Debug)]
pub struct Config {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Bytes of RAM, whole pages.
    pub memory: u64,
    /// Processors.
    pub cpus: u8,
    /// Devices in the order of their slots.
    pub devices: Vec<DeviceSpec>,
    /// COM1.
    pub serial: SerialSpec,
    /// Control socket.
    pub control_fd: Option<RawFd>,
    /// What a reset does.
    pub on_reboot: OnReboot,
}

impl TryFrom<&Args> for Config {
    type Error = Usage;
    fn try_from(args: &Args) -> Result<Self, Usage> {
        let args = args.clone();
        let mut descriptors = BTreeSet::new();
        // A descriptor has one owner; the first three are the standard streams.
        if let Some(fd) = args.inherited().into_iter().find(|fd| *fd < 3 || !descriptors.insert(*fd)) {
            return usage(format!("descriptor {fd} cannot be used here, or is used twice"));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&args.memory) || !args.memory.is_multiple_of(PAGE) {
            return usage("--memory has to be a whole number of pages from 16M to 1T");
        }
        if args.devices.len() > MAX_FUNCTIONS {
            return usage(format!("a machine has at most {MAX_FUNCTIONS} devices"));
        }
        let mut names = BTreeSet::new();
        if let Some(device) = args.devices.iter().find(|d| !names.insert(d.name.as_str())) {
            return usage(format!("two devices are called {}", device.name));
        }
        Ok(Self {
            kernel: args.kernel,
            initrd: args.initrd,
            cmdline: args.cmdline,
            memory: args.memory,
            cpus: args.cpus,
            devices: args.devices,
            serial: args.serial,
            control_fd: args.control_fd,
            on_reboot: args.on_reboot,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(text: &str) -> Result<DeviceSpec, String> {
        text.parse().map_err(|e: Usage| e.to_string())
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("3g"), Ok(3 << 30));
        for bad in ["", "M", "4096", "512B", "1X", "-1M", "99999999999T", "1.5G", "ß"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_is_a_name_a_kind_and_a_process() {
        let disk = device("disk0,class=blk,fd=5,queues=4,queue-size=512").unwrap();
        assert_eq!((disk.id, disk.queues, disk.queue_size, disk.reach), (2, Some(4), Some(512), Reach::Fd(5)));
        let other = device("x,id=40,socket=/run/x.sock").unwrap();
        assert_eq!((other.id, other.class.name), (40, ""));
        assert_eq!(device("x,id=26,fd=3").unwrap().class.name, "fs");
    }

    #[test]
    fn a_wrong_device_is_told_what_is_wrong() {
        for (text, part) in [
            ("", "name"),
            ("class=blk,fd=3", "name"),
            ("d,class=floppy,fd=3", "floppy"),
            ("d,fd=3", "class"),
            ("d,class=blk", "fd=N"),
            ("d,class=blk,fd=-1", "descriptor"),
            ("d,class=blk,fd=3,fd=4", "twice"),
            ("d,class=blk,id=3,fd=3", "contradict"),
            ("d,id=0,fd=3", "number"),
            ("d,class=blk,fd=3,queues=0", "number"),
            ("d,class=blk,fd=3,queue-size=3", "power"),
            ("d,class=blk,fd=3,colour=red", "colour"),
            ("d,class=blk,fd=3,queues", "value"),
        ] {
            let error = device(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let config = |extra: &[&str]| {
            let words = ["outboard-vmm", "--kernel", "k"].iter().chain(extra);
            Config::try_from(&Args::try_parse_from(words).map_err(|e| Usage(e.to_string()))?)
        };
        assert!(config(&[]).is_ok());
        assert!(config(&["--memory", "1M"]).is_err());
        assert!(config(&["--memory", "32770K"]).is_err());
        assert!(config(&["--device", "a,class=rng,fd=3", "--control-fd", "3"]).is_err());
        assert!(config(&["--serial", "fd=1"]).is_err());
        assert!(config(&["--cpus", "0"]).is_err());
        assert!(config(&["--cpus", "65"]).is_err());
        assert!(config(&["--device", "a,class=rng,fd=3", "--device", "a,class=rng,fd=4"]).is_err());
        let slots: Vec<String> = (0..32).map(|i| format!("--device=d{i},class=rng,socket=s{i}")).collect();
        assert!(config(&slots.iter().map(String::as_str).collect::<Vec<_>>()).is_err());
    }
}
