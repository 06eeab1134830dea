//! The engine against a model, against QEMU's, against crashes, and against images made to hurt.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on fails; images here are small"
)]

#[path = "it/crash.rs"]
mod crash;
#[path = "it/differential.rs"]
mod differential;
#[path = "it/faults.rs"]
mod faults;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "it/scenarios.rs"]
mod scenarios;
#[path = "it/support.rs"]
mod support;
#[path = "it/torture.rs"]
mod torture;
