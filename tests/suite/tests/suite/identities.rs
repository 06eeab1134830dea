//! A server of files, which can name things after it is confined and may be several users, looked at from outside: `outboard-evil-server`
//! stands for all of them.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use suite::{Scratch, program, run, status, wait_for};

const PROGRAM: &str = "outboard-evil-server";

/// A server that has done what it was asked.
struct Evil {
    child: Child,
    /// What came of it; empty if it was ended.
    said: String,
}

impl Evil {
    fn start(share: &PathBuf, words: &[&str]) -> Evil {
        let mut command = Command::new(program(PROGRAM));
        command.arg("--shared-dir").arg(share).args(words).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        Evil { child, said: said.trim().to_owned() }
    }

    fn worker(&self) -> u32 {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        wait_for("the worker", || std::fs::read_to_string(&path).ok()?.split_whitespace().next()?.parse().ok())
    }

    fn end(&mut self) -> Option<i32> {
        wait_for("the end", || self.child.try_wait().unwrap()).code()
    }

    /// Whether it passes a signal on to whoever serves, and ends as that one does.
    fn terminate(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.end()
    }
}

impl Drop for Evil {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A directory in which everybody may make files.
fn share(scratch: &Scratch) -> PathBuf {
    let share = scratch.path("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::set_permissions(&share, std::fs::Permissions::from_mode(0o777)).unwrap();
    share
}

fn is_root() -> bool {
    let root = geteuid().is_root();
    if !root {
        println!("For root only.");
    }
    root
}

/// CAP_CHOWN and CAP_SETUID.
const TWO: &str = "0000000000000081";
const NONE: &str = "0000000000000000";

/// The confinement of every thread of it, with these capabilities.
fn is_confined(evil: &Evil, capabilities: &str) {
    let worker = evil.worker();
    // The thread that serves has spoken; the one that waits may still be on its way to its filter.
    wait_for("the filter of the first thread", || (status(worker, "Seccomp") == "2").then_some(()));
    let tasks: Vec<u32> = std::fs::read_dir(format!("/proc/{worker}/task"))
        .unwrap()
        .map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    assert_eq!(tasks.len(), 2);
    for task in tasks {
        for (key, value) in [("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapInh", NONE), ("CapBnd", NONE), ("CapAmb", NONE)] {
            assert_eq!(status(task, key), value, "{key}");
        }
        assert_eq!((status(task, "CapPrm").as_str(), status(task, "CapEff").as_str()), (capabilities, capabilities));
    }
}

#[test]
fn who_is_one_user_keeps_no_capability_for_its_share() {
    let scratch = Scratch::new();
    let share = share(&scratch);
    let evil = Evil::start(&share, &[]);
    assert_eq!(evil.said, "made");
    is_confined(&evil, NONE);
    assert_eq!(std::fs::metadata(share.join("made")).unwrap().uid(), geteuid().as_raw());
    assert_eq!(evil.terminate(), Some(0));
    assert_eq!(Evil::start(&share, &["--user", "5"]).said, "Cannot be another user: Invalid argument (os error 22)");
}

#[test]
fn who_has_a_map_keeps_the_capabilities_of_its_policy() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let share = share(&scratch);
    let evil = Evil::start(&share, &["--map", "0:0:1", "--map", "1:500001:10", "--user", "5"]);
    assert_eq!(evil.said, "made");
    is_confined(&evil, TWO);
    assert_eq!(status(evil.worker(), "Groups"), "");
    assert_eq!(std::fs::metadata(share.join("made")).unwrap().uid(), 500_005);
    assert_eq!(evil.terminate(), Some(0));
}

/// Also where the one it is inside is somebody else outside, to whom its parent has given the right to end it.
#[test]
fn who_is_nobody_of_its_starter_is_ended_by_it_all_the_same() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let shared = share(&scratch);
    // The program has to be reached by that user, and the folder.
    let program = scratch.path(PROGRAM);
    std::fs::copy(suite::program(PROGRAM), &program).unwrap();
    std::fs::set_permissions(scratch.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    command.arg("--shared-dir").arg(&shared).args(["--map", "0:500000:10", "--user", "5"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let evil = Evil { child, said: said.trim().to_owned() };
    assert_eq!(evil.said, "made");
    assert_eq!(status(evil.worker(), "Uid"), "500000\t500000\t500000\t500000");
    assert_eq!(std::fs::metadata(shared.join("made")).unwrap().uid(), 500_005);
    assert_eq!(evil.terminate(), Some(0));
}

#[test]
fn who_has_the_users_of_the_host_keeps_the_capabilities_of_its_policy_and_no_groups() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let share = share(&scratch);
    let evil = Evil::start(&share, &["--host", "--user", "5"]);
    assert_eq!(evil.said, "made");
    is_confined(&evil, TWO);
    let worker = evil.worker();
    assert_eq!(status(worker, "Groups"), "");
    let namespace = |pid: &str, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    assert_eq!(namespace(&worker.to_string(), "user"), namespace("self", "user"));
    for name in ["mnt", "uts", "ipc", "pid", "net"] {
        assert_ne!(namespace(&worker.to_string(), name), namespace("self", name), "{name}");
    }
    let mounts = std::fs::read_to_string(format!("/proc/{worker}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "one empty file system: {mounts}");
    let limits = |pid: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        text.lines().find(|line| line.starts_with("Max processes")).unwrap().to_owned()
    };
    assert_eq!(limits(&worker.to_string()), limits("self"), "root's processes all count");
    assert_eq!(std::fs::metadata(share.join("made")).unwrap().uid(), 5);
    assert_eq!(evil.terminate(), Some(0));
}

#[test]
fn a_killed_parent_takes_along_whoever_has_changed_its_user() {
    if !is_root() {
        return;
    }
    for words in [&["--host", "--user", "5"][..], &["--map", "0:0:1", "--map", "1:500001:10"]] {
        let scratch = Scratch::new();
        let evil = Evil::start(&share(&scratch), words);
        let worker = evil.worker();
        drop(evil);
        wait_for("the worker's end", || (!PathBuf::from(format!("/proc/{worker}")).exists()).then_some(()));
    }
}

#[test]
fn a_path_from_the_current_directory_is_the_end() {
    let scratch = Scratch::new();
    let share = share(&scratch);
    for way in ["here", "chroot"] {
        let mut evil = Evil::start(&share, &["--way", way]);
        assert_eq!(evil.end(), Some(128 + libc::SIGSYS), "{way}");
        assert_eq!(evil.said, "", "{way}");
    }
    assert!(!share.join("made").exists());
}

#[test]
fn a_policy_is_shown_with_its_capabilities_and_what_an_argument_must_not_be() {
    let said = run(Command::new(program(PROGRAM)).arg("--print-sandbox"));
    let value: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(value["capabilities"], serde_json::json!(["CAP_CHOWN", "CAP_SETUID"]));
    let rules = value["threads"][1]["rules"].as_array().unwrap();
    let open = rules.iter().find(|rule| rule["call"] == "openat2").unwrap();
    assert_eq!(open["when"], serde_json::json!(["argument 0 is not 0xffffff9c"]));
}

#[test]
fn more_descriptors_than_can_be_had_are_refused_with_a_way_out() {
    let scratch = Scratch::new();
    let share = share(&scratch);
    let evil = Evil::start(&share, &["--rlimit-nofile", "200"]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", evil.worker())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["200", "200"]);
    let words = ["--rlimit-nofile", "9999999999", "--shared-dir", share.to_str().unwrap()];
    let refused = run(Command::new(program(PROGRAM)).args(words));
    assert_eq!(refused.code, Some(1));
    let start =
        "outboard-evil-server: Cannot confine outboard-evil-server: Cannot hold 9999999999 descriptors, since the hard limit is ";
    assert!(refused.err.starts_with(start), "{}", refused.err);
    assert!(
        refused.err.trim().ends_with("; raise it (ulimit -Hn, LimitNOFILE= of a service), or ask for fewer"),
        "{}",
        refused.err
    );
}

/// The hidden flags are believed only where they are true.
#[test]
fn who_is_not_in_its_namespaces_is_not_believed() {
    for kind in ["own", "ranges", "host"] {
        let refused = run(Command::new(program(PROGRAM)).args(["--shared-dir", "/", "--namespaced", "--identity", kind]));
        let said = "outboard-evil-server: --namespaced is for processes that outboard starts; leave it out";
        assert_eq!((refused.code, refused.err.trim()), (Some(1), said), "{kind}");
    }
}

#[test]
fn the_users_of_the_host_are_for_root_alone() {
    if geteuid().is_root() {
        println!("For an ordinary user.");
        return;
    }
    let refused = run(Command::new(program(PROGRAM)).args(["--shared-dir", "/", "--host"]));
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("Only root can start a program that is to have the host's own users"), "{}", refused.err);
}
