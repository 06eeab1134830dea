//! Why a process cannot be confined, and what its user can do about it.

use std::io;

use rustix::io::Errno;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// One step of the sequence failed.
    #[error("Cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A namespace could not be had.
    #[error("Cannot create user namespaces; this host restricts them ({hint})")]
    UserNamespaces {
        /// Where to look.
        hint: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel is older than the floor.
    #[error(
        "This kernel lacks {missing}, which the sandbox needs; use a newer kernel, or accept less with --sandbox-floor {lower}"
    )]
    Floor {
        /// What is missing.
        missing: String,
        /// The floor this kernel reaches.
        lower: String,
    },
    /// Not even the lowest floor.
    #[error("This kernel lacks {0}, without which there is no sandbox")]
    TooOld(String),
    /// Landlock refused.
    #[error("Cannot enter the Landlock domain")]
    Landlock(#[source] landlock::RulesetError),
    /// A capability could not be given up.
    #[error("Cannot give up capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// A filter could not be made or installed.
    #[error("Cannot install the system call filter")]
    Filter(#[source] seccompiler::Error),
    /// A filter's rules are wrong.
    #[error("The system call filter is wrong")]
    Rules(#[source] seccompiler::BackendError),
    /// A mistake in a program's policy.
    #[error("The policy has no thread {0}")]
    NoSuchThread(String),
    /// A mistake in a program, as above.
    #[error("The policy does not leave the process {0}")]
    NotInPolicy(String),
    /// More descriptors than may be had.
    #[error(
        "Cannot hold {wanted} descriptors, since the hard limit is {hard}; raise it (ulimit -Hn, LimitNOFILE= of a service), or ask \
         for fewer"
    )]
    Descriptors {
        /// How many were asked for.
        wanted: u64,
        /// How many the process may have.
        hard: u64,
    },
    /// The program that maps users for those who are not root is missing.
    #[error(
        "Several users and groups are mapped with {helper}, which is not in PATH; install it (package uidmap of Debian), and let \
         {grants} grant you the range"
    )]
    NoMapHelper {
        /// Its name.
        helper: &'static str,
        /// Where it looks what may be mapped.
        grants: &'static str,
    },
    /// It is there, and refused.
    #[error("{helper} refuses the map ({said}); let {grants} grant you the range")]
    MapRefused {
        /// Its name.
        helper: &'static str,
        /// Where it looks what may be mapped.
        grants: &'static str,
        /// Its reason.
        said: String,
    },
    /// Ranges without a user or group to start as.
    #[error("The maps of users and groups do not say who 0 is, as which the program starts; map it, too")]
    NobodyIsZero,
    /// The host's users are asked for by somebody else.
    #[error("Only root can start a program that is to have the host's own users; start it as root, or map a range of users")]
    NotRoot,
    /// A mistake in a program: a network is joined by way of the user namespace that owns it.
    #[error("Only a program that is its caller's own user can join a machine's network")]
    NetOfOthers,
    /// An argument that cannot be passed on.
    #[error("An argument has a zero byte in it")]
    Argument,
}

impl Error {
    pub(crate) fn step(step: &'static str) -> impl FnOnce(Errno) -> Error {
        move |errno| Error::Step { step, source: errno.into() }
    }
}
