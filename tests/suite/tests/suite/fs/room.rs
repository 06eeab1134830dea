//! Where there is no more room: on the disk, and for descriptors.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, Mode, OFlags, StatVfs, fallocate, statvfs};
use rustix::io::Errno;
use suite::{Scratch, program, run, wait_for};

use super::mounted::{Mounted, can_mount, serve};
use suite::virtiofsd::{Virtiofsd, Whose};

/// A small file system in memory, as long as it is kept.
struct Small(std::path::PathBuf);

impl Small {
    fn new(folder: &Path, options: &str) -> Small {
        fs::create_dir_all(folder).unwrap();
        let made = run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "small"]).arg(folder));
        assert_eq!(made.code, Some(0), "{}", made.err);
        Small(folder.to_path_buf())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _unmounted = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

/// Writes until it fails, and gives how far it came.
fn fill(path: &Path) -> (u64, io::Error) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    let mut written = 0;
    loop {
        match file.write_all(&[9; 65_536]).and_then(|()| file.sync_all()) {
            Ok(()) => written += 65_536,
            Err(error) => return (written, error),
        }
    }
}

#[test]
fn a_full_file_system() {
    if !can_mount("a full file system") {
        return;
    }
    for words in [&[][..], &["--cache", "never"], &["--cache", "always", "--writeback"]] {
        let scratch = Scratch::new();
        let _small = Small::new(&scratch.path("house"), "size=4m,nr_inodes=40");
        let (server, _) = serve(Whose::Ours, &scratch, words);
        let socket = server.socket.clone();
        let mut mounted = Mounted::of(scratch, &socket, Some(server), &[]);
        let (here, there) = mounted.both("big");
        let about = statvfs(&mounted.seen).unwrap();
        let own = statvfs(&mounted.house).unwrap();
        assert_eq!((about.f_blocks * about.f_frsize, about.f_files), (own.f_blocks * own.f_frsize, own.f_files));
        let (written, error) = fill(&here);
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{words:?}");
        assert!(written > 3 << 20 && fs::metadata(&there).unwrap().len() >= written, "{words:?}: {written}");
        let file = OpenOptions::new().write(true).open(&here).unwrap();
        assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 8 << 20), Err(Errno::NOSPC));
        drop(file);
        fs::remove_file(&here).unwrap();
        // That it has closed and forgotten what is gone the guest tells a moment later.
        let given_back = |is: &dyn Fn(StatVfs) -> bool| {
            wait_for("the room to be given back", || is(statvfs(&mounted.house).unwrap()).then_some(()));
        };
        given_back(&|now| now.f_bfree > about.f_blocks / 2);
        fs::write(mounted.seen.join("again"), vec![1; 1 << 20]).unwrap();
        assert_eq!(fs::read(mounted.seen.join("again")).unwrap(), vec![1; 1 << 20], "{words:?}");
        let made: Vec<_> = (0..60).map(|number| fs::create_dir(mounted.seen.join(format!("folder-{number}")))).collect();
        let error = made.iter().find_map(|made| made.as_ref().err()).unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        fs::remove_dir(mounted.seen.join("folder-0")).unwrap();
        given_back(&|now| now.f_ffree > 0);
        fs::create_dir(mounted.seen.join("folder-1000")).unwrap();
        mounted.unmount();
    }
}

/// Files that never had a name are counted when they come and when they go: others can be removed all the while.
#[test]
fn files_without_a_name_come_and_go() {
    if !can_mount("files without a name") {
        return;
    }
    let mut mounted = Mounted::ours(&[], &[]);
    for round in 0..20 {
        let how = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        drop(rustix::fs::open(&mounted.seen, how, Mode::from_raw_mode(0o600)).unwrap());
        let (here, there) = mounted.both(format!("{round}"));
        fs::write(&here, "x").unwrap();
        fs::remove_file(&here).unwrap();
        assert!(!there.exists());
    }
    mounted.unmount();
}

/// Whoever started the server may make no larger files: a guest that tries is told so, and the server goes on.
#[test]
fn a_limit_on_files_is_an_error() {
    if !can_mount("a limit on files") {
        return;
    }
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    let mut command = Command::new("prlimit");
    command.arg("--fsize=1048576").arg(program("outboard-virtiofsd")).arg("--shared-dir").arg(&house);
    let server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
    let socket = server.socket.clone();
    let mut mounted = Mounted::of(scratch, &socket, Some(server), &[]);
    let (here, there) = mounted.both("file");
    let (written, error) = fill(&here);
    assert_eq!((written, error.raw_os_error()), (1 << 20, Some(libc::EFBIG)));
    assert_eq!(fs::metadata(&there).unwrap().len(), 1 << 20);
    fs::write(mounted.seen.join("another"), "x").unwrap();
    mounted.unmount();
}

/// Descriptors that a process has.
fn descriptors(mounted: &Mounted) -> usize {
    let pid = mounted.server.as_ref().unwrap().pid().as_raw_nonzero();
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// A guest that knows more files than the server may have descriptors is served all the same, and so is whoever comes next.
#[test]
fn more_files_than_descriptors() {
    const LIMIT: &str = "1200";
    if !can_mount("more files than descriptors") {
        return;
    }
    let mut mounted = Mounted::ours(&["--cache", "always", "--rlimit-nofile", LIMIT], &[]);
    let most: usize = LIMIT.parse().unwrap();
    let (here, there) = mounted.both("many");
    fs::create_dir(&there).unwrap();
    fs::create_dir(mounted.house.join("other")).unwrap();
    fs::write(mounted.house.join("other/file"), "x").unwrap();
    (0..30_000).for_each(|number| drop(File::create(there.join(format!("{number}"))).unwrap()));
    let listed = run(Command::new("ls").arg("-l").arg(&here));
    assert_eq!((listed.err.as_str(), listed.out.lines().count()), ("", 30_001));
    println!("{} descriptors", descriptors(&mounted));
    assert!(descriptors(&mounted) < most);
    // Each is still the one that it was, and any can be opened.
    for number in (0..30_000).step_by(97) {
        fs::write(here.join(format!("{number}")), format!("{number}")).unwrap();
        assert_eq!(fs::read_to_string(there.join(format!("{number}"))).unwrap(), format!("{number}"));
    }
    assert_eq!(fs::read_to_string(mounted.seen.join("other/file")).unwrap(), "x");
    fs::create_dir_all(mounted.seen.join("other/1/2/3")).unwrap();
    assert!(descriptors(&mounted) < most);
    // Too many open files are too many, and nothing else stops working.
    let (mut open, mut refused): (Vec<File>, Vec<io::Error>) = (Vec::new(), Vec::new());
    for number in 0..most {
        match File::open(here.join(format!("{number}"))) {
            Ok(file) => open.push(file),
            Err(error) => refused.push(error),
        }
    }
    println!("{} open, {} refused, {} descriptors", open.len(), refused.len(), descriptors(&mounted));
    assert!(
        open.len() > 300 && refused.iter().all(|error| matches!(error.raw_os_error(), Some(libc::ENFILE | libc::EMFILE))),
        "{refused:?}"
    );
    assert!(!refused.is_empty() && descriptors(&mounted) <= most);
    fs::create_dir(mounted.seen.join("other/meanwhile")).unwrap();
    assert!(fs::metadata(here.join("29999")).unwrap().is_file());
    drop(open);
    // The guest says that it has closed a file when it comes to it. A few hundred are kept for inodes.
    suite::wait_for("the files to be closed", || (descriptors(&mounted) < 400).then_some(()));
    fs::remove_dir_all(&here).unwrap();
    assert!(!there.exists());
    mounted.unmount();
}

/// The same deep down: the way to a directory is not kept open as a whole.
#[test]
fn more_directories_than_descriptors() {
    if !can_mount("more directories than descriptors") {
        return;
    }
    let mut mounted = Mounted::ours(&["--rlimit-nofile", "500"], &[]);
    let (here, there) = mounted.both("top");
    for number in 0..1500 {
        fs::create_dir_all(there.join(format!("{}/{number}", number % 40))).unwrap();
        fs::write(there.join(format!("{}/{number}/file", number % 40)), format!("{number}")).unwrap();
    }
    let mut kept: Vec<OwnedFd> = Vec::new();
    for number in 0..1500 {
        let folder = here.join(format!("{}/{number}", number % 40));
        assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), format!("{number}"));
        // The guest knows them for as long as somebody stands in them.
        kept.push(rustix::fs::open(&folder, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap());
    }
    assert!(descriptors(&mounted) <= 500);
    fs::rename(here.join("7"), here.join("8/moved")).unwrap();
    fs::rename(here.join("8"), here.join("elsewhere")).unwrap();
    for (number, folder) in kept.iter().enumerate() {
        let file = rustix::fs::openat(folder, "file", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(io::read_to_string(File::from(file)).unwrap(), format!("{number}"));
    }
    drop(kept);
    mounted.unmount();
}
