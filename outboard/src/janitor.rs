//! What remains to be done if the composer is killed: the runtime directory goes, the terminal becomes sane.
//!
//! Theory of operation: the composer starts `outboard janitor DIR` with one end of a socket pair as stdin, the open runtime
//! directory as stdout and the terminal, if there is one, as stderr. The janitor remembers the terminal's settings, gives up
//! what it does not need, says `r`, and sleeps. A composer that ends in order says `d` and has cleaned up; an end of file
//! without it means that it was killed. The janitor has a session of its own, so that no key reaches it, and it ends only when
//! the composer has.

use std::fs::File;
use std::io::{Read, Write, stderr, stdin};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{env, io, thread};

use anyhow::{Context, Result, bail};
use rustix::process::setsid;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use sandbox::{Filter, Rule, allow};

use crate::args;
use crate::runtime::{self, RuntimeDir};
use crate::supervisor::terminal::Terminal;

/// How often, and how soon again, the directory is tried.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);
const READY: u8 = b'r';
const DONE: u8 = b'd';

const RULES: &[Rule] = &[
    allow(libc::SYS_read, "waiting for the composer's end"),
    allow(libc::SYS_recvfrom, "the same, as the standard library does it on sockets"),
    allow(libc::SYS_write, "saying that we are ready, an error"),
    allow(libc::SYS_sendto, "the same, as the standard library does it on sockets"),
    allow(libc::SYS_flock, "is the directory still the dead composer's?"),
    allow(libc::SYS_statx, "is it still the same directory?"),
    allow(libc::SYS_fstat, "is it still the same directory?"),
    allow(libc::SYS_newfstatat, "is it still the same directory?"),
    allow(libc::SYS_lstat, "is it still the same directory?"),
    allow(libc::SYS_rename, "what outlives the machine"),
    allow(libc::SYS_unlink, "the control socket"),
    allow(libc::SYS_rmdir, "the directory"),
    allow(libc::SYS_clock_nanosleep, "waiting for the dead composer's lock"),
    allow(libc::SYS_nanosleep, "waiting for the dead composer's lock"),
    allow(libc::SYS_ioctl, "the terminal's settings"),
    allow(libc::SYS_fcntl, "closing descriptors checks them in debug builds"),
    allow(libc::SYS_close, "the end"),
    allow(libc::SYS_brk, "memory"),
    allow(libc::SYS_mmap, "memory"),
    allow(libc::SYS_munmap, "memory"),
    allow(libc::SYS_rt_sigprocmask, "the end"),
    allow(libc::SYS_sigaltstack, "Rust takes its signal stack away at the end"),
    allow(libc::SYS_exit_group, "the end"),
];

/// The composer's side.
#[derive(Debug)]
pub struct Janitor {
    stream: UnixStream,
    child: Child,
}

impl Janitor {
    /// Starts one. It watches from here on; what it would have to put back may change once it is [`Janitor::ready`].
    pub fn start(dir: &RuntimeDir, terminal: Option<&Terminal>, background: bool) -> Result<Self> {
        let (stream, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
        let program = env::current_exe().context("Cannot find out where outboard itself is")?;
        let mut command = Command::new(program);
        command.arg("janitor").arg(dir.path());
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::from(dir.handle()?));
        command.stderr(match terminal {
            Some(terminal) => Stdio::from(terminal.file().try_clone().context("Cannot share the terminal")?),
            // A caller that waits for everybody to let go of its standard error is not to wait for us.
            None if background => Stdio::null(),
            None => Stdio::inherit(),
        });
        let child = command.spawn().context("Cannot start the janitor")?;
        Ok(Self { stream, child })
    }

    /// Waits until it has seen how the terminal is set.
    pub fn ready(&mut self) -> Result<()> {
        self.stream.read_exact(&mut [0]).context("The janitor did not start")
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.stream.write_all(&[DONE]));
        drop(self.child.wait());
    }
}

/// The janitor's side.
pub fn run(args: &args::Janitor) -> Result<u8> {
    let terminal = Terminal::remember(stderr());
    // Descriptors of the standard streams cannot be owned, copies of them can.
    let own = |fd: io::Result<OwnedFd>| fd.context("Cannot use an inherited descriptor");
    let mut composer = UnixStream::from(own(stdin().as_fd().try_clone_to_owned())?);
    let dir = File::from(own(io::stdout().as_fd().try_clone_to_owned())?);
    if !dir.metadata().context("Cannot look at the runtime directory")?.is_dir() {
        bail!("The janitor is started by `outboard run` only");
    }
    confine()?;
    composer.write_all(&[READY]).context("Cannot reach the composer")?;
    let mut word = [0];
    if composer.read(&mut word).unwrap_or(0) == 1 && word == [DONE] {
        // The composer has put the terminal back itself; somebody else may have changed it since.
        std::mem::forget(terminal);
        return Ok(0);
    }
    clean(&args.dir, &dir, terminal);
    Ok(0)
}

fn clean(path: &Path, dir: &File, terminal: Option<Terminal>) {
    drop(terminal);
    for _ in 0..ATTEMPTS {
        if runtime::remove_stale(path, dir) {
            return;
        }
        // The dead composer's lock may outlive its end of our socket by a moment.
        thread::sleep(PAUSE);
    }
}

fn confine() -> Result<()> {
    // Fails only where we lead a session already, which is as good.
    let _leads_one_already = setsid();
    set_no_new_privs(true).context("Cannot give up new privileges")?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .context("Cannot drop capabilities")?;
    Filter::new(&[RULES])?.install()?;
    Ok(())
}
