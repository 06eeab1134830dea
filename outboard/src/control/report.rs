//! What a machine says about itself: the answer to `query-outboard`, and what `ps` shows.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::table;

/// A machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// In QMP's words: `prelaunch`, `running` or `shutdown`.
    pub status: String,
    /// The composer, the VMM and the device processes, in this order.
    pub processes: Vec<Process>,
}

/// A process of a machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Process {
    /// What it is there for: `composer`, `vmm`, or the device's name.
    pub role: String,
    /// The device's class; nothing for the composer and the VMM.
    pub class: Option<String>,
    /// The program, or the socket of somebody else's backend.
    pub program: String,
    /// Nothing while it is being restarted, or if it is not ours.
    pub pid: Option<i32>,
    /// What it is doing.
    pub state: String,
    /// How often it was started again.
    pub restarts: u32,
    /// Since it was started, in seconds.
    pub uptime: Option<u64>,
    /// How it is confined, filled in by who asks.
    #[serde(default)]
    pub confinement: Option<Confinement>,
    /// When it was started, in seconds since 1970.
    #[serde(default)]
    pub started: Option<u64>,
}

/// How a process is confined, as the kernel sees it.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Confinement {
    /// The kinds of namespaces that are not those of the caller.
    pub namespaces: Vec<String>,
    /// A system call filter is installed.
    pub seccomp: bool,
    /// Capabilities it could still use, as the kernel's bit mask.
    pub capabilities: u64,
    /// It cannot gain rights by executing something.
    pub no_new_privileges: bool,
}

const NAMESPACES: &[&str] = &["user", "mnt", "pid", "net", "ipc", "uts"];

impl Confinement {
    /// Asks the kernel. What the caller may not see is not counted.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let mut lines = status.lines();
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(":")).map(str::trim)
        };
        let differs = |kind: &&&str| {
            let theirs = fs::read_link(format!("/proc/{pid}/ns/{kind}"));
            let ours = fs::read_link(format!("/proc/self/ns/{kind}"));
            matches!((theirs, ours), (Ok(theirs), Ok(ours)) if theirs != ours)
        };
        Some(Self {
            namespaces: NAMESPACES.iter().filter(differs).map(|kind| (*kind).to_owned()).collect(),
            seccomp: field("Seccomp") == Some("2"),
            capabilities: field("CapEff").and_then(|mask| u64::from_str_radix(mask, 16).ok())?,
            no_new_privileges: field("NoNewPrivs") == Some("1"),
        })
    }

    fn words(&self) -> String {
        let mut words = Vec::new();
        if !self.namespaces.is_empty() {
            words.push(format!("own {}", self.namespaces.join(" ")));
        }
        if self.seccomp {
            words.push("seccomp".to_owned());
        }
        words.push(if self.capabilities == 0 { "no caps".to_owned() } else { "has caps".to_owned() });
        words.join(", ")
    }
}

impl Report {
    /// Fills in how each process is confined.
    pub fn look(&mut self) {
        for process in &mut self.processes {
            process.confinement = process.pid.and_then(Confinement::of);
        }
    }
}

/// Machines as a table for people.
#[must_use]
pub fn table(reports: &[Report]) -> String {
    let headings = ["MACHINE", "SERVES", "CLASS", "PROGRAM", "PID", "STATE", "RESTARTS", "UPTIME", "CONFINEMENT"];
    let mut rows: Vec<Vec<String>> = vec![headings.map(str::to_owned).to_vec()];
    for report in reports {
        rows.extend(report.processes.iter().map(|process| row(&report.name, process)));
    }
    table::layout(&rows)
}

fn row(machine: &str, process: &Process) -> Vec<String> {
    let dash = || "-".to_owned();
    vec![
        machine.to_owned(),
        process.role.clone(),
        process.class.clone().unwrap_or_else(dash),
        process.program.clone(),
        process.pid.map_or_else(dash, |pid| pid.to_string()),
        process.state.clone(),
        process.restarts.to_string(),
        process.uptime.map_or_else(dash, uptime),
        process.confinement.as_ref().map_or_else(dash, Confinement::words),
    ]
}

fn uptime(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

#[cfg(test)]
impl Report {
    pub(crate) fn example() -> Self {
        let process = Process {
            role: "root".to_owned(),
            class: Some("blk".to_owned()),
            program: "outboard-blk".to_owned(),
            pid: Some(42),
            state: "connected".to_owned(),
            restarts: 1,
            uptime: Some(61),
            confinement: None,
            started: Some(1),
        };
        Self { name: "example".to_owned(), status: "running".to_owned(), processes: vec![process] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_who_serves_what() {
        let text = table(&[Report::example()]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("MACHINE  SERVES  CLASS  PROGRAM"));
        assert!(lines[1].starts_with("example  root    blk    outboard-blk  42   connected  1         1 min"));
    }

    #[test]
    fn our_own_confinement_is_none() {
        let own = Confinement::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.namespaces.is_empty());
    }
}
