//! The programs of this tree, built.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, str};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{cache, say};

/// `cargo`, the one that runs this task, in the source tree.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(cache::tree());
    // What cargo says of the task's own package must not reach what the task builds.
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_PKG_")) {
        command.env_remove(name);
    }
    command
}

/// Builds every program, showing cargo's own progress, and returns their directory.
pub(crate) fn programs(release: bool) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--quiet", "--workspace", "--bins", "--exclude", "xtask"]);
    if release {
        command.arg("--release");
    }
    let profile = if release { "release" } else { "debug" };
    say::step(&format!("Build the programs ({profile})"), || say::openly(&mut command))?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache::tree().join("target"), PathBuf::from);
    Ok(target.join("x86_64-unknown-linux-gnu").join(profile))
}

/// The programs in a directory of cargo's.
pub(crate) fn programs_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut programs = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("Cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_ours = name == "outboard" || name.starts_with("outboard-");
        let executable = path.is_file() && path.metadata()?.permissions().mode() & 0o100 != 0;
        if is_ours && executable {
            programs.push(path);
        }
    }
    programs.sort();
    Ok(programs)
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds one test program of a crate and returns its path, or nothing where the crate has no such test.
pub(crate) fn test_program(folder: &str, test: &str) -> Result<Option<PathBuf>> {
    if !cache::tree().join(folder).join("tests").join(format!("{test}.rs")).exists() {
        return Ok(None);
    }
    // A folder's name is its crate's name.
    let package = folder.rsplit('/').next().unwrap_or(folder);
    let mut command = cargo();
    command.args(["test", "--quiet", "--no-run", "--message-format=json", "--package", package, "--test", test]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("Cannot start cargo")?;
    if !output.status.success() {
        bail!("Cannot build the tests of {package}");
    }
    let lines = str::from_utf8(&output.stdout).context("cargo answered with something else than text")?.lines();
    let mut messages = lines.filter_map(|line| serde_json::from_str::<Message>(line).ok());
    Ok(messages.find_map(|message| if message.target?.name == test { message.executable } else { None }))
}
