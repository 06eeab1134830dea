//! What a confined process can still name by a path: for most nothing, for a file server what is beneath its share.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::fs::{FileType, fstat};

use crate::{Error, Result};

/// What may be done beneath a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Files may be read and directories listed.
    ReadOnly,
    /// All but to execute, to command devices and to connect to sockets. Where Landlock has version 1 only, no name can be moved to
    /// another directory.
    ReadWrite,
}

/// A share that stays reachable, by paths that begin at its descriptor. It is best a mount of its own ([`crate::detach`]): the
/// root's `..` then leads nowhere.
///
/// File handles are no paths. Who keeps `CAP_DAC_READ_SEARCH` and has `open_by_handle_at` in a filter can make a handle of any file
/// of the file system the share is on, and Landlock takes that for a file of the share (measured with Linux 6.18).
#[derive(Clone, Copy, Debug)]
pub struct Reach<'a> {
    /// A directory, or a single file.
    pub root: BorrowedFd<'a>,
    /// What may be done there.
    pub access: Access,
}

impl Reach<'_> {
    fn rights(&self, abi: ABI) -> Result<BitFlags<AccessFs>> {
        let stat = fstat(self.root).map_err(Error::step("look at a share"))?;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let possible = if directory { AccessFs::from_all(abi) } else { AccessFs::from_file(abi) };
        Ok(possible
            & match self.access {
                Access::ReadOnly => AccessFs::ReadFile | AccessFs::ReadDir,
                Access::ReadWrite => !(AccessFs::Execute | AccessFs::IoctlDev | AccessFs::ResolveUnix),
            })
    }
}

/// All rights that this kernel knows are handled, and none is given but beneath the shares.
pub(crate) fn enter_landlock(version: u32, shares: &[Reach<'_>]) -> Result<()> {
    let abi = abi(version);
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset = ruleset.handle_access(AccessFs::from_all(abi)).map_err(Error::Landlock)?;
    if abi >= ABI::V4 {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi)).map_err(Error::Landlock)?;
    }
    if abi >= ABI::V6 {
        ruleset = ruleset.scope(Scope::from_all(abi)).map_err(Error::Landlock)?;
    }
    let mut created = ruleset.create().map_err(Error::Landlock)?;
    for share in shares {
        created = created.add_rule(PathBeneath::new(share.root, share.rights(abi)?)).map_err(Error::Landlock)?;
    }
    let status = created.restrict_self().map_err(Error::Landlock)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        _ => Err(Error::TooOld(format!("all of Landlock version {version}"))),
    }
}

fn abi(version: u32) -> ABI {
    const KNOWN: [ABI; 9] = [ABI::V1, ABI::V2, ABI::V3, ABI::V4, ABI::V5, ABI::V6, ABI::V7, ABI::V8, ABI::V9];
    let index = usize::try_from(version).unwrap_or(usize::MAX).clamp(1, KNOWN.len());
    KNOWN.get(index - 1).copied().unwrap_or(ABI::V9)
}
