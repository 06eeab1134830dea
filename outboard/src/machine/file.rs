//! The machine file: TOML, every key known, every error one sentence that names the file and the line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result};
use serde::Deserialize;
use toml::Spanned;

use super::nearest::nearest;
use super::{Backend, Class, Console, Device, Disk, Machine, Restart, Serial, rng, size};
use crate::args::OnReboot;
use crate::error::Usage;
use crate::usage;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    machine: MachineTable,
    #[serde(default)]
    disk: Named<DiskTable>,
    #[serde(default)]
    rng: Named<RngTable>,
    #[serde(default)]
    console: Named<ConsoleTable>,
    #[serde(default)]
    device: Named<DeviceTable>,
}

/// The period of a limited source of random numbers, in milliseconds.
const DEFAULT_PERIOD: u32 = 1000;

/// Tables by name, each knowing where it stands: the guest finds the devices in the order of the file.
type Named<T> = BTreeMap<String, Spanned<T>>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MachineTable {
    name: Option<String>,
    cpus: Option<u8>,
    memory: Option<String>,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    #[serde(default)]
    cmdline: String,
    serial: Option<String>,
    #[serde(default)]
    on_reboot: OnReboot,
    #[serde(default)]
    restart: Restart,
    sandbox_floor: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DiskTable {
    path: PathBuf,
    #[serde(default)]
    format: Format,
    #[serde(default)]
    readonly: bool,
    queues: Option<u16>,
    serial: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Format {
    #[default]
    Raw,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RngTable {
    max_bytes: Option<u32>,
    period: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConsoleTable {
    #[serde(default)]
    output: Output,
    path: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Output {
    #[default]
    Terminal,
    Pty,
    File,
    Socket,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DeviceTable {
    class: Option<String>,
    id: Option<u32>,
    queues: Option<u16>,
    socket: PathBuf,
}

/// Reads a machine file.
pub fn read(path: &Path) -> Result<Machine> {
    let text = fs::read_to_string(path).with_context(|| format!("Cannot read the machine file {}", path.display()))?;
    let place = absolute(path).with_context(|| format!("Cannot find {}", path.display()))?;
    let dir = place.parent().unwrap_or(Path::new("/"));
    parse(&text, &path.display().to_string(), dir)
}

/// Reads the text of a machine file that is called `name` and lies in `dir`.
pub fn parse(text: &str, name: &str, dir: &Path) -> Result<Machine> {
    let file: File = toml::from_str(text).map_err(|error| Usage(explain(&error, text, name)))?;
    let devices = devices(&file, dir).map_err(|(at, error)| {
        let line = line_of(text, at);
        Usage(format!("{name}:{line}: {error}"))
    })?;
    let table = file.machine;
    let default_name = Path::new(name).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    Ok(Machine {
        name: table.name.or(default_name).unwrap_or_else(|| "machine".to_owned()),
        cpus: table.cpus.unwrap_or(1),
        memory: size::parse(table.memory.as_deref().unwrap_or("512M")).map_err(|error| {
            let line = text.find("memory").map_or(1, |at| line_of(text, at));
            Usage(format!("{name}:{line}: {error}"))
        })?,
        kernel: dir.join(table.kernel),
        initrd: table.initrd.map(|path| dir.join(path)),
        cmdline: table.cmdline,
        serial: serial(table.serial.as_deref(), dir),
        on_reboot: table.on_reboot,
        restart: table.restart,
        sandbox_floor: table.sandbox_floor,
        devices,
    })
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

/// All devices, in the order of the file. An error comes with its place.
fn devices(file: &File, dir: &Path) -> Result<Vec<Device>, (usize, anyhow::Error)> {
    let mut found: Vec<(usize, Device)> = Vec::new();
    for (name, table) in &file.disk {
        found.push((table.span().start, disk(name, table.get_ref(), dir)));
    }
    for (name, table) in &file.rng {
        let at = table.span().start;
        found.push((at, rng_device(name, table.get_ref()).map_err(|error| (at, error))?));
    }
    for (name, table) in &file.console {
        let at = table.span().start;
        found.push((at, console(name, table.get_ref(), dir).map_err(|error| (at, error))?));
    }
    for (name, table) in &file.device {
        let at = table.span().start;
        found.push((at, foreign(name, table.get_ref(), dir).map_err(|error| (at, error))?));
    }
    found.sort_by_key(|(at, _)| *at);
    Ok(found.into_iter().map(|(_, device)| device).collect())
}

fn disk(name: &str, table: &DiskTable, dir: &Path) -> Device {
    let Format::Raw = table.format;
    let disk = Disk { path: dir.join(&table.path), readonly: table.readonly, queues: table.queues, serial: table.serial.clone() };
    disk.device(name.to_owned())
}

fn rng_device(name: &str, table: &RngTable) -> Result<Device> {
    let limit = match (table.max_bytes, table.period) {
        (None, None) => None,
        (Some(0), _) | (_, Some(0)) => usage!("[rng.{name}] has a limit of nothing: both numbers start at 1"),
        (Some(bytes), period) => Some((bytes, period.unwrap_or(DEFAULT_PERIOD))),
        (None, Some(_)) => usage!("[rng.{name}] has a `period` and no `max-bytes` to go with it"),
    };
    Ok(rng(name.to_owned(), limit))
}

fn console(name: &str, table: &ConsoleTable, dir: &Path) -> Result<Device> {
    let console = match (table.output, &table.path) {
        (Output::Terminal, None) => Console::Terminal,
        (Output::Pty, None) => Console::Pty,
        (Output::File, Some(path)) => Console::File(dir.join(path)),
        (Output::Socket, Some(path)) => Console::Socket(dir.join(path)),
        (Output::File | Output::Socket, None) => usage!("[console.{name}] needs a `path`"),
        (Output::Terminal | Output::Pty, Some(_)) => {
            usage!("[console.{name}] has a `path`, but its output is no file and no socket")
        }
    };
    Ok(console.device(name.to_owned()))
}

fn foreign(name: &str, table: &DeviceTable, dir: &Path) -> Result<Device> {
    let class = match (&table.class, table.id) {
        (Some(class), None) => Class::Named(class.clone()),
        (None, Some(id)) => Class::Id(id),
        _ => usage!("[device.{name}] needs either a `class` or an `id`"),
    };
    if matches!(class, Class::Id(_)) && table.queues.is_none() {
        usage!("[device.{name}] has an `id` and no `class`, so it needs its number of `queues`");
    }
    let backend = Backend::Socket(dir.join(&table.socket));
    Ok(Device { name: name.to_owned(), class, queues: table.queues, backend })
}

/// One sentence about what is wrong, and where.
fn explain(error: &toml::de::Error, text: &str, name: &str) -> String {
    let at = error.span().map_or(0, |span| span.start);
    let line = line_of(text, at);
    let message = error.message();
    if let Some((key, known)) = unknown(message) {
        let near = nearest(&key, &known)
            .map_or_else(|| format!("known are {}", listed(&known)), |known| format!("did you mean `{known}`?"));
        let is_table = text.lines().nth(line - 1).is_some_and(|line| line.trim_start().starts_with('['));
        let (what, place) = match () {
            () if is_table => ("table", String::new()),
            () if message.starts_with("unknown variant") => ("value", section(text, line)),
            () => ("key", section(text, line)),
        };
        return format!("{name}:{line}: Unknown {what} `{key}`{place}; {near}");
    }
    if message == "missing field `machine`" {
        return format!("{name}: The machine file needs a table [machine]");
    }
    if let Some(key) = message.strip_prefix("missing field ") {
        let table = section(text, line);
        let table = table.strip_prefix(" in ").unwrap_or("The machine file");
        return format!("{name}:{line}: {table} needs {key}");
    }
    let first = message.lines().next().unwrap_or(message);
    format!("{name}:{line}: {}{}", capital(first), section(text, line))
}

/// The unknown key of serde's "unknown field `x`, expected one of `a`, `b`", and the known ones.
fn unknown(message: &str) -> Option<(String, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field ").or_else(|| message.strip_prefix("unknown variant "))?;
    let mut quoted = rest.split('`').skip(1).step_by(2);
    let key = quoted.next()?.to_owned();
    Some((key, quoted.collect()))
}

/// " in [disk.root]": the table that a line belongs to.
fn section(text: &str, line: usize) -> String {
    let lines = text.lines().take(line).map(str::trim);
    let heading = lines.filter(|line| line.starts_with('[')).last();
    let name = heading.and_then(|heading| Some(heading.trim_start_matches('[').split(']').next()?.trim().to_owned()));
    name.map_or_else(String::new, |name| format!(" in [{name}]"))
}

fn listed(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests;
