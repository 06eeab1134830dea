//! `cargo xtask bench`: what the project says about speed and size, each as a ratio to a named peer measured in the same run.
//!
//! Absolute numbers of a shared machine mean nothing; the ratio of two programs that do the same work in turns does. Where
//! the project also has an absolute target, it is printed beside the ratio. `docs/performance.md` has the table of one run.

mod device;
mod disk;
mod guest;
mod memory;
mod mounted;
mod process;
mod share;
mod start;
mod table;
mod trace;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
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
    /// The file server: rate and latency (3), and what belongs to fs-mount
    Fs,
    /// The file server through a mount of this host: files, a tree, git, memory, system calls (1 to 3)
    FsMount,
    /// Confining one process (30)
    Confinement,
    /// One small request to the rng process (5)
    Rng,
    /// Whole guests: boot, and requests from inside (5)
    Guest,
}

/// Rows that are measured together.
pub(crate) struct Part {
    what: String,
    measure: Box<Measure>,
}

type Measure = dyn Fn(&Bench) -> Result<Vec<Row>>;
type Parts = fn() -> Vec<Part>;

impl Part {
    pub(crate) fn new(what: impl Into<String>, measure: impl Fn(&Bench) -> Result<Vec<Row>> + 'static) -> Self {
        Self { what: what.into(), measure: Box::new(measure) }
    }
}

const GROUPS: [(Group, &str, Parts); 8] = [
    (Group::Start, "start", start::parts),
    (Group::Memory, "memory", memory::parts),
    (Group::Blk, "blk", disk::parts),
    (Group::Fs, "fs", share::parts),
    (Group::FsMount, "fs-mount", mounted::parts),
    (Group::Confinement, "confinement", || vec![Part::new("one process", device::confinement)]),
    (Group::Rng, "rng", || vec![Part::new("one byte", device::round_trip)]),
    (Group::Guest, "guest", || vec![Part::new("boot and requests", guest::rows)]),
];

/// After this a part begins no new round: a quiet host needs a third of it for the longest.
const PART: Duration = Duration::from_secs(60);

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
    /// When the part that is measured began, and how many rounds it was cut to.
    began: Cell<Instant>,
    cut: Cell<Option<u32>>,
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
        began: Cell::new(Instant::now()),
        cut: Cell::new(None),
    };
    let (groups, failed) = measure(args, &bench);
    cache::remove_tree(&bench.dir)?;
    show(args, &bench, &groups);
    if failed.is_empty() { Ok(()) } else { bail!("Not everything could be measured: {}", failed.join("; ")) }
}

fn show(args: &Args, bench: &Bench, groups: &[(&str, Vec<Row>)]) {
    let host = this_host(bench);
    if args.json {
        return println!("{}", table::json(&host, groups));
    }
    let text = |name: &str| host[name].as_str().unwrap_or_default().to_owned();
    println!("{} processors, {}, Linux {}", host["processors"], text("processor"), text("linux"));
    println!("load {} at the end; QEMU {}", text("load"), bench.qemu_version);
    table::show(groups);
}

type Measured = Vec<(&'static str, Vec<Row>)>;

/// Every part, one after the other. One that fails is a row that says so, and costs the others nothing.
fn measure(args: &Args, bench: &Bench) -> (Measured, Vec<String>) {
    let (mut groups, mut failed) = (Vec::new(), Vec::new());
    let asked = |group: &Group| args.only.contains(group);
    let wanted = |group: &Group| args.only.is_empty() || asked(group) || *group == Group::FsMount && asked(&Group::Fs);
    for (group, name, parts) in GROUPS.into_iter().filter(|(group, ..)| wanted(group)) {
        let _calm = Calm::new(group);
        let mut rows = Vec::new();
        for Part { what, measure } in parts() {
            bench.begin();
            match say::step(&format!("Measure {name}: {what}"), || measure(bench)) {
                Ok(new) => rows.extend(new.into_iter().map(|row| row.cut(bench.cut.get()))),
                Err(error) => {
                    failed.push(format!("{name}: {what}: {error:#}"));
                    rows.push(Row::new(what, "", "none").note(format!("not measured: {error:#}")));
                }
            }
        }
        groups.push((name, rows));
    }
    (groups, failed)
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

    /// A part begins.
    fn begin(&self) {
        self.began.set(Instant::now());
        self.cut.set(None);
    }

    /// The rounds of a part: fewer where its time is over before, which its rows say then.
    fn turns(&self, usual: u32) -> impl Iterator<Item = u32> {
        (0..self.rounds(usual)).take_while(|turn| {
            let late = *turn > 0 && self.began.get().elapsed() > PART;
            if late {
                self.cut.set(Some(*turn));
            }
            !late
        })
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
        if path.exists() {
            return Ok(path);
        }
        let mut file = File::create(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        // In pieces as small as those that are measured. What was written in one piece the kernel keeps in one piece, and goes through all
        // of it whenever a part is written again (ext4, Linux 6.18): with pieces of a megabyte that alone would be measured.
        for _ in 0..MEGABYTES * 256 {
            file.write_all(&[0x5a; 4096]).with_context(|| format!("Cannot fill {}", path.display()))?;
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
