//! How long a virtual machine takes to begin: from exec to the first instruction of the guest, and to the control socket.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::process::Running;
use super::table::{Row, Target};
use super::trace::Trace;
use super::{Bench, Part};

const LIMIT: Duration = Duration::from_secs(10);
/// How often a socket is tried: far finer than what is measured.
const EVERY: Duration = Duration::from_micros(50);

/// The group.
pub(crate) fn parts() -> Vec<Part> {
    vec![
        Part::new("exec to first KVM_RUN", |bench| Ok(vec![first_run(bench)?])),
        Part::new("exec to control socket", control_socket),
    ]
}

fn ours(bench: &Bench) -> Command {
    let mut command = Command::new(bench.program("outboard-vmm"));
    command.arg("--kernel").arg(bench.image("vmlinuz")).args(["--memory", "128M"]);
    command
}

fn first_run(bench: &Bench) -> Result<Row> {
    let row = Row::new("exec to first KVM_RUN, bzImage, shared memory", "ms", bench.qemu_name("-M microvm"))
        .target(Target::Ratio(0.5))
        .target(Target::Best(12.0));
    let trace = match Trace::new(&bench.dir) {
        Ok(trace) => trace,
        Err(error) => return Ok(row.note(format!("not measured: {error:#}"))),
    };
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for _ in bench.turns(20) {
        // Each twice, and the second counts: the first finds the processor's caches full of the other one.
        for _warm in [false, true] {
            mine.push(trace.first_run(ours(bench))?);
        }
        for _warm in [false, true] {
            theirs.push(trace.first_run(bench.microvm(&bench.image("vmlinuz")))?);
        }
    }
    let [mine, theirs] = [mine, theirs].map(|all| all.into_iter().skip(1).step_by(2).collect::<Vec<_>>());
    let best = mine.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(row.of(mine, theirs).note(format!(
        "best {best:.1} ms. Ours began by hand: it runs itself once more, confined, and has 12 MB of kernel in its memory by \
         then; QEMU is not confined, and its firmware copies the kernel later"
    )))
}

fn control_socket(bench: &Bench) -> Result<Vec<Row>> {
    let (mut connected, mut greeted) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in bench.turns(20) {
        let name = format!("bench-{round}");
        let mut command = Command::new(bench.program("outboard"));
        command.args(["run", "--name", &name, "--memory", "128M", "--kernel"]).arg(bench.image("vmlinuz"));
        command.env("XDG_RUNTIME_DIR", &bench.dir);
        let ours = (command, bench.dir.join("outboard").join(name).join("control"));
        let socket = bench.socket();
        let mut command = bench.microvm(&bench.image("vmlinuz"));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        for (side, (command, socket)) in [ours, (command, socket)].into_iter().enumerate() {
            let (connection, greeting) = control(command, &socket)?;
            connected[side].push(connection);
            greeted[side].push(greeting);
        }
    }
    let peer = bench.qemu_name("-M microvm -qmp");
    let row = |what, [ours, theirs]: [Vec<f64>; 2]| Row::new(what, "ms", peer.clone()).of(ours, theirs);
    Ok(vec![
        row("exec to control socket", connected).target(Target::Median(2.0)),
        row("exec to QMP greeting", greeted).note("ours: composer, with the VMM started and confined meanwhile"),
    ])
}

/// Milliseconds until the socket takes a connection, and until the first byte arrives on it.
fn control(command: Command, socket: &Path) -> Result<(f64, f64)> {
    let began = Instant::now();
    let milliseconds = || began.elapsed().as_secs_f64() * 1000.0;
    let _running = Running::start(command)?;
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) if began.elapsed() < LIMIT => thread::sleep(EVERY),
            Err(error) => return Err(error).context("A machine under measurement has no control socket"),
        }
    };
    let connected = milliseconds();
    stream.set_read_timeout(Some(LIMIT))?;
    stream.read_exact(&mut [0]).context("A control socket under measurement says nothing")?;
    Ok((connected, milliseconds()))
}
