//! `cargo xtask bench`: our disk server beside QEMU's, in one run, as a ratio. Absolute numbers of a shared machine mean
//! nothing; the ratio of two servers driven in turns by the same program does.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::debian::{self, Packages};
use crate::{build, cache, host, nested, say};

/// Compare our disk server with QEMU's, in one run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often each server is measured; the medians count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Arguments for `outboard-probe blk bench`, such as --load randwrite --depth 1
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    probe: Vec<String>,
}

const IMAGE_MEGABYTES: usize = 256;
/// A server that has not made its socket by then does not start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let qemu = nested::tools::qemu(&Packages::default())?;
    let programs = build::programs(true)?;
    let dir = nested::fresh_dir(&cache::dir()?)?;
    let result = compare(args, &programs, &qemu, &dir);
    cache::remove_tree(&dir)?;
    let (ours, theirs) = result?;
    println!("outboard-blk         {ours:>10.0} requests/s");
    println!("qemu-storage-daemon  {theirs:>10.0} requests/s");
    println!("ratio                {:>10.2}", ours / theirs);
    Ok(())
}

fn compare(args: &Args, programs: &Path, qemu: &Path, dir: &Path) -> Result<(f64, f64)> {
    let image = dir.join("disk.img");
    let mut file = File::create(&image).with_context(|| format!("Cannot make {}", image.display()))?;
    // Real blocks: reading a hole is no work.
    for _ in 0..IMAGE_MEGABYTES {
        file.write_all(&[0x5a; 1 << 20]).with_context(|| format!("Cannot fill {}", image.display()))?;
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let socket = dir.join(format!("ours-{round}.sock"));
        let mut server = Command::new(programs.join("outboard-blk"));
        server.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&image).args(["--format", "raw"]);
        ours.push(measure(server, &socket, programs, &args.probe)?);
        let socket = dir.join(format!("theirs-{round}.sock"));
        let mut server = debian::program(qemu, "usr/bin/qemu-storage-daemon");
        server.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", image.display()));
        server.arg("--export");
        server.arg(format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={}", socket.display()));
        theirs.push(measure(server, &socket, programs, &args.probe)?);
    }
    Ok((median(ours), median(theirs)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Starts a server, drives it with the probe and returns the number the probe gives.
fn measure(mut server: Command, socket: &Path, programs: &Path, probe: &[String]) -> Result<f64> {
    let name = socket.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut server = Server(server.stdin(Stdio::null()).spawn().context("Cannot start a disk server")?);
    let began = Instant::now();
    while !socket.exists() {
        if began.elapsed() > START_LIMIT || server.0.try_wait()?.is_some() {
            bail!("The disk server of {name} did not start");
        }
        thread::sleep(Duration::from_millis(10));
    }
    say::step(&format!("Measure {name}"), || {
        let mut command = Command::new(programs.join("outboard-probe"));
        let output = say::quietly(command.args(["blk", "bench", "--json"]).args(probe).arg(socket))?;
        let value: serde_json::Value =
            serde_json::from_slice(&output).context("The probe answered with something else than JSON")?;
        value["requests_per_second"].as_f64().context("The probe gave no requests_per_second")
    })
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
