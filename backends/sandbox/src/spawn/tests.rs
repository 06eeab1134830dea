//! A shell, started as a worker is, tells what it sees.

use std::fs::File;
use std::io::Read;

use super::*;

/// Runs a script in a worker's place and gives what it wrote.
pub(crate) fn ask(script: &str, fds: Vec<(BorrowedFd<'_>, RawFd)>, net: Option<&NetNamespace>) -> String {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let args = vec!["-c".into(), script.into()];
    let stdout = Some(writer.as_fd());
    let child = spawn(&Spawn { program: Path::new("/bin/sh"), args, fds, stdin: None, stdout, stderr: None, net }).unwrap();
    drop(writer);
    let mut said = String::new();
    File::from(reader).read_to_string(&mut said).unwrap();
    let ended = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
    assert_eq!(ended.exit_status(), Some(0), "{said}");
    said
}

#[test]
fn a_worker_is_alone_in_its_namespaces() {
    let said = ask(
        "echo $$; echo $0; id -u; cat /proc/self/uid_map /proc/self/setgroups; for n in user mnt uts ipc pid net; do readlink /proc/self/ns/$n; done",
        vec![],
        None,
    );
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "1", "the first process of its PID namespace: {said}");
    assert_eq!(lines[1], "--namespaced");
    assert_eq!(lines[2], "0");
    assert_eq!(lines[3].split_whitespace().collect::<Vec<_>>(), ["0", &geteuid().as_raw().to_string(), "1"]);
    assert_eq!(lines[4], "deny");
    for (name, theirs) in ["user", "mnt", "uts", "ipc", "pid", "net"].iter().zip(&lines[5..]) {
        assert_ne!(std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().to_str(), Some(*theirs));
    }
}

#[test]
fn a_worker_has_the_descriptors_it_was_given_and_no_others() {
    let (ours, _other) = pipe_with(PipeFlags::empty()).unwrap();
    let (leaky, _kept) = pipe_with(PipeFlags::empty()).unwrap();
    let said = ask("ls /proc/self/fd", vec![(ours.as_fd(), 9), (ours.as_fd(), 3)], None);
    drop(leaky);
    // `ls` itself opens the folder under the next free number.
    assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "9"]);
}

#[test]
fn the_workers_of_a_machine_share_one_empty_network() {
    let net = NetNamespace::new().unwrap();
    let look = "readlink /proc/self/ns/net; readlink /proc/self/ns/user; tail -n +3 /proc/net/dev | wc -l; tail -n +2 /proc/net/route | wc -l";
    let (one, two) = (ask(look, vec![], Some(&net)), ask(look, vec![], Some(&net)));
    let (one, two): (Vec<&str>, Vec<&str>) = (one.lines().collect(), two.lines().collect());
    assert_eq!(one[0], two[0]);
    assert_ne!(one[1], two[1], "but not a user namespace");
    assert_ne!(std::fs::read_link("/proc/self/ns/net").unwrap().to_str(), Some(one[0]));
    assert_eq!((one[2], one[3]), ("1", "0"), "only the loopback, and no way out");
}

#[test]
fn a_program_that_cannot_be_executed_is_told() {
    let program = Path::new("/nonexistent/program");
    let plan = Spawn { program, args: vec![], fds: vec![], stdin: None, stdout: None, stderr: None, net: None };
    let error = spawn(&plan).unwrap_err();
    assert_eq!(error.to_string(), "Cannot execute the program");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("No such file"));
    let net = NetNamespace::new().unwrap();
    assert_eq!(spawn(&Spawn { net: Some(&net), ..plan }).unwrap_err().to_string(), "Cannot execute the program");
}

#[test]
fn numbers_are_written_as_a_map_wants_them() {
    let line = |id| String::from_utf8(text(id).to_vec()).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(line(0), "0 0 1");
    assert_eq!(line(1000), "0 1000 1");
    assert_eq!(line(u32::MAX), "0 4294967295 1");
}
