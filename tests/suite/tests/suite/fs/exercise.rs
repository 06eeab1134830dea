//! Thousands of operations at random: in one file (fsx), and in one tree by many at once, with what has to come of them known.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use probe::random::Random;
use suite::{fstools, run};

use super::mounted::{Mounted, can_mount, random};

/// Another one each time. It is printed, and `OUTBOARD_SEED` sets it.
fn seed() -> u64 {
    let given = std::env::var("OUTBOARD_SEED").ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = given.unwrap_or_else(|| u64::from(now.subsec_nanos()));
    println!("OUTBOARD_SEED={seed}");
    seed
}

const WEIGHTS: &str = "flen = 400000
[opsize]
max = 100000
[weights]
close_open = 3
read = 10
write = 10
mapread = 8
mapwrite = 8
invalidate = 1
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 3
sendfile = 3
posix_fadvise = 2
copy_file_range = 4
";

/// A file is compared with what it should be after each step, and on the host in the end with what is seen of it.
fn fsx(server: &[&str], mount: &[&str]) {
    if !can_mount("fsx") {
        return;
    }
    let seed = seed().to_string();
    let mut mounted = Mounted::ours(server, mount);
    let configuration = mounted.scratch.path("fsx.toml");
    fs::write(&configuration, WEIGHTS).unwrap();
    let (here, there) = mounted.both("file");
    let mut command = fstools::tool("fsx");
    command.args(["-N", "6000", "-S", &seed, "-f"]).arg(configuration).arg("-P").arg(mounted.scratch.path("")).arg(&here);
    let ended = run(&mut command);
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.err);
    let bytes = fs::read(&here).unwrap();
    run(Command::new("sync").arg(&here));
    assert!(fs::read(&there).unwrap() == bytes);
    mounted.unmount();
}

#[test]
fn a_file_that_is_kept_for_a_second() {
    fsx(&["--num-request-queues", "2"], &["--queues", "2"]);
}

#[test]
fn a_file_of_which_nothing_is_kept() {
    fsx(&["--cache", "never", "--allow-mmap"], &["--scatter", "--seed", "61"]);
}

#[test]
fn a_file_whose_writes_are_collected() {
    fsx(&["--cache", "always", "--writeback"], &[]);
}

/// Names that everybody uses.
const COMMON: u64 = 12;

/// What one of many does in a tree.
pub(super) struct Worker<'a> {
    random: Random,
    top: &'a Path,
    /// Its own directory in it, and what is in there.
    own: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
    /// What else may happen to whoever uses what others use.
    allowed: &'a [i32],
}

/// What comes of several at once using the same names.
pub(super) const ALONE: &[i32] = &[
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTEMPTY,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::EINVAL,
    libc::ELOOP,
    libc::EPERM,
    libc::ENXIO,
];

/// The same, where some of them are on the other side.
const WITH_THE_HOST: &[i32] = &[
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTEMPTY,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::EINVAL,
    libc::ELOOP,
    libc::EPERM,
    libc::ENXIO,
    libc::ESTALE,
];

impl<'a> Worker<'a> {
    pub(super) fn new(seed: u64, top: &'a Path, name: &str, allowed: &'a [i32]) -> Worker<'a> {
        let own = top.join(name);
        fs::create_dir(&own).unwrap();
        Worker { random: Random::new(seed), top, own, files: BTreeMap::new(), allowed }
    }

    fn one_of(&mut self, limit: u64) -> usize {
        usize::try_from(self.random.below(limit)).unwrap()
    }

    fn bytes(&mut self, limit: u64) -> Vec<u8> {
        random(self.one_of(limit), self.random.number())
    }

    pub(super) fn work(&mut self, steps: usize) {
        for step in 0..steps {
            self.with_its_own(step);
            if let Err(error) = self.with_what_all_use() {
                assert!(error.raw_os_error().is_some_and(|number| self.allowed.contains(&number)), "{error}");
            }
        }
        for (name, bytes) in &self.files {
            assert!(&fs::read(self.own.join(name)).unwrap() == bytes, "{name}");
        }
    }

    /// Nobody else touches these: nothing fails, and what is read is what was written.
    fn with_its_own(&mut self, step: usize) {
        let chosen = self.one_of(self.files.len() as u64 + 1);
        let Some((name, mut bytes)) = self.files.iter().nth(chosen).map(|(name, bytes)| (name.clone(), bytes.clone())) else {
            let (name, bytes) = (format!("new-{step}"), self.bytes(30_000));
            fs::write(self.own.join(&name), &bytes).unwrap();
            self.files.insert(name, bytes);
            return;
        };
        let path = self.own.join(&name);
        match self.one_of(7) {
            0 => {
                let (at, more) = (self.one_of(40_000), self.bytes(20_000));
                let file = OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&more, at as u64).unwrap();
                if !more.is_empty() {
                    bytes.resize(bytes.len().max(at + more.len()), 0);
                    bytes[at..at + more.len()].copy_from_slice(&more);
                }
                self.files.insert(name, bytes);
            }
            1 => {
                let len = self.one_of(50_000);
                OpenOptions::new().write(true).open(&path).unwrap().set_len(len as u64).unwrap();
                bytes.resize(len, 0);
                self.files.insert(name, bytes);
            }
            2 => {
                let new = format!("moved-{step}");
                fs::rename(&path, self.own.join(&new)).unwrap();
                self.files.remove(&name);
                self.files.insert(new, bytes);
            }
            3 => {
                fs::remove_file(&path).unwrap();
                assert_eq!(fs::metadata(&path).unwrap_err().raw_os_error(), Some(libc::ENOENT));
                self.files.remove(&name);
            }
            4 => {
                let (new, replaced) = (format!("copy-{step}"), self.bytes(3000));
                fs::copy(&path, self.own.join(&new)).unwrap();
                fs::write(&path, &replaced).unwrap();
                self.files.insert(new, bytes);
                self.files.insert(name, replaced);
            }
            _ => assert!(fs::read(&path).unwrap() == bytes, "{name}"),
        }
    }

    /// A name that others use, too, in one of the directories that may be there.
    fn common(&mut self) -> PathBuf {
        let mut path = self.top.join("common");
        for _ in 0..self.one_of(3) {
            path.push(format!("{}", self.one_of(COMMON)));
        }
        path.join(format!("{}", self.one_of(COMMON)))
    }

    fn with_what_all_use(&mut self) -> io::Result<()> {
        let (path, other) = (self.common(), self.common());
        match self.one_of(13) {
            0 | 1 => fs::create_dir(&path),
            2 => fs::write(&path, self.bytes(5000)),
            3 => fs::rename(&path, &other),
            4 => fs::hard_link(&path, &other),
            5 => symlink("../3", &path),
            6 => fs::remove_file(&path),
            7 => fs::remove_dir(&path),
            8 => fs::set_permissions(&path, PermissionsExt::from_mode(0o700 | u32::try_from(self.random.below(64)).unwrap())),
            9 => OpenOptions::new().append(true).create(true).open(&path)?.write_all_at(b"at the end", 0),
            10 => fs::read_dir(&path).map(|dir| dir.for_each(drop)),
            11 => rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Socket, rustix::fs::Mode::RUSR, 0)
                .map_err(io::Error::from),
            _ => fs::symlink_metadata(&path).map(drop),
        }
    }
}

/// All that there is below a place, as it is told apart: kind and permissions, owners, names, length, content or target.
fn tree(top: &Path) -> BTreeMap<PathBuf, String> {
    let (mut all, mut left) = (BTreeMap::new(), vec![top.to_path_buf()]);
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let about = fs::symlink_metadata(&path).unwrap();
            let content = if about.is_dir() {
                left.push(path.clone());
                String::new()
            } else if about.is_file() {
                let bytes = fs::read(&path).unwrap();
                format!(
                    "{} bytes, {:x}",
                    bytes.len(),
                    bytes.iter().fold(7u64, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte))
                )
            } else {
                fs::read_link(&path).map(|target| target.display().to_string()).unwrap_or_default()
            };
            // How many names a directory has, and how long it is, is the file system's own affair.
            let links = if about.is_dir() { 0 } else { about.nlink() };
            let text = format!("{:o} {}:{} {links} {} {content}", about.mode(), about.uid(), about.gid(), about.ino());
            all.insert(path.strip_prefix(top).unwrap().to_path_buf(), text);
        }
    }
    all
}

pub(super) fn both_sides_agree(mounted: &Mounted) {
    run(Command::new("sync").arg("-f").arg(&mounted.seen));
    let (here, there) = (tree(&mounted.seen), tree(&mounted.house));
    let differ: Vec<_> = there
        .iter()
        .filter(|(path, text)| here.get(*path) != Some(text))
        .map(|(path, text)| (path, text, here.get(path)))
        .collect();
    assert!(differ.is_empty() && here.len() == there.len(), "there, and here: {differ:#?}");
    println!("{} files", here.len());
}

fn many_at_once(server: &[&str], mount: &[&str], steps: usize) {
    if !can_mount("many at once") {
        return;
    }
    let seed = seed();
    let mut mounted = Mounted::ours(server, mount);
    fs::create_dir(mounted.seen.join("common")).unwrap();
    thread::scope(|scope| {
        for number in 0..6 {
            let seen = &mounted.seen;
            scope.spawn(move || Worker::new(seed + number, seen, &format!("of-{number}"), ALONE).work(steps));
        }
    });
    both_sides_agree(&mounted);
    fs::remove_dir_all(mounted.seen.join("common")).unwrap();
    assert!(!mounted.house.join("common").exists());
    mounted.unmount();
}

#[test]
fn a_tree_that_is_kept_for_a_second() {
    many_at_once(&["--num-request-queues", "2"], &["--queues", "2"], 1500);
}

#[test]
fn a_tree_of_which_nothing_is_kept() {
    many_at_once(&["--cache", "never"], &["--scatter", "--seed", "71"], 800);
}

#[test]
fn a_tree_that_is_kept_with_what_is_written() {
    many_at_once(&["--cache", "always", "--writeback", "--num-request-queues", "2"], &["--queues", "2", "--indirect"], 1500);
}

/// The host does the same to the same names meanwhile. When it is quiet, and a second has passed, both sides agree.
#[test]
fn a_tree_that_the_host_uses_too() {
    if !can_mount("a tree that both sides use") {
        return;
    }
    let seed = seed();
    for (server, pause) in [(&["--cache", "never"][..], 0), (&["--negative-timeout", "1", "--num-request-queues", "2"], 1200)] {
        let mut mounted = Mounted::ours(server, &[]);
        fs::create_dir(mounted.seen.join("common")).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let (house, seen, done) = (&mounted.house, &mounted.seen, &done);
            let host = scope.spawn(move || {
                let mut worker = Worker::new(seed + 100, house, "of-the-host", WITH_THE_HOST);
                while !done.load(Ordering::Relaxed) {
                    worker.work(20);
                }
            });
            let guests: Vec<_> = (0..4)
                .map(|number| {
                    scope.spawn(move || Worker::new(seed + number, seen, &format!("of-{number}"), WITH_THE_HOST).work(700))
                })
                .collect();
            let ended: Vec<_> = guests.into_iter().map(thread::ScopedJoinHandle::join).collect();
            done.store(true, Ordering::Relaxed);
            host.join().unwrap();
            assert!(ended.into_iter().all(|worker| worker.is_ok()));
        });
        thread::sleep(Duration::from_millis(pause));
        both_sides_agree(&mounted);
        mounted.unmount();
    }
}
