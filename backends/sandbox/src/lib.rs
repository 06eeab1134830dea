//! MAY: what a process is allowed to do, and the order in which everything else is given up.
//!
//! # Theory of operation
//!
//! A process that serves a guest is believed to be taken over one day. What it can do then is what this crate left it. No
//! layer is redundant: namespaces do not stop a system call, a filter of system calls does not know paths, Landlock does not
//! know UDP or System V memory. So all of them are applied, in every build, in the one order that works (each line has a reason
//! that was measured):
//!
//! 1. [`spawn`] clones the process into new user, mount, UTS, IPC and PID namespaces and puts it into the machine's one empty
//!    network namespace ([`NetNamespace`]; making one each time is what makes a restart slow). The pidfd is that of the worker
//!    itself: a wrapper that is killed would leave the worker alive, and two workers would serve one ring. The child writes
//!    its id maps while it is still dumpable, takes only the descriptors it was given, and executes the program.
//! 2. The program opens what its arguments name. Paths are still there. A file server takes its share out of the tree ([`detach`]).
//! 3. [`confine`]: a private mount tree; no further user namespaces, since each brings all capabilities back; an empty, read-only
//!    root, no `/proc`; limits; capabilities, whose bounding set must go while there is still the right to change it; no new
//!    privileges; no memory that is both writable and executable; not dumpable; Landlock at last, because nothing can be
//!    mounted inside of it. [`Needs`] says what of its policy a program keeps: for most that is nothing.
//! 4. Threads start, and each, the first one too, installs its own [`Filter`] of system calls.
//! 5. The first byte of a guest or a peer is read.
//!
//! A program is its caller alone, unless it is asked to act in the name of others ([`Identity`]).
//!
//! What a kernel lacks is an error that says so ([`Floor`]), never a layer that is silently left out; a person may ask for a
//! lower floor by name, and there is no floor called "none".

mod capabilities;
mod confine;
mod error;
mod filter;
mod floor;
mod identity;
mod names;
mod reach;
mod share;
mod spawn;
#[expect(unsafe_code, reason = "clone3, execve and the few calls that no safe wrapper offers")]
mod sys;

pub use capabilities::{Capability, lower, raise};
pub use confine::{Limits, Needs, confine, enclose};
pub use error::Error;
pub use filter::{Filter, Rule, When, allow, allow_if};
pub use floor::{Floor, Kernel};
pub use identity::{IdRange, Identity, IdentityKind};
pub use names::{GETXATTRAT, LISTXATTRAT, REMOVEXATTRAT, SETXATTRAT, name};
pub use reach::{Access, Reach};
pub use share::{Detach, Detached, detach};
pub use spawn::{Child, NetNamespace, Spawn, spawn};
pub use sys::{
    SECURE_ERASE, close_all_but, exit, inherited, leave_start_behind, lock_file, one_heap, plain_faults, secure_erase, signal_fd,
};

/// What every call of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// What one kind of process may do: one constant in its `sandbox.rs`.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The program, for messages.
    pub name: &'static str,
    /// Limits on what it may use up.
    pub limits: Limits,
    /// Capabilities it may keep. None, unless it acts in the name of several users.
    pub capabilities: &'static [Capability],
    /// What its first thread, which talks to the frontend, may call.
    pub control: &'static [&'static [Rule]],
    /// What its other threads may call, by the name of the thread.
    pub threads: &'static [(&'static str, &'static [&'static [Rule]])],
}

impl Policy {
    /// The rules of the threads called `name`.
    ///
    /// # Errors
    /// When the policy has no such thread: a mistake in the program, not in its use.
    pub fn thread(&self, name: &str) -> Result<&'static [&'static [Rule]]> {
        let found = self.threads.iter().find(|(thread, _)| *thread == name);
        found.map(|(_, rules)| *rules).ok_or_else(|| Error::NoSuchThread(name.to_owned()))
    }
}
