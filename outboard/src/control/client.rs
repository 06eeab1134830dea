//! The other end of the control socket, for `ps` and `stop`.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::report::Report;

/// The composer answers within one round of its loop.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// It gives up before on a disk's process.
const DISK_LIMIT: Duration = Duration::from_secs(40);

/// A connection to a running machine.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("Cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).context("Cannot set up the connection")?;
        let mut client = Self { stream: BufReader::new(stream) };
        client.message().context("The machine does not greet")?;
        client.execute("qmp_capabilities")?;
        Ok(client)
    }

    /// What the machine consists of.
    pub fn report(&mut self) -> Result<Report> {
        let answer = self.execute("query-outboard")?;
        serde_json::from_value(answer).context("The machine's answer is not understood")
    }

    /// Carries out a command and returns its answer.
    pub fn execute(&mut self, command: &str) -> Result<Value> {
        self.ask(command, &json!({"execute": command}), ANSWER_LIMIT)
    }

    /// The same for one that a disk's process answers.
    pub fn disk(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.ask(command, &json!({"execute": command, "arguments": arguments}), DISK_LIMIT)
    }

    fn ask(&mut self, command: &str, message: &Value, limit: Duration) -> Result<Value> {
        let line = format!("{message}\n");
        self.stream.get_mut().set_read_timeout(Some(limit)).context("Cannot set up the connection")?;
        self.stream.get_mut().write_all(line.as_bytes()).context("The machine does not listen")?;
        loop {
            let mut message = self.message().with_context(|| format!("No answer to {command}"))?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.pointer("/error/desc").and_then(Value::as_str) {
                bail!("The machine refused {command}: {error}");
            }
        }
    }

    /// Waits until the machine has ended, which closes the connection. Did it, in this time?
    pub fn wait_for_end(&mut self, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        let mut line = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.stream.get_mut().set_read_timeout(Some(left)).context("Cannot set up the connection")?;
            line.clear();
            match self.stream.read_line(&mut line) {
                Ok(0) => return Ok(true),
                Ok(_) => {} // an event
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(false);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(true),
                Err(error) => return Err(error).context("Cannot read from the machine"),
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("Cannot read from the machine")? == 0 {
            bail!("The machine has closed the connection");
        }
        serde_json::from_str(&line).context("The machine's answer is not JSON")
    }
}
