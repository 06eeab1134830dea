//! The server is killed while its mount is in use. Nobody waits for an answer that will not come.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use suite::{status, wait_for};

use super::mounted::{Mounted, can_mount, random};

/// Nothing that the server does not answer takes longer than this.
const AT_ONCE: Duration = Duration::from_secs(10);

/// One kind of use, again and again, in a directory that is not there below the mount.
fn use_it(kind: usize, folder: &Path) -> io::Result<()> {
    let own = folder.join(format!("{kind}"));
    match kind {
        0 => fs::write(&own, vec![7; 300_000]),
        1 => fs::read(folder.join("big")).map(drop),
        2 => fs::read_dir(folder)?.try_for_each(|entry| entry.and_then(|entry| entry.metadata()).map(drop)),
        3 => fs::write(&own, "x").and_then(|()| fs::rename(&own, folder.join("moved"))),
        4 => fs::create_dir(&own).and_then(|()| fs::remove_dir(&own)),
        5 => File::create(&own).and_then(|file| file.write_all_at(b"synced", 100).and_then(|()| file.sync_all())),
        _ => {
            let file = OpenOptions::new().read(true).write(true).open(folder.join("big"))?;
            file.set_len(16 << 20)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4096)?;
            Ok(())
        }
    }
}

#[test]
fn whatever_is_under_way_ends_in_an_error() {
    if !can_mount("a server killed under load") {
        return;
    }
    for (round, words) in [&[][..], &["--cache", "never"], &["--cache", "always", "--writeback"], &["--num-request-queues", "2"]]
        .into_iter()
        .enumerate()
    {
        let mut mounted = Mounted::ours(words, if words.contains(&"2") { &["--queues", "2"] } else { &[] });
        let (here, there) = mounted.both("work");
        fs::create_dir(&here).unwrap();
        fs::write(there.join("big"), random(16 << 20, 81)).unwrap();
        let open = File::create(here.join("open")).unwrap();
        let users: Vec<_> = (0..7)
            .map(|kind| {
                let folder = here.clone();
                thread::spawn(move || {
                    // It is not there any more when nothing is mounted.
                    while folder.exists() {
                        let _what_others_have_moved_or_what_is_dead = use_it(kind, &folder);
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(150 + 70 * round as u64));
        assert!(users.iter().all(|user| !user.is_finished()));
        let killed = Instant::now();
        mounted.server.as_mut().unwrap().kill();
        let (code, said) = mounted.ended();
        assert_eq!((code, said.lines().nth(1)), (Some(1), Some("outboard-probe: The server has gone away")), "{said}");
        wait_for("the users", || users.iter().all(thread::JoinHandle::is_finished).then_some(()));
        assert!(killed.elapsed() < AT_ONCE, "{words:?}: {:?}", killed.elapsed());
        assert!(open.metadata().is_err() || open.sync_all().is_err(), "a file that was open is dead");
    }
}

/// A signal reaches one thread after the other.
fn all_stopped(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task", pid = pid.as_raw_nonzero())).unwrap();
    let number = |thread: fs::DirEntry| thread.file_name().to_str().unwrap().parse().unwrap();
    threads.flatten().all(|thread| status(number(thread), "State").starts_with('T'))
}

/// A server that is stopped first: all these are under way for certain.
#[test]
fn whoever_waits_for_an_answer_gets_an_error() {
    if !can_mount("a server killed while it is stopped") {
        return;
    }
    let mut mounted = Mounted::ours(&["--num-request-queues", "2"], &["--queues", "2"]);
    let (here, there) = mounted.both("work");
    fs::create_dir(&there).unwrap();
    fs::write(there.join("big"), random(1 << 20, 82)).unwrap();
    assert!(here.exists());
    let server = mounted.server.as_ref().unwrap().pid();
    kill_process(server, Signal::STOP).unwrap();
    wait_for("all threads to stop", || all_stopped(server).then_some(()));
    let waiting: Vec<_> = (0..7)
        .map(|kind| {
            let folder = here.clone();
            thread::spawn(move || use_it(kind, &folder).map_err(|error| error.raw_os_error()))
        })
        .collect();
    thread::sleep(Duration::from_millis(300));
    assert!(waiting.iter().all(|user| !user.is_finished()), "they wait");
    let killed = Instant::now();
    mounted.server.as_mut().unwrap().kill();
    assert_eq!(mounted.ended().0, Some(1));
    for user in waiting {
        let error = user.join().unwrap().unwrap_err();
        assert!(matches!(error, Some(libc::ENOTCONN | libc::ECONNABORTED | libc::EIO)), "{error:?}");
    }
    assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
    assert!(!here.exists(), "nothing is mounted any more");
}
