//! `--also`: more shares in one process.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use daemon::Socket;

use super::{Config, Place, TAG};

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Also {
    path: PathBuf,
    socket: Result<PathBuf, RawFd>,
    tag: Option<String>,
    readonly: bool,
}

impl FromStr for Also {
    type Err = String;

    fn from_str(text: &str) -> Result<Also, String> {
        let (mut path, mut socket, mut tag, mut readonly) = (None, None, None, false);
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("path", value)) if !value.is_empty() => path = Some(value.into()),
                Some(("socket", value)) if !value.is_empty() => socket = Some(Ok(value.into())),
                Some(("fd", value)) => socket = Some(Err(descriptor(value)?)),
                Some(("tag", value)) if (1..=TAG).contains(&value.len()) => tag = Some(value.to_owned()),
                None if word == "readonly" => readonly = true,
                _ => {
                    return Err(format!(
                        "{word:?} is none of path=DIR, socket=PATH, fd=FD, tag=NAME (up to {TAG} bytes), readonly"
                    ));
                }
            }
        }
        let path = path.ok_or("path=DIR is missing")?;
        Ok(Also { path, socket: socket.ok_or("socket=PATH or fd=FD is missing")?, tag, readonly })
    }
}

fn descriptor(text: &str) -> Result<RawFd, String> {
    text.parse().ok().filter(|fd| *fd > 2).ok_or_else(|| format!("{text:?} is not the number of a descriptor from 3 on"))
}

impl Also {
    /// Where its frontends come from.
    pub(super) fn socket(&self) -> Socket {
        Socket { socket_path: self.socket.clone().ok(), fd: self.socket.clone().err(), print_capabilities: false }
    }

    /// What it means, where everything else is as with the first.
    pub(super) fn like(&self, first: &Config) -> Config {
        let mut config = Config { place: Place::Path(self.path.clone()), tag: self.tag.clone(), ..first.clone() };
        config.settings.read_only |= self.readonly;
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_share_is_a_list_of_words() {
        let all = "path=/a,socket=/s,tag=t,readonly".parse::<Also>().unwrap();
        assert_eq!(all, Also { path: "/a".into(), socket: Ok("/s".into()), tag: Some("t".into()), readonly: true });
        assert_eq!("fd=7,path=b".parse::<Also>().unwrap().socket().fd, Some(7));
        for (text, why) in [
            ("path=/a", "socket=PATH or fd=FD is missing"),
            ("socket=/s", "path=DIR is missing"),
            ("path=/a,fd=2", "\"2\" is not the number of a descriptor from 3 on"),
        ] {
            assert_eq!(text.parse::<Also>().unwrap_err(), why);
        }
        for text in ["path=/a,socket=/s,tag=", "path=,socket=/s", "path=/a,socket=/s,writable", "path=/a,,socket=/s"] {
            assert!(text.parse::<Also>().unwrap_err().contains("is none of path=DIR"), "{text}");
        }
    }
}
