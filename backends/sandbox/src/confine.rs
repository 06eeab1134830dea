//! The sequence by which a process that has opened what it needs gives up everything else.

use caps::CapSet;
use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{DumpableBehavior, Resource, Rlimit, chdir, pivot_root, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitiesSecureBits, set_capabilities_secure_bits, set_no_new_privs};

use crate::{Error, Floor, Kernel, Result, sys};

/// What a process may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Descriptors it may hold: what it was measured to need, and 64 for those that come with messages.
    pub descriptors: u64,
    /// Threads its user may have in its namespace.
    pub threads: u64,
}

/// Gives up everything that is not open, mapped or running. The process is in the namespaces [`crate::spawn`] made, and has one
/// thread. Afterwards only a [`crate::Filter`] for each thread is missing.
///
/// # Errors
/// When the kernel is below `floor`, or a step fails. The process must end then.
pub fn confine(limits: &Limits, floor: Floor) -> Result<Kernel> {
    let kernel = Kernel::running();
    kernel.require(floor)?;
    forbid_user_namespaces()?;
    empty_root()?;
    limit(limits)?;
    drop_capabilities()?;
    shut(&kernel)?;
    Ok(kernel)
}

/// The same for a process of a person's own that has opened one thing, is about to read what somebody else wrote in it, and ends
/// then. It is in no namespaces; it reaches nothing by a path or a new socket all the same, and gains nothing by what it executes.
/// Afterwards a [`crate::Filter`] says what it may call.
///
/// # Errors
/// When the kernel has no Landlock, or a step fails. The process must end then.
pub fn enclose() -> Result<Kernel> {
    let kernel = Kernel::running();
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(Error::step("set a limit"))?;
    shut(&kernel)?;
    Ok(kernel)
}

/// What can be given up anywhere, with Landlock at last.
fn shut(kernel: &Kernel) -> Result<()> {
    set_no_new_privs(true).map_err(Error::step("give up new privileges"))?;
    if kernel.refuses_executable_memory {
        sys::refuse_executable_memory().map_err(Error::step("refuse executable memory"))?;
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::step("refuse to be traced"))?;
    enter_landlock(kernel.landlock)
}

/// A new user namespace would bring all capabilities back, dropped or not. The limit is per namespace and is inherited.
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

fn limit(limits: &Limits) -> Result<()> {
    let set = |resource, value| {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(Error::step("set a limit"))
    };
    // Neither the address space nor the file size can be limited: guest memory counts for both.
    set(Resource::Nofile, limits.descriptors)?;
    set(Resource::Nproc, limits.threads)?;
    set(Resource::Core, 0)?;
    set(Resource::Memlock, 0)
}

/// Also makes sure that being user 0 means nothing: not here, and not after any change of identity.
fn drop_capabilities() -> Result<()> {
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits).map_err(Error::step("lock the meaning of user 0"))?;
    for set in [CapSet::Ambient, CapSet::Bounding, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(Error::Capabilities)?;
    }
    Ok(())
}

/// All rights that this kernel knows are handled, and none is given.
fn enter_landlock(version: u32) -> Result<()> {
    let abi = abi(version);
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset = ruleset.handle_access(AccessFs::from_all(abi)).map_err(Error::Landlock)?;
    if abi >= ABI::V4 {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi)).map_err(Error::Landlock)?;
    }
    if abi >= ABI::V6 {
        ruleset = ruleset.scope(Scope::from_all(abi)).map_err(Error::Landlock)?;
    }
    let status = ruleset.create().and_then(|created| created.restrict_self()).map_err(Error::Landlock)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        _ => Err(Error::TooOld(format!("all of Landlock version {version}"))),
    }
}

fn abi(version: u32) -> ABI {
    const KNOWN: [ABI; 9] = [ABI::V1, ABI::V2, ABI::V3, ABI::V4, ABI::V5, ABI::V6, ABI::V7, ABI::V8, ABI::V9];
    let index = usize::try_from(version).unwrap_or(usize::MAX).clamp(1, KNOWN.len());
    KNOWN.get(index - 1).copied().unwrap_or(ABI::V9)
}
