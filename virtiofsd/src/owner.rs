//! Whose a file is, there and here.
//!
//! Ids of the guest and ids of the host (as they are in this process's user namespace) are translated by rules, the first that fits.
//! What no rule is about stays as it is, or is nobody's, as the preset says.

use rustix::io::Errno;

/// The id that stands for whoever has none here.
pub const NOBODY: u32 = 65534;

/// A rule about so many ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The first.
    pub first: u32,
    /// How many, at least 1.
    pub count: u32,
    /// What becomes of them.
    pub becomes: Becomes,
}

/// What becomes of an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Becomes {
    /// The first becomes this one, the next the next.
    Shifted(u32),
    /// All become this one.
    One(u32),
    /// It cannot be used.
    Forbidden,
}

impl Rule {
    /// A rule about all ids.
    pub const fn all(becomes: Becomes) -> Rule {
        Rule { first: 0, count: u32::MAX, becomes }
    }

    fn apply(&self, id: u32) -> Option<Result<u32, Errno>> {
        let inside = id.checked_sub(self.first).filter(|inside| *inside < self.count)?;
        Some(match self.becomes {
            Becomes::Shifted(to) => to.checked_add(inside).filter(|id| *id != u32::MAX).ok_or(Errno::PERM),
            Becomes::One(to) => Ok(to),
            Becomes::Forbidden => Err(Errno::PERM),
        })
    }
}

/// Both directions for one kind of id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// From the guest's to ours.
    pub guest: Vec<Rule>,
    /// From ours to the guest's.
    pub host: Vec<Rule>,
}

impl Ids {
    /// This process's own id is the guest's `id`, and nobody else is anybody.
    pub fn me(id: u32) -> Ids {
        Ids {
            guest: vec![Rule { first: id, count: 1, becomes: Becomes::Shifted(0) }, Rule::all(Becomes::Forbidden)],
            host: vec![Rule { first: 0, count: 1, becomes: Becomes::Shifted(id) }, Rule::all(Becomes::One(NOBODY))],
        }
    }

    /// Everything is the guest's `id`; whatever the guest makes is this process's own.
    pub fn squash(id: u32) -> Ids {
        Ids { guest: vec![Rule::all(Becomes::One(0))], host: vec![Rule::all(Becomes::One(id))] }
    }

    /// Whose it is here.
    ///
    /// # Errors
    /// `EPERM` when it can be nobody's.
    pub fn to_host(&self, id: u32) -> Result<u32, Errno> {
        self.guest.iter().find_map(|rule| rule.apply(id)).unwrap_or(Ok(id))
    }

    /// Whose it is in the guest.
    pub fn to_guest(&self, id: u32) -> u32 {
        self.host.iter().find_map(|rule| rule.apply(id)).unwrap_or(Ok(id)).unwrap_or(NOBODY)
    }
}

/// Users and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// Users.
    pub uids: Ids,
    /// Groups.
    pub gids: Ids,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn my_files_are_one_users_of_the_guest() {
        let ids = Ids::me(1000);
        assert_eq!((ids.to_host(1000), ids.to_guest(0)), (Ok(0), 1000));
        assert_eq!((ids.to_host(0), ids.to_guest(65534)), (Err(Errno::PERM), NOBODY));
    }

    #[test]
    fn squashed_files_are_all_of_one() {
        let ids = Ids::squash(5);
        assert_eq!((ids.to_host(0), ids.to_host(77), ids.to_guest(0), ids.to_guest(1000)), (Ok(0), Ok(0), 5, 5));
    }

    #[test]
    fn the_first_rule_that_fits_is_taken_and_ends_where_it_says() {
        let rule = Rule { first: 1000, count: 2, becomes: Becomes::Shifted(u32::MAX - 1) };
        let ids = Ids { guest: vec![rule, Rule { first: 1001, count: 5, becomes: Becomes::One(9) }], host: Vec::new() };
        assert_eq!([999, 1000, 1002, 1006].map(|id| ids.to_host(id)), [Ok(999), Ok(u32::MAX - 1), Ok(9), Ok(1006)]);
        assert_eq!(ids.to_host(1001), Err(Errno::PERM), "there is no such id");
    }
}
