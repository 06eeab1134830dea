//! What this kernel has, and the least that is accepted.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result, sys};

/// The least a kernel must offer, named after the kernel that first had it all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Floor {
    /// Landlock 1: paths. Without Landlock's later rights, TCP, signals and abstract sockets rest on the other layers.
    Linux515,
    /// Landlock 2.
    Linux61,
    /// Landlock 6 (TCP, device ioctls, signals, abstract sockets) and the refusal of writable and executable memory.
    #[default]
    Linux612,
}

impl Floor {
    const ALL: [Floor; 3] = [Floor::Linux612, Floor::Linux61, Floor::Linux515];

    fn landlock(self) -> u32 {
        match self {
            Floor::Linux515 => 1,
            Floor::Linux61 => 2,
            Floor::Linux612 => 6,
        }
    }

    fn refuses_executable_memory(self) -> bool {
        self == Floor::Linux612
    }
}

impl fmt::Display for Floor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Floor::Linux515 => "linux-5.15",
            Floor::Linux61 => "linux-6.1",
            Floor::Linux612 => "linux-6.12",
        })
    }
}

impl FromStr for Floor {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Floor, String> {
        let found = Floor::ALL.into_iter().find(|floor| floor.to_string() == text);
        found.ok_or_else(|| format!("not one of {}", Floor::ALL.map(|floor| floor.to_string()).join(", ")))
    }
}

/// What the running kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The version of Landlock's interface; 0: none.
    pub landlock: u32,
    /// It can refuse memory that is writable and executable (`PR_SET_MDWE`).
    pub refuses_executable_memory: bool,
}

impl Kernel {
    /// Asks the running kernel.
    pub fn running() -> Kernel {
        Kernel { landlock: sys::landlock_version(), refuses_executable_memory: sys::has_mdwe() }
    }

    /// The highest floor it reaches.
    pub fn floor(&self) -> Option<Floor> {
        Floor::ALL.into_iter().find(|floor| self.missing(*floor).is_empty())
    }

    /// Refuses a kernel below `floor`.
    ///
    /// # Errors
    /// Says what is missing and which floor would be reached.
    pub fn require(&self, floor: Floor) -> Result<()> {
        let missing = self.missing(floor);
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join(" and ");
        match self.floor() {
            Some(lower) => Err(Error::Floor { missing, lower: lower.to_string() }),
            None => Err(Error::TooOld(missing)),
        }
    }

    fn missing(&self, floor: Floor) -> Vec<String> {
        let mut missing = Vec::new();
        if self.landlock < floor.landlock() {
            let have = if self.landlock == 0 { "none".to_owned() } else { format!("version {}", self.landlock) };
            missing.push(format!("Landlock version {} (it has {have})", floor.landlock()));
        }
        if floor.refuses_executable_memory() && !self.refuses_executable_memory {
            missing.push("the refusal of writable and executable memory (PR_SET_MDWE)".to_owned());
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_refused_with_what_it_lacks() {
        let bookworm = Kernel { landlock: 2, refuses_executable_memory: false };
        assert_eq!(bookworm.floor(), Some(Floor::Linux61));
        bookworm.require(Floor::Linux61).unwrap();
        let text = bookworm.require(Floor::Linux612).unwrap_err().to_string();
        assert!(text.contains("Landlock version 6 (it has version 2) and the refusal of writable"), "{text}");
        assert!(text.ends_with("--sandbox-floor linux-6.1"), "{text}");
        let none = Kernel { landlock: 0, refuses_executable_memory: false };
        assert!(matches!(none.require(Floor::Linux515), Err(Error::TooOld(_))));
    }

    #[test]
    fn floors_are_named() {
        for floor in Floor::ALL {
            assert_eq!(floor.to_string().parse(), Ok(floor));
        }
        assert!("none".parse::<Floor>().is_err());
    }
}
