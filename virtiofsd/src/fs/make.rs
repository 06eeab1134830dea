//! Requests that make a file, or a name for one.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, linkat, makedev, mkdirat, mknodat, openat2, symlinkat, unlinkat};
use rustix::io::Errno;

use crate::abi::init;
use crate::fs::file::Opened;
use crate::fs::{Done, Io, Outcome, Share, Thread};
use crate::reply;
use crate::request::{Label, Name, Request};
use crate::tree::node::Kind;
use crate::tree::{Found, look};
use crate::xattrmap::Room;

/// Permissions.
const MODE: u32 = 0o7777;

impl Share {
    /// The thread becomes the user for whom something is made.
    fn as_user(&self, thread: &mut Thread, request: &Request<'_>, umask: u32) -> Result<(), Errno> {
        let uid = self.owners.uids.to_host(request.uid)?;
        let gid = self.owners.gids.to_host(request.gid)?;
        // A group that is none here gives no rights here.
        let group = request.group.and_then(|group| self.owners.gids.to_host(group).ok());
        // A guest that leaves it to us does so because a list of the directory may say something else.
        thread.credentials.mask(if self.agreed(init::DONT_MASK) { umask } else { 0 });
        thread.credentials.become_user(uid, gid, group)
    }

    pub(super) fn make_dir(
        &self,
        thread: &mut Thread,
        request: &Request<'_>,
        name: Name<'_>,
        (mode, umask): (u32, u32),
        io: Io<'_>,
    ) -> Outcome {
        let dir = self.tree.directory(request.node)?;
        self.as_user(thread, request, umask)?;
        mkdirat(&dir, name.as_c_str(), Mode::from_raw_mode(mode & MODE))?;
        self.label_name(request, &dir, name, Kind::DIRECTORY)?;
        io.answer(&self.enter(request.node, &dir, name)?)
    }

    pub(super) fn make_node(
        &self,
        thread: &mut Thread,
        request: &Request<'_>,
        name: Name<'_>,
        (mode, device, umask): (u32, u32, u32),
        io: Io<'_>,
    ) -> Outcome {
        let dir = self.tree.directory(request.node)?;
        self.as_user(thread, request, umask)?;
        let kind = match mode & libc::S_IFMT {
            0 => FileType::RegularFile,
            kind => FileType::from_raw_mode(kind),
        };
        if !matches!(
            kind,
            FileType::RegularFile | FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice
        ) {
            return Err(Errno::INVAL);
        }
        let device = makedev((device & 0xf_ff00) >> 8, (device & 0xff) | ((device >> 12) & 0xf_ff00));
        mknodat(&dir, name.as_c_str(), kind, Mode::from_raw_mode(mode & MODE), device)?;
        let kind = Kind::of(u16::try_from(kind.as_raw_mode()).unwrap_or_default());
        self.label_name(request, &dir, name, kind)?;
        io.answer(&self.enter(request.node, &dir, name)?)
    }

    pub(super) fn symlink(
        &self,
        thread: &mut Thread,
        request: &Request<'_>,
        name: Name<'_>,
        target: &CStr,
        io: Io<'_>,
    ) -> Outcome {
        let dir = self.tree.directory(request.node)?;
        self.as_user(thread, request, 0)?;
        symlinkat(target, &dir, name.as_c_str())?;
        self.label_name(request, &dir, name, Kind::SYMLINK)?;
        io.answer(&self.enter(request.node, &dir, name)?)
    }

    pub(super) fn create(
        &self,
        thread: &mut Thread,
        request: &Request<'_>,
        name: Name<'_>,
        (flags, mode, umask): (u32, u32, u32),
        io: Io<'_>,
    ) -> Outcome {
        let dir = self.tree.directory(request.node)?;
        self.as_user(thread, request, umask)?;
        let how = self.flags(flags) | OFlags::CREATE | OFlags::EXCL;
        let file = match openat2(&dir, name.as_c_str(), how, Mode::from_raw_mode(mode & MODE), self.tree.resolve()) {
            Ok(file) => file,
            Err(Errno::EXIST) if flags.cast_signed() & libc::O_EXCL == 0 => {
                return self.open_existing(thread, request, name, flags, io);
            }
            Err(errno) => return Err(errno),
        };
        self.label(request, &file, Kind::REGULAR).inspect_err(|_| remove(&dir, name, Kind::REGULAR))?;
        let stat = look(&file, c"")?;
        let identity = self.tree.identify_open(&stat, &file)?;
        let found = Found { identity, kind: Kind::REGULAR, parent: request.node, name };
        let entry = self.introduce(&stat, &found, (&file, c""))?;
        self.hand_out(&entry, Opened { file, stat, flags }, io)
    }

    /// The guest did not know that there is such a file: whether this user may open it was not asked there.
    fn open_existing(&self, thread: &mut Thread, request: &Request<'_>, name: Name<'_>, flags: u32, io: Io<'_>) -> Outcome {
        let dir = self.tree.directory(request.node)?;
        let stat = look(&dir, name.as_c_str())?;
        if Kind::of(stat.stx_mode) != Kind::REGULAR {
            return Err(Errno::EXIST);
        }
        let writes = flags.cast_signed() & libc::O_TRUNC != 0;
        let mask = match flags.cast_signed() & libc::O_ACCMODE {
            libc::O_RDONLY => 4,
            libc::O_WRONLY => 2,
            _ => 6,
        };
        if !self.may(&stat, request, mask | if writes { 2 } else { 0 }) {
            return Err(Errno::ACCESS);
        }
        let entry = self.enter(request.node, &dir, name)?;
        let node = node_of(&entry);
        let opened = self.open_file(thread, node, (flags, 0), io);
        if let Ok(Some(opened)) = opened {
            return self.hand_out(&entry, opened, io);
        }
        self.tree.forget(node, 1);
        opened.map(|_| Done::Slow)
    }

    /// The answer to a request that makes and opens a file.
    fn hand_out(&self, entry: &[u8; 128], opened: Opened, io: Io<'_>) -> Outcome {
        let node = node_of(entry);
        let open = self.register(node, opened).inspect_err(|_| self.tree.forget(node, 1))?;
        let mut answer = [0; 144];
        let (first, second) = answer.split_at_mut(128);
        first.copy_from_slice(entry);
        second.copy_from_slice(&open);
        io.answer(&answer)
    }

    pub(super) fn make_nameless(
        &self,
        thread: &mut Thread,
        request: &Request<'_>,
        (flags, mode, umask): (u32, u32, u32),
        io: Io<'_>,
    ) -> Outcome {
        let dir = self.tree.directory(request.node)?;
        self.as_user(thread, request, umask)?;
        let flags = flags & !libc::O_EXCL.cast_unsigned();
        let how = (self.flags(flags) - OFlags::NOFOLLOW) | OFlags::TMPFILE;
        let file = openat2(&dir, c".", how, Mode::from_raw_mode(mode & MODE), self.tree.resolve())?;
        self.label(request, &file, Kind::REGULAR)?;
        let stat = look(&file, c"")?;
        let identity = self.tree.identify_open(&stat, &file)?;
        let copy = rustix::io::fcntl_dupfd_cloexec(&file, 3)?;
        let node = self.tree.refer_nameless(identity, request.node, copy)?;
        let entry = reply::entry(node, 0, &self.attributes(&stat, false), self.timeouts(request.node, node));
        self.hand_out(&entry, Opened { file, stat, flags }, io)
    }

    /// What was made under a name gets its label, or is taken away again.
    fn label_name(&self, request: &Request<'_>, dir: &OwnedFd, name: Name<'_>, kind: Kind) -> Result<(), Errno> {
        if request.label.is_none() {
            return Ok(());
        }
        let path = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat2(dir, name.as_c_str(), path, Mode::empty(), self.tree.resolve());
        opened.and_then(|file| self.label(request, &file, kind)).inspect_err(|_| remove(dir, name, kind))
    }

    /// The same of what is open, whatever is said of it then.
    fn label(&self, request: &Request<'_>, file: &OwnedFd, kind: Kind) -> Result<(), Errno> {
        let Some(Label { name, value }) = request.label else { return Ok(()) };
        let mut room = [0; size_of::<Room>()];
        let name = self.xattr_name(name, &mut room)?;
        self.set_attribute(file, kind, (name, value), 0)
    }

    pub(super) fn link(&self, to: u64, old: u64, name: Name<'_>, io: Io<'_>) -> Outcome {
        let dir = self.tree.directory(to)?;
        let fd = self.tree.fd(old)?;
        // The file itself, whatever name it has by now, or none.
        let (magic, number) = self.magic.name(fd.as_fd());
        linkat(magic, number.as_c_str(), &dir, name.as_c_str(), AtFlags::SYMLINK_FOLLOW)?;
        io.answer(&self.enter(to, &dir, name)?)
    }
}

/// Takes away what was made a moment ago.
fn remove(dir: &OwnedFd, name: Name<'_>, kind: Kind) {
    let how = if kind == Kind::DIRECTORY { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    let _somebody_else_has = unlinkat(dir, name.as_c_str(), how);
}

/// The number of the inode that an answer introduces.
fn node_of(entry: &[u8; 128]) -> u64 {
    entry.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
