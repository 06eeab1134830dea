//! Where frontends come from.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{CWD, FileType, RenameFlags};
use rustix::net::sockopt;

use crate::args::Socket;

/// A socket that is connected, or one on which connections come in.
#[derive(Debug)]
pub(crate) enum Endpoint {
    Connected(UnixStream),
    Listening(UnixListener),
}

impl Endpoint {
    pub(crate) fn open(socket: &Socket) -> Result<Endpoint> {
        match (&socket.socket_path, socket.fd) {
            (Some(path), _) => listen(path).map(Endpoint::Listening),
            (None, Some(fd)) => {
                let socket = sandbox::inherited(fd).ok_or_else(|| anyhow!("Descriptor {fd} of --fd is not open"))?;
                from_fd(socket).with_context(|| format!("Cannot use descriptor {fd} of --fd"))
            }
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
/// The path appears when a connection can be made, not before: whoever waits for it need not try again. So the socket is made under
/// another name and moved.
///
/// # Errors
/// When there is a file that is no socket, another process listens, or the path cannot be used.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let aside = aside(path);
    // The second was left by a process that died in the middle of this function.
    for name in [path, &aside] {
        if name.symlink_metadata().is_ok() {
            remove_stale(name)?;
        }
    }
    let listener = match UnixListener::bind(&aside) {
        Ok(listener) => appear(&aside, path).map(|()| listener),
        // The other name may be the longer one, and too long for a socket.
        Err(error) if error.kind() == ErrorKind::InvalidInput => UnixListener::bind(path),
        Err(error) => Err(error),
    };
    listener.with_context(|| format!("Cannot listen on {}", path.display()))
}

/// A name beside `path`, always the same one: process ids are no help, since each of us is number 1 of its namespace.
fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}~"))
}

fn appear(aside: &Path, path: &Path) -> io::Result<()> {
    let moved = rustix::fs::renameat_with(CWD, aside, CWD, path, RenameFlags::NOREPLACE);
    if moved.is_err() {
        let _was_ours = std::fs::remove_file(aside);
    }
    Ok(moved?)
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
