//! What a socket of the composer's is, whatever is spoken on it: a listening end, and some clients that its loop serves.
//!
//! Nothing here waits. There are only so many clients, and one that is done, gone or to be dropped says so.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result};

/// One client.
pub(crate) trait Client {
    /// Its connection.
    fn stream(&self) -> &UnixStream;
    /// Whether it can be forgotten.
    fn is_over(&self) -> bool;
}

/// The listening end with its clients.
#[derive(Debug)]
pub(crate) struct Clients<C> {
    listener: UnixListener,
    most: usize,
    clients: Vec<C>,
}

impl<C: Client> Clients<C> {
    /// Listens at a path, for so many at a time.
    pub(crate) fn new(path: &Path, most: usize) -> Result<Self> {
        let about = || format!("Cannot listen on {}", path.display());
        let listener = UnixListener::bind(path).with_context(about)?;
        listener.set_nonblocking(true).with_context(about)?;
        Ok(Self { listener, most, clients: Vec::new() })
    }

    /// What to wait for: new clients first, then each client.
    pub(crate) fn sources(&self) -> (BorrowedFd<'_>, impl Iterator<Item = BorrowedFd<'_>>) {
        (self.listener.as_fd(), self.clients.iter().map(|client| client.stream().as_fd()))
    }

    /// Takes in a new client.
    pub(crate) fn accept(&mut self, new: impl FnOnce(UnixStream) -> C) {
        let Ok((stream, _)) = self.listener.accept() else {
            return;
        };
        if self.clients.len() >= self.most || stream.set_nonblocking(true).is_err() {
            return; // closed by being dropped
        }
        self.clients.push(new(stream));
    }

    /// The client of a number, until the next sweep.
    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut C> {
        self.clients.get_mut(index)
    }

    /// All of them.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, C> {
        self.clients.iter()
    }

    /// All of them.
    pub(crate) fn iter_mut(&mut self) -> std::slice::IterMut<'_, C> {
        self.clients.iter_mut()
    }

    /// Forgets the clients that are over. Only between two rounds of the loop, because it changes their numbers.
    pub(crate) fn sweep(&mut self) {
        self.clients.retain(|client| !client.is_over());
    }
}

/// Adds what has arrived on a connection. `false`: it has ended.
pub(crate) fn read<const N: usize>(mut stream: &UnixStream, to: &mut Vec<u8>) -> bool {
    let mut buffer = [0_u8; N];
    match stream.read(&mut buffer) {
        Ok(0) => false,
        Ok(count) => {
            to.extend_from_slice(buffer.get(..count).unwrap_or_default());
            true
        }
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}
