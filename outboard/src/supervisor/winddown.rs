//! The end of a machine's processes after the VMM: in order if they hurry, by force if not.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::Supervisor;
use super::process::Process;

/// A device process ends when the VMM hangs up. What it may still have to do is write back a disk's data.
const LIMIT: Duration = Duration::from_secs(5);

impl Supervisor<'_> {
    /// Waits for the device processes, kills what remains, and collects all.
    pub(super) fn wind_down(self) {
        let Self { slots, vmm, link, .. } = self;
        drop(link);
        let mut processes: Vec<Process> = slots.into_iter().filter_map(|slot| slot.process).collect();
        // Where the machine failed before its VMM ended, there is no guest whose data anybody waits for.
        vmm.signal(Signal::KILL);
        let deadline = Instant::now() + LIMIT;
        while !processes.is_empty() && Instant::now() < deadline {
            wait(&processes, deadline);
            processes.retain_mut(|process| {
                let ended = has_ended(process);
                if ended {
                    process.reap();
                }
                !ended
            });
        }
        for mut process in processes {
            process.signal(Signal::KILL);
            process.reap();
        }
    }
}

fn wait(processes: &[Process], deadline: Instant) {
    let mut polled: Vec<PollFd<'_>> =
        processes.iter().map(|process| PollFd::from_borrowed_fd(process.pidfd.as_fd(), PollFlags::IN)).collect();
    let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
    let _interrupted = poll(&mut polled, left.as_ref());
}

fn has_ended(process: &Process) -> bool {
    let mut polled = [PollFd::new(&process.pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
}
