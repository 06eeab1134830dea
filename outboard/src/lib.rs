//! The composer: it makes one virtual machine out of processes and keeps them alive.
//!
//! # Theory of operation
//!
//! `outboard run` reads a machine file ([`machine`]), checks what it names, makes a runtime directory ([`runtime`]) and then
//! starts, for every device, one confined process holding one end of a socket pair, and the VMM holding the other ends
//! ([`supervisor`]). From there it waits in one loop. It is single-threaded, it reads no guest byte, and it is on no
//! data path: a machine runs at full speed while the composer sleeps.
//!
//! What happens when something ends is the composer's whole purpose:
//!
//! | what ends | what follows |
//! |---|---|
//! | a device process | it is started again, at once and then with growing delay, and re-plugged into the VMM |
//! | a device process that never served | the machine file is wrong: everything ends, with that process's own sentence |
//! | somebody else's backend | its socket is tried again with growing delay, and re-plugged |
//! | the process of the user's terminal, with 0 | the user has left: the power button, a deadline, the end |
//! | the VMM | the machine has ended; its exit status becomes ours |
//! | the composer, by a signal | the power button, a deadline, the end; a second signal ends at once |
//! | the composer, by SIGKILL | the kernel kills every child; the [`janitor`] removes the directory and restores the terminal |
//!
//! The [`control`] socket of a running machine speaks QMP. [`ps`] and [`stop`] are its clients; they hold no state. What its
//! processes say and what happens to them is kept beside it ([`journal`]), for [`logs`] and [`events`].
#![forbid(unsafe_code)]

pub mod args;
pub mod background;
pub mod check;
mod clients;
pub mod console;
pub mod control;
pub mod disks;
pub mod doctor;
pub mod error;
pub mod events;
pub mod images;
pub mod janitor;
pub mod journal;
pub mod logs;
pub mod machine;
pub mod metrics;
pub mod moment;
pub mod notices;
pub mod overlay;
pub mod pages;
pub mod ps;
pub mod runtime;
pub mod stop;
pub mod supervisor;
pub mod table;
pub mod top;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};
use error::Usage;
use machine::schema;

/// Wrong usage, as opposed to something that failed.
const USAGE: u8 = 2;

/// The program.
pub fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Run(args) => supervisor::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Schema(args) => schema(&args),
        Command::Ps(args) => ps::run(&args),
        Command::Stop(args) => stop::run(&args),
        Command::Console(args) => console::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Image(args) => images::run(&args),
        Command::Completions(args) => pages::completions(&args),
        Command::Man(args) => pages::man(&args),
        Command::Disk(args) => disks::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Janitor(args) => janitor::run(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            notices::line(&format!("outboard: {error:#}"));
            ExitCode::from(if error.is::<Usage>() { USAGE } else { 1 })
        }
    }
}

/// Prints the schema.
fn schema(args: &args::Schema) -> anyhow::Result<u8> {
    let text = if args.markdown { schema::page::page() } else { format!("{:#}\n", schema::json::schema()) };
    notices::answer(&text)?;
    Ok(0)
}
