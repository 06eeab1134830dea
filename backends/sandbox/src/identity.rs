//! Which users a program is, and which it can be.
//!
//! Most programs are one user: the one that started them, known as 0 inside. A program that acts in the name of others needs a
//! map of several, which only a privileged process may write: root itself, or for an ordinary user the set-user-id programs
//! `newuidmap` and `newgidmap`, which know what `/etc/subuid` and `/etc/subgid` grant.

use std::fmt::{self, Write as _};
use std::io::ErrorKind;
use std::process::{Command, Stdio};
use std::str::FromStr;

use caps::{CapSet, Capability};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, geteuid};

use crate::{Error, Result};

/// The users and groups of a program that is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Identity {
    /// The caller, and nobody else: a user namespace in which it is 0.
    #[default]
    Own,
    /// A user namespace with these maps. The program starts as 0, so both have to say who that is.
    Ranges {
        /// Users.
        uids: Vec<IdRange>,
        /// Groups.
        gids: Vec<IdRange>,
    },
    /// The host's users: no user namespace. For root only. What the process has kept of its capabilities it has for all of the host;
    /// the host's limit on user namespaces cannot be changed for it alone, so that its filter has to keep it from making one, and
    /// the number of its threads is not limited, since all of root's count.
    Host,
}

/// The kinds of [`Identity`], as a program is told which one it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdentityKind {
    /// [`Identity::Own`].
    #[default]
    Own,
    /// [`Identity::Ranges`].
    Ranges,
    /// [`Identity::Host`].
    Host,
}

/// Users, or groups, that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first, as the program knows it.
    pub inside: u32,
    /// The first, as the caller knows it.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

impl Identity {
    /// Which kind it is.
    pub fn kind(&self) -> IdentityKind {
        match self {
            Identity::Own => IdentityKind::Own,
            Identity::Ranges { .. } => IdentityKind::Ranges,
            Identity::Host => IdentityKind::Host,
        }
    }

    /// Refuses what cannot be started.
    pub(crate) fn check(&self) -> Result<()> {
        let has_zero = |ranges: &[IdRange]| ranges.iter().any(|range| range.inside == 0 && range.count > 0);
        match self {
            Identity::Ranges { uids, gids } if !has_zero(uids) || !has_zero(gids) => Err(Error::NobodyIsZero),
            Identity::Host if !geteuid().is_root() => Err(Error::NotRoot),
            _ => Ok(()),
        }
    }
}

impl IdentityKind {
    const ALL: [IdentityKind; 3] = [IdentityKind::Own, IdentityKind::Ranges, IdentityKind::Host];
}

impl fmt::Display for IdentityKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IdentityKind::Own => "own",
            IdentityKind::Ranges => "ranges",
            IdentityKind::Host => "host",
        })
    }
}

impl FromStr for IdentityKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<IdentityKind, String> {
        let found = IdentityKind::ALL.into_iter().find(|kind| kind.to_string() == text);
        found.ok_or_else(|| format!("not one of {}", IdentityKind::ALL.map(|kind| kind.to_string()).join(", ")))
    }
}

/// One of the two maps of a user namespace.
struct Map {
    file: &'static str,
    helper: &'static str,
    grants: &'static str,
    /// What may be said of it, for a failure.
    step: &'static str,
}

const USERS: Map = Map { file: "uid_map", helper: "newuidmap", grants: "/etc/subuid", step: "map the users" };
const GROUPS: Map = Map { file: "gid_map", helper: "newgidmap", grants: "/etc/subgid", step: "map the groups" };

/// Writes the maps of a process that has just been made in a user namespace of its own.
pub(crate) fn write_maps(pid: Pid, uids: &[IdRange], gids: &[IdRange]) -> Result<()> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let privileged = has(Capability::CAP_SETUID) && has(Capability::CAP_SETGID);
    for (map, ranges) in [(USERS, uids), (GROUPS, gids)] {
        if privileged { map.write(pid, ranges)? } else { map.ask(pid, ranges)? }
    }
    Ok(())
}

impl Map {
    fn write(&self, pid: Pid, ranges: &[IdRange]) -> Result<()> {
        let mut text = String::new();
        for IdRange { inside, outside, count } in ranges {
            let _to_memory = writeln!(text, "{inside} {outside} {count}");
        }
        let path = format!("/proc/{}/{}", pid.as_raw_nonzero(), self.file);
        let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(Error::step(self.step))?;
        // The kernel takes a map in one write.
        rustix::io::write(&file, text.as_bytes()).map(drop).map_err(Error::step(self.step))
    }

    fn ask(&self, pid: Pid, ranges: &[IdRange]) -> Result<()> {
        let numbers = ranges.iter().flat_map(|range| [range.inside, range.outside, range.count]);
        let words = [pid.as_raw_nonzero().to_string()].into_iter().chain(numbers.map(|number| number.to_string()));
        let ran = Command::new(self.helper).args(words).stdin(Stdio::null()).output();
        let Map { helper, grants, step, .. } = *self;
        match ran {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let first = said.lines().next().unwrap_or("it does not say why");
                let said = first.trim_start_matches(helper).trim_start_matches(": ").to_owned();
                Err(Error::MapRefused { helper, grants, said })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::NoMapHelper { helper, grants }),
            Err(source) => Err(Error::Step { step, source }),
        }
    }
}
