//! `outboard-evil-server`: a file server that has been taken over. It is confined as one is, with a share and other users than its
//! own, makes a file in the name of one of them, and tries one way out.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use daemon::rules::RUNTIME;
use daemon::{Arguments, Base, Startup};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use sandbox::{
    Access, Capability, Detach, IdRange, Identity, IdentityKind, Limits, Needs, Policy, Reach, Rule, When, allow, allow_if,
    detach, lower, raise,
};

/// The descriptor that is none: the current directory.
const HERE: u32 = libc::AT_FDCWD.cast_unsigned();

/// The role of the thread that opens files.
const SERVE: &str = "serve";

const FILES: &[Rule] = &[
    allow_if(libc::SYS_openat2, &[When::Not(0, HERE)], "files beneath the share"),
    allow(libc::SYS_setresuid, "in whose name"),
    allow(libc::SYS_capget, "what the thread has in force of its capabilities"),
    allow(libc::SYS_capset, "less of it"),
];

const POLICY: Policy = Policy {
    name: "outboard-evil-server",
    limits: Limits { descriptors: 64, threads: 4 },
    capabilities: &[Capability::CAP_CHOWN, Capability::CAP_SETUID],
    control: &[RUNTIME],
    threads: &[(SERVE, &[RUNTIME, FILES])],
};

/// What is tried besides serving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Nothing
    #[default]
    None,
    /// A path that begins in the current directory
    Here,
    /// A system call that is in no filter
    Chroot,
}

/// A file server that has been taken over.
#[derive(Clone, Debug, Parser)]
#[command(name = "outboard-evil-server", version)]
struct Args {
    /// What it shares
    #[arg(long, value_name = "PATH")]
    shared_dir: PathBuf,
    /// The users and groups it has, besides its own: the first inside, the first outside, and how many
    #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT", value_parser = range)]
    map: Vec<IdRange>,
    /// It has the host's users
    #[arg(long, conflicts_with = "map")]
    host: bool,
    /// In whose name the file is made
    #[arg(long, value_name = "UID", default_value_t = 0)]
    user: u32,
    /// Descriptors it may hold
    #[arg(long, value_name = "NUMBER")]
    rlimit_nofile: Option<u64>,
    /// What it tries
    #[arg(long, value_enum, default_value_t)]
    way: Way,
    #[command(flatten)]
    base: Base,
}

fn range(text: &str) -> std::result::Result<IdRange, String> {
    let numbers: Vec<u32> = text.split(':').filter_map(|number| number.parse().ok()).collect();
    let [inside, outside, count] = *numbers else { return Err("not three numbers".to_owned()) };
    Ok(IdRange { inside, outside, count })
}

impl Arguments for Args {
    fn base(&self) -> &Base {
        &self.base
    }

    fn identity(&self) -> Result<Identity> {
        Ok(match (self.host, self.map.as_slice()) {
            (true, _) => Identity::Host,
            (false, []) => Identity::Own,
            (false, map) => Identity::Ranges { uids: map.to_vec(), gids: map.to_vec() },
        })
    }
}

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: Startup<Args>| {
        let args = startup.args().clone();
        let share = detach(CWD, &args.shared_dir, Detach::default())
            .with_context(|| format!("Cannot share {}", args.shared_dir.display()))?;
        // One user can be nobody else, and needs no right to.
        let keep: &[Capability] = if startup.identity() == IdentityKind::Own { &[] } else { POLICY.capabilities };
        let reach = [Reach { root: share.root.as_fd(), access: Access::ReadWrite }];
        let confined =
            startup.confine_with(&Needs { reach: &reach, keep: Some(keep), descriptors: args.rlimit_nofile, threads: None })?;
        let body = move || {
            println!("{}", serve(&share.root, &args));
            // The end of a thread takes calls that no filter has.
            loop {
                let _nothing_to_wait_for = poll(&mut [], None);
            }
        };
        confined.spawn(SERVE, SERVE.to_owned(), body)?;
        confined.run(|stop| {
            while poll(&mut [PollFd::from_borrowed_fd(stop, PollFlags::IN)], None).is_err() {}
            Ok(0)
        })
    })
}

/// Makes a file as a server does, and goes wrong ways. What came of it.
fn serve(root: &OwnedFd, args: &Args) -> String {
    match args.way {
        Way::None => {}
        Way::Here => drop(openat2(CWD, "etc", OFlags::PATH, Mode::empty(), ResolveFlags::empty())),
        Way::Chroot => drop(rustix::process::chroot("/")),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE;
    let made = become_user(args.user)
        .and_then(|()| openat2(root, "made", flags, Mode::from(0o600), ResolveFlags::BENEATH).context("Cannot make the file"));
    made.map_or_else(|error| format!("{error:#}"), |_| "made".to_owned())
}

fn become_user(user: u32) -> Result<()> {
    if user != 0 {
        set_thread_res_uid(None, Some(Uid::from_raw(user)), None).context("Cannot be another user")?;
        lower(&[Capability::CAP_CHOWN])?;
        raise(&[Capability::CAP_CHOWN])?;
    }
    Ok(())
}
