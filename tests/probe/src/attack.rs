//! Hostile frontends and guests, scripted: what a backend does when its peer breaks the rules on purpose.
//!
//! Each [`Case`] gets a connection of its own and does one bad thing. What counts is not how the backend likes it, but what
//! comes after: it lives, it comes to rest, it keeps nothing of the attacker's, and the next frontend has a request served.
//!
//! | file | what lives there |
//! |---|---|
//! | `foe` | the attacker's connection: all it can say, rightly and wrongly |
//! | `guest` | its memory, and the driver's side of a ring without any rule |
//! | `target` | which ring of which kind of device, and an ordinary request on it |
//! | `judge` | life, rest, and the next frontend |
//! | `wire`, `memory`, `rings`, `chains`, `inflight`, `device` | the cases, a row each |

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::link::{Backend, connect_within};

mod chains;
mod device;
mod foe;
mod guest;
mod inflight;
mod judge;
mod memory;
mod rings;
mod target;
mod wire;

pub use target::Kind;

use foe::Foe;
use judge::Vitals;
use target::Target;

/// How long the next frontend tries.
const PATIENCE: Duration = Duration::from_secs(3);

/// The exit status of a Rust program that panicked.
const PANICKED: i32 = 101;

/// One bad thing.
pub struct Case {
    /// What people call it.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    run: fn(&mut Foe) -> foe::Result<Seen>,
}

impl Case {
    const fn new(name: &'static str, about: &'static str, run: fn(&mut Foe) -> foe::Result<Seen>) -> Case {
        Case { name, about, run }
    }
}

/// All cases, by theme.
pub const THEMES: [(&str, &[Case]); 6] = [
    ("wire", wire::CASES),
    ("memory", memory::CASES),
    ("rings", rings::CASES),
    ("chains", chains::CASES),
    ("in-flight", inflight::CASES),
    ("device", device::CASES),
];

/// What the attacker saw on its own connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It was taken, and the connection goes on.
    Taken,
    /// It was answered with a failure, and the connection goes on.
    Refused,
    /// The ring is not served any more, and the connection goes on.
    Broke,
    /// The connection is gone.
    Closed,
    /// The backend says nothing while the connection stands.
    Waits,
}

/// Why a case did not come to its end.
enum Halt {
    /// The backend closed the connection before.
    Closed,
    /// It did not take something ordinary after the attack.
    Saw(Seen),
    /// The backend does not offer what is attacked.
    NotOffered(&'static str),
    /// Something else.
    Trouble(anyhow::Error),
}

impl From<anyhow::Error> for Halt {
    fn from(error: anyhow::Error) -> Halt {
        Halt::Trouble(error)
    }
}

impl std::fmt::Display for Halt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Halt::Closed => write!(f, "The backend closed the connection"),
            Halt::Saw(seen) => write!(f, "The backend does not take an ordinary request ({seen:?})"),
            Halt::NotOffered(what) => write!(f, "The backend does not offer {what}"),
            Halt::Trouble(error) => write!(f, "{error:#}"),
        }
    }
}

/// What became of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The connection goes on, and so does its ring.
    ServedOn,
    /// The request was refused, the connection goes on.
    Refused,
    /// The attacker's ring is not served any more; its connection is.
    BrokeRing,
    /// The attacker's connection was ended.
    Closed,
    /// The attacker is waited for; who comes after it is served.
    Waited,
    /// Nothing to attack: the backend does not offer it.
    NotOffered,
    /// The process is gone, by a signal or a panic.
    Died,
    /// It does not come to rest.
    Span,
    /// It lives and does not serve the next frontend.
    Hung,
    /// It keeps memory or descriptors of the attacker's.
    Leaked,
}

/// All of them, good ones first.
pub const OUTCOMES: [Outcome; 10] = [
    Outcome::ServedOn,
    Outcome::Refused,
    Outcome::BrokeRing,
    Outcome::Closed,
    Outcome::Waited,
    Outcome::NotOffered,
    Outcome::Died,
    Outcome::Span,
    Outcome::Hung,
    Outcome::Leaked,
];

impl Outcome {
    /// For people and for machines.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::ServedOn => "served on",
            Outcome::Refused => "refused",
            Outcome::BrokeRing => "broke the ring",
            Outcome::Closed => "closed",
            Outcome::Waited => "waited",
            Outcome::NotOffered => "not offered",
            Outcome::Died => "died",
            Outcome::Span => "span",
            Outcome::Hung => "hung",
            Outcome::Leaked => "leaked",
        }
    }

    /// Whether the next frontend is as well off as if nothing had been.
    pub fn survived(self) -> bool {
        !matches!(self, Outcome::Died | Outcome::Span | Outcome::Hung | Outcome::Leaked)
    }
}

/// One case's outcome.
pub struct Verdict {
    /// What happened.
    pub outcome: Outcome,
    /// More, where there is more to say.
    pub detail: String,
}

/// Who is attacked.
pub struct Victim {
    place: Place,
    kind: Kind,
    pid: Option<u32>,
}

enum Place {
    Listening(PathBuf),
    Started(Backend),
}

impl Victim {
    /// A backend that listens. `pid`: its process, if that is not who the socket's peer is.
    pub fn listening(socket: PathBuf, kind: Kind, pid: Option<u32>) -> Victim {
        Victim { place: Place::Listening(socket), kind, pid }
    }

    /// A backend that is started anew for each case, since many serve one frontend and end.
    pub fn started(command: Vec<String>, kind: Kind) -> Victim {
        Victim { place: Place::Started(Backend::new(command).quiet()), kind, pid: None }
    }

    fn connect(&mut self) -> Result<UnixStream> {
        match &mut self.place {
            Place::Listening(path) => connect_within(path, PATIENCE),
            Place::Started(backend) => {
                backend.kill(None::<UnixStream>)?;
                backend.start()
            }
        }
    }

    fn connect_again(&self) -> Result<UnixStream> {
        match &self.place {
            Place::Listening(path) => connect_within(path, PATIENCE),
            Place::Started(backend) => backend.connect_within(PATIENCE),
        }
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        match &mut self.place {
            Place::Listening(_) => None,
            Place::Started(backend) => backend.ended(),
        }
    }

    /// Does one bad thing to it, and judges.
    ///
    /// # Errors
    /// When there is nobody to attack, or nobody who serves even without an attack.
    pub fn suffer(&mut self, case: &Case) -> Result<Verdict> {
        let target = Target::from(self.kind);
        let stream = self.connect()?;
        let pid = self.pid.or_else(|| judge::server(&stream));
        let before = pid.map(Vitals::of).unwrap_or_default();
        let mut foe = Foe::new(stream, target)?;
        let seen = (case.run)(&mut foe);
        let spun = pid.is_some_and(|pid| judge::lives(pid) && judge::spins(pid));
        drop(foe);
        let (outcome, detail) = match seen {
            Ok(seen) => (seen.into(), String::new()),
            Err(Halt::Closed) => (Outcome::Closed, String::new()),
            Err(Halt::Saw(seen)) => (seen.into(), String::new()),
            Err(halt) => (Outcome::NotOffered, halt.to_string()),
        };
        let fine = Verdict { outcome, detail };
        let worse = self.judge(target, pid, &before)?;
        let spun = spun.then(|| Verdict { outcome: Outcome::Span, detail: "while the attacker was there".to_owned() });
        Ok(worse.or(spun).unwrap_or(fine))
    }

    /// What is wrong with the backend afterwards.
    fn judge(&mut self, target: Target, pid: Option<u32>, before: &Vitals) -> Result<Option<Verdict>> {
        let say = |outcome, detail: String| Ok(Some(Verdict { outcome, detail }));
        let start = Instant::now();
        loop {
            let served = self.connect_again().and_then(|stream| judge::serves(stream, target));
            if let Some(status) = self.ended() {
                return Ok(by_violence(status).map(|detail| Verdict { outcome: Outcome::Died, detail }));
            }
            if pid.is_some_and(|pid| !judge::lives(pid)) && matches!(self.place, Place::Listening(_)) {
                return say(Outcome::Died, String::new());
            }
            match served {
                Ok(()) => break,
                Err(error) if start.elapsed() > PATIENCE => return say(Outcome::Hung, format!("{error:#}")),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        let Some(pid) = pid else { return Ok(None) };
        if judge::spins(pid) {
            return say(Outcome::Span, "after the attacker had gone".to_owned());
        }
        Ok(Vitals::of(pid).kept(before).map(|detail| Verdict { outcome: Outcome::Leaked, detail }))
    }

    /// Lets a correct frontend have a request served: who fails at this is not attacked.
    ///
    /// # Errors
    /// What is wrong.
    pub fn greet(&mut self) -> Result<()> {
        let stream = self.connect()?;
        judge::serves(stream, Target::from(self.kind)).context("The backend does not serve an ordinary frontend")
    }
}

/// How a process ended, if that was not its own decision. One that ends with its frontend has decided so.
fn by_violence(status: ExitStatus) -> Option<String> {
    if let Some(signal) = status.signal() {
        return Some(format!("signal {signal}"));
    }
    match status.code() {
        Some(PANICKED) => Some("panic".to_owned()),
        // What a parent says of a child, as a shell does.
        Some(code) if code > 128 => Some(format!("signal {}", code - 128)),
        _ => None,
    }
}

impl From<Seen> for Outcome {
    fn from(seen: Seen) -> Outcome {
        match seen {
            Seen::Taken => Outcome::ServedOn,
            Seen::Refused => Outcome::Refused,
            Seen::Broke => Outcome::BrokeRing,
            Seen::Closed => Outcome::Closed,
            Seen::Waits => Outcome::Waited,
        }
    }
}
