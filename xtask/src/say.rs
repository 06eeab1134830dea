//! What a person sees while a task works: a plan, one line per step, and the one sentence of a failure.

use std::io::{IsTerminal, Write, stderr};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often the elapsed time of a step is refreshed on a terminal.
const REFRESH: Duration = Duration::from_secs(1);
/// How often a long step without a terminal shows that it is alive: CI systems end jobs that are silent for long.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);
/// How many of the last lines of a failed program's output are shown.
const TAIL_LINES: usize = 30;
/// Where a command line in a sentence is cut: the program and its first arguments say which one it was.
const LONGEST_COMMAND: usize = 120;

/// Says what is about to be set up, before anything of it is done.
pub(crate) fn plan(title: &str, items: &[String]) {
    eprintln!("{title}");
    for item in items {
        eprintln!("  - {item}");
    }
}

/// One line of news.
pub(crate) fn line(text: &str) {
    eprintln!("{text}");
}

/// The reason a task failed, as one chain.
pub(crate) fn failure(error: &anyhow::Error) {
    eprintln!("xtask: {error:#}");
}

/// Runs `work` under the heading `text`, showing on stderr how long it takes.
pub(crate) fn step<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let (done, ticks) = channel::<()>();
    let heading = text.to_owned();
    let terminal = stderr().is_terminal();
    if terminal {
        eprint!("  {heading} ...");
    }
    let ticker = thread::spawn(move || {
        let every = if terminal { REFRESH } else { SIGN_OF_LIFE };
        while ticks.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
            let seconds = began.elapsed().as_secs();
            if terminal {
                eprint!("\r  {heading} ... {seconds} s");
            } else {
                eprintln!("  {heading} ... {seconds} s so far");
            }
            drop(stderr().flush());
        }
    });
    let result = work();
    drop(done);
    drop(ticker.join());
    let seconds = began.elapsed().as_secs_f32();
    let outcome = if result.is_ok() { "done" } else { "failed" };
    if terminal {
        eprintln!("\r  {text} ... {outcome}, {seconds:.1} s");
    } else {
        eprintln!("  {text} ... {outcome}, {seconds:.1} s");
    }
    result
}

/// Runs a program to its end with its output kept back; a failure shows the end of that output.
pub(crate) fn quietly(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("Cannot start {program}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(TAIL_LINES)) {
        eprintln!("  | {line}");
    }
    bail!("`{}` failed ({})", short(command), output.status);
}

/// Runs a program to its end with its output shown.
pub(crate) fn openly(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("Cannot start {program}"))?;
    if !status.success() {
        bail!("`{}` failed ({status})", short(command));
    }
    Ok(())
}

/// A command line that fits a sentence.
fn short(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
        if text.len() > LONGEST_COMMAND {
            let mut end = LONGEST_COMMAND;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
            text.push_str(" ...");
            break;
        }
    }
    text
}
