//! What the kernel says a process uses.
//!
//! From `/proc/PID/stat` and `status`, which anybody may read, because what says more (`smaps_rollup`) walks every page of the
//! process: for a VMM that is the guest's whole memory. "Private" is its anonymous memory (`RssAnon`): what would be free
//! again if only this process ended. Guest memory is shared, and counted as resident in every process that has touched it.

use std::fs;

use rustix::param::clock_ticks_per_second;
use serde::{Deserialize, Serialize};

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time since it was started.
    pub cpu_seconds: f64,
    /// Bytes of memory it has, guest memory it has touched included.
    pub resident_bytes: u64,
    /// Bytes that nobody else has.
    pub private_bytes: u64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// Asks the kernel. `None`: it has ended.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Self::parse(&stat, &status)
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The program's name is in parentheses and may have any in itself.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut ticks = rest.split_whitespace().skip(11).map_while(|word| word.parse::<u64>().ok());
        let ticks = ticks.next()?.saturating_add(ticks.next()?);
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        #[expect(clippy::cast_precision_loss, reason = "53 bits of hundredths of a second")]
        let cpu_seconds = ticks as f64 / clock_ticks_per_second() as f64;
        let kib = |name| field(name).map(|kib| kib.saturating_mul(1024));
        let (resident_bytes, private_bytes) = (kib("VmRSS")?, kib("RssAnon")?);
        Some(Self { cpu_seconds, resident_bytes, private_bytes, threads: field("Threads")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_confuses_nobody() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 1 1 1";
        let status = "Name:\ta) b\nVmRSS:\t    2048 kB\nRssAnon:\t  512 kB\nThreads:\t3\n";
        let usage = Usage::parse(stat, status).unwrap();
        assert_eq!((usage.resident_bytes, usage.private_bytes, usage.threads), (2 << 20, 512 << 10, 3));
        assert!((usage.cpu_seconds - 3.0).abs() < 1e-9);
    }

    #[test]
    fn our_own_memory_is_seen() {
        let usage = Usage::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(usage.resident_bytes >= usage.private_bytes && usage.private_bytes > 0);
        assert_eq!(Usage::of(-1), None);
    }
}
