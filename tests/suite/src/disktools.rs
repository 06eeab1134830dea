//! Other people's programs for disks: QEMU's tools, nbdkit, libnbd's and the file systems', from the tree that `cargo xtask test` makes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Ended, run};

/// Where the tree is.
fn tree() -> PathBuf {
    let tree = std::env::var_os("OUTBOARD_DISKTOOLS").map(PathBuf::from).unwrap_or_default();
    assert!(tree.exists(), "OUTBOARD_DISKTOOLS does not say where it is; run cargo xtask test");
    tree
}

/// A program of the tree, with the libraries it was built for.
pub fn tool(name: &str) -> Command {
    let tree = tree();
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    let program = ["bin", "sbin"].map(|folder| tree.join("usr").join(folder).join(name));
    let program = program.into_iter().find(|path| path.exists()).unwrap_or_else(|| panic!("{name} is not in the tree"));
    let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&libraries).arg(program).env("QEMU_MODULE_DIR", libraries.join("qemu"));
    command
}

/// nbdkit, in the foreground, serving on a socket with a plugin and filters of the tree.
pub fn nbdkit(socket: &Path, plugin: &str, filters: &[&str], parameters: &[&str]) -> Running {
    let folder = tree().join("usr/lib/x86_64-linux-gnu/nbdkit");
    let mut command = tool("nbdkit");
    command.arg("-f").arg("-U").arg(socket);
    for filter in filters {
        command.arg(format!("--filter={}", folder.join("filters").join(format!("nbdkit-{filter}-filter.so")).display()));
    }
    command.arg(folder.join("plugins").join(format!("nbdkit-{plugin}-plugin.so"))).args(parameters);
    let nbdkit = Running::start(&mut command);
    crate::wait_for("nbdkit", || socket.exists().then_some(()));
    nbdkit
}

/// Runs a program of the tree to its end, which has to be a good one.
pub fn done(name: &str, args: &[&str]) -> Ended {
    let ended = run(tool(name).args(args));
    assert_eq!(ended.code, Some(0), "{name} {args:?}: {}{}", ended.out, ended.err);
    ended
}

/// QEMU finds no error in a qcow2 image that nobody has open; leaks it may find.
pub fn qemu_finds_no_error(image: &str) {
    let mut tries = 0;
    let ended = loop {
        let ended = run(tool("qemu-img").args(["check", "-f", "qcow2", image]));
        // What a killed process had begun keeps the image's lock until it is through.
        if !ended.err.contains("lock") || tries > 100 {
            break ended;
        }
        tries += 1;
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(matches!(ended.code, Some(0 | 3)), "{image}: {:?} {}{}", ended.code, ended.out, ended.err);
}

/// A program that runs beside the test, and is ended with it.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts it.
    pub fn start(command: &mut Command) -> Running {
        Running(command.stdin(Stdio::null()).spawn().expect("the program starts"))
    }

    /// It has not ended.
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().expect("the program can be waited for").is_none()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A file of this host whose bytes somebody serves on an NBD socket (nbdfuse).
#[derive(Debug)]
pub struct NbdFile {
    /// Its path.
    pub path: PathBuf,
    folder: PathBuf,
    nbdfuse: Running,
}

/// A block device of this host whose bytes are those of such a file (loop).
#[derive(Debug)]
pub struct BlockDevice {
    /// Its path.
    pub path: String,
    /// Goes after it.
    nbd: Option<NbdFile>,
}

/// Whether this test may make block devices. Where it may not, a line says that it is skipped.
pub fn can_make_block_devices(test: &str) -> bool {
    let can =
        rustix::process::geteuid().is_root() && ["/dev/fuse", "/dev/loop-control"].iter().all(|path| Path::new(path).exists());
    if !can {
        println!("skipped: {test} needs root, /dev/fuse and /dev/loop-control");
    }
    can
}

impl NbdFile {
    /// Makes one. `folder` is a place for it that is not there yet.
    pub fn new(socket: &Path, folder: PathBuf) -> NbdFile {
        std::fs::create_dir(&folder).expect("a folder for the test can be made");
        let mut nbdfuse = Running::start(tool("nbdfuse").arg(&folder).arg("--unix").arg(socket));
        let path = folder.join("nbd");
        crate::wait_for("nbdfuse", || {
            assert!(nbdfuse.runs(), "nbdfuse ended");
            path.exists().then_some(())
        });
        NbdFile { path, folder, nbdfuse }
    }
}

impl BlockDevice {
    /// Makes one. `folder` is a place for it that is not there yet.
    pub fn new(socket: &Path, folder: PathBuf) -> BlockDevice {
        let file = NbdFile::new(socket, folder);
        let mut device = BlockDevice::of(&file.path);
        device.nbd = Some(file);
        device
    }

    /// Of an ordinary file.
    pub fn of(file: &Path) -> BlockDevice {
        let made = run(Command::new("losetup").args(["--direct-io=on", "--show", "-f"]).arg(file));
        assert_eq!(made.code, Some(0), "{}", made.err);
        BlockDevice { path: made.out.trim().to_owned(), nbd: None }
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        let _detached = run(Command::new("losetup").args(["-d", &self.path]));
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        let _unmounted = run(Command::new("umount").arg("-l").arg(&self.folder));
        // Without its file system it ends by itself.
        for _ in 0..100 {
            if !self.nbdfuse.runs() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
