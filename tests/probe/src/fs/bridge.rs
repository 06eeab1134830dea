//! The go-between: requests of this host's kernel into the queues, answers back.
//!
//! One thread, and one descriptor of `/dev/fuse`: the kernel wants an answer on the descriptor that the request was read from, so the
//! requests of several queues need not be told apart. They take turns in the queues; the order among requests that are out at the same
//! time means nothing in FUSE.
//!
//! The thread must never touch the mount that it serves: the kernel would ask it, and it would wait for itself. So another thread unmounts.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::mount::Mount;
use super::wire::{self, Settled};
use super::{Answer, MOST_REQUEST, Share, request_queues};

/// How long files that are open at the end are served on. Whoever asked for the end waits for it, and sends SIGKILL after ten seconds or so.
const GRACE: Duration = Duration::from_secs(5);

/// Requests that are read in a row, before answers are looked for again.
const BATCH: usize = 16;

/// The number of our own DESTROY. The kernel's count up from 2.
const GOODBYE: u64 = u64::MAX - 1;

/// How the mount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Nobody has it any more.
    Unmounted,
    /// Files were open for longer than [`GRACE`] after a signal.
    Cut,
}

/// A share, and the kernel that wants it.
#[derive(Debug)]
pub struct Bridge {
    share: Share,
    mount: Mount,
    fuse: File,
    signals: File,
    request: Vec<u8>,
    /// Bytes of a request that has found no room.
    held: Option<usize>,
    settled: Option<Settled>,
    /// When a signal asked for the end.
    ending: Option<Instant>,
    /// The thread that does it.
    unmounting: Option<JoinHandle<()>>,
}

impl Bridge {
    /// Between a share and a mount. `signals` is readable when the end is asked for.
    pub fn new(share: Share, (mount, fuse): (Mount, OwnedFd), signals: OwnedFd) -> Bridge {
        let request = vec![0; MOST_REQUEST];
        Bridge {
            share,
            mount,
            fuse: fuse.into(),
            signals: signals.into(),
            request,
            held: None,
            settled: None,
            ending: None,
            unmounting: None,
        }
    }

    /// Serves until it is unmounted or a signal asks for the end. Nothing is mounted afterwards, however it ended.
    ///
    /// # Errors
    /// When the server is gone or breaks a rule. Whoever waits for an answer gets an error.
    pub fn run(mut self) -> Result<()> {
        let ended = self.serve();
        let ended = match ended {
            Ok(End::Unmounted) => self.say_goodbye(),
            Ok(End::Cut) => {
                eprintln!("outboard-probe: Files are still open after {} s; they get errors now", GRACE.as_secs());
                Ok(())
            }
            Err(error) => Err(error),
        };
        // With its last descriptor the kernel gives up all requests, and then has none to make for an unmount.
        drop(self.fuse);
        if let Some(thread) = self.unmounting.take() {
            let _it_said_so = thread.join();
        }
        self.mount.detach();
        ended
    }

    fn serve(&mut self) -> Result<End> {
        loop {
            let answered = self.answers()?;
            let (asked, end) = self.requests()?;
            if let Some(end) = end {
                return Ok(end);
            }
            if self.ending.is_some_and(|since| since.elapsed() >= GRACE) {
                return Ok(End::Cut);
            }
            if !answered && !asked && !self.share.device.arm() {
                self.wait()?;
            }
        }
    }

    /// Gives the kernel all answers that are there. `false`: there were none.
    fn answers(&mut self) -> Result<bool> {
        let mut any = false;
        while let Some(answer) = self.share.answer()? {
            any = true;
            self.give(answer)?;
        }
        Ok(any)
    }

    fn give(&mut self, Answer { request, mut bytes }: Answer) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if request.opcode == wire::INIT {
            self.greeted(&mut bytes)?;
        }
        match self.fuse.write(&bytes).map_err(|error| error.raw_os_error().map(Errno::from_raw_os_error)) {
            // Nobody waits for it any more, or it is unmounted; that is seen where requests are read.
            Ok(_) | Err(Some(Errno::NOENT | Errno::NODEV)) => Ok(()),
            Err(errno) => {
                let why = errno.map_or_else(String::new, |errno| format!(": {errno}"));
                bail!(
                    "The kernel does not take the server's answer of {} bytes to {}{why}",
                    bytes.len(),
                    wire::name(request.opcode)
                )
            }
        }
    }

    /// The answer to FUSE_INIT: from now on the mount can be used.
    fn greeted(&mut self, bytes: &mut [u8]) -> Result<()> {
        match wire::error(bytes) {
            0 => {}
            error => bail!("The server answered INIT with error {error}"),
        }
        wire::narrow_answer(bytes);
        let settled = Settled::read(bytes);
        let (queues, folder) = (self.share.device.queues() - super::FIRST, self.mount.folder.display());
        let what = self.share.about.tag.as_ref().map_or_else(|| "The server".to_owned(), |tag| format!("{tag:?}"));
        eprintln!("{what} is mounted at {folder}: FUSE {}.{}, {}", settled.major, settled.minor, request_queues(queues));
        self.settled = Some(settled);
        Ok(())
    }

    /// Sends what the kernel asks. Whether there was something, and whether it is the end.
    fn requests(&mut self) -> Result<(bool, Option<End>)> {
        let mut any = false;
        for _ in 0..BATCH {
            let len = match self.held.take() {
                Some(len) => len,
                None if !self.share.has_room() => break,
                None => match self.fuse.read(&mut self.request) {
                    Ok(len) => len,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                        // It was taken back before it was read.
                        Some(Errno::NOENT | Errno::INTR) => continue,
                        Some(Errno::NODEV | Errno::CONNABORTED) => return Ok((any, Some(End::Unmounted))),
                        _ => return Err(error).context("Cannot read requests of the kernel"),
                    },
                },
            };
            let bytes = self.request.get_mut(..len).context("The kernel read more than there is room for")?;
            if wire::Request::read(bytes).is_some_and(|request| request.opcode == wire::INIT) {
                wire::narrow_request(bytes);
            }
            if !self.share.send(bytes)? {
                self.held = Some(len);
                break;
            }
            any = true;
        }
        self.share.kick();
        Ok((any, None))
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> Result<()> {
        let device = &self.share.device;
        let connection = device.connection().context("The server has gone away")?;
        let (errors, calls) = (device.ring_errors(), device.calls());
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::from_borrowed_fd(connection, PollFlags::IN | PollFlags::RDHUP),
            PollFd::from_borrowed_fd(errors, PollFlags::IN),
        ];
        if self.held.is_none() && self.share.has_room() {
            fds.push(PollFd::new(&self.fuse, PollFlags::IN));
        }
        fds.extend(calls.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let limit = self.ending.map(|since| GRACE.saturating_sub(since.elapsed()) + Duration::from_millis(1));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).context("Cannot wait"),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let [signal, gone, broken] = [ready.next(), ready.next(), ready.next()].map(|one| one == Some(true));
        device.hush();
        if gone {
            bail!("The server has gone away");
        }
        if broken {
            bail!("The server says that a ring is broken");
        }
        if signal {
            self.signalled();
        }
        Ok(())
    }

    /// The first signal unmounts, and waits for those who have files open; the second does not wait.
    fn signalled(&mut self) {
        let mut info = [0; 128];
        while self.signals.read(&mut info).is_ok() {
            if self.unmounting.is_some() {
                self.ending = Instant::now().checked_sub(GRACE);
                continue;
            }
            self.ending = Some(Instant::now());
            let mount = self.mount.clone();
            self.unmounting = Some(std::thread::spawn(move || mount.detach()));
        }
    }

    /// What a guest says before it lets the device go; for a mount that is not a guest's the kernel leaves it out.
    fn say_goodbye(&mut self) -> Result<()> {
        if self.settled.is_none() {
            return Ok(());
        }
        self.share.exchange(&wire::bare(wire::DESTROY, GOODBYE))?;
        self.share.device.session().stop().context("Cannot stop the device")
    }
}
