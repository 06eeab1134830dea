//! What confines a process, as the kernel tells anybody who may ask.

use std::fs;

use serde::Serialize;

use super::{Finding, State};
use crate::control::report::{Confinement, Process};

/// What the kernel does not tell.
pub const UNSEEN: &str = "Landlock and the refusal of executable memory cannot be seen from outside; a process that cannot have \
                          them does not start.";

const COMPOSER: &str = "composer";

/// A process that was looked at.
#[derive(Debug, Serialize)]
pub struct Looked {
    role: String,
    program: String,
    pid: Option<i32>,
    /// What confines it.
    pub findings: Vec<Finding>,
}

impl Looked {
    /// Who it is.
    pub fn title(&self) -> String {
        match self.pid {
            Some(pid) => format!("{}: {}, process {pid}", self.role, self.program),
            None => format!("{}: {}", self.role, self.program),
        }
    }
}

/// Looks at a process.
pub fn look(process: &Process) -> Looked {
    let findings = match process.pid {
        None if process.program.contains('/') => {
            vec![Finding::new("somebody else's", State::Note, "we did not start it, and do not confine it")]
        }
        None => vec![Finding::new("away", State::Note, format!("it is {}", process.state))],
        Some(pid) => layers(pid, process),
    };
    Looked { role: process.role.clone(), program: process.program.clone(), pid: process.pid, findings }
}

fn layers(pid: i32, process: &Process) -> Vec<Finding> {
    let (is_composer, kept) = (process.role == COMPOSER, kept(&process.program));
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
    let (Ok(status), Some(confinement)) = (read("status"), Confinement::of(pid)) else {
        return vec![Finding::new("away", State::Note, "it has ended")];
    };
    let threads = threads(pid);
    if is_composer {
        let says = "yours: it opens your files, and reads no guest byte";
        return vec![Finding::ok("namespaces", says), system_calls(true, &threads), rights(&status, 0)];
    }
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count);
    vec![
        namespaces(&confinement),
        files(read("mountinfo").ok().as_deref()),
        network(read("net/dev").ok().as_deref()),
        system_calls(false, &threads),
        rights(&status, kept),
        limits(&read("limits").unwrap_or_default(), descriptors),
    ]
}

/// The status of each thread: filters belong to threads.
fn threads(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).collect()
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

const ALL: [&str; 6] = ["user", "mnt", "pid", "net", "ipc", "uts"];

fn namespaces(confinement: &Confinement) -> Finding {
    let own = &confinement.namespaces;
    if own.len() == ALL.len() {
        return Finding::ok("namespaces", "its own: users, mounts, processes, network, IPC, name");
    }
    if own.is_empty() {
        return Finding::new("namespaces", State::Unknown, "this user may not see them");
    }
    let shared: Vec<&str> = ALL.into_iter().filter(|kind| !own.iter().any(|have| have == kind)).collect();
    let remedy = "end the machine: it is not confined as it should be";
    Finding::missing("namespaces", format!("it shares {} with you", shared.join(", ")), remedy)
}

fn files(mountinfo: Option<&str>) -> Finding {
    let Some(mounts) = mountinfo else {
        return Finding::new("files", State::Unknown, "this user may not see its mounts");
    };
    let count = mounts.lines().count();
    let read_only = mounts.lines().all(|line| line.split_whitespace().nth(5).is_some_and(|flags| flags.starts_with("ro")));
    if count <= 1 && read_only {
        return Finding::ok("files", "one empty, read-only root: no path leads anywhere");
    }
    let remedy = "end the machine: it is not confined as it should be";
    Finding::missing("files", format!("it sees {count} mounts"), remedy)
}

fn network(devices: Option<&str>) -> Finding {
    let Some(devices) = devices else {
        return Finding::new("network", State::Unknown, "this user may not see it");
    };
    // Two lines of headings; `lo` is in every namespace, and down in ours.
    let names = devices.lines().skip(2).filter_map(|line| line.split(':').next());
    let others: Vec<&str> = names.map(str::trim).filter(|name| *name != "lo").collect();
    if others.is_empty() {
        return Finding::ok("network", "none");
    }
    Finding::missing("network", format!("it sees {}", others.join(", ")), "end the machine: it is not confined as it should be")
}

fn system_calls(is_composer: bool, threads: &[String]) -> Finding {
    let filtered = threads.iter().filter(|status| field(status, "Seccomp") == Some("2")).count();
    if filtered < threads.len() || threads.is_empty() {
        let says = format!("{filtered} of its {} threads have a filter", threads.len());
        return Finding::missing("system calls", says, "end the machine: it is not confined as it should be");
    }
    let says = match (is_composer, threads.len()) {
        (true, _) => "all but those no machine ever needs (seccomp)".to_owned(),
        (false, 1) => "only what its one thread needs (seccomp)".to_owned(),
        (false, count) => format!("only what each of its {count} threads needs (seccomp)"),
    };
    Finding::ok("system calls", says)
}

/// Rights over files of its own user, which the server of a directory keeps: a guest's root opens its files whatever their permissions are.
/// In a user namespace with one user they count for that user's files only, which are its own to change anyway.
const OF_ITS_USER: [u32; 4] = [1, 2, 3, 31];

/// What a program keeps, as a mask.
fn kept(program: &str) -> u64 {
    if program == "outboard-virtiofsd" { OF_ITS_USER.into_iter().fold(0, |mask, bit| mask | 1 << bit) } else { 0 }
}

fn rights(status: &str, kept: u64) -> Finding {
    // The composer of an ordinary user keeps a bounding set, which without new privileges means nothing.
    let mask = |set: &str| field(status, set).and_then(|mask| u64::from_str_radix(mask, 16).ok());
    let inherited = ["CapInh", "CapAmb"].into_iter().any(|set| mask(set) != Some(0));
    let held = inherited || ["CapPrm", "CapEff"].into_iter().any(|set| mask(set).is_none_or(|mask| mask & !kept != 0));
    let remedy = "end the machine: it is not confined as it should be";
    if held {
        return Finding::missing("rights", "it has capabilities", remedy);
    }
    if field(status, "NoNewPrivs") != Some("1") {
        return Finding::missing("rights", "it could gain rights by executing a program", remedy);
    }
    let says = match mask("CapPrm") {
        Some(0) => "no capability, and none can be gained",
        _ => "over its user's own files, whatever their permissions are; no others can be gained",
    };
    Finding::ok("rights", says)
}

fn limits(text: &str, descriptors: Option<usize>) -> Finding {
    let soft = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    let (Some(files), Some(threads)) = (soft("Max open files"), soft("Max processes")) else {
        return Finding::new("limits", State::Unknown, "this user may not see them");
    };
    if soft("Max core file size") != Some("0") {
        let remedy = "end the machine: it is not confined as it should be";
        return Finding::missing("limits", "it could leave a core file, with guest memory in it", remedy);
    }
    let open = descriptors.map_or_else(String::new, |count| format!(" ({count} open)"));
    Finding::ok("limits", format!("{files} descriptors{open}, {threads} threads, no core file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_confined_is_found() {
        let none = Confinement { namespaces: vec!["user".to_owned()], seccomp: false, capabilities: 1, no_new_privileges: false };
        assert_eq!(namespaces(&none).says, "it shares mnt, pid, net, ipc, uts with you");
        let mount = "1 2 0:3 / / ro,nosuid - tmpfs outboard ro\n";
        assert_eq!(files(Some(mount)).state, State::Ok);
        assert_eq!(files(Some(&mount.replace(" ro,", " rw,"))).state, State::Missing);
        assert_eq!(files(Some(&mount.repeat(2))).state, State::Missing);
        assert_eq!(network(Some("head\nhead\n    lo: 0\n")).state, State::Ok);
        assert_eq!(network(Some("head\nhead\n    lo: 0\n  eth0: 1\n")).says, "it sees eth0");
        let thread = |mode: &str| format!("Seccomp:\t{mode}\n");
        assert_eq!(system_calls(false, &[thread("2"), thread("0")]).says, "1 of its 2 threads have a filter");
        assert_eq!(system_calls(false, &[thread("2"), thread("2")]).state, State::Ok);
    }

    #[test]
    fn rights_are_those_that_a_program_keeps() {
        let status = |mask: u64| format!("CapInh:\t0\nCapPrm:\t{mask:x}\nCapEff:\t{mask:x}\nCapAmb:\t0\nNoNewPrivs:\t1\n");
        let files = kept("outboard-virtiofsd");
        assert_eq!(rights(&status(0), 0).says, "no capability, and none can be gained");
        assert!(rights(&status(files), files).says.starts_with("over its user's own files"));
        for (mask, kept) in [(files, kept("outboard-blk")), (files | 1 << 21, files), (1, files)] {
            assert_eq!(rights(&status(mask), kept).state, State::Missing, "{mask:x}");
        }
    }

    #[test]
    fn our_own_process_is_not_confined() {
        let own = i32::try_from(std::process::id()).unwrap();
        let process = Process { role: "disk".to_owned(), program: "outboard-blk".to_owned(), ..Process::default() };
        let findings = layers(own, &process);
        let state = |name: &str| findings.iter().find(|finding| finding.name == name).map(|finding| finding.state);
        assert_eq!(state("files"), Some(State::Missing));
        assert_eq!(state("system calls"), Some(State::Missing));
    }
}
