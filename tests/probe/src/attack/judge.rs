//! The judge: whether the backend lives, rests, and serves the next frontend.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Seen;
use super::foe::Foe;
use super::target::Target;

/// How long a backend is watched for spinning. It is watched longer if it was busy.
const WINDOW: Duration = Duration::from_millis(20);
/// How long it may be busy with what was left for it.
const BUSY: Duration = Duration::from_secs(2);
/// How long the next frontend waits for its one request.
const REQUEST: Duration = Duration::from_secs(3);

/// Private memory that a backend may gain in one attack: more is kept for the attacker.
const MEMORY: u64 = 64 << 20;
/// Descriptors that it may.
const DESCRIPTORS: usize = 8;

/// What a process uses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Vitals {
    memory: u64,
    descriptors: usize,
}

impl Vitals {
    /// As the host shows it; zero where it does not.
    pub(super) fn of(pid: u32) -> Vitals {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let memory = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024;
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        Vitals { memory, descriptors }
    }

    /// What it keeps that it had not before.
    pub(super) fn kept(&self, before: &Vitals) -> Option<String> {
        let (memory, fds) = (self.memory.saturating_sub(before.memory), self.descriptors.saturating_sub(before.descriptors));
        if memory > MEMORY {
            return Some(format!("keeps {} MiB more", memory >> 20));
        }
        (before.descriptors > 0 && fds > DESCRIPTORS).then(|| format!("keeps {fds} descriptors more"))
    }
}

/// Who serves a connection, as the kernel has it.
pub(super) fn server(stream: &UnixStream) -> Option<u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream.as_fd()).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

/// Whether a process is there and not only waiting to be buried.
pub(super) fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}

/// Whether a process is busy and does not come to rest.
pub(super) fn spins(pid: u32) -> bool {
    let start = Instant::now();
    loop {
        let (from, before) = (Instant::now(), runnable_time(pid));
        std::thread::sleep(WINDOW);
        let used = runnable_time(pid).saturating_sub(before);
        if used < from.elapsed() / 4 && !is_runnable(pid) {
            return false;
        }
        if start.elapsed() > BUSY {
            return true;
        }
    }
}

/// Whether a thread of a process runs or waits for a processor: on a busy host one that spins can do so for longer than it is watched.
fn is_runnable(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    stats.into_iter().any(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('R')))
}

/// How long all threads of a process ran, or would have if a busy host had let them.
fn runnable_time(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let times = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        Some(text.split_whitespace().take(2).filter_map(|field| field.parse::<u64>().ok()).sum::<u64>())
    });
    Duration::from_nanos(times.sum())
}

/// Lets a correct frontend have one request served.
pub(super) fn serves(stream: UnixStream, target: Target) -> Result<()> {
    let mut foe = Foe::new(stream, target)?;
    foe.start().map_err(|halt| anyhow::anyhow!("{halt}")).context("The next frontend is not served")?;
    if !foe.exchange(REQUEST) {
        bail!("The next frontend's request is not served");
    }
    match foe.stop() {
        Seen::Taken => Ok(()),
        _ => bail!("The next frontend's ring does not stop"),
    }
}
