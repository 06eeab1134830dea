//! A filter lets through what it names and ends the process for the rest. Each case runs in a process of its own: this test's
//! program again, told by a variable which part to play.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use super::*;
use crate::{Capability, allow, allow_if, lower, raise};

const PART: &str = "OUTBOARD_FILTER_TEST";

/// Plays a part in a process of its own, and tells how that ended.
fn play(part: &str) -> ExitStatus {
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new(me);
    command.args(["--exact", "filter::tests::the_part", "--nocapture"]).env(PART, part);
    command.output().unwrap().status
}

const NO_EXECUTABLE: &[When] = &[When::HasNone(2, 4)];

/// What the runtime needs to end a process, and what the parts are about.
const RULES: &[Rule] = &[
    allow(libc::SYS_exit_group, "the end"),
    allow(libc::SYS_write, "words"),
    allow(libc::SYS_getppid, "the part that is allowed"),
    allow_if(libc::SYS_mprotect, NO_EXECUTABLE, "memory, not code"),
    allow_if(libc::SYS_getpriority, &[When::Is(0, 1)], "one alternative"),
    allow_if(libc::SYS_getpriority, &[When::Is(0, 2)], "another"),
    allow_if(libc::SYS_unlinkat, &[When::Not(0, libc::AT_FDCWD.cast_unsigned())], "names in a directory that is open"),
    allow(libc::SYS_capget, "what a thread has in force of its capabilities"),
    allow(libc::SYS_capset, "less of it"),
];

#[test]
fn the_part() {
    let Ok(part) = std::env::var(PART) else { return };
    let filter = if part.starts_with("forbid-") { Filter::forbidding(&[libc::SYS_getuid]) } else { Filter::new(&[RULES]) };
    filter.unwrap().install().unwrap();
    match part.as_str() {
        "allowed" | "forbid-other" => drop(rustix::process::getppid()),
        "forbidden" | "forbid-this" => drop(rustix::process::getuid()),
        "one" => drop(rustix::process::getpriority_pgrp(None)),
        "another" => drop(rustix::process::getpriority_user(rustix::process::Uid::ROOT)),
        "neither" => drop(rustix::process::getpriority_process(None)),
        "lower" => lower(&[Capability::CAP_CHOWN]).and_then(|()| raise(&[])).unwrap(),
        "beneath" => drop(rustix::fs::unlinkat(std::io::stdin(), "nothing", rustix::fs::AtFlags::empty())),
        "anywhere" => drop(rustix::fs::unlinkat(rustix::fs::CWD, "nothing", rustix::fs::AtFlags::empty())),
        _ => {}
    }
    crate::sys::exit(7);
}

#[test]
fn what_is_named_is_allowed_and_the_rest_ends_the_process() {
    assert_eq!(play("allowed").code(), Some(7));
    assert_eq!(play("one").code(), Some(7));
    assert_eq!(play("another").code(), Some(7));
    assert_eq!(play("forbidden").signal(), Some(libc::SIGSYS));
    assert_eq!(play("neither").signal(), Some(libc::SIGSYS));
}

#[test]
fn an_argument_may_be_any_number_but_one() {
    assert_eq!(play("beneath").code(), Some(7));
    assert_eq!(play("anywhere").signal(), Some(libc::SIGSYS));
}

#[test]
fn a_thread_lowers_its_capabilities_with_two_calls() {
    assert_eq!(play("lower").code(), Some(7));
}

#[test]
fn what_is_forbidden_ends_the_process_and_the_rest_is_allowed() {
    assert_eq!(play("forbid-other").code(), Some(7));
    assert_eq!(play("forbid-this").signal(), Some(libc::SIGSYS));
}

#[test]
fn an_unconditional_rule_wins_over_conditional_ones() {
    let both = [allow_if(1, &[When::Is(0, 1)], "one case"), allow(1, "any case")];
    let any = [allow(1, "any case")];
    assert_eq!(Filter::new(&[&both]).unwrap().0.len(), Filter::new(&[&any]).unwrap().0.len());
}
