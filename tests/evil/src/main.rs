//! `outboard-evil-backend`: a backend that breaks one rule, or one after the other on a tour.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use evil::{Behaviour, all, named, serve};

/// A vhost-user backend that breaks a rule, for frontends to survive.
#[derive(Debug, Parser)]
#[command(name = "outboard-evil-backend", version)]
struct Args {
    /// Say which behaviours there are
    #[arg(long)]
    list: bool,
    /// What it does; given several times, each connection meets the next one, and the last one stays
    #[arg(long, value_name = "NAME", default_value = "good", value_parser = behaviour)]
    behaviour: Vec<Behaviour>,
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH", required_unless_present = "list")]
    socket_path: Option<PathBuf>,
    /// End each connection but the last behaviour's after so many milliseconds
    #[arg(long, value_name = "MS")]
    tour: Option<u64>,
}

fn behaviour(name: &str) -> std::result::Result<Behaviour, String> {
    named(name).ok_or_else(|| "there is no such behaviour; see --list".to_owned())
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.list {
        all().iter().for_each(|one| println!("{:<32}{}", one.name, one.about));
        return Ok(());
    }
    let path = args.socket_path.context("No socket is named")?;
    let listener = UnixListener::bind(&path).with_context(|| format!("Cannot listen on {}", path.display()))?;
    let last = args.behaviour.len().saturating_sub(1);
    for (turn, stream) in listener.incoming().enumerate() {
        let Some(one) = args.behaviour.get(turn.min(last)) else { return Ok(()) };
        let limit = args.tour.filter(|_| turn < last).map_or(Duration::MAX, Duration::from_millis);
        println!("{}", one.name);
        if let Err(error) = serve(stream.context("Cannot accept a frontend")?, one.act, turn as u64, limit) {
            eprintln!("{}: {error:#}", one.name);
        }
    }
    Ok(())
}
