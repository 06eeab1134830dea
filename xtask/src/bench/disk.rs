//! Disk servers driven in turns by the same program: requests in a second, and what each costs the server's processor.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::process::{self, Running};
use super::table::Row;
use super::{Bench, Part};
use crate::debian;

const SECONDS: &str = "0.7";

/// What one run gives: requests in a second, microseconds of processor for one.
struct Measured {
    rate: f64,
    cost: f64,
}

/// The group.
pub(crate) fn parts() -> Vec<Part> {
    let mut parts = Vec::new();
    for load in ["randread", "randwrite"] {
        for block in ["4096", "65536"] {
            for depth in ["1", "32"] {
                let what = format!("{load}, {block} bytes, depth {depth}");
                parts.push(Part::new(what, move |bench| pair(bench, &bench.filled_disk()?, [load, block, depth])));
            }
        }
    }
    parts
}

fn pair(bench: &Bench, image: &Path, load: [&str; 3]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (cache, our_flag, their_option) in
        [("page cache", None, ""), ("O_DIRECT", Some("--direct"), ",cache.direct=on,aio=io_uring")]
    {
        let (mut rates, mut costs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for _ in bench.turns(3) {
            for (side, command) in [ours(bench, image, our_flag), theirs(bench, image, their_option)].into_iter().enumerate() {
                let Measured { rate, cost } = measure(bench, command, side == 1, load)?;
                rates[side].push(rate);
                costs[side].push(cost);
            }
        }
        let [load, block, depth] = load;
        let name = format!("{load} {} KiB, depth {depth}, {cache}", block.parse::<u32>().unwrap_or_default() / 1024);
        let peer = bench.version("qemu-storage-daemon", their_option.trim_start_matches(','));
        let [our_rate, their_rate] = rates.map(|rates| rates.into_iter().map(|rate| rate / 1000.0).collect());
        let [our_cost, their_cost] = costs;
        rows.push(Row::new(name.clone(), "1000/s", peer.clone()).of(our_rate, their_rate));
        rows.push(Row::new(format!("{name}, CPU"), "us/request", peer).of(our_cost, their_cost));
    }
    Ok(rows)
}

/// The socket's path is still to be added.
fn ours(bench: &Bench, image: &Path, flag: Option<&str>) -> Command {
    let mut command = Command::new(bench.program("outboard-blk"));
    command.args(flag).arg("--blk-file").arg(image).args(["--format", "raw", "--socket-path"]);
    command
}

/// The export's address is still to be added.
fn theirs(bench: &Bench, image: &Path, cache: &str) -> Command {
    let mut command = debian::program(&bench.qemu, "usr/bin/qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}{cache}", image.display())).arg("--export");
    command
}

fn measure(bench: &Bench, mut server: Command, theirs: bool, [load, block, depth]: [&str; 3]) -> Result<Measured> {
    let socket = bench.socket();
    if theirs {
        let address = socket.display();
        server.arg(format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={address}"));
    } else {
        server.arg(&socket);
    }
    let server = Running::listening(server, &socket)?;
    let before = server.busy();
    let mut probe = Command::new(bench.program("outboard-probe"));
    probe.args(["blk", "bench", "--json", "--seconds", SECONDS, "--load", load, "--block-size", block, "--depth", depth]);
    let name = if theirs { "qemu-storage-daemon" } else { "outboard-blk" };
    let told = process::told(probe.arg(&socket)).with_context(|| format!("{name} was not measured"))?;
    let answer: serde_json::Value = serde_json::from_slice(&told).context("The probe gave no JSON")?;
    let spent = server.busy() - before;
    let requests = answer["requests"].as_f64().context("The probe gave no requests")?;
    let rate = answer["requests_per_second"].as_f64().context("The probe gave no requests_per_second")?;
    Ok(Measured { rate, cost: spent * 1e6 / requests.max(1.0) })
}
