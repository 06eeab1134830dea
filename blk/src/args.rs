//! The arguments of `outboard-blk`, and what they mean.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use daemon::{Arguments, Base, Capabilities, Socket};

use crate::request::SERIAL;

/// Most queues. A driver uses one for each vCPU; more only cost threads.
pub const MAX_QUEUES: u16 = 64;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The bytes of the disk, and nothing else
    Raw,
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
    override_usage = "outboard-blk [OPTIONS] --blk-file <PATH> --format <FORMAT> <--socket-path <PATH>|--fd <FD>>\n       outboard-blk --print-capabilities"
)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    /// The image file or block device
    #[arg(long, value_name = "PATH")]
    pub blk_file: PathBuf,
    /// What the image is. It is never guessed
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Format,
    /// The guest cannot write
    #[arg(long)]
    pub read_only: bool,
    /// Read and write past the host's page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,
    /// Who waits for the disk
    #[arg(long, value_enum, value_name = "ENGINE", default_value = "auto")]
    pub engine: EngineKind,
    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub num_queues: u16,
    /// The serial number the guest sees, up to 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    pub serial: String,
    /// What is accepted as guest memory
    #[command(flatten)]
    pub memory: vhost_user::args::MemoryArgs,
    #[command(flatten)]
    base: Base,
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
}

/// What the arguments mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// The image.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
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

impl From<&Args> for Config {
    fn from(args: &Args) -> Config {
        let mut serial = [0; SERIAL];
        for (place, byte) in serial.iter_mut().zip(args.serial.bytes()) {
            *place = byte;
        }
        Config {
            path: args.blk_file.clone(),
            format: args.format,
            read_only: args.read_only,
            direct: args.direct,
            engine: args.engine,
            queues: args.num_queues,
            serial,
        }
    }
}
