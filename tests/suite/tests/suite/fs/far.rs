//! A share whose files are another process's affair: a mount of a file server is shared by a second one. All of it works through both, and when
//! the one below does not answer any more, only what is asked of it waits.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::Signal;
use suite::counters::Counters;
use suite::virtiofsd::{Virtiofsd, Whose};
use suite::{Scratch, program, run};

use super::exercise::{ALONE, Worker, both_sides_agree};
use super::mounted::{Mounted, can_mount, serve};
use super::use_it;

/// A server of what is seen of another one, whose files are in `below.house`.
fn above(below: &Mounted, words: &[&str]) -> Mounted {
    let scratch = Scratch::new();
    symlink(&below.seen, scratch.path("house")).unwrap();
    let (server, _) = serve(Whose::Ours, &scratch, words);
    let socket = server.socket.clone();
    Mounted::of(scratch, &socket, Some(server), &[])
}

#[test]
fn everything_works_through_two_servers() {
    if !can_mount("a share of a share") {
        return;
    }
    let counters = Counters::new();
    for (below, words) in [
        (&["--cache", "never"][..], &["--cache", "never"][..]),
        (&["--locks", "host"], &["--locks", "host", "--thread-pool-size", "1"]),
        (&["--cache", "always", "--writeback"], &["--cache", "always", "--writeback", "--num-request-queues", "2"]),
    ] {
        println!("{words:?} over {below:?}");
        let below = Mounted::ours(below, &[]);
        let mut mounted = above(&below, &[&["--metrics-fd", &counters.fd()], words].concat());
        let before = counters.count("virtiofsd_handed_on");
        if !words.contains(&"--writeback") {
            use_it(&below.house, &mounted.seen, 3);
        }
        fs::create_dir(mounted.seen.join("common")).unwrap();
        thread::scope(|scope| {
            for number in 0..4 {
                let seen = &mounted.seen;
                scope.spawn(move || Worker::new(90 + number, seen, &format!("of-{number}"), ALONE).work(80));
            }
        });
        both_sides_agree(&mounted);
        assert!(counters.count("virtiofsd_handed_on") > before + 500, "others have done it");
        if words.contains(&"host") {
            kept_out(&mounted.seen.join("locked"), &below.house.join("locked"));
        }
        mounted.unmount();
    }
}

/// A lock that was asked for through both servers is one of the host's, and who waits for one gets it.
fn kept_out(here: &Path, there: &Path) {
    let open = |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    let (first, second) = (open(here), open(there));
    for (one, other, path) in [(&first, &second, there), (&second, &first, here)] {
        flock(one, FlockOperation::LockExclusive).unwrap();
        assert_eq!(flock(other, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK));
        let waiting = thread::spawn({
            let path = path.to_path_buf();
            move || run(Command::new("flock").arg(path).arg("true")).code
        });
        thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        flock(one, FlockOperation::Unlock).unwrap();
        assert_eq!(waiting.join().unwrap(), Some(0));
    }
}

/// Where the file system below finds out only then that there is no room, a program hears so when it closes its file.
#[test]
fn what_went_wrong_with_a_write_is_told_when_a_file_is_closed() {
    if !can_mount("an error when a file is closed") {
        return;
    }
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    let mut command = Command::new("unshare");
    let script = r#"mount -t tmpfs -o size=1m none "$1"; exec "$0" --shared-dir "$@""#;
    command.args(["--mount", "sh", "-ec", script]).arg(program("outboard-virtiofsd")).arg(&house);
    command.args(["--cache", "always", "--writeback"]);
    let server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
    let socket = server.socket.clone();
    let below = Mounted::of(scratch, &socket, Some(server), &[]);
    let mut mounted = above(&below, &[]);
    let mut file = File::create(mounted.seen.join("file")).unwrap();
    file.write_all(&vec![1; 3 << 20]).unwrap();
    assert_eq!(nix::unistd::close(file.into_raw_fd()), Err(nix::errno::Errno::ENOSPC));
    mounted.unmount();
}

/// A directory with one that another process serves in it, and one of this host's own.
fn with_a_far_one(below: &Mounted, words: &[&str]) -> Mounted {
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir_all(house.join("far")).unwrap();
    fs::create_dir(house.join("near")).unwrap();
    let mut command = Command::new("unshare");
    let script = r#"mount --bind "$1" "$2/far"; mount --bind "$2/near" "$2/near"; shift; exec "$0" --shared-dir "$@""#;
    command.args(["--mount", "sh", "-ec", script]).arg(program("outboard-virtiofsd")).arg(&below.seen).arg(&house).args(words);
    let server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
    let socket = server.socket.clone();
    Mounted::of(scratch, &socket, Some(server), &[])
}

/// One thing of each kind, with files of this host.
fn near(seen: &Path) {
    let (folder, file) = (seen.join("near/folder"), seen.join("near/file"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, vec![7; 300_000]).unwrap();
    let open = OpenOptions::new().read(true).write(true).open(&file).unwrap();
    open.write_at(b"x", 5).unwrap();
    open.sync_all().unwrap();
    assert_eq!(open.metadata().unwrap().len(), 300_000);
    drop(open);
    assert_eq!(fs::read(&file).unwrap().len(), 300_000);
    assert_eq!(fs::read_dir(seen.join("near")).unwrap().count(), 2);
    fs::rename(&file, folder.join("file")).unwrap();
    fs::write(seen.join("beside"), "both").unwrap();
    rustix::fs::statvfs(seen).unwrap();
    fs::remove_file(seen.join("beside")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
}

type Far = fn(&Path, File);

/// What is asked of the other process while it does not answer: of each kind, and more of them than there are threads.
const FAR: [(&str, Far); 9] = [
    ("stat", |far, _| assert!(fs::metadata(far.join("1")).unwrap().is_file())),
    ("list", |far, _| assert!(fs::read_dir(far).unwrap().count() >= 9)),
    ("open", |far, _| drop(File::open(far.join("2")).unwrap())),
    ("make", |far, _| fs::create_dir(far.join("folder")).unwrap()),
    ("rename", |far, _| fs::rename(far.join("3"), far.join("renamed")).unwrap()),
    ("remove", |far, _| fs::remove_file(far.join("4")).unwrap()),
    ("read", |_, open| assert_eq!(open.read_at(&mut [0; 10], 0).unwrap(), 4)),
    ("write", |_, open| assert_eq!(open.write_at(b"more", 100).unwrap(), 4)),
    ("close", |_, open| drop(open)),
];

/// It may be another machine, or a process that somebody has stopped: that must not stop the share.
#[test]
fn when_what_is_far_does_not_answer_what_is_near_does() {
    if !can_mount("a share that does not answer") {
        return;
    }
    for words in [&["--cache", "never", "--num-request-queues", "1"][..], &["--locks", "host", "--num-request-queues", "2"]] {
        let below = Mounted::ours(&["--cache", "never"], &[]);
        (0..FAR.len()).for_each(|number| fs::write(below.house.join(number.to_string()), "text").unwrap());
        let mut mounted = with_a_far_one(&below, words);
        let far = mounted.seen.join("far");
        near(&mounted.seen);
        let open = |number: usize| OpenOptions::new().read(true).write(true).open(far.join(number.to_string())).unwrap();
        let files: Vec<File> = (0..FAR.len()).map(open).collect();
        below.signal(Signal::STOP);
        let (done, is_done) = channel();
        let asking: Vec<_> = (FAR.iter().zip(files))
            .map(|((what, act), file)| {
                let (done, far) = (done.clone(), far.clone());
                thread::spawn(move || {
                    act(&far, file);
                    done.send(*what).unwrap();
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        // Much longer than it takes, and all of it.
        let (told, hear) = channel();
        let beside = thread::spawn({
            let seen = mounted.seen.clone();
            move || {
                (0..20).for_each(|_| near(&seen));
                told.send(()).unwrap();
            }
        });
        let answered = hear.recv_timeout(Duration::from_secs(20));
        let early: Vec<&str> = is_done.try_iter().filter(|what| *what != "close").collect();
        below.signal(Signal::CONT);
        assert!(answered.is_ok(), "{words:?}: what is near was held up");
        assert!(early.is_empty(), "{words:?}: {early:?} cannot have been answered");
        beside.join().unwrap();
        asking.into_iter().for_each(|one| one.join().unwrap());
        assert!(below.house.join("renamed").exists() && below.house.join("folder").exists() && !below.house.join("4").exists());
        assert_eq!(fs::read(below.house.join("7")).unwrap().len(), 104);
        mounted.unmount();
    }
}
