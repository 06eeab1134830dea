//! The composer's end of the VMM's control socket: JSON objects, one in a packet, sometimes with a descriptor.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

/// No event is longer: the longest field is a sentence.
const LONGEST_EVENT: usize = 16 * 1024;

/// To the VMM.
#[derive(Debug, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command<'a> {
    /// A new connection for a device; comes with a descriptor.
    Replug {
        /// The device's name.
        device: &'a str,
    },
    /// Press the power button.
    PowerButton,
    /// Reset the machine.
    Reset,
    /// End at once.
    Quit,
}

/// From the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first processor is about to run.
    Started,
    /// A device's connection has changed.
    Device {
        /// Its name.
        device: String,
        /// What it is now.
        state: DeviceState,
        /// Why.
        #[serde(default)]
        reason: Option<String>,
    },
    /// The guest did something the composer should know.
    Guest {
        /// What it did.
        what: String,
    },
    /// A command could not be carried out.
    Error {
        /// Why.
        message: String,
    },
}

/// A device's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// The VMM and the backend have agreed.
    Connected,
    /// The connection is gone.
    Lost,
    /// It works, but not fully.
    Degraded,
}

/// The socket.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
}

impl Link {
    /// A pair: our end, and the VMM's.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .context("Cannot make the VMM's control socket")?;
        Ok((Self { socket: ours }, theirs))
    }

    /// What to wait for.
    pub fn source(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a command. A VMM that does not read its socket is not waited for.
    pub fn send(&self, command: &Command<'_>, descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
        let text = serde_json::to_vec(command).context("Cannot write a command")?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.socket, &[IoSlice::new(&text)], &mut control, flags).context("Cannot reach the VMM")?;
        Ok(())
    }

    /// The next event, if there is one. The inner error is an event nobody understands.
    pub fn receive(&self) -> Option<Result<Event>> {
        let mut buffer = vec![0_u8; LONGEST_EVENT];
        let mut control = RecvAncillaryBuffer::default();
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags) {
            Ok(received) => received.bytes,
            Err(Errno::INTR) => return self.receive(),
            Err(_) => return None,
        };
        if received == 0 {
            return None;
        }
        let text = buffer.get(..received).unwrap_or_default();
        Some(serde_json::from_slice(text).context("The VMM sent an event that is not understood"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_events_have_the_agreed_form() {
        let text = |command: &Command<'_>| serde_json::to_string(command).unwrap();
        assert_eq!(text(&Command::Replug { device: "disk0" }), r#"{"command":"replug","device":"disk0"}"#);
        assert_eq!(text(&Command::PowerButton), r#"{"command":"power-button"}"#);
        let event: Event = serde_json::from_str(r#"{"event":"device","device":"d","state":"lost","reason":"hung up"}"#).unwrap();
        let reason = Some("hung up".to_owned());
        assert_eq!(event, Event::Device { device: "d".to_owned(), state: DeviceState::Lost, reason });
        assert_eq!(serde_json::from_str::<Event>(r#"{"event":"started"}"#).unwrap(), Event::Started);
    }

    #[test]
    fn a_descriptor_travels_with_its_command() {
        let (link, other) = Link::pair().unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        link.send(&Command::Replug { device: "d" }, Some(reader.as_fd())).unwrap();
        let mut buffer = [0_u8; 128];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT;
        let got = recvmsg(&other, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags).unwrap();
        assert_eq!(&buffer[..got.bytes], br#"{"command":"replug","device":"d"}"#);
        assert_eq!(control.drain().count(), 1);
    }
}
