//! Completions and manual pages, made from the same words as `--help`.
//!
//! The pages of the other programs come from those themselves: each prints its own when it is asked to. They are in section 8,
//! since there is both a program `outboard-console` and a command `outboard console`.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::CommandFactory;
use clap_complete::generate;
use clap_mangen::Man;

use crate::args::{self, Args};
use crate::notices;
use crate::supervisor::programs::PROGRAMS;

const NAME: &str = "outboard";

/// The command without what nobody types.
fn command() -> clap::Command {
    let whole = Args::command();
    let shown: Vec<clap::Command> = whole.get_subcommands().filter(|one| !one.is_hide_set()).cloned().collect();
    // There is no way to take a subcommand away, only to put all others into a command like it.
    let empty = clap::Command::new(NAME).version(env!("CARGO_PKG_VERSION"));
    let about = whole.get_about().cloned().unwrap_or_default();
    empty.about(about).subcommand_required(true).arg_required_else_help(true).subcommands(shown)
}

/// `outboard completions`
pub fn completions(args: &args::Completions) -> Result<u8> {
    let mut text = Vec::new();
    generate(args.shell, &mut command(), NAME, &mut text);
    notices::answer(&String::from_utf8_lossy(&text))?;
    Ok(0)
}

/// `outboard man`
pub fn man(args: &args::Man) -> Result<u8> {
    match &args.dir {
        None => {
            let mut page = Vec::new();
            Man::new(command()).render(&mut page).context("Cannot write the page")?;
            notices::answer(&String::from_utf8_lossy(&page))?;
        }
        Some(dir) => write(dir)?,
    }
    Ok(0)
}

fn write(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    clap_mangen::generate_to(command(), dir).with_context(|| format!("Cannot write into {}", dir.display()))?;
    let own = env::current_exe().context("Cannot find out where outboard itself is")?;
    for name in PROGRAMS {
        let program = own.with_file_name(name);
        let output = Command::new(&program).arg("--print-man").output();
        let output = output.with_context(|| format!("Cannot start {}", program.display()))?;
        if !output.status.success() {
            bail!("Cannot get the page of {}: it ended with {}", program.display(), output.status);
        }
        let page = dir.join(format!("{name}.8"));
        fs::write(&page, output.stdout).with_context(|| format!("Cannot write {}", page.display()))?;
    }
    Ok(())
}
