//! Upstream's virtiofsd, from the tree that `cargo xtask test` makes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::Pid;

/// Serves a folder to one frontend, then it ends.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Virtiofsd {
    /// Starts it. Without a sandbox of its own: not every place where tests are run lets it make one.
    pub fn start(socket: PathBuf, folder: &Path, words: &[&str]) -> Virtiofsd {
        let whole = command(&[]);
        let (program, before) = whole.split_first().expect("a command begins with a program");
        let mut command = Command::new(program);
        command
            .args(before)
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(folder)
            .args(["--sandbox", "none"])
            .args(words);
        let mut child = command.stdin(Stdio::null()).spawn().expect("virtiofsd starts");
        crate::wait_for("virtiofsd", || {
            assert!(child.try_wait().expect("virtiofsd can be waited for").is_none(), "virtiofsd has ended");
            listens(&socket).then_some(())
        });
        Virtiofsd { child, socket }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("virtiofsd can be waited for")
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
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
        self.kill();
    }
}
