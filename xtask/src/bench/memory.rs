//! What a machine costs its host besides the guest's memory: resident pages, threads, bytes on disk.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::geteuid;

use super::process::{self, Running};
use super::table::{Row, Spread, Target};
use super::{Bench, Part};
use crate::host;

/// After this a machine that does nothing has touched what it will.
const SETTLE: Duration = Duration::from_millis(1500);

/// The group.
pub(crate) fn parts() -> Vec<Part> {
    vec![Part::new("the program", |bench| Ok(vec![size(bench)?])), Part::new("resident pages", resident)]
}

fn resident(bench: &Bench) -> Result<Vec<Row>> {
    if !geteuid().is_root() {
        let note = "not measured: only root may look at processes that refuse it";
        return Ok(vec![Row::new("resident without guest memory", "MiB", bench.qemu_name("-M microvm")).note(note)]);
    }
    let mut samples = Samples::default();
    for round in bench.turns(3) {
        samples.take(bench, round)?;
    }
    Ok(samples.rows(bench))
}

fn size(bench: &Bench) -> Result<Row> {
    let stripped = bench.dir.join("stripped");
    process::told(host::command("strip").arg("-o").arg(&stripped).arg(bench.program("outboard-vmm")))?;
    let megabytes = |path| -> Result<f64> { Ok(fs::metadata(path)?.len() as f64 / 1e6) };
    let qemu = megabytes(bench.qemu.join("usr/bin/qemu-system-x86_64"))?;
    let mut row = Row::new("the VMM's program, stripped", "MB", bench.qemu_name("its program, without its libraries"));
    (row.ours, row.theirs) = (Some(Spread::fixed(megabytes(stripped)?)), Some(Spread::fixed(qemu)));
    Ok(row.target(Target::Median(3.0)))
}

/// Of one or more processes, in KiB, without the guest's memory.
#[derive(Clone, Copy, Debug, Default)]
struct Pages {
    resident: f64,
    share: f64,
    dirty: f64,
}

impl Pages {
    /// Adds up the mappings of a process, except those of memfds: they are the guest's memory.
    fn of(pid: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("Cannot read a process's mappings")?;
        let (mut pages, mut counts) = (Self::default(), true);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if !first.ends_with(':') {
                counts = !line.contains("/memfd:");
                continue;
            }
            let value = words.next().and_then(|word| word.parse::<f64>().ok()).filter(|_| counts).unwrap_or_default();
            match first {
                "Rss:" => pages.resident += value,
                "Pss:" => pages.share += value,
                "Private_Dirty:" => pages.dirty += value,
                _ => {}
            }
        }
        Ok(pages)
    }
}

#[derive(Default)]
struct Samples {
    resident: [Vec<f64>; 2],
    dirty: [Vec<f64>; 2],
    tree: [Vec<f64>; 2],
    threads: [Vec<f64>; 2],
    /// What the second disk added.
    second: [Vec<f64>; 2],
}

const MIB: f64 = 1024.0;

/// A kernel that halts, as an ELF file with a PVH note: a guest that goes on would have the two sides at different places,
/// and a KVM in software gives a stock kernel up.
fn halting_kernel() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    // cli; hlt; jmp to the hlt
    const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
    let mut file = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    // An executable for x86-64, two program headers.
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &ENTRY.to_le_bytes());
    put(32, &[64]);
    put(52, &[64, 0, 56, 0, 2]);
    // Kind, rights; then offset, two addresses, length in the file and in memory, alignment.
    put(64, &[1, 0, 0, 0, 5]);
    for (index, value) in [1024, ENTRY, ENTRY, 512, 4096, 4].into_iter().enumerate() {
        put(72 + 8 * index, &value.to_le_bytes());
    }
    put(120, &[4, 0, 0, 0, 4]);
    for (index, value) in [2048u32, 0, 0, 24, 24, 4].into_iter().enumerate() {
        put(128 + 8 * index, &value.to_le_bytes());
    }
    put(1024, &CODE);
    put(2048, b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0");
    put(2064, &ENTRY.to_le_bytes());
    file
}

impl Samples {
    fn take(&mut self, bench: &Bench, round: u32) -> Result<()> {
        let kernel = bench.dir.join("halting");
        fs::write(&kernel, halting_kernel()).context("Cannot write a kernel")?;
        let disks = [bench.disk("first")?, bench.disk("second")?];
        let mut vmm = [0.0; 2];
        let mut qemu = [0.0; 2];
        for count in [1, 2] {
            let mut command = Command::new(bench.program("outboard"));
            command.args(["run", "--name", &format!("bench-{round}-{count}"), "--memory", "128M", "--rng"]);
            command.arg("--console").arg(format!("file={}", bench.dir.join("console").display()));
            command.arg("--kernel").arg(&kernel).env("XDG_RUNTIME_DIR", &bench.dir);
            for disk in disks.iter().take(count) {
                command.arg("--disk").arg(format!("path={},format=raw", disk.display()));
            }
            let (ours, tree, threads) = sample(command, "outboard-vmm")?;
            let mut command = bench.microvm(&kernel);
            command.args(["-device", "virtio-serial-device", "-chardev", "null,id=c", "-device", "virtconsole,chardev=c"]);
            command.args(["-device", "virtio-rng-device"]);
            for (index, disk) in disks.iter().take(count).enumerate() {
                command.arg("-drive").arg(format!("if=none,id=d{index},format=raw,file={}", disk.display()));
                command.arg("-device").arg(format!("virtio-blk-device,drive=d{index}"));
            }
            let (theirs, their_tree, their_threads) = sample(command, "")?;
            if count == 1 {
                self.push([ours, theirs], [tree, their_tree], [threads, their_threads]);
            }
            (vmm[count - 1], qemu[count - 1]) = (ours.resident, theirs.resident);
        }
        self.second[0].push((vmm[1] - vmm[0]) / MIB);
        self.second[1].push((qemu[1] - qemu[0]) / MIB);
        Ok(())
    }

    fn push(&mut self, one: [Pages; 2], tree: [Pages; 2], threads: [usize; 2]) {
        for side in [0, 1] {
            self.resident[side].push(one[side].resident / MIB);
            self.dirty[side].push(one[side].dirty / MIB);
            self.tree[side].push(tree[side].share / MIB);
            self.threads[side].push(threads[side] as f64);
        }
    }

    fn rows(self, bench: &Bench) -> Vec<Row> {
        let peer = bench.qemu_name("-M microvm, the same devices inside");
        let row = |what: &str, unit, [ours, theirs]: [Vec<f64>; 2]| Row::new(what, unit, peer.clone()).of(ours, theirs);
        vec![
            row("VMM, resident without guest memory", "MiB", self.resident).target(Target::Median(4.3)),
            row("VMM, private dirty", "MiB", self.dirty).target(Target::Median(0.35)),
            row("all processes, disk, rng and console: PSS", "MiB", self.tree)
                .note("a halted guest; ours: composer, its janitor, VMM and three devices"),
            row("one more disk costs the VMM", "MiB", self.second).target(Target::Median(0.3)),
            row("threads of the VMM with three devices", "", self.threads)
                .target(Target::Median(3.0))
                .note("ours: control, one processor, KVM's own; no device has one"),
        ]
    }
}

/// The process of that name (or the first), all processes together, and the threads of the one.
fn sample(command: Command, name: &str) -> Result<(Pages, Pages, usize)> {
    let running = Running::start(command)?;
    thread::sleep(SETTLE);
    let (mut one, mut all, mut threads) = (None, Pages::default(), 0);
    for pid in running.tree() {
        let pages = Pages::of(pid)?;
        (all.resident, all.share, all.dirty) = (all.resident + pages.resident, all.share + pages.share, all.dirty + pages.dirty);
        if one.is_none() && (name.is_empty() || process::name(pid) == name) {
            (one, threads) = (Some(pages), process::threads(pid));
        }
    }
    match one {
        Some(one) => Ok((one, all, threads)),
        None => bail!("A machine under measurement has no {name}"),
    }
}
