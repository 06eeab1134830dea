//! What the end-to-end tests share: finding the programs, starting them, looking at them from outside.
//!
//! | file | what is tested |
//! |---|---|
//! | `tidy.rs` | the invariants of the design, read off the tree |
//! | `tests/suite.rs` | the device processes through the probe: function, hostile frontends, kills, the sandbox from outside, QEMU |
//! | `tests/card.rs` | disk servers on a flash card; `cargo xtask test` runs it in the nested machine |
//! | `tests/guest.rs` | whole machines with real guests; `cargo xtask test` runs it where KVM works |

#![forbid(unsafe_code)]

pub mod card;
pub mod counters;
pub mod disktools;
pub mod escape;
pub mod fstools;
pub mod share;
pub mod tracer;
pub mod virtiofsd;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The folder of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_path_buf).unwrap_or_default()
}

/// A program of ours: beside the test's own folder, or where `OUTBOARD_BIN` says.
pub fn program(name: &str) -> PathBuf {
    let beside = || std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.to_path_buf()));
    let folder = std::env::var_os("OUTBOARD_BIN").map(PathBuf::from).or_else(beside).unwrap_or_default();
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built; run cargo build first, or cargo xtask test", path.display());
    path
}

/// A folder that is removed at the end.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one.
    pub fn new() -> Scratch {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        loop {
            let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("outboard-suite-{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Scratch(path),
                // A test that was killed has left it, and its number has come round again.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("Cannot make {}: {error}", path.display()),
            }
        }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file of so many zero bytes in it.
    pub fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("an image can be made");
        file.set_len(size).expect("an image can be made");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _left_for_later = std::fs::remove_dir_all(&self.0);
    }
}

/// A device process that listens on a socket, and is ended with the test.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Its socket.
    pub socket: PathBuf,
}

impl Server {
    /// Starts a program of ours with `--socket-path` and waits until it is ready to serve.
    pub fn start(name: &str, scratch: &Scratch, args: &[&str]) -> Server {
        Server::launch(Command::new(program(name)), name, scratch, args, Stdio::inherit())
    }

    /// As [`Server::start`]; what it logs goes to a file.
    pub fn start_with_log(name: &str, scratch: &Scratch, args: &[&str], log: std::fs::File) -> Server {
        Server::launch(Command::new(program(name)), name, scratch, args, log.into())
    }

    /// As [`Server::start`], in a mount namespace of its own, after a script: what that mounts nobody else sees, and nobody keeps. Needs root.
    pub fn start_after(script: &str, name: &str, scratch: &Scratch, args: &[&str]) -> Server {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]).arg(program(name));
        Server::launch(command, name, scratch, args, Stdio::inherit())
    }

    fn launch(mut command: Command, name: &str, scratch: &Scratch, args: &[&str], log: Stdio) -> Server {
        let socket = scratch.path(&format!("{name}.sock"));
        command.arg("--socket-path").arg(&socket).args(args).stdin(Stdio::null()).stderr(log);
        let child = command.spawn().expect("the program starts");
        let mut server = Server { child, socket };
        let start = Instant::now();
        while !server.socket.exists() {
            let ended = server.child.try_wait().expect("the program can be waited for");
            assert!(ended.is_none() && start.elapsed() < Duration::from_secs(20), "{name} does not listen: {ended:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// The process that serves: not the parent that waits for it.
    pub fn worker(&self) -> u32 {
        worker_of(self.child.id())
    }

    /// The process that was started.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end, and gives its exit status.
    pub fn terminate(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _already_gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        wait_for("the end", || self.child.try_wait().ok().flatten()).code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The process that serves, of the parent that was started and waits for it.
pub fn worker_of(parent: u32) -> u32 {
    let path = format!("/proc/{parent}/task/{parent}/children");
    wait_for("the worker", || std::fs::read_to_string(&path).ok()?.split_whitespace().next()?.parse().ok())
}

/// Asks again and again until there is an answer, for a generous while.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < Duration::from_secs(180), "waited in vain for {what}");
        std::thread::sleep(pause);
        // Asking costs the guest time where there is one processor for all.
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

/// Opens a pseudo-terminal, without it becoming this session's own: its hang-up would be the test's end.
pub fn open_terminal(path: &str) -> std::fs::File {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("the terminal can be opened").into()
}

/// What a program said and how it ended, with a limit of time.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ended {
    let output = command.stdin(Stdio::null()).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// A value of `/proc/PID/status`.
pub fn status(pid: u32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{key} in the status of {pid}")).trim().to_owned()
}
