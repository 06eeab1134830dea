//! The sequence by which a process that has opened what it needs gives up everything else.

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{DumpableBehavior, Resource, Rlimit, chdir, getrlimit, pivot_root, set_dumpable_behavior, setrlimit};
use rustix::thread::{set_no_new_privs, set_thread_groups};

use crate::capabilities::{Capability, keep_only};
use crate::reach::{Reach, enter_landlock};
use crate::{Error, Floor, IdentityKind, Kernel, Policy, Result, sys};

/// What a process may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Descriptors it may hold: what it was measured to need, and 64 for those that come with messages.
    pub descriptors: u64,
    /// Threads its user may have in its namespace. Without one of its own ([`crate::Identity::Host`]) there is no such limit.
    pub threads: u64,
}

/// What one run of a program needs of what its policy leaves it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs<'a> {
    /// What it can name by paths. Nothing but this.
    pub reach: &'a [Reach<'a>],
    /// Which of the policy's capabilities it keeps; all of them if that is not said.
    pub keep: Option<&'a [Capability]>,
    /// Descriptors it may hold, where its arguments ask for more than the policy's number.
    pub descriptors: Option<u64>,
    /// Threads it may have, likewise.
    pub threads: Option<u64>,
}

/// Gives up everything that is not open, mapped or running. The process is in the namespaces [`crate::spawn`] made for `identity`, and
/// has one thread. Afterwards only a [`crate::Filter`] for each thread is missing.
///
/// # Errors
/// When the kernel is below `floor`, the policy has less than the needs, or a step fails. The process must end then.
pub fn confine(policy: &Policy, needs: &Needs<'_>, identity: IdentityKind, floor: Floor) -> Result<Kernel> {
    let kernel = Kernel::running();
    kernel.require(floor)?;
    let kept = policy.kept(needs)?;
    let on_host = identity == IdentityKind::Host;
    if on_host {
        // With a user namespace they were left behind when the process was started.
        set_thread_groups(&[]).map_err(Error::step("leave all groups"))?;
    } else {
        forbid_user_namespaces()?;
    }
    empty_root()?;
    limit(&policy.limits, needs.descriptors)?;
    if !on_host {
        set_limit(Resource::Nproc, needs.threads.unwrap_or(policy.limits.threads))?;
    }
    keep_only(kept)?;
    shut(&kernel, needs.reach)?;
    Ok(kernel)
}

impl Policy {
    fn kept<'a>(&self, needs: &Needs<'a>) -> Result<&'a [Capability]> {
        let kept = needs.keep.unwrap_or(self.capabilities);
        match kept.iter().find(|one| !self.capabilities.contains(one)) {
            Some(one) => Err(Error::NotInPolicy(one.to_string())),
            None => Ok(kept),
        }
    }
}

/// The same for a process of a person's own that has opened one thing, is about to read what somebody else wrote in it, and ends
/// then. It is in no namespaces; it reaches nothing by a path or a new socket all the same, and gains nothing by what it executes.
/// Afterwards a [`crate::Filter`] says what it may call.
///
/// # Errors
/// When the kernel has no Landlock, or a step fails. The process must end then.
pub fn enclose() -> Result<Kernel> {
    let kernel = Kernel::running();
    set_limit(Resource::Core, 0)?;
    shut(&kernel, &[])?;
    Ok(kernel)
}

/// What can be given up anywhere, with Landlock at last.
fn shut(kernel: &Kernel, shares: &[Reach<'_>]) -> Result<()> {
    set_no_new_privs(true).map_err(Error::step("give up new privileges"))?;
    if kernel.refuses_executable_memory {
        sys::refuse_executable_memory().map_err(Error::step("refuse executable memory"))?;
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::step("refuse to be traced"))?;
    enter_landlock(kernel.landlock, shares)
}

/// A new user namespace would bring all capabilities back, dropped or not. The limit is per namespace and is inherited. That of the
/// host's own namespace is for the host to say.
fn forbid_user_namespaces() -> Result<()> {
    let step = || Error::step("forbid further user namespaces");
    let limit = open(c"/proc/sys/user/max_user_namespaces", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(step())?;
    rustix::io::write(&limit, b"0\n").map_err(step()).map(drop)
}

/// An empty file system takes the place of everything that could be named by a path. What is open stays open.
fn empty_root() -> Result<()> {
    let all = MountPropagationFlags::UNBINDABLE | MountPropagationFlags::REC;
    mount_change(c"/", all).map_err(Error::step("make the mount tree private"))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(c"outboard", c"/proc", c"tmpfs", flags, c"mode=0555,nr_blocks=1,nr_inodes=2")
        .map_err(Error::step("make an empty root"))?;
    chdir(c"/proc").map_err(Error::step("enter the empty root"))?;
    pivot_root(c".", c".").map_err(Error::step("take the empty root"))?;
    unmount(c".", UnmountFlags::DETACH).map_err(Error::step("leave the old root"))?;
    chdir(c"/").map_err(Error::step("enter the empty root"))
}

fn limit(limits: &Limits, descriptors: Option<u64>) -> Result<()> {
    // Neither the address space nor the file size can be limited: guest memory counts for both.
    let wanted = descriptors.map_or(limits.descriptors, |asked| asked.max(limits.descriptors));
    limit_descriptors(wanted)?;
    set_limit(Resource::Core, 0)?;
    set_limit(Resource::Memlock, 0)
}

fn set_limit(resource: Resource, value: u64) -> Result<()> {
    setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(Error::step("set a limit"))
}

/// Raising the hard limit is for the host's root alone, and even for it there is an end (`fs.nr_open`).
fn limit_descriptors(wanted: u64) -> Result<()> {
    let hard = getrlimit(Resource::Nofile).maximum;
    match setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: Some(wanted) }) {
        Err(rustix::io::Errno::PERM) => Err(Error::Descriptors { wanted, hard: hard.unwrap_or(u64::MAX) }),
        other => other.map_err(Error::step("set a limit")),
    }
}

#[cfg(test)]
mod tests;
