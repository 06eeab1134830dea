//! The metrics socket: one `GET /metrics` on a connection, answered and closed.
//!
//! The composer's loop serves it, so nothing here waits: a request is read and an answer written as far as the socket takes
//! it, and a client that dawdles is dropped.

use std::io::{ErrorKind, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::event::PollFlags;

use super::text::CONTENT_TYPE;
use crate::clients::{self, Client, Clients};

/// A scraper has one connection, and there are few scrapers.
const MOST_CLIENTS: usize = 8;
/// Scrapers send a few hundred bytes of headers.
const LONGEST_REQUEST: usize = 8 * 1024;
/// From the first byte of the request to the last of the answer.
const LIMIT: Duration = Duration::from_secs(5);

/// The listening end with its clients.
#[derive(Debug)]
pub struct Server(Clients<Scraper>);

#[derive(Debug)]
struct Scraper {
    stream: UnixStream,
    deadline: Instant,
    request: Vec<u8>,
    answer: Vec<u8>,
    gone: bool,
}

impl Client for Scraper {
    fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn is_over(&self) -> bool {
        self.gone || self.deadline <= Instant::now()
    }
}

impl Server {
    /// Listens at a path.
    pub fn new(path: &Path) -> Result<Self> {
        Clients::new(path, MOST_CLIENTS).map(Self)
    }

    /// What to wait for: new clients first, then each client.
    pub fn sources(&self) -> (BorrowedFd<'_>, impl Iterator<Item = BorrowedFd<'_>>) {
        self.0.sources()
    }

    /// Whether a client still speaks or is being answered.
    pub fn wants(&self, index: usize) -> PollFlags {
        let answering = self.0.iter().nth(index).is_some_and(|client| !client.answer.is_empty());
        if answering { PollFlags::OUT } else { PollFlags::IN }
    }

    /// When the next client has taken too long.
    pub fn due(&self) -> Option<Instant> {
        self.0.iter().map(|client| client.deadline).min()
    }

    /// Takes in a new client.
    pub fn accept(&mut self) {
        let deadline = Instant::now() + LIMIT;
        self.0.accept(|stream| Scraper { stream, deadline, request: Vec::new(), answer: Vec::new(), gone: false });
    }

    /// A client has said something, or can take more. `text` makes the metrics if they are asked for.
    pub fn serve(&mut self, index: usize, text: impl FnOnce() -> String) {
        let Some(client) = self.0.get_mut(index) else {
            return;
        };
        if client.answer.is_empty() {
            client.read();
            if let Some(request) = head(&client.request) {
                client.answer = answer(request, text);
            }
        }
        client.write();
    }

    /// Forgets the clients that are done or too slow. Only between two rounds of the loop, because it changes their numbers.
    pub fn sweep(&mut self) {
        self.0.sweep();
    }
}

impl Scraper {
    fn read(&mut self) {
        self.gone |= !clients::read::<2048>(&self.stream, &mut self.request) || self.request.len() > LONGEST_REQUEST;
    }

    fn write(&mut self) {
        if self.answer.is_empty() {
            return;
        }
        match self.stream.write(&self.answer) {
            Ok(count) => drop(self.answer.drain(..count.min(self.answer.len()))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.gone = true,
        }
        self.gone |= self.answer.is_empty();
    }
}

/// The first line of a request, once its headers are complete.
fn head(request: &[u8]) -> Option<&str> {
    let complete = [b"\r\n\r\n".as_slice(), b"\n\n"].iter().any(|end| request.windows(end.len()).any(|part| part == *end));
    let line = request.split(|byte| *byte == b'\n').next().filter(|_| complete)?;
    Some(std::str::from_utf8(line).unwrap_or_default().trim_end())
}

fn answer(request: &str, text: impl FnOnce() -> String) -> Vec<u8> {
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let plain = "text/plain; charset=utf-8";
    let (status, kind, body) = match (method, path) {
        ("GET", "/metrics") => ("200 OK", CONTENT_TYPE, text()),
        ("GET", _) => ("404 Not Found", plain, "The metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", plain, "Only GET is understood\n".to_owned()),
    };
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn ask(name: &str, parts: &[&str], text: &str) -> String {
        let path = std::env::temp_dir().join(format!("outboard-metrics-{name}-{}", std::process::id()));
        drop(std::fs::remove_file(&path));
        let mut server = Server::new(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        server.accept();
        client.set_nonblocking(true).unwrap();
        let mut heard = Vec::new();
        let mut parts = parts.iter();
        for _ in 0..10_000 {
            if let Some(part) = parts.next() {
                client.write_all(part.as_bytes()).unwrap();
            }
            server.serve(0, || text.to_owned());
            server.sweep();
            drop(client.read_to_end(&mut heard));
            if server.0.iter().next().is_none() {
                break;
            }
        }
        assert!(server.0.iter().next().is_none());
        String::from_utf8(heard).unwrap()
    }

    #[test]
    fn a_request_in_pieces_is_answered_in_pieces() {
        let long = "x".repeat(1 << 20);
        let answer = ask("pieces", &["GET /metr", "ics HTTP/1.1\r\nHost: x\r\n", "\r\n"], &long);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"), "{}", &answer[..80]);
        assert!(answer.ends_with(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n{long}", long.len())));
    }

    #[test]
    fn other_requests_are_told_what_there_is() {
        assert!(ask("path", &["GET / HTTP/1.1\r\n\r\n"], "").starts_with("HTTP/1.1 404 "));
        assert!(ask("method", &["POST /metrics HTTP/1.1\r\n\r\n"], "").starts_with("HTTP/1.1 405 "));
    }

    #[test]
    fn a_request_without_an_end_is_dropped() {
        let endless = ["x"; 4].map(|part| part.repeat(4096));
        assert_eq!(ask("endless", &endless.each_ref().map(String::as_str), ""), "");
    }
}
