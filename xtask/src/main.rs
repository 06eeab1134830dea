//! The project's tasks, `cargo xtask TASK`: everything that needs more than cargo alone.
//!
//! Theory of operation: a test or a demonstration needs a guest (Debian's kernel and a small Debian disk) and a machine that
//! can run it. The [`guest`] module makes the first from Debian's packages, downloaded and unpacked under the cache
//! directory and never installed. The [`nested`] module makes the second where the host has no KVM that boots a stock
//! kernel: an emulated machine whose own KVM does. Tasks say what they will set up before they do it, print one line per step
//! while they work, and reuse what is there: each product carries the [`cache::key`] of what it was made from.
#![forbid(unsafe_code)]

mod attack;
mod bench;
mod build;
mod cache;
mod card;
mod ci;
mod cpio;
mod debian;
mod demo;
mod disktools;
mod fstools;
mod fuzz;
mod guest;
mod host;
mod nested;
mod say;
mod test;
mod uml;
mod virtiofsd;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The tasks of the Outboard project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Set everything up and show a Debian guest whose devices are separate, confined processes
    Demo(demo::Args),
    /// Set everything up and run every test
    Test(test::Args),
    /// What continuous integration runs: formatting, clippy, every test
    Ci,
    /// Measure speed and size as ratios to other programs of the same kind, in one run
    ///
    /// Each row is measured in turns, ours and the peer's, and shows both medians, their ratio, the spread (p10 to p90), the
    /// peer with its version, and whether the project's target is reached. Needs a quiet machine to be worth keeping; some rows
    /// need root, and say so without it.
    Bench(bench::Args),
    /// Fuzz everything that reads an attacker's bytes, and keep what was found
    Fuzz(fuzz::Args),
    /// Attack our device processes and other people's, and print the page that says how they took it
    Attack(attack::Args),
    /// Make the guest images (kernel, initrd, root disk) and print where they are
    Guest,
    /// Run a command in an emulated machine that has a working KVM
    Nested(nested::Args),
}

fn main() -> ExitCode {
    let result = match Args::parse().task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Ci => ci::run(),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Attack(args) => attack::run(&args),
        Task::Guest => guest_task(),
        Task::Nested(args) => return nested::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::failure(&error);
            ExitCode::FAILURE
        }
    }
}

fn guest_task() -> Result<()> {
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let images = guest::prepare()?;
    for file in ["vmlinuz", "vmlinux", "initrd.img", "root.img"] {
        println!("{}", images.join(file).display());
    }
    Ok(())
}
