//! WIRE: both ends of the vhost-user protocol.
//!
//! # Theory of operation
//!
//! A vhost-user connection is one stream socket between a *frontend* (who owns the guest's memory and its vCPUs) and a
//! *backend* (who serves the virtqueues of one device). The frontend asks, the backend answers; a second socket, handed over
//! by the frontend, carries the few things a backend may ask for.
//!
//! | file | what lives there | who uses it |
//! |---|---|---|
//! | [`wire`] | a message, its descriptors, and the deadline under which it is sent or received whole | both ends |
//! | [`frontend`] | one connection, one method a request | [`session`], tests |
//! | [`session`] | what a frontend remembers of a device across connections: features, memory, rings, the in-flight log | the VMM, the probe |
//! | [`backend`] | the state machine of a device process: which request is allowed when | every device process |
//! | [`features`] | the protocol features of either end, and what negotiating each means | both ends |
//!
//! The numbers and the layouts of the messages are those of the `vhost` crate. Its endpoints are not used: they block in
//! `recvmsg` without a limit of time, and their backend cannot refuse to change a ring that runs. Neither end here trusts the
//! other: a message has a deadline, a size limit and a limit of descriptors; what was not asked for is closed; a ring that runs
//! cannot be reconfigured; memory is mapped only after its size and its seals have been looked at.

pub mod args;
pub mod backend;
pub mod features;
pub mod frontend;
pub mod session;
pub mod wire;

mod error;

pub use backend::Backend;
pub use error::Error;
pub use frontend::Frontend;
pub use virtio::event;

pub use session::{BackendEvent, Deadlines, Notifiers, Region, Ring, Session, Setup};

/// What every call of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;
