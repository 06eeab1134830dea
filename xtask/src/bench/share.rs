//! File servers driven in turns by the same program, without a guest's kernel: requests in a second, and how long each takes.
//!
//! Upstream's virtiofsd has two ways, each better at something: one thread for all, or a pool. Both are measured, and the one that
//! answers more is the peer of a row.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::process::{self, Running};
use super::table::{Row, Target};
use super::{Bench, Part};
use crate::virtiofsd;

const SECONDS: &str = "0.7";

/// Descriptors of a ring, as Linux finds them under QEMU.
const RING: &str = "1024";

/// Upstream's way that is fast when much is asked at once.
pub(crate) const POOL: &str = "virtiofsd 1.13.2, pool of 4";
/// The other one.
pub(crate) const ONE_THREAD: &str = "virtiofsd 1.13.2, one thread";

/// What is asked.
#[derive(Clone, Copy, Debug)]
struct Case {
    what: &'static str,
    load: &'static str,
    bytes: u32,
    depth: u32,
    /// Of ours. Upstream has one.
    queues: u32,
    /// Whether the client looks for answers all the time, as a processor does whose hypervisor keeps it awake, or sleeps.
    awake: bool,
    target: Option<f64>,
}

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    OneThread,
    Pool,
}

#[derive(Debug, Default)]
struct Measured {
    rates: Vec<f64>,
    half: Vec<f64>,
    most: Vec<f64>,
    /// Processor time of a request, in microseconds.
    cost: Vec<f64>,
}

/// The group.
pub(crate) fn parts() -> Vec<Part> {
    let case = |what, load, bytes, depth, queues, target| Case { what, load, bytes, depth, queues, awake: false, target };
    let awake = |what, load, depth, queues, target| Case { awake: true, ..case(what, load, 4096, depth, queues, target) };
    let cases = [
        case("unknown request", "nothing", 4096, 1, 1, None),
        case("unknown request", "nothing", 4096, 32, 1, None),
        case("GETATTR", "getattr", 4096, 1, 1, Some(1.0)),
        awake("GETATTR", "getattr", 1, 1, Some(1.0)),
        case("GETATTR", "getattr", 4096, 32, 1, None),
        case("GETATTR", "getattr", 4096, 32, 2, None),
        awake("GETATTR", "getattr", 32, 1, None),
        awake("GETATTR", "getattr", 32, 2, Some(2.5)),
        case("LOOKUP hit", "lookup", 4096, 1, 1, None),
        case("LOOKUP hit", "lookup", 4096, 32, 1, Some(1.8)),
        case("LOOKUP miss", "lookup-miss", 4096, 1, 1, None),
        case("LOOKUP miss", "lookup-miss", 4096, 32, 1, Some(2.0)),
        case("READ 4 KiB", "read", 4096, 1, 1, None),
        awake("READ 4 KiB", "read", 1, 1, None),
        case("READ 4 KiB", "read", 4096, 32, 1, Some(1.0)),
        case("READ 4 KiB", "read", 4096, 32, 2, None),
        case("WRITE 4 KiB", "write", 4096, 1, 1, None),
        case("WRITE 4 KiB", "write", 4096, 32, 1, None),
        case("READ 1 MiB", "read", 1 << 20, 1, 1, None),
        case("READ 1 MiB", "read", 1 << 20, 32, 1, None),
        case("WRITE 1 MiB", "write", 1 << 20, 1, 1, None),
        case("WRITE 1 MiB", "write", 1 << 20, 32, 1, None),
    ];
    let part = |case: Case| Part::new(name(case), move |bench: &Bench| compare(bench, case));
    cases.into_iter().map(part).collect()
}

fn name(case: Case) -> String {
    let queues = if case.queues == 1 { String::new() } else { format!(", {} queues", case.queues) };
    let awake = if case.awake { ", client awake" } else { "" };
    format!("{}, depth {}{queues}{awake}", case.what, case.depth)
}

fn compare(bench: &Bench, case: Case) -> Result<Vec<Row>> {
    let tree = virtiofsd::prepare()?;
    let sides = [Who::Ours, Who::OneThread, Who::Pool];
    let mut measured: [Measured; 3] = Default::default();
    for _ in bench.turns(3) {
        for (who, into) in sides.into_iter().zip(&mut measured) {
            measure(bench, &tree, who, case, into)?;
        }
    }
    let [ours, one, pool] = measured;
    let median = |side: &Measured| super::table::Spread::of(side.rates.clone()).map_or(0.0, |spread| spread.median);
    let pooled = median(&pool) > median(&one);
    let half_of_pool = pool.half.clone();
    let (theirs, mode) = if pooled { (pool, POOL) } else { (one, ONE_THREAD) };
    let name = name(case);
    let mut rate = Row::new(name.clone(), "1000/s", mode).of(ours.rates, theirs.rates);
    if let Some(least) = case.target {
        rate = rate.target(Target::AtLeast(least));
    }
    let half = Row::new(format!("{name}, p50"), "us", mode).of(ours.half.clone(), theirs.half);
    let most = Row::new(format!("{name}, p99"), "us", mode).of(ours.most, theirs.most);
    // Upstream's process is gone with its frontend, before it could be asked what it has taken.
    let cost = Row::new(format!("{name}, processor"), "us", "none").of(ours.cost, Vec::new());
    let mut rows = vec![rate, half, most, cost];
    if case.awake && case.load == "read" && case.depth == 1 {
        let row = Row::new(format!("{name}, p50 beside the pool's"), "us", POOL).of(ours.half, half_of_pool);
        rows.push(row.target(Target::Ratio(0.34)));
    }
    Ok(rows)
}

fn measure(bench: &Bench, tree: &Path, who: Who, case: Case, into: &mut Measured) -> Result<()> {
    let folder = bench.dir.join("shared");
    std::fs::create_dir_all(&folder).context("Cannot make a directory to share")?;
    let socket = bench.socket();
    let server = Running::listening(command(bench, tree, (who, case.queues), &folder, &socket), &socket)?;
    // Upstream's socket is there a moment before it listens.
    std::thread::sleep(std::time::Duration::from_millis(100));
    let before = server.busy();
    let queues = if who == Who::Ours { case.queues } else { 1 };
    let [bytes, depth, queues] = [case.bytes, case.depth, queues].map(|number| number.to_string());
    let mut probe = Command::new(bench.program("outboard-probe"));
    probe.args(["fs", "bench", "--json", "--seconds", SECONDS, "--load", case.load, "--block-size", &bytes, "--depth", &depth]);
    probe.args(["--queues", &queues, "--queue-size", RING]);
    probe.args(case.awake.then_some("--poll"));
    let told = process::told(probe.arg(&socket)).with_context(|| format!("{who:?} was not measured"))?;
    let spent = server.busy() - before;
    let answer: serde_json::Value = serde_json::from_slice(&told).context("The probe gave no JSON")?;
    let number = |name: &str| answer[name].as_f64().with_context(|| format!("The probe gave no {name}"));
    into.rates.push(number("requests_per_second")? / 1000.0);
    into.half.push(number("p50_us")?);
    into.most.push(number("p99_us")?);
    into.cost.push(spent * 1e6 / number("requests")?.max(1.0));
    Ok(())
}

/// A server with so many queues, if it is ours. `tree` is where upstream's was unpacked.
pub(crate) fn command(bench: &Bench, tree: &Path, (who, queues): (Who, u32), folder: &Path, socket: &Path) -> Command {
    let mut command = if who == Who::Ours {
        let mut command = Command::new(bench.program("outboard-virtiofsd"));
        command.args(["--num-request-queues", &queues.to_string()]);
        command
    } else {
        let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu")).arg(tree.join("usr/libexec/virtiofsd"));
        command.args(["--thread-pool-size", if who == Who::Pool { "4" } else { "0" }]);
        command
    };
    command.arg("--shared-dir").arg(folder).arg("--socket-path").arg(socket);
    command
}
