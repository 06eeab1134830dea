//! Requests that no guest's kernel would send, scripted: what a virtio-fs server does with them.
//!
//! Each [`Case`] gets a server of its own, which shares a folder that is made for it, and offers one bad request. What counts is whether
//! that comes back with an error that says what is wrong, whether the next request is right, and whether anything beside the shared
//! folder has changed.
//!
//! | file | what lives there |
//! |---|---|
//! | `stage` | the folder, what lies beside it, and the server |
//! | `layouts` | descriptors, and the header |
//! | `messages` | what stands behind the header |
//! | `numbers` | nodes, handles, references, queues |
//! | `files` | pipes, sockets, devices, links |
//! | `names` | every operation that takes a name, with every name that is none |

use anyhow::{Context, Result};

use crate::fs::message::{self, Message, ROOT};
use crate::fs::raw::{FIRST, Heard, Raw, Reply, Told, long, node_of};
use crate::ring::Buffer;

mod files;
mod layouts;
mod messages;
mod names;
mod numbers;
mod stage;

use stage::Stage;
pub use stage::{fingerprint, furnish};

/// Bytes that are offered for an answer.
const ROOM: u32 = 4096;

/// What is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Good {
    /// It is done.
    Done,
    /// It is refused with this error.
    Error(i32),
    /// It comes back with nothing.
    Nothing,
    /// The ring is not served any more.
    Broken,
}

type Attack = dyn Fn(&mut Foe) -> Result<Heard>;

/// One bad request.
pub struct Case {
    /// What people call it.
    pub name: String,
    good: &'static [Good],
    run: Box<Attack>,
}

impl Case {
    fn new(name: impl Into<String>, good: &'static [Good], run: impl Fn(&mut Foe) -> Result<Heard> + 'static) -> Case {
        Case { name: name.into(), good, run: Box::new(run) }
    }
}

/// All cases, by theme.
pub fn themes() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("layouts", layouts::cases()),
        ("messages", messages::cases()),
        ("numbers", numbers::cases()),
        ("files", files::cases()),
        ("names", names::cases()),
    ]
}

/// What became of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The request was carried out.
    Done,
    /// It was refused with this error.
    Refused(i32),
    /// It came back with nothing.
    Dropped,
    /// The ring is not served any more, the next frontend is.
    BrokeRing,
    /// The host has nothing to attack: it makes no such file.
    NotOffered,
    /// The process is gone.
    Died,
    /// It says nothing any more.
    Hung,
    /// The answer, or the one to the next request, was none.
    Confused(String),
    /// Something beside the shared folder has changed.
    Escaped(String),
}

impl Outcome {
    /// For people and for machines.
    pub fn name(&self) -> String {
        match self {
            Outcome::Done => "done".to_owned(),
            Outcome::Refused(error) => error_name(*error),
            Outcome::Dropped => "no answer".to_owned(),
            Outcome::BrokeRing => "broke the ring".to_owned(),
            Outcome::NotOffered => "not offered".to_owned(),
            Outcome::Died => "died".to_owned(),
            Outcome::Hung => "hung".to_owned(),
            Outcome::Confused(_) => "confused".to_owned(),
            Outcome::Escaped(_) => "escaped".to_owned(),
        }
    }

    /// More, where there is more to say.
    pub fn detail(&self) -> &str {
        match self {
            Outcome::Confused(what) | Outcome::Escaped(what) => what,
            _ => "",
        }
    }

    /// Whether the server lives, and nobody else was harmed.
    pub fn survived(&self) -> bool {
        !matches!(self, Outcome::Died | Outcome::Hung | Outcome::Confused(_) | Outcome::Escaped(_))
    }
}

/// One case's outcome.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What happened.
    pub outcome: Outcome,
    /// It is what should happen.
    pub right: bool,
}

/// A guest that means harm.
struct Foe {
    raw: Raw,
    /// A file of 10,000 bytes.
    file: u64,
    /// A directory with a file `inner`.
    dir: u64,
}

impl Foe {
    fn new(mut raw: Raw) -> Result<Foe> {
        let (file, dir) = (raw.lookup(ROOT, "file")?, raw.lookup(ROOT, "dir")?);
        Ok(Foe { raw, file, dir })
    }

    /// Offers a request with room for an answer.
    fn say(&mut self, message: &Message) -> Result<Heard> {
        self.say_with(message, ROOM)
    }

    fn say_with(&mut self, message: &Message, room: u32) -> Result<Heard> {
        let bytes = message.bytes(self.raw.next_unique());
        self.say_bytes(&bytes, room)
    }

    fn say_bytes(&mut self, bytes: &[u8], room: u32) -> Result<Heard> {
        let buffers = self.lay(bytes, room)?;
        self.raw.offer(FIRST, &buffers)
    }

    /// Puts a request into memory, in two buffers.
    fn lay(&mut self, bytes: &[u8], room: u32) -> Result<Vec<Buffer>> {
        let place = self.raw.place();
        self.raw.device.memory().write(place.request, bytes);
        let both = [(place.request, u32::try_from(bytes.len())?, false), (place.answer, room, true)];
        Ok(both.into_iter().filter(|(_, len, _)| *len > 0).map(|(addr, len, write)| Buffer { addr, len, write }).collect())
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64> {
        self.raw.open_file(node, flags)
    }

    fn open_dir(&mut self, node: u64) -> Result<u64> {
        let reply = self.raw.call(&message::opendir(node))?;
        // A server may say that directories need not be opened.
        anyhow::ensure!(reply.error != libc::ENOSYS, NotOffered);
        anyhow::ensure!(reply.error == 0, "The server answered OPENDIR with error {}", reply.error);
        Ok(long(&reply.body, 0))
    }
}

/// Who is attacked.
pub struct Victim {
    stage: Stage,
}

impl Victim {
    /// A server that is started with this command, in which `{share}` is the folder that it is to share and `{socket}` where it listens.
    ///
    /// # Errors
    /// When there is no place for the folder.
    pub fn new(command: Vec<String>) -> Result<Victim> {
        Ok(Victim { stage: Stage::new(command)? })
    }

    /// Lets a correct guest use it: who fails at this is not attacked.
    ///
    /// # Errors
    /// What is wrong.
    pub fn greet(&mut self) -> Result<()> {
        Foe::new(self.stage.start()?).map(drop).context("The server does not serve an ordinary guest")
    }

    /// Does one bad thing to it, and judges.
    ///
    /// # Errors
    /// When the server does not start.
    pub fn suffer(&mut self, case: &Case) -> Result<Verdict> {
        let mut foe = Foe::new(self.stage.start()?)?;
        let before = self.stage.outside()?;
        let heard = (case.run)(&mut foe);
        let heard = match heard {
            Ok(heard) => heard,
            Err(error) if error.is::<NotOffered>() => return Ok(Verdict { outcome: Outcome::NotOffered, right: true }),
            // The attack had no end: only a server that is gone has an excuse.
            Err(error) => Heard::Nonsense(format!("{error:#}")),
        };
        let outcome = self.judge(foe, &heard);
        if self.stage.outside().ok() != Some(before) {
            return Ok(Verdict { outcome: Outcome::Escaped("something beside the share has changed".to_owned()), right: false });
        }
        let right = case.good.iter().any(|good| good.is(&outcome));
        Ok(Verdict { outcome, right })
    }

    fn judge(&mut self, mut foe: Foe, heard: &Heard) -> Outcome {
        let next = match heard {
            Heard::Broken => {
                drop(foe);
                self.stage.again().and_then(Foe::new).map(drop)
            }
            Heard::Gone | Heard::Silence => Ok(()),
            _ => serves(&mut foe),
        };
        if self.stage.is_gone() {
            return Outcome::Died;
        }
        match (heard, next) {
            (Heard::Nonsense(what), _) => Outcome::Confused(what.clone()),
            (Heard::Gone, _) => Outcome::Died,
            (Heard::Silence, _) => Outcome::Hung,
            (_, Err(error)) => Outcome::Confused(format!("{error:#}")),
            (Heard::Answer(Reply { error: 0, .. }), _) => Outcome::Done,
            (Heard::Answer(reply), _) => Outcome::Refused(reply.error),
            (Heard::Nothing, _) => Outcome::Dropped,
            (Heard::Broken, _) => Outcome::BrokeRing,
        }
    }
}

/// The host cannot make what is attacked.
#[derive(Debug)]
struct NotOffered;

impl std::fmt::Display for NotOffered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "There is no such file on this host")
    }
}

impl std::error::Error for NotOffered {}

/// Whether the next requests are right.
fn serves(foe: &mut Foe) -> Result<()> {
    // A guest that has said goodbye, or hello again, knows nothing any more.
    let found = foe.raw.ask(&message::lookup(ROOT, "file")).context("the next request")?;
    let told = foe.raw.ask(&message::getattr(node_of(&found))).context("the one after")?;
    anyhow::ensure!(Told::attr(&told).mode & libc::S_IFMT == libc::S_IFREG, "the file is no file any more");
    Ok(())
}

impl Good {
    fn is(self, outcome: &Outcome) -> bool {
        match (self, outcome) {
            (Good::Done, Outcome::Done) | (Good::Nothing, Outcome::Dropped) | (Good::Broken, Outcome::BrokeRing) => true,
            (Good::Error(good), Outcome::Refused(error)) => good == *error,
            _ => false,
        }
    }
}

/// The name of an error, of those that occur here.
fn error_name(error: i32) -> String {
    const NAMES: [(i32, &str); 29] = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::E2BIG, "E2BIG"),
        (libc::EBADF, "EBADF"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::EXDEV, "EXDEV"),
        (libc::ENODEV, "ENODEV"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::EISDIR, "EISDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENFILE, "ENFILE"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EFBIG, "EFBIG"),
        (libc::ESPIPE, "ESPIPE"),
        (libc::ERANGE, "ERANGE"),
        (libc::ENAMETOOLONG, "ENAMETOOLONG"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ENOTEMPTY, "ENOTEMPTY"),
        (libc::ELOOP, "ELOOP"),
        (libc::ENODATA, "ENODATA"),
        (libc::EPROTO, "EPROTO"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::ESTALE, "ESTALE"),
    ];
    NAMES.iter().find(|(number, _)| *number == error).map_or_else(|| format!("error {error}"), |(_, name)| (*name).to_owned())
}
