//! The runtime directory of a machine: its name, its lock, its control socket.
//!
//! Theory of operation: `BASE/NAME` is a directory of mode 0700 that holds its sockets and what is kept of its log
//! and events. Who has the directory open and locked
//! (`flock`) owns the machine's name; the kernel releases the lock however its owner ends. A directory nobody has locked is
//! stale, and whoever meets it first may remove it: a new machine of that name, the janitor, or `ps`. Removal happens under
//! the lock, so that it never hits a machine that is just starting.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, mem, thread};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::machine::check;

/// The name of the control socket in the directory.
pub const CONTROL: &str = "control";
/// The name of the socket on which metrics are served.
pub const METRICS: &str = "metrics";
/// All that a machine keeps in its directory.
const FILES: &[&str] = &[CONTROL, METRICS, LOG, "log.1", EVENTS, "events.1", CONSOLE, CONSOLE_LOCK];
/// The socket of the console that a terminal can attach to.
pub const CONSOLE: &str = "console";
/// Who is attached has this file locked.
pub const CONSOLE_LOCK: &str = "console.lock";
/// What outlives a machine, until its next run.
const KEPT: &[&str] = &[LOG, "log.1", EVENTS, "events.1"];
/// So many machines that have ended are remembered: with all files full, 24 MB.
const MOST_ENDED: usize = 16;
/// What the processes have said.
pub const LOG: &str = "log";
/// What has happened.
pub const EVENTS: &str = "events";
/// How often making a directory is tried again because somebody removed a stale one meanwhile.
const ATTEMPTS: usize = 20;
/// Longer than it takes to look at a directory and to remove it.
const PAUSE: Duration = Duration::from_millis(10);

/// A machine's directory, ours and locked. Removed when dropped.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    lock: Option<File>,
}

impl RuntimeDir {
    /// Makes and locks the directory of a machine.
    pub fn create(base: &Path, name: &str) -> Result<Self> {
        let path = base.join(name);
        for attempt in 1..=ATTEMPTS {
            private_dir(&path)?;
            let lock = match File::open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                opened => opened.with_context(|| format!("Cannot open {}", path.display()))?,
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // Who only looks whether it is stale has it locked for a moment; a machine, for as long as it runs.
                Err(Errno::WOULDBLOCK) if attempt < ATTEMPTS => {
                    thread::sleep(PAUSE);
                    continue;
                }
                Err(Errno::WOULDBLOCK) => {
                    bail!("A machine called `{name}` is running already; see `outboard ps`")
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("Cannot lock {}", path.display()));
                }
            }
            // Between opening and locking, somebody may have removed it as stale.
            if is_same(&lock, &path) {
                empty(&path)?;
                forget(base);
                return Ok(Self { path, lock: Some(lock) });
            }
        }
        bail!("Cannot make {}: it is removed again and again", path.display());
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open directory, for the janitor.
    pub fn handle(&self) -> Result<File> {
        File::open(&self.path).with_context(|| format!("Cannot open {}", self.path.display()))
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        keep(&self.path);
        drop(empty(&self.path));
        drop(fs::remove_dir(&self.path));
        drop(mem::take(&mut self.lock));
    }
}

/// Where all machines of this user have their directories: `$XDG_RUNTIME_DIR/outboard`, `/run/user/UID/outboard` or
/// `/tmp/outboard-UID`.
pub fn base() -> Result<PathBuf> {
    let user = geteuid().as_raw();
    let set = env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty()).map(PathBuf::from);
    let usual = PathBuf::from(format!("/run/user/{user}"));
    let dir = set.into_iter().chain([usual]).find(|dir| is_ours(dir));
    let base = dir.map_or_else(|| PathBuf::from(format!("/tmp/outboard-{user}")), |dir| dir.join("outboard"));
    private_dir(&base)?;
    Ok(base)
}

/// Where what was in this file before goes.
#[must_use]
pub fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The directory of a machine that runs.
pub fn find(name: &str) -> Result<PathBuf> {
    check::name(name, "machine")?;
    let dir = base()?.join(name);
    if !dir.join(CONTROL).exists() {
        bail!("No machine called `{name}` is running");
    }
    Ok(dir)
}

/// Where something is kept of a machine that runs, or of the last one of that name. `true`: it runs.
pub fn kept(name: &str, file: &str) -> Result<(PathBuf, bool)> {
    if let Ok(dir) = find(name) {
        return Ok((dir.join(file), true));
    }
    check::name(name, "machine")?;
    let path = base()?.join(ended(name, file));
    if !path.exists() {
        bail!("No machine called `{name}` is running, or has ended lately");
    }
    Ok((path, false))
}

/// The name under which a file of a machine that has ended lies beside the directories of those that run. No machine's name begins
/// with a dot.
fn ended(name: &str, file: &str) -> String {
    format!(".{name}.{file}")
}

/// Puts aside what outlives a machine, in the place of what was there of its predecessor.
fn keep(path: &Path) {
    let (Some(base), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    if !path.join(EVENTS).exists() {
        return; // it has never run
    }
    for file in KEPT {
        let place = base.join(ended(name, file));
        if fs::rename(path.join(file), &place).is_err() {
            let _there_was_none = fs::remove_file(place);
        }
    }
}

/// Forgets the machines that ended first, where there are too many.
fn forget(base: &Path) {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let events = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let name = name.strip_prefix('.')?.strip_suffix(&format!(".{EVENTS}"))?.to_owned();
        Some((entry.metadata().ok()?.modified().ok()?, name))
    });
    let mut events: Vec<_> = events.collect();
    events.sort();
    let many = events.len().saturating_sub(MOST_ENDED);
    for (_, name) in events.into_iter().take(many) {
        for file in KEPT {
            let _there_was_none = fs::remove_file(base.join(ended(&name, file)));
        }
    }
}

/// A directory that is ours alone, made if it is not there. In `/tmp` anybody could have made it before us, to read our control
/// sockets or to lead us elsewhere: no link, no other owner, no right for anybody else.
fn private_dir(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("Cannot make {}", path.display()));
        }
        _ => {}
    }
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found.with_context(|| format!("Cannot look at {}", path.display()))?,
    };
    if !found.is_dir() || found.uid() != geteuid().as_raw() {
        bail!("Cannot use {}: it is not a directory of yours", path.display());
    }
    if found.mode() & 0o077 != 0 {
        bail!("Cannot use {}: others may enter it (mode {:o})", path.display(), found.mode() & 0o777);
    }
    Ok(())
}

fn is_ours(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|found| found.is_dir() && found.uid() == geteuid().as_raw())
}

fn is_same(open: &File, path: &Path) -> bool {
    match (open.metadata(), fs::symlink_metadata(path)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Removes what a machine keeps in its directory.
fn empty(path: &Path) -> Result<()> {
    for name in FILES {
        let path = path.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("Cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes a directory whose machine has ended without doing so. Does nothing to one that is in use.
pub fn remove_stale(path: &Path, open: &File) -> bool {
    if flock(open, FlockOperation::NonBlockingLockExclusive).is_err() || !is_same(open, path) {
        return false;
    }
    keep(path);
    empty(path).is_ok() && fs::remove_dir(path).is_ok()
}

/// The names of the machines that run; stale directories are removed on the way.
pub fn machines(base: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(base).with_context(|| format!("Cannot read {}", base.display()))? {
        let path = entry?.path();
        let Ok(open) = File::open(&path) else {
            continue;
        };
        if !path.is_dir() || remove_stale(&path, &open) {
            continue;
        }
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = env::temp_dir().join(format!("outboard-test-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&dir));
        DirBuilder::new().mode(0o700).create(&dir).unwrap();
        dir
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_afterwards() {
        let base = scratch("name");
        let first = RuntimeDir::create(&base, "web").unwrap();
        let error = RuntimeDir::create(&base, "web").unwrap_err().to_string();
        assert_eq!(error, "A machine called `web` is running already; see `outboard ps`");
        drop(first);
        assert!(!base.join("web").exists());
        drop(RuntimeDir::create(&base, "web").unwrap());
    }

    #[test]
    fn stale_directories_are_swept_and_used_ones_are_not() {
        let base = scratch("stale");
        DirBuilder::new().mode(0o700).create(base.join("old")).unwrap();
        fs::write(base.join("old").join(CONTROL), "").unwrap();
        let used = RuntimeDir::create(&base, "new").unwrap();
        assert_eq!(machines(&base).unwrap(), ["new"]);
        assert!(!base.join("old").exists());
        assert!(used.path().exists());
    }

    #[test]
    fn the_last_machines_are_remembered_and_no_more_than_that() {
        let base = scratch("ended");
        for number in 0..MOST_ENDED + 5 {
            for run in 0..2 {
                let dir = RuntimeDir::create(&base, &format!("m{number}")).unwrap();
                fs::write(dir.path().join(EVENTS), format!("run {run}")).unwrap();
                if run == 0 {
                    fs::write(dir.path().join("log.1"), "old").unwrap();
                }
            }
        }
        drop(RuntimeDir::create(&base, "another").unwrap());
        let last = base.join(ended(&format!("m{}", MOST_ENDED + 4), EVENTS));
        assert_eq!(fs::read_to_string(last).unwrap(), "run 1", "the last run of a name is the one that counts");
        let names: Vec<String> =
            fs::read_dir(&base).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(names.len(), MOST_ENDED, "{names:?}");
        assert!(machines(&base).unwrap().is_empty());
    }

    #[test]
    fn who_only_looks_takes_nobodys_name() {
        let base = scratch("look");
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    drop(machines(&base));
                }
            });
            let made: Vec<_> = (0..500).map(|_| RuntimeDir::create(&base, "web").map(drop)).collect();
            done.store(true, Ordering::Relaxed);
            for result in made {
                result.unwrap();
            }
        });
    }

    #[test]
    fn directories_that_others_could_have_prepared_are_refused() {
        let base = scratch("others");
        fs::create_dir(base.join("open")).unwrap();
        fs::set_permissions(base.join("open"), Permissions::from_mode(0o755)).unwrap();
        let error = private_dir(&base.join("open")).unwrap_err().to_string();
        assert!(error.ends_with("others may enter it (mode 755)"), "{error}");
        symlink("/tmp", base.join("link")).unwrap();
        let error = private_dir(&base.join("link")).unwrap_err().to_string();
        assert!(error.ends_with("it is not a directory of yours"), "{error}");
    }
}
