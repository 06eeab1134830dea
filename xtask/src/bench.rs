//! `cargo xtask bench`: what the project says about speed and size, each as a ratio to a named peer measured in the same run.
//!
//! Absolute numbers of a shared machine mean nothing; the ratio of two programs that do the same work in turns does. Where
//! the project also has an absolute target, it is printed beside the ratio. `docs/performance.md` has the table of one run.

mod device;
mod disk;
mod guest;
mod memory;
mod process;
mod start;
mod table;
mod trace;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::{getpriority_process, setpriority_process};
use serde_json::json;

use self::table::Row;
use crate::debian::{self, Packages};
use crate::{build, cache, guest as images, host, nested, say};

/// Measure speed and size as ratios to other programs of the same kind, in one run.
///
/// Each row is measured in turns, ours and the peer's, and shows both medians, their ratio, the spread (p10 to p90), the peer
/// with its version, and whether the project's target is reached. Needs a quiet machine to be worth keeping; some rows need
/// root, and say so without it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this group of rows; may be given more than once
    #[arg(long, value_enum, value_name = "NAME")]
    only: Vec<Group>,
    /// How often each side is measured, instead of what suits the group
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// For machines: one JSON object
    #[arg(long)]
    json: bool,
}

/// A group of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Group {
    /// From exec to the guest's first instruction, and to the control socket (20 rounds)
    Start,
    /// Resident memory, threads, size of the program (3)
    Memory,
    /// The disk server: rate and processor time (3)
    Blk,
    /// Confining one process (30)
    Confinement,
    /// One small request to the rng process (5)
    Rng,
    /// Whole guests: boot, and requests from inside (3)
    Guest,
}

type Rows = fn(&Bench) -> Result<Vec<Row>>;

const GROUPS: [(Group, &str, Rows); 6] = [
    (Group::Start, "start", start::rows),
    (Group::Memory, "memory", memory::rows),
    (Group::Blk, "blk", disk::rows),
    (Group::Confinement, "confinement", device::confinement),
    (Group::Rng, "rng", device::round_trip),
    (Group::Guest, "guest", guest::rows),
];

/// What every group needs.
pub(crate) struct Bench {
    programs: PathBuf,
    qemu: PathBuf,
    qemu_version: String,
    images: PathBuf,
    /// For files of this run.
    dir: PathBuf,
    rounds: Option<u32>,
    sockets: Cell<u32>,
}

/// The task.
pub(crate) fn run(args: &Args) -> Result<()> {
    host::prepare(&host::Wanted { images: true, ..host::Wanted::default() })?;
    let qemu = nested::tools::qemu(&Packages::default())?;
    let version = say::quietly(debian::program(&qemu, "usr/bin/qemu-system-x86_64").arg("--version"))?;
    let version = String::from_utf8_lossy(&version).split_whitespace().nth(3).unwrap_or_default().to_owned();
    let bench = Bench {
        programs: build::programs(true)?,
        qemu,
        qemu_version: version,
        images: images::prepare()?,
        dir: nested::fresh_dir(&cache::dir()?)?,
        rounds: args.rounds,
        sockets: Cell::new(0),
    };
    let groups = measure(args, &bench);
    cache::remove_tree(&bench.dir)?;
    let (groups, host) = (groups?, this_host(&bench));
    if args.json {
        println!("{}", table::json(&host, &groups));
        return Ok(());
    }
    let text = |name: &str| host[name].as_str().unwrap_or_default().to_owned();
    println!("{} processors, {}, Linux {}", host["processors"], text("processor"), text("linux"));
    println!("load {} at the end; QEMU {}", text("load"), bench.qemu_version);
    table::show(&groups);
    Ok(())
}

fn measure(args: &Args, bench: &Bench) -> Result<Vec<(&'static str, Vec<Row>)>> {
    let mut groups = Vec::new();
    for (group, name, rows) in GROUPS {
        if args.only.is_empty() || args.only.contains(&group) {
            let calm = Calm::new(group);
            groups.push((name, say::step(&format!("Measure {name}"), || rows(bench))?));
            drop(calm);
        }
    }
    Ok(groups)
}

/// As root, what takes milliseconds is measured at a high priority, both sides alike: what else the machine does would
/// otherwise be most of the number. Whole guests take minutes, and are no reason to stop everybody else.
struct Calm(Option<i32>);

/// Above every usual process, below the kernel's own of real time.
const PRIORITY: i32 = -15;

impl Calm {
    fn new(group: Group) -> Self {
        let before = getpriority_process(None).ok().filter(|_| group != Group::Guest);
        Self(before.filter(|_| setpriority_process(None, PRIORITY).is_ok()))
    }
}

impl Drop for Calm {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            let _as_it_is = setpriority_process(None, before);
        }
    }
}

fn this_host(bench: &Bench) -> serde_json::Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let information = read("/proc/cpuinfo");
    let model = information.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    json!({"processors": processors, "processor": model.trim_start_matches([' ', '\t', ':']),
        "linux": read("/proc/sys/kernel/osrelease").trim(), "load": read("/proc/loadavg").split(' ').next(),
        "qemu": bench.qemu_version})
}

impl Bench {
    /// How often to measure.
    fn rounds(&self, usual: u32) -> u32 {
        self.rounds.unwrap_or(usual)
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    fn image(&self, name: &str) -> PathBuf {
        self.images.join(name)
    }

    /// A path no socket of this run has had.
    fn socket(&self) -> PathBuf {
        let number = self.sockets.get();
        self.sockets.set(number + 1);
        self.dir.join(format!("s{number}"))
    }

    fn qemu_name(&self, what: &str) -> String {
        self.version("QEMU", what)
    }

    /// All of QEMU's programs have one version.
    fn version(&self, program: &str, what: &str) -> String {
        format!("{program} {} {what}", self.qemu_version).trim_end().to_owned()
    }

    /// An empty disk.
    fn disk(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.img"));
        File::create(&path).and_then(|file| file.set_len(64 << 20)).with_context(|| format!("Cannot make {}", path.display()))?;
        Ok(path)
    }

    /// A disk with real blocks: reading a hole is no work.
    fn filled_disk(&self) -> Result<PathBuf> {
        const MEGABYTES: usize = 256;
        let path = self.dir.join("disk.img");
        let mut file = File::create(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        for _ in 0..MEGABYTES {
            file.write_all(&[0x5a; 1 << 20]).with_context(|| format!("Cannot fill {}", path.display()))?;
        }
        file.sync_all().with_context(|| format!("Cannot fill {}", path.display()))?;
        Ok(path)
    }

    /// QEMU's smallest machine on KVM, with one processor, 128 MiB of shared memory and nothing else.
    fn microvm(&self, kernel: &Path) -> Command {
        let mut command = debian::program(&self.qemu, "usr/bin/qemu-system-x86_64");
        command.arg("-L").arg(self.qemu.join("usr/share/qemu")).arg("-L").arg(self.qemu.join("usr/share/seabios"));
        // kvm_pvm does not have this register, and QEMU insists on what it asks for.
        let cpu = if Path::new("/sys/module/kvm_pvm").exists() { "host,-arch-capabilities" } else { "host" };
        command.args(["-M", "microvm,memory-backend=m", "-object", "memory-backend-memfd,id=m,size=128M,share=on"]);
        command.args(["-accel", "kvm", "-cpu", cpu, "-m", "128M", "-smp", "1", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-kernel"]).arg(kernel);
        command
    }
}
