//! The system calls of a process that runs, counted by strace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bench::process::Running;

/// What is made to wait and to wake somebody up: how many there are depends on who is faster. Servers read and write files with other
/// calls than `read` and `write`, which are for event descriptors.
pub(super) const WAITING: [&str; 8] = ["ppoll", "poll", "epoll_wait", "epoll_pwait", "futex", "read", "write", "restart_syscall"];

/// Calls of all threads together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Calls {
    pub(super) all: f64,
    /// Without those of [`WAITING`].
    pub(super) work: f64,
}

/// A process whose calls are counted.
pub(super) struct Traced {
    strace: Running,
    output: PathBuf,
}

impl Traced {
    /// From when this returns on.
    pub(super) fn start(pid: u32, output: &Path) -> Result<Self> {
        let mut command = Command::new("strace");
        command.args(["-f", "-c", "-qq", "-p", &pid.to_string(), "-o"]).arg(output);
        let mut strace = Running::start(command)?;
        strace.wait_until("traces all threads", || is_traced(pid))?;
        Ok(Self { strace, output: output.to_path_buf() })
    }

    pub(super) fn end(self) -> Result<Calls> {
        drop(self.strace);
        let table = fs::read_to_string(&self.output).context("strace has written nothing")?;
        let calls = counted(&table);
        Some(calls).filter(|calls| calls.all > 0.0).context("strace has counted nothing")
    }
}

fn is_traced(pid: u32) -> bool {
    let threads: Vec<_> = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().collect();
    let traced = |thread: &fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
    };
    !threads.is_empty() && threads.iter().all(traced)
}

/// A table of strace's: share, seconds, microseconds, calls, perhaps errors, name.
fn counted(table: &str) -> Calls {
    let mut calls = Calls::default();
    for line in table.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(count), Some(name)) = (words.get(3).and_then(|count| count.parse::<f64>().ok()), words.last()) else {
            continue;
        };
        if words.len() < 5 || *name == "total" {
            continue;
        }
        calls.all += count;
        calls.work += if WAITING.contains(name) { 0.0 } else { count };
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_strace_is_read() {
        let table = "% time     seconds  usecs/call     calls    errors syscall\n\
            ------ ----------- ----------- --------- --------- ----------------\n \
             50.00    0.000010           1        10         2 openat2\n \
             50.00    0.000010           1         7           ppoll\n\
            ------ ----------- ----------- --------- --------- ----------------\n\
            100.00    0.000020           1        17         2 total\n";
        assert_eq!(counted(table), Calls { all: 17.0, work: 10.0 });
    }
}
