//! A machine with a working KVM, on a host that has none: `cargo xtask nested -- CMD`.
//!
//! Theory of operation: QEMU emulates AMD's SVM in software, so in a machine emulated with `-cpu EPYC,+svm,+npt` the stock
//! module `kvm_amd` gives a genuine `/dev/kvm` with nested paging, irqfd and ioeventfd: slow, but the same interface and the
//! same kernel code as on hardware. The machine is hermetic. It sees no file of the host, only two disks:
//!
//! - the *tools disk*, made once ([`tools`]): Debian's userland, qemu-storage-daemon, the guest images under `/guest`. It is
//!   read-only and lies under a layer in memory;
//! - the *run disk*, made for each run from a directory: the programs of this tree and the command, mounted on `/outboard`.
//!
//! The first run boots the machine up to the point where it waits for a command and saves its memory; later runs start
//! from there, in a second or two ([`machine`]). Both disks keep their size and the tools disk its content, so the kernel
//! in the snapshot never sees them change. Output, errors and the exit status come back on three virtio-serial ports; an
//! interactive command gets the user's terminal through a virtio console instead.

mod machine;
pub(crate) mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::debian::Packages;
use crate::guest::image;
use crate::{build, cache, guest, host, say};

/// The exit status that says the machine failed, not the command.
const HARNESS_FAILED: u8 = 125;

/// Run a command in an emulated machine that has a working KVM.
///
/// The programs of this tree are in PATH, the guest images in $OUTBOARD_GUEST. Output and exit status are the command's;
/// 124 means it ran too long, 125 that the machine itself failed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run the command as an ordinary user (uid 1000) instead of root
    #[arg(long)]
    user: bool,
    /// Connect this terminal to the command
    #[arg(long)]
    tty: bool,
    /// Kill the command after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Take along a file or directory; it appears in /outboard/files
    #[arg(long, value_name = "PATH")]
    file: Vec<PathBuf>,
    /// Take along release builds of the programs
    #[arg(long)]
    release: bool,
    /// Take along no programs of this tree, and build none
    #[arg(long)]
    no_build: bool,
    /// Boot the machine instead of starting from its snapshot
    #[arg(long)]
    no_snapshot: bool,
    /// Show the machine's own console on stderr
    #[arg(long, short)]
    verbose: bool,
    /// The command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// One command for the machine.
#[derive(Debug)]
pub(crate) struct Job {
    /// The script that bash runs in the machine.
    pub(crate) script: String,
    /// Host files for the run disk, each with its place there.
    pub(crate) files: Vec<(PathBuf, String)>,
    /// As uid 1000 instead of root.
    pub(crate) user: bool,
    /// With the caller's terminal.
    pub(crate) tty: bool,
    pub(crate) limit: Duration,
    pub(crate) verbose: bool,
    pub(crate) snapshot: bool,
}

impl Job {
    /// A job that takes along the programs in `dir`.
    pub(crate) fn new(script: String, dir: Option<&Path>) -> Result<Self> {
        let mut files = Vec::new();
        for program in dir.map(build::programs_in).transpose()?.unwrap_or_default() {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.push((program, format!("bin/{name}")));
        }
        Ok(Self { script, files, user: false, tty: false, limit: Duration::from_secs(600), verbose: false, snapshot: true })
    }

    /// Runs it to its end and returns its exit status.
    pub(crate) fn run(&self) -> Result<u8> {
        prepare()?;
        let dir = fresh_dir(&cache::dir()?)?;
        let result = self.run_in(&dir);
        cache::remove_tree(&dir)?;
        result
    }

    fn run_in(&self, dir: &Path) -> Result<u8> {
        let content = dir.join("content");
        for (from, to) in &self.files {
            let to = content.join(to);
            fs::create_dir_all(to.parent().unwrap_or(&content))?;
            image::copy_tree(from, &to)?;
        }
        fs::create_dir_all(&content)?;
        fs::write(content.join("command"), &self.script).context("Cannot write the command")?;
        machine::run(self, dir, &content)
    }
}

/// Makes everything the machine consists of, or finds it made.
pub(crate) fn prepare() -> Result<()> {
    let images = guest::prepare()?;
    tools::prepare(&images)?;
    Ok(())
}

/// QEMU alone, for tests that use it as somebody else's frontend.
pub(crate) fn qemu() -> Result<PathBuf> {
    tools::qemu(&Packages::default())
}

/// Is there nothing to do any more?
pub(crate) fn is_ready() -> Result<bool> {
    Ok(guest::is_ready()? && tools::is_ready()?)
}

/// The task.
pub(crate) fn run(args: &Args) -> ExitCode {
    match job(args).and_then(|job| job.run()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say::failure(&error);
            ExitCode::from(HARNESS_FAILED)
        }
    }
}

fn job(args: &Args) -> Result<Job> {
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let programs = if args.no_build { None } else { Some(build::programs(args.release)?) };
    let words: Vec<String> = args.command.iter().map(|word| quote(word)).collect();
    let mut job = Job::new(format!("exec {}\n", words.join(" ")), programs.as_deref())?;
    for path in &args.file {
        let Some(name) = path.file_name() else {
            bail!("Cannot take along {}: it has no name", path.display());
        };
        job.files.push((path.clone(), format!("files/{}", name.to_string_lossy())));
    }
    job.user = args.user;
    job.tty = args.tty;
    job.limit = Duration::from_secs(args.timeout);
    job.verbose = args.verbose;
    job.snapshot = !args.no_snapshot;
    Ok(job)
}

/// A word as the shell reads it back.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A fresh directory, beside the images so that copies can share their blocks.
pub(crate) fn fresh_dir(parent: &Path) -> Result<PathBuf> {
    sweep(parent)?;
    let nanoseconds = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    let dir = parent.join(format!("run-{}-{nanoseconds}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("Cannot create {}", dir.display()))?;
    Ok(dir)
}

/// Removes what tasks that were interrupted have left.
fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).with_context(|| format!("Cannot read {}", parent.display()))? {
        let path = entry?.path();
        let owner = path.file_name().and_then(|name| name.to_str()?.strip_prefix("run-")?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            cache::remove_tree(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_quotes() {
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
