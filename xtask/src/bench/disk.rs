//! Disk servers driven in turns by the same program: requests in a second, what each costs the server's processor, and how long it takes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::process::{self, Running};
use super::table::{Row, Target};
use super::{Bench, Part};
use crate::debian;

const SECONDS: &str = "0.7";

/// Descriptors of a ring, as QEMU gives them to its guests; Linux puts each request into a table of its own.
const RING: &str = "256";

/// Bytes of a disk that is written to where it has nothing yet: more than is written in all rounds.
const EMPTY: &str = "8G";

/// What a disk is, and what is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Null,
    PageRead,
    PageWrite,
    DirectRead,
    DirectWrite,
    Qcow2Read,
    Qcow2Rewrite,
    Qcow2Allocate,
}

use Case::{DirectRead, DirectWrite, Null, PageRead, PageWrite, Qcow2Allocate, Qcow2Read, Qcow2Rewrite};

impl Case {
    fn name(self) -> &'static str {
        match self {
            Null => "null read",
            PageRead => "raw read, page cache",
            PageWrite => "raw write, page cache",
            DirectRead => "raw read, O_DIRECT",
            DirectWrite => "raw write, O_DIRECT",
            Qcow2Read => "qcow2 read, warm",
            Qcow2Rewrite => "qcow2 rewrite",
            Qcow2Allocate => "qcow2 allocating write",
        }
    }

    fn load(self) -> &'static str {
        match self {
            Null | PageRead | DirectRead | Qcow2Read => "randread",
            _ => "randwrite",
        }
    }

    fn is_qcow2(self) -> bool {
        matches!(self, Qcow2Read | Qcow2Rewrite | Qcow2Allocate)
    }

    /// The project's targets for one queue, 4 KiB, 32 at a time, and a client that sleeps, as guests do: for the rate, and for what a
    /// request costs.
    fn targets(self) -> (Option<f64>, Option<f64>) {
        match self {
            Null => (Some(1.1), Some(0.7)),
            PageRead => (Some(1.3), Some(0.75)),
            PageWrite => (Some(2.4), Some(0.35)),
            DirectRead => (Some(1.12), Some(0.75)),
            Qcow2Rewrite => (Some(3.0), None),
            DirectWrite | Qcow2Read | Qcow2Allocate => (None, None),
        }
    }
}

/// How it is done.
#[derive(Clone, Copy, Debug)]
struct Shape {
    block: u32,
    depth: u32,
    queues: u32,
    /// The client looks for completions all the time, instead of sleeping until one is announced.
    polls: bool,
}

/// What one run gives.
struct Measured {
    /// Requests in a second.
    rate: f64,
    /// Microseconds of processor for one.
    cost: f64,
    /// Microseconds, of half of the requests and of all but one in a hundred.
    times: [f64; 2],
}

/// The group.
pub(crate) fn parts() -> Vec<Part> {
    let mut parts = Vec::new();
    let mut add = |case: Case, shape: Shape| {
        parts.push(Part::new(format!("{}, {shape}", case.name()), move |bench| compare(bench, case, shape)));
    };
    for case in [Null, PageRead, PageWrite, DirectRead, DirectWrite, Qcow2Read, Qcow2Rewrite, Qcow2Allocate] {
        for depth in [1, 32, 128] {
            add(case, Shape { block: 4, depth, queues: 1, polls: false });
        }
        for depth in [1, 32] {
            add(case, Shape { block: 4, depth, queues: 1, polls: true });
        }
        add(case, Shape { block: 4, depth: 32, queues: 2, polls: false });
    }
    for case in [PageRead, PageWrite, DirectRead, DirectWrite] {
        for depth in [1, 32] {
            add(case, Shape { block: 64, depth, queues: 1, polls: false });
        }
    }
    parts.push(Part::new("qcow2 beside raw", beside_raw));
    parts
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} KiB, depth {}", self.block, self.depth)?;
        if self.queues != 1 {
            write!(f, ", {} queues", self.queues)?;
        }
        if self.polls { write!(f, ", polled") } else { Ok(()) }
    }
}

fn compare(bench: &Bench, case: Case, shape: Shape) -> Result<Vec<Row>> {
    let (mut rates, mut costs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let mut times = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    let image = image(bench, case)?;
    for _ in bench.turns(3) {
        for side in [0, 1] {
            let fresh = (case == Qcow2Allocate).then(|| empty(bench)).transpose()?;
            let image = fresh.as_deref().unwrap_or(&image);
            let server = if side == 0 { ours(bench, case, shape, image) } else { theirs(bench, case, shape, image) };
            let Measured { rate, cost, times: [half, most] } = measure(bench, server, side == 1, case.load(), shape)?;
            rates[side].push(rate / 1000.0);
            costs[side].push(cost);
            times[side][0].push(half);
            times[side][1].push(most);
        }
    }
    let (name, peer) = (format!("{}, {shape}", case.name()), bench.version("qemu-storage-daemon", options(case)));
    let [our_rate, their_rate] = rates;
    let [our_cost, their_cost] = costs;
    let [[our_half, our_most], [their_half, their_most]] = times;
    let mut rate = Row::new(name.clone(), "1000/s", peer.clone()).of(our_rate, their_rate);
    let mut cost = Row::new(format!("{name}, CPU"), "us/request", peer.clone()).of(our_cost, their_cost);
    if (shape.block, shape.depth, shape.queues, shape.polls) == (4, 32, 1, false) {
        let (least, most) = case.targets();
        rate = least.into_iter().fold(rate, |row, least| row.target(Target::AtLeast(least)));
        cost = most.into_iter().fold(cost, |row, most| row.target(Target::Ratio(most)));
    }
    Ok(vec![
        rate,
        cost,
        Row::new(format!("{name}, p50"), "us", peer.clone()).of(our_half, their_half),
        Row::new(format!("{name}, p99"), "us", peer).of(our_most, their_most),
    ])
}

/// What our own format costs, beside our own raw disk with the same content.
fn beside_raw(bench: &Bench) -> Result<Vec<Row>> {
    let shape = Shape { block: 4, depth: 32, queues: 1, polls: false };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let images = [image(bench, Qcow2Read)?, image(bench, PageRead)?];
    for _ in bench.turns(5) {
        for (case, image, rates) in [(Qcow2Read, &images[0], &mut with), (PageRead, &images[1], &mut without)] {
            rates.push(measure(bench, ours(bench, case, shape, image), false, case.load(), shape)?.rate / 1000.0);
        }
    }
    let row = Row::new(format!("qcow2 read, warm, {shape}"), "1000/s", "outboard-blk, raw").of(with, without);
    Ok(vec![row.target(Target::AtLeast(0.9))])
}

/// The image of a case, with content.
fn image(bench: &Bench, case: Case) -> Result<PathBuf> {
    let raw = bench.filled_disk()?;
    if !case.is_qcow2() {
        return Ok(raw);
    }
    let path = raw.with_extension("qcow2");
    if !path.exists() {
        let mut convert = debian::program(&bench.qemu, "usr/bin/qemu-img");
        process::told(convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&path))?;
    }
    Ok(path)
}

fn empty(bench: &Bench) -> Result<PathBuf> {
    let path = bench.dir.join("empty.qcow2");
    if path.exists() {
        std::fs::remove_file(&path).context("Cannot remove the last empty image")?;
    }
    let mut create = debian::program(&bench.qemu, "usr/bin/qemu-img");
    process::told(create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(EMPTY))?;
    Ok(path)
}

/// The socket's path is still to be added.
fn ours(bench: &Bench, case: Case, shape: Shape, image: &Path) -> Command {
    let mut command = Command::new(bench.program("outboard-blk"));
    command.args(["--num-queues", &shape.queues.to_string()]);
    match case {
        Null => command.args(["--format", "null", "--size", "1073741824"]),
        DirectRead | DirectWrite => command.args(["--format", "raw", "--direct", "--blk-file"]).arg(image),
        PageRead | PageWrite => command.args(["--format", "raw", "--blk-file"]).arg(image),
        Qcow2Read | Qcow2Rewrite | Qcow2Allocate => command.args(["--format", "qcow2", "--blk-file"]).arg(image),
    };
    command.arg("--socket-path");
    command
}

/// How the peer is told to reach the file: io_uring is the faster of its ways.
fn options(case: Case) -> &'static str {
    match case {
        Null => "null-co",
        DirectRead | DirectWrite => "aio=io_uring,cache.direct=on",
        _ => "aio=io_uring",
    }
}

/// The export's address is still to be added.
fn theirs(bench: &Bench, case: Case, shape: Shape, image: &Path) -> Command {
    let mut command = debian::program(&bench.qemu, "usr/bin/qemu-storage-daemon");
    let (image, options, queues) = (image.display(), options(case), shape.queues);
    let disk = match case {
        Null => "driver=null-co,node-name=disk,size=1073741824,read-zeroes=off".to_owned(),
        _ if case.is_qcow2() => format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={image},file.aio=io_uring"),
        _ => format!("driver=file,node-name=disk,filename={image},{options}"),
    };
    command.args(["--blockdev", &disk, "--export"]);
    command.arg(format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path="));
    command
}

fn measure(bench: &Bench, server: Command, theirs: bool, load: &str, shape: Shape) -> Result<Measured> {
    let socket = bench.socket();
    let server = Running::listening(listening(server, theirs, &socket), &socket)?;
    let before = server.busy();
    let [bytes, depth, queues] = [shape.block * 1024, shape.depth, shape.queues].map(|number| number.to_string());
    let mut probe = Command::new(bench.program("outboard-probe"));
    probe.args(["blk", "bench", "--json", "--seconds", SECONDS, "--load", load, "--block-size", &bytes, "--depth", &depth]);
    probe.args(["--queues", &queues, "--queue-size", RING, "--indirect"]).args(shape.polls.then_some("--poll"));
    let name = if theirs { "qemu-storage-daemon" } else { "outboard-blk" };
    let told = process::told(probe.arg(&socket)).with_context(|| format!("{name} was not measured"))?;
    let answer: serde_json::Value = serde_json::from_slice(&told).context("The probe gave no JSON")?;
    let spent = server.busy() - before;
    let number = |name: &str| answer[name].as_f64().with_context(|| format!("The probe gave no {name}"));
    let cost = spent * 1e6 / number("requests")?.max(1.0);
    Ok(Measured { rate: number("requests_per_second")?, cost, times: [number("p50_us")?, number("p99_us")?] })
}

/// The command with the socket it is to listen on, which is the end of its last word, or another.
fn listening(server: Command, theirs: bool, socket: &Path) -> Command {
    let mut command = Command::new(server.get_program());
    let words: Vec<_> = server.get_args().collect();
    match words.split_last() {
        Some((last, rest)) if theirs => command.args(rest).arg(format!("{}{}", last.to_string_lossy(), socket.display())),
        _ => command.args(words).arg(socket),
    };
    command
}
