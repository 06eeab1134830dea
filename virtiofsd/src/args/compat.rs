//! `-o OPTION[,OPTION...]`: how options were written once. They become the words that `--help` lists before anything is made of those.
//!
//! Whoever can add one of these to a command line could change what somebody else has said there (GHSA-rr59-xxvx-96qr: the directory that
//! is shared). So none of them changes anything: what is said by name, or said already, is not to be said again.

use std::ffi::OsString;

/// The options that one is about, by name, and what stands for it, if it is not what is so without it.
type Meaning = (&'static [&'static str], Option<String>);

/// The words of a command line, without these.
///
/// # Errors
/// What is wrong with one.
pub(super) fn words(words: Vec<OsString>) -> Result<Vec<OsString>, String> {
    let (mut named, mut options) = (Vec::new(), Vec::new());
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let list = match word.to_string_lossy().strip_prefix("-o") {
            // Without anything behind it, it is somebody else's to say so.
            Some("") => words.next(),
            Some(list) => Some(list.strip_prefix('=').unwrap_or(list).into()),
            None => None,
        };
        match list {
            Some(list) => options.push(list.into_string().map_err(|list| format!("-o {}: it is no text", list.display()))?),
            None => named.push(word),
        }
    }
    let mut said: Vec<&str> = Vec::new();
    let mut new = Vec::new();
    for option in options.iter().flat_map(|list| list.split(',')) {
        let (about, word) = meaning(option).ok_or_else(|| format!("-o {option}: there is no such option"))?;
        if let Some(name) = about.iter().find(|name| named.iter().any(|word| is(word, name))) {
            return Err(format!("-o {option} cannot be used with --{name}"));
        }
        if about.iter().any(|name| said.contains(name)) {
            return Err(format!("-o {option}: it cannot be said twice, nor its opposite"));
        }
        said.extend(about);
        new.extend(word.map(OsString::from));
    }
    named.extend(new);
    Ok(named)
}

/// Whether a word is the option of this name.
fn is(word: &OsString, name: &str) -> bool {
    let word = word.to_string_lossy();
    word.strip_prefix("--").and_then(|word| word.strip_prefix(name)).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

/// What an option means; nothing, if it is none.
fn meaning(option: &str) -> Option<Meaning> {
    let flag = |about: &'static [&'static str], word: &str| Some((about, Some(word.to_owned())));
    if let Some((key, value)) = option.split_once('=') {
        return with_value(key, value);
    }
    match option {
        "xattr" => flag(&["xattr"], "--xattr"),
        "no_xattr" => Some((&["xattr"], None)),
        "posix_acl" => flag(&["posix-acl"], "--posix-acl"),
        "no_posix_acl" => flag(&["posix-acl"], "--posix-acl=never"),
        "security_label" => flag(&["security-label"], "--security-label"),
        "no_security_label" => flag(&["security-label"], "--security-label=never"),
        "readdirplus" => Some((&["no-readdirplus"], None)),
        "no_readdirplus" => flag(&["no-readdirplus"], "--no-readdirplus"),
        "writeback" => flag(&["writeback"], "--writeback"),
        "no_writeback" => Some((&["writeback"], None)),
        "allow_direct_io" => flag(&["allow-direct-io"], "--allow-direct-io"),
        "no_allow_direct_io" => Some((&["allow-direct-io"], None)),
        "announce_submounts" => flag(&["announce-submounts", "no-announce-submounts"], "--announce-submounts"),
        "killpriv_v2" => flag(&["killpriv-v2", "no-killpriv-v2"], "--killpriv-v2"),
        "no_killpriv_v2" => flag(&["killpriv-v2", "no-killpriv-v2"], "--no-killpriv-v2"),
        // One of each kind of lock: both may be said.
        "no_posix_lock" | "no_flock" => Some((&[], None)),
        _ => None,
    }
}

fn with_value(key: &str, value: &str) -> Option<Meaning> {
    let (about, value): (&'static [&'static str], &str) = match (key, value) {
        ("source", _) => (&["shared-dir"], value),
        ("cache", "none") => (&["cache"], "never"),
        ("cache", _) => (&["cache"], value),
        ("timeout", _) => (&["timeout"], value),
        ("xattrmap", _) => (&["xattrmap"], value),
        ("sandbox", _) => (&["sandbox"], value),
        ("modcaps", _) => (&["modcaps"], value),
        ("loglevel", "err") => (&["log-level"], "error"),
        ("loglevel", _) => (&["log-level"], value),
        _ => return None,
    };
    let name = about.first()?;
    Some((about, Some(format!("--{name}={value}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(line: &str) -> Result<String, String> {
        let made = words(line.split(' ').map(OsString::from).collect())?;
        Ok(made.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn each_becomes_what_it_is_called_now() {
        for (line, expected) in [
            ("fs --tag a -o source=/srv,cache=none -f", "fs --tag a -f --shared-dir=/srv --cache=never"),
            ("fs -oxattr -o=writeback,no_readdirplus", "fs --xattr --writeback --no-readdirplus"),
            ("fs -o no_xattr,readdirplus,no_writeback,no_allow_direct_io,no_posix_lock,no_flock", "fs"),
            ("fs -o xattrmap=:map::user.a=b.:,loglevel=err", "fs --xattrmap=:map::user.a=b.: --log-level=error"),
            ("fs -o posix_acl,security_label,killpriv_v2", "fs --posix-acl --security-label --killpriv-v2"),
            (
                "fs -o no_posix_acl,no_security_label,no_killpriv_v2",
                "fs --posix-acl=never --security-label=never --no-killpriv-v2",
            ),
            ("fs -o allow_direct_io,announce_submounts,timeout=5", "fs --allow-direct-io --announce-submounts --timeout=5"),
            (
                "fs -o sandbox=none,modcaps=+sys_admin,cache=auto,loglevel=debug",
                "fs --sandbox=none --modcaps=+sys_admin --cache=auto --log-level=debug",
            ),
            ("fs -o", "fs -o"),
        ] {
            assert_eq!(made(line).as_deref(), Ok(expected), "{line}");
        }
    }

    #[test]
    fn none_changes_what_was_said() {
        for (line, expected) in [
            ("fs --shared-dir /srv -o source=/", "-o source=/ cannot be used with --shared-dir"),
            ("fs -o source=/ --shared-dir=/srv", "-o source=/ cannot be used with --shared-dir"),
            ("fs -o source=/srv,xattr -o source=/", "-o source=/: it cannot be said twice, nor its opposite"),
            ("fs --xattr -o no_xattr", "-o no_xattr cannot be used with --xattr"),
            ("fs -o xattr,no_xattr", "-o no_xattr: it cannot be said twice, nor its opposite"),
            ("fs --no-killpriv-v2 -o killpriv_v2", "-o killpriv_v2 cannot be used with --no-killpriv-v2"),
            ("fs --no-readdirplus -o readdirplus", "-o readdirplus cannot be used with --no-readdirplus"),
            (
                "fs --no-announce-submounts -o announce_submounts",
                "-o announce_submounts cannot be used with --no-announce-submounts",
            ),
            ("fs -o vhost_user_socket=/s", "-o vhost_user_socket=/s: there is no such option"),
            ("fs -o xattr,", "-o : there is no such option"),
            ("fs -o Xattr", "-o Xattr: there is no such option"),
        ] {
            assert_eq!(made(line).unwrap_err(), expected, "{line}");
        }
    }
}
