//! Capabilities: those that a program keeps, and those that one of its threads has in force.
//!
//! Most programs keep none. One that serves files in the name of many users needs a few for as long as it lives. Its threads lower
//! those that would let a guest pass over a check of the host's, and raise them again where they are meant.

use caps::CapSet;
pub use caps::Capability;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use rustix::thread::{capabilities, set_capabilities, set_capabilities_secure_bits};

use crate::{Error, Result};

/// Takes capabilities out of those that the calling thread has in force. It may have them back with [`raise`]. A thread whose filter
/// has `capget` and `capset` can do both while it serves; nothing else is called.
///
/// # Errors
/// The system's.
pub fn lower(which: &[Capability]) -> Result<()> {
    change(|sets| sets.effective.remove(set(which)))
}

/// Puts capabilities that the process has kept in force, for the calling thread.
///
/// # Errors
/// When the process has not kept one of them.
pub fn raise(which: &[Capability]) -> Result<()> {
    change(|sets| sets.effective.insert(set(which)))
}

/// By number: the `caps` crate hashes, and takes random numbers for that, which is a system call more.
fn change(how: impl FnOnce(&mut CapabilitySets)) -> Result<()> {
    let step = || Error::step("change what a thread has in force of its capabilities");
    let mut sets = capabilities(None).map_err(step())?;
    how(&mut sets);
    set_capabilities(None, sets).map_err(step())
}

fn set(which: &[Capability]) -> CapabilitySet {
    CapabilitySet::from_bits_retain(which.iter().fold(0, |bits, one| bits | one.bitmask()))
}

/// Gives up all capabilities but these. Also makes sure that being user 0 means nothing: not here, and not after any change of
/// identity. What is kept cannot be passed on to another program.
pub(crate) fn keep_only(kept: &[Capability]) -> Result<()> {
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits).map_err(Error::step("lock the meaning of user 0"))?;
    for set in [CapSet::Ambient, CapSet::Bounding] {
        caps::clear(None, set).map_err(Error::Capabilities)?;
    }
    let sets = CapabilitySets { effective: set(kept), permitted: set(kept), inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(Error::step("give up capabilities"))
}
