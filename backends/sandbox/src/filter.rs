//! Filters of system calls: a thread that calls anything else is ended, and its process with it.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    apply_filter,
};

use crate::{Error, Result};

/// A condition on one argument of a system call. Only numbers can be looked at, not what pointers point to.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// Argument `n` is this 32-bit number.
    Is(u8, u32),
    /// Argument `n` is any other 32-bit number than this one.
    Not(u8, u32),
    /// Of the bits in the mask, argument `n` has none. For flags that must not be set.
    HasNone(u8, u64),
}

/// A system call that is allowed, and why.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Its number (`libc::SYS_*`).
    pub syscall: i64,
    /// All of these hold. None: always.
    pub when: &'static [When],
    /// What it is needed for.
    pub why: &'static str,
}

/// Allows a call whatever its arguments.
pub const fn allow(syscall: i64, why: &'static str) -> Rule {
    Rule { syscall, when: &[], why }
}

/// Allows a call where its arguments are so. Several rules for one call are alternatives.
pub const fn allow_if(syscall: i64, when: &'static [When], why: &'static str) -> Rule {
    Rule { syscall, when, why }
}

/// A filter, compiled.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// Compiles the rules of one thread.
    ///
    /// # Errors
    /// When the rules are no filter: a mistake in the program.
    pub fn new(groups: &[&[Rule]]) -> Result<Filter> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for rule in groups.iter().copied().flatten() {
            let alternatives = rules.entry(rule.syscall).or_default();
            if !rule.when.is_empty() {
                let conditions = rule.when.iter().map(condition).collect::<std::result::Result<Vec<_>, _>>();
                alternatives.push(SeccompRule::new(conditions.map_err(Error::Rules)?).map_err(Error::Rules)?);
            }
        }
        // An empty list of alternatives means "always", so an unconditional rule must win over conditional ones.
        for rule in groups.iter().copied().flatten().filter(|rule| rule.when.is_empty()) {
            rules.insert(rule.syscall, Vec::new());
        }
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(Error::Rules)?;
        let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch).map_err(Error::Rules)?;
        Ok(Filter(BpfProgram::try_from(filter).map_err(Error::Rules)?))
    }

    /// The other way round: all is allowed but these. For a process that starts others, which inherit its filter and need
    /// what they need.
    ///
    /// # Errors
    /// As [`Filter::new`].
    pub fn forbidding(syscalls: &[i64]) -> Result<Filter> {
        let rules: BTreeMap<i64, Vec<SeccompRule>> = syscalls.iter().map(|syscall| (*syscall, Vec::new())).collect();
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(Error::Rules)?;
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::KillProcess, arch).map_err(Error::Rules)?;
        Ok(Filter(BpfProgram::try_from(filter).map_err(Error::Rules)?))
    }

    /// Puts the calling thread, and all it will start, under this filter, for ever.
    ///
    /// # Errors
    /// The system's.
    pub fn install(&self) -> Result<()> {
        apply_filter(&self.0).map_err(Error::Filter)
    }
}

fn condition(when: &When) -> std::result::Result<SeccompCondition, seccompiler::BackendError> {
    match *when {
        When::Is(arg, value) => SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into()),
        When::Not(arg, value) => SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value.into()),
        When::HasNone(arg, mask) => SeccompCondition::new(arg, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), 0),
    }
}

#[cfg(test)]
mod tests;
