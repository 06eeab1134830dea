//! A machine without a file.

use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};

use super::nearest::nearest;
use super::{Backend, Class, Console, Device, Disk, Machine, Restart, file, rng, size};
use crate::args::Flags;
use crate::usage;

/// The machine that the flags describe, with paths relative to `dir`.
pub fn machine(flags: &Flags, dir: &Path) -> Result<Machine> {
    let mut devices = Vec::new();
    for (index, text) in flags.disk.iter().enumerate() {
        devices.push(disk(text, index, dir)?);
    }
    if flags.rng {
        devices.push(rng("rng0".to_owned(), None));
    }
    for (index, text) in flags.console.iter().enumerate() {
        devices.push(console(text, index, dir)?);
    }
    for text in &flags.device {
        devices.push(foreign(text, dir)?);
    }
    let Some(kernel) = &flags.kernel else {
        usage!("A machine needs a kernel: give --kernel or a machine file");
    };
    Ok(Machine {
        name: flags.name.clone().unwrap_or_else(|| format!("machine-{}", process::id())),
        cpus: flags.cpus.unwrap_or(1),
        memory: size::parse(flags.memory.as_deref().unwrap_or("512M"))?,
        kernel: dir.join(kernel),
        initrd: flags.initrd.as_ref().map(|path| dir.join(path)),
        cmdline: flags.cmdline.clone().unwrap_or_default(),
        serial: file::serial(flags.serial.as_deref(), dir),
        on_reboot: flags.on_reboot.unwrap_or_default(),
        restart: Restart::Always,
        sandbox_floor: flags.sandbox_floor.clone(),
        devices,
    })
}

fn disk(text: &str, index: usize, dir: &Path) -> Result<Device> {
    let mut path = None;
    let mut disk = Disk { path: PathBuf::new(), readonly: false, queues: None, serial: None };
    for (key, value) in pairs(text) {
        match (key, value) {
            ("path", Some(value)) => path = Some(dir.join(value)),
            ("format", Some("raw")) => {}
            ("format", Some(other)) => {
                usage!("--disk {text}: The format `{other}` is not known; known is `raw`")
            }
            ("readonly", None) => disk.readonly = true,
            ("queues", Some(value)) => disk.queues = Some(number(value, "--disk", text)?),
            ("serial", Some(value)) => disk.serial = Some(value.to_owned()),
            _ => {
                return unknown("--disk", text, key, &["path", "format", "readonly", "queues", "serial"]);
            }
        }
    }
    let Some(path) = path else {
        usage!("--disk {text}: A disk needs path=PATH");
    };
    disk.path = path;
    Ok(disk.device(format!("disk{index}")))
}

fn console(text: &str, index: usize, dir: &Path) -> Result<Device> {
    let console = match text.split_once('=') {
        None if text == "terminal" => Console::Terminal,
        None if text == "pty" => Console::Pty,
        None if text == "attach" => Console::Attach,
        Some(("file", path)) => Console::File(dir.join(path)),
        Some(("socket", path)) => Console::Socket(dir.join(path)),
        _ => usage!("--console {text}: Expected terminal, attach, pty, file=PATH or socket=PATH"),
    };
    Ok(console.device(format!("console{index}")))
}

fn foreign(text: &str, dir: &Path) -> Result<Device> {
    let (name, rest) = text.split_once(',').unwrap_or((text, ""));
    let (mut class, mut id, mut queues, mut socket) = (None, None, None, None);
    for (key, value) in pairs(rest) {
        match (key, value) {
            ("class", Some(value)) => class = Some(Class::Named(value.to_owned())),
            ("id", Some(value)) => {
                id = Some(Class::Id(u32::from(number(value, "--device", text)?)));
            }
            ("queues", Some(value)) => queues = Some(number(value, "--device", text)?),
            ("socket", Some(value)) => socket = Some(dir.join(value)),
            _ => return unknown("--device", text, key, &["class", "id", "queues", "socket"]),
        }
    }
    let (Some(class), Some(socket)) = (class.or(id), socket) else {
        usage!("--device {text}: A device needs class=CLASS or id=VIRTIO-ID, and socket=PATH");
    };
    if matches!(class, Class::Id(_)) && queues.is_none() {
        usage!("--device {text}: A device without a class needs queues=N");
    }
    Ok(Device { name: name.to_owned(), class, queues, backend: Backend::Socket(socket) })
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let words = text.split(',').filter(|word| !word.is_empty());
    words.map(|word| word.split_once('=').map_or((word, None), |(key, value)| (key, Some(value))))
}

fn number(value: &str, flag: &str, text: &str) -> Result<u16> {
    let context = || crate::error::Usage(format!("{flag} {text}: `{value}` is not a number"));
    value.parse().map_err(|_| context().into())
}

fn unknown<T>(flag: &str, text: &str, key: &str, known: &[&str]) -> Result<T> {
    match nearest(key, known) {
        Some(near) if near == key => {
            usage!("{flag} {text}: `{key}` is written otherwise; see outboard run --help")
        }
        Some(near) => usage!("{flag} {text}: Unknown key `{key}`; did you mean `{near}`?"),
        None => usage!("{flag} {text}: Unknown key `{key}`; known are {}", known.join(", ")),
    }
}

/// The working directory, to which paths in flags are relative.
pub fn here() -> Result<PathBuf> {
    std::env::current_dir().context("Cannot find the working directory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Stdio;

    #[test]
    fn a_machine_in_flags() {
        let flags = Flags {
            kernel: Some("k".into()),
            disk: vec!["path=a.img,format=raw,readonly,queues=2".into()],
            rng: true,
            console: vec!["file=log".into(), "attach".into()],
            device: vec!["share,class=fs,socket=/s".into()],
            ..Flags::default()
        };
        let machine = machine(&flags, Path::new("/w")).unwrap();
        assert_eq!(machine.kernel, Path::new("/w/k"));
        let names: Vec<&str> = machine.devices.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["disk0", "rng0", "console0", "console1", "share"]);
        assert_eq!(machine.devices[0].queues, Some(2));
        let Backend::Process(program) = &machine.devices[3].backend else { panic!("a console is a process") };
        assert_eq!(program.stdio, Stdio::Attach);
    }

    #[test]
    fn slips_in_flags() {
        let error = |text: &str| disk(text, 0, Path::new("/")).unwrap_err().to_string();
        assert_eq!(error("pth=x"), "--disk pth=x: Unknown key `pth`; did you mean `path`?");
        assert_eq!(error("readonly"), "--disk readonly: A disk needs path=PATH");
        assert_eq!(error("path=x,queues=two"), "--disk path=x,queues=two: `two` is not a number");
        assert_eq!(
            error("path=x,readonly=1"),
            "--disk path=x,readonly=1: `readonly` is written otherwise; see outboard run --help"
        );
    }
}
