//! Where frontends come from.

use std::fs::Permissions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{CWD, FileType, RenameFlags};
use rustix::net::sockopt;

use crate::args::{Base, Socket};

/// A socket that is connected, or one on which connections come in.
#[derive(Debug)]
pub(crate) enum Endpoint {
    Connected(UnixStream),
    Listening(UnixListener),
}

impl Endpoint {
    /// Those of all these sockets, in their order.
    pub(crate) fn open_all(sockets: &[Socket], base: &Base) -> Result<Vec<Endpoint>> {
        let mut bound = base.listener_fd.iter().copied();
        let open = |socket: &Socket| Endpoint::open(socket, socket.socket_path.as_ref().and_then(|_| bound.next()));
        sockets.iter().map(open).collect()
    }

    fn open(socket: &Socket, listener: Option<RawFd>) -> Result<Endpoint> {
        match (&socket.socket_path, listener.or(socket.fd)) {
            (_, Some(fd)) => {
                let socket = sandbox::inherited(fd).ok_or_else(|| anyhow!("Descriptor {fd} of --fd is not open"))?;
                from_fd(socket).with_context(|| format!("Cannot use descriptor {fd} of --fd"))
            }
            (Some(path), None) => listen(path).map(Endpoint::Listening),
            (None, None) => bail!("Neither --socket-path nor --fd is given"),
        }
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Endpoint::Connected(stream) => stream.as_fd(),
            Endpoint::Listening(listener) => listener.as_fd(),
        }
    }
}

fn from_fd(fd: OwnedFd) -> Result<Endpoint> {
    let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        bail!("it is no socket");
    }
    let listening = sockopt::socket_acceptconn(&fd).map_err(io::Error::from)?;
    Ok(if listening { Endpoint::Listening(fd.into()) } else { Endpoint::Connected(fd.into()) })
}

/// Listens on a unix socket at `path`. A socket that a dead process has left there is replaced.
///
/// The path appears when a connection can be made, not before: whoever waits for it need not try again.
///
/// # Errors
/// When there is a file that is no socket, another process listens, or the path cannot be used.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let (listener, mut name) = Name::bind(path)?;
    let appeared = name.appear();
    if appeared.is_err() {
        name.remove();
    }
    appeared.map(|()| listener)
}

/// The name of a socket that listens: another one until it is to appear under its own.
#[derive(Debug)]
pub(crate) struct Name {
    path: PathBuf,
    /// What it is until then.
    aside: Option<PathBuf>,
}

impl Name {
    /// Binds a socket that is to appear at `path`.
    pub(crate) fn bind(path: &Path) -> Result<(UnixListener, Name)> {
        let aside = aside(path);
        // The second was left by a process that died before it served.
        for name in [path, &aside] {
            if name.symlink_metadata().is_ok() {
                remove_stale(name)?;
            }
        }
        let bound = match UnixListener::bind(&aside) {
            Ok(listener) => Ok((listener, Some(aside))),
            // The other name may be the longer one, and too long for a socket.
            Err(error) if error.kind() == ErrorKind::InvalidInput => UnixListener::bind(path).map(|listener| (listener, None)),
            Err(error) => Err(error),
        };
        let (listener, aside) = bound.with_context(|| format!("Cannot listen on {}", path.display()))?;
        Ok((listener, Name { path: path.to_owned(), aside }))
    }

    /// The path appears, if nothing else has by now.
    pub(crate) fn appear(&mut self) -> Result<()> {
        let Some(aside) = &self.aside else { return Ok(()) };
        let moved = rustix::fs::renameat_with(CWD, aside, CWD, &self.path, RenameFlags::NOREPLACE);
        moved.map_err(io::Error::from).with_context(|| format!("Cannot listen on {}", self.path.display()))?;
        self.aside = None;
        Ok(())
    }

    /// Members of a group may connect, too.
    pub(crate) fn give_to(&self, group: &str) -> Result<()> {
        let what = || format!("Cannot give {} to the group {group} of --socket-group", self.path.display());
        let number = number_of(group).with_context(what)?;
        chown(self.current(), None, Some(number)).with_context(|| match number {
            _ if rustix::process::geteuid().is_root() => what(),
            _ => format!("{}, which its user has to be a member of (usermod -aG), or root", what()),
        })?;
        std::fs::set_permissions(self.current(), Permissions::from_mode(0o660)).with_context(what)
    }

    fn current(&self) -> &Path {
        self.aside.as_ref().unwrap_or(&self.path)
    }

    /// Takes it away, whichever it is.
    pub(crate) fn remove(&self) {
        let _already_gone = rustix::fs::unlink(self.current());
    }
}

/// The number of a group, which may be given by that, or by a name of this host's own table.
fn number_of(group: &str) -> Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let table = std::fs::read_to_string("/etc/group").context("Cannot read /etc/group")?;
    let number = |line: &str| {
        let mut words = line.split(':');
        let is = words.next()? == group;
        words.nth(1)?.parse().ok().filter(|_| is)
    };
    table
        .lines()
        .find_map(number)
        .ok_or_else(|| anyhow!("/etc/group has no such group; one that is kept elsewhere can be given by its number"))
}

/// A name beside `path`, always the same one: process ids are no help, since each of us is number 1 of its namespace.
fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}~"))
}

/// Removes a socket that a process has left behind, and nothing else.
fn remove_stale(path: &Path) -> Result<()> {
    let what = || format!("Cannot listen on {}", path.display());
    let file = path.symlink_metadata().with_context(what)?;
    if !file.file_type().is_socket() {
        bail!("{}: there is a file that is no socket", what());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path).with_context(what),
        _ => bail!("{}: another process listens there", what()),
    }
}
