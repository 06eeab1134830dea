//! `cargo xtask bench`: our disk server beside QEMU's, in one run, as a ratio. Absolute numbers of a shared machine mean
//! nothing; the ratio of two servers driven by the same program a minute apart does.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{build, cache, host, nested, say};

/// Compare our disk server with QEMU's, in one run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Arguments for `outboard-probe blk bench`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    probe: Vec<String>,
}

const IMAGE_BYTES: u64 = 1 << 30;
/// A server that has not made its socket by then does not start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !host::is_there("qemu-storage-daemon") {
        bail!("There is no qemu-storage-daemon to compare with; run: sudo apt-get install qemu-utils");
    }
    let programs = build::programs(true)?;
    let dir = nested::fresh_dir(&cache::dir()?)?;
    let result = compare(&programs, &dir, &args.probe);
    cache::remove_tree(&dir)?;
    let (ours, theirs) = result?;
    println!("outboard-blk {ours:.0}, qemu-storage-daemon {theirs:.0} requests per second: ratio {:.2}", ours / theirs);
    Ok(())
}

fn compare(programs: &Path, dir: &Path, probe: &[String]) -> Result<(f64, f64)> {
    let image = dir.join("disk.img");
    File::create(&image)?.set_len(IMAGE_BYTES).with_context(|| format!("Cannot make {}", image.display()))?;
    let socket = dir.join("ours.sock");
    let mut ours = Command::new(programs.join("outboard-blk"));
    ours.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&image).args(["--format", "raw"]);
    let first = measure(&mut ours, &socket, programs, probe)?;
    let socket = dir.join("theirs.sock");
    let mut theirs = Command::new("qemu-storage-daemon");
    theirs.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", image.display()));
    theirs.arg("--export");
    theirs.arg(format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={}", socket.display()));
    let second = measure(&mut theirs, &socket, programs, probe)?;
    Ok((first, second))
}

/// Starts a server, drives it with the probe and returns the number the probe gives.
fn measure(server: &mut Command, socket: &PathBuf, programs: &Path, probe: &[String]) -> Result<f64> {
    let name = server.get_program().to_string_lossy().into_owned();
    let mut server = Server(server.stdin(Stdio::null()).spawn().with_context(|| format!("Cannot start {name}"))?);
    let began = Instant::now();
    while !socket.exists() {
        if began.elapsed() > START_LIMIT || server.0.try_wait()?.is_some() {
            bail!("{name} did not start");
        }
        thread::sleep(Duration::from_millis(10));
    }
    let mut command = Command::new(programs.join("outboard-probe"));
    command.args(["blk", "bench", "--json", "--socket-path"]).arg(socket).args(probe);
    let output = say::quietly(&mut command)?;
    let value: serde_json::Value = serde_json::from_slice(&output).context("The probe answered with something else than JSON")?;
    value["requests_per_second"].as_f64().context("The probe gave no requests_per_second")
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
