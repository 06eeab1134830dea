//! What a machine consists of, read from a machine file or from flags and checked before anything is started.
//!
//! Paths in a machine file are relative to the file, paths in flags to the working directory; here they are absolute,
//! because a process that is started in a mount namespace of its own has another idea of where it stands.

pub mod check;
pub mod disk;
pub mod file;
pub mod flags;
pub mod nearest;
pub mod schema;
pub mod share;
pub mod size;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use self::disk::Disk;
use self::share::Share;
use crate::args::OnReboot;
use crate::usage;

/// A machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name among the machines of this user.
    pub name: String,
    /// Processors.
    pub cpus: u8,
    /// Memory in bytes, whole MiB.
    pub memory: u64,
    /// A bzImage or an ELF file.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the serial port leads.
    pub serial: Serial,
    /// What a reboot of the guest means.
    pub on_reboot: OnReboot,
    /// Whether device processes that die are started again.
    pub restart: Restart,
    /// Passed on to every process.
    pub sandbox_floor: Option<String>,
    /// In the order in which the guest finds them.
    pub devices: Vec<Device>,
}

/// Where the serial port leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Serial {
    /// Nowhere.
    #[default]
    None,
    /// To our own stdin and stdout.
    Stdio,
    /// Into this file, at its end.
    File(PathBuf),
}

/// Whether device processes that die are started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// For ever, with growing delay.
    #[default]
    Always,
    /// The guest goes on without the device.
    Never,
}

/// A device of the machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Device {
    /// Unique in the machine.
    pub name: String,
    /// What the guest sees.
    pub class: Class,
    /// More queues than usual.
    pub queues: Option<u16>,
    /// Who serves it.
    pub backend: Backend,
}

impl Device {
    /// The disk, if it is one that a process of ours serves.
    #[must_use]
    pub fn disk(&self) -> Option<&Disk> {
        match &self.backend {
            Backend::Process(program) => program.disk.as_deref(),
            Backend::Socket(_) => None,
        }
    }
}

/// What kind of device the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Class {
    /// A class the VMM has a name for.
    Named(String),
    /// Any other virtio device, by its number.
    Id(u32),
}

/// Who serves a device.
#[derive(Debug, PartialEq, Eq)]
pub enum Backend {
    /// A process that the composer starts and keeps alive.
    Process(Program),
    /// Somebody else's process, which listens here.
    Socket(PathBuf),
}

/// What a process gets of our standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdio {
    /// None of them: it reads and writes nothing there.
    Nothing,
    /// Stdout, on which it says what the user has to know (the name of a pseudo-terminal).
    Output,
    /// The terminal: stdin and stdout. When it ends with 0, the user has left.
    Terminal,
    /// None of them, but the socket to which `outboard console` connects.
    Attach,
}

/// A program beside `outboard`, with its arguments.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// Its file name.
    pub name: &'static str,
    /// Its arguments, without the connection.
    pub args: Vec<OsString>,
    /// What it gets of our standard streams.
    pub stdio: Stdio,
    /// The disk it serves: what it is told of that depends on what happens to the disk.
    pub disk: Option<Box<Disk>>,
    /// The directory it serves.
    pub share: Option<Box<Share>>,
}

/// What is kept of a console's output while nobody is attached: a boot with all its messages, several times over.
const KEPT: usize = 256 * 1024;

impl Machine {
    /// Its consoles to attach to get their sockets.
    pub fn attach(&mut self, socket: &Path) {
        for program in self.programs().filter(|program| program.stdio == Stdio::Attach) {
            let keep = KEPT.to_string();
            program.args = vec!["--socket".into(), socket.into(), "--keep".into(), keep.into()];
        }
    }

    /// There is no terminal: who wants the console that was to be there attaches to it.
    pub fn without_terminal(&mut self) -> anyhow::Result<()> {
        if self.serial == Serial::Stdio {
            usage!("A machine in the background has no terminal for its serial port: give it a file");
        }
        for program in self.programs().filter(|program| program.stdio == Stdio::Terminal) {
            program.stdio = Stdio::Attach;
        }
        Ok(())
    }

    fn programs(&mut self) -> impl Iterator<Item = &mut Program> {
        self.devices.iter_mut().filter_map(|device| match &mut device.backend {
            Backend::Process(program) => Some(program),
            Backend::Socket(_) => None,
        })
    }
}

impl Program {
    /// A console whose user has left: it takes what the guest says, and shows it nowhere.
    #[must_use]
    pub fn without_terminal(&self) -> Self {
        let args = vec!["--file".into(), "/dev/null".into()];
        Self { name: self.name, args, stdio: Stdio::Nothing, disk: None, share: None }
    }
}

/// A source of random numbers.
#[must_use]
pub fn rng(name: String, limit: Option<(u32, u32)>) -> Device {
    let mut args: Vec<OsString> = Vec::new();
    if let Some((bytes, milliseconds)) = limit {
        args.extend(["--max-bytes".into(), bytes.to_string().into()]);
        args.extend(["--period".into(), milliseconds.to_string().into()]);
    }
    let program = Program { name: "outboard-rng", args, stdio: Stdio::Nothing, disk: None, share: None };
    Device { name, class: Class::Named("rng".to_owned()), queues: None, backend: Backend::Process(program) }
}

/// Where a console leads.
#[derive(Debug, PartialEq, Eq)]
pub enum Console {
    /// To the terminal `outboard run` was started on.
    Terminal,
    /// To a pseudo-terminal, whose name the process prints.
    Pty,
    /// To whoever attaches with `outboard console`.
    Attach,
    /// Into a file.
    File(PathBuf),
    /// To whoever connects to this socket.
    Socket(PathBuf),
}

impl Console {
    /// The device.
    #[must_use]
    pub fn device(self, name: String) -> Device {
        let stdio = match &self {
            Self::Terminal => Stdio::Terminal,
            Self::Pty => Stdio::Output,
            Self::Attach => Stdio::Attach,
            _ => Stdio::Nothing,
        };
        let args: Vec<OsString> = match self {
            Self::Terminal => vec!["--terminal".into()],
            Self::Pty => vec!["--pty".into()],
            // Its socket lies in the machine's directory, which is not made yet.
            Self::Attach => Vec::new(),
            Self::File(path) => vec!["--file".into(), path.into()],
            Self::Socket(path) => vec!["--socket".into(), path.into()],
        };
        let program = Program { name: "outboard-console", args, stdio, disk: None, share: None };
        Device { name, class: Class::Named("console".to_owned()), queues: None, backend: Backend::Process(program) }
    }
}
