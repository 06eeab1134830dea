//! A shell, started as a worker is, tells what it sees.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::IdentityKind;

fn shell<'a>(identity: Identity) -> Spawn<'a> {
    let program = Path::new("/bin/sh");
    Spawn { program, args: vec![], fds: vec![], stdin: None, stdout: None, stderr: None, net: None, identity }
}

/// Runs a script in a worker's place and gives what it wrote.
pub(crate) fn ask(script: &str, fds: Vec<(BorrowedFd<'_>, RawFd)>, net: Option<&NetNamespace>) -> String {
    ask_as(Identity::Own, script, fds, net)
}

/// The same for a worker with other users.
pub(crate) fn ask_as(identity: Identity, script: &str, fds: Vec<(BorrowedFd<'_>, RawFd)>, net: Option<&NetNamespace>) -> String {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let plan = Spawn { args: vec!["-c".into(), script.into()], fds, stdout: Some(writer.as_fd()), net, ..shell(identity) };
    let child = spawn(&plan).unwrap();
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
    let plan = Spawn { program, ..shell(Identity::Own) };
    let error = spawn(&plan).unwrap_err();
    assert_eq!(error.to_string(), "Cannot execute the program");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("No such file"));
    let net = NetNamespace::new().unwrap();
    assert_eq!(spawn(&Spawn { net: Some(&net), ..plan }).unwrap_err().to_string(), "Cannot execute the program");
}

/// The caller as 0, and ten others, from these on.
fn ten(user: u32, group: u32) -> Identity {
    let map = |own, outside| vec![IdRange { inside: 0, outside: own, count: 1 }, IdRange { inside: 1, outside, count: 10 }];
    Identity::Ranges { uids: map(geteuid().as_raw(), user), gids: map(getegid().as_raw(), group) }
}

/// Where ten others may begin: for root anywhere, for an ordinary user where the host has granted some. `None` if it has not.
fn granted(file: &str) -> Option<u32> {
    if geteuid().is_root() {
        return Some(400_001);
    }
    let name = std::process::Command::new("id").arg("-un").output().unwrap().stdout;
    let (name, number) = (String::from_utf8(name).unwrap(), geteuid().as_raw().to_string());
    let lines = std::fs::read_to_string(file).unwrap_or_default();
    let own = lines.lines().filter(|line| line.split(':').next().is_some_and(|who| who == name.trim() || who == number));
    own.filter_map(|line| line.split(':').nth(1)?.parse().ok()).next()
}

/// Several users, and who the first of the others is outside, with its group.
pub(crate) fn several() -> Option<(Identity, u32, u32)> {
    let ranges = granted("/etc/subuid").zip(granted("/etc/subgid"));
    let can = geteuid().is_root() || Path::new("/usr/bin/newuidmap").exists();
    if ranges.is_none() || !can {
        println!("This host grants its users no others, or has no newuidmap.");
    }
    ranges.filter(|_| can).map(|(user, group)| (ten(user, group), user, group))
}

#[test]
fn whoever_may_not_map_users_is_told_how_to_get_it() {
    if geteuid().is_root() {
        println!("Root may.");
        return;
    }
    let error = spawn(&shell(ten(1, 1))).unwrap_err();
    let text = error.to_string();
    assert!(text.ends_with("let /etc/subuid grant you the range"), "{text}");
    match error {
        Error::NoMapHelper { .. } => {
            assert!(text.contains("newuidmap, which is not in PATH; install it (package uidmap of Debian)"), "{text}");
        }
        Error::MapRefused { .. } => assert!(text.starts_with("newuidmap refuses the map ("), "{text}"),
        _ => panic!("{text}"),
    }
}

const WHO: &str = "id -u; id -g; id -G; cat /proc/self/setgroups; cat /proc/self/uid_map; readlink /proc/self/ns/user";

#[test]
fn a_worker_can_have_a_map_of_several_users() {
    let Some((identity, user, _)) = several() else { return };
    let said = ask_as(identity, WHO, vec![], None);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..4], ["0", "0", "0", "allow"]);
    let map: Vec<Vec<&str>> = lines[4..6].iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(map, [["0", &geteuid().as_raw().to_string(), "1"], ["1", &user.to_string(), "10"]]);
    assert_ne!(std::fs::read_link("/proc/self/ns/user").unwrap().to_str(), Some(lines[6]));
}

/// What the server of a share does for one of the guest's users.
#[test]
fn what_a_mapped_user_makes_is_owned_outside_by_whom_the_map_says() {
    let Some((identity, user, group)) = several() else { return };
    let folder = std::env::temp_dir().join(format!("outboard-mapped-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("file");
    ask_as(identity, &format!("echo words > {0}; chown 10:7 {0}", file.display()), vec![], None);
    let made = std::fs::metadata(&file).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!((made.uid(), made.gid()), (user + 9, group + 6));
}

#[test]
fn what_cannot_be_mapped_is_told_and_nothing_is_left_running() {
    let ranges = |uids: Vec<IdRange>| Identity::Ranges { gids: uids.clone(), uids };
    let refused = |identity| spawn(&shell(identity)).unwrap_err().to_string();
    let nobody = ranges(vec![IdRange { inside: 1, outside: 100_000, count: 1 }]);
    assert!(refused(nobody).starts_with("The maps of users and groups do not say who 0 is"));
    let net = NetNamespace::new().unwrap();
    let joined = spawn(&Spawn { net: Some(&net), ..shell(ten(100_000, 100_000)) }).unwrap_err();
    assert!(matches!(joined, Error::NetOfOthers));
    if geteuid().is_root() {
        let own = IdRange { inside: 0, outside: 0, count: 1 };
        assert_eq!(refused(ranges(vec![own, own])), "Cannot map the users");
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        assert_eq!(children, "");
    } else {
        assert!(refused(Identity::Host).starts_with("Only root can start"));
    }
}

#[test]
fn root_can_start_a_worker_that_keeps_the_users_of_the_host() {
    if !geteuid().is_root() {
        println!("For root only.");
        return;
    }
    let script =
        "for n in user mnt uts ipc pid net; do readlink /proc/self/ns/$n; done; echo $$; tail -n +3 /proc/net/dev | wc -l";
    let said = ask_as(Identity::Host, script, vec![], None);
    let lines: Vec<&str> = said.lines().collect();
    let own = |name| std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().display().to_string();
    assert_eq!(own("user"), lines[0]);
    for (name, theirs) in ["mnt", "uts", "ipc", "pid", "net"].iter().zip(&lines[1..]) {
        assert_ne!(own(name), *theirs);
    }
    assert_eq!(lines[6..], ["1", "1"], "it is the first of its PID namespace, and has no network");
}

/// The host may have mounts that it shares with whoever copies them. What a worker mounts before it is confined is its own.
#[test]
fn what_a_worker_on_the_host_mounts_is_seen_by_nobody_else() {
    if !geteuid().is_root() {
        println!("For root only.");
        return;
    }
    let said = ask_as(Identity::Host, "cat /proc/self/mountinfo", vec![], None);
    assert!(said.lines().count() > 0);
    for line in said.lines() {
        assert!(!line.contains(" shared:"), "{line}");
    }
}

#[test]
fn kinds_of_identities_are_named() {
    for identity in [Identity::Own, ten(1, 1), Identity::Host] {
        assert_eq!(identity.kind().to_string().parse(), Ok(identity.kind()));
    }
    assert!("nobody".parse::<IdentityKind>().is_err());
}

#[test]
fn numbers_are_written_as_a_map_wants_them() {
    let line = |id| String::from_utf8(text(id).to_vec()).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(line(0), "0 0 1");
    assert_eq!(line(1000), "0 1000 1");
    assert_eq!(line(u32::MAX), "0 4294967295 1");
}
