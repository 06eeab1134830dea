//! Small files, and asking for a name while a lot of data is on its way.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{AtFlags, Dir, Gid, Mode, OFlags, Uid, openat, statat};
use rustix::io::{Errno, read, write};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::calls::Traced;
use super::{FORGOTTEN, Mounted, SIDES, Side, also, row, turns};
use crate::bench::Bench;
use crate::bench::share::Who;
use crate::bench::table::{Row, Target};
use crate::host;

/// Files of a round.
const FILES: u32 = 2000;
/// The user who makes files: nobody.
const NOBODY: u32 = 65534;

/// How long names are asked for, and until when the disk must have had all of a stream once.
const ASKING: Duration = Duration::from_secs(3);
const ASKING_LIMIT: Duration = Duration::from_secs(15);
/// A stream.
const STREAM: usize = 250;
const MEGABYTE: usize = 1_000_000;

/// How long `stat` takes meanwhile.
pub(super) fn stalls(bench: &Bench) -> Result<Vec<Row>> {
    let shared = folder(bench, "stream")?;
    let mut rows = Vec::new();
    let upstream = turns(bench, 3, &SIDES[1..], |side| stall(bench, side, &shared))?;
    for queues in [1, 2] {
        bench.begin();
        let mut measured = turns(bench, 3, &[(Who::Ours, queues)], |side| stall(bench, side, &shared))?;
        measured.extend(upstream.iter().cloned());
        let name = format!("stat beside a stream, {queues} queue{}", if queues == 1 { "" } else { "s" });
        rows.push(row(&format!("{name}, p50"), "ms", &measured, 0, false));
        rows.push(row(&format!("{name}, p99"), "ms", &measured, 1, false).target(Target::Median(1.0)));
        let longest = row(&format!("{name}, longest"), "ms", &measured, 2, false);
        rows.push(also(longest, "who waits long asks less: many a short answer hides one of these"));
    }
    Ok(rows)
}

fn stall(bench: &Bench, side: Side, shared: &Path) -> Result<Vec<f64>> {
    let mounted = Mounted::new(bench, side, shared)?;
    let (stop, streams) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut times = thread::scope(|scope| {
        let stream = scope.spawn(|| stream(&mounted.folder.join("stream"), &stop, &streams));
        // Until the server has its hands full.
        thread::sleep(Duration::from_millis(200));
        let times = ask(&mounted.folder, &streams);
        stop.store(true, Ordering::Relaxed);
        stream.join().map_err(|_| anyhow!("The stream ended"))??;
        times
    })?;
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    Ok(vec![at(50), at(99), times.last().copied().unwrap_or_default()])
}

/// Writes a lot and sees to it that the disk has it, over and over.
fn stream(path: &Path, stop: &AtomicBool, streams: &AtomicU32) -> Result<()> {
    let piece = vec![0x5a; MEGABYTE];
    while !stop.load(Ordering::Relaxed) {
        let mut file = File::create(path).context("Cannot make a file in the share")?;
        for _ in (0..STREAM).take_while(|_| !stop.load(Ordering::Relaxed)) {
            file.write_all(&piece).context("Cannot write to the share")?;
        }
        file.sync_all().context("Cannot have the share's file on disk")?;
        streams.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// How long each of many looks for a name took that is not there: nobody remembers the answer. In milliseconds.
fn ask(folder: &Path, streams: &AtomicU32) -> Result<Vec<f64>> {
    let dir = open_dir(folder)?;
    let (mut times, began) = (Vec::new(), Instant::now());
    while began.elapsed() < ASKING || streams.load(Ordering::Relaxed) == 0 && began.elapsed() < ASKING_LIMIT {
        let one = Instant::now();
        match statat(&dir, "missing", AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => times.push(one.elapsed().as_secs_f64() * 1e3),
            other => bail!("A name that is not there is answered with {other:?}"),
        }
    }
    Ok(times)
}

/// How many small files a second.
pub(super) fn rates(bench: &Bench) -> Result<Vec<Row>> {
    let shared = small_files(bench)?;
    let measured = turns(bench, 3, &SIDES, |side| {
        let reads = {
            let mounted = Mounted::new(bench, side, &shared)?;
            let dir = listed(&mounted.folder)?;
            timed(|| read_all(&dir))?
        };
        let mounted = Mounted::new(bench, side, &shared)?;
        let seconds = as_nobody(|| timed(|| make_all(&open_dir(&mounted.folder)?)));
        remove_made(&shared)?;
        Ok([reads, seconds?].map(|seconds| f64::from(FILES) / seconds / 1e3).to_vec())
    })?;
    Ok(vec![
        row("cold read of a file of 1 KiB", "1000/s", &measured, 0, true),
        row("file of 1 byte made by user 65534", "1000/s", &measured, 1, true),
    ])
}

/// How many system calls the server makes for each.
pub(super) fn calls(bench: &Bench) -> Result<Vec<Row>> {
    if !host::is_there("strace") {
        return Ok(vec![Row::new("system calls for small files", "calls", "none").note("not measured: there is no strace")]);
    }
    let shared = small_files(bench)?;
    let output = bench.dir.join("calls");
    let measured = turns(bench, 1, &SIDES, |side| {
        let mounted = Mounted::new(bench, side, &shared)?;
        let dir = listed(&mounted.folder)?;
        let traced = Traced::start(mounted.serving()?, &output)?;
        read_all(&dir)?;
        let reads = traced.end()?;
        let traced = Traced::start(mounted.serving()?, &output)?;
        let made = as_nobody(|| make_all(&dir));
        let creates = traced.end()?;
        remove_made(&shared)?;
        made.map(|()| [reads.work, reads.all, creates.work, creates.all].map(|calls| calls / f64::from(FILES)).to_vec())
    })?;
    let row = |what, column| row(what, "calls", &measured, column, false);
    let how = format!("strace -f -c of the serving process, without {}", super::calls::WAITING.join(", "));
    let counted = |row: Row| also(row, &how).target(Target::Median(14.0));
    Ok(vec![
        counted(row("cold read, server's calls but waiting", 0)),
        row("cold read, all of the server's calls", 1),
        counted(row("file made, server's calls but waiting", 2)),
        row("file made, all of the server's calls", 3),
    ])
}

fn folder(bench: &Bench, name: &str) -> Result<PathBuf> {
    let folder = bench.dir.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    Ok(folder)
}

/// A folder with small files, in which everybody may make more.
fn small_files(bench: &Bench) -> Result<PathBuf> {
    let shared = folder(bench, "small")?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).context("Cannot let others write")?;
    for number in 0..FILES {
        fs::write(shared.join(format!("file{number}")), [0x5a; 1024]).context("Cannot make files to read")?;
    }
    Ok(shared)
}

fn remove_made(shared: &Path) -> Result<()> {
    (0..FILES).try_for_each(|number| fs::remove_file(shared.join(format!("new{number}")))).context("Cannot remove files")
}

fn open_dir(folder: &Path) -> Result<OwnedFd> {
    Ok(rustix::fs::open(folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A directory that was listed, so long ago that nothing of what was heard then is believed any more.
fn listed(folder: &Path) -> Result<OwnedFd> {
    let dir = open_dir(folder)?;
    let entries = Dir::read_from(&dir)?.count();
    if entries < FILES as usize {
        bail!("The share has {entries} names");
    }
    thread::sleep(FORGOTTEN);
    Ok(dir)
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    work().map(|()| began.elapsed().as_secs_f64())
}

fn read_all(dir: &OwnedFd) -> Result<()> {
    let mut buffer = [0; 4096];
    for number in 0..FILES {
        let file = openat(dir, format!("file{number}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        while read(&file, &mut buffer)? > 0 {}
    }
    Ok(())
}

fn make_all(dir: &OwnedFd) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    for number in 0..FILES {
        let file = openat(dir, format!("new{number}"), flags, Mode::from_raw_mode(0o644))?;
        write(&file, b"x")?;
    }
    Ok(())
}

/// Does something in a thread that is an ordinary user's.
fn as_nobody<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let become_nobody = || -> Result<T> {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        set_thread_groups(&[])?;
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(user, user, user)?;
        work()
    };
    thread::scope(|scope| scope.spawn(become_nobody).join()).map_err(|_| anyhow!("A thread ended"))?
}
