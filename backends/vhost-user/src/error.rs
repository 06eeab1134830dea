//! What can go wrong on a connection, said as the sentence a person reads.

use std::io;
use std::time::Duration;

/// An error of a vhost-user connection. Each ends the connection unless its text says that the request was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The peer closed its end.
    #[error("The peer closed the connection")]
    Closed,
    /// Nothing, or only half of a message, came within the deadline.
    #[error("The peer did not answer {what} within {} ms", .limit.as_millis())]
    Deadline {
        /// The request that was waited for.
        what: String,
        /// How long it was given.
        limit: Duration,
    },
    /// The socket itself failed.
    #[error("Cannot {what}")]
    Socket {
        /// What was being done.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A message that no vhost-user peer would send: the other end speaks another protocol, or means harm.
    #[error("The peer sent no valid vhost-user message: {0}")]
    Malformed(String),
    /// A well-formed message that is not allowed now, or whose content cannot be.
    #[error("Request {request} was refused: {reason}")]
    Refused {
        /// The name of the request.
        request: String,
        /// Why.
        reason: String,
    },
    /// The backend answered a request with a failure.
    #[error("The backend could not carry out {0}")]
    Failed(String),
    /// A feature that is needed is not offered, or one is gone after a reconnection.
    #[error("The backend lacks {0}")]
    Missing(String),
    /// There is no connection at the moment.
    #[error("The device has no backend at the moment")]
    Disconnected,
    /// A problem with the guest memory the peer announced.
    #[error("Cannot use the announced guest memory")]
    Memory(#[source] virtio::memory::Error),
}

impl Error {
    pub(crate) fn socket(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        move |errno| Error::Socket { what, source: errno.into() }
    }
}
