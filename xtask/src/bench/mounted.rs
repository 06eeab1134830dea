//! File servers driven in turns through a mount of this host (`outboard-probe fs mount`): what programs notice of a share.
//!
//! This host's kernel takes the place of a guest's. It keeps what it knows for as long as it is told to, and what it kept is gone with
//! the mount; so "cold" is a new mount. The files lie in this host's page cache on both sides.

mod calls;
mod files;
mod inodes;
mod tree;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::geteuid;

use super::process::Running;
use super::share::{self, ONE_THREAD, POOL, Who};
use super::table::{Row, Spread};
use super::{Bench, Part};
use crate::virtiofsd;

/// A server, and how many request queues it is asked on.
type Side = (Who, u32);

/// Ours and both ways of upstream's, each with one queue.
const SIDES: [Side; 3] = [(Who::Ours, 1), (Who::OneThread, 1), (Who::Pool, 1)];

/// What a guest believes without asking again, at most, by `--cache auto`: a second. After this it asks.
const FORGOTTEN: Duration = Duration::from_millis(1100);

/// The group.
pub(crate) fn parts() -> Vec<Part> {
    let part = |what: &'static str, measure: fn(&Bench) -> Result<Vec<Row>>| {
        Part::new(what, move |bench: &Bench| match impossible() {
            Some(why) => Ok(vec![Row::new(what, "", "none").note(format!("not measured: {why}"))]),
            None => measure(bench),
        })
    };
    vec![
        part("stat beside a stream", files::stalls),
        part("small files", files::rates),
        part("system calls for small files", files::calls),
        part("memory of an idle server", inodes::idle),
        part("memory of a million inodes", inodes::many),
        part("a tree like a kernel's, unpacked and removed", tree::unpacked),
        part("git status of such a tree", tree::git_status),
    ]
}

/// Why nothing can be mounted here.
fn impossible() -> Option<&'static str> {
    if !geteuid().is_root() {
        return Some("only root may mount for all users");
    }
    (!Path::new("/dev/fuse").exists()).then_some("this host has no /dev/fuse")
}

/// A share that is mounted. Nothing of it is left when it is dropped.
struct Mounted {
    folder: PathBuf,
    /// Ended one after the other.
    _bridge: Running,
    server: Running,
}

impl Mounted {
    /// Serves a folder, and mounts it beside.
    fn new(bench: &Bench, (who, queues): Side, shared: &Path) -> Result<Self> {
        let folder = bench.dir.join("mount");
        fs::create_dir_all(&folder).context("Cannot make a place for a mount")?;
        let socket = bench.socket();
        let mut command = share::command(bench, &virtiofsd::prepare()?, (who, queues), shared, &socket);
        command.args(["--cache", "auto"]);
        let server = Running::listening(command, &socket)?;
        // Upstream's socket is there a moment before it listens.
        std::thread::sleep(Duration::from_millis(100));
        let mut probe = Command::new(bench.program("outboard-probe"));
        probe.args(["fs", "mount", "--queues", &queues.to_string(), "--queue-size", "1024"]).arg(&socket).arg(&folder);
        let before = device_of(&folder);
        let mut mounted = Self { _bridge: Running::start(probe)?, server, folder: folder.clone() };
        mounted._bridge.wait_until("mounts", || device_of(&folder) != before)?;
        // The first who asks waits until both sides have settled how they talk.
        fs::read_dir(&folder).with_context(|| format!("The share of {who:?} cannot be read"))?;
        Ok(mounted)
    }

    /// The process that has the queues: the other one waits for it.
    fn serving(&self) -> Result<u32> {
        self.server.tree().last().copied().context("The server is gone")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _not_mounted_then = unmount(&self.folder, UnmountFlags::DETACH);
    }
}

/// Without asking the file system itself.
fn device_of(folder: &Path) -> Option<u64> {
    fs::symlink_metadata(folder).ok().map(|it| it.dev())
}

/// What was measured of each side: in each round, each column.
type Columns = Vec<(Who, Vec<Vec<f64>>)>;

/// Measures all sides in turns. A column is one number of what `measure` gives.
fn turns(bench: &Bench, rounds: u32, sides: &[Side], mut measure: impl FnMut(Side) -> Result<Vec<f64>>) -> Result<Columns> {
    let mut measured: Columns = sides.iter().map(|(who, _)| (*who, Vec::new())).collect();
    for _ in bench.turns(rounds) {
        for (side, (who, into)) in sides.iter().zip(&mut measured) {
            into.push(measure(*side).with_context(|| format!("{who:?} was not measured"))?);
        }
    }
    Ok(measured)
}

/// Ours beside that way of upstream's which is better; what the other one did is noted.
fn row(what: &str, unit: &'static str, measured: &Columns, column: usize, more_is_better: bool) -> Row {
    let values = |wanted: Who| -> Vec<f64> {
        let rounds = measured.iter().find(|(who, _)| *who == wanted).map(|(_, rounds)| rounds);
        rounds.into_iter().flatten().filter_map(|round| round.get(column).copied()).collect()
    };
    let [one, pool] = [Who::OneThread, Who::Pool].map(values);
    let median = |values: &[f64]| Spread::of(values.to_vec()).map(|spread| spread.median);
    let pooled = match (median(&one), median(&pool)) {
        (Some(one), Some(pool)) => (pool > one) == more_is_better,
        (one, _) => one.is_none(),
    };
    let (peer, theirs, name, other) =
        if pooled { (POOL, pool, "one thread", one) } else { (ONE_THREAD, one, "its pool of 4", pool) };
    let row = Row::new(what, unit, peer).of(values(Who::Ours), theirs);
    match median(&other) {
        Some(other) => row.note(format!("upstream's {name}: {other:.2}")),
        None => row,
    }
}

/// One more thing to know of a row.
fn also(row: Row, text: &str) -> Row {
    let note = row.note.as_ref().map_or_else(|| text.to_owned(), |note| format!("{text}; {note}"));
    row.note(note)
}
