//! `cargo xtask test`: everything that can fail, in the order in which it fails soonest.
//!
//! 1. every unit and integration test of the workspace, on this host, without a guest;
//! 2. those of them that use disks once more, with threads that wait for the disk where io_uring did;
//! 3. the guest suite (`tests/suite/tests/guest.rs`): our machine boots Debian. It runs right here where KVM runs stock
//!    kernels, and in one boot of the [nested machine](crate::nested) elsewhere, together with the VMM's own guest tests
//!    (`vmm/tests/guest.rs`), some of which skip themselves on a KVM that is none;
//! 4. disk servers on a flash card (`tests/suite/tests/card.rs`): always in the nested machine, whose kernel takes modules for it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::host::Kvm;
use crate::{build, cache, card, disktools, fstools, guest, host, nested, say, uml, virtiofsd};

/// Disks of ours have threads wait for the files, as on hosts that forbid io_uring.
const THREADS: (&str, &str) = (ENGINE, "threads");

/// What `outboard-blk` takes for `--engine` where that is not given.
const ENGINE: &str = "OUTBOARD_BLK_ENGINE";

/// Set everything up and run every test.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run the guest suite only
    #[arg(long)]
    guest_only: bool,
    /// Run only guest tests whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// A test takes up to four minutes where everything is emulated; a guest that hangs must not hold the result up for ever.
const GUEST_TEST_LIMIT: Duration = Duration::from_secs(8 * 60);

/// How often a test is tried whose nested machine fails.
const ATTEMPTS: u32 = 4;

/// What a module of the guest suite needs, somebody else's program or the kernel's modules: made when one of its tests is run, and taken along.
struct Peer {
    module: &'static str,
    variable: &'static str,
    prepare: fn() -> Result<PathBuf>,
}

/// User-mode Linux needs no KVM, but a processor whose registers it knows: one with AMX stops it, the emulated one does not.
const PEERS: &[Peer] = &[
    Peer { module: "uml", variable: "OUTBOARD_UML", prepare: uml::prepare },
    Peer { module: "virtiofsd", variable: "OUTBOARD_VIRTIOFSD", prepare: virtiofsd::prepare },
    Peer { module: "card", variable: "OUTBOARD_CARD", prepare: card::prepare },
];

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    let kvm = host::kvm();
    announce(&kvm)?;
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let programs = build::programs(false)?;
    let suite = build::test_program("tests/suite", "guest")?;
    let card = build::test_program("tests/suite", "card")?;
    // On the host's own KVM these run among the other tests.
    let of_the_vmm = if kvm == Kvm::Direct { None } else { build::test_program("vmm", "guest")? };
    // The suite comes last: its closing line is ours.
    let guests: Vec<(&str, PathBuf)> =
        [("vmm", of_the_vmm), ("suite", suite)].into_iter().filter_map(|(name, path)| Some((name, path?))).collect();
    let cards: Vec<(&str, PathBuf)> = card.into_iter().map(|path| ("card", path)).collect();
    let images = guest::prepare()?;
    if !args.guest_only {
        workspace(&programs, &images)?;
    }
    let mut options = vec!["--test-threads=1".to_owned()];
    options.extend(args.only.clone());
    match kvm {
        _ if guests.is_empty() => Ok(()),
        Kvm::Direct => {
            say::line("Guest suite: on this host's KVM.");
            let peers: Result<Vec<_>> = PEERS.iter().map(|peer| Ok((peer.variable, (peer.prepare)()?))).collect();
            let peers = peers?;
            guests.iter().try_for_each(|(_, test)| {
                let mut command = Command::new(test);
                command.envs(peers.iter().cloned());
                command.args(&options).env("OUTBOARD_GUEST", &images).env("OUTBOARD_BIN", &programs).envs(host::floor());
                say::openly(&mut command)
            })?;
            say::line("Disk servers on a flash card: in the nested machine.");
            in_nested(&cards, &programs, &options)
        }
        Kvm::Nested(why) => {
            say::line(&format!("Guest suite: in the nested machine, because {why}."));
            in_nested(&[cards, guests].concat(), &programs, &options)
        }
    }
}

fn announce(kvm: &Kvm) -> Result<()> {
    let cache = cache::dir()?;
    let (ready, machine) = match kvm {
        Kvm::Direct => (guest::is_ready()? && nested::is_ready()?, None),
        Kvm::Nested(why) => (nested::is_ready()?, Some(why)),
    };
    let mut items = vec!["build the programs and their tests with cargo".to_owned()];
    if !ready {
        items.push(format!(
            "download Debian packages and make guest images in {} (about 1 GB; nothing is installed)",
            cache.display()
        ));
    }
    if let Some(why) = machine {
        items.push(format!("run guests in an emulated machine with QEMU, because {why}"));
    }
    say::plan("Before the tests, this task will:", &items);
    Ok(())
}

/// The tests that need no guest. nextest is used where it is installed: it runs each test in its own process.
///
/// Some of them have QEMU boot the guest from our devices, or use other people's programs; they are told where these are.
fn workspace(programs: &Path, images: &Path) -> Result<()> {
    let qemu = nested::qemu()?;
    let (disktools, fstools, virtiofsd) = (disktools::prepare()?, fstools::prepare()?, virtiofsd::prepare()?);
    let floor = host::floor();
    let nextest = build::cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    let mut commands = Vec::new();
    if nextest {
        let mut command = build::cargo();
        command.args(["nextest", "run", "--workspace", "--no-fail-fast"]);
        command.args(["-E", "not (package(suite) and (binary(guest) or binary(card)))"]);
        commands.push(command);
        let mut command = build::cargo();
        command.args(["nextest", "run", "--package", "suite", "--no-fail-fast", "--profile", "engine"]).envs([THREADS]);
        commands.push(command);
    } else {
        say::line("cargo-nextest is not installed (cargo install cargo-nextest): using cargo test.");
        let mut command = build::cargo();
        command.args(["test", "--quiet", "--workspace", "--exclude", "suite"]);
        commands.push(command);
        for test in suite_tests()? {
            let mut command = build::cargo();
            command.args(["test", "--quiet", "--package", "suite", "--test", &test]);
            commands.push(command);
        }
        let mut command = build::cargo();
        command.args(["test", "--quiet", "--package", "suite", "--test", "suite"]).envs([THREADS]);
        commands.push(command);
    }
    for mut command in commands {
        command
            .env("OUTBOARD_BIN", programs)
            .env("OUTBOARD_QEMU", &qemu)
            .env("OUTBOARD_GUEST", images)
            .env("OUTBOARD_DISKTOOLS", &disktools)
            .env("OUTBOARD_FSTOOLS", &fstools)
            .env("OUTBOARD_VIRTIOFSD", &virtiofsd)
            .envs(floor.clone());
        say::openly(&mut command)?;
    }
    Ok(())
}

/// The suite's test programs that need no guest.
fn suite_tests() -> Result<Vec<String>> {
    let output = say::quietly(build::cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Value = serde_json::from_slice(&output).context("cargo answered with something else than JSON")?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.filter(|package| package["name"] == "suite").filter_map(|package| package["targets"].as_array());
    let tests =
        targets.flatten().filter(|target| target["kind"][0] == "test" && target["name"] != "guest" && target["name"] != "card");
    Ok(tests.filter_map(|target| target["name"].as_str().map(str::to_owned)).collect())
}

/// Each test in a nested machine of its own, which starts from its snapshot in a second or two.
///
/// The emulated processor is not perfect: now and then, after minutes of running guests, the nested machine's own kernel fails in
/// its interrupt entry or gets stuck, under QEMU's guests as under ours. That says nothing about the test, so it is tried again. The
/// same fault can hit the guest inside instead, so a test that fails is run once more, and is named in the end if it passes then:
/// look at its first output before believing that it was the processor.
fn in_nested(guests: &[(&str, PathBuf)], programs: &Path, options: &[String]) -> Result<()> {
    let (mut passed, mut failed, mut unsteady) = (0, Vec::new(), Vec::new());
    for (name, program) in guests {
        for test in tests_of(program, options)? {
            let mut status = one_in_nested(name, program, programs, &test)?;
            if status != 0 {
                say::line(&format!("{test} failed; once more, in case the emulated processor was at fault."));
                status = one_in_nested(name, program, programs, &test)?;
                unsteady.extend((status == 0).then(|| format!("{name}: {test}")));
            }
            match status {
                0 => passed += 1,
                _ => failed.push(format!("{name}: {test}")),
            }
        }
    }
    unsteady.iter().for_each(|test| say::line(&format!("UNSTEADY (failed once, then passed)  {test}")));
    failed.iter().for_each(|test| say::line(&format!("FAILED  {test}")));
    say::line(&format!("guest: {passed} passed, {} failed", failed.len()));
    if failed.is_empty() { Ok(()) } else { bail!("{} guest tests failed", failed.len()) }
}

/// The names of a program's tests that the options select.
fn tests_of(program: &Path, options: &[String]) -> Result<Vec<String>> {
    let output = say::quietly(Command::new(program).args(options).args(["--list", "--format", "terse"]))?;
    let text = String::from_utf8(output).context("The list of tests is not text")?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

fn one_in_nested(name: &str, program: &Path, programs: &Path, test: &str) -> Result<u8> {
    // cargo has told the tests at compile time where the programs are: there they are in this machine, too.
    let place = nested::quote(&programs.display().to_string());
    let mut script =
        format!("export OUTBOARD_BIN=/outboard/bin\nmkdir -p {place} && rmdir {place} && ln -s /outboard/bin {place}\n");
    let mut files = vec![(program.to_path_buf(), format!("files/{name}"))];
    if let Ok(engine) = std::env::var(ENGINE) {
        script.push_str(&format!("export {ENGINE}={}\n", nested::quote(&engine)));
    }
    for Peer { module, variable, prepare } in PEERS.iter().filter(|peer| test.split("::").any(|part| part == peer.module)) {
        files.push((prepare()?, format!("files/peer-{module}")));
        script.push_str(&format!("export {variable}=/outboard/files/peer-{module}\n"));
    }
    script.push_str(&format!("exec /outboard/files/{name} --test-threads=1 --exact {}\n", nested::quote(test)));
    let mut job = nested::Job::new(script, Some(programs))?;
    job.files.extend(files);
    job.limit = GUEST_TEST_LIMIT;
    for attempt in 1..=ATTEMPTS {
        match job.run() {
            Err(error) if attempt < ATTEMPTS => {
                say::line(&format!("The nested machine itself failed ({error:#}); {test} is tried again."));
            }
            other => return other.context("The nested machine failed"),
        }
    }
    bail!("No attempt was made")
}
