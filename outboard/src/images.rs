//! `outboard image`: disk images, as files.
//!
//! What stands in an image was written by a guest, or by whoever made it. So `info` and `check` open the file first, give up
//! everything else (paths, sockets, all system calls but a few), and only then read its first byte. `create` reads nothing but our
//! own JSON: where it needs to know the size of a qcow2 backing image, it asks another `outboard image info`.

use std::env;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use image::{Create, FileStorage, Format, Info, Report, Storage, check, create};
use sandbox::{Filter, Rule, When, allow, allow_if, enclose, lock_file};
use serde_json::{Value, json};

use crate::args::{Image, ImageCheck, ImageCommand, ImageCreate, ImageFormat, ImageInfo};
use crate::machine::size;
use crate::{notices, usage};

/// Exit status: clusters are counted and not used.
const LEAKED: u8 = 3;
/// Exit status: the image contradicts itself.
const CORRUPT: u8 = 4;

/// Memory that is neither executable nor made so.
const NOT_EXECUTABLE: &[When] = &[When::HasNone(2, libc::PROT_EXEC as u64)];

/// Reading a terminal's modes: both fit the 32 bits that the kernel looks at.
const TCGETS: u32 = 0x5401;
const TCGETS2: u32 = 0x802c_542a;

/// What may be called once an image's bytes are looked at.
const READING: &[Rule] = &[
    allow(libc::SYS_preadv2, "the image's bytes"),
    allow(libc::SYS_fstat, "the image's length; standard output"),
    allow(libc::SYS_lseek, "the length of a block device"),
    allow(libc::SYS_write, "the answer"),
    allow(libc::SYS_ppoll, "whether somebody reads standard error"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, TCGETS2)], "whether standard error is a terminal made raw"),
    allow_if(libc::SYS_ioctl, &[When::Is(1, TCGETS)], "the same, where the kernel does not know the newer call"),
    allow(libc::SYS_futex, "locks of the standard library"),
    allow(libc::SYS_brk, "the allocator's heap"),
    allow_if(libc::SYS_mmap, NOT_EXECUTABLE, "the allocator, for large tables"),
    allow(libc::SYS_mremap, "the allocator, for tables that grow"),
    allow(libc::SYS_munmap, "the allocator"),
    allow_if(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFD as u32)], "debug builds look whether what they close is open"),
    allow(libc::SYS_close, "the image, at the end"),
    allow(libc::SYS_sigaltstack, "the end of the first thread"),
    allow(libc::SYS_exit_group, "the end of the process"),
];

/// What may be called besides to repair it.
const REPAIRING: &[Rule] =
    &[allow(libc::SYS_pwritev2, "refcounts set right"), allow(libc::SYS_fdatasync, "the repair made durable")];

/// The command.
pub fn run(args: &Image) -> Result<u8> {
    match &args.command {
        ImageCommand::Create(args) => make(args),
        ImageCommand::Info(args) => info(args),
        ImageCommand::Check(args) => look(args),
    }
}

fn format(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

impl ImageFormat {
    /// As it is written everywhere.
    #[must_use]
    pub fn name(self) -> &'static str {
        format(self).name()
    }
}

fn open(path: &Path, writable: bool) -> Result<File> {
    File::options().read(true).write(writable).open(path).with_context(|| format!("Cannot open image {}", path.display()))
}

fn storage(file: File, path: &Path) -> Result<Arc<dyn Storage>> {
    let storage = FileStorage::new(file.into()).with_context(|| format!("Cannot use image {}", path.display()))?;
    Ok(Arc::new(storage))
}

/// From here on nothing is reached but what is open.
fn confine(repair: bool) -> Result<()> {
    let rules: &[&[Rule]] = if repair { &[READING, REPAIRING] } else { &[READING] };
    let filter = Filter::new(rules)?;
    enclose().context("Cannot confine the process before it reads the image")?;
    filter.install().context("Cannot confine the process before it reads the image")
}

fn info(args: &ImageInfo) -> Result<u8> {
    let storage = storage(open(&args.path, false)?, &args.path)?;
    confine(false)?;
    let path = args.path.display().to_string();
    let info = Info::read(format(args.format), &*storage).with_context(|| format!("Cannot read image {path}"))?;
    let text = if args.json { format!("{:#}\n", info_json(&info)) } else { info_text(&path, &info) };
    notices::answer(&text)?;
    Ok(0)
}

fn info_json(info: &Info) -> Value {
    json!({
        "format": info.format.name(),
        "size": info.size,
        "file-size": info.file_size,
        "version": (info.version != 0).then_some(info.version),
        "cluster-size": (info.cluster_size != 0).then_some(info.cluster_size),
        "refcount-bits": (info.refcount_bits != 0).then_some(info.refcount_bits),
        "subclusters": info.extended_l2,
        "compression": info.compression,
        "backing": info.backing,
        "backing-format": info.backing_format,
        "data-file": info.data_file,
        "snapshots": info.snapshots,
        "bitmaps": info.bitmaps,
        "dirty": info.dirty,
        "corrupt": info.corrupt,
        "in-use": info.in_use,
    })
}

/// Names in headers are other people's words: shown with what could move the cursor escaped.
fn info_text(path: &str, info: &Info) -> String {
    let mut lines = vec![("format", info.format.name().to_owned()), ("size", bytes(info.size)), ("file", bytes(info.file_size))];
    if info.format == Format::Qcow2 {
        let parts = if info.extended_l2 { ", in 32 parts each" } else { "" };
        lines.push(("version", info.version.to_string()));
        lines.push(("clusters", format!("{}{parts}", size::show(info.cluster_size))));
        lines.push(("refcounts", format!("{} bits", info.refcount_bits)));
        lines.push(("compression", info.compression.to_owned()));
        lines.push(("snapshots", info.snapshots.to_string()));
    }
    if let Some(name) = &info.backing {
        let format = info.backing_format.as_deref().unwrap_or("a format it does not say");
        lines.push(("backing", format!("{} ({})", name.escape_debug(), format.escape_debug())));
    }
    if let Some(name) = &info.data_file {
        lines.push(("data file", name.escape_debug().to_string()));
    }
    let states = [
        (info.dirty, "marked dirty: its refcounts may be wrong"),
        (info.corrupt, "marked corrupt"),
        (info.in_use, "in use, or not closed: whoever writes to it next checks it first"),
        (info.bitmaps, "has persistent bitmaps, so it is not written to"),
    ];
    lines.extend(states.into_iter().filter(|(set, _)| *set).map(|(_, says)| ("note", says.to_owned())));
    let text: String = lines.iter().map(|(name, value)| format!("  {name:<12}{value}\n")).collect();
    format!("{path}\n{text}")
}

fn bytes(count: u64) -> String {
    let short = size::show(count);
    if short == count.to_string() { format!("{count} bytes") } else { format!("{short} ({count} bytes)") }
}

fn look(args: &ImageCheck) -> Result<u8> {
    if args.format == ImageFormat::Raw {
        usage!("There is nothing to check in a raw image: every file is one");
    }
    let path = args.path.display().to_string();
    let file = open(&args.path, args.repair)?;
    lock_file(file.as_fd(), args.repair).with_context(|| format!("Cannot check image {path} while somebody else has it open"))?;
    let storage = storage(file, &args.path)?;
    confine(args.repair)?;
    let report = check(&storage, args.repair).with_context(|| format!("Cannot check image {path}"))?;
    let text = if args.json { format!("{:#}\n", report_json(&report)) } else { report_text(&path, &report) };
    notices::answer(&text)?;
    Ok(match (report.corruptions, report.leaks == report.repaired) {
        (0, true) => 0,
        (0, false) => LEAKED,
        _ => CORRUPT,
    })
}

fn report_json(report: &Report) -> Value {
    json!({
        "clusters": report.clusters,
        "allocated": report.allocated,
        "leaks": report.leaks,
        "repaired": report.repaired,
        "corruptions": report.corruptions,
        "errors": report.errors,
    })
}

fn report_text(path: &str, report: &Report) -> String {
    let mut text: String = report.errors.iter().map(|error| format!("{path}: {error}\n")).collect();
    let more = report.corruptions.saturating_sub(report.errors.len() as u64);
    if more > 0 {
        text.push_str(&format!("{path}: and {more} more\n"));
    }
    let errors = match report.corruptions {
        0 => "no errors".to_owned(),
        1 => "1 error".to_owned(),
        count => format!("{count} errors"),
    };
    let leaks = match (report.leaks, report.repaired) {
        (0, _) => "nothing leaked".to_owned(),
        (leaks, repaired) if leaks == repaired => format!("{leaks} wrong counts, all set right"),
        (leaks, _) => format!("{leaks} leaked clusters, which `--repair` gives back"),
    };
    let (allocated, clusters) = (report.allocated, report.clusters);
    text.push_str(&format!("{path}: {errors}, {leaks}; {allocated} clusters of the disk have data, the file has {clusters}\n"));
    text
}

fn make(args: &ImageCreate) -> Result<u8> {
    let (path, raw) = (args.path.display(), args.format == ImageFormat::Raw);
    let only_qcow2 = args.backing.is_some() || args.cluster_size.is_some() || args.subclusters;
    if raw && only_qcow2 {
        usage!("A raw image is nothing but its bytes: it has no backing image and no clusters");
    }
    let bytes = match (&args.size, &args.backing) {
        (Some(size), _) => size::parse(size)?,
        (None, Some(backing)) => backing_size(args, backing)?,
        (None, None) => usage!("An image needs a --size, such as 20G, or a --backing image to take it from"),
    };
    let cluster_size = args.cluster_size.as_deref().map(cluster_size).transpose()?;
    let backing = match (&args.backing, args.backing_format) {
        (Some(name), Some(below)) => {
            let name = name.to_str().ok_or_else(|| anyhow!("The backing image's name is not UTF-8"))?;
            Some((name.to_owned(), format(below).name().to_owned()))
        }
        _ => None,
    };
    let options = Create {
        size: bytes,
        version: args.qcow2_version,
        cluster_size: cluster_size.unwrap_or(Create::default().cluster_size),
        refcount_bits: args.refcount_bits,
        extended_l2: args.subclusters,
        backing,
        ..Create::default()
    };
    let filled = |file: &File| fill(raw, &FileStorage::new(file.try_clone()?.into())?, &options);
    new_file(&args.path, filled).with_context(|| format!("Cannot make image {path}"))?;
    let kind = format(args.format).name();
    notices::answer(&format!("{path}: an empty {kind} image of {}\n", self::bytes(bytes)))?;
    Ok(0)
}

/// A file where nothing is yet, with what `fill` puts into it. Nothing is left of one that cannot be filled.
pub fn new_file(path: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let filled = fill(&file);
    if filled.is_err() {
        // It is ours: nothing was there before.
        drop(fs::remove_file(path));
    }
    filled.map(|()| file)
}

fn fill(raw: bool, storage: &dyn Storage, options: &Create) -> Result<()> {
    if raw {
        if !options.size.is_multiple_of(512) {
            bail!("The size of a disk is a multiple of 512 bytes");
        }
        return Ok(storage.set_len(options.size)?);
    }
    Ok(create(storage, options)?)
}

fn cluster_size(text: &str) -> Result<u64> {
    text.parse::<u64>().ok().map_or_else(|| size::parse(text), Ok)
}

/// The size of the disk below, whose name is meant from the new image's folder.
fn backing_size(args: &ImageCreate, backing: &Path) -> Result<u64> {
    let path = args.path.parent().unwrap_or(Path::new("")).join(backing);
    if args.backing_format != Some(ImageFormat::Qcow2) {
        // Of a block device only its end says how long it is.
        let end = File::open(&path).and_then(|mut file| file.seek(SeekFrom::End(0)));
        return Ok(end.with_context(|| format!("Cannot look at the backing image {}", path.display()))?.next_multiple_of(512));
    }
    qcow2_size(&path)
}

/// The size of the disk in a qcow2 image, from a process of its own: whoever asks reads nothing of the image.
pub fn qcow2_size(path: &Path) -> Result<u64> {
    let own = env::current_exe().context("Cannot find out where outboard itself is")?;
    let asked = Command::new(own).args(["image", "info", "--json", "--format", "qcow2", "--"]).arg(path).output();
    let asked = asked.context("Cannot ask for the size of an image")?;
    if !asked.status.success() {
        let said = String::from_utf8_lossy(&asked.stderr);
        bail!("{}", said.trim().trim_start_matches("outboard: "));
    }
    let info: Value = serde_json::from_slice(&asked.stdout).context("Cannot understand what was said of an image")?;
    info["size"].as_u64().context("Cannot understand what was said of an image")
}
