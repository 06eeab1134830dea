//! A machine under test: a machine file, `outboard run`, and the console in a file.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use suite::{Scratch, program};

/// Everything takes longer where it is emulated, and longer still where the host is busy.
const LIMIT: Duration = Duration::from_secs(240);

/// Where on the disk with the command the mark lies that ends [`UNTIL_STOPPED`].
const STOP_AT: usize = 4096;

/// A shell's condition for a loop that runs until [`Machine::stop_loop`].
pub(crate) const UNTIL_STOPPED: &str = "until dd if=/dev/vdb bs=4096 skip=1 count=1 iflag=direct status=none | grep -q stop";

/// The kernel's folder, made by `cargo xtask guest`.
pub(crate) fn images() -> PathBuf {
    let path = std::env::var_os("OUTBOARD_GUEST").map(PathBuf::from).unwrap_or_default();
    assert!(path.join("vmlinux").exists(), "there is no guest at {}; run cargo xtask test", path.display());
    path
}

/// What a machine is made from.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// A shell command that the guest runs; it powers off afterwards.
    pub(crate) command: String,
    /// More of the kernel's command line.
    pub(crate) cmdline: String,
    /// Lines of the `[machine]` section.
    pub(crate) machine: String,
    /// More sections.
    pub(crate) sections: String,
    /// The kernel's file name.
    pub(crate) kernel: &'static str,
    /// The guest has Debian's disk, not only the initrd.
    pub(crate) disk: bool,
    /// Run everything as this user.
    pub(crate) user: Option<u32>,
}

impl Plan {
    /// A machine whose guest runs one command and powers off.
    pub(crate) fn run(command: &str) -> Plan {
        Plan {
            command: command.to_owned(),
            cmdline: String::new(),
            machine: "cpus = 2\nmemory = \"512M\"\n".to_owned(),
            sections: String::new(),
            kernel: "vmlinux",
            disk: false,
            user: None,
        }
    }

    /// With Debian's userland on a disk of its own (a throw-away layer over a shared image).
    pub(crate) fn with_disk(mut self) -> Plan {
        self.disk = true;
        self
    }

    /// With more of the command line.
    pub(crate) fn cmdline(mut self, more: &str) -> Plan {
        self.cmdline.push(' ');
        self.cmdline.push_str(more);
        self
    }

    /// With other lines of the `[machine]` section.
    pub(crate) fn machine(mut self, lines: &str) -> Plan {
        lines.clone_into(&mut self.machine);
        self
    }

    /// With more sections.
    pub(crate) fn section(mut self, lines: &str) -> Plan {
        self.sections.push_str(lines);
        self
    }

    /// Starts it.
    pub(crate) fn start(&self) -> Machine {
        Machine::start(self)
    }

    /// Starts it and waits for its end.
    pub(crate) fn finish(&self) -> Ended {
        self.start().finish()
    }

    fn file(&self, scratch: &Scratch, name: &str) -> String {
        let images = images();
        let root = if self.disk { " root=/dev/vda outboard.overlay" } else { "" };
        let script = scratch.path("script.img");
        let mut bytes = self.command.clone().into_bytes();
        assert!(bytes.len() <= STOP_AT, "the command fits before the mark");
        bytes.resize(STOP_AT + 4096, 0);
        fs::write(&script, bytes).unwrap();
        let last = if self.disk { "vdb" } else { "vda" };
        let disk = format!("[disk.a-root]\npath = \"{}\"\nreadonly = true\n", images.join("root.img").display());
        format!(
            "[machine]\nname = \"{name}\"\nkernel = \"{}\"\ninitrd = \"{}\"\n{}\
             cmdline = \"console=hvc0 quiet{root} outboard.script=/dev/{last}{}\"\n\
             {}[disk.b-script]\npath = \"{}\"\nreadonly = true\n\
             [rng.entropy]\n[console.main]\noutput = \"file\"\npath = \"{}\"\n{}",
            images.join(self.kernel).display(),
            images.join("initrd.img").display(),
            self.machine,
            self.cmdline,
            if self.disk { &disk } else { "" },
            script.display(),
            scratch.path("console.log").display(),
            self.sections,
        )
    }
}

/// A running machine.
pub(crate) struct Machine {
    child: Child,
    pub(crate) scratch: Scratch,
    pub(crate) name: String,
    user: Option<u32>,
}

/// A machine that has ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) console: String,
    pub(crate) err: String,
}

impl Ended {
    /// The guest's command went well, and so did everything around it.
    pub(crate) fn passed(self) -> Ended {
        let went_well = self.console.contains("outboard-run: exit 0");
        assert!(went_well && self.status.code() == Some(0), "{}", self.tell());
        self
    }

    pub(crate) fn tell(&self) -> String {
        format!("{}\n--- console\n{}\n--- stderr\n{}", self.status, self.console, self.err)
    }
}

impl Machine {
    fn start(plan: &Plan) -> Machine {
        let scratch = Scratch::new();
        let name = scratch.path("").file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = scratch.path("machine.toml");
        fs::write(&file, plan.file(&scratch, &name)).unwrap();
        let mut command = Command::new(program("outboard"));
        command.arg("run").arg(&file).stdin(Stdio::null());
        command.stdout(fs::File::create(scratch.path("out")).unwrap()).stderr(fs::File::create(scratch.path("err")).unwrap());
        set_user(&mut command, plan.user, &scratch);
        let child = command.spawn().unwrap();
        Machine { child, scratch, name, user: plan.user }
    }

    /// The composer.
    pub(crate) fn id(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// What the guest has written.
    pub(crate) fn console(&self) -> String {
        let bytes = fs::read(self.scratch.path("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What `outboard run` has said.
    pub(crate) fn err(&self) -> String {
        fs::read_to_string(self.scratch.path("err")).unwrap_or_default()
    }

    /// Waits until the guest has written this.
    pub(crate) fn wait_for(&mut self, text: &str) {
        self.wait_until(text, |console| console.contains(text));
    }

    /// Waits until what the guest has written is as it should be.
    pub(crate) fn wait_until(&mut self, text: &str, holds: impl Fn(&str) -> bool) {
        let start = Instant::now();
        while !holds(&self.console()) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the machine ended before it wrote {text:?}: {ended:?}\n{}\n{}", self.console(), self.err());
            assert!(start.elapsed() < LIMIT, "the guest does not write {text:?}:\n{}\n{}", self.console(), self.err());
            std::thread::sleep(Duration::from_millis(250));
        }
    }

    /// Ends the guest's loop: the disk that its command came from says so.
    pub(crate) fn stop_loop(&self) {
        self.say(b"stop");
    }

    /// Tells the guest a word, by the disk that its command came from.
    pub(crate) fn say(&self, word: &[u8]) {
        let disk = fs::File::options().write(true).open(self.scratch.path("script.img")).unwrap();
        rustix::io::pwrite(&disk, word, STOP_AT as u64).unwrap();
    }

    /// What `outboard ps --json` says of it.
    pub(crate) fn processes(&self) -> Vec<Value> {
        let output = self.outboard(&["ps", &self.name, "--json"]);
        let reports: Value = serde_json::from_str(&output).unwrap();
        reports[0]["processes"].as_array().cloned().unwrap_or_default()
    }

    /// The process of a device, once it is connected.
    pub(crate) fn pid(&self, role: &str) -> i32 {
        let ready = || {
            let processes = self.processes();
            let process = processes.iter().find(|process| process["role"] == role)?;
            i32::try_from(process["pid"].as_i64()?).ok()
        };
        suite::wait_for(role, ready)
    }

    /// Runs `outboard` about it.
    pub(crate) fn outboard(&self, words: &[&str]) -> String {
        let (status, out, err) = self.outboard_status(words);
        assert_eq!(status, Some(0), "{words:?}: {err}");
        out
    }

    /// Runs `outboard` about it: exit status, standard output and error.
    pub(crate) fn outboard_status(&self, words: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(program("outboard"));
        command.args(words).stdin(Stdio::null());
        set_user(&mut command, self.user, &self.scratch);
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Ended {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Ended { status, console: self.console(), err: self.err() };
            }
            assert!(start.elapsed() < LIMIT, "the machine does not end:\n{}\n{}", self.console(), self.err());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn set_user(command: &mut Command, user: Option<u32>, scratch: &Scratch) {
    let Some(user) = user else { return };
    let run = format!("/run/user/{user}");
    if !Path::new(&run).exists() {
        fs::create_dir_all(&run).unwrap();
    }
    std::os::unix::fs::chown(&run, Some(user), Some(user)).unwrap();
    std::os::unix::fs::chown(scratch.path(""), Some(user), Some(user)).unwrap();
    command.uid(user).gid(user).env("XDG_RUNTIME_DIR", run).env("HOME", scratch.path(""));
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
