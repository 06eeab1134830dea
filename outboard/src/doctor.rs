//! `outboard doctor`: what this host offers, and what confines the processes of a running machine, in words a person understands.
//!
//! Everything is looked at from outside and now: the host by trying, a process by what the kernel says of it. Nothing is taken
//! from what a process says of itself.

pub mod host;
pub mod process;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::args::Doctor;
use crate::control::client::Client;
use crate::{notices, runtime, table};

/// Something that was looked at.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub state: State,
    /// What was found.
    pub says: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Whether it is as it should be.
#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is.
    Ok,
    /// It could be more, and need not.
    Note,
    /// It is not.
    Missing,
    /// This user may not see it.
    Unknown,
}

impl Finding {
    fn new(name: &'static str, state: State, says: impl Into<String>) -> Self {
        Self { name, state, says: says.into(), remedy: None }
    }

    fn ok(name: &'static str, says: impl Into<String>) -> Self {
        Self::new(name, State::Ok, says)
    }

    fn missing(name: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(name, State::Missing, says) }
    }

    fn lines(&self, indent: usize) -> String {
        let state = match self.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Missing => "MISSING",
            State::Unknown => "unknown",
        };
        let head = format!("{:indent$}{state:<9}{:<14}", "", self.name);
        let mut text = table::wrap(&head, &self.says);
        if let Some(remedy) = &self.remedy {
            text.push_str(&table::wrap(&" ".repeat(head.chars().count()), &format!("-> {remedy}")));
        }
        text
    }
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Findings {
    host: Vec<Finding>,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<Machine>,
}

#[derive(Debug, Serialize)]
struct Machine {
    name: String,
    processes: Vec<process::Looked>,
}

/// The command.
pub fn run(args: &Doctor) -> Result<u8> {
    let machine = args.name.as_deref().map(look).transpose()?;
    let findings = Findings { host: host::look(), machine };
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&findings).context("Cannot write JSON")?)
    } else {
        findings.text()
    };
    notices::answer(&text)?;
    Ok(u8::from(findings.all().any(|finding| finding.state == State::Missing)))
}

fn look(name: &str) -> Result<Machine> {
    let report = Client::connect(&runtime::find(name)?.join(runtime::CONTROL))?.report()?;
    Ok(Machine { name: report.name, processes: report.processes.iter().map(process::look).collect() })
}

impl Findings {
    fn all(&self) -> impl Iterator<Item = &Finding> {
        let processes = self.machine.iter().flat_map(|machine| &machine.processes);
        self.host.iter().chain(processes.flat_map(|process| &process.findings))
    }

    fn text(&self) -> String {
        let mut text = "This host\n".to_owned();
        text.extend(self.host.iter().map(|finding| finding.lines(2)));
        if let Some(machine) = &self.machine {
            text.push_str(&format!("\nThe machine `{}`\n", machine.name));
            for process in &machine.processes {
                text.push_str(&format!("  {}\n", process.title()));
                text.extend(process.findings.iter().map(|finding| finding.lines(4)));
            }
            text.push_str(&table::wrap("  ", process::UNSEEN));
        }
        let missing = self.all().filter(|finding| finding.state == State::Missing).count();
        text.push_str(&match missing {
            0 => "\nAll is as it should be.\n".to_owned(),
            1 => "\nOne thing is missing.\n".to_owned(),
            more => format!("\n{more} things are missing.\n"),
        });
        text
    }
}
