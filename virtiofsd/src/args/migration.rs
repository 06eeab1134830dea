//! How a guest moves to another host, as the virtiofsd that people know has it.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::fs::{Loss, Moving};

/// The options.
#[derive(Args, Debug)]
pub(super) struct Migration {
    /// How a guest's files are found again by the server of another host: by their names
    #[arg(long, value_name = "find-paths", default_value = "find-paths")]
    migration_mode: String,
    /// A guest that has something which cannot move stays; or moves, and gets an error when it uses that
    #[arg(long, value_enum, value_name = "ACTION", default_value = "abort")]
    migration_on_error: OnError,
    /// The server of the other host takes a file only if its file system calls it the same: both share one directory of one file system
    #[arg(long)]
    migration_verify_handles: bool,
    /// Names are looked at when the guest has stopped (this is so)
    #[arg(long)]
    migration_confirm_paths: bool,
}

/// What becomes of a guest that has something which cannot move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnError {
    /// It does not move
    Abort,
    /// It moves, and gets an error when it uses that
    GuestError,
}

impl Migration {
    /// # Errors
    /// When something was asked for that cannot be had.
    pub(super) fn check(&self) -> Result<()> {
        match self.migration_mode.as_str() {
            "find-paths" => Ok(()),
            "file-handles" => bail!(
                "--migration-mode file-handles: a handle opens any file of the file system, in the share or not. Leave it out; --migration-verify-handles makes sure that files are the same"
            ),
            other => bail!("--migration-mode {other}: only find-paths is known"),
        }
    }

    pub(super) fn moving(&self) -> Moving {
        let loss = match self.migration_on_error {
            OnError::Abort => Loss::Abort,
            OnError::GuestError => Loss::GuestError,
        };
        Moving { loss, verify: self.migration_verify_handles }
    }
}
