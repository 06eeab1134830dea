//! One device process: how long it takes to be confined and answer, and how long one small request takes.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use sandbox::{Identity, NetNamespace, Spawn};

use super::Bench;
use super::process::{self, Running};
use super::table::{Row, Target};
use crate::host;

/// GET_FEATURES, version 1, no body.
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
/// A header and a number.
const ANSWER: usize = 20;
const LIMIT: Duration = Duration::from_secs(10);
/// The kernel takes a network namespace apart after the last process in it is gone, and makes no new one meanwhile.
const CLEANUP: Duration = Duration::from_millis(100);
const REQUESTS: &str = "20000";

/// How long confinement takes.
pub(crate) fn confinement(bench: &Bench) -> Result<Vec<Row>> {
    let (mut whole, mut alone, mut composed, mut unshared) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let machine = NetNamespace::new()?;
    let unshare = host::command("unshare");
    for _ in bench.turns(30) {
        thread::sleep(CLEANUP);
        let answered = first_answer(bench)?;
        whole.push(answered);
        let plain = to_the_end(Command::new(bench.program("outboard-rng")).arg("--version"))?;
        alone.push(answered - plain);
        composed.push(first_answer_in(bench, &machine)? - plain);
        thread::sleep(CLEANUP);
        let mut around = Command::new(unshare.get_program());
        around.args(["--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "--"]);
        unshared.push(to_the_end(around.arg(bench.program("outboard-peer-rng")).arg("--version"))?);
    }
    let peer = "util-linux unshare: the same namespaces and no more, around outboard-peer-rng --version";
    Ok(vec![
        Row::new("outboard-rng, exec to first answer", "ms", peer).of(whole, unshared),
        Row::new(
            "of that, confinement and a second exec",
            "ms",
            "none: exec to first answer, minus exec to the end of --version",
        )
        .of(alone, Vec::new()),
        Row::new("confinement, as a machine starts it", "ms", "none: clone to first answer, minus exec to the end of --version")
            .of(composed, Vec::new())
            .target(Target::Median(3.0)),
    ])
}

/// Milliseconds until the process answers on the socket it was started with.
fn first_answer(bench: &Bench) -> Result<f64> {
    let (mut ours, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
    ours.set_read_timeout(Some(LIMIT))?;
    // This copy survives exec; nothing else is started meanwhile.
    let passed = rustix::io::dup(OwnedFd::from(theirs)).context("Cannot pass a socket on")?;
    let mut command = Command::new(bench.program("outboard-rng"));
    command.args(["--fd", &passed.as_raw_fd().to_string()]);
    let began = Instant::now();
    let _running = Running::start(command)?;
    drop(passed);
    ours.write_all(&GET_FEATURES)?;
    ours.read_exact(&mut [0; ANSWER]).context("outboard-rng did not answer")?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// The same for a process that is started as in a machine: at once in its namespaces, of which the network's is there already.
fn first_answer_in(bench: &Bench, machine: &NetNamespace) -> Result<f64> {
    const SOCKET: i32 = 3;
    let (mut ours, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
    ours.set_read_timeout(Some(LIMIT))?;
    let began = Instant::now();
    let child = sandbox::spawn(&Spawn {
        program: &bench.program("outboard-rng"),
        args: ["--fd", "3"].map(OsString::from).to_vec(),
        fds: vec![(theirs.as_fd(), SOCKET)],
        stdin: None,
        stdout: None,
        stderr: None,
        net: Some(machine),
        identity: Identity::Own,
    })?;
    drop(theirs);
    ours.write_all(&GET_FEATURES)?;
    ours.read_exact(&mut [0; ANSWER]).context("outboard-rng did not answer")?;
    let took = began.elapsed().as_secs_f64() * 1000.0;
    // It ends with its connection.
    drop(ours);
    let limit = Timespec::try_from(LIMIT)?;
    if poll(&mut [PollFd::new(&child.pidfd, PollFlags::IN)], Some(&limit)).context("Cannot wait for outboard-rng")? == 0 {
        bail!("outboard-rng does not end with its connection");
    }
    waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).context("Cannot wait for outboard-rng")?;
    Ok(took)
}

fn to_the_end(command: &mut Command) -> Result<f64> {
    let began = Instant::now();
    process::told(command)?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// How long one byte takes, from the kick to the interrupt.
pub(crate) fn round_trip(bench: &Bench) -> Result<Vec<Row>> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in bench.turns(5) {
        for (side, program) in ["outboard-rng", "outboard-peer-rng"].into_iter().enumerate() {
            let socket = bench.socket();
            let mut server = Command::new(bench.program(program));
            server.arg("--socket-path").arg(&socket);
            let _server = Running::listening(server, &socket)?;
            let mut probe = Command::new(bench.program("outboard-probe"));
            probe.args(["rng", "--json", "--request", "1", "--bytes", REQUESTS]).arg(&socket);
            let answer: serde_json::Value =
                serde_json::from_slice(&process::told(&mut probe)?).context("The probe gave no JSON")?;
            times[side].push(answer["p50_ns"].as_f64().context("The probe gave no p50_ns")? / 1000.0);
        }
    }
    let [ours, theirs] = times;
    let row = Row::new("one byte from the rng, kick to interrupt", "us", "outboard-peer-rng: the crate vhost-user-backend 0.24");
    Ok(vec![row.of(ours, theirs)])
}
