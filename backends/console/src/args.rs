//! The arguments of `outboard-console`, and what they mean.

use std::path::PathBuf;

use clap::{Args as Group, Parser};
use daemon::{Arguments, Base, Capabilities, Socket};

/// More than a day of most consoles.
const MOST_KEPT: i64 = 16 << 20;

/// Serves a virtual machine's console (virtio-console over vhost-user).
#[derive(Debug, Parser)]
#[command(
    name = "outboard-console",
    version,
    override_usage = "outboard-console [OPTIONS] <--terminal|--pty|--file <PATH>|--socket <PATH>> <--socket-path <PATH>|--fd <FD>>\n       outboard-console --print-capabilities",
    after_help = "On a terminal, Ctrl-] q leaves, and Ctrl-] Ctrl-] sends Ctrl-] to the guest."
)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    port: PortArgs,
    /// With --socket: keep the last BYTES of what nobody has read yet, and show them to the next client
    #[arg(long, value_name = "BYTES", requires = "socket", value_parser = clap::value_parser!(u32).range(1..=MOST_KEPT))]
    keep: Option<u32>,
    /// What is accepted as guest memory
    #[command(flatten)]
    pub memory: vhost_user::args::MemoryArgs,
    #[command(flatten)]
    base: Base,
}

#[derive(Debug, Group)]
#[group(required = true, multiple = false)]
struct PortArgs {
    /// Use standard input and output; a terminal is switched to raw mode
    #[arg(long)]
    terminal: bool,
    /// Make a pseudo-terminal and print its path
    #[arg(long)]
    pty: bool,
    /// Append what the guest writes to this file
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// Listen on this unix socket; one client at a time
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Arguments for Args {
    const CAPABILITIES: Option<Capabilities> =
        Some(Capabilities { kind: "console", features: &["terminal", "pty", "file", "socket", "keep"] });

    fn base(&self) -> &Base {
        &self.base
    }

    fn socket(&self) -> Option<&Socket> {
        Some(&self.socket)
    }
}

/// Where the console is.
#[derive(Clone, Debug)]
pub enum Config {
    /// Standard input and output.
    Terminal,
    /// A new pseudo-terminal.
    Pty,
    /// A file that is appended to.
    File(PathBuf),
    /// A socket that is listened on, and how much is kept for its next client.
    Socket(PathBuf, Option<usize>),
}

impl From<&Args> for Config {
    fn from(args: &Args) -> Config {
        match (&args.port.file, &args.port.socket, args.port.pty) {
            (Some(path), _, _) => Config::File(path.clone()),
            (_, Some(path), _) => {
                let keep = args.keep.and_then(|bytes| usize::try_from(bytes).ok());
                Config::Socket(path.clone(), keep)
            }
            (_, _, true) => Config::Pty,
            _ => Config::Terminal,
        }
    }
}
