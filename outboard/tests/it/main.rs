//! The composer's tests, with stand-ins for the other programs (see `examples/pretend.rs`): no guest, no KVM.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod attach;
mod bad_input;
mod check;
mod disks;
mod images;
mod life;
mod machine;
mod pages;
mod view;
