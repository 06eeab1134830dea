//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::moment;

/// Compose a virtual machine out of processes: a slim VMM, and one confined process for every device.
#[derive(Debug, Parser)]
#[command(name = "outboard", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a machine, from a machine file or from flags
    ///
    /// Exit status: 0 the guest powered off, 1 something failed, 2 wrong usage, 3 the guest rebooted and `--on-reboot exit`
    /// was asked for, 4 the guest's kernel panicked, 5 the guest's processor shut down (triple fault).
    Run(Box<Run>),
    /// Look for all mistakes in a machine file, and start nothing
    ///
    /// Exit status: 0 it makes sense, 1 it cannot be read, 2 something is wrong.
    Check(Check),
    /// Print the JSON Schema of the machine file
    Schema(Schema),
    /// Show the machines that run, and which process serves which device
    Ps(Ps),
    /// Press a machine's power button, and end it if it does not power off
    Stop(Stop),
    /// Attach this terminal to a machine's console; `Ctrl-] q` detaches
    Console(Console),
    /// Show what each process uses and does, again and again
    Top(Top),
    /// Show what has happened to a machine: starts, ends, restarts
    Events(Events),
    /// Show what the processes of a machine have said
    Logs(Logs),
    /// Say what this host offers, and what confines the processes of a running machine
    ///
    /// Exit status: 0 all is as it should be, 1 something is missing.
    Doctor(Doctor),
    /// Make disk images, say what they are, and look for what is wrong with them
    Image(Image),
    /// Look at the disks of a running machine and change them: snapshot, reset, resize, limit
    Disk(Disk),
    /// Print a shell's completions of this command
    Completions(Completions),
    /// Print this command's manual page, or write all pages
    Man(Man),
    /// Clean up after a composer that was killed
    #[command(hide = true)]
    Janitor(Janitor),
}

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Run {
    /// The machine file; everything below is for machines without one
    #[arg(value_name = "MACHINE.TOML")]
    pub file: Option<PathBuf>,
    /// Show, once all devices are connected, which process serves which device
    #[arg(long)]
    pub announce: bool,
    /// Return once the machine runs, and leave it in the background; a console on the terminal becomes one to attach to
    #[arg(long, conflicts_with = "announce")]
    pub detach: bool,
    /// This is the machine in the background
    #[arg(long, hide = true)]
    pub background: bool,
    /// The machine, in flags.
    #[command(flatten)]
    pub flags: Flags,
}

const EXAMPLES: &str = "\
Examples:
  outboard run machine.toml
  outboard run --kernel vmlinuz --initrd initrd.img --cmdline 'console=hvc0 root=/dev/vda' \\
               --memory 512M --cpus 2 --disk path=root.img,format=raw --rng --console terminal";

const DISK: &str = "\
A disk: path=PATH[,format=raw|qcow2][,backing=FORMAT:PATH]...[,data-file=PATH][,readonly][,ephemeral[=DIR]][,cache=page|direct]\
[,engine=auto|io-uring|threads][,limit-ops=N[:BURST]][,limit-bytes=SIZE[:BURST]][,limit-group=NAME][,queues=N][,serial=TEXT]";

const SHARE: &str = "\
A directory for the guest: path=PATH[,tag=NAME][,readonly][,cache=never|metadata|auto|always][,owner=me[=ID]|squash[=ID]]\
[,writeback][,xattr][,xattrmap=RULES][,posix-acl][,negative-timeout=SECONDS]\
[,limit-ops=N[:BURST]][,limit-bytes=SIZE[:BURST]][,queues=N]";

/// A machine in flags.
#[derive(Debug, Default, clap::Args)]
pub struct Flags {
    /// The machine's name, for `ps` and `stop` [default: machine-PID]
    #[arg(long)]
    pub name: Option<String>,
    /// The kernel: a bzImage or an ELF file
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// The guest's memory, such as 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// The number of processors [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// A disk: `path=PATH` and more, see `--help`
    #[arg(help = DISK, long, value_name = "DISK")]
    pub disk: Vec<String>,
    /// A directory: `path=PATH` and more, see `--help`
    #[arg(help = SHARE, long, value_name = "SHARE")]
    pub share: Vec<String>,
    /// A source of random numbers
    #[arg(long)]
    pub rng: bool,
    /// A console: terminal, attach, pty, file=PATH or socket=PATH
    #[arg(long, value_name = "CONSOLE")]
    pub console: Vec<String>,
    /// Somebody else's backend, see `--help`
    #[arg(
        help = "Somebody else's backend: NAME,class=CLASS,socket=PATH[,queues=N] or NAME,id=VIRTIO-ID,queues=N,socket=PATH",
        long,
        value_name = "DEVICE"
    )]
    pub device: Vec<String>,
    /// The serial port: none, stdio or a file's path [default: none]
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<String>,
    /// What to do when the guest reboots [default: restart]
    #[arg(long, value_name = "ACTION")]
    pub on_reboot: Option<OnReboot>,
    /// The oldest kernel whose sandbox is accepted: linux-6.12, linux-6.1 or linux-5.15 [default: linux-6.12]
    #[arg(long, value_name = "FLOOR")]
    pub sandbox_floor: Option<String>,
}

impl Flags {
    /// Those that were given.
    #[must_use]
    pub fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--name", self.name.is_some()),
            ("--kernel", self.kernel.is_some()),
            ("--initrd", self.initrd.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--memory", self.memory.is_some()),
            ("--cpus", self.cpus.is_some()),
            ("--disk", !self.disk.is_empty()),
            ("--share", !self.share.is_empty()),
            ("--rng", self.rng),
            ("--console", !self.console.is_empty()),
            ("--device", !self.device.is_empty()),
            ("--serial", self.serial.is_some()),
            ("--on-reboot", self.on_reboot.is_some()),
            ("--sandbox-floor", self.sandbox_floor.is_some()),
        ];
        all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }
}

/// What to do when the guest reboots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// Start again; every process and every connection stays.
    #[default]
    Restart,
    /// End with exit status 3.
    Exit,
}

/// Look for mistakes.
#[derive(Debug, clap::Args)]
pub struct Check {
    /// The machine file
    #[arg(value_name = "MACHINE.TOML")]
    pub file: PathBuf,
}

/// Print the schema.
#[derive(Debug, clap::Args)]
pub struct Schema {
    /// The reference in Markdown instead, as it stands in docs/machine-file.md
    #[arg(long)]
    pub markdown: bool,
}

/// Show the machines that run.
#[derive(Debug, clap::Args)]
pub struct Ps {
    /// Only this machine
    pub name: Option<String>,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Stop a machine.
#[derive(Debug, clap::Args)]
pub struct Stop {
    /// The machine's name, as `outboard ps` shows it
    pub name: String,
    /// How long the guest may take to power off before the machine is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub timeout: u64,
}

/// Attach to a console.
#[derive(Debug, clap::Args)]
pub struct Console {
    /// The machine's name
    pub name: String,
}

/// Show what each process uses and does.
#[derive(Debug, clap::Args)]
pub struct Top {
    /// Only this machine
    pub name: Option<String>,
    /// Show it once, after one interval, and end
    #[arg(long)]
    pub once: bool,
    /// How long to wait between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    pub interval: f64,
    /// For programs: one JSON object a line
    #[arg(long)]
    pub json: bool,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    if (0.1..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("it must be between 0.1 and 3600".to_owned()) }
}

/// Show what has happened.
#[derive(Debug, clap::Args)]
pub struct Events {
    /// The machine's name
    pub name: String,
    /// Go on until the machine ends
    #[arg(long, short)]
    pub follow: bool,
    /// For programs: one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Show what was said.
#[derive(Debug, clap::Args)]
pub struct Logs {
    /// The machine's name
    pub name: String,
    /// Go on until the machine ends
    #[arg(long, short)]
    pub follow: bool,
    /// Only of this process: composer, vmm or a device's name
    #[arg(long, value_name = "PROCESS")]
    pub process: Option<String>,
    /// Only what is not older: 90s, 5m, 2h or 1d, or a moment such as 2026-11-22T10:43 (UTC)
    #[arg(long, value_name = "WHEN", value_parser = moment::since)]
    pub since: Option<String>,
}

/// Disk images.
#[derive(Debug, clap::Args)]
pub struct Image {
    /// What to do.
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// What to do with a disk image.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an empty image; a file that is there is never overwritten
    Create(ImageCreate),
    /// Say what an image's header says
    Info(ImageInfo),
    /// Look for errors and for clusters that are counted and not used
    ///
    /// Exit status: 0 nothing is wrong (any more), 1 it cannot be read, 2 wrong usage, 3 clusters are leaked, 4 it is corrupt.
    Check(ImageCheck),
}

/// What an image is written in. It is never guessed: a guest can write any header into its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The disk, byte for byte.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Make an image.
#[derive(Debug, clap::Args)]
pub struct ImageCreate {
    /// The new file
    pub path: PathBuf,
    /// What it is written in
    #[arg(long)]
    pub format: ImageFormat,
    /// The disk's size, such as 20G [default: that of the backing image]
    #[arg(long)]
    pub size: Option<String>,
    /// The image below this one, as the new image names it: from its own folder, or absolute
    #[arg(long, value_name = "PATH", requires = "backing_format")]
    pub backing: Option<PathBuf>,
    /// What the backing image is written in
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<ImageFormat>,
    /// qcow2: the size of a cluster, 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE")]
    pub cluster_size: Option<String>,
    /// qcow2: clusters of 32 parts that are copied one by one, for small writes over a backing image
    #[arg(long)]
    pub subclusters: bool,
    /// qcow2: bits of a reference count, 1 to 64
    #[arg(long, value_name = "BITS", default_value_t = 16)]
    pub refcount_bits: u32,
    /// qcow2: the version, 2 or 3
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub qcow2_version: u32,
}

/// Say what an image is.
#[derive(Debug, clap::Args)]
pub struct ImageInfo {
    /// The image
    pub path: PathBuf,
    /// What it is written in
    #[arg(long)]
    pub format: ImageFormat,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Look for what is wrong.
#[derive(Debug, clap::Args)]
pub struct ImageCheck {
    /// The image, which nobody may have open for writing
    pub path: PathBuf,
    /// What it is written in
    #[arg(long)]
    pub format: ImageFormat,
    /// Give leaked clusters back, and set the counts of an image right that is marked dirty
    #[arg(long)]
    pub repair: bool,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Disks of a running machine.
#[derive(Debug, clap::Args)]
pub struct Disk {
    /// The machine's name
    pub machine: String,
    /// What to do.
    #[command(subcommand)]
    pub command: DiskCommand,
}

/// What to do with a disk that is in use.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Say what a disk is, and which images it consists of
    Status {
        /// Only this disk
        disk: Option<String>,
        /// For programs: JSON
        #[arg(long)]
        json: bool,
    },
    /// Leave the image as it is now, and go on in a new file on top of it
    Snapshot {
        /// The disk, as the machine file calls it
        disk: String,
        /// The new file, a qcow2 image. One that is there is never overwritten
        new_file: PathBuf,
    },
    /// Forget what was written to the top image (of an ephemeral disk: since the machine started)
    Reset {
        /// The disk, which is ephemeral or an overlay
        disk: String,
    },
    /// Make it larger; the guest is told
    Resize {
        /// The disk
        disk: String,
        /// Its new size, such as 20G
        size: String,
    },
    /// Set how much it may be used; what is not given stays as it is
    Limit {
        /// The disk
        disk: String,
        /// Most requests in a second, and how many at once after a pause: N or N:BURST; 0: no limit
        #[arg(long, value_name = "N[:BURST]", required_unless_present = "bytes")]
        ops: Option<String>,
        /// Most bytes in a second, and how many at once after a pause: such as 50M or 50M:200M; 0M: no limit
        #[arg(long, value_name = "SIZE[:BURST]")]
        bytes: Option<String>,
    },
}

/// Print completions.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// Print manual pages.
#[derive(Debug, clap::Args)]
pub struct Man {
    /// Write the pages of all commands and programs into this directory
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Look at the host and at a machine.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Also look at the processes of this machine
    pub name: Option<String>,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// Stdin is a socket to the composer, stdout the runtime directory, stderr the terminal if there is one.
#[derive(Debug, clap::Args)]
pub struct Janitor {
    /// The runtime directory's path
    pub dir: PathBuf,
}
