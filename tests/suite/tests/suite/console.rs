//! The console: bytes in both directions on every kind of port, sizes, the escape sequence, and ports that take nothing.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use probe::device::{Device, Shape};
use probe::ring::Buffer;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use suite::{Scratch, Server, program, wait_for};
use vhost_user::BackendEvent;

const LIMIT: Duration = Duration::from_secs(20);
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// A guest's side of a console.
struct Guest {
    device: Device,
    out: u64,
    room: u64,
}

impl Guest {
    fn new(stream: UnixStream) -> Guest {
        let shape = Shape { queues: 2, size: 16, ..Shape::default() };
        let mut device = Device::connect(stream, shape, 1).unwrap();
        let out = device.memory_mut().take(256 * 1024, 1, 0).unwrap();
        let room = device.memory_mut().take(4096, 1, 1).unwrap();
        device.start().unwrap();
        let mut guest = Guest { device, out, room };
        guest.listen();
        guest
    }

    fn listen(&mut self) {
        self.device.submit(RECEIVE, &[Buffer { addr: self.room, len: 4096, write: true }]).unwrap();
        self.device.kick(RECEIVE);
    }

    fn say(&mut self, bytes: &[u8]) -> Duration {
        self.device.memory().write(self.out, bytes);
        let start = Instant::now();
        let len = u32::try_from(bytes.len()).unwrap();
        self.device.submit(TRANSMIT, &[Buffer { addr: self.out, len, write: false }]).unwrap();
        self.device.kick(TRANSMIT);
        wait_for("the console to take the bytes", || self.device.completion(TRANSMIT).unwrap());
        start.elapsed()
    }

    fn hear(&mut self, count: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        while heard.len() < count {
            let used = wait_for("something typed", || self.device.completion(RECEIVE).unwrap());
            let mut bytes = vec![0; used.len as usize];
            self.device.memory().read(self.room, &mut bytes);
            heard.append(&mut bytes);
            self.listen();
        }
        heard
    }

    fn size(&mut self) -> (u16, u16) {
        let config = self.device.session().config(12).unwrap();
        (u16::from_le_bytes([config[0], config[1]]), u16::from_le_bytes([config[2], config[3]]))
    }
}

fn read_some(from: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_file_is_appended_to() {
    let scratch = Scratch::new();
    let file = scratch.path("log");
    fs::write(&file, "before\n").unwrap();
    let server = Server::start("outboard-console", &scratch, &["--file", file.to_str().unwrap()]);
    let mut guest = Guest::new(UnixStream::connect(&server.socket).unwrap());
    guest.say(b"hello\n");
    guest.say(&vec![b'x'; 100_000]);
    let text = fs::read(&file).unwrap();
    assert!(text.starts_with(b"before\nhello\nxxx"));
    assert_eq!(text.len(), 13 + 64 * 1024, "what is longer than a request may be is cut");
    assert_eq!(guest.size(), (80, 25));
}

#[test]
fn a_socket_has_one_client_after_the_other() {
    let scratch = Scratch::new();
    let port = scratch.path("port");
    let server = Server::start("outboard-console", &scratch, &["--socket", port.to_str().unwrap()]);
    let mut guest = Guest::new(UnixStream::connect(&server.socket).unwrap());
    assert!(guest.say(b"nobody listens\n") < LIMIT, "without a client nothing waits");
    for round in 0..3u8 {
        let mut client = UnixStream::connect(&port).unwrap();
        client.write_all(&[b'a', round]).unwrap();
        assert_eq!(guest.hear(2), [b'a', round]);
        guest.say(b"answer");
        assert_eq!(read_some(&mut client, 6), b"answer");
    }
}

#[test]
fn what_nobody_has_read_is_kept_for_the_next_client() {
    let scratch = Scratch::new();
    let port = scratch.path("port");
    let args = ["--socket", port.to_str().unwrap(), "--keep", "300000"];
    let server = Server::start("outboard-console", &scratch, &args);
    let mut guest = Guest::new(UnixStream::connect(&server.socket).unwrap());
    guest.say(b"early\n");
    let mut client = UnixStream::connect(&port).unwrap();
    assert_eq!(read_some(&mut client, 6), b"early\n");
    guest.say(b"now\n");
    assert_eq!(read_some(&mut client, 4), b"now\n");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "the console lets a client go that has said all");
    // More than a socket holds, and than is kept.
    let start = Instant::now();
    for round in 0..10u8 {
        guest.say(&[b'0' + round; 60_000]);
    }
    assert!(start.elapsed() < LIMIT, "without a client nothing waits");
    let mut client = UnixStream::connect(&port).unwrap();
    let kept = read_some(&mut client, 300_000);
    let expected: Vec<u8> = (5..10u8).flat_map(|round| vec![b'0' + round; 60_000]).collect();
    assert!(kept == expected, "the last bytes come, in order");
    client.write_all(b"typed").unwrap();
    assert_eq!(guest.hear(5), b"typed");
    guest.say(b"after");
    assert_eq!(read_some(&mut client, 5), b"after");
}

#[test]
fn a_client_that_reads_nothing_does_not_stop_the_guest() {
    let scratch = Scratch::new();
    let port = scratch.path("port");
    let server = Server::start("outboard-console", &scratch, &["--socket", port.to_str().unwrap()]);
    let mut guest = Guest::new(UnixStream::connect(&server.socket).unwrap());
    let mut client = UnixStream::connect(&port).unwrap();
    client.write_all(b"x").unwrap();
    guest.hear(1);
    let start = Instant::now();
    for _ in 0..40 {
        guest.say(&[b'y'; 60_000]);
    }
    assert!(start.elapsed() < LIMIT, "it is waited for once, not each time");
}

#[test]
fn a_pseudo_terminal_is_made_and_named() {
    let scratch = Scratch::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = start_with(&["--pty"], theirs.into(), Stdio::null(), Stdio::piped(), &scratch);
    let mut path = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut path).unwrap();
    let mut terminal = suite::open_terminal(path.trim());
    let mut guest = Guest::new(ours);
    guest.say(b"login: ");
    assert_eq!(read_some(&mut terminal, 7), b"login: ");
    terminal.write_all(b"root\r").unwrap();
    assert_eq!(guest.hear(5), b"root\r");
}

/// A console process that is ended with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn start_with(args: &[&str], socket: OwnedFd, stdin: Stdio, stdout: Stdio, _scratch: &Scratch) -> Process {
    let passed = rustix::io::dup(&socket).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&passed).to_string();
    let child =
        Command::new(program("outboard-console")).args(args).args(["--fd", &number]).stdin(stdin).stdout(stdout).spawn().unwrap();
    Process(child)
}

/// A terminal as a person has it: the test holds the other side.
struct Terminal {
    person: File,
    slave: OwnedFd,
}

impl Terminal {
    fn new() -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let slave = rustix::fs::open(path.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        tcsetwinsize(&slave, Winsize { ws_row: 40, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        Terminal { person: File::from(master), slave }
    }

    fn stdio(&self) -> Stdio {
        Stdio::from(self.slave.try_clone().unwrap())
    }

    fn is_cooked(&self) -> bool {
        tcgetattr(&self.slave).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn start(&self, scratch: &Scratch) -> (Process, Guest) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = start_with(&["--terminal"], theirs.into(), self.stdio(), self.stdio(), scratch);
        (process, Guest::new(ours))
    }
}

#[test]
fn a_terminal_is_raw_while_it_is_used_and_resized_with_the_window() {
    let scratch = Scratch::new();
    let mut terminal = Terminal::new();
    assert!(terminal.is_cooked());
    let (mut process, mut guest) = terminal.start(&scratch);
    assert!(!terminal.is_cooked(), "keys go to the guest");
    guest.say(b"\x1b[1mhi");
    assert_eq!(read_some(&mut terminal.person, 6), b"\x1b[1mhi");
    terminal.person.write_all(b"\x03ls\r").unwrap();
    assert_eq!(guest.hear(4), b"\x03ls\r", "Ctrl-C is for the guest");
    assert_eq!(guest.size(), (132, 40));
    tcsetwinsize(&terminal.slave, Winsize { ws_row: 50, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let pid = rustix::process::Pid::from_child(&process.0);
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    let requests = guest.device.session().backend_requests().unwrap().try_clone_to_owned().unwrap();
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    let mut fds = [rustix::event::PollFd::new(&requests, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "the guest's side is told");
    assert_eq!(guest.device.session().handle_backend_request().unwrap(), BackendEvent::ConfigChanged);
    assert_eq!(guest.size(), (100, 50));
    drop(guest);
    let status = wait_for("the end", || process.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(terminal.is_cooked(), "the terminal is put back");
}

#[test]
fn the_escape_sequence_leaves() {
    let scratch = Scratch::new();
    let mut terminal = Terminal::new();
    let (mut process, mut guest) = terminal.start(&scratch);
    terminal.person.write_all(b"a\x1d\x1d").unwrap();
    assert_eq!(guest.hear(2), b"a\x1d");
    terminal.person.write_all(b"\x1dq").unwrap();
    let status = wait_for("the end", || process.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(terminal.is_cooked());
}

#[test]
fn the_terminal_is_put_back_when_the_worker_is_killed() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    let (mut process, _guest) = terminal.start(&scratch);
    assert!(!terminal.is_cooked());
    let children = format!("/proc/{0}/task/{0}/children", process.0.id());
    let worker: i32 = wait_for("the worker", || fs::read_to_string(&children).ok()?.trim().parse().ok());
    rustix::process::kill_process(rustix::process::Pid::from_raw(worker).unwrap(), rustix::process::Signal::KILL).unwrap();
    let status = wait_for("the end", || process.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(128 + 9));
    assert!(terminal.is_cooked());
}

#[test]
fn a_terminal_that_vanishes_does_not_stop_the_guest() {
    let scratch = Scratch::new();
    let terminal = Terminal::new();
    let (mut process, mut guest) = terminal.start(&scratch);
    drop(terminal);
    guest.say(b"is anybody there?\n");
    std::thread::sleep(Duration::from_millis(200));
    assert!(process.0.try_wait().unwrap().is_none(), "the console goes on");
    assert!(guest.say(b"no\n") < LIMIT);
    assert!(guest.device.connection().is_some_and(|fd| fd.as_fd().try_clone_to_owned().is_ok()));
}
