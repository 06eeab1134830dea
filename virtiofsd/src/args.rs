//! The arguments of `outboard-virtiofsd`, and what they mean. They are those of the virtiofsd that people know, and a few more.

use std::ffi::{CStr, OsString};
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::{ArgAction, Parser, ValueEnum};
use daemon::{Arguments, Base, Capabilities, Socket};
use rustix::process::{Resource, geteuid, getrlimit};
use sandbox::{IdRange, Identity, IdentityKind};
use virtio::limit::Rate;

use crate::fs::{Cache, Settings};
use crate::owner::{Ids, Owners};
use crate::sandbox::OWN_DESCRIPTORS;
use crate::xattrmap::XattrMap;

mod also;
mod compat;
mod migration;
mod refused;
mod translate;

pub use also::Also;
use migration::Migration;
use refused::Refused;
use translate::{Map, Translation};

/// Most request queues. A guest uses one for each vCPU; more only cost threads.
pub const MAX_QUEUES: u16 = 16;

/// Most shares of one process.
pub const MAX_SHARES: usize = 16;

/// Most threads for what may have to wait.
pub const MAX_POOL: u16 = 64;

/// Bytes of a tag.
pub const TAG: usize = 36;

/// Threads for what may have to wait, unless told otherwise: as many operations can wait for a disk at once.
const POOL: u16 = 4;

/// Descriptors that are kept for inodes, unless told otherwise. Any number of inodes is served with so many.
const CACHED: u64 = 4096;

/// Most inodes that a guest may know at once, unless told otherwise: about half a gigabyte.
const MAX_INODES: u32 = 4 << 20;

/// As long as anybody could want.
const FOR_EVER: Duration = Duration::from_secs(86400);

/// As long as a change of the host may stay unseen, where changes are rare.
const A_WHILE: Duration = Duration::from_secs(60);

/// Shares a directory of this host with a virtual machine (virtio-fs over vhost-user).
#[derive(Debug, Parser)]
#[command(
    name = "outboard-virtiofsd",
    version,
    override_usage = "outboard-virtiofsd [OPTIONS] --shared-dir <PATH> <--socket-path <PATH>|--fd <FD>>\n       outboard-virtiofsd --print-capabilities"
)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    /// Members of this group, by name or number, may connect to the socket of --socket-path
    #[arg(long, value_name = "GROUP", conflicts_with = "fd")]
    pub socket_group: Option<String>,
    /// The directory, or a single file
    #[arg(long, value_name = "PATH", required_unless_present = "shared_fd")]
    pub shared_dir: Option<PathBuf>,
    /// The same, as a descriptor: a mount that is attached nowhere, perhaps with ids mapped
    #[arg(long, value_name = "FD", conflicts_with = "shared_dir", value_parser = clap::value_parser!(i32).range(3..))]
    pub shared_fd: Option<RawFd>,
    /// The name by which the guest mounts it, up to 36 bytes. Where the VMM has one of its own, that counts
    #[arg(long, value_name = "TAG", value_parser = tag)]
    pub tag: Option<String>,
    /// What the guest keeps: nothing, what is known of files, that and data for a second, everything
    #[arg(long, value_enum, value_name = "POLICY", default_value = "auto")]
    pub cache: CachePolicy,
    /// Seconds for which the guest believes what it knows, in place of those that come with --cache
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Seconds for which the guest believes that something is not there. Without it, it asks each time
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub negative_timeout: Option<Duration>,
    /// Where this host changes something, the guest believes what it is told for a short time only; elsewhere for as long as --timeout
    /// says (with --cache metadata or always: a minute, unless it says otherwise)
    #[arg(long)]
    pub watch: bool,
    /// Nothing can be changed
    #[arg(long)]
    pub readonly: bool,
    /// Extended attributes
    #[arg(long)]
    pub xattr: bool,
    /// Names of extended attributes that are others on the host: ':map:KEY:PREPEND:', or rules, one after the other, of
    /// ':prefix|ok|bad|unsupported:client|server|all:KEY:PREPEND:'. With --xattr
    #[arg(long, value_name = "RULES")]
    pub xattrmap: Option<XattrMap>,
    /// Access control lists. With --xattr
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "always")]
    pub posix_acl: Option<Choice>,
    /// New files have the labels of the guest's security module (SELinux) from the start. With --xattr; mostly with --xattrmap
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "always")]
    pub security_label: Option<Choice>,
    /// The guest collects what is written
    #[arg(long)]
    pub writeback: bool,
    /// The guest may pass this host's page cache by (O_DIRECT)
    #[arg(long)]
    pub allow_direct_io: bool,
    /// Files may be mapped also where the guest keeps no data (--cache never or metadata)
    #[arg(long)]
    pub allow_mmap: bool,
    /// Mounts in the directory show as mounts in the guest (this is so)
    #[arg(long, overrides_with = "no_announce_submounts")]
    pub announce_submounts: bool,
    /// They show as directories
    #[arg(long)]
    pub no_announce_submounts: bool,
    /// Mounts in the directory are not shared
    #[arg(long)]
    pub no_submounts: bool,
    /// Directories are read by their names alone
    #[arg(long)]
    pub no_readdirplus: bool,
    /// The guest says when set-user-id bits are to go, and otherwise keeps them
    #[arg(long, overrides_with = "no_killpriv_v2")]
    pub killpriv_v2: bool,
    /// They go with each write (this is so)
    #[arg(long)]
    pub no_killpriv_v2: bool,
    /// Where locks of the guest's programs are kept: in the guest, where only it respects them; or as locks of this host
    #[arg(long, value_enum, value_name = "WHERE", default_value = "guest")]
    pub locks: Locks,
    /// A guest's user who does not want the time of access changed is obeyed
    #[arg(long)]
    pub preserve_noatime: bool,
    /// Whose files are whose. me: mine are the guest's root's, or those of the user of that number. squash: all are. exact: each user
    /// is the same one here (as root), or one of my subordinate ids
    #[arg(long, value_name = "me[=ID]|squash[=ID]|exact", value_parser = owner_map, conflicts_with_all = ["uid_map", "gid_map", "translate_uid", "translate_gid"])]
    pub owner_map: Option<OwnerMap>,
    /// Users of the process's namespace: ':inside:outside:count:'
    #[arg(long, value_name = "MAP", value_parser = translate::map)]
    pub uid_map: Vec<Map>,
    /// Groups of it
    #[arg(long, value_name = "MAP", value_parser = translate::map)]
    pub gid_map: Vec<Map>,
    /// Who a user is on the other side: guest|host:FROM:TO:COUNT, map:GUEST:HOST:COUNT, squash-guest|squash-host:FROM:TO:COUNT,
    /// forbid-guest:FROM:COUNT
    #[arg(long, value_name = "RULE", value_parser = translate::translation)]
    pub translate_uid: Vec<Translation>,
    /// Which group a group is on the other side
    #[arg(long, value_name = "RULE", value_parser = translate::translation)]
    pub translate_gid: Vec<Translation>,
    /// Request queues, each with a thread of its own: as many as the guest has vCPUs. Otherwise as many as this host has, up to 16
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub num_request_queues: Option<u16>,
    /// Threads for what may have to wait, for all queues; 0: as many as is good
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=i64::from(MAX_POOL)))]
    pub thread_pool_size: u16,
    /// Descriptors the process may have: those for open files, and up to 4096 for inodes. Otherwise a million, or what is allowed
    #[arg(long, value_name = "N")]
    pub rlimit_nofile: Option<u64>,
    /// Whether inodes are reached by handles of their file system, so that renaming on the host does not lose them. It takes root
    #[arg(long, value_enum, value_name = "WHEN", default_value = "never")]
    pub inode_file_handles: FileHandles,
    /// Most inodes that the guest may know at once
    #[arg(long, value_name = "N", default_value_t = MAX_INODES, value_parser = clap::value_parser!(u32).range(1024..=1 << 30))]
    pub max_inodes: u32,
    /// Most requests in a second, and how many at once after a pause: OPS or OPS:BURST
    #[arg(long, value_name = "OPS[:BURST]")]
    pub limit_ops: Option<Rate>,
    /// Most bytes read and written in a second, and how many at once after a pause: BYTES or BYTES:BURST
    #[arg(long, value_name = "BYTES[:BURST]")]
    pub limit_bytes: Option<Rate>,
    /// Longest look at an empty ring before going to sleep, in microseconds; 0 to 50. It is as short as pays. Looks in vain take a
    /// fifth of a processor at most, and none when nothing is asked; who asks without pause finds this awake
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, value_parser = clap::value_parser!(u16).range(0..=50))]
    pub poll_limit: u16,
    /// A page in which a successor of this process finds what was agreed on with the guest
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(3..))]
    pub session_fd: Option<RawFd>,
    /// The log goes to the host's (/dev/log) instead of standard error
    #[arg(long)]
    pub syslog: bool,
    /// One more share in the same process, with a socket of its own: path=DIR,socket=PATH or fd=FD, and perhaps tag=NAME and readonly. The
    /// other options are about each
    #[arg(long, value_name = "path=DIR,socket=PATH|fd=FD[,tag=NAME][,readonly]", conflicts_with = "session_fd")]
    pub also: Vec<Also>,
    #[command(flatten)]
    migration: Migration,
    #[command(flatten)]
    refused: Refused,
    /// What is accepted as guest memory
    #[command(flatten)]
    pub memory: vhost_user::args::MemoryArgs,
    #[command(flatten)]
    base: Base,
    /// Ignored: the process always stays in the foreground
    #[arg(short = 'f', action = ArgAction::SetTrue, hide = true)]
    _foreground: bool,
}

/// What a guest keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CachePolicy {
    /// Nothing
    Never,
    /// What is known of files, but no data
    Metadata,
    /// All, for a second; data until a file is opened again
    Auto,
    /// All, for as long as there is room: only where nobody else changes the directory
    Always,
}

/// Whether something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// It is
    Always,
    /// It is, if the guest can
    Auto,
    /// It is not
    Never,
}

/// Where locks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Locks {
    /// In the guest
    Guest,
    /// Here: other guests and programs respect them. A guest that waits for one cannot be interrupted by its user, as Linux has it
    Host,
}

/// Whether inodes are reached by file handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileHandles {
    /// No: by their names
    Never,
    /// Where the file system and the process's rights allow it
    Prefer,
    /// Yes, or the process does not start
    Mandatory,
}

/// Whose files are whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerMap {
    /// Mine are those of this user of the guest.
    Me(u32),
    /// All are those of this user of the guest.
    Squash(u32),
    /// Each is the same.
    Exact,
}

fn tag(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("it is empty".to_owned()),
        1..=TAG => Ok(text.to_owned()),
        _ => Err(format!("longer than {TAG} bytes")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "not a number of seconds".to_owned()).map(|time| time.min(FOR_EVER))
}

fn owner_map(text: &str) -> Result<OwnerMap, String> {
    let (preset, id) = text.split_once('=').map_or((text, None), |(preset, id)| (preset, Some(id)));
    let number = || match id {
        None => Ok(0),
        Some(id) => id.parse::<u32>().ok().filter(|id| *id != u32::MAX).ok_or_else(|| format!("{id:?} is no user's number")),
    };
    match (preset, id) {
        ("me", _) => number().map(OwnerMap::Me),
        ("squash", _) => number().map(OwnerMap::Squash),
        ("exact", None) => Ok(OwnerMap::Exact),
        _ => Err("neither me, nor squash, nor exact".to_owned()),
    }
}

impl Arguments for Args {
    const CAPABILITIES: Option<Capabilities> = Some(Capabilities { kind: "fs", features: &["separate-options"] });

    fn words(words: Vec<OsString>) -> Result<Vec<OsString>, String> {
        compat::words(words)
    }

    fn base(&self) -> &Base {
        &self.base
    }

    fn socket(&self) -> Option<&Socket> {
        Some(&self.socket)
    }

    fn syslog(&self) -> bool {
        self.syslog
    }

    fn socket_group(&self) -> Option<&str> {
        self.socket_group.as_deref()
    }

    fn more_sockets(&self) -> Vec<Socket> {
        self.also.iter().map(Also::socket).collect()
    }

    fn inherited(&self) -> Vec<RawFd> {
        [self.shared_fd, self.session_fd].into_iter().flatten().collect()
    }

    /// Root is everybody, whoever else is one user, unless told otherwise.
    fn identity(&self) -> Result<Identity> {
        self.refused.check()?;
        self.migration.check()?;
        if !self.uid_map.is_empty() || !self.gid_map.is_empty() {
            let ranges = |maps: &[Map], own: u32| -> Vec<IdRange> {
                let range = |map: &Map| IdRange { inside: map.inside, outside: map.outside, count: map.count };
                if maps.is_empty() {
                    vec![IdRange { inside: 0, outside: own, count: 1 }]
                } else {
                    maps.iter().map(range).collect()
                }
            };
            let gid = rustix::process::getegid().as_raw();
            return Ok(Identity::Ranges { uids: ranges(&self.uid_map, geteuid().as_raw()), gids: ranges(&self.gid_map, gid) });
        }
        match (self.owner_map, geteuid().is_root()) {
            (Some(OwnerMap::Me(_) | OwnerMap::Squash(_)), _) | (None, false) => Ok(Identity::Own),
            (Some(OwnerMap::Exact) | None, true) => Ok(Identity::Host),
            (Some(OwnerMap::Exact), false) => translate::subordinate(),
        }
    }
}

/// What is shared.
#[derive(Clone, Debug)]
pub enum Place {
    /// What is there.
    Path(PathBuf),
    /// What this descriptor refers to.
    Given(RawFd),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Path(path) => write!(f, "{}", path.display()),
            Place::Given(fd) => write!(f, "what descriptor {fd} refers to"),
        }
    }
}

/// What the arguments mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is shared.
    pub place: Place,
    /// With what is mounted in it.
    pub submounts: bool,
    /// It is watched what the host changes there.
    pub watch: bool,
    /// Its name.
    pub tag: Option<String>,
    /// How it is shared.
    pub settings: Settings,
    /// Whether inodes are reached by handles.
    pub file_handles: FileHandles,
    /// Whose files are whose.
    pub owners: Owners,
    /// Request queues.
    pub queues: u16,
    /// Threads for what may have to wait.
    pub pool: u16,
    /// Descriptors in all.
    pub descriptors: u64,
    /// Those that are kept for inodes.
    pub cached_descriptors: u64,
    /// Those of files that have no name any more.
    pub max_nameless: u64,
    /// Most open files and directories.
    pub max_handles: u32,
    /// Most inodes.
    pub max_inodes: u32,
    /// Requests in a second.
    pub operations: Rate,
    /// Bytes in a second.
    pub bytes: Rate,
    /// Longest look at an empty ring.
    pub poll: Duration,
}

impl Config {
    /// What the arguments mean for each share of a process that is one user, or `several`.
    ///
    /// # Errors
    /// When they do not fit together.
    pub fn all(args: &Args, several: bool) -> Result<Vec<Config>> {
        let first = Config::new(args, several)?;
        ensure!(args.also.len() < MAX_SHARES, "--also: a process has at most {MAX_SHARES} shares");
        let others = args.also.iter().map(|also| also.like(&first)).collect::<Vec<_>>();
        Ok([first].into_iter().chain(others).collect())
    }

    /// What the arguments mean for a process that is one user, or `several`.
    ///
    /// # Errors
    /// When they do not fit together.
    pub fn new(args: &Args, several: bool) -> Result<Config> {
        args.refused.check()?;
        let place = match (&args.shared_dir, args.shared_fd) {
            (_, Some(fd)) => Place::Given(fd),
            (path, None) => Place::Path(path.clone().unwrap_or_default()),
        };
        let translated = !args.translate_uid.is_empty() || !args.translate_gid.is_empty();
        let settings = settings(args)?;
        ensure!(
            !(translated && settings.posix_acl),
            "--translate-uid and --translate-gid cannot be used with --posix-acl: ids in access control lists are not translated"
        );
        // Nobody else has the right to handles once confined, whatever may be possible until then.
        let host = args.base.identity == IdentityKind::Host;
        let file_handles = match args.inode_file_handles {
            FileHandles::Mandatory if !host => {
                bail!("--inode-file-handles mandatory takes root as itself, with the host's users (--owner-map exact)")
            }
            FileHandles::Prefer if !host => FileHandles::Never,
            how => how,
        };
        let descriptors = descriptors(args)?;
        let shares = args.shares();
        let left = (descriptors / shares).saturating_sub(OWN_DESCRIPTORS);
        let (cached, nameless) = ((left / 4).min(CACHED), left / 4);
        let files = left.saturating_sub(cached).saturating_sub(nameless);
        Ok(Config {
            place,
            submounts: !args.no_submounts,
            watch: args.watch,
            tag: args.tag.clone(),
            settings,
            file_handles,
            owners: owners(args, several),
            queues: args.num_request_queues.unwrap_or_else(processors),
            pool: if args.thread_pool_size == 0 { POOL } else { args.thread_pool_size },
            descriptors,
            cached_descriptors: cached,
            max_nameless: nameless,
            max_handles: u32::try_from(files).unwrap_or(u32::MAX),
            max_inodes: args.max_inodes,
            operations: args.limit_ops.unwrap_or_default(),
            bytes: args.limit_bytes.unwrap_or_default(),
            poll: Duration::from_micros(args.poll_limit.into()),
        })
    }
}

impl Args {
    /// How many there are.
    fn shares(&self) -> u64 {
        u64::try_from(self.also.len()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

fn processors() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors).unwrap_or(MAX_QUEUES).min(MAX_QUEUES)
}

/// The least with which something can be done, for each share.
const FEWEST: u64 = OWN_DESCRIPTORS + 192;

/// Descriptors that are asked for where nothing was said.
const MANY: u64 = 1_000_000;

fn descriptors(args: &Args) -> Result<u64> {
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(MANY);
    let wanted = args.rlimit_nofile.filter(|wanted| *wanted != 0).unwrap_or_else(|| hard.min(MANY));
    let fewest = FEWEST * args.shares();
    ensure!(wanted >= fewest, "{wanted} descriptors are too few: at least {fewest} are needed (--rlimit-nofile, ulimit -n)");
    Ok(wanted)
}

fn owners(args: &Args, several: bool) -> Owners {
    if !args.translate_uid.is_empty() || !args.translate_gid.is_empty() {
        return Owners { uids: translate::ids(&args.translate_uid), gids: translate::ids(&args.translate_gid) };
    }
    let both = |ids: Ids| Owners { uids: ids.clone(), gids: ids };
    match args.owner_map {
        Some(OwnerMap::Squash(id)) => both(Ids::squash(id)),
        Some(OwnerMap::Me(id)) => both(Ids::me(id)),
        None if !several => both(Ids::me(0)),
        None | Some(OwnerMap::Exact) => Owners::default(),
    }
}

/// Names of access control lists.
const LISTS: [&CStr; 2] = [c"system.posix_acl_access", c"system.posix_acl_default"];

fn settings(args: &Args) -> Result<Settings> {
    let cache = match args.cache {
        CachePolicy::Never => Cache::Never,
        CachePolicy::Metadata => Cache::Metadata,
        CachePolicy::Auto => Cache::Auto,
        CachePolicy::Always => Cache::Always,
    };
    let timeout = match cache {
        Cache::Never => Duration::ZERO,
        Cache::Auto => Duration::from_secs(1),
        // What was told already stays believed, whatever changes then.
        Cache::Metadata | Cache::Always if args.watch => A_WHILE,
        Cache::Metadata | Cache::Always => FOR_EVER,
    };
    ensure!(!(args.watch && cache == Cache::Never), "--watch needs a guest that keeps something: not with --cache never");
    ensure!(!(args.writeback && cache == Cache::Never), "--writeback needs a guest that keeps data: not with --cache never");
    let posix_acl = matches!(args.posix_acl, Some(Choice::Always | Choice::Auto));
    let security_label = matches!(args.security_label, Some(Choice::Always | Choice::Auto));
    ensure!(
        !posix_acl || args.xattrmap.as_ref().is_none_or(|map| LISTS.iter().all(|list| map.passes(list))),
        "--posix-acl: the host keeps to access control lists only under their own names, which --xattrmap changes. Put /ok/all/system.posix_acl_/system.posix_acl_/ in front of its rules"
    );
    Ok(Settings {
        cache,
        timeout: args.timeout.unwrap_or(timeout),
        negative_timeout: args.negative_timeout.filter(|timeout| !timeout.is_zero()),
        read_only: args.readonly,
        xattr: args.xattr || posix_acl || security_label || args.xattrmap.is_some(),
        xattrmap: args.xattrmap.clone(),
        posix_acl,
        security_label,
        security_label_required: args.security_label == Some(Choice::Always),
        writeback: args.writeback,
        allow_direct_io: args.allow_direct_io,
        allow_mmap: args.allow_mmap,
        announce_submounts: !args.no_announce_submounts,
        killpriv_v2: args.killpriv_v2 && !args.no_killpriv_v2,
        readdirplus: !args.no_readdirplus && cache != Cache::Never,
        locks: args.locks == Locks::Host,
        preserve_noatime: args.preserve_noatime,
        moving: args.migration.moving(),
    })
}
