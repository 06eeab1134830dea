//! A directory with the composer, the stand-ins and a machine file.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

/// What a busy machine may take for something that takes milliseconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Machine {
    pub(crate) dir: PathBuf,
    pretend: String,
}

impl Machine {
    /// Everything in place, the machine file still missing.
    pub(crate) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("outboard-it-{}-{number}", std::process::id()));
        drop(fs::remove_dir_all(&dir));
        for part in ["bin", "run"] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir.join(part)).unwrap();
        }
        let bin = dir.join("bin");
        // Links would lead `current_exe` to where the link points.
        fs::copy(env!("CARGO_BIN_EXE_outboard"), bin.join("outboard")).unwrap();
        let own = std::env::current_exe().unwrap();
        let pretend = own.parent().and_then(Path::parent).unwrap().join("examples/pretend");
        for name in ["vmm", "blk", "rng", "console", "virtiofsd"] {
            symlink(&pretend, bin.join(format!("outboard-{name}"))).unwrap();
        }
        for (file, size) in [("kernel", 1 << 20), ("disk.img", 1 << 20)] {
            fs::File::create(dir.join(file)).unwrap().set_len(size).unwrap();
        }
        Self { dir, pretend: String::new() }
    }

    /// How the stand-ins are to behave.
    pub(crate) fn pretend(mut self, wishes: &str) -> Self {
        self.pretend = wishes.to_owned();
        self
    }

    pub(crate) fn file(self, more: &str) -> Self {
        let text = format!("[machine]\nkernel = \"kernel\"\nmemory = \"64M\"\n{more}");
        fs::write(self.dir.join("web.toml"), text).unwrap();
        self
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.dir.join("bin/outboard"));
        command.args(args).current_dir(&self.dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("XDG_RUNTIME_DIR", self.dir.join("run")).env("PRETEND", &self.pretend);
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Outcome {
        Outcome::from(&self.command(args).output().unwrap())
    }

    pub(crate) fn start(&self) -> Running<'_> {
        let child = self.command(&["run", "web.toml"]).spawn().unwrap();
        let running = Running { machine: self, child };
        running.until("it runs", |report| report["status"] == "running");
        running
    }

    /// Nothing is left of it in the runtime directory.
    pub(crate) fn is_gone(&self) -> bool {
        let entries = fs::read_dir(self.dir.join("run/outboard"));
        // Beside the directories of machines that run lies what is remembered of those that have ended.
        let is_left = |entry: fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
        entries.is_ok_and(|entries| !entries.flatten().any(is_left))
    }
}

impl Machine {
    /// Every process that runs a program of this machine's: the process and its command line.
    pub(crate) fn processes(&self) -> Vec<(u64, String)> {
        let bin = self.dir.join("bin").display().to_string();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let of = |entry: fs::DirEntry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let words = fs::read(entry.path().join("cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&words).replace('\0', " ")))
        };
        entries.filter_map(of).filter(|(_, words)| words.starts_with(&bin)).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.dir));
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) fn from(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { status: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

pub(crate) struct Running<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) child: Child,
}

impl Running<'_> {
    pub(crate) fn report(&self) -> Option<Value> {
        let outcome = self.machine.run(&["ps", "--json", "web"]);
        serde_json::from_str::<Value>(&outcome.stdout).ok()?.get(0).cloned()
    }

    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut(&Value) -> bool) -> Value {
        let began = Instant::now();
        let mut last = None;
        while began.elapsed() < LIMIT {
            last = self.report();
            if let Some(report) = &last
                && holds(report)
            {
                return report.clone();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("It was to happen that {what}; the last report is {last:#?}");
    }

    /// Process ids by role.
    pub(crate) fn pid(&self, role: &str) -> u64 {
        let report = self.report().unwrap();
        process(&report, role)["pid"].as_u64().unwrap()
    }

    pub(crate) fn end(self) -> Outcome {
        Outcome::from(&self.child.wait_with_output().unwrap())
    }
}

pub(crate) fn process<'a>(report: &'a Value, role: &str) -> &'a Value {
    let processes = report["processes"].as_array().unwrap();
    processes.iter().find(|process| process["role"] == role).unwrap()
}

pub(crate) fn kill(signal: &str, pid: u64) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for something that is not in a report.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "It was to happen that {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn is_alive(pid: u64) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !status.is_empty() && !status.contains(") Z ")
}

/// A pseudo-terminal: who types, and where it is read. It does not become the test's own.
pub(crate) fn terminal() -> (fs::File, fs::File) {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let path = ptsname(&controller, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = open(path.as_c_str(), flags, Mode::empty()).unwrap();
    (fs::File::from(controller), fs::File::from(terminal))
}
