//! What a server keeps of the files that its guest knows.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::{Mounted, SIDES, row, turns};
use crate::bench::Bench;
use crate::bench::share::{ONE_THREAD, Who};
use crate::bench::table::{Row, Target};
use crate::cache;

/// Each with so many files. More than there may be descriptors: a server that lists a directory opens it.
const FOLDERS: u32 = 5000;
const FILES: u32 = 200;

/// Descriptors that ours keeps for inodes, at most.
const KEPT: usize = 4096;

const KIB: f64 = 1024.0;

/// What of a process is in memory, in bytes, without its guest's memory.
#[derive(Clone, Copy, Debug)]
struct Resident {
    own: f64,
    files: f64,
}

impl Resident {
    fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("Cannot read a process's status")?;
        let field = |name: &str| {
            let rest = status.lines().find_map(|line| line.strip_prefix(name)).context("A process has no memory")?;
            rest.split_whitespace().next().and_then(|number| number.parse::<f64>().ok()).context("A number is none")
        };
        Ok(Self { own: field("RssAnon:")? * KIB, files: field("RssFile:")? * KIB })
    }

    fn bytes(self) -> f64 {
        self.own + self.files
    }
}

/// While nothing is asked yet.
pub(super) fn idle(bench: &Bench) -> Result<Vec<Row>> {
    let shared = bench.dir.join("idle");
    fs::create_dir_all(&shared).context("Cannot make a directory to share")?;
    let mut parts = Vec::new();
    let measured = turns(bench, 3, &SIDES, |side| {
        let mounted = Mounted::new(bench, side, &shared)?;
        let serving = Resident::of(mounted.serving()?)?;
        let waiting = Resident::of(mounted.server.id())?;
        parts.push((side.0, serving, waiting));
        let all: f64 = mounted.server.tree().into_iter().map(|pid| Resident::of(pid).map(Resident::bytes)).sum::<Result<_>>()?;
        let mebibytes = |bytes: f64| bytes / KIB / KIB;
        Ok(vec![mebibytes(serving.bytes()), mebibytes(all)])
    })?;
    let text = |wanted: Who| {
        parts.iter().rfind(|(who, ..)| *who == wanted).map_or_else(String::new, |(_, serving, waiting)| {
            let kib = |bytes: f64| format!("{:.0}", bytes / KIB);
            let [own, files, other] = [serving.own, serving.files, waiting.bytes()].map(kib);
            format!("{own} KiB its own, {files} of files, and {other} of the process that waits for it")
        })
    };
    let note = format!("ours: {}; upstream's one thread: {}", text(Who::Ours), text(Who::OneThread));
    Ok(vec![
        row("idle server, mounted: resident", "MiB", &measured, 0, false).target(Target::Median(2.5)).note(note),
        row("all of its processes", "MiB", &measured, 1, false),
    ])
}

/// With all inodes of a big tree known to the guest.
pub(super) fn many(bench: &Bench) -> Result<Vec<Row>> {
    let shared = bench.dir.join("many");
    in_halves(|half| make(&shared, half))?;
    let ours = walk(bench, Who::Ours, &shared).context("Ours")?;
    let theirs = walk(bench, Who::OneThread, &shared).context("Upstream's")?;
    in_halves(|half| of_half(half).try_for_each(|number| cache::remove_tree(&shared.join(number.to_string()))))?;
    if let Some(error) = ours.stopped {
        return Err(error.context(format!("Ours stopped after {} inodes", ours.inodes)));
    }
    let end = theirs.stopped.map_or_else(String::new, |error| format!(", where it stopped: {error:#}"));
    let listed =
        format!("{} inodes in {:.0} s; upstream's {} in {:.0} s{end}", ours.inodes, ours.seconds, theirs.inodes, theirs.seconds);
    let row = |what, unit, [ours, theirs]: [f64; 2], most| {
        Row::new(what, unit, ONE_THREAD).of(vec![ours], vec![theirs]).target(Target::Median(most))
    };
    let open = [ours.descriptors, theirs.descriptors].map(|count| count as f64);
    Ok(vec![
        row("memory of a known inode", "bytes", [ours.per_inode, theirs.per_inode], 160.0).note(listed),
        row("descriptors meanwhile", "", open, (KEPT + ours.descriptors_before) as f64),
    ])
}

struct Walked {
    inodes: usize,
    stopped: Option<anyhow::Error>,
    seconds: f64,
    per_inode: f64,
    descriptors_before: usize,
    descriptors: usize,
}

fn walk(bench: &Bench, who: Who, shared: &Path) -> Result<Walked> {
    let mounted = Mounted::new(bench, (who, 1), shared)?;
    let serving = mounted.serving()?;
    let (before, descriptors_before) = (Resident::of(serving)?, descriptors(serving)?);
    let (mut inodes, began) = (0, Instant::now());
    let stopped = list(&mounted.folder, &mut inodes).err();
    let seconds = began.elapsed().as_secs_f64();
    let per_inode = (Resident::of(serving)?.bytes() - before.bytes()) / inodes.max(1) as f64;
    Ok(Walked { inodes, stopped, seconds, per_inode, descriptors_before, descriptors: descriptors(serving)? })
}

/// Lists a tree with all attributes, and counts.
fn list(folder: &Path, inodes: &mut usize) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let is_dir = entry.metadata()?.is_dir();
        *inodes += 1;
        if is_dir {
            list(&entry.path(), inodes)?;
        }
    }
    Ok(())
}

fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).context("Cannot count descriptors")?.count())
}

fn of_half(half: u32) -> impl Iterator<Item = u32> {
    (0..FOLDERS).filter(move |number| number % 2 == half)
}

fn make(shared: &Path, half: u32) -> Result<()> {
    for number in of_half(half) {
        let folder = shared.join(number.to_string());
        fs::create_dir_all(&folder).context("Cannot make directories")?;
        for file in 0..FILES {
            File::create(folder.join(format!("file-{file}.c"))).context("Cannot make files")?;
        }
    }
    Ok(())
}

/// Two threads: a file system lets several make files in different directories.
fn in_halves(work: impl Fn(u32) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let other = scope.spawn(|| work(1));
        let one = work(0);
        other.join().map_err(|_| anyhow!("A thread ended"))?.and(one)
    })
}
