//! `cargo xtask demo`: a stock Debian kernel and root disk under our VMM, every device a process of its own.
//!
//! The demonstration itself is one script, `tests/guest/demo`, the same on the host and in the nested machine.

use std::fs;
use std::io::{IsTerminal, stdin, stdout};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::image;
use crate::host::Kvm;
use crate::{build, cache, guest, host, nested, say};

/// Show a Debian guest whose devices are separate, confined processes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run the scripted session even on a terminal
    #[arg(long)]
    script: bool,
}

/// A person may look around for as long as this; the scripted session takes a minute where everything is emulated.
const SHELL_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);
const SCRIPT_LIMIT: Duration = Duration::from_secs(300);

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    let kvm = host::kvm();
    announce(&kvm)?;
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let images = guest::prepare()?;
    if matches!(kvm, Kvm::Nested(_)) {
        nested::prepare()?;
    }
    let programs = build::programs(true)?;
    let shell = !args.script && stdin().is_terminal() && stdout().is_terminal();
    let mode = if shell { "shell" } else { "script" };
    let demo = cache::tree().join("tests/guest/demo");
    match kvm {
        Kvm::Direct => on_the_host(&demo, mode, &images, &programs),
        Kvm::Nested(_) => in_nested(&demo, mode, &images, &programs),
    }
}

fn announce(kvm: &Kvm) -> Result<()> {
    let ready = match kvm {
        Kvm::Direct => guest::is_ready()?,
        Kvm::Nested(_) => nested::is_ready()?,
    };
    let mut items = Vec::new();
    if !ready {
        items.push(format!(
            "download Debian packages and make a kernel, an initrd and a root disk in {} (about 1 GB; nothing is installed)",
            cache::dir()?.display()
        ));
    }
    items.push("build the programs with cargo (release)".to_owned());
    items.push(match kvm {
        Kvm::Direct => "run the guest on this host's KVM".to_owned(),
        Kvm::Nested(why) => format!("run the guest in an emulated machine that has a KVM, because {why}: expect it to be slow"),
    });
    say::plan("This demonstration will:", &items);
    Ok(())
}

fn on_the_host(demo: &Path, mode: &str, images: &Path, programs: &Path) -> Result<()> {
    let dir = nested::fresh_dir(&cache::dir()?)?;
    image::copy_tree(&images.join("root.img"), &dir.join("disk.img"))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("bash");
    command.arg(demo).arg(mode).arg(&dir);
    command.env("OUTBOARD_GUEST", images).env("PATH", format!("{}:{path}", programs.display())).envs(host::floor());
    let status = command.status().context("Cannot start bash");
    cache::remove_tree(&dir)?;
    match status?.code() {
        Some(0) => Ok(()),
        _ => bail!("The demonstration failed"),
    }
}

fn in_nested(demo: &Path, mode: &str, images: &Path, programs: &Path) -> Result<()> {
    let script = fs::read_to_string(demo).with_context(|| format!("Cannot read {}", demo.display()))?;
    let script = format!("set -- {mode} /outboard\n{script}");
    let mut job = nested::Job::new(script, Some(programs))?;
    job.files.push((images.join("root.img"), "disk.img".to_owned()));
    job.tty = mode == "shell";
    job.limit = if job.tty { SHELL_LIMIT } else { SCRIPT_LIMIT };
    say::line("Starting the emulated machine.");
    match job.run()? {
        0 => Ok(()),
        status => bail!("The demonstration failed (exit status {status})"),
    }
}
