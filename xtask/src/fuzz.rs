//! `cargo xtask fuzz`: builds the fuzzers with the stable toolchain, runs each for a while, and keeps what was worth keeping.
//!
//! A target's corpus is unpacked into the build directory, grown there, reduced to the inputs that each reach something the others do
//! not, and packed again into the tree. An input that breaks a target is put into the tree as well, where the suite's next
//! run fails on it until it is mended: each crash becomes a regression test by being found.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{build, cache, host, say};

/// The same file as in the crate of the targets, which is too large to be built before every task.
#[path = "../../tests/fuzz/src/corpus.rs"]
#[expect(unreachable_pub, reason = "public in the crate it comes from")]
mod corpus;

/// Fuzz everything that reads an attacker's bytes
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    time: u32,
    /// Only this target; again for more. Without it, all of them
    #[arg(long, value_parser = target)]
    target: Vec<String>,
    /// Processes that work on one target side by side
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    jobs: u8,
}

/// What makes the compiler count edges and comparisons for libFuzzer, without a nightly compiler.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on -Coverflow-checks=on -Ccodegen-units=1 --cfg fuzzing";

/// An input that takes longer hangs.
const HANG: &str = "-timeout=10";
/// Longest input, in bytes: all the parsers' own limits lie below it.
const LONGEST: &str = "-max_len=4096";
/// Inputs kept for each target. What reaches less than these is not worth the space.
const KEPT: usize = 2000;

fn target(name: &str) -> Result<String, String> {
    let known = targets();
    if known.iter().any(|one| one == name) { Ok(name.to_owned()) } else { Err(format!("one of {}", known.join(", "))) }
}

/// The programs in `fuzz_targets/`.
fn targets() -> Vec<String> {
    let folder = folder().join("fuzz_targets");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| Some(entry.path().file_stem()?.to_string_lossy().into_owned())).collect();
    names.sort();
    names
}

fn folder() -> PathBuf {
    cache::tree().join("tests/fuzz")
}

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    host::prepare(&host::Wanted { cxx: true, ..host::Wanted::default() })?;
    let names = if args.target.is_empty() { targets() } else { args.target.clone() };
    let whole = Duration::from_secs(u64::from(args.time) * names.len() as u64);
    say::line(&format!("{} targets, {} s each: about {} min.", names.len(), args.time, whole.as_secs().div_ceil(60)));
    let programs = programs()?;
    let mut broken = Vec::new();
    for name in &names {
        let outcome = say::step(&format!("Fuzz {name}"), || fuzz(name, &programs, args))?;
        println!("{name:20} {:>10} runs {:>6} edges {:>5} inputs kept", outcome.runs, outcome.edges, outcome.kept);
        broken.extend(outcome.crash);
    }
    if broken.is_empty() {
        return Ok(());
    }
    bail!("These inputs break their targets, and the suite until they are mended:\n  {}", broken.join("\n  "))
}

fn programs() -> Result<PathBuf> {
    let target = cache::tree().join("target/fuzz");
    let mut command = build::cargo();
    command.args(["build", "--quiet", "--release", "--package", "fuzz", "--bins", "--features", "libfuzzer"]);
    command.arg("--target-dir").arg(&target).env("RUSTFLAGS", FLAGS);
    say::step("Build the fuzzers", || say::openly(&mut command))?;
    Ok(target.join("x86_64-unknown-linux-gnu/release"))
}

#[derive(Debug, Default)]
struct Outcome {
    runs: u64,
    edges: u64,
    kept: usize,
    crash: Vec<String>,
}

fn fuzz(name: &str, programs: &Path, args: &Args) -> Result<Outcome> {
    let work = cache::tree().join("target/fuzz/work").join(name);
    let (corpus, artifacts, merged) = (work.join("corpus"), work.join("artifacts"), work.join("merged"));
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    }
    unpack(name, &corpus)?;
    let mut command = Command::new(programs.join(name));
    command.arg(&corpus).arg(format!("-max_total_time={}", args.time)).args([HANG, LONGEST, "-print_final_stats=1"]);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    if args.jobs > 1 {
        command.arg(format!("-fork={}", args.jobs));
    }
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("Cannot start the fuzzer {name}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let mut outcome = Outcome { runs: runs(&text), edges: number_after(&text, "cov: "), ..Outcome::default() };
    outcome.crash = keep_crashes(name, &artifacts)?;
    if !output.status.success() && outcome.crash.is_empty() {
        bail!("The fuzzer {name} failed ({}):\n{}", output.status, tail(&text));
    }
    outcome.kept = reduce(name, programs, &corpus, &merged)?;
    Ok(outcome)
}

/// The number of executions: the last one that was said.
fn runs(text: &str) -> u64 {
    number_after(text, "stat::number_of_executed_units: ")
        .max(text.lines().rev().find_map(|line| line.strip_prefix('#')?.split([':', '\t']).next()?.parse().ok()).unwrap_or(0))
}

fn number_after(text: &str, word: &str) -> u64 {
    let found = text.rsplit_once(word).map(|(_, rest)| rest.trim_start());
    found.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()).unwrap_or(0)
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// Each input that broke something goes into the tree, under the name the fuzzer gave it.
fn keep_crashes(name: &str, artifacts: &Path) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    let home = folder().join("regressions").join(name);
    for entry in fs::read_dir(artifacts).context("Cannot read the fuzzer's artifacts")?.flatten() {
        let file = entry.file_name();
        if file.to_string_lossy().starts_with("slow-unit") {
            continue;
        }
        fs::create_dir_all(&home).with_context(|| format!("Cannot make {}", home.display()))?;
        let to = home.join(&file);
        fs::rename(entry.path(), &to).with_context(|| format!("Cannot keep {}", to.display()))?;
        kept.push(to.display().to_string());
    }
    Ok(kept)
}

/// Keeps the inputs that reach what no shorter one reaches, and packs them into the tree.
fn reduce(name: &str, programs: &Path, corpus: &Path, merged: &Path) -> Result<usize> {
    drop(fs::remove_dir_all(merged));
    fs::create_dir_all(merged).with_context(|| format!("Cannot make {}", merged.display()))?;
    let mut command = Command::new(programs.join(name));
    command.args(["-merge=1", HANG, LONGEST]).arg(merged).arg(corpus);
    say::quietly(&mut command)?;
    let mut inputs = Vec::new();
    for entry in fs::read_dir(merged).context("Cannot read the reduced corpus")?.flatten() {
        inputs.push(fs::read(entry.path()).context("Cannot read the reduced corpus")?);
    }
    // One that reaches nothing belongs to every corpus.
    inputs.push(Vec::new());
    inputs.sort_by_key(Vec::len);
    inputs.truncate(KEPT);
    let kept = inputs.len();
    corpus::write(&corpus::packed(&folder(), name), inputs).context("Cannot keep the corpus")?;
    Ok(kept)
}

fn unpack(name: &str, corpus: &Path) -> Result<()> {
    let inputs = corpus::read(&corpus::packed(&folder(), name)).context("Cannot read the kept corpus")?;
    for (index, input) in inputs.iter().enumerate() {
        fs::write(corpus.join(format!("kept-{index}")), input).context("Cannot unpack the kept corpus")?;
    }
    Ok(())
}
