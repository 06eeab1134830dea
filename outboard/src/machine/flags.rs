//! A machine without a file.

use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};

use super::disk::{self, Disk, Image, SCRATCH};
use super::nearest::nearest;
use super::share::Share;
use super::{Backend, Class, Console, Device, Machine, Restart, file, rng, size};
use crate::args::{Flags, ImageFormat};
use crate::usage;

/// The machine that the flags describe, with paths relative to `dir`.
pub fn machine(flags: &Flags, dir: &Path) -> Result<Machine> {
    let mut devices = Vec::new();
    for (index, text) in flags.disk.iter().enumerate() {
        devices.push(disk_device(text, index, dir)?);
    }
    for (index, text) in flags.share.iter().enumerate() {
        devices.push(share(text, index, dir, flags.cpus.unwrap_or(1))?);
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

fn disk_device(text: &str, index: usize, dir: &Path) -> Result<Device> {
    let mut path = None;
    let mut format = ImageFormat::Raw;
    let mut disk = Disk::default();
    for (key, value) in pairs(text) {
        match (key, value) {
            ("path", Some(value)) => path = Some(dir.join(value)),
            ("format", Some(word)) => format = image_format(word, text)?,
            ("backing", Some(value)) => {
                let Some((word, below)) = value.split_once(':') else {
                    usage!("--disk {text}: An image below another is written backing=FORMAT:PATH");
                };
                disk.images.push(Image { path: dir.join(below), format: image_format(word, text)? });
            }
            ("data-file", Some(value)) => disk.data_file = Some(dir.join(value)),
            ("ephemeral", value) => disk.ephemeral = Some(value.map_or_else(|| SCRATCH.into(), |path| dir.join(path))),
            ("cache", Some("page")) => disk.direct = false,
            ("cache", Some("direct")) => disk.direct = true,
            ("engine", Some(word @ ("auto" | "io-uring" | "threads"))) => disk.engine = Some(word.to_owned()),
            ("limit-ops", Some(value)) => disk.limits.operations = about("--disk", text, disk::operations(value))?,
            ("limit-bytes", Some(value)) => disk.limits.bytes = about("--disk", text, disk::bytes(value))?,
            ("limit-group", Some(value)) => disk.limit_group = Some(value.to_owned()),
            ("cache" | "engine", Some(value)) => usage!("--disk {text}: Unknown value `{value}`; see outboard run --help"),
            ("readonly", None) => disk.readonly = true,
            ("queues", Some(value)) => disk.queues = Some(number(value, "--disk", text)?),
            ("serial", Some(value)) => disk.serial = Some(value.to_owned()),
            _ => {
                return unknown("--disk", text, key, DISK_KEYS);
            }
        }
    }
    let Some(path) = path else {
        usage!("--disk {text}: A disk needs path=PATH");
    };
    disk.images.insert(0, Image { path, format });
    Ok(disk.device(format!("disk{index}")))
}

fn share(text: &str, index: usize, dir: &Path, cpus: u8) -> Result<Device> {
    let mut share = Share::default();
    let mut tag = format!("share{index}");
    for (key, value) in pairs(text) {
        match (key, value) {
            ("path", Some(value)) => share.path = dir.join(value),
            ("tag", Some(value)) => tag = value.to_owned(),
            ("readonly", None) => share.readonly = true,
            ("cache", Some(word @ ("never" | "metadata" | "auto" | "always"))) => share.cache = Some(word.to_owned()),
            ("owner", Some(value)) => share.owner = Some(value.to_owned()),
            ("writeback", None) => share.writeback = true,
            ("xattr", None) => share.xattr = true,
            ("xattrmap", Some(value)) => share.xattrmap = Some(value.to_owned()),
            ("posix-acl", None) => share.posix_acl = true,
            ("negative-timeout", Some(value)) => share.negative_timeout = Some(number(value, "--share", text)?.into()),
            ("limit-ops", Some(value)) => share.limits.operations = about("--share", text, disk::operations(value))?,
            ("limit-bytes", Some(value)) => share.limits.bytes = about("--share", text, disk::bytes(value))?,
            ("queues", Some(value)) => share.queues = Some(number(value, "--share", text)?),
            ("cache", Some(value)) => usage!("--share {text}: Unknown value `{value}`; see outboard run --help"),
            _ => {
                return unknown("--share", text, key, SHARE_KEYS);
            }
        }
    }
    if share.path.as_os_str().is_empty() {
        usage!("--share {text}: A share needs path=PATH");
    }
    Ok(share.device(tag, cpus))
}

const SHARE_KEYS: &[&str] = &[
    "path",
    "tag",
    "readonly",
    "cache",
    "owner",
    "writeback",
    "xattr",
    "xattrmap",
    "posix-acl",
    "negative-timeout",
    "limit-ops",
    "limit-bytes",
    "queues",
];

const DISK_KEYS: &[&str] = &[
    "path",
    "format",
    "backing",
    "data-file",
    "ephemeral",
    "cache",
    "engine",
    "limit-ops",
    "limit-bytes",
    "limit-group",
    "readonly",
    "queues",
    "serial",
];

fn image_format(word: &str, text: &str) -> Result<ImageFormat> {
    match word {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        _ => usage!("--disk {text}: The format `{word}` is not known; known are `raw` and `qcow2`"),
    }
}

/// A mistake in one of a disk's values.
fn about<T>(flag: &str, text: &str, read: Result<T>) -> Result<T> {
    read.map_err(|error| crate::error::Usage(format!("{flag} {text}: {error}")).into())
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
    use crate::machine::{Program, Stdio};

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
    fn a_disk_in_flags_with_everything() {
        let text = "path=t,format=qcow2,backing=qcow2:m,backing=raw:/b,ephemeral=s,cache=direct,engine=threads,\
                    limit-ops=9:20,limit-bytes=1M,limit-group=g";
        let device = disk_device(text, 0, Path::new("/w")).unwrap();
        let Backend::Process(Program { args, disk: Some(disk), .. }) = device.backend else { panic!("a disk is a process") };
        assert_eq!(args, ["--direct", "--engine", "threads"]);
        assert_eq!(disk.files().collect::<Vec<_>>(), [Path::new("/w/t"), Path::new("/w/m"), Path::new("/b")]);
        assert_eq!((disk.ephemeral.as_deref(), disk.limit_group.as_deref()), (Some(Path::new("/w/s")), Some("g")));
        assert_eq!((disk.limits.operations.argument(), disk.limits.bytes.argument()), ("9:20".into(), "1048576".into()));
        let Backend::Process(Program { disk: Some(disk), .. }) =
            disk_device("path=t,format=qcow2,data-file=d,ephemeral,cache=page", 0, Path::new("/w")).unwrap().backend
        else {
            panic!("a disk is a process")
        };
        assert_eq!((disk.data_file.as_deref(), disk.ephemeral.as_deref()), (Some(Path::new("/w/d")), Some(Path::new(SCRATCH))));
    }

    #[test]
    fn a_share_in_flags_with_everything() {
        let text = "path=d,tag=t,readonly,cache=never,owner=me=5,writeback,xattr,xattrmap=:map::user.:,posix-acl,negative-timeout=3,limit-ops=9:20,\
                    limit-bytes=1M,queues=2";
        let device = share(text, 0, Path::new("/w"), 4).unwrap();
        let Backend::Process(Program { args, share: Some(shared), .. }) = device.backend else { panic!("a share is a process") };
        assert_eq!((device.name.as_str(), device.queues, shared.path.as_path()), ("t", Some(3), Path::new("/w/d")));
        assert!(["--readonly", "--writeback", "--xattr", "--posix-acl"].into_iter().all(|word| args.contains(&word.into())));
        let words = |word: &str| args.iter().skip_while(|one| *one != word).nth(1).cloned();
        let values = ["--owner-map", "--cache", "--negative-timeout", "--limit-ops", "--limit-bytes", "--xattrmap"];
        assert_eq!(values.map(|word| words(word).unwrap()), ["me=5", "never", "3", "9:20", "1048576", ":map::user.:"]);
        let error = |text: &str| share(text, 0, Path::new("/"), 1).unwrap_err().to_string();
        assert_eq!(error("readonly"), "--share readonly: A share needs path=PATH");
        assert_eq!(error("path=x,cache=some"), "--share path=x,cache=some: Unknown value `some`; see outboard run --help");
        assert_eq!(error("pth=x"), "--share pth=x: Unknown key `pth`; did you mean `path`?");
    }

    #[test]
    fn slips_in_flags() {
        let error = |text: &str| disk_device(text, 0, Path::new("/")).unwrap_err().to_string();
        assert_eq!(error("pth=x"), "--disk pth=x: Unknown key `pth`; did you mean `path`?");
        assert_eq!(error("path=x,backing=y"), "--disk path=x,backing=y: An image below another is written backing=FORMAT:PATH");
        assert_eq!(
            error("path=x,format=vmdk"),
            "--disk path=x,format=vmdk: The format `vmdk` is not known; known are `raw` and `qcow2`"
        );
        assert_eq!(error("path=x,engine=y"), "--disk path=x,engine=y: Unknown value `y`; see outboard run --help");
        assert_eq!(error("path=x,limit-ops=y"), "--disk path=x,limit-ops=y: `y` is not a number of requests");
        assert_eq!(error("readonly"), "--disk readonly: A disk needs path=PATH");
        assert_eq!(error("path=x,queues=two"), "--disk path=x,queues=two: `two` is not a number");
        assert_eq!(
            error("path=x,readonly=1"),
            "--disk path=x,readonly=1: `readonly` is written otherwise; see outboard run --help"
        );
    }
}
