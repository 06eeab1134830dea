//! The control socket of a running machine: JSON lines as QEMU's monitor protocol (QMP) has them, so that existing clients
//! work. Some commands are ours: `query-outboard` answers with the machine's processes, `query-outboard-stats` with what they use
//! and count as well; those about [disks](disk) are answered when the disk's process has answered.
//!
//! The socket lies in a directory that only its owner can enter. Even so nobody can harm the machine by accident: a client
//! that does not read is dropped, a line has a greatest length, and there are only so many clients.

pub mod client;
pub mod disk;
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// `system_powerdown`
    PowerButton,
    /// `system_reset`
    Reset,
    /// `quit`
    Quit,
    /// Something of a disk. The client is answered later, with [`Server::reply`].
    Disk {
        /// Who is to be answered.
        ticket: Ticket,
        /// The disk's name.
        device: String,
        /// What is asked.
        request: disk::Request,
    },
}

/// Who is to be answered, when there is an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    client: u64,
    id: Option<Value>,
}

/// The listening end with its clients.
#[derive(Debug)]
pub struct Server(Clients<Owner>, u64);

/// Whoever speaks the protocol.
#[derive(Debug)]
struct Owner {
    stream: UnixStream,
    number: u64,
    input: Vec<u8>,
    negotiated: bool,
    /// It gets an answer before its next line is read: answers have the order of the commands.
    waiting: bool,
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
        Clients::new(path, MOST_CLIENTS).map(|clients| Self(clients, 0))
    }

    /// What to wait for: new clients first, then each client's words.
    pub fn sources(&self) -> (BorrowedFd<'_>, impl Iterator<Item = BorrowedFd<'_>>) {
        self.0.sources()
    }

    /// Takes in a new client and greets it.
    pub fn accept(&mut self) {
        self.1 = self.1.wrapping_add(1);
        let number = self.1;
        self.0.accept(|stream| {
            let mut client = Owner { stream, number, input: Vec::new(), negotiated: false, waiting: false, gone: false };
            client.send(&json!({"QMP": {"version": version(), "capabilities": []}}));
            client
        });
    }

    /// Reads what a client says and answers it. What it wants of the machine is returned.
    pub fn hear(&mut self, index: usize, machine: &impl Machine) -> Vec<Wish> {
        let Some(client) = self.0.get_mut(index) else {
            return Vec::new();
        };
        client.read();
        let mut wishes = Vec::new();
        while !client.waiting
            && let Some(line) = client.line()
        {
            wishes.extend(client.obey(&line, machine));
        }
        wishes
    }

    /// Answers a client that has waited. It may have said more in the meantime: it is to be heard again under this number.
    pub fn reply(&mut self, ticket: &Ticket, answer: Result<Value, String>) -> Option<usize> {
        let index = self.0.iter().position(|client| client.number == ticket.client)?;
        let client = self.0.get_mut(index)?;
        client.waiting = false;
        let message = match answer {
            Ok(value) => json!({"return": value}),
            Err(says) => error("GenericError", &says),
        };
        client.send(&with_id(message, ticket.id.as_ref()));
        Some(index)
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
    fn read(&mut self) {
        self.gone |= !clients::read::<4096>(&self.stream, &mut self.input);
        self.gone |= self.input.len() > LONGEST_LINE;
    }

    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.input.iter().position(|byte| *byte == b'\n')?;
        let rest = self.input.split_off(end + 1);
        Some(std::mem::replace(&mut self.input, rest))
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
        let id = message.get("id");
        let (answer, wish) = match disk::read(name, message.get("arguments")).filter(|_| self.negotiated) {
            Some(Ok((device, request))) => {
                self.waiting = true;
                let ticket = Ticket { client: self.number, id: id.cloned() };
                return Some(Wish::Disk { ticket, device, request });
            }
            Some(Err(says)) => (error("GenericError", &says), None),
            None => self.answer(name, machine),
        };
        self.send(&with_id(answer, id));
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
                let names: Vec<Value> = COMMANDS.iter().chain(&disk::COMMANDS).map(|name| json!({"name": name})).collect();
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

fn with_id(mut message: Value, id: Option<&Value>) -> Value {
    if let (Some(id), Some(message)) = (id, message.as_object_mut()) {
        message.insert("id".to_owned(), id.clone());
    }
    message
}

fn version() -> Value {
    json!({"qemu": {"major": 0, "minor": 0, "micro": 0}, "package": concat!("outboard ", env!("CARGO_PKG_VERSION"))})
}

fn error(class: &str, description: &str) -> Value {
    json!({"error": {"class": class, "desc": description}})
}

#[cfg(test)]
mod tests;
