//! Names of extended attributes, which may be others on the host than in the guest (`--xattrmap`).
//!
//! A map is a list of rules, in the language of the virtiofsd that people know. The first rule that is about a name decides. So each name
//! has to meet one in the end: a list in which one could fall through is refused when the process starts.
//!
//! The rules are fixed from then on. A name is put together in memory of the caller's, and names of the host only become shorter, in
//! place: nothing is allocated while a guest is served.

use std::ffi::{CStr, CString};
use std::fmt;
use std::str::FromStr;

use rustix::io::Errno;

use crate::request::MAX_NAME;

/// Where a file's capabilities stand. The kernel takes them away when the file is changed, but only under this name.
const CAPABILITY: &CStr = c"security.capability";

/// Room for a name of an attribute and the zero behind it.
pub(crate) type Room = [u8; MAX_NAME + 1];

/// All rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrMap {
    rules: Box<[Rule]>,
    capability: Option<CString>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    does: Does,
    /// It is about names that the guest says.
    client: bool,
    /// It is about names that the host lists.
    server: bool,
    /// How such names begin in the guest.
    key: Box<[u8]>,
    /// How they begin on the host; of [`Does::Prefix`], what comes in front.
    prepend: Box<[u8]>,
}

/// What becomes of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// It gets something in front on the host.
    Prefix,
    /// It is the same.
    Ok,
    /// The guest may not have it.
    Bad,
    /// The guest is told that there are no such attributes.
    Unsupported,
}

/// Rules that are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Counted from one. `None`: all of them together.
    rule: Option<usize>,
    why: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rule {
            Some(rule) => write!(f, "rule {rule}: {}", self.why),
            None => f.write_str(&self.why),
        }
    }
}

impl std::error::Error for Wrong {}

impl FromStr for XattrMap {
    type Err = Wrong;

    fn from_str(text: &str) -> Result<XattrMap, Wrong> {
        let (mut rules, mut number) = (Vec::new(), 0_usize);
        let mut rest = text.trim();
        while !rest.is_empty() {
            number = number.saturating_add(1);
            rest = one(rest, &mut rules).map_err(|why| Wrong { rule: Some(number), why })?;
        }
        let for_all = |about: fn(&Rule) -> Option<&[u8]>| rules.iter().filter_map(about).any(<[u8]>::is_empty);
        let end = "the last one has to be about all that is left, as :ok:all::: or :bad:all::: is";
        let missing = if rules.is_empty() {
            "there is none"
        } else if !for_all(Rule::client_names) {
            "no rule is about all names that the guest may say"
        } else if !for_all(Rule::server_names) {
            "no rule is about all names that the host may list"
        } else {
            return Ok(XattrMap { capability: capability(&rules), rules: rules.into() });
        };
        Err(Wrong { rule: None, why: format!("{missing}: {end}") })
    }
}

/// Takes one rule, which begins with the character that parts its fields. Gives what follows it.
fn one<'a>(text: &'a str, rules: &mut Vec<Rule>) -> Result<&'a str, String> {
    let between = text.chars().next().unwrap_or(':');
    let mut rest = text.strip_prefix(between).unwrap_or_default();
    let mut field = |what: &str| -> Result<&'a str, String> {
        let (field, after) = rest
            .split_once(between)
            .ok_or_else(|| format!("it ends before its {what} does, for which it takes a '{between}'"))?;
        rest = after;
        Ok(field)
    };
    let does = match field("type")? {
        "prefix" => Some(Does::Prefix),
        "ok" => Some(Does::Ok),
        "bad" => Some(Does::Bad),
        "unsupported" => Some(Does::Unsupported),
        "map" => None,
        other => return Err(format!("the type {other:?} is none of prefix, ok, bad, unsupported, map")),
    };
    let (client, server) = match does.map(|_| field("scope")).transpose()? {
        Some("client") => (true, false),
        Some("server") => (false, true),
        Some("all") | None => (true, true),
        Some(other) => return Err(format!("the scope {other:?} is none of client, server, all")),
    };
    let (key, prepend) = (field("key")?.as_bytes(), field("prepend")?.as_bytes());
    let rest = rest.trim_start();
    let rule = |does, key: &[u8], prepend: &[u8]| Rule { does, client, server, key: key.into(), prepend: prepend.into() };
    match does {
        Some(does) => rules.push(rule(does, key, prepend)),
        None if !rest.is_empty() => return Err("a map has to be the last rule".to_owned()),
        None => {
            rules.push(rule(Does::Prefix, key, prepend));
            // Those that have the names of others on the other side are out of reach from either.
            if !key.is_empty() {
                rules.push(rule(Does::Bad, prepend, key));
            }
            rules.push(rule(if key.is_empty() { Does::Bad } else { Does::Ok }, b"", b""));
        }
    }
    Ok(rest)
}

/// What capabilities are called, if that is not what the kernel looks for.
fn capability(rules: &[Rule]) -> Option<CString> {
    let mut room = [0; MAX_NAME + 1];
    let name = to_host(rules, CAPABILITY, &mut room).ok().filter(|name| *name != CAPABILITY)?;
    Some(name.to_owned())
}

fn to_host<'a>(rules: &[Rule], name: &'a CStr, room: &'a mut Room) -> Result<&'a CStr, Errno> {
    let bytes = name.to_bytes();
    let about = |rule: &&Rule| rule.client_names().is_some_and(|key| bytes.starts_with(key));
    // There is one for each.
    let rule = rules.iter().find(about).ok_or(Errno::PERM)?;
    match rule.does {
        Does::Ok => Ok(name),
        Does::Bad => Err(Errno::PERM),
        Does::Unsupported => Err(Errno::OPNOTSUPP),
        Does::Prefix => {
            let whole = name.to_bytes_with_nul();
            let (front, back) = room.split_at_mut_checked(rule.prepend.len()).ok_or(Errno::RANGE)?;
            front.copy_from_slice(&rule.prepend);
            back.get_mut(..whole.len()).ok_or(Errno::RANGE)?.copy_from_slice(whole);
            CStr::from_bytes_until_nul(room).map_err(|_| Errno::RANGE)
        }
    }
}

impl Rule {
    /// How the names begin that it is about, if the guest says them.
    fn client_names(&self) -> Option<&[u8]> {
        self.client.then_some(&*self.key)
    }

    /// The same of names that the host lists.
    fn server_names(&self) -> Option<&[u8]> {
        self.server.then_some(&*self.prepend)
    }
}

impl XattrMap {
    /// What the host calls an attribute.
    ///
    /// # Errors
    /// `EPERM` or `EOPNOTSUPP` where a rule says so, `ERANGE` if the name becomes too long.
    pub(crate) fn to_host<'a>(&self, name: &'a CStr, room: &'a mut Room) -> Result<&'a CStr, Errno> {
        to_host(&self.rules, name, room)
    }

    /// What the guest calls an attribute; nothing: it is not to know of it.
    fn to_guest<'a>(&self, name: &'a [u8]) -> &'a [u8] {
        let about = |rule: &&Rule| rule.server_names().is_some_and(|prepend| name.starts_with(prepend));
        match self.rules.iter().find(about).map(|rule| (rule.does, rule.prepend.len())) {
            Some((Does::Ok, _)) => name,
            Some((Does::Prefix, front)) => name.get(front..).unwrap_or_default(),
            Some((Does::Bad | Does::Unsupported, _)) | None => b"",
        }
    }

    /// Makes the host's list of names the guest's, without those that `hide` is true of. Gives how long it is then.
    pub(crate) fn list(&self, list: &mut [u8], hide: impl Fn(&[u8]) -> bool) -> usize {
        let (mut read, mut written) = (0_usize, 0_usize);
        while let Some(rest) = list.get(read..)
            && let Some(len) = rest.iter().position(|byte| *byte == 0)
        {
            let name = rest.get(..len).unwrap_or_default();
            let told = self.to_guest(name);
            let kept = if hide(told) { 0 } else { told.len() };
            // What the guest is told is the end of what the host says.
            let end = read.saturating_add(len);
            if kept > 0 {
                list.copy_within(end.saturating_sub(kept)..=end, written);
                written = written.saturating_add(kept).saturating_add(1);
            }
            read = end.saturating_add(1);
        }
        written
    }

    /// What a file's capabilities are called on the host, if the kernel does not know them by that.
    pub(crate) fn capability(&self) -> Option<&CStr> {
        self.capability.as_deref()
    }

    /// Whether an attribute has the same name on both sides.
    pub(crate) fn passes(&self, name: &CStr) -> bool {
        self.to_host(name, &mut [0; MAX_NAME + 1]) == Ok(name) && self.to_guest(name.to_bytes()) == name.to_bytes()
    }
}

#[cfg(test)]
mod tests;
