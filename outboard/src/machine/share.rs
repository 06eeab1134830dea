//! A directory that the guest shares.

use std::ffi::OsString;
use std::fs::metadata;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::disk::Limits;
use super::{Backend, Class, Device, Program, Stdio};
use crate::usage;

/// Most request queues of its process.
const MOST_QUEUES: u16 = 16;

/// Bytes of the longest tag (virtio 1.3, 5.11.4).
const LONGEST_TAG: usize = 36;

/// A directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share {
    /// Where it is.
    pub path: PathBuf,
    /// Without writing to it.
    pub readonly: bool,
    /// What the guest keeps.
    pub cache: Option<String>,
    /// Whose files are whose.
    pub owner: Option<String>,
    /// The guest collects what is written.
    pub writeback: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// Names of them that are others on the host.
    pub xattrmap: Option<String>,
    /// Access control lists.
    pub posix_acl: bool,
    /// For how many seconds the guest believes that something is not there.
    pub negative_timeout: Option<u32>,
    /// How much it may be used.
    pub limits: Limits,
    /// Request queues.
    pub queues: Option<u16>,
}

impl Share {
    /// The device of a machine with so many processors. Its name is the tag by which the guest mounts it.
    #[must_use]
    pub fn device(self, name: String, cpus: u8) -> Device {
        let queues = self.queues.unwrap_or_else(|| u16::from(cpus)).clamp(1, MOST_QUEUES);
        let mut args: Vec<OsString> = vec!["--shared-dir".into(), self.path.clone().into(), "--tag".into(), name.clone().into()];
        args.extend(["--num-request-queues".into(), queues.to_string().into()]);
        let switches = [
            ("--readonly", self.readonly),
            ("--writeback", self.writeback),
            ("--xattr", self.xattr),
            ("--posix-acl", self.posix_acl),
        ];
        args.extend(switches.into_iter().filter(|(_, on)| *on).map(|(switch, _)| switch.into()));
        let owner = self.owner.clone().unwrap_or_else(|| "me".to_owned());
        args.extend(["--owner-map".into(), owner.into()]);
        if let Some(cache) = &self.cache {
            args.extend(["--cache".into(), cache.into()]);
        }
        if let Some(rules) = &self.xattrmap {
            args.extend(["--xattrmap".into(), rules.into()]);
        }
        if let Some(seconds) = self.negative_timeout {
            args.extend(["--negative-timeout".into(), seconds.to_string().into()]);
        }
        for (word, rate) in [("--limit-ops", self.limits.operations), ("--limit-bytes", self.limits.bytes)] {
            if rate.per_second != 0 {
                args.extend([word.into(), rate.argument().into()]);
            }
        }
        let program =
            Program { name: "outboard-virtiofsd", args, stdio: Stdio::Nothing, disk: None, share: Some(Box::new(self)) };
        // One queue more for what must not wait.
        let queues = Some(queues.saturating_add(1));
        Device { name, class: Class::Named("fs".to_owned()), queues, backend: Backend::Process(program) }
    }
}

/// Whether there is such a directory, and its parts fit together.
pub fn check(share: &Share, device: &str) -> Result<()> {
    let there = metadata(&share.path);
    let there = there.with_context(|| format!("Cannot find the directory {} of the share `{device}`", share.path.display()))?;
    if !there.is_dir() {
        bail!("Cannot share {} as `{device}`: it is not a directory", share.path.display());
    }
    if device.len() > LONGEST_TAG {
        usage!("The name of the share `{device}` is its tag, which has at most {LONGEST_TAG} bytes");
    }
    share.limits.check("share", device)?;
    share.owner.as_deref().map_or(Ok(()), check_owner)
}

/// Whose files are whose, as far as a process of a machine can do it: it is one user.
fn check_owner(owner: &str) -> Result<()> {
    let (preset, id) = owner.split_once('=').map_or((owner, None), |(preset, id)| (preset, Some(id)));
    let number = id.is_none_or(|id| id.parse::<u32>().is_ok_and(|id| id != u32::MAX));
    match preset {
        "me" | "squash" if number => Ok(()),
        "exact" => usage!(
            "`exact` needs a process that is many users: start outboard-virtiofsd by itself, and name its socket in a [device.NAME] table"
        ),
        _ => usage!("`{owner}` is not one of me, me=ID, squash, squash=ID"),
    }
}
