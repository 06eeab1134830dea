//! Programs under measurement: started quietly, looked at through /proc, ended whatever happens.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// What has not started by then does not start.
const START_LIMIT: Duration = Duration::from_secs(20);
/// A program that was asked to end has so long to do it.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A program, ended when this is dropped.
pub(crate) struct Running(Child);

impl Running {
    /// Starts it with nothing to read or to say.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("Cannot start {program}"))?))
    }

    /// Starts it, and waits for its socket.
    pub(crate) fn listening(command: Command, socket: &Path) -> Result<Self> {
        let mut running = Self::start(command)?;
        running.wait_until("makes its socket", || socket.exists())?;
        Ok(running)
    }

    /// Waits until something is true of it.
    pub(crate) fn wait_until(&mut self, what: &str, mut is_true: impl FnMut() -> bool) -> Result<()> {
        let began = Instant::now();
        while !is_true() {
            if began.elapsed() > START_LIMIT {
                bail!("A program under measurement does not get so far that it {what}");
            }
            if let Some(status) = self.0.try_wait()? {
                bail!("A program under measurement ended before it {what} ({status})");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// It and all its descendants.
    pub(crate) fn tree(&self) -> Vec<u32> {
        let mut tree = vec![self.id()];
        let mut at = 0;
        while let Some(&pid) = tree.get(at) {
            tree.extend(children(pid));
            at += 1;
        }
        tree
    }

    /// Seconds of processor time that it and its descendants have taken.
    pub(crate) fn busy(&self) -> f64 {
        self.tree().into_iter().map(busy).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.id()).ok().and_then(Pid::from_raw) {
            let _already_gone = kill_process(pid, Signal::TERM);
        }
        let began = Instant::now();
        while began.elapsed() < END_LIMIT && matches!(self.0.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(2));
        }
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// Of one process, all threads, by the scheduler's own count: the ticks of /proc/PID/stat are too coarse.
fn busy(pid: u32) -> f64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// The name of a process.
pub(crate) fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// How many threads it has.
pub(crate) fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}
