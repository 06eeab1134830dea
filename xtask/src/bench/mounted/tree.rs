//! A tree like a kernel's: unpacked, removed, and asked about by git.
//!
//! It is made here, the same each time: as many directories and files as a part of Linux' tree has, most of them a few KiB and some large.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, open, syncfs};

use super::{FORGOTTEN, Mounted, SIDES, also, row, turns};
use crate::bench::table::{Row, Spread};
use crate::bench::{Bench, process};
use crate::{cache, host};

/// Together fewer than 20,000, a usual limit of descriptors: upstream's has one for each inode that its guest knows.
const FOLDERS: usize = 1300;
const FILES: usize = 16_000;
/// Of a file, on average; the logarithm is distributed normally, with this deviation.
const MEAN: f64 = 14.0 * 1024.0;
const DEVIATION: f64 = 1.2;
/// Of a file, and of all together.
const LARGEST: usize = 512 * 1024;
const ALL: usize = 300 << 20;

/// What has not unpacked, removed or looked at the tree by then does not.
const LIMIT: Duration = Duration::from_secs(120);

const NAME: &str = "tree";

/// `tar xf` and `rm -rf`.
pub(super) fn unpacked(bench: &Bench) -> Result<Vec<Row>> {
    let archive = archive(bench)?;
    let shared = bench.dir.join("unpacked");
    fs::create_dir_all(&shared).context("Cannot make a directory to share")?;
    let here = unpack_and_remove(&archive, &shared, &shared)?;
    let measured = turns(bench, 2, &SIDES, |side| {
        let mounted = Mounted::new(bench, side, &shared)?;
        unpack_and_remove(&archive, &mounted.folder, &shared)
    })?;
    let rows = ["tar xf of a tree like a kernel's", "rm -rf of it"].into_iter().zip(here).enumerate();
    Ok(rows.map(|(column, (what, here))| beside(row(what, "s", &measured, column, false), here)).collect())
}

/// `git status` that finds nothing.
pub(super) fn git_status(bench: &Bench) -> Result<Vec<Row>> {
    if !host::is_there("git") {
        return Ok(vec![Row::new("git status", "s", "none").note("not measured: there is no git")]);
    }
    let shared = made(bench)?;
    for words in [&["init", "-q"][..], &["add", "."], &["commit", "-q", "-m", "all"]] {
        process::told_within(git(&shared).args(words), LIMIT)?;
    }
    let here = statuses(&shared)?;
    let measured = turns(bench, 2, &SIDES, |side| {
        let mounted = Mounted::new(bench, side, &shared)?;
        Ok(vec![statuses(&mounted.folder)?])
    })?;
    Ok(vec![beside(row("git status of a tree like a kernel's", "s", &measured, 0, false), here)])
}

fn beside(row: Row, here: f64) -> Row {
    also(row, &format!("without a server: {here:.2}"))
}

/// Seconds of both.
fn unpack_and_remove(archive: &Path, folder: &Path, shared: &Path) -> Result<Vec<f64>> {
    // What others left to be written is not this one's.
    syncfs(open(shared, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)?;
    let unpack = seconds(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(folder))?;
    let remove = seconds(Command::new("rm").arg("-rf").arg(folder.join(NAME)))?;
    if shared.join(NAME).exists() {
        bail!("The tree is still there");
    }
    Ok(vec![unpack, remove])
}

/// The median of a few, each after so long that what was heard for the one before is not believed any more.
fn statuses(folder: &Path) -> Result<f64> {
    let mut times = Vec::new();
    for warm in [false, true, true, true] {
        thread::sleep(FORGOTTEN);
        let began = Instant::now();
        let said = process::told_within(git(folder).args(["status", "--porcelain"]), LIMIT)?;
        if let Some(line) = String::from_utf8_lossy(&said).lines().next() {
            bail!("git takes what nobody changed for changed: {line}");
        }
        times.extend(warm.then(|| began.elapsed().as_secs_f64()));
    }
    Spread::of(times).map(|spread| spread.median).context("git status was not measured")
}

fn seconds(command: &mut Command) -> Result<f64> {
    let began = Instant::now();
    process::told_within(command, LIMIT)?;
    Ok(began.elapsed().as_secs_f64())
}

/// git as it comes, whatever its user has set.
fn git(folder: &Path) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(folder).args(["-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "core.compression=0"]);
    git.args(["-c", "gc.auto=0"]).envs([("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_NOSYSTEM", "1")]);
    git
}

fn archive(bench: &Bench) -> Result<PathBuf> {
    let archive = bench.dir.join("tree.tar");
    made(bench)?;
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "-cf"]).arg(&archive).arg("-C").arg(&bench.dir).arg(NAME);
    process::told_within(&mut tar, LIMIT)?;
    Ok(archive)
}

/// The tree on this host, unless it is there.
fn made(bench: &Bench) -> Result<PathBuf> {
    let top = bench.dir.join(NAME);
    if top.exists() {
        return Ok(top);
    }
    if let Err(error) = make(&top) {
        cache::remove_tree(&top)?;
        return Err(error);
    }
    Ok(top)
}

fn make(top: &Path) -> Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let text = text(&mut random);
    for number in 0..FOLDERS {
        fs::create_dir_all(folder(top, number)).context("Cannot make the tree")?;
    }
    let mut left = ALL;
    for number in 0..FILES {
        let size = random.size().min(left);
        left -= size;
        let from = random.below(text.len() - size);
        let path = folder(top, random.below(FOLDERS)).join(format!("file-{number}.c"));
        fs::write(path, &text[from..from + size]).context("Cannot make the tree")?;
    }
    Ok(())
}

/// Eight in each, and so on downwards.
fn folder(top: &Path, number: usize) -> PathBuf {
    if number == 0 { top.to_path_buf() } else { folder(top, (number - 1) / 8).join(format!("part{number}")) }
}

/// Words in lines, longer than the largest file.
fn text(random: &mut Random) -> Vec<u8> {
    const WORDS: [&str; 8] = ["static ", "int ", "return ", "struct ", "if (", ");\n", "{\n\t", "}\n"];
    let mut text = Vec::new();
    while text.len() < 2 * LARGEST {
        let number = random.below(1000);
        text.extend(WORDS[number % WORDS.len()].as_bytes());
        text.extend(format!("name{number} ").as_bytes());
    }
    text
}

/// The same each time (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap_or(0)
    }

    /// Of a file.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "what is too much is cut off anyway")]
    fn size(&mut self) -> usize {
        let size = (MEAN.ln() - DEVIATION * DEVIATION / 2.0 + DEVIATION * self.normal()).exp();
        (size as usize).clamp(1, LARGEST)
    }

    /// Distributed normally, more or less: the sum of twelve.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.below(1 << 20) as f64 / f64::from(1 << 20)).sum::<f64>() - 6.0
    }
}
