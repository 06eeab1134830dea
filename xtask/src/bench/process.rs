//! Programs under measurement: started quietly, looked at through /proc, ended whatever happens.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// What has not started by then does not start.
const START_LIMIT: Duration = Duration::from_secs(20);
/// A program that was asked to end has so long to do it.
const END_LIMIT: Duration = Duration::from_secs(2);
/// What measures, or is measured from its start to its end, takes a second or two.
const WHOLE_LIMIT: Duration = Duration::from_secs(20);

/// Runs a program to its end and gives what it wrote.
pub(crate) fn told(command: &mut Command) -> Result<Vec<u8>> {
    told_within(command, WHOLE_LIMIT)
}

/// The same of one that may take longer, or has to be faster.
pub(crate) fn told_within(command: &mut Command, time: Duration) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("Cannot start {name}"))?;
    let limit = Limit::on(&child, time);
    let output = child.wait_with_output().with_context(|| format!("Cannot wait for {name}"))?;
    limit.kept(&name)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, said.lines().last().unwrap_or("it says nothing"));
    }
    Ok(output.stdout)
}

/// Runs a program to its end and hears each line as it comes. What it says of its own work is shown.
pub(crate) fn heard(command: &mut Command, time: Duration, mut hear: impl FnMut(&str)) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("Cannot start {name}"))?;
    let limit = Limit::on(&child, time);
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).split(b'\n')) {
        hear(&String::from_utf8_lossy(&line.with_context(|| format!("Cannot read what {name} writes"))?));
    }
    let status = child.wait().with_context(|| format!("Cannot wait for {name}"))?;
    limit.kept(&name)?;
    if status.success() { Ok(()) } else { bail!("{name} failed ({status})") }
}

/// A thread that ends a program when its time is over: one that hangs must not hold the others' rows up.
struct Limit {
    time: Duration,
    ended: Sender<()>,
    watch: JoinHandle<bool>,
}

impl Limit {
    fn on(child: &Child, time: Duration) -> Self {
        let (ended, wait) = channel();
        let pid = Pid::from_child(child);
        let watch = thread::spawn(move || {
            let over = wait.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            over && kill_process(pid, Signal::KILL).is_ok()
        });
        Self { time, ended, watch }
    }

    /// The program has ended: of its own accord?
    fn kept(self, name: &str) -> Result<()> {
        drop(self.ended);
        match self.watch.join() {
            Ok(true) => bail!("{name} had not ended after {} s", self.time.as_secs()),
            _ => Ok(()),
        }
    }
}

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
        let _already_gone = kill_process(Pid::from_child(&self.0), Signal::TERM);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended() {
        let began = Instant::now();
        let mut lines = Vec::new();
        let mut shell = Command::new("sh");
        let ended = heard(shell.args(["-c", "echo first; exec sleep 60"]), Duration::from_millis(300), |line| {
            lines.push(line.to_owned());
        });
        assert!(ended.unwrap_err().to_string().contains("had not ended"));
        assert!(began.elapsed() < Duration::from_secs(30));
        assert_eq!(lines, ["first"]);
    }

    #[test]
    fn a_program_that_fails_is_named_with_its_last_words() {
        let error = told(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.starts_with("sh failed (exit status: 3): why"), "{error}");
        assert_eq!(told(Command::new("echo").arg("x")).unwrap(), b"x\n");
    }
}
