//! The machine file: TOML, every key known, every error one sentence that names the file and the line.
//!
//! `values` holds the text against the [schema](super::schema) and collects all that is wrong; only a file without a mistake
//! becomes a machine.

mod values;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result};

use self::values::Values;
use super::disk::{Disk, Image, Limits, Rate, SCRATCH};
use super::share::Share;
use super::{Backend, Class, Console, Device, Machine, Restart, Serial, rng, size};
use crate::args::{ImageFormat, OnReboot};
use crate::error::Usage;

/// The period of a limited source of random numbers, in milliseconds.
const DEFAULT_PERIOD: u32 = 1000;

/// Something wrong in a machine file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where; 0 where there is no line for it.
    pub line: usize,
    /// What, as a sentence.
    pub says: String,
}

impl Problem {
    /// With the place in front.
    #[must_use]
    pub fn sentence(&self, file: &str) -> String {
        match self.line {
            0 => format!("{file}: {}", self.says),
            line => format!("{file}:{line}: {}", self.says),
        }
    }
}

/// A file that was read.
#[derive(Debug)]
pub struct Read {
    /// The machine.
    pub machine: Machine,
    /// The lines of what else can be wrong with it: keys of `[machine]`, and devices by name.
    pub lines: BTreeMap<String, usize>,
}

/// Reads a machine file.
pub fn read(path: &Path) -> Result<Machine> {
    let (text, dir) = open(path)?;
    parse(&text, &path.display().to_string(), &dir)
}

/// The text of a machine file, and the folder to which its paths are relative.
pub fn open(path: &Path) -> Result<(String, PathBuf)> {
    let text = fs::read_to_string(path).with_context(|| format!("Cannot read the machine file {}", path.display()))?;
    let place = absolute(path).with_context(|| format!("Cannot find {}", path.display()))?;
    Ok((text, place.parent().unwrap_or(Path::new("/")).to_path_buf()))
}

/// Reads the text of a machine file that is called `name` and lies in `dir`. The first thing that is wrong is the error.
pub fn parse(text: &str, name: &str, dir: &Path) -> Result<Machine> {
    look(text, name, dir).map(|read| read.machine).map_err(|problems| {
        let first = problems.first().map_or_else(String::new, |problem| problem.sentence(name));
        let more = match problems.len() {
            0 | 1 => String::new(),
            count => format!(" ({} more: outboard check {name})", count - 1),
        };
        Usage(format!("{first}{more}")).into()
    })
}

/// The same with all that is wrong, in the order of the file.
pub fn look(text: &str, name: &str, dir: &Path) -> Result<Read, Vec<Problem>> {
    let tables = values::read(text)?;
    let mut lines = BTreeMap::new();
    let mut devices: Vec<Device> = Vec::new();
    let mut own = None;
    let cpus = tables.iter().find(|table| table.kind == "machine").and_then(|table| table.number("cpus"));
    let cpus = cpus.and_then(|cpus| u8::try_from(cpus).ok()).unwrap_or(1);
    // The guest finds the devices in the order of the file.
    for table in &tables {
        let device = match table.kind {
            "disk" => disk(table, dir),
            "share" => share(table, dir, cpus),
            "rng" => rng_device(table),
            "console" => console(table, dir),
            "device" => foreign(table, dir),
            _ => {
                own = Some(table);
                continue;
            }
        };
        lines.insert(table.name.clone(), table.line);
        devices.push(device);
    }
    // `values::read` has found the table and its kernel.
    let table = own.ok_or_else(Vec::new)?;
    lines.extend(table.lines());
    let default_name = Path::new(name).file_stem().map_or_else(|| "machine".into(), |stem| stem.to_string_lossy().into_owned());
    let machine = Machine {
        name: table.text("name").unwrap_or(default_name),
        cpus,
        memory: table.text("memory").and_then(|text| size::parse(&text).ok()).unwrap_or(512 << 20),
        kernel: dir.join(table.text("kernel").unwrap_or_default()),
        initrd: table.text("initrd").map(|path| dir.join(path)),
        cmdline: table.text("cmdline").unwrap_or_default(),
        serial: serial(table.text("serial").as_deref(), dir),
        on_reboot: if table.is("on-reboot", "exit") { OnReboot::Exit } else { OnReboot::Restart },
        restart: if table.is("restart", "never") { Restart::Never } else { Restart::Always },
        sandbox_floor: table.text("sandbox-floor"),
        devices,
    };
    Ok(Read { machine, lines })
}

/// Where the serial port leads, in words.
#[must_use]
pub fn serial(text: Option<&str>, dir: &Path) -> Serial {
    match text {
        None | Some("none") => Serial::None,
        Some("stdio") => Serial::Stdio,
        Some(path) => Serial::File(dir.join(path)),
    }
}

fn path(table: &Values, key: &str, dir: &Path) -> PathBuf {
    dir.join(table.text(key).unwrap_or_default())
}

fn queues(table: &Values) -> Option<u16> {
    table.number("queues").and_then(|queues| u16::try_from(queues).ok())
}

fn disk(table: &Values, dir: &Path) -> Device {
    let top = Image { path: path(table, "path", dir), format: image_format(&table.text("format").unwrap_or_default()) };
    let below = table.chain("backing").into_iter();
    let below = below.map(|(path, format)| Image { path: dir.join(path), format: image_format(&format) });
    let scratch = || table.text("ephemeral-dir").map_or_else(|| SCRATCH.into(), |path| dir.join(path));
    Disk {
        images: [top].into_iter().chain(below).collect(),
        data_file: table.text("data-file").map(|path| dir.join(path)),
        ephemeral: table.yes("ephemeral").then(scratch),
        readonly: table.yes("readonly"),
        direct: table.is("cache", "direct"),
        engine: table.text("engine"),
        limits: limits(table),
        limit_group: table.text("limit-group"),
        queues: queues(table),
        serial: table.text("serial"),
    }
    .device(table.name.clone())
}

fn share(table: &Values, dir: &Path, cpus: u8) -> Device {
    Share {
        path: path(table, "path", dir),
        readonly: table.yes("readonly"),
        cache: table.text("cache"),
        owner: table.text("owner"),
        writeback: table.yes("writeback"),
        xattr: table.yes("xattr"),
        xattrmap: table.text("xattrmap"),
        posix_acl: table.yes("posix-acl"),
        negative_timeout: table.number("negative-timeout"),
        limits: limits(table),
        queues: queues(table),
    }
    .device(table.name.clone(), cpus)
}

fn limits(table: &Values) -> Limits {
    let count = |key: &str| table.number(key).map_or(0, u64::from);
    let bytes = |key: &str| table.text(key).and_then(|text| size::parse(&text).ok()).unwrap_or(0);
    Limits {
        operations: Rate { per_second: count("limit-ops"), burst: count("limit-ops-burst") },
        bytes: Rate { per_second: bytes("limit-bytes"), burst: bytes("limit-bytes-burst") },
    }
}

/// As the schema lets it be written.
fn image_format(word: &str) -> ImageFormat {
    if word == "qcow2" { ImageFormat::Qcow2 } else { ImageFormat::Raw }
}

fn rng_device(table: &Values) -> Device {
    let limit = table.number("max-bytes").map(|bytes| (bytes, table.number("period").unwrap_or(DEFAULT_PERIOD)));
    rng(table.name.clone(), limit)
}

fn console(table: &Values, dir: &Path) -> Device {
    let console = match table.text("output").as_deref() {
        Some("pty") => Console::Pty,
        Some("attach") => Console::Attach,
        Some("file") => Console::File(path(table, "path", dir)),
        Some("socket") => Console::Socket(path(table, "path", dir)),
        _ => Console::Terminal,
    };
    console.device(table.name.clone())
}

fn foreign(table: &Values, dir: &Path) -> Device {
    let id = table.number("id").map(Class::Id);
    let class = table.text("class").map(Class::Named).or(id).unwrap_or(Class::Id(0));
    let backend = Backend::Socket(path(table, "socket", dir));
    Device { name: table.name.clone(), class, queues: queues(table), backend }
}

#[cfg(test)]
mod tests;
