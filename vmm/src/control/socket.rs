//! The control socket: packets of JSON, one object each (docs/architecture.md).
//!
//! Its owner is trusted to end the machine, not to be quick: nothing here waits. A packet that does not fit into its
//! socket's buffer is dropped, and so is one that is longer than `LONGEST`.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

/// No command is nearly as long.
const LONGEST: usize = 4096;

/// What the owner of the machine may say.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// A new connection for a device comes with this.
    Replug {
        /// Its name.
        device: String,
    },
    /// Press the power button.
    PowerButton,
    /// Reset the machine.
    Reset,
    /// End at once.
    Quit,
}

/// What it is told.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event<'a> {
    /// The first processor is about to run.
    Started,
    /// A device's connection.
    Device {
        /// Its name.
        device: &'a str,
        /// "connected", "lost" or "degraded".
        state: &'a str,
        /// Why, unless it is connected.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<&'a str>,
    },
    /// What the guest did.
    Guest {
        /// "reset", "shutdown", "panic" or "triple-fault".
        what: &'a str,
    },
    /// A command that could not be carried out.
    Error {
        /// A sentence.
        message: String,
    },
}

/// What was on the socket.
#[derive(Debug)]
pub enum Received {
    /// Nothing after all.
    Nothing,
    /// A command, with the socket that came along.
    Command(Command, Option<UnixStream>),
    /// Something that is no command; the sentence says so.
    Wrong(String),
    /// The other end is gone.
    Closed,
}

/// Our end.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes an inherited descriptor.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// For the poll set.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// One packet.
    pub fn receive(&self) -> Received {
        let mut bytes = [0u8; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let len = match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(message) => message.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Received::Nothing,
            Err(_) => return Received::Closed,
        };
        if len == 0 {
            return Received::Closed;
        }
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        // Descriptors beyond the first are closed as they are dropped.
        let stream = fds.flatten().collect::<Vec<_>>().into_iter().next().map(UnixStream::from);
        match serde_json::from_slice(bytes.get(..len).unwrap_or_default()) {
            Ok(command) => Received::Command(command, stream),
            Err(e) => Received::Wrong(format!("Cannot understand the command: {e}")),
        }
    }

    /// One packet.
    pub fn send(&self, event: &Event<'_>) {
        let Ok(bytes) = serde_json::to_vec(event) else { return };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut SendAncillaryBuffer::default(), flags);
        if let Err(e) = sent {
            tracing::debug!("Cannot send an event: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SendAncillaryMessage, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (ControlSocket, OwnedFd) {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (ControlSocket::new(a), b)
    }

    #[test]
    fn commands_are_read_and_nonsense_is_answered() {
        let (socket, peer) = pair();
        assert!(matches!(socket.receive(), Received::Nothing));
        rustix::io::write(&peer, br#"{"command":"power-button"}"#).unwrap();
        assert!(matches!(socket.receive(), Received::Command(Command::PowerButton, None)));
        for bad in [&b"{"[..], b"{\"command\":\"dance\"}", b"\xff\xff", b"{\"command\":\"replug\"}", &[b'x'; 9000]] {
            rustix::io::write(&peer, bad).unwrap();
            assert!(matches!(socket.receive(), Received::Wrong(_)));
        }
        drop(peer);
        assert!(matches!(socket.receive(), Received::Closed));
    }

    #[test]
    fn a_replug_brings_its_socket() {
        let (socket, peer) = pair();
        let (device, _other) = UnixStream::pair().unwrap();
        let fds = [device.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let text = br#"{"command":"replug","device":"disk0"}"#;
        sendmsg(&peer, &[IoSlice::new(text)], &mut control, SendFlags::empty()).unwrap();
        let Received::Command(Command::Replug { device }, Some(_)) = socket.receive() else { panic!() };
        assert_eq!(device, "disk0");
    }

    #[test]
    fn events_are_what_the_contract_says() {
        let event = Event::Device { device: "disk0", state: "lost", reason: Some("gone") };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(text, r#"{"event":"device","device":"disk0","state":"lost","reason":"gone"}"#);
        assert_eq!(serde_json::to_string(&Event::Started).unwrap(), r#"{"event":"started"}"#);
        let event = serde_json::to_string(&Event::Guest { what: "triple-fault" }).unwrap();
        assert_eq!(event, r#"{"event":"guest","what":"triple-fault"}"#);
    }

    #[test]
    fn a_full_socket_does_not_wait() {
        let (socket, _peer) = pair();
        for _ in 0..100_000 {
            socket.send(&Event::Started);
        }
    }
}
