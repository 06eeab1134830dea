//! Words about ids.

use std::fs;

use anyhow::{Context, Result, bail};
use rustix::process::{getegid, geteuid};
use sandbox::{IdRange, Identity};

use crate::owner::{Becomes, Ids, Rule};

/// Ids of the process's namespace and those outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    pub(super) inside: u32,
    pub(super) outside: u32,
    pub(super) count: u32,
}

/// Rules about ids of the guest, and about those of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    guest: Option<Rule>,
    host: Option<Rule>,
}

/// `:inside:outside:count:`, with any other character in the place of the colons.
pub(super) fn map(text: &str) -> Result<Map, String> {
    let between = text.chars().next().filter(|between| !between.is_alphanumeric()).ok_or("it begins with no ':'")?;
    let numbers: Vec<&str> = text.trim_matches(between).split(between).collect();
    match *numbers.as_slice() {
        [inside, outside, count] => {
            let map = Map { inside: number(inside)?, outside: number(outside)?, count: number(count)? };
            check(map.inside, map.count)?;
            check(map.outside, map.count)?;
            Ok(map)
        }
        _ => Err("not of the form ':inside:outside:count:'".to_owned()),
    }
}

/// A rule, in the words of the virtiofsd that people know.
pub(super) fn translation(text: &str) -> Result<Translation, String> {
    let words: Vec<&str> = text.split(':').collect();
    let rule = |first: &str, to: &str, count: &str, one: bool| -> Result<Rule, String> {
        let (first, to, count) = (number(first)?, number(to)?, number(count)?);
        check(first, count)?;
        check(to, if one { 1 } else { count })?;
        Ok(Rule { first, count, becomes: if one { Becomes::One(to) } else { Becomes::Shifted(to) } })
    };
    let (guest, host) = match *words.as_slice() {
        ["guest", from, to, count] => (Some(rule(from, to, count, false)?), None),
        ["host", from, to, count] => (None, Some(rule(from, to, count, false)?)),
        ["map", guest, host, count] => (Some(rule(guest, host, count, false)?), Some(rule(host, guest, count, false)?)),
        ["squash-guest", from, to, count] => (Some(rule(from, to, count, true)?), None),
        ["squash-host", from, to, count] => (None, Some(rule(from, to, count, true)?)),
        ["forbid-guest", from, count] => {
            let (first, count) = (number(from)?, number(count)?);
            check(first, count)?;
            (Some(Rule { first, count, becomes: Becomes::Forbidden }), None)
        }
        _ => return Err("not one of guest:, host:, map:, squash-guest:, squash-host:, forbid-guest:".to_owned()),
    };
    Ok(Translation { guest, host })
}

/// All of them.
pub(super) fn ids(translations: &[Translation]) -> Ids {
    Ids {
        guest: translations.iter().filter_map(|one| one.guest).collect(),
        host: translations.iter().filter_map(|one| one.host).collect(),
    }
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number"))
}

/// There are so many ids from there on.
fn check(first: u32, count: u32) -> Result<(), String> {
    match first.checked_add(count) {
        Some(_) if count > 0 => Ok(()),
        _ => Err(format!("there are no {count} ids from {first} on")),
    }
}

/// Whoever starts the process is the guest's root, and the guest's others are subordinate ids.
pub(super) fn subordinate() -> Result<Identity> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let uids = ranges(uid, grant("/etc/subuid", uid)?);
    let gids = ranges(gid, grant("/etc/subgid", uid)?);
    Ok(Identity::Ranges { uids, gids })
}

fn ranges(own: u32, (first, count): (u32, u32)) -> Vec<IdRange> {
    vec![IdRange { inside: 0, outside: own, count: 1 }, IdRange { inside: 1, outside: first, count }]
}

/// What a table of subordinate ids grants a user, by name or by number.
fn grant(table: &str, uid: u32) -> Result<(u32, u32)> {
    let text = fs::read_to_string(table).with_context(|| format!("Cannot read {table}"))?;
    let name = user_name(uid);
    for line in text.lines() {
        let mut words = line.split(':');
        let (Some(who), Some(first), Some(count)) = (words.next(), words.next(), words.next()) else { continue };
        if who == uid.to_string() || Some(who) == name.as_deref() {
            let (first, count) = (number(first), number(count));
            if let (Ok(first), Ok(count)) = (first, count) {
                return Ok((first, count));
            }
        }
    }
    bail!(
        "{table} grants no subordinate ids to user {uid}: add some with usermod --add-subuids 100000-165535 --add-subgids 100000-165535, or use --owner-map me"
    )
}

fn user_name(uid: u32) -> Option<String> {
    let text = fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let mut words = line.split(':');
        let name = words.next()?;
        (words.nth(1)? == uid.to_string()).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_any_separator() {
        let expected = Map { inside: 0, outside: 1000, count: 1 };
        assert_eq!(map(":0:1000:1:"), Ok(expected));
        assert_eq!(map("/0/1000/1/"), Ok(expected));
        for bad in ["0:1000:1", ":0:1000:", ":0:1000:0:", ":1:4294967295:2:", ":a:1:1:"] {
            assert!(map(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn translations_are_told_apart() {
        let both = translation("map:1000:2000:10").unwrap();
        let ids = ids(&[both, translation("squash-guest:0:65534:1").unwrap(), translation("forbid-guest:5:2").unwrap()]);
        assert_eq!((ids.to_host(1009), ids.to_guest(2009)), (Ok(2009), 1009));
        assert_eq!((ids.to_host(0), ids.to_host(6).is_err(), ids.to_host(7)), (Ok(65534), true, Ok(7)));
        for bad in ["guest:1:2", "guest:1:2:0", "all:1:2:3", "map:1:4294967295:2", "forbid-guest:5"] {
            assert!(translation(bad).is_err(), "{bad}");
        }
    }
}
