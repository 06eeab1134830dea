//! Kills at every system call: of one request, of one recovery, and of two recoveries after each other. Random kills find what is
//! likely; these find what is there.
//!
//! A tracer counts the ends and beginnings of system calls of all threads, and kills the process at the first, at the second, and so
//! on, until the request is through before its turn comes. Each time a successor has to finish the request, once and rightly.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use probe::blk::{Disk, Kind, Status};
use probe::device::{Device, Shape};
use probe::ring::Buffer;
use suite::tracer::{Event, Filters, Tracer, can_trace};
use suite::{Scratch, Server, wait_for};

/// Threads of a device process here: one for the frontend, one for the queues.
const THREADS: usize = 2;

/// No request takes so many steps; one that does is not making any.
const MOST: usize = 2000;

/// How long a process may go on after it has answered, before its steps do not count any more.
const AFTERWARDS: Duration = Duration::from_millis(5);

/// A process that will be killed at a step.
struct Doomed {
    pid: u32,
    over: Arc<AtomicBool>,
    tracer: JoinHandle<bool>,
}

impl Doomed {
    /// Puts an idle process under a tracer that kills it at step `at`, counted from now.
    fn at_step(server: &Server, at: usize) -> Doomed {
        Doomed::when(server, move |step, _| step == at)
    }

    /// Kills it when `now` says so, which is asked at each step, with the number of the call if one begins.
    fn when(server: &Server, now: impl Fn(usize, Option<i64>) -> bool + Send + 'static) -> Doomed {
        let pid = server.worker();
        let over = Arc::new(AtomicBool::new(false));
        let (ready, idle) = channel();
        let too_late = Arc::clone(&over);
        let tracer = thread::spawn(move || {
            let mut tracer = Tracer::seize(pid, Filters::InForce);
            let mut standing = Vec::new();
            while standing.len() < THREADS {
                match tracer.event().expect("an idle process") {
                    Event::Call(tid, libc::SYS_ppoll) => standing.push(tid),
                    Event::Call(tid, _) | Event::Return(tid, _) => tracer.go(tid),
                    Event::Died(..) => panic!("an idle process"),
                }
            }
            standing.into_iter().for_each(|tid| tracer.go(tid));
            ready.send(()).unwrap();
            let (mut step, mut killed) = (0, false);
            while let Some(event) = tracer.event() {
                let (tid, call) = match event {
                    Event::Call(tid, call) => (tid, Some(call)),
                    Event::Return(tid, _) => (tid, None),
                    Event::Died(..) => continue,
                };
                step += 1;
                if now(step, call) {
                    killed = !too_late.load(Ordering::SeqCst);
                    end(pid);
                }
                tracer.go(tid);
            }
            killed
        });
        idle.recv().unwrap();
        Doomed { pid, over, tracer }
    }

    /// The request is through: ends the process, and says whether it was killed before.
    fn was_killed(self) -> bool {
        thread::sleep(AFTERWARDS);
        self.over.store(true, Ordering::SeqCst);
        end(self.pid);
        self.tracer.join().unwrap()
    }

    fn is_dead(&self) -> bool {
        self.tracer.is_finished()
    }
}

fn end(pid: u32) {
    let _already_gone = kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
}

/// One request of a kind of device, and how to tell that it was done once and rightly.
trait Request {
    fn device(&mut self) -> &mut Device;
    fn submit(&mut self);
    /// It has come back.
    fn is_back(&mut self) -> bool;
    /// Looks at what came of it, through the process that serves now.
    fn check(&mut self);
}

/// Which device, and where its resource is.
struct Kit {
    scratch: Scratch,
    name: &'static str,
    args: Vec<String>,
    open: fn(UnixStream, &Kit) -> Box<dyn Request>,
    resource: PathBuf,
}

impl Kit {
    fn server(&self) -> Server {
        self.start(Server::start)
    }

    fn server_with_log(&self, log: fs::File) -> Server {
        self.start(|name, scratch, args| Server::start_with_log(name, scratch, args, log))
    }

    fn start(&self, start: impl FnOnce(&str, &Scratch, &[&str]) -> Server) -> Server {
        let _left_by_a_killed_one = fs::remove_file(self.scratch.path(&format!("{}.sock", self.name)));
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        start(self.name, &self.scratch, &args)
    }
}

fn connect(server: &Server) -> UnixStream {
    UnixStream::connect(&server.socket).unwrap()
}

/// Waits until the request is back or the process is dead.
fn settle(request: &mut dyn Request, doomed: &Doomed) -> bool {
    let mut back = false;
    wait_for("an answer, or the end", || {
        back = request.is_back();
        (back || doomed.is_dead()).then_some(())
    });
    back || request.is_back()
}

/// A successor that nobody kills finishes what is left.
fn finish(kit: &Kit, request: &mut dyn Request, back: bool, step: usize) {
    let server = kit.server();
    request.device().reconnect(connect(&server)).unwrap_or_else(|error| panic!("after step {step}: {error:#}"));
    if !back {
        wait_for("the successor's answer", || request.is_back().then_some(()));
    }
    assert_eq!(request.device().outstanding(), 0, "step {step}");
    assert!(!request.is_back(), "step {step}: answered twice");
    request.check();
}

/// Kills at every step of a request.
fn every_step_of_a_request(kit: &Kit) -> usize {
    for step in 1..MOST {
        let server = kit.server();
        let mut request = (kit.open)(connect(&server), kit);
        let doomed = Doomed::at_step(&server, step);
        request.submit();
        let back = settle(request.as_mut(), &doomed);
        if !doomed.was_killed() {
            assert!(back);
            return step - 1;
        }
        drop(server);
        finish(kit, request.as_mut(), back, step);
    }
    panic!("{MOST} steps and no answer");
}

/// Kills at every step of the recovery of a process that died with the request in hand; `times` successors die at the same step. Of
/// two deaths in a row every third step is tried: what the first one leaves was tried at every step.
fn every_step_of_a_recovery(kit: &Kit, times: usize, in_hand: usize) -> usize {
    for step in (1..MOST).step_by(if times == 1 { 1 } else { 3 }) {
        let server = kit.server();
        let mut request = (kit.open)(connect(&server), kit);
        let doomed = Doomed::at_step(&server, in_hand);
        request.submit();
        let mut back = settle(request.as_mut(), &doomed);
        assert!(doomed.was_killed());
        drop(server);
        let mut any = false;
        for _ in 0..times {
            // A successor without a request to finish waits for the next one.
            if back {
                break;
            }
            let server = kit.server();
            let doomed = Doomed::at_step(&server, step);
            // Fails where the kill comes before the end of the greeting.
            if request.device().reconnect(connect(&server)).is_ok() {
                back |= settle(request.as_mut(), &doomed);
            }
            any |= doomed.was_killed();
        }
        finish(kit, request.as_mut(), back, step);
        if !any {
            return step - 1;
        }
    }
    panic!("{MOST} steps and no answer");
}

/// The steps of a request that is killed in the middle: one of them has it in hand.
fn everything(kit: &Kit) {
    if !can_trace() {
        return;
    }
    let steps = every_step_of_a_request(kit);
    println!("{}: a request takes {steps} steps", kit.name);
    assert!(steps > 6, "kick, request, answer: {steps} steps");
    // In the middle, which is where the work is done.
    for times in [1, 2] {
        let steps = every_step_of_a_recovery(kit, times, steps / 2);
        println!("{}: a recovery takes {steps} steps, killed {times} times in a row", kit.name);
        assert!(steps > 50, "greeting, memory, rings: {steps} steps");
    }
}

const BLOCK: usize = 4096;

struct Write {
    disk: Disk,
    back: u32,
}

impl Request for Write {
    fn device(&mut self) -> &mut Device {
        &mut self.disk.device
    }

    fn submit(&mut self) {
        self.disk.fill(0, &[0x5a; BLOCK]);
        assert!(self.disk.submit(0, 0, Kind::Out, 8, 4096));
        self.disk.device.kick(0);
    }

    fn is_back(&mut self) -> bool {
        let done = self.disk.completion().unwrap();
        let Some(done) = done else { return false };
        assert!(matches!(done.status, Status::Ok), "no request is given up");
        self.back += 1;
        true
    }

    fn check(&mut self) {
        assert_eq!(self.back, 1);
        let mut read = [0; BLOCK];
        self.disk.read(4096, &mut read).unwrap();
        assert_eq!(read, [0x5a; BLOCK]);
        self.disk.write(4096, &mut [0; BLOCK]).unwrap();
    }
}

fn disk() -> Kit {
    let scratch = Scratch::new();
    let resource = scratch.image("disk.img", 1 << 20);
    let args = ["--format", "raw", "--blk-file", resource.to_str().unwrap()].map(str::to_owned).to_vec();
    let open = |stream, _: &Kit| -> Box<dyn Request> {
        Box::new(Write { disk: Disk::open(stream, Shape::default(), 1, 4096, 1).unwrap(), back: 0 })
    };
    Kit { scratch, name: "outboard-blk", args, open, resource }
}

#[test]
fn every_step_of_a_disk() {
    everything(&disk());
}

/// A request that always ends its server would take the device away from its guest for ever.
#[test]
fn a_request_that_ends_five_servers_is_answered_with_an_error() {
    if !can_trace() {
        return;
    }
    let kit = disk();
    let server = kit.server();
    let mut disk = Disk::open(connect(&server), Shape::default(), 2, 4096, 1).unwrap();
    let mut server = Some(server);
    for death in 1..=5 {
        let serving = server.take().unwrap_or_else(|| kit.server());
        let doomed = Doomed::when(&serving, |_, call| call == Some(libc::SYS_pwritev2));
        if death == 1 {
            assert!(disk.submit(0, 0, Kind::Out, 8, 4096) && disk.submit(0, 1, Kind::In, 16, 4096));
            disk.device.kick(0);
        } else {
            let _killed_in_the_middle = disk.device.reconnect(connect(&serving));
        }
        wait_for("the end", || doomed.is_dead().then_some(()));
        assert!(disk.completion().unwrap().is_none(), "death {death}: nobody has given up");
    }
    let log = kit.scratch.path("log");
    let server = kit.server_with_log(fs::File::create(&log).unwrap());
    disk.device.reconnect(connect(&server)).unwrap();
    let answers = [disk.wait().unwrap(), disk.wait().unwrap()];
    let status = |slot| answers.iter().find(|done| done.slot == slot).unwrap().status;
    assert!(matches!(status(0), Status::IoError), "the cause gets an error");
    assert!(matches!(status(1), Status::Ok), "its neighbour is served");
    assert!(matches!(disk.request(Kind::Out, 8, &mut [1; BLOCK]).unwrap(), Status::Ok), "the device goes on");
    let said = fs::read_to_string(log).unwrap();
    assert!(said.contains("has ended 5 processes that served it") && said.contains("queue=0"), "{said}");
}

/// A request of 64 bytes in either direction on one queue.
struct Plain {
    device: Device,
    queue: u16,
    at: u64,
    file: Option<PathBuf>,
    before: u64,
}

impl Request for Plain {
    fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    fn submit(&mut self) {
        let write = self.file.is_none();
        self.device.memory().write(self.at, if write { &[0; 64] } else { &[b'x'; 64] });
        self.device.submit(self.queue, &[Buffer { addr: self.at, len: 64, write }]).unwrap();
        self.device.kick(self.queue);
    }

    fn is_back(&mut self) -> bool {
        self.device.completion(self.queue).unwrap().is_some()
    }

    fn check(&mut self) {
        match &self.file {
            Some(file) => assert_eq!(fs::metadata(file).unwrap().len(), self.before + 64, "shown once, and whole"),
            None => {
                let mut bytes = [0; 64];
                self.device.memory().read(self.at, &mut bytes);
                assert!(bytes.iter().filter(|byte| **byte == 0).count() < 48, "random, not zeroes");
            }
        }
    }
}

fn plain(stream: UnixStream, queues: u16, file: Option<PathBuf>) -> Box<dyn Request> {
    let mut device = Device::connect(stream, Shape { queues, ..Shape::default() }, 0).unwrap();
    let at = device.memory_mut().take(64, 1, 0).unwrap();
    device.start().unwrap();
    let before = file.as_ref().map_or(0, |file| fs::metadata(file).unwrap().len());
    Box::new(Plain { device, queue: queues - 1, at, file, before })
}

#[test]
fn every_step_of_an_entropy_source() {
    let open = |stream, _: &Kit| plain(stream, 1, None);
    everything(&Kit { scratch: Scratch::new(), name: "outboard-rng", args: Vec::new(), open, resource: PathBuf::new() });
}

#[test]
fn every_step_of_a_console() {
    let scratch = Scratch::new();
    let resource = scratch.path("console.log");
    let args = ["--file", resource.to_str().unwrap()].map(str::to_owned).to_vec();
    let open = |stream, kit: &Kit| plain(stream, 2, Some(kit.resource.clone()));
    everything(&Kit { scratch, name: "outboard-console", args, open, resource });
}
