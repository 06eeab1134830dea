//! What is shared, before and after the process is confined.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, fstat};
use rustix::rand::{GetRandomFlags, getrandom};
use sandbox::{Access, Detach, Reach, detach};

use crate::args::{Config, FileHandles, Place};
use crate::fs::{Session, Share};
use crate::magic::Magic;
use crate::tree::{Budget, Tree, file_handle};
use crate::watch::Watch;

/// A share that was taken out of the tree it is in.
#[derive(Debug)]
pub struct Opened {
    root: OwnedFd,
    one_mount: bool,
    magic: Magic,
    watch: Option<Watch>,
    /// The share, open for reading, where its inodes are reached by handles.
    by_handle: Option<OwnedFd>,
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
        // A guest that collects writes takes its own word for how long a file is, and of the first one it knows it has heard nothing.
        if kind == FileType::RegularFile && config.settings.writeback {
            bail!("Cannot share {} with --writeback: that takes a directory", config.place);
        }
        let magic = Magic::open()?;
        let by_handle = match config.file_handles {
            FileHandles::Never => None,
            how => match file_handle::probe(&root, &magic) {
                Ok(share) => Some(share),
                Err(errno) if how == FileHandles::Prefer => {
                    tracing::info!("Inodes are reached by their names alone: {errno}");
                    None
                }
                Err(errno) => bail!(
                    "Cannot reach inodes of {} by their handles (--inode-file-handles=mandatory): {errno}. It takes a file system that has some, and root as itself",
                    config.place
                ),
            },
        };
        let watch = config.watch.then(Watch::new).transpose();
        let watch = watch.context("Cannot watch what this host changes: the kernel was built without fanotify, or /proc/sys/fs/fanotify/max_user_groups is used up")?;
        Ok(Opened { root, one_mount, magic, watch, by_handle })
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
        let mut tree =
            Tree::new(self.root, budget, self.one_mount, bytes.map(u64::from_ne_bytes)).context("Cannot look at the share")?;
        if let Some(share) = self.by_handle {
            tree.reach_by_handle(share);
        }
        Ok(Share::new(tree, (self.magic, self.watch), session, config.settings.clone(), config.owners.clone()))
    }
}
