//! A directory of this host, and the same seen through a server and the probe.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use probe::random::Random;
use rustix::process::{Pid, Signal, kill_process};
use suite::virtiofsd::{Virtiofsd, Whose};
use suite::{Scratch, program, run, wait_for};

/// Whether this test may mount. Where it may not, a line says that it is skipped.
pub(super) fn can_mount(test: &str) -> bool {
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let can = rustix::process::geteuid().is_root() && fuse.is_ok();
    if !can {
        println!("skipped: {test} needs root and /dev/fuse");
    }
    can
}

/// What is shared and where it is seen.
pub(super) struct Mounted {
    probe: Child,
    pub(super) server: Option<Virtiofsd>,
    /// Where the files are.
    pub(super) house: PathBuf,
    /// Where they are seen.
    pub(super) seen: PathBuf,
    pub(super) said: PathBuf,
    /// Goes last.
    pub(super) scratch: Scratch,
}

/// A server of a new directory.
pub(super) fn serve(whose: Whose, scratch: &Scratch, words: &[&str]) -> (Virtiofsd, PathBuf) {
    let house = scratch.path("house");
    fs::create_dir_all(&house).unwrap();
    let socket = scratch.path("fs.sock");
    let _of_an_earlier_one = fs::remove_file(&socket);
    (Virtiofsd::start(whose, socket, &house, &[&["--tag", "house"], words].concat()), house)
}

impl Mounted {
    pub(super) fn new(whose: Whose, server_words: &[&str], words: &[&str]) -> Mounted {
        let scratch = Scratch::new();
        let (server, _) = serve(whose, &scratch, server_words);
        let socket = server.socket.clone();
        Mounted::of(scratch, &socket, Some(server), words)
    }

    /// With the server of this project.
    pub(super) fn ours(server_words: &[&str], words: &[&str]) -> Mounted {
        Mounted::new(Whose::Ours, server_words, words)
    }

    pub(super) fn of(scratch: Scratch, socket: &Path, server: Option<Virtiofsd>, words: &[&str]) -> Mounted {
        let (house, seen, said) = (scratch.path("house"), scratch.path("seen here"), scratch.path("said"));
        fs::create_dir(&seen).unwrap();
        let mut command = Command::new(program("outboard-probe"));
        command.args(["fs", "mount"]).arg(socket).arg(&seen).args(words);
        let mut probe = command.stdin(Stdio::null()).stderr(File::create(&said).unwrap()).spawn().unwrap();
        wait_for("the mount", || {
            let text = fs::read_to_string(&said).unwrap();
            assert!(probe.try_wait().unwrap().is_none(), "the probe ended: {text}");
            text.contains("is mounted").then_some(())
        });
        Mounted { probe, server, house, seen, said, scratch }
    }

    /// Another server of the same directory, and another mount.
    pub(super) fn beside(&self, server_words: &[&str], words: &[&str]) -> Mounted {
        let scratch = Scratch::new();
        symlink(&self.house, scratch.path("house")).unwrap();
        let (server, _) = serve(Whose::Ours, &scratch, server_words);
        let socket = server.socket.clone();
        Mounted::of(scratch, &socket, Some(server), words)
    }

    /// A file or directory here, and there.
    pub(super) fn both(&self, name: impl AsRef<Path>) -> (PathBuf, PathBuf) {
        (self.seen.join(&name), self.house.join(&name))
    }

    /// What it has said, and its status when it has ended, after which nothing is mounted.
    pub(super) fn ended(&mut self) -> (Option<i32>, String) {
        let status = wait_for("the end of the probe", || self.probe.try_wait().unwrap());
        assert!(!is_mounted(&self.seen), "it is still mounted");
        (status.code(), fs::read_to_string(&self.said).unwrap())
    }

    pub(super) fn unmount(&mut self) {
        let ended = run(Command::new("umount").arg(&self.seen));
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let (code, said) = self.ended();
        assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
        if let Some(server) = &mut self.server {
            server.end();
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.probe), signal).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _already_gone = self.probe.kill();
        let _reaped = self.probe.wait();
        if is_mounted(&self.seen) {
            let _unmounted = run(Command::new("umount").arg("-l").arg(&self.seen));
        }
    }
}

pub(super) fn is_mounted(folder: &Path) -> bool {
    let list = fs::read_to_string("/proc/self/mountinfo").unwrap();
    list.contains(&folder.to_str().unwrap().replace(' ', "\\040"))
}

pub(super) fn random(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| random.number().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// What a guest may keep, in all the ways there are.
const MODES: [&[&str]; 5] = [
    &[],
    &["--cache", "never"],
    &["--cache", "metadata"],
    &["--cache", "always"],
    &["--cache", "always", "--writeback", "--num-request-queues", "2"],
];

/// Does something to a new mount in each of them.
pub(super) fn in_each_mode(test: &str, act: impl Fn(&Mounted)) {
    if !can_mount(test) {
        return;
    }
    for words in MODES {
        println!("{words:?}");
        let mut mounted = Mounted::ours(words, &[]);
        act(&mounted);
        mounted.unmount();
    }
}
