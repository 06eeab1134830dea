//! The arguments of `outboard-probe`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::attack::Kind;
use crate::blk::bench::Load;
use crate::device::Shape;
use crate::fs;

/// A guest without a VM: drives any vhost-user backend.
#[derive(Debug, Parser)]
#[command(name = "outboard-probe", version, max_term_width = 100)]
pub struct Command {
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Say what a backend is and offers
    Info {
        /// The backend's socket
        socket: PathBuf,
        /// For machines
        #[arg(long)]
        json: bool,
    },
    /// Fetch random bytes from a virtio-rng backend and write them to standard output
    Rng {
        /// The backend's socket
        socket: PathBuf,
        /// How many bytes
        #[arg(long, default_value_t = 64)]
        bytes: usize,
        /// How many in one request
        #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
        request: u32,
        /// Show how long requests took instead of the bytes, for machines
        #[arg(long)]
        json: bool,
        /// How rings are made
        #[command(flatten)]
        rings: Rings,
    },
    /// Use a virtio-blk backend as a disk
    #[command(subcommand)]
    Blk(Blk),
    /// Use a virtio-fs server
    #[command(subcommand)]
    Fs(Fs),
    /// Start a backend, load it, kill it, start it again, and report what was lost, duplicated or corrupted
    Storm {
        /// What the backend is
        #[command(subcommand)]
        what: StormOf,
    },
    /// Break every rule a frontend and a guest have, one after the other, and report how the backend took it
    Attack(Attack),
}

/// Whom to attack, and how.
#[derive(Args, Debug)]
pub struct Attack {
    /// The backend's socket; without it, the command after `--` starts the backend anew for each case
    #[arg(required_unless_present_any = ["command", "list"], conflicts_with = "command")]
    pub socket: Option<PathBuf>,
    /// What the backend is
    #[arg(long, value_enum, default_value = "any")]
    pub device: Kind,
    /// The backend's process, if it is not the one that listens on the socket
    #[arg(long, requires = "socket")]
    pub pid: Option<u32>,
    /// Only cases whose THEME/NAME contains this; may be given more than once
    #[arg(long)]
    pub case: Vec<String>,
    /// Say which cases there are
    #[arg(long)]
    pub list: bool,
    /// For machines
    #[arg(long)]
    pub json: bool,
    /// The command that starts the backend; `{socket}` in it becomes the path it is to listen on
    #[arg(last = true)]
    pub command: Vec<String>,
}

/// What to do with a file system.
#[derive(Debug, Subcommand)]
pub enum Fs {
    /// Say what the server is, and what it settles with a guest
    Info {
        /// The server's socket
        socket: PathBuf,
        /// For machines
        #[arg(long)]
        json: bool,
    },
    /// Measure the server. A file called `outboard-bench` is made in what it shares
    Bench {
        /// The server's socket
        socket: PathBuf,
        /// What is measured
        #[arg(long, value_enum, default_value = "getattr")]
        load: fs::bench::Load,
        /// Bytes of a read or write
        #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=1 << 20))]
        block_size: u32,
        /// Requests at a time, on all queues together
        #[arg(long, default_value_t = 1)]
        depth: usize,
        /// For how long
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Look for answers all the time instead of sleeping until one is announced
        #[arg(long)]
        poll: bool,
        /// For machines
        #[arg(long)]
        json: bool,
        /// How rings are made. `--queues` are request queues
        #[command(flatten)]
        rings: Rings,
    },
    /// Mount it on this host until it is unmounted or this program is ended
    Mount {
        /// The server's socket
        socket: PathBuf,
        /// Where: a folder
        folder: PathBuf,
        /// The share is a single file, and so is the place for it
        #[arg(long)]
        file: bool,
        /// Cut requests into buffers at random, as no guest does and every guest may
        #[arg(long)]
        scatter: bool,
        /// How rings are made. `--queues` are request queues
        #[command(flatten)]
        rings: Rings,
    },
    /// Send it requests that no guest's kernel would send, and see how it takes them. Ends with 1 if it does not take one rightly
    Attack {
        /// Only cases whose THEME/NAME contains this; may be given more than once
        #[arg(long)]
        case: Vec<String>,
        /// Say which cases there are, and do nothing
        #[arg(long)]
        list: bool,
        /// For machines
        #[arg(long)]
        json: bool,
        /// The command that starts the server, anew for each case. `{share}` in it becomes the folder it is to share, which is made
        /// here; `{socket}` the path to listen on
        #[arg(last = true, required_unless_present = "list")]
        command: Vec<String>,
    },
}

/// What to do with a disk.
#[derive(Debug, Subcommand)]
pub enum Blk {
    /// Say what the disk is
    Info {
        /// The backend's socket
        socket: PathBuf,
        /// For machines
        #[arg(long)]
        json: bool,
    },
    /// Read from the disk to standard output
    Read {
        /// The backend's socket
        socket: PathBuf,
        /// Where, in bytes: a multiple of 512
        #[arg(long, default_value_t = 0)]
        offset: u64,
        /// How much, in bytes: a multiple of 512
        #[arg(long, default_value_t = 512)]
        length: u64,
        /// How rings are made
        #[command(flatten)]
        rings: Rings,
    },
    /// Write standard input to the disk, filled up with zeroes to a multiple of 512 bytes
    Write {
        /// The backend's socket
        socket: PathBuf,
        /// Where, in bytes: a multiple of 512
        #[arg(long, default_value_t = 0)]
        offset: u64,
        /// How rings are made
        #[command(flatten)]
        rings: Rings,
    },
    /// Write a pattern over the disk in random order and read it back. What was on it is gone
    Verify {
        /// The backend's socket
        socket: PathBuf,
        /// How much of the disk, in bytes; all of it without this
        #[arg(long)]
        length: Option<u64>,
        /// Bytes of a request: a multiple of 512
        #[arg(long, default_value_t = 4096)]
        block_size: u32,
        /// Requests at a time
        #[arg(long, default_value_t = 32)]
        depth: usize,
        /// How rings are made
        #[command(flatten)]
        rings: Rings,
    },
    /// Serve the disk as NBD, to one client after the other, until this program is ended
    Nbd {
        /// The backend's socket
        socket: PathBuf,
        /// Where to listen for clients
        #[arg(long, value_name = "PATH")]
        listen: PathBuf,
        /// How rings are made
        #[command(flatten)]
        rings: Rings,
    },
    /// Measure the disk. A load that writes destroys what is on it
    Bench {
        /// The backend's socket
        socket: PathBuf,
        /// What is measured
        #[arg(long, value_enum, default_value = "randread")]
        load: Load,
        /// Bytes of a request: a multiple of 512
        #[arg(long, default_value_t = 4096)]
        block_size: u32,
        /// Requests at a time
        #[arg(long, default_value_t = 32)]
        depth: usize,
        /// For how long
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Look for completions all the time instead of sleeping until one is announced
        #[arg(long)]
        poll: bool,
        /// For machines
        #[arg(long)]
        json: bool,
        /// How rings are made
        #[command(flatten)]
        rings: Rings,
    },
}

/// Whom to kill.
#[derive(Debug, Subcommand)]
pub enum StormOf {
    /// A virtio-blk backend. What is on its disk is overwritten
    Blk {
        /// Have it take snapshots, and kill it while it does: for `outboard-blk`. Its images are made in this folder; `{disk}` in the
        /// command becomes the words that say which, `{control}` the path of its control socket
        #[arg(long, value_name = "FOLDER")]
        snapshots: Option<PathBuf>,
        /// How to kill
        #[command(flatten)]
        plan: Storm,
    },
    /// A virtio-rng backend
    Rng(Storm),
    /// A virtio-console backend that writes a file
    Console {
        /// The file it writes
        #[arg(long)]
        file: PathBuf,
        /// How to kill
        #[command(flatten)]
        plan: Storm,
    },
}

/// How to kill.
#[derive(Args, Debug)]
pub struct Storm {
    /// How often
    #[arg(long, default_value_t = 1000)]
    pub kills: u32,
    /// Requests at a time
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// Longest time between a restart and the next kill, in milliseconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub gap: u64,
    /// For machines
    #[arg(long)]
    pub json: bool,
    /// Start it as `outboard run` does, without a waiting parent and with one network namespace for all of them. For programs of this
    /// project
    #[arg(long)]
    pub in_machine: bool,
    /// How rings are made
    #[command(flatten)]
    pub rings: Rings,
    /// The command that starts the backend. `{fd}` in it becomes the number of a connected socket, `{socket}` the path to listen
    /// on; without either, `--fd N` is added
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// How rings are made.
#[derive(Args, Clone, Copy, Debug)]
pub struct Rings {
    /// Queues to use
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,
    /// Descriptors of a ring: a power of two
    #[arg(long, default_value_t = 128, value_parser = power_of_two)]
    pub queue_size: u16,
    /// Do not negotiate EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,
    /// Use indirect descriptor tables
    #[arg(long)]
    pub indirect: bool,
    /// The seed of layouts and order; printed when something is wrong
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Rings {
    /// As a device wants it said, with room for `depth` requests of `bytes`.
    pub fn shape(&self, depth: usize, bytes: u32) -> Shape {
        let tables = 16 * u64::from(self.queue_size) * u64::from(self.queue_size) * u64::from(self.queues);
        let memory = (8 << 20) + 4 * (depth as u64 * (u64::from(bytes) + 64)) + if self.indirect { 4 * tables } else { 0 };
        Shape { queues: self.queues, size: self.queue_size, event_idx: !self.no_event_idx, indirect: self.indirect, memory }
    }
}

fn power_of_two(text: &str) -> Result<u16, String> {
    let size: u16 = text.parse().map_err(|_| "not a number from 1 to 32768".to_owned())?;
    if size.is_power_of_two() && size <= 32768 { Ok(size) } else { Err("not a power of two from 1 to 32768".to_owned()) }
}
