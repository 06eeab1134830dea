//! Fuzz targets: everything that turns an attacker's bytes into something of ours.
//!
//! # Theory of operation
//!
//! Each target is a function in [`targets`] that takes any bytes and must return: no panic, no endless loop, no allocation
//! without bound, and none of its own assertions may fail. The folder has the layout of cargo-fuzz: `fuzz_targets/` holds one
//! small program per target, built with the feature `libfuzzer`; `corpus/` holds what was worth keeping, one packed file per
//! target; a crash that was found lies in `regressions/`, and is named for what it showed.
//!
//! `cargo xtask fuzz --time 60` builds and runs the fuzzers. Without them this crate is a test: each kept input and each
//! regression is run again with every run of the suite (`tests/replay.rs`).
//!
//! | target | whose bytes | what reads them |
//! |---|---|---|
//! | `chain` | guest | the walk over descriptors, direct and indirect |
//! | `queue` | guest | a whole ring, rewritten while it is served |
//! | `inflight` | predecessor, frontend | recovery from an in-flight log |
//! | `frontend_messages` | frontend | the backend's state machine, with descriptors |
//! | `backend_messages` | backend | the frontend's session, with descriptors |
//! | `request_blk`, `request_console`, `request_rng` | guest | each device's `request.rs` |
//! | `request_virtiofsd` | guest | FUSE messages, spread over any descriptors |
//! | `state_virtiofsd` | another host, frontend | what a file server is told of a guest that comes |
//! | `machine_file` | whoever wrote it | the machine file |
//! | `metrics_page` | device process | the counters it shows the composer |
//! | `registers` | guest | PCI configuration space and virtio-pci registers |
//! | `qcow2_header`, `qcow2_tables` | whoever made the image | disk images, read, written to, checked and repaired |
//! | `kernel` | whoever made the image | kernel images |

pub mod bytes;
pub mod corpus;
pub mod images;
pub mod messages;
pub mod parsers;
pub mod peers;
pub mod registers;
pub mod rings;
pub mod targets;

pub use targets::{TARGETS, run};
