//! The arguments of `outboard-blk`, and what they mean.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::{Parser, ValueEnum};
use daemon::{Arguments, Base, Capabilities, Socket};
use virtio::limit::Rate;

use crate::request::{SECTOR, SERIAL};
use crate::topology::Topology;

/// Most queues. A driver uses one for each vCPU; more only cost threads.
pub const MAX_QUEUES: u16 = 64;

/// Bytes of an image's tables in memory, at most, unless told otherwise.
const CACHE: u64 = 2 << 20;

/// Where what is written to an ephemeral disk goes: on a disk, where there is room for it. /tmp often lies in memory.
const SCRATCH: &str = "/var/tmp";

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The bytes of the disk, and nothing else
    Raw,
    /// QEMU's format, versions 2 and 3
    Qcow2,
    /// No image: what is written is gone, what is read was never there. For measuring
    Null,
}

/// What an image may be that another one is based on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackingFormat {
    /// The bytes of the disk, and nothing else
    Raw,
    /// QEMU's format, versions 2 and 3
    Qcow2,
}

/// Who waits for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineKind {
    /// io_uring where the host has it, threads elsewhere
    Auto,
    /// One io_uring for each queue
    IoUring,
    /// A few threads
    Threads,
}

/// Serves a disk image or block device to a virtual machine (virtio-blk over vhost-user).
#[derive(Debug, Parser)]
#[command(
    name = "outboard-blk",
    version,
    override_usage = "outboard-blk [OPTIONS] <--blk-file <PATH>|--blk-fd <FD>> --format <FORMAT> <--socket-path <PATH>|--fd <FD>>\n       outboard-blk --print-capabilities"
)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    /// The image file or block device
    #[arg(long, value_name = "PATH", required_unless_present_any = ["blk_fd", "size"])]
    pub blk_file: Option<PathBuf>,
    /// The same, as a descriptor. To be opened anew for each process: its lock goes with the last use of the open file
    #[arg(long, value_name = "FD", conflicts_with_all = ["blk_file", "size"], value_parser = clap::value_parser!(i32).range(3..))]
    pub blk_fd: Option<RawFd>,
    /// The file of --blk-fd once more, opened past the page cache (--direct)
    #[arg(long, value_name = "FD", requires_all = ["blk_fd", "direct"], value_parser = clap::value_parser!(i32).range(3..))]
    pub direct_fd: Option<RawFd>,
    /// What the image is. It is never guessed
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Format,
    /// The image that the one before it is based on, from the top down; each with a --backing-format
    #[arg(long, value_name = "PATH", requires = "backing_format")]
    pub backing_file: Vec<PathBuf>,
    /// What it is: one for each --backing-file, in the same order
    #[arg(long, value_enum, value_name = "FORMAT", requires = "backing_file")]
    pub backing_format: Vec<BackingFormat>,
    /// The file with the data of a qcow2 image that keeps it apart
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    /// Bytes of a disk that keeps nothing (--format null)
    #[arg(long, value_name = "BYTES", conflicts_with = "blk_file", value_parser = clap::value_parser!(u64).range(512..))]
    pub size: Option<u64>,
    /// Bytes of the image's tables to keep in memory, at most
    #[arg(long, value_name = "BYTES", default_value_t = CACHE, value_parser = clap::value_parser!(u64).range(65536..=1 << 30))]
    pub cache_size: u64,
    /// Bytes the guest can address: 512 to 4096. Otherwise what the file or device says
    #[arg(long, value_name = "BYTES", value_parser = block)]
    pub logical_block_size: Option<u32>,
    /// Bytes the guest had better write at once
    #[arg(long, value_name = "BYTES", value_parser = block)]
    pub physical_block_size: Option<u32>,
    /// Bytes the guest does best with
    #[arg(long, value_name = "BYTES")]
    pub opt_io_size: Option<u32>,
    /// The guest cannot write
    #[arg(long)]
    pub read_only: bool,
    /// Only read the image: what is written goes to a file in DIR that has no name, and is gone when this process ends
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = SCRATCH)]
    #[arg(conflicts_with_all = ["blk_fd", "read_only", "size"])]
    pub ephemeral: Option<PathBuf>,
    /// Read and write past the host's page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,
    /// Who waits for the disk
    #[arg(long, value_enum, value_name = "ENGINE", default_value = "auto", env = "OUTBOARD_BLK_ENGINE")]
    pub engine: EngineKind,
    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub num_queues: u16,
    /// Most requests in a second, and how many at once after a pause: OPS or OPS:BURST
    #[arg(long, value_name = "OPS[:BURST]")]
    pub limit_ops: Option<Rate>,
    /// Most bytes in a second, and how many at once after a pause: BYTES or BYTES:BURST
    #[arg(long, value_name = "BYTES[:BURST]")]
    pub limit_bytes: Option<Rate>,
    /// The limits of a group of disks, a page that their processes share: the first one sets them, as the flags above say
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(3..))]
    pub limit_fd: Option<RawFd>,
    /// Where to listen for commands: snapshot, reset, resize, limit, status
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,
    /// The socket, already connected, on which commands come
    #[arg(long, value_name = "FD", conflicts_with = "control_path", value_parser = clap::value_parser!(i32).range(3..))]
    pub control_fd: Option<RawFd>,
    /// Longest look at an empty ring before going to sleep, in microseconds; 0 to 50. It is as short as pays, takes a fifth of a
    /// processor at most, and none when nothing is asked
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, value_parser = clap::value_parser!(u16).range(0..=50))]
    pub poll_limit: u16,
    /// The serial number the guest sees, up to 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    pub serial: String,
    /// What is accepted as guest memory
    #[command(flatten)]
    pub memory: vhost_user::args::MemoryArgs,
    #[command(flatten)]
    base: Base,
}

fn block(text: &str) -> Result<u32, String> {
    let bytes: u32 = text.parse().map_err(|_| "not a number of bytes".to_owned())?;
    if bytes.is_power_of_two() && (512..=65536).contains(&bytes) {
        Ok(bytes)
    } else {
        Err("not a power of two from 512 to 65536".to_owned())
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= SERIAL { Ok(text.to_owned()) } else { Err(format!("longer than {SERIAL} bytes")) }
}

impl Arguments for Args {
    const CAPABILITIES: Option<Capabilities> = Some(Capabilities { kind: "block", features: &["read-only", "blk-file"] });

    fn base(&self) -> &Base {
        &self.base
    }

    fn socket(&self) -> Option<&Socket> {
        Some(&self.socket)
    }

    fn inherited(&self) -> Vec<RawFd> {
        [self.control_fd, self.blk_fd, self.direct_fd, self.limit_fd].into_iter().flatten().collect()
    }
}

/// Where a file is.
#[derive(Clone, Debug)]
pub enum Place {
    /// There.
    Path(PathBuf),
    /// It is open: the descriptor, and perhaps the same file past the page cache.
    Given(RawFd, Option<RawFd>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Path(path) => write!(f, "{}", path.display()),
            Place::Given(fd, _) => write!(f, "of descriptor {fd}"),
        }
    }
}

/// One link of a chain of images.
#[derive(Clone, Debug)]
pub struct Link {
    /// The file or device.
    pub place: Place,
    /// What it is.
    pub format: image::Format,
    /// The file with its data, if that is another one.
    pub data: Option<PathBuf>,
}

/// Sizes that were given instead of found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Blocks {
    logical: Option<u32>,
    physical: Option<u32>,
    best: Option<u32>,
}

impl Blocks {
    /// Puts them in the place of what was found.
    pub fn apply(&self, topology: &mut Topology) {
        topology.logical = self.logical.unwrap_or(topology.logical);
        topology.physical = self.physical.unwrap_or(topology.physical).max(topology.logical);
        topology.least = topology.least.max(topology.physical);
        topology.best = self.best.unwrap_or(topology.best);
        topology.discard = topology.discard.max(topology.logical);
    }
}

/// What the arguments mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// The images, the one that is written first.
    pub chain: Vec<Link>,
    /// Bytes of a disk that keeps nothing.
    pub null: Option<u64>,
    /// Where an overlay without a name is to be made, which takes what is written.
    pub ephemeral: Option<PathBuf>,
    /// Bytes of tables in memory.
    pub cache_bytes: usize,
    /// Sizes that were given.
    pub blocks: Blocks,
    /// Longest look at an empty ring.
    pub poll: Duration,
    /// Requests in a second.
    pub operations: Rate,
    /// Bytes in a second.
    pub bytes: Rate,
    /// It is only read.
    pub read_only: bool,
    /// It is used past the page cache.
    pub direct: bool,
    /// Who waits for the disk.
    pub engine: EngineKind,
    /// Queues.
    pub queues: u16,
    /// The serial number, filled up with zeroes.
    pub serial: [u8; SERIAL],
}

impl TryFrom<&Args> for Config {
    type Error = anyhow::Error;

    fn try_from(args: &Args) -> anyhow::Result<Config> {
        let mut serial = [0; SERIAL];
        for (place, byte) in serial.iter_mut().zip(args.serial.bytes()) {
            *place = byte;
        }
        Ok(Config {
            chain: chain(args)?,
            null: args.size.filter(|_| args.format == Format::Null).map(|bytes| bytes - bytes % SECTOR),
            ephemeral: args.ephemeral.clone(),
            cache_bytes: usize::try_from(args.cache_size).unwrap_or(usize::MAX),
            blocks: Blocks { logical: args.logical_block_size, physical: args.physical_block_size, best: args.opt_io_size },
            poll: Duration::from_micros(args.poll_limit.into()),
            operations: args.limit_ops.unwrap_or_default(),
            bytes: args.limit_bytes.unwrap_or_default(),
            read_only: args.read_only,
            direct: args.direct,
            engine: args.engine,
            queues: args.num_queues,
            serial,
        })
    }
}

/// The chain of images, if the words about it fit together.
fn chain(args: &Args) -> anyhow::Result<Vec<Link>> {
    let format = match args.format {
        Format::Raw => image::Format::Raw,
        Format::Qcow2 => image::Format::Qcow2,
        Format::Null => {
            ensure!(args.size.is_some() && args.backing_file.is_empty(), "--format null needs --size, and has no files");
            return Ok(Vec::new());
        }
    };
    ensure!(args.size.is_none(), "--size is the size of a disk that keeps nothing (--format null)");
    ensure!(args.backing_file.len() == args.backing_format.len(), "Each --backing-file needs a --backing-format");
    let place = match (&args.blk_file, args.blk_fd) {
        (Some(path), _) => Place::Path(path.clone()),
        (None, Some(fd)) => Place::Given(fd, args.direct_fd),
        (None, None) => bail!("--blk-file is missing"),
    };
    ensure!(args.blk_fd.is_none() || args.direct == args.direct_fd.is_some(), "--blk-fd with --direct needs --direct-fd");
    let top = Link { place, format, data: args.data_file.clone() };
    let below = args.backing_file.iter().zip(&args.backing_format).map(|(path, format)| {
        let format = match format {
            BackingFormat::Raw => image::Format::Raw,
            BackingFormat::Qcow2 => image::Format::Qcow2,
        };
        Link { place: Place::Path(path.clone()), format, data: None }
    });
    Ok([top].into_iter().chain(below).collect())
}
