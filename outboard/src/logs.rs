//! `outboard logs`: what the processes of a running machine have said.

use anyhow::Result;

use crate::args::Logs;
use crate::journal::Reader;
use crate::{notices, runtime};

/// How the composer calls itself in its lines.
const COMPOSER: &str = "outboard";

/// The command.
pub fn run(args: &Logs) -> Result<u8> {
    let (path, runs) = runtime::kept(&args.name, runtime::LOG)?;
    let mut reader = Reader::open(path)?;
    while let Some(line) = reader.next(args.follow && runs)? {
        if !is_wanted(&line, args) {
            continue;
        }
        if !notices::answer(&format!("{line}\n"))? {
            break;
        }
    }
    Ok(0)
}

/// A line is a moment, a space, a name, a colon and what was said.
fn is_wanted(line: &str, args: &Logs) -> bool {
    let (time, rest) = line.split_once(' ').unwrap_or_default();
    let name = rest.split(':').next().unwrap_or_default();
    let name = if name == COMPOSER { "composer" } else { name };
    let of_process = args.process.as_ref().is_none_or(|wanted| name == wanted);
    of_process && args.since.as_ref().is_none_or(|since| time >= since.as_str())
}
