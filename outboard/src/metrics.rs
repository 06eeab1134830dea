//! What a running machine can be seen to do: what the kernel says of its processes, and what they count themselves.
//!
//! Three sources, and what each is worth: the composer knows which process serves what and how often it was started again; the
//! kernel knows processor time and memory ([`usage`]); a process counts its own requests, in a page that it shares with
//! the composer. A process that a guest has taken over writes what it likes there, so a name counts only if it begins with that
//! of the process's program, and nothing is decided by a counter.

pub mod server;
pub mod text;
pub mod usage;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use virtio::metrics::page::Shown;
use virtio::metrics::{Kind, Label};

use crate::control::report::Process;
use crate::supervisor::programs::VMM;
use usage::Usage;

/// A moment of a process.
#[derive(Debug)]
pub struct Sample {
    /// Who it is.
    pub process: Process,
    /// What it uses, if it runs.
    pub usage: Option<Usage>,
    /// What it counts.
    pub shown: Vec<Shown>,
}

/// The same for a client of the control socket, with the queues of a device added up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stats {
    /// Who it is.
    #[serde(flatten)]
    pub process: Process,
    /// What it uses, if it runs.
    pub usage: Option<Usage>,
    /// What it counts.
    pub counters: BTreeMap<String, u64>,
}

/// The counters a process may call its own: those of its program, and those of the rings if it serves a device. A device process
/// only counts, and knows no other device: the first of its kind says what a name means, and one that lied about that would take
/// the name away from all others.
pub fn own(program: &str, shown: Vec<Shown>) -> Vec<Shown> {
    let prefix = program.strip_prefix("outboard-").map(|name| format!("{name}_"));
    let is_own = |one: &Shown| {
        let is_prefixed = prefix.as_ref().is_some_and(|prefix| one.name.starts_with(prefix));
        match program {
            VMM => is_prefixed,
            _ => (is_prefixed || one.name.starts_with("queue_")) && one.kind == Kind::Counter && one.label != Label::Device,
        }
    };
    shown.into_iter().filter(is_own).collect()
}

impl From<Sample> for Stats {
    fn from(sample: Sample) -> Self {
        let sum = |one: Shown| (one.name, one.values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value)));
        Self { process: sample.process, usage: sample.usage, counters: sample.shown.into_iter().map(sum).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_counts_for_itself_alone() {
        let one = |name: &str| Shown {
            name: name.to_owned(),
            help: String::new(),
            kind: Kind::Counter,
            label: Label::None,
            values: vec![1],
        };
        let shown = ["blk_reads", "queue_kicks", "process_restarts", "rng_bytes"].map(one).to_vec();
        let names: Vec<String> = own("outboard-blk", shown.clone()).into_iter().map(|one| one.name).collect();
        assert_eq!(names, ["blk_reads", "queue_kicks"]);
        let lie = |kind, label| Shown { kind, label, ..shown[0].clone() };
        let lies = vec![lie(Kind::Gauge, Label::None), lie(Kind::Counter, Label::Device)];
        assert_eq!(own("outboard-blk", lies), []);
        assert_eq!(own(VMM, shown), [], "the VMM serves no queue");
    }
}
