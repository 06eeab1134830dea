//! Servers of a directory: upstream's virtiofsd, from the tree that `cargo xtask test` makes, and ours, started the same way.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Upstream's, which serves one frontend and then ends.
    Upstreams,
    /// Ours, which serves one after the other until it is told to end.
    Ours,
}

/// Serves a folder.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    whose: Whose,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Virtiofsd {
    /// Starts it. Ours has one request queue like upstream's, unless told otherwise.
    pub fn start(whose: Whose, socket: PathBuf, folder: &Path, words: &[&str]) -> Virtiofsd {
        let mut command = match whose {
            Whose::Upstreams => upstreams(),
            Whose::Ours => Command::new(crate::program("outboard-virtiofsd")),
        };
        if whose == Whose::Ours && !words.contains(&"--num-request-queues") {
            command.args(["--num-request-queues", "1"]);
        }
        command.arg("--shared-dir").arg(folder).args(words);
        Virtiofsd::launch(command, whose, socket)
    }

    /// Starts a command that is, or becomes, one of ours.
    pub fn launch_ours(command: Command, socket: PathBuf) -> Virtiofsd {
        Virtiofsd::launch(command, Whose::Ours, socket)
    }

    fn launch(mut command: Command, whose: Whose, socket: PathBuf) -> Virtiofsd {
        let mut child = command.arg("--socket-path").arg(&socket).stdin(Stdio::null()).spawn().expect("virtiofsd starts");
        crate::wait_for("virtiofsd", || {
            assert!(child.try_wait().expect("virtiofsd can be waited for").is_none(), "virtiofsd has ended");
            // Ours shows the path when it is ready.
            let ready = if whose == Whose::Ours { socket.exists() } else { listens(&socket) };
            ready.then_some(())
        });
        Virtiofsd { child, whose, socket }
    }

    /// Waits for its end, which has to be a good one, when its frontend has gone.
    pub fn end(&mut self) {
        if self.whose == Whose::Ours {
            let _already_gone = kill_process(Pid::from_child(&self.child), Signal::TERM);
        }
        let status = crate::wait_for("the end of virtiofsd", || self.ended());
        assert!(self.whose == Whose::Upstreams || status.success(), "{status}");
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("virtiofsd can be waited for")
    }

    /// The process that serves.
    pub fn pid(&self) -> Pid {
        match self.whose {
            Whose::Upstreams => Pid::from_child(&self.child),
            Whose::Ours => Pid::from_raw(crate::worker_of(self.child.id()).cast_signed()).expect("it has a number"),
        }
    }

    /// Ends whoever serves at once.
    pub fn kill(&mut self) {
        if self.whose == Whose::Ours && self.ended().is_none() {
            let _already_gone = kill_process(self.pid(), Signal::KILL);
            let _reaped = crate::wait_for("the end of virtiofsd", || self.ended());
        }
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Upstream's, without a sandbox of its own: not every place where tests are run lets it make one.
fn upstreams() -> Command {
    let whole = command(&["--sandbox", "none"]);
    let (program, words) = whole.split_first().expect("a command begins with a program");
    let mut command = Command::new(program);
    command.args(words);
    command
}

/// The command that starts it, with its own linker and libraries.
pub fn command(words: &[&str]) -> Vec<String> {
    let tree = std::env::var_os("OUTBOARD_VIRTIOFSD").map(PathBuf::from).unwrap_or_default();
    let program = tree.join("usr/libexec/virtiofsd");
    assert!(program.exists(), "OUTBOARD_VIRTIOFSD does not say where virtiofsd is; run cargo xtask test");
    let path = |part: &str| tree.join(part).display().to_string();
    let before = [path("usr/lib64/ld-linux-x86-64.so.2"), "--library-path".to_owned(), path("usr/lib/x86_64-linux-gnu")];
    before.into_iter().chain([program.display().to_string()]).chain(words.iter().map(|word| (*word).to_owned())).collect()
}

/// Whether somebody listens at a path. The path is there a moment before; and to try it would take the one connection that is served.
fn listens(socket: &Path) -> bool {
    // `__SO_ACCEPTCON` among the flags, the fourth column.
    let list = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let mut lines = list.lines().filter(|line| line.ends_with(&format!(" {}", socket.display())));
    lines.any(|line| line.split_whitespace().nth(3) == Some("00010000"))
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
