//! The control socket of a running machine: JSON lines as QEMU's monitor protocol (QMP) has them, so that existing clients
//! work. Two commands are ours: `query-outboard` answers with the machine's processes, `query-outboard-stats` with what they use
//! and count as well.
//!
//! The socket lies in a directory that only its owner can enter. Even so nobody can harm the machine by accident: a client
//! that does not read is dropped, a line has a greatest length, and there are only so many clients.

pub mod client;
pub mod report;

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::Result;
use serde_json::{Value, json};

use crate::clients::{self, Client, Clients};

/// More would mean that somebody forgets to close connections.
const MOST_CLIENTS: usize = 16;
/// The longest command of this protocol is a few hundred bytes.
const LONGEST_LINE: usize = 64 * 1024;

/// What a client asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// `query-outboard`, and what QEMU's queries need of it.
    Report,
    /// `query-outboard-stats`
    Stats,
}

/// Who knows the answers.
pub trait Machine {
    /// The answer, as JSON.
    fn answer(&self, ask: Ask) -> Value;
}

/// What a client wants of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// `system_powerdown`
    PowerButton,
    /// `system_reset`
    Reset,
    /// `quit`
    Quit,
}

/// The listening end with its clients.
#[derive(Debug)]
pub struct Server(Clients<Owner>);

/// Whoever speaks the protocol.
#[derive(Debug)]
struct Owner {
    stream: UnixStream,
    input: Vec<u8>,
    negotiated: bool,
    gone: bool,
}

impl Client for Owner {
    fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn is_over(&self) -> bool {
        self.gone
    }
}

impl Server {
    /// Listens at a path.
    pub fn new(path: &Path) -> Result<Self> {
        Clients::new(path, MOST_CLIENTS).map(Self)
    }

    /// What to wait for: new clients first, then each client's words.
    pub fn sources(&self) -> (BorrowedFd<'_>, impl Iterator<Item = BorrowedFd<'_>>) {
        self.0.sources()
    }

    /// Takes in a new client and greets it.
    pub fn accept(&mut self) {
        self.0.accept(|stream| {
            let mut client = Owner { stream, input: Vec::new(), negotiated: false, gone: false };
            client.send(&json!({"QMP": {"version": version(), "capabilities": []}}));
            client
        });
    }

    /// Reads what a client says and answers it. What it wants of the machine is returned.
    pub fn hear(&mut self, index: usize, machine: &impl Machine) -> Vec<Wish> {
        let Some(client) = self.0.get_mut(index) else {
            return Vec::new();
        };
        client.read().iter().filter_map(|line| client.obey(line, machine)).collect()
    }

    /// Tells every client what happened.
    pub fn announce(&mut self, event: &str, data: &Value) {
        let now = UNIX_EPOCH.elapsed().unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        let message = json!({"event": event, "data": data, "timestamp": timestamp});
        for client in self.0.iter_mut().filter(|client| client.negotiated) {
            client.send(&message);
        }
    }

    /// Forgets the clients that are gone. Only between two rounds of the loop, because it changes their numbers.
    pub fn sweep(&mut self) {
        self.0.sweep();
    }
}

impl Owner {
    fn read(&mut self) -> Vec<Vec<u8>> {
        self.gone |= !clients::read::<4096>(&self.stream, &mut self.input);
        let mut lines = Vec::new();
        while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
            let rest = self.input.split_off(end + 1);
            lines.push(std::mem::replace(&mut self.input, rest));
        }
        if self.input.len() > LONGEST_LINE {
            self.gone = true;
        }
        lines
    }

    /// Answers one command.
    fn obey(&mut self, line: &[u8], machine: &impl Machine) -> Option<Wish> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return None;
        }
        let Ok(message) = serde_json::from_slice::<Value>(line) else {
            self.send(&error("GenericError", "This is not JSON"));
            return None;
        };
        let name = message.get("execute").and_then(Value::as_str).unwrap_or_default();
        let (mut answer, wish) = self.answer(name, machine);
        if let (Some(id), Some(answer)) = (message.get("id"), answer.as_object_mut()) {
            answer.insert("id".to_owned(), id.clone());
        }
        self.send(&answer);
        wish
    }

    fn answer(&mut self, name: &str, machine: &impl Machine) -> (Value, Option<Wish>) {
        if !self.negotiated && name != "qmp_capabilities" {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return (error("CommandNotFound", text), None);
        }
        let done = json!({"return": {}});
        match name {
            "qmp_capabilities" => {
                self.negotiated = true;
                (done, None)
            }
            "query-status" => {
                let status = &machine.answer(Ask::Report)["status"];
                (json!({"return": {"status": status, "running": status == "running", "singlestep": false}}), None)
            }
            "query-name" => (json!({"return": {"name": machine.answer(Ask::Report)["name"]}}), None),
            "query-version" => (json!({"return": version()}), None),
            "query-commands" => {
                let names: Vec<Value> = COMMANDS.iter().map(|name| json!({"name": name})).collect();
                (json!({"return": names}), None)
            }
            "query-outboard" => (json!({"return": machine.answer(Ask::Report)}), None),
            "query-outboard-stats" => (json!({"return": machine.answer(Ask::Stats)}), None),
            "system_powerdown" => (done, Some(Wish::PowerButton)),
            "system_reset" => (done, Some(Wish::Reset)),
            "quit" => (done, Some(Wish::Quit)),
            _ => (error("CommandNotFound", &format!("The command {name} has not been found")), None),
        }
    }

    /// Sends a message whole, or gives the client up: what the kernel cannot take at once would have to be kept by us.
    fn send(&mut self, message: &Value) {
        let line = format!("{message}\r\n");
        match self.stream.write(line.as_bytes()) {
            Ok(count) if count == line.len() => {}
            _ => self.gone = true,
        }
    }
}

const COMMANDS: &[&str] = &[
    "qmp_capabilities",
    "query-commands",
    "query-name",
    "query-outboard",
    "query-outboard-stats",
    "query-status",
    "query-version",
    "quit",
    "system_powerdown",
    "system_reset",
];

fn version() -> Value {
    json!({"qemu": {"major": 0, "minor": 0, "micro": 0}, "package": concat!("outboard ", env!("CARGO_PKG_VERSION"))})
}

fn error(class: &str, description: &str) -> Value {
    json!({"error": {"class": class, "desc": description}})
}

#[cfg(test)]
mod tests;
