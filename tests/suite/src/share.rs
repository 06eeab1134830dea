//! A folder that our virtio-fs server shares, a guest of it that says what it likes, and something beside it that nobody may touch.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use probe::fs::attack::fingerprint;
use probe::fs::raw::Raw;
use rustix::fs::inotify;

use crate::{Scratch, Server};

/// What is shared, and who shares it.
#[derive(Debug)]
pub struct Shared {
    /// The server.
    pub server: Server,
    /// What is shared.
    pub house: PathBuf,
    /// What is beside it: a folder with the same names as a folder of the share.
    pub beside: PathBuf,
    /// Removed last.
    _scratch: Scratch,
}

impl Shared {
    /// Starts a server with two queues for a folder that `furnish` fills.
    pub fn new(words: &[&str], furnish: impl FnOnce(&Path)) -> Shared {
        let scratch = Scratch::new();
        let (house, beside) = (scratch.path("house"), scratch.path("beside"));
        for folder in [&house, &beside] {
            std::fs::create_dir(folder).expect("a folder can be made");
        }
        furnish(&house);
        let path = house.display().to_string();
        let fixed = ["--log-level", "error", "--shared-dir", &path, "--num-request-queues", "2"];
        let server = Server::start("outboard-virtiofsd", &scratch, &[&fixed, words].concat());
        Shared { server, house, beside, _scratch: scratch }
    }

    /// A guest that has been greeted.
    pub fn guest(&self) -> Raw {
        Raw::begin(self.connect(), 2).expect("the server greets a guest")
    }

    /// A connection to the server.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.server.socket).expect("the server listens")
    }

    /// A line of `/proc/PID/task/TID/status` of each thread that serves.
    pub fn of_threads(&self, key: &str) -> Vec<String> {
        let worker = self.server.worker();
        let tasks = std::fs::read_dir(format!("/proc/{worker}/task")).expect("the server runs");
        let mut lines: Vec<String> = tasks
            .flatten()
            .filter_map(|task| {
                let text = std::fs::read_to_string(task.path().join("status")).ok()?;
                let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
                Some(format!("{} {}", task.file_name().display(), line.trim()))
            })
            .collect();
        lines.sort();
        lines
    }
}

/// Folders that are watched: whoever opens, reads or changes something in them is seen.
#[derive(Debug)]
pub struct Canary {
    folder: PathBuf,
    before: String,
    watch: rustix::fd::OwnedFd,
}

impl Canary {
    /// Watches a folder and those in it.
    pub fn new(folder: &Path) -> Canary {
        let before = fingerprint(folder).expect("the canary can be looked at");
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).expect("there is inotify");
        let mut paths = vec![folder.to_path_buf()];
        while let Some(path) = paths.pop() {
            inotify::add_watch(&watch, &path, inotify::WatchFlags::ALL_EVENTS).expect("the canary can be watched");
            if path.is_dir() {
                paths.extend(std::fs::read_dir(&path).expect("a folder").flatten().map(|entry| entry.path()));
            }
        }
        let canary = Canary { folder: folder.to_path_buf(), before, watch };
        canary.events();
        canary
    }

    /// How often somebody was there since the last time.
    pub fn events(&self) -> usize {
        let mut count = 0;
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.watch, &mut buffer);
        while reader.next().is_ok() {
            count += 1;
        }
        count
    }

    /// Nobody was there, and nothing has changed.
    ///
    /// # Panics
    /// When that is not so.
    pub fn check(&self) {
        assert_eq!(self.events(), 0, "somebody was in {}", self.folder.display());
        assert_eq!(fingerprint(&self.folder).expect("the canary can be looked at"), self.before);
    }
}
