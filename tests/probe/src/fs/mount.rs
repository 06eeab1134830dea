//! A place in this host's tree for a file system whose requests are read here.

use std::ffi::CString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{getegid, geteuid};

/// What mounts for an ordinary user: it comes with the system's FUSE, and is privileged.
const HELPER: &str = "fusermount3";

/// What the kernel calls it in its list of mounts.
const KIND: &str = "fuse.virtiofs";

/// A mount that was made here.
#[derive(Clone, Debug)]
pub struct Mount {
    /// Where it is.
    pub folder: PathBuf,
    /// Its number in the list of mounts: the folder may be another's by the time that it is unmounted.
    id: String,
    helped: bool,
}

impl Mount {
    /// Mounts on a folder, or, what is a single `file`, on a file, and gives the descriptor that requests are read from, without blocking.
    ///
    /// Nothing on it is a device, and no program on it changes its user: the server is not trusted with this host.
    ///
    /// # Errors
    /// With the folder.
    pub fn new(folder: &Path, file: bool, source: &str) -> Result<(Mount, OwnedFd)> {
        let cannot = || format!("Cannot mount at {}", folder.display());
        let folder = std::fs::canonicalize(folder).with_context(cannot)?;
        if file && !folder.is_file() {
            bail!("Cannot mount at {}: it is no file", folder.display());
        }
        if !file && !folder.is_dir() {
            bail!("Cannot mount at {}: it is no folder", folder.display());
        }
        let (fuse, helped) = match directly(&folder, source) {
            Ok(fuse) => (fuse, false),
            Err(Errno::PERM | Errno::ACCESS) => (through_helper(&folder, source).with_context(cannot)?, true),
            Err(errno) => return Err(errno).with_context(cannot),
        };
        let flags = fcntl_getfl(&fuse).with_context(cannot)?;
        fcntl_setfl(&fuse, flags | OFlags::NONBLOCK).with_context(cannot)?;
        let id = last_at(&folder).with_context(|| format!("The mount at {} is not in the list of mounts", folder.display()))?;
        Ok((Mount { folder, id, helped }, fuse))
    }

    /// Whether it still is where it was put.
    pub fn is_there(&self) -> bool {
        last_at(&self.folder).as_ref() == Some(&self.id)
    }

    /// Takes it out of the tree at once. Files that are open stay so.
    ///
    /// Not to be called by the thread that reads the requests: the kernel may have some to make first.
    pub fn detach(&self) {
        if !self.is_there() {
            return;
        }
        let done = if self.helped {
            let ended = Command::new(HELPER).args(["-u", "-z", "--"]).arg(&self.folder).stdin(Stdio::null()).status();
            ended.is_ok_and(|status| status.success())
        } else {
            unmount(&self.folder, UnmountFlags::DETACH).is_ok()
        };
        if !done && self.is_there() {
            eprintln!("outboard-probe: Cannot unmount {}", self.folder.display());
        }
    }
}

/// As root, also of a user namespace.
fn directly(folder: &Path, source: &str) -> rustix::io::Result<OwnedFd> {
    let fuse = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    let kind = if folder.is_dir() { "40000" } else { "100000" };
    let options =
        format!("fd={},rootmode={kind},user_id={user},group_id={group},default_permissions,allow_other", fuse.as_raw_fd());
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    mount(source, folder, KIND, MountFlags::NOSUID | MountFlags::NODEV, &*options)?;
    Ok(fuse)
}

fn through_helper(folder: &Path, source: &str) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
    // The copy without close-on-exec is the helper's.
    let passed = rustix::io::dup(&theirs).context("Cannot pass a socket on")?;
    let options = format!("default_permissions,nosuid,nodev,fsname={source},subtype=virtiofs");
    let mut command = Command::new(HELPER);
    command.args(["-o", &options, "--"]).arg(folder).env("_FUSE_COMMFD", passed.as_raw_fd().to_string());
    let mut helper = command.stdin(Stdio::null()).spawn().with_context(|| {
        format!("That takes root, {HELPER}, or a user namespace (unshare --user --map-root-user --mount): cannot start {HELPER}")
    })?;
    drop((theirs, passed));
    let fuse = receive(&ours);
    let status = helper.wait().with_context(|| format!("Cannot wait for {HELPER}"))?;
    match fuse {
        Some(fuse) if status.success() => Ok(fuse),
        _ => bail!("{HELPER} did not do it ({status})"),
    }
}

/// The descriptor that the helper sends.
fn receive(socket: &UnixStream) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

/// The number of the mount that is seen at a folder: the last one in the list. The list is read without asking any file system.
fn last_at(folder: &Path) -> Option<String> {
    let list = std::fs::read("/proc/self/mountinfo").ok()?;
    let place = escaped(folder);
    list.split(|byte| *byte == b'\n')
        .filter(|line| line.split(|byte| *byte == b' ').nth(4) == Some(&place))
        .filter_map(|line| line.split(|byte| *byte == b' ').next())
        .map(|id| String::from_utf8_lossy(id).into_owned())
        .next_back()
}

/// A path as the list of mounts has it.
fn escaped(path: &Path) -> Vec<u8> {
    let escape = |byte: &u8| match byte {
        b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
        other => vec![*other],
    };
    path.as_os_str().as_bytes().iter().flat_map(escape).collect()
}
