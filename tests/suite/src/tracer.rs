//! A process run under ptrace, system call by system call: counted, stopped at one of them, or made to do others.
//!
//! What is tested so are the programs as they are shipped: nothing in them is there for the test. A thread that stands before a
//! system call can be given another one in its place, and the kernel's answer is what whoever had taken the process over would
//! get. Steps of a start can be left out in the same way, which is how a test is shown to notice that a layer is missing.
//!
//! The kernel ties a traced process to the thread that traces it, so a [`Tracer`] stays in the thread that made it. Tracing
//! processes that refuse it needs root.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// `PTRACE_O_SUSPEND_SECCOMP`.
const SUSPEND_SECCOMP: i32 = 1 << 21;

const ENTRY: u8 = 1;
const EXIT: u8 = 2;

/// Bytes of the instruction that makes a system call.
const SYSCALL_INSTRUCTION: u64 = 2;

/// Below the stack pointer, where the thread keeps nothing (x86-64 ABI: 128 bytes of red zone).
const SCRATCH_BELOW: u64 = 8192;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread is about to make this call. It waits for [`Tracer::go`].
    Call(Pid, i64),
    /// A call has returned this, or minus an error number. The thread waits for [`Tracer::go`].
    Return(Pid, i64),
    /// A process or thread is gone; by a signal, if one is named.
    Died(Pid, Option<Signal>),
}

/// How a call that was put in came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It returned this, or minus an error number.
    Value(i64),
    /// The process was ended for it.
    Killed(Signal),
}

/// A tracer and what it traces.
#[derive(Debug, Default)]
pub struct Tracer {
    /// What happened to others while one thread was waited for.
    later: VecDeque<Event>,
}

/// What a process may do of what is in a tracer's power to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filters {
    /// Filters of system calls are in force.
    InForce,
    /// They are not looked at.
    Suspended,
}

impl Filters {
    fn options(self) -> Options {
        let follow = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_EXITKILL;
        match self {
            Filters::InForce => follow,
            Filters::Suspended => follow | Options::from_bits_retain(SUSPEND_SECCOMP),
        }
    }
}

/// Whether processes that refuse to be traced can be traced here; says so if not.
pub fn can_trace() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("Processes that refuse to be traced are traced by root only; the guest suite does that in any case.");
    }
    root
}

/// Starts a program that stands still before its first instruction, and a tracer that follows it and its children.
pub fn launch(program: &Path, args: &[String], filters: Filters) -> (Child, Tracer) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "kill -STOP $$; exec \"$@\"", "sh"]).arg(program).args(args);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a shell starts");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
    let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED));
    assert!(matches!(stopped, Ok(WaitStatus::Stopped(..))), "{stopped:?}");
    ptrace::seize(pid, filters.options()).expect("the right to trace");
    kill(pid, Signal::SIGCONT).expect("it is there");
    (child, Tracer::default())
}

impl Tracer {
    /// Follows every thread of a running process.
    pub fn seize(pid: u32, filters: Filters) -> Tracer {
        for task in fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs").flatten() {
            let tid = task.file_name().to_string_lossy().parse().map(Pid::from_raw).expect("a thread's number");
            ptrace::seize(tid, filters.options()).expect("the right to trace");
            ptrace::interrupt(tid).expect("it is there");
        }
        Tracer::default()
    }

    /// Waits for the next event. `None`: nothing is left to be traced.
    pub fn event(&mut self) -> Option<Event> {
        if let Some(event) = self.later.pop_front() {
            return Some(event);
        }
        loop {
            // Children of other threads of the test are theirs.
            let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            let status = waitpid(Pid::from_raw(-1), Some(flags)).ok()?;
            if let Some(event) = self.look(status) {
                return Some(event);
            }
        }
    }

    fn look(&mut self, status: WaitStatus) -> Option<Event> {
        match status {
            WaitStatus::PtraceSyscall(tid) => {
                let registers = ptrace::getregs(tid).ok()?;
                match ptrace::syscall_info(tid).map(|info| info.op) {
                    Ok(ENTRY) => Some(Event::Call(tid, registers.orig_rax.cast_signed())),
                    Ok(EXIT) => Some(Event::Return(tid, registers.rax.cast_signed())),
                    _ => {
                        self.go(tid);
                        None
                    }
                }
            }
            WaitStatus::PtraceEvent(tid, ..) => {
                self.go(tid);
                None
            }
            WaitStatus::Stopped(tid, signal) => {
                // Between the tracer's look and its word the process may have been killed.
                let _gone = ptrace::syscall(tid, signal);
                None
            }
            WaitStatus::Exited(tid, _) => Some(Event::Died(tid, None)),
            WaitStatus::Signaled(tid, signal, _) => Some(Event::Died(tid, Some(signal))),
            _ => None,
        }
    }

    /// Lets a thread go on to its next event.
    pub fn go(&mut self, tid: Pid) {
        let _gone = ptrace::syscall(tid, None);
    }

    /// Lets everything run until it has ended; `each` sees every call.
    pub fn run(&mut self, mut each: impl FnMut(Pid, i64)) {
        while let Some(event) = self.event() {
            match event {
                Event::Call(tid, number) => {
                    each(tid, number);
                    self.go(tid);
                }
                Event::Return(tid, _) => self.go(tid),
                Event::Died(..) => {}
            }
        }
    }

    /// A thread that stands before a call makes another one instead, and stands before its own again afterwards. With `None` that
    /// call is left out: it returns 0 at once, and the thread goes on from there.
    pub fn instead(&mut self, tid: Pid, call: Option<(i64, [u64; 6])>) -> Answer {
        let saved = ptrace::getregs(tid).expect("a thread that stands still");
        let mut changed = saved;
        changed.orig_rax = call.map_or(u64::MAX, |(number, _)| number.cast_unsigned());
        if let Some((_, [a, b, c, d, e, f])) = call {
            (changed.rdi, changed.rsi, changed.rdx) = (a, b, c);
            (changed.r10, changed.r8, changed.r9) = (d, e, f);
        }
        ptrace::setregs(tid, changed).expect("a thread that stands still");
        self.go(tid);
        let value = match self.wait_for(tid) {
            Event::Return(_, value) => value,
            Event::Died(_, signal) => return Answer::Killed(signal.unwrap_or(Signal::SIGKILL)),
            Event::Call(..) => panic!("a call within a call"),
        };
        if call.is_none() {
            let mut after = ptrace::getregs(tid).expect("a thread that stands still");
            after.rax = 0;
            ptrace::setregs(tid, after).expect("a thread that stands still");
            self.go(tid);
            return Answer::Value(0);
        }
        let mut again = saved;
        (again.rip, again.rax) = (saved.rip - SYSCALL_INSTRUCTION, saved.orig_rax);
        ptrace::setregs(tid, again).expect("a thread that stands still");
        self.go(tid);
        match self.wait_for(tid) {
            Event::Call(..) => Answer::Value(value),
            Event::Died(_, signal) => Answer::Killed(signal.unwrap_or(Signal::SIGKILL)),
            Event::Return(..) => panic!("a return before a call"),
        }
    }

    /// The next event of one thread. What happens to others meanwhile is told later; a child that a call has made is ended. All of them are
    /// waited for: the end of a process's first thread is told last.
    fn wait_for(&mut self, tid: Pid) -> Event {
        loop {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            let status = waitpid(Pid::from_raw(-1), Some(flags)).expect("a traced thread");
            let ours = status.pid() == Some(tid);
            if let (WaitStatus::PtraceEvent(child, ..), false) = (status, ours) {
                let _gone = kill(child, Signal::SIGKILL);
                continue;
            }
            match self.look(status) {
                Some(event) if ours => return event,
                Some(event) => self.later.push_back(event),
                None => {}
            }
        }
    }

    /// Runs until a thread that `wanted` names stands before a call.
    pub fn until_call(&mut self, mut wanted: impl FnMut(Pid, i64) -> bool) -> Option<Pid> {
        loop {
            match self.event()? {
                Event::Call(tid, number) if wanted(tid, number) => return Some(tid),
                Event::Call(tid, _) | Event::Return(tid, _) => self.go(tid),
                Event::Died(..) => {}
            }
        }
    }
}

/// The argument `index` (from 0) of the call before which a thread stands.
pub fn argument(tid: Pid, index: usize) -> u64 {
    let registers = ptrace::getregs(tid).expect("a thread that stands still");
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9][index]
}

/// Puts bytes where a thread that stands still keeps nothing, and gives their address. `slot` keeps several apart.
pub fn place(tid: Pid, slot: u64, bytes: &[u8]) -> u64 {
    let registers = ptrace::getregs(tid).expect("a thread that stands still");
    let at = (registers.rsp - SCRATCH_BELOW + slot * 256) & !15;
    write(tid, at, bytes);
    at
}

/// Writes into the memory of a thread that stands still.
pub fn write(tid: Pid, at: u64, bytes: &[u8]) {
    let memory = File::options().write(true).open(format!("/proc/{tid}/mem")).expect("the right to write");
    memory.write_all_at(bytes, at).expect("mapped memory");
}

/// Reads from the memory of a thread that stands still.
pub fn read<const N: usize>(tid: Pid, at: u64) -> [u8; N] {
    let memory = File::open(format!("/proc/{tid}/mem")).expect("the right to read");
    let mut bytes = [0; N];
    memory.read_exact_at(&mut bytes, at).expect("mapped memory");
    bytes
}
