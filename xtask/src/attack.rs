//! `cargo xtask attack`: how backends take the attacks of `outboard-probe attack`, ours beside other people's, as the page
//! `docs/attacks.md`. What is printed is that page; nothing of it is written by hand.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::debian::{self, Packages};
use crate::{build, cache, host, nested, say};

mod shares;

/// Attack our device processes and other people's, and print docs/attacks.md.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only cases whose THEME/NAME contains this; may be given more than once
    #[arg(long)]
    case: Vec<String>,
    /// Send bad requests to servers of files instead, and print docs/virtiofsd-attacks.md
    #[arg(long)]
    shares: bool,
}

const INTRODUCTION: &str = "# How backends take attacks

<!-- Made by: cargo xtask attack > docs/attacks.md -->

Every attack of [`outboard-probe attack`](probe.md#attack) on our device processes and on other people's, each backend started
anew for each attack. `outboard-probe attack --list` says what each attack does, [its page](probe.md#attack) what the outcomes
mean. **Bold** is what a backend should not do: the next frontend is worse off than if there had been no attack.

That a backend dies of an attack is no vulnerability where it trusts its frontend, as most do. Ours do not: a VMM that a guest
has taken over must not reach further than the guest did. For that it matters that the process neither dies nor spins, nor
believes what it is told about memory.
";

/// Bytes of the disks.
const DISK: u64 = 8 << 20;

/// Who is attacked.
struct Target {
    /// The head of its column.
    name: &'static str,
    /// What it is, with its version.
    what: String,
    device: &'static str,
    command: Vec<String>,
}

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.shares {
        return shares::run(&args.case);
    }
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let qemu = nested::tools::qemu(&Packages::default())?;
    let programs = build::programs(false)?;
    let dir = nested::fresh_dir(&cache::dir()?)?;
    let result = page(args, &programs, &qemu, &dir);
    cache::remove_tree(&dir)?;
    println!("{}", result?.trim_end());
    Ok(())
}

fn targets(programs: &Path, qemu: &Path, dir: &Path) -> Result<Vec<Target>> {
    let disk = |name: &str| -> Result<String> {
        let path = dir.join(name);
        File::create(&path)?.set_len(DISK)?;
        Ok(path.display().to_string())
    };
    let ours = |name: &'static str, device, words: &[&str]| {
        let program = programs.join(format!("outboard-{name}")).display().to_string();
        let command = [&[program.as_str(), "--socket-path", "{socket}"], words].concat();
        Target { name, what: "this tree".to_owned(), device, command: command.into_iter().map(str::to_owned).collect() }
    };
    let log = dir.join("console.log").display().to_string();
    let theirs = debian::program(qemu, "usr/bin/qemu-storage-daemon");
    let words = std::iter::once(theirs.get_program()).chain(theirs.get_args());
    let mut server: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let version =
        say::quietly(Command::new(server.first().context("No QEMU")?).args(server.get(1..).unwrap_or_default()).arg("-V"))?;
    let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().trim().to_owned();
    let image = disk("theirs.img")?;
    server.extend(["--blockdev".to_owned(), format!("driver=file,node-name=disk,filename={image}"), "--export".to_owned()]);
    server.push("type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={socket}".to_owned());
    let peer = ours("peer-rng", "rng", &[]);
    Ok(vec![
        ours("rng", "rng", &[]),
        ours("blk", "blk", &["--blk-file", &disk("ours.img")?, "--format", "raw"]),
        ours("console", "console", &["--file", &log]),
        Target { name: "rust-vmm", what: format!("a virtio-rng made of {}", crates()?), ..peer },
        Target { name: "QEMU", what: version, device: "blk", command: server },
    ])
}

/// The versions of what the independent peer is made of.
fn crates() -> Result<String> {
    let lock = fs::read_to_string(cache::tree().join("Cargo.lock")).context("Cannot read Cargo.lock")?;
    let version = |name: &str| {
        let entry = lock.split("[[package]]").find(|entry| entry.contains(&format!("name = \"{name}\"\n")))?;
        entry.lines().find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
    };
    let names = ["vhost-user-backend", "vhost", "virtio-queue", "vm-memory"];
    Ok(names.map(|name| format!("`{name}` {}", version(name).unwrap_or("?"))).join(", "))
}

fn page(args: &Args, programs: &Path, qemu: &Path, dir: &Path) -> Result<String> {
    let targets = targets(programs, qemu, dir)?;
    let mut reports = Vec::new();
    for target in &targets {
        let mut command = Command::new(programs.join("outboard-probe"));
        command.args(["attack", "--json", "--device", target.device]);
        command.args(args.case.iter().flat_map(|case| ["--case", case])).arg("--").args(&target.command);
        // Status 1 says that an attack was not survived: that is an answer.
        let output = say::step(&format!("Attack {}", target.name), || command.output().context("Cannot start the probe"))?;
        let report = serde_json::from_slice::<Value>(&output.stdout);
        reports.push(report.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?);
    }
    Ok(format!("{INTRODUCTION}\n{}{}", summary(&targets, &reports), details(&targets, &reports)))
}

const OUTCOMES: [&str; 10] =
    ["served on", "refused", "broke the ring", "closed", "waited", "not offered", "died", "span", "hung", "leaked"];

fn cases(report: &Value) -> impl Iterator<Item = &Value> {
    report["cases"].as_array().into_iter().flatten()
}

fn summary(targets: &[Target], reports: &[Value]) -> String {
    let mut text = "| backend | what it is | survived |".to_owned();
    OUTCOMES.iter().for_each(|name| text.push_str(&format!(" {name} |")));
    text.push_str(&format!("\n|---|---|---|{}\n", "---|".repeat(OUTCOMES.len())));
    for (target, report) in targets.iter().zip(reports) {
        let Target { name, what, .. } = target;
        text.push_str(&format!("| {name} | {what} | {} of {} |", report["survived"], report["attacks"]));
        for outcome in OUTCOMES {
            let count = cases(report).filter(|case| case["outcome"] == outcome).count();
            text.push_str(&if count == 0 { " |".to_owned() } else { format!(" {count} |") });
        }
        text.push('\n');
    }
    text
}

/// One table for each theme, one row for each attack.
fn details(targets: &[Target], reports: &[Value]) -> String {
    let mut text = String::new();
    let mut theme = "";
    let all: Vec<Vec<&Value>> = reports.iter().map(|report| cases(report).collect()).collect();
    for (row, case) in all.first().into_iter().flatten().enumerate() {
        let now = case["theme"].as_str().unwrap_or_default();
        if now != theme {
            theme = now;
            let names: Vec<&str> = targets.iter().map(|target| target.name).collect();
            let heads = names.join(" | ");
            text.push_str(&format!("\n## {theme}\n\n| attack | {heads} |\n|---|{}\n", "---|".repeat(names.len())));
        }
        let cells = all.iter().map(|report| report.get(row).map_or_else(String::new, |case| cell(case)));
        let cells: Vec<String> = cells.collect();
        text.push_str(&format!("| {} | {} |\n", case["case"].as_str().unwrap_or_default(), cells.join(" | ")));
    }
    text
}

fn cell(case: &Value) -> String {
    let outcome = case["outcome"].as_str().unwrap_or_default();
    match (case["survived"].as_bool(), case["detail"].as_str().unwrap_or_default()) {
        (Some(false), detail) if outcome == "died" && !detail.is_empty() => format!("**{outcome}** ({detail})"),
        (Some(false), _) => format!("**{outcome}**"),
        _ if outcome == "not offered" => "–".to_owned(),
        _ => outcome.to_owned(),
    }
}
