//! What can be known to fail is said before anything is started.

use std::collections::HashSet;
use std::fs::{File, metadata};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::disk::{self, Disk};
use super::schema::MOST_CPUS;
use super::share;
use super::{Backend, Machine, Stdio, size};
use crate::usage;

/// What a Linux kernel needs beside its own image and its initrd to reach its first process.
const LEAST_MEMORY: u64 = 32 << 20;
/// The name becomes a directory, part of a socket's path (108 bytes in all), and a word in a table.
const LONGEST_NAME: usize = 40;

/// Checks what a machine names. The error is the first thing that is wrong.
pub fn machine(machine: &Machine) -> Result<()> {
    all(machine).into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
}

/// All that is wrong, each with the key of `[machine]` or the name of the device it is about.
pub fn all(machine: &Machine) -> Vec<(String, anyhow::Error)> {
    let mut wrong = Vec::new();
    let mut note = |about: &str, result: Result<()>| wrong.extend(result.err().map(|error| (about.to_owned(), error)));
    note("name", name(&machine.name, "machine"));
    note("cpus", cpus(machine.cpus));
    note("sandbox-floor", floor(machine.sandbox_floor.as_deref()));
    let size_of = |path: &Path, what| readable(path).with_context(|| about(what, path));
    let kernel = size_of(&machine.kernel, "kernel");
    let initrd = machine.initrd.as_ref().map_or(Ok(0), |path| size_of(path, "initrd"));
    let files = kernel.as_ref().unwrap_or(&0) + initrd.as_ref().unwrap_or(&0);
    note("kernel", kernel.map(drop));
    note("initrd", initrd.map(drop));
    note("memory", memory(machine.memory, files));
    let mut names = HashSet::new();
    let (mut terminals, mut attached) = (0, 0);
    for device in &machine.devices {
        note(&device.name, name(&device.name, "device"));
        note(&device.name, unique(&device.name, &mut names));
        let backend = match &device.backend {
            Backend::Process(program) => {
                let disk = program.disk.as_ref().map_or(Ok(()), |disk| images(disk, &device.name));
                disk.and_then(|()| program.share.as_ref().map_or(Ok(()), |share| share::check(share, &device.name)))
            }
            Backend::Socket(path) => socket(path, &device.name),
        };
        note(&device.name, backend);
        let Backend::Process(program) = &device.backend else { continue };
        terminals += u32::from(program.stdio == Stdio::Terminal);
        attached += u32::from(program.stdio == Stdio::Attach);
        match program.stdio {
            Stdio::Terminal => note(&device.name, one(terminals, "have the terminal")),
            Stdio::Attach => note(&device.name, one(attached, "be attached to")),
            _ => {}
        }
    }
    let disks = machine.devices.iter().filter_map(|device| Some((device.name.as_str(), device.disk()?)));
    wrong.extend(disk::check_groups(disks).err());
    wrong
}

fn cpus(cpus: u8) -> Result<()> {
    if cpus == 0 || u32::from(cpus) > MOST_CPUS {
        usage!("A machine cannot have {cpus} processors: the number must be between 1 and {MOST_CPUS}");
    }
    Ok(())
}

fn floor(floor: Option<&str>) -> Result<()> {
    if let Some(floor) = floor
        && let Err(problem) = floor.parse::<sandbox::Floor>()
    {
        usage!("Cannot lower the sandbox's floor to `{floor}`: {problem}");
    }
    Ok(())
}

fn unique<'a>(name: &'a str, names: &mut HashSet<&'a str>) -> Result<()> {
    if !names.insert(name) {
        usage!("Two devices are called `{name}`: each needs a name of its own");
    }
    Ok(())
}

fn one(count: u32, what: &str) -> Result<()> {
    if count > 1 {
        usage!("Only one console can {what}");
    }
    Ok(())
}

fn memory(bytes: u64, files: u64) -> Result<()> {
    if !bytes.is_multiple_of(1 << 20) {
        usage!("Memory of {} is not a whole number of MiB", size::show(bytes));
    }
    let least = (LEAST_MEMORY + files).next_multiple_of(1 << 20);
    if bytes < least {
        usage!("Memory of {} is too little: this kernel and its initrd need at least {}", size::show(bytes), size::show(least));
    }
    Ok(())
}

/// A machine's or device's name.
pub fn name(name: &str, what: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > LONGEST_NAME || name.starts_with('.') || !name.chars().all(good) {
        usage!(
            "`{name}` cannot be the name of a {what}: letters, digits, `-`, `_` and `.` are allowed, \
             {LONGEST_NAME} at most, no `.` in front"
        );
    }
    Ok(())
}

/// A regular file we may read; its size.
fn readable(path: &Path) -> Result<u64> {
    let kind = File::open(path)?.metadata()?;
    if !kind.is_file() {
        bail!("not a regular file");
    }
    Ok(kind.len())
}

fn about(what: &str, path: &Path) -> String {
    format!("Cannot open the {what} {}", path.display())
}

fn images(disk: &Disk, device: &str) -> Result<()> {
    disk.check(device)?;
    for path in disk.files() {
        File::open(path).with_context(|| format!("Cannot open the image {} of the disk `{device}`", path.display()))?;
    }
    if let Some(dir) = &disk.ephemeral
        && !metadata(dir).is_ok_and(|found| found.is_dir())
    {
        bail!("Cannot put what is written to the ephemeral disk `{device}` into {}: it is not a directory", dir.display());
    }
    Ok(())
}

fn socket(path: &Path, device: &str) -> Result<()> {
    let about = || format!("Cannot connect the device `{device}` to {}", path.display());
    if !metadata(path).with_context(about)?.file_type().is_socket() {
        bail!("{}: not a socket", about());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_memory_is_refused_with_the_number_that_would_do() {
        let error = memory(16 << 20, 3 << 20).unwrap_err().to_string();
        assert_eq!(error, "Memory of 16M is too little: this kernel and its initrd need at least 35M");
        assert!(memory(35 << 20, 3 << 20).is_ok());
        let error = memory((64 << 20) + 1, 0).unwrap_err().to_string();
        assert_eq!(error, "Memory of 67108865 is not a whole number of MiB");
    }

    #[test]
    fn names_become_directories() {
        for good in ["web", "web-1.test", "A_b"] {
            assert!(name(good, "machine").is_ok());
        }
        for bad in ["", ".hidden", "a/b", "..", "a b", &"x".repeat(41)] {
            assert!(name(bad, "machine").is_err(), "{bad}");
        }
    }
}
