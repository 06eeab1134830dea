//! What is shared, before and after the process is confined.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, fstat};
use rustix::rand::{GetRandomFlags, getrandom};
use sandbox::{Access, Detach, Reach, detach};

use crate::args::{Config, Place};
use crate::fs::{Session, Share};
use crate::magic::Magic;
use crate::tree::{Budget, Tree};
use crate::watch::Watch;

/// A share that was taken out of the tree it is in.
#[derive(Debug)]
pub struct Opened {
    root: OwnedFd,
    one_mount: bool,
    magic: Magic,
    watch: Option<Watch>,
}

impl Opened {
    /// Takes it out. Paths are still there.
    ///
    /// # Errors
    /// When it is not there, or cannot be shared.
    pub fn open(config: &Config, inherited: impl FnOnce(i32) -> Result<OwnedFd>) -> Result<Opened> {
        let how = Detach { read_only: config.settings.read_only, submounts: config.submounts };
        let (root, one_mount) = match &config.place {
            Place::Path(path) => {
                let taken = detach(CWD, path, how).with_context(|| format!("Cannot share {}", path.display()))?;
                (taken.root, taken.submounts && !config.submounts)
            }
            // A mount that somebody else has made, with ids mapped as they like.
            Place::Given(fd) => (inherited(*fd)?, !config.submounts),
        };
        let kind = FileType::from_raw_mode(fstat(&root).context("Cannot look at the share")?.st_mode);
        if !matches!(kind, FileType::Directory | FileType::RegularFile) {
            bail!("Cannot share {}: it is neither a directory nor a file", config.place);
        }
        let watch = config.watch.then(Watch::new).transpose();
        let watch = watch.context("Cannot watch what this host changes: the kernel was built without fanotify, or /proc/sys/fs/fanotify/max_user_groups is used up")?;
        Ok(Opened { root, one_mount, magic: Magic::open()?, watch })
    }

    /// What stays within reach.
    pub fn reach(&self, config: &Config) -> Reach<'_> {
        use std::os::fd::AsFd;
        let access = if config.settings.read_only { Access::ReadOnly } else { Access::ReadWrite };
        Reach { root: self.root.as_fd(), access }
    }

    /// The share, with nothing known of it yet.
    ///
    /// # Errors
    /// The system's.
    pub fn share(self, config: &Config, session: Session) -> Result<Share> {
        let mut bytes = [[0; 8]; 2];
        for number in &mut bytes {
            getrandom(&mut number[..], GetRandomFlags::empty()).context("Cannot get random numbers")?;
        }
        let budget = Budget {
            nodes: config.max_inodes,
            descriptors: usize::try_from(config.cached_descriptors).unwrap_or(usize::MAX),
            orphans: usize::try_from(config.max_nameless).unwrap_or(usize::MAX),
            handles: config.max_handles,
        };
        let tree =
            Tree::new(self.root, budget, self.one_mount, bytes.map(u64::from_ne_bytes)).context("Cannot look at the share")?;
        Ok(Share::new(tree, (self.magic, self.watch), session, config.settings.clone(), config.owners.clone()))
    }
}
