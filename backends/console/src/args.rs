//! The arguments of `outboard-console`, and what they mean.

use std::path::PathBuf;

use clap::{Args as Group, Parser};
use daemon::{Arguments, Base, Capabilities, Socket};

/// Serves a virtual machine's console (virtio-console over vhost-user).
#[derive(Debug, Parser)]
#[command(
    name = "outboard-console",
    version,
    after_help = "On a terminal, Ctrl-] q leaves, and Ctrl-] Ctrl-] sends Ctrl-] to the guest."
)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    port: PortArgs,
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
        Some(Capabilities { kind: "console", features: &["terminal", "pty", "file", "socket"] });

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
    /// A socket that is listened on.
    Socket(PathBuf),
}

impl From<&Args> for Config {
    fn from(args: &Args) -> Config {
        match (&args.port.file, &args.port.socket, args.port.pty) {
            (Some(path), _, _) => Config::File(path.clone()),
            (_, Some(path), _) => Config::Socket(path.clone()),
            (_, _, true) => Config::Pty,
            _ => Config::Terminal,
        }
    }
}
