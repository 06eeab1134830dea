//! The table of targets.

use crate::bytes::Bytes;
use crate::{images, messages, parsers, peers, registers, rings};

/// A target: its name, and what it does with any bytes.
pub type Target = (&'static str, fn(Bytes<'_>));

/// All of them. Each has a program of its name in `fuzz_targets/`.
pub const TARGETS: [Target; 16] = [
    ("backend_messages", peers::backend),
    ("chain", rings::chain),
    ("frontend_messages", peers::frontend),
    ("inflight", rings::inflight),
    ("kernel", parsers::kernel),
    ("machine_file", parsers::machine_file),
    ("metrics_page", parsers::metrics_page),
    ("qcow2_header", images::header),
    ("qcow2_tables", images::tables),
    ("queue", rings::queue),
    ("registers", registers::registers),
    ("request_blk", parsers::blk),
    ("request_console", parsers::console),
    ("request_rng", parsers::rng),
    ("request_virtiofsd", messages::virtiofsd),
    ("state_virtiofsd", messages::state),
];

/// Runs one of them.
///
/// # Panics
/// When there is none of this name, or when it finds a mistake.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of that name");
    target(Bytes::new(data));
}
