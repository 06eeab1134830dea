//! The arguments that all programs share, in the words of QEMU's "backend program conventions".

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use sandbox::{Floor, Identity, IdentityKind};
use tracing::Level;

/// How much is written to the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Only what ends the process.
    Error,
    /// What a person should look at.
    #[default]
    Warn,
    /// Connections and their ends.
    Info,
    /// Every request of the frontend.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    pub(crate) fn level(self) -> Level {
        match self {
            LogLevel::Error => Level::ERROR,
            LogLevel::Warn => Level::WARN,
            LogLevel::Info => Level::INFO,
            LogLevel::Debug => Level::DEBUG,
            LogLevel::Trace => Level::TRACE,
        }
    }
}

/// In which form the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Arguments of every program.
#[derive(Args, Clone, Debug)]
pub struct Base {
    /// How much to log
    #[arg(long, value_enum, default_value_t, value_name = "LEVEL")]
    pub log_level: LogLevel,
    /// Log lines for people, or one JSON object a line for machines
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// The oldest kernel whose sandbox is accepted: linux-6.12, linux-6.1 or linux-5.15. Without it an older kernel is an error
    #[arg(long, default_value_t, value_name = "KERNEL", env = "OUTBOARD_SANDBOX_FLOOR")]
    pub sandbox_floor: Floor,
    /// Print the system calls that each thread may make, with their reasons, as JSON, and end
    #[arg(long)]
    pub print_sandbox: bool,
    /// The process is in its namespaces already
    #[arg(long, hide = true)]
    pub namespaced: bool,
    /// Which users it has there, if it is not its starter alone
    #[arg(long, hide = true, value_name = "KIND", requires = "namespaced", default_value_t)]
    pub identity: IdentityKind,
    /// The socket of --socket-path, which the waiting parent has bound; one for each path, if there are several
    #[arg(long, hide = true, value_name = "FD", requires = "namespaced", value_parser = clap::value_parser!(i32).range(3..))]
    pub listener_fd: Vec<RawFd>,
    /// Where the waiting parent hears that frontends may come
    #[arg(long, hide = true, value_name = "FD", requires = "namespaced", value_parser = clap::value_parser!(i32).range(3..))]
    pub ready_fd: Option<RawFd>,
    /// The page in which counters are shown
    #[arg(long, hide = true, value_name = "FD", value_parser = clap::value_parser!(i32).range(3..))]
    pub metrics_fd: Option<RawFd>,
}

/// Arguments of every program that serves a vhost-user socket.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false, id = "endpoint")]
pub struct Socket {
    /// Listen on this unix socket, and again when a frontend has gone
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,
    /// Serve this inherited socket: a connected one until it ends, a listening one like --socket-path
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(3..))]
    pub fd: Option<RawFd>,
    /// Print what this program can do, as JSON, and end
    #[arg(long)]
    pub print_capabilities: bool,
}

/// What `--print-capabilities` says.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The kind of device, in the words of the conventions.
    pub kind: &'static str,
    /// Optional flags of the program.
    pub features: &'static [&'static str],
}

/// A program's arguments.
pub trait Arguments: clap::Parser {
    /// What `--print-capabilities` says, for programs that serve a socket.
    const CAPABILITIES: Option<Capabilities> = None;

    /// The words of the command line, where a program knows other ways to write some.
    ///
    /// # Errors
    /// What is wrong with them.
    fn words(words: Vec<OsString>) -> Result<Vec<OsString>, String> {
        Ok(words)
    }

    /// The shared ones.
    fn base(&self) -> &Base;

    /// Those about the socket, if the program serves one.
    fn socket(&self) -> Option<&Socket> {
        None
    }

    /// Those of what it serves besides.
    fn more_sockets(&self) -> Vec<Socket> {
        Vec::new()
    }

    /// The log goes to the host's, not to standard error.
    fn syslog(&self) -> bool {
        false
    }

    /// The group, by name or number, whose members may connect to the socket of `--socket-path`. Otherwise its owner may.
    fn socket_group(&self) -> Option<&str> {
        None
    }

    /// Descriptors that arguments name, besides the socket's.
    fn inherited(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Which users the program is and can be, where it is started by hand. Asked before it is in its namespaces; there,
    /// [`crate::Startup::identity`] says what it was given, which for a process of the composer's is always its own.
    ///
    /// # Errors
    /// What is wrong with the arguments.
    fn identity(&self) -> Result<Identity> {
        Ok(Identity::Own)
    }
}
