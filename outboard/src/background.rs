//! `outboard run --detach`: a machine in the background, with its errors on the caller's terminal until it runs.
//!
//! Theory of operation: the command starts itself again, with one end of a socket pair as stdin, and waits. The other, which has a
//! session of its own, does all that `run` does; when the guest is about to run it says so, lets go of the caller's terminal and
//! goes on. If the caller is killed before, so is it. If it ends before, it has said why on the terminal that both still share, and its status is ours.

use std::env;
use std::fs::File;
use std::io::{Read, stdin};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Signal, set_parent_process_death_signal, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::notices;

const DETACH: &str = "--detach";
const BACKGROUND: &str = "--background";

/// The caller's side: starts the other one and waits until its machine runs.
pub fn start() -> Result<u8> {
    let (mut ours, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
    let program = env::current_exe().context("Cannot find out where outboard itself is")?;
    let args = env::args_os().skip(1).map(|arg| if arg == DETACH { BACKGROUND.into() } else { arg });
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut child = command.spawn().context("Cannot start outboard again")?;
    // It has the other end; a copy here would hide its end from us.
    drop(command);
    let mut name = String::new();
    let told = ours.read_to_string(&mut name);
    if told.is_ok() && !name.is_empty() {
        notices::answer(&format!("{name}: running in the background; see `outboard ps`, `outboard console {name}`\n"))?;
        return Ok(0);
    }
    let status = child.wait().context("Cannot wait for outboard")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// The other side, at its start: from here on no key of the terminal reaches it, but if the caller stops waiting it ends, and the
/// machine with it.
pub fn enter() -> Result<()> {
    // Fails only where we lead a session already, which is as good.
    let _leads_one_already = setsid();
    set_parent_process_death_signal(Some(Signal::KILL)).context("Cannot tie the machine to who waits for it")
}

/// The machine runs: tells the caller its name, and lets go of the terminal.
pub fn running(name: &str) -> Result<()> {
    let what = "Cannot let go of the terminal";
    set_parent_process_death_signal(None).context(what)?;
    let told = rustix::io::write(stdin(), name.as_bytes());
    let null = File::options().read(true).write(true).open("/dev/null").context(what)?;
    dup2_stdin(&null).context(what)?;
    dup2_stdout(&null).context(what)?;
    dup2_stderr(&null).context(what)?;
    // A caller that was killed meanwhile has wanted the machine all the same.
    let _caller_gone = told;
    Ok(())
}
