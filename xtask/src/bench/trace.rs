//! When a program enters its guest for the first time, seen by the kernel's own trace points: neither program is changed, and
//! both pay the same few hundred nanoseconds.
//!
//! `sched_process_exec` is the beginning, the first `ioctl(KVM_RUN)` the end. The trace is an instance of its own, follows the
//! children of this thread only, and disappears afterwards. Trace points are root's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::geteuid;

use super::process::Running;

/// A virtual machine that has not run by then does not.
const LIMIT: Duration = Duration::from_secs(10);
const EVENTS: [&str; 2] = ["events/sched/sched_process_exec/enable", "events/syscalls/sys_enter_ioctl/enable"];

/// A trace instance.
pub(crate) struct Trace {
    mounted: PathBuf,
    instance: PathBuf,
}

impl Trace {
    /// Sets it up; `dir` is where trace files appear meanwhile.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        if !geteuid().is_root() {
            bail!("only root may use the kernel's trace points");
        }
        let mounted = dir.join("tracing");
        fs::create_dir_all(&mounted)?;
        mount("tracefs", &mounted, "tracefs", MountFlags::empty(), None).context("this kernel has no trace points")?;
        let instance = mounted.join(format!("instances/outboard-bench-{}", std::process::id()));
        let trace = Self { mounted, instance };
        fs::create_dir(&trace.instance).context("Cannot make a trace instance")?;
        trace.write("trace_clock", "mono")?;
        trace.write("options/event-fork", "1")?;
        trace.write("events/syscalls/sys_enter_ioctl/filter", "cmd == 0xae80")?;
        for event in EVENTS {
            trace.write(event, "1")?;
        }
        Ok(trace)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        fs::write(self.instance.join(file), text).with_context(|| format!("Cannot set {file} of the kernel's trace"))
    }

    /// Milliseconds from the program's exec to its first entry into the guest.
    pub(crate) fn first_run(&self, command: Command) -> Result<f64> {
        self.write("trace", "")?;
        self.write("set_event_pid", &rustix::thread::gettid().as_raw_nonzero().to_string())?;
        let _running = Running::start(command)?;
        let began = Instant::now();
        loop {
            thread::sleep(Duration::from_millis(40));
            let trace = fs::read_to_string(self.instance.join("trace")).context("Cannot read the kernel's trace")?;
            if let Some(milliseconds) = between(&trace) {
                return Ok(milliseconds);
            }
            if began.elapsed() > LIMIT {
                bail!("A virtual machine under measurement did not enter its guest");
            }
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        for event in EVENTS {
            drop(self.write(event, "0"));
        }
        drop(fs::remove_dir(&self.instance));
        let _busy = unmount(&self.mounted, UnmountFlags::DETACH);
    }
}

/// From the first exec to the first `KVM_RUN`. A line is `NAME-TID [CPU] FLAGS SECONDS: EVENT: ...`.
fn between(trace: &str) -> Option<f64> {
    let time = |event: &str| {
        let line = trace.lines().find(|line| !line.starts_with('#') && line.contains(event))?;
        line.split(event).next()?.split_whitespace().last()?.trim_end_matches(':').parse::<f64>().ok()
    };
    Some((time("sys_ioctl(")? - time("sched_process_exec:")?) * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_stands_before_the_event() {
        let trace = "# x\n   vmm-7   [001] .....   10.500000: sched_process_exec: filename=/a pid=7 old_pid=7\n\
                     cpu0-9   [000] .....   10.512500: sys_ioctl(fd: b, cmd: ae80, arg: 0)\n";
        assert!((between(trace).unwrap() - 12.5).abs() < 0.001);
        assert!(between("# nothing").is_none());
    }
}
