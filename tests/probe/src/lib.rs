//! A guest without a VM: the driver's side of virtio, for any vhost-user backend.
//!
//! # Theory of operation
//!
//! The probe owns a piece of "guest" memory, connects to a backend as a VMM would ([`vhost_user::Session`]), and drives the rings
//! as a guest's kernel would. Everything about rings is written here from the virtio specification, apart from our devices' side:
//! one misreading cannot agree with itself.
//!
//! | file | what lives there |
//! |---|---|
//! | [`memory`] | guest memory at odd addresses, with holes and with regions that touch |
//! | [`ring`] | the driver's side of a split ring |
//! | [`link`] | a backend: connected to, or started and killed and started again |
//! | [`device`] | a session and its rings, negotiated and running |
//! | [`blk`], [`fs`], [`rng`] | drivers of devices |
//! | [`storm`] | kills under verified load |
//! | [`attack`] | frontends and guests that break the rules on purpose |
//!
//! The memory is the first trap: a backend that confuses guest physical addresses, the frontend's addresses and its own, or
//! that takes memory for one flat range, fails at once and not in production.

#![forbid(unsafe_code)]

pub mod args;
pub mod attack;
pub mod blk;
pub mod device;
pub mod fs;
pub mod link;
pub mod memory;
pub mod owner;
pub mod random;
pub mod ring;
pub mod rng;
pub mod storm;
