//! The folder that is shared, what lies beside it, and the server.

use std::fmt::Write;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat};

use crate::fs::raw::Raw;
use crate::link::Backend;

/// How long the next frontend tries.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long a server that was hit may take to fall.
const FALL: Duration = Duration::from_millis(30);

/// What is made by a name that begins at the root of the host, if that is let out.
pub(super) const ABSOLUTE: &str = "/tmp/outboard-foe-was-here";

/// A folder with a shared one in it, and a server of that.
pub(super) struct Stage {
    folder: PathBuf,
    backend: Backend,
}

impl Stage {
    pub(super) fn new(command: Vec<String>) -> Result<Stage> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("outboard-foe-{}-{number}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let mut backend = Backend::new(command).quiet();
        backend.give("{share}", vec![folder.join("share").display().to_string()]);
        let stage = Stage { folder, backend };
        stage.furnish()?;
        Ok(stage)
    }

    /// All anew: an attack before this one may have left its mark anywhere.
    fn furnish(&self) -> Result<()> {
        fs::remove_dir_all(&self.folder)?;
        let (share, beside) = (self.folder.join("share"), self.folder.join("beside"));
        let _of_before = fs::remove_dir(ABSOLUTE).or_else(|_| fs::remove_file(ABSOLUTE));
        for folder in [&self.folder, &share, &beside, &beside.join("victims")] {
            fs::create_dir(folder)?;
        }
        fs::write(beside.join("secret"), "nobody's business")?;
        fs::write(self.folder.join("victim"), "beside the share")?;
        furnish(&share)
    }

    /// A new server of a new folder, and a guest that it has greeted.
    pub(super) fn start(&mut self) -> Result<Raw> {
        self.backend.kill(None::<UnixStream>)?;
        self.furnish()?;
        let start = Instant::now();
        loop {
            // One that was killed may have left its socket to a child that still lives.
            match self.backend.start() {
                Ok(stream) => return Raw::begin(stream, 1),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(FALL),
            }
        }
    }

    /// The next guest of the same server.
    pub(super) fn again(&self) -> Result<Raw> {
        Raw::begin(self.backend.connect_within(PATIENCE)?, 1)
    }

    /// Whether the server is gone by now.
    pub(super) fn is_gone(&mut self) -> bool {
        let start = Instant::now();
        while start.elapsed() < FALL {
            if self.backend.ended().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        false
    }

    /// What lies beside the shared folder.
    pub(super) fn outside(&self) -> Result<String> {
        let mut all = fingerprint(&self.folder.join("beside"))?;
        let mut names: Vec<_> = fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        names.sort();
        let absolute = fs::symlink_metadata(ABSOLUTE).is_ok();
        write!(all, "{names:?} {absolute} {}", fs::read_to_string(self.folder.join("victim"))?)?;
        Ok(all)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _already_gone = self.backend.kill(None::<UnixStream>);
        let _not_there = fs::remove_dir(ABSOLUTE).or_else(|_| fs::remove_file(ABSOLUTE));
        let _left_for_later = fs::remove_dir_all(&self.folder);
    }
}

/// Makes one file of each kind in a folder. A device only where that is allowed.
///
/// # Errors
/// The system's.
pub fn furnish(share: &Path) -> Result<()> {
    fs::write(share.join("file"), "0123456789".repeat(1000))?;
    fs::write(share.join("other"), "another one")?;
    fs::create_dir_all(share.join("dir/deep"))?;
    fs::write(share.join("dir/inner"), "within")?;
    fs::create_dir(share.join("empty"))?;
    symlink("file", share.join("link"))?;
    symlink("../beside", share.join("out"))?;
    mknodat(CWD, share.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0)?;
    drop(UnixListener::bind(share.join("sock"))?);
    let _only_of_root = mknodat(CWD, share.join("device"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3));
    Ok(())
}

/// All that can be seen of a folder and what is in it: names, types, owners, times and contents.
///
/// # Errors
/// The system's.
pub fn fingerprint(folder: &Path) -> Result<String> {
    let mut all = String::new();
    let mut paths = vec![folder.to_path_buf()];
    while let Some(path) = paths.pop() {
        let meta = fs::symlink_metadata(&path)?;
        let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        write!(all, "{} {:o} {} {} {} ", path.display(), meta.mode(), meta.uid(), meta.gid(), meta.nlink())?;
        write!(all, "{} {times:?} ", meta.len())?;
        if meta.is_dir() {
            let mut within: Vec<_> = fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
            within.sort();
            paths.extend(within);
        } else if meta.is_file() {
            let atime = (meta.atime(), meta.atime_nsec());
            // To look at it is not to be what changes it.
            let flags = i32::try_from(OFlags::NOATIME.bits())?;
            let mut content = Vec::new();
            fs::File::options().read(true).custom_flags(flags).open(&path)?.read_to_end(&mut content)?;
            write!(all, "{atime:?} {content:?}")?;
        }
        all.push('\n');
    }
    Ok(all)
}
