//! The arguments of `outboard-rng`, and what they mean.

use std::time::Duration;

use clap::Parser;
use daemon::{Arguments, Base, Capabilities, Socket};

use crate::source::Share;

/// Serves random numbers of this host to a virtual machine (virtio-rng over vhost-user).
#[derive(Debug, Parser)]
#[command(
    name = "outboard-rng",
    version,
    override_usage = "outboard-rng [OPTIONS] <--socket-path <PATH>|--fd <FD>>\n       outboard-rng --print-capabilities"
)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    /// Give the guest at most this many bytes in each period
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_bytes: Option<u32>,
    /// The period of --max-bytes, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, requires = "max_bytes", value_parser = clap::value_parser!(u32).range(1..))]
    pub period: u32,
    /// What is accepted as guest memory
    #[command(flatten)]
    pub memory: vhost_user::args::MemoryArgs,
    #[command(flatten)]
    base: Base,
}

impl Arguments for Args {
    const CAPABILITIES: Option<Capabilities> = Some(Capabilities { kind: "rng", features: &["max-bytes", "period"] });

    fn base(&self) -> &Base {
        &self.base
    }

    fn socket(&self) -> Option<&Socket> {
        Some(&self.socket)
    }
}

/// What the arguments mean.
#[derive(Clone, Copy, Debug, Default)]
pub struct Config {
    /// What the guest may use. Without it, all it asks for.
    pub share: Option<Share>,
}

impl From<&Args> for Config {
    fn from(args: &Args) -> Config {
        let period = Duration::from_millis(args.period.into());
        Config { share: args.max_bytes.map(|bytes| Share { bytes, period }) }
    }
}
