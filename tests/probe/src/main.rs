//! `outboard-probe`: a guest without a VM.

use std::io::{IsTerminal, Read, Write, stderr, stdin, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use probe::args::{Attack, Blk, Command, Fs, Rings, Storm, StormOf, Verb};
use probe::attack::{self, Case, THEMES, Verdict, Victim};
use probe::blk::bench;
use probe::blk::{Disk, FEATURES, nbd, verify};
use probe::device::{Device, Shape};
use probe::fs::bridge::Bridge;
use probe::fs::mount::Mount;
use probe::fs::{self, Share, wire};
use probe::link::{Backend, connect};
use probe::{rng, storm};
use rustix::process::Signal;
use serde_json::json;
use vhost_user::features;

/// Bytes of a request of `read` and `write`.
const PIECE: u32 = 256 * 1024;

const RING_FEATURES: [(u64, &str); 3] = [(1 << 28, "INDIRECT_DESC"), (1 << 29, "EVENT_IDX"), (1 << 32, "VERSION_1")];

fn main() -> ExitCode {
    let command = Command::parse();
    match run(command.verb) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let chain = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
            eprintln!("outboard-probe: {chain}");
            ExitCode::FAILURE
        }
    }
}

/// `false`: done, and the answer is no.
fn run(verb: Verb) -> Result<bool> {
    match verb {
        Verb::Info { socket, json } => info(&socket, json),
        Verb::Rng { socket, bytes, request, json, rings } => {
            let fetched = rng::fetch(connect(&socket)?, bytes, request, rings.shape(1, request))?;
            if !json {
                return out(&fetched.bytes);
            }
            let [p50, p99] = [50, 99].map(|percent| fetched.took(percent).as_nanos());
            println!("{}", json!({"requests": fetched.times.len(), "p50_ns": p50, "p99_ns": p99}));
            Ok(true)
        }
        Verb::Blk(Blk::Info { socket, json }) => disk_info(&socket, json),
        Verb::Blk(Blk::Read { socket, offset, length, rings }) => read(&socket, offset, length, rings),
        Verb::Blk(Blk::Write { socket, offset, rings }) => write(&socket, offset, rings),
        Verb::Blk(Blk::Verify { socket, length, block_size, depth, rings }) => check(&socket, length, block_size, depth, rings),
        Verb::Blk(Blk::Nbd { socket, listen, rings }) => {
            let mut disk = open(&socket, rings, 1, PIECE)?;
            let listener = nbd::listen(&listen)?;
            eprintln!("The disk is at nbd+unix:///?socket={}", listen.display());
            nbd::serve(&mut disk, &listener).map(|()| true)
        }
        Verb::Blk(Blk::Bench { socket, load, block_size: size, depth, seconds, poll, json, rings }) => {
            let time = Duration::try_from_secs_f64(seconds).context("--seconds is a time")?;
            measure(&socket, bench::Plan { load, size, depth, time, poll, seed: rings.seed }, json, rings)
        }
        Verb::Fs(Fs::Info { socket, json }) => share_info(&socket, json),
        Verb::Fs(Fs::Attack { case, list, json, command }) => share_attack(&case, list, json, command),
        Verb::Fs(Fs::Bench { socket, load, block_size: size, depth, seconds, poll, json, rings }) => {
            let time = Duration::try_from_secs_f64(seconds).context("Not a time")?;
            let plan = fs::bench::Plan { load, size, depth, time, poll, seed: rings.seed };
            let mut how = fs::Plan::new(rings, false);
            how.shape.memory += fs::bench::memory(&plan);
            let mut share = Share::open(connect(&socket)?, &how)?;
            show(&fs::bench::run(&mut share, plan)?, json);
            Ok(true)
        }
        Verb::Fs(Fs::Mount { socket, folder, file, scatter, rings }) => {
            share(&socket, (&folder, file), &fs::Plan::new(rings, scatter))
        }
        Verb::Storm { what: StormOf::Blk { snapshots, plan } } => {
            kill(&plan, |backend, how, progress| storm::blk(backend, snapshots.as_deref(), how, progress))
        }
        Verb::Storm { what: StormOf::Console { file, plan } } => {
            kill(&plan, |backend, how, progress| storm::console(backend, &file, how, progress))
        }
        Verb::Attack(plan) => assault(&plan),
        Verb::Storm { what: StormOf::Rng(plan) } => kill(&plan, |backend, how, progress| storm::rng(backend, how, progress)),
    }
}

fn out(bytes: &[u8]) -> Result<bool> {
    if stdout().is_terminal() {
        let text: Vec<String> = bytes.chunks(32).map(|row| row.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        println!("{}", text.join("\n"));
        return Ok(true);
    }
    stdout().write_all(bytes).context("Cannot write to standard output")?;
    Ok(true)
}

fn names(bits: u64, known: &[(u64, &str)]) -> Vec<String> {
    (0..64)
        .map(|bit| 1u64 << bit)
        .filter(|bit| bits & bit != 0)
        .map(|bit| {
            known
                .iter()
                .find(|(value, _)| *value == bit)
                .map_or_else(|| format!("bit {}", bit.trailing_zeros()), |(_, name)| (*name).to_owned())
        })
        .collect()
}

fn info(socket: &Path, json: bool) -> Result<bool> {
    let mut device = Device::connect(connect(socket)?, Shape::default(), 0)?;
    let session = device.session();
    let (offered, protocol, queues) = (session.offered(), session.protocol_features(), session.queue_count());
    let config = session.config(64).unwrap_or_default();
    let (bits, words) = (names(offered, &RING_FEATURES), features::names(protocol));
    if json {
        println!("{}", json!({"features": bits, "protocol": words, "queues": queues, "config": config}));
        return Ok(true);
    }
    println!("virtio features    {offered:#018x}  {}", bits.join(" "));
    println!("protocol features  {protocol:#018x}  {}", words.join(" "));
    println!("queues             {queues}");
    let hex: Vec<String> = config.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("configuration      {}", if hex.is_empty() { "none".to_owned() } else { hex.join(" ") });
    Ok(true)
}

fn open(socket: &Path, rings: Rings, depth: usize, bytes: u32) -> Result<Disk> {
    Disk::open(connect(socket)?, rings.shape(depth, bytes), depth, bytes, rings.seed)
}

fn disk_info(socket: &Path, json: bool) -> Result<bool> {
    let known: Vec<_> = FEATURES.iter().chain(&RING_FEATURES).copied().collect();
    let shape = Shape::default();
    let mut disk = Disk::open(connect(socket)?, shape, 1, 4096, 1)?;
    let (geometry, offered) = (disk.geometry, disk.device.session().offered());
    let serial = disk.serial().unwrap_or_default();
    let bytes = geometry.capacity * 512;
    if json {
        let shown = json!({"bytes": bytes, "block_size": geometry.block_size, "queues": geometry.queues, "serial": serial,
            "seg_max": geometry.seg_max, "features": names(offered, &known)});
        println!("{shown}");
        return Ok(true);
    }
    println!("size        {bytes} bytes ({} MiB)", bytes >> 20);
    println!("block size  {}", geometry.block_size);
    println!("queues      {}", geometry.queues);
    println!("serial      {serial}");
    println!("features    {}", names(offered, &known).join(" "));
    Ok(true)
}

fn aligned(offset: u64, length: u64) -> Result<()> {
    if !offset.is_multiple_of(512) || !length.is_multiple_of(512) {
        bail!("Offset and length are multiples of 512");
    }
    Ok(())
}

fn read(socket: &Path, offset: u64, length: u64, rings: Rings) -> Result<bool> {
    aligned(offset, length)?;
    let mut disk = open(socket, rings, 1, PIECE)?;
    let (mut at, mut left) = (offset, length);
    while left > 0 {
        let piece = left.min(PIECE.into());
        let mut data = vec![0; usize::try_from(piece)?];
        disk.read(at, &mut data)?;
        out(&data)?;
        (at, left) = (at + piece, left - piece);
    }
    Ok(true)
}

fn write(socket: &Path, offset: u64, rings: Rings) -> Result<bool> {
    aligned(offset, 0)?;
    let mut disk = open(socket, rings, 1, PIECE)?;
    let mut at = offset;
    loop {
        let mut data = Vec::new();
        stdin().take(PIECE.into()).read_to_end(&mut data).context("Cannot read standard input")?;
        if data.is_empty() {
            break;
        }
        data.resize(data.len().next_multiple_of(512), 0);
        disk.write(at, &mut data)?;
        at += data.len() as u64;
    }
    disk.flush()?;
    Ok(true)
}

fn check(socket: &Path, length: Option<u64>, block_size: u32, depth: usize, rings: Rings) -> Result<bool> {
    aligned(0, block_size.into())?;
    let mut disk = open(socket, rings, depth, block_size)?;
    let length = length.unwrap_or(u64::MAX).min(disk.geometry.capacity * 512);
    let report = verify::run(&mut disk, length / u64::from(block_size), block_size, rings.seed)?;
    println!("{} blocks of {block_size} bytes, {} wrong", report.blocks, report.wrong);
    Ok(report.wrong == 0)
}

fn measure(socket: &Path, plan: bench::Plan, json: bool, rings: Rings) -> Result<bool> {
    aligned(0, plan.size.into())?;
    let mut disk = Disk::open(connect(socket)?, rings.shape(plan.depth, plan.size), 0, plan.size, plan.seed)?;
    show(&bench::run(&mut disk, plan)?, json);
    Ok(true)
}

fn show(report: &bench::Report, json: bool) {
    let [p50, p99] = [report.p50, report.p99].map(|time| time.as_secs_f64() * 1e6);
    if json {
        println!("{}", json!({"requests_per_second": report.rate(), "p50_us": p50, "p99_us": p99, "requests": report.requests}));
    } else {
        println!("{:.0} requests/s, p50 {p50:.1} us, p99 {p99:.1} us", report.rate());
    }
}

fn share_info(socket: &Path, json: bool) -> Result<bool> {
    let mut share = Share::open(connect(socket)?, &fs::Plan::default())?;
    let (about, offered) = (share.about.clone(), share.device.session().offered());
    let settled = share.greet()?;
    let version = format!("{}.{}", settled.major, settled.minor);
    let flags: Vec<(u64, &str)> = wire::FLAGS.iter().map(|(bit, name)| (1 << bit, *name)).collect();
    let (flags, features) = (names(settled.flags, &flags), names(offered, &RING_FEATURES));
    if json {
        let shown = json!({"tag": about.tag, "request_queues": about.queues, "fuse": version, "fuse_flags": flags,
            "max_write": settled.max_write, "max_pages": settled.max_pages, "max_readahead": settled.max_readahead,
            "max_background": settled.max_background, "time_gran": settled.time_gran, "features": features});
        println!("{shown}");
        return Ok(true);
    }
    println!("tag             {}", about.tag.map_or_else(|| "none".to_owned(), |tag| tag.escape_debug().to_string()));
    println!("request queues  {}", about.queues);
    println!("features        {}", features.join(" "));
    println!("FUSE            {version}");
    println!("FUSE flags      {}", flags.join(" "));
    println!("max write       {} bytes", settled.max_write);
    println!("max pages       {}", settled.max_pages);
    println!("max readahead   {} bytes", settled.max_readahead);
    println!("max background  {} requests", settled.max_background);
    println!("times           to {} ns", settled.time_gran);
    Ok(true)
}

/// The cases that are asked for, each with its theme.
fn share_cases(wanted: &[String]) -> Result<Vec<(&'static str, fs::attack::Case)>> {
    let all = fs::attack::themes().into_iter().flat_map(|(theme, cases)| cases.into_iter().map(move |case| (theme, case)));
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let cases: Vec<_> = all.filter(|(theme, case)| is_wanted(&format!("{theme}/{}", case.name))).collect();
    if cases.is_empty() {
        bail!("There is no case {}; see --list", wanted.join(", "));
    }
    Ok(cases)
}

fn share_attack(wanted: &[String], list: bool, json: bool, command: Vec<String>) -> Result<bool> {
    let cases = share_cases(wanted)?;
    if list {
        cases.iter().for_each(|(theme, case)| println!("{theme}/{}", case.name));
        return Ok(true);
    }
    let mut victim = fs::attack::Victim::new(command)?;
    victim.greet()?;
    let mut all = Vec::new();
    for (theme, case) in &cases {
        let name = format!("{theme}/{}", case.name);
        let verdict = victim.suffer(case).with_context(|| format!("at {name}"))?;
        let (outcome, detail) = (verdict.outcome.name(), verdict.outcome.detail());
        if !json {
            println!("{:<40}{:<16}{}{detail}", name, outcome, if verdict.right { "" } else { "WRONG " });
        }
        let survived = verdict.outcome.survived();
        all.push(json!({"theme": theme, "case": case.name, "outcome": outcome, "detail": detail, "survived": survived,
            "right": verdict.right}));
    }
    let count = |key: &str| all.iter().filter(|case| case[key] == true).count();
    let (survived, right) = (count("survived"), count("right"));
    if json {
        println!("{}", json!({"attacks": all.len(), "survived": survived, "right": right, "cases": all}));
    } else {
        println!("{} attacks, {survived} survived, {right} taken rightly", all.len());
    }
    Ok(right == all.len())
}

fn share(socket: &Path, (folder, file): (&Path, bool), plan: &fs::Plan) -> Result<bool> {
    let signals = [Signal::INT, Signal::TERM, Signal::HUP].map(Signal::as_raw);
    let signals = sandbox::signal_fd(&signals).context("Cannot block signals")?;
    let share = Share::open(connect(socket)?, plan)?;
    let mount = Mount::new(folder, file, &share.about.source())?;
    let ended = Bridge::new(share, mount, signals).run();
    if ended.is_err() && plan.scatter {
        eprintln!("seed {}", plan.seed);
    }
    ended.map(|()| true)
}

fn kill(plan: &Storm, run: impl FnOnce(&mut Backend, storm::Plan, &mut dyn FnMut(u32)) -> Result<storm::Report>) -> Result<bool> {
    let backend = Backend::new(plan.command.clone());
    let mut backend = if plan.in_machine { backend.in_machine()? } else { backend };
    let how = storm::Plan {
        kills: plan.kills,
        depth: plan.depth,
        gap: Duration::from_millis(plan.gap),
        shape: plan.rings.shape(plan.depth, storm::REQUEST),
        seed: plan.rings.seed,
    };
    let people = stderr().is_terminal() && !plan.json;
    let mut progress = |done: u32| {
        if people && done.is_multiple_of(10) {
            eprint!("\r{done} of {} kills ", plan.kills);
        }
    };
    let report = run(&mut backend, how, &mut progress)?;
    if people {
        eprint!("\r\x1b[K");
    }
    tell(&report, plan);
    Ok(report.is_clean() && report.kills == plan.kills)
}

fn tell(report: &storm::Report, plan: &Storm) {
    let millis = |percent| report.pause(percent).as_secs_f64() * 1000.0;
    let (p50, p99, max) = (millis(50), millis(99), millis(100));
    let storm::Report { kills, requests, lost, duplicated, corrupted, failed, snapshots, taken, .. } = report;
    if plan.json {
        let shown = json!({"kills": kills, "requests": requests, "lost": lost, "duplicated": duplicated, "corrupted": corrupted,
            "failed": failed, "snapshots": snapshots, "taken": taken, "pause_ms": {"p50": p50, "p99": p99, "max": max}, "seed": plan.rings.seed});
        println!("{shown}");
        return;
    }
    println!("{kills} kills, {requests} requests: {lost} lost, {duplicated} duplicated, {corrupted} corrupted, {failed} failed");
    if *snapshots > 0 {
        println!("{snapshots} snapshots asked for, {taken} of them taken before the kill");
    }
    println!("pause from kill to next completion: p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms");
    if !report.is_clean() {
        println!("seed {}", plan.rings.seed);
    }
}

/// The cases that are asked for, each with its theme.
fn chosen(plan: &Attack) -> Result<Vec<(&'static str, &'static Case)>> {
    let all = THEMES.into_iter().flat_map(|(theme, cases)| cases.iter().map(move |case| (theme, case)));
    let wanted = |theme: &str, case: &Case| {
        let name = format!("{theme}/{}", case.name);
        plan.case.is_empty() || plan.case.iter().any(|part| name.contains(part.as_str()))
    };
    let cases: Vec<_> = all.filter(|(theme, case)| wanted(theme, case)).collect();
    if cases.is_empty() {
        bail!("There is no case {}; see --list", plan.case.join(", "));
    }
    Ok(cases)
}

fn assault(plan: &Attack) -> Result<bool> {
    let cases = chosen(plan)?;
    if plan.list {
        let rows = cases.iter().map(|(theme, case)| json!({"theme": theme, "case": case.name, "about": case.about}));
        if plan.json {
            println!("{}", json!(rows.collect::<Vec<_>>()));
        } else {
            cases.iter().for_each(|(theme, case)| println!("{:<28}{}", format!("{theme}/{}", case.name), case.about));
        }
        return Ok(true);
    }
    let mut victim = match &plan.socket {
        Some(socket) => Victim::listening(socket.clone(), plan.device, plan.pid),
        None => Victim::started(plan.command.clone(), plan.device),
    };
    victim.greet()?;
    let mut all = Vec::new();
    for (theme, case) in cases {
        let name = format!("{theme}/{}", case.name);
        let verdict = victim.suffer(case).with_context(|| format!("at {name}"))?;
        if !plan.json {
            println!("{:<28}{:<16}{}", name, verdict.outcome.name(), verdict.detail);
        }
        all.push((theme, case, verdict));
    }
    Ok(report(&all, plan.json))
}

fn report(all: &[(&str, &Case, Verdict)], json: bool) -> bool {
    let survived = all.iter().filter(|(_, _, verdict)| verdict.outcome.survived()).count();
    if json {
        let row = |(theme, case, verdict): &(&str, &Case, Verdict)| {
            json!({"theme": theme, "case": case.name, "about": case.about, "outcome": verdict.outcome.name(),
                "survived": verdict.outcome.survived(), "detail": verdict.detail})
        };
        println!("{}", json!({"attacks": all.len(), "survived": survived, "cases": all.iter().map(row).collect::<Vec<_>>()}));
    } else {
        let counts = attack::OUTCOMES.iter().map(|one| (one.name(), all.iter().filter(|(_, _, v)| v.outcome == *one).count()));
        let counts: Vec<String> = counts.filter(|(_, n)| *n > 0).map(|(name, count)| format!("{count} {name}")).collect();
        println!("{} attacks, {survived} survived: {}", all.len(), counts.join(", "));
    }
    survived == all.len()
}
