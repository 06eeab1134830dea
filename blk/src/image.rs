//! The host resource: the image's files, or a block device, opened and locked while there are still paths.
//!
//! What they mean is the crate `image`'s affair; this is how the process comes to them. The first file is the one that is written. It is
//! locked against every other writer and reader, the others against writers, in a way that QEMU's own locks notice and that notices
//! them.
//!
//! A file that is used past the page cache is open twice: the image's own tables are small, and stay in the page cache; data does not.
//! They never meet in one block, since tables and data have clusters of their own.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use image::{FileId, FileStorage, Format, Image, Layer, Options, Storage};
use rustix::fs::{Mode, OFlags, open};
use sandbox::lock_file;

use crate::args::Config;
use crate::direct::Alignment;
use crate::engine::File;
use crate::request::SECTOR;
use crate::shared::Abilities;
use crate::topology::{self, Topology};

/// How long a lock is waited for. A predecessor that was killed may still be on its way out, and so may its last writes, which
/// keep the lock for as long as they take.
const LOCK_TRIES: u32 = 5000;
const LOCK_WAIT: Duration = Duration::from_millis(1);

/// After so many tries the wait is worth a line.
const WORTH_A_LINE: u32 = 500;

/// Smallest cluster whose data may move past the page cache: the image's tables must not share a page with it.
const DIRECT_CLUSTER: u64 = 4096;

/// An image and its files.
#[derive(Debug)]
pub struct Disk {
    image: Arc<Image>,
    /// By which descriptor data of each file moves.
    files: Mutex<Vec<(FileId, File)>>,
    /// Grows when files have gone.
    epoch: AtomicU64,
    topology: Topology,
    direct: Option<Alignment>,
    abilities: Abilities,
    two_files: bool,
    null: bool,
}

impl Disk {
    /// Opens and locks the files, and looks what they are.
    ///
    /// # Errors
    /// With the path: not there, no right to it, in use, or no image.
    pub fn open(config: &Config) -> Result<Disk> {
        if let Some(bytes) = config.null {
            return Disk::null(bytes, config);
        }
        let mut files = Vec::new();
        let mut layers = Vec::new();
        let mut top = None;
        for (depth, link) in config.chain.iter().enumerate() {
            let writable = depth == 0 && !config.read_only;
            let opened = Opened::at(&link.path, writable, config.direct)?;
            let file = opened.storage(&mut files)?;
            let data = match &link.data {
                Some(path) => Some(Opened::at(path, writable, config.direct)?.storage(&mut files)?),
                None => None,
            };
            layers.push(Layer { format: link.format, file, data });
            top = top.or(Some(opened));
        }
        let top = top.context("There is no image")?;
        let name = config.chain.first().map(|link| link.path.display().to_string()).unwrap_or_default();
        let cannot = || format!("Cannot use image {name}");
        let options = Options { writable: !config.read_only, cache_bytes: config.cache_bytes };
        let image = Image::open(&layers, options).with_context(cannot)?;
        if image.size() < SECTOR {
            bail!("Cannot use image {name}: It has less than one sector of {SECTOR} bytes");
        }
        let clusters = image.cluster_size();
        if config.direct && (1..DIRECT_CLUSTER).contains(&clusters) {
            bail!(
                "Cannot use image {name} past the page cache: Its clusters of {clusters} bytes are smaller than {DIRECT_CLUSTER}"
            );
        }
        Ok(Disk {
            topology: top.topology(config),
            direct: config.direct.then(|| topology::alignment(&top.data)),
            abilities: top.abilities(config),
            image,
            files: Mutex::new(files),
            epoch: AtomicU64::new(0),
            two_files: config.chain.first().is_some_and(|link| link.data.is_some()),
            null: false,
        })
    }

    /// A disk of so many bytes that keeps nothing: what is left is what it costs to be asked.
    fn null(bytes: u64, config: &Config) -> Result<Disk> {
        let layer = Layer { format: Format::Raw, file: Arc::new(Nothing(FileId::new(), bytes)), data: None };
        let image = Image::open(&[layer], Options { writable: true, ..Options::default() })?;
        let mut topology = Topology::default();
        config.blocks.apply(&mut topology);
        let abilities = Abilities { read_only: config.read_only, ..Abilities::default() };
        let files = Mutex::default();
        Ok(Disk { image, files, epoch: AtomicU64::new(0), topology, direct: None, abilities, two_files: false, null: true })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Ends its use: what was reserved in it is given back, and it no longer says that it is in use. No ring may run.
    ///
    /// # Errors
    /// The system's. The image is consistent all the same.
    pub fn close(&self) -> Result<()> {
        self.image.close().context("Cannot close the image")
    }

    /// An overlay that somebody else has made, opened and handed in: the file, and perhaps the same past the page cache.
    ///
    /// # Errors
    /// When it is none, or in use.
    pub fn overlay(&self, fds: Vec<OwnedFd>) -> Result<Layer> {
        let mut fds = fds.into_iter();
        let plain = fds.next().context("An overlay has to come with the command, as a descriptor")?;
        let data = match fds.next() {
            Some(past) => past,
            None => plain.try_clone().context("Cannot share the overlay")?,
        };
        lock_file(data.as_fd(), true).context("Cannot lock the overlay")?;
        let file = FileStorage::new(plain).context("Cannot use the overlay")?;
        self.files().push((file.id(), File::new(Arc::new(data))));
        Ok(Layer { format: Format::Qcow2, file: Arc::new(file), data: None })
    }

    /// Closes files that the image does not have any more, or never got.
    pub fn sweep(&self) {
        let kept: Vec<FileId> = self.image.files().iter().map(|file| file.id()).collect();
        self.files().retain(|(id, _)| kept.contains(id));
        self.epoch.fetch_add(1, Ordering::Release);
    }

    /// Changes when files were closed: whoever keeps some of them has to let them go.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// By which descriptor data of a file moves.
    pub fn file(&self, id: FileId) -> Option<File> {
        self.files().iter().find(|(one, _)| *one == id).map(|(_, file)| file.clone())
    }

    fn files(&self) -> std::sync::MutexGuard<'_, Vec<(FileId, File)>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.image.size()
    }

    /// Sizes of its blocks.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Data moves past the page cache, if it is so aligned.
    pub fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    /// What can be done with it.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// What is written changes tables of the image, too.
    pub fn has_tables(&self) -> bool {
        self.image.cluster_size() != 0
    }

    /// The image has its data in another file than its tables, or had until an overlay came.
    pub fn is_in_two_files(&self) -> bool {
        self.two_files
    }

    /// It keeps nothing.
    pub fn is_null(&self) -> bool {
        self.null
    }
}

/// No file, of a size.
#[derive(Debug)]
struct Nothing(FileId, u64);

impl Storage for Nothing {
    fn id(&self) -> FileId {
        self.0
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.1)
    }

    fn read_at(&self, buffer: &mut [u8], _offset: u64) -> io::Result<usize> {
        buffer.fill(0);
        Ok(buffer.len())
    }

    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

/// A file that is open, and locked.
#[derive(Debug)]
struct Opened {
    plain: OwnedFd,
    /// The same file, perhaps past the page cache.
    data: Arc<OwnedFd>,
    device: bool,
    direct: bool,
}

impl Opened {
    fn at(path: &Path, writable: bool, direct: bool) -> Result<Opened> {
        let name = path.display();
        let metadata = fs::metadata(path).with_context(|| format!("Cannot open image {name}"))?;
        let device = metadata.file_type().is_block_device();
        if !device && !metadata.is_file() {
            bail!("Cannot open image {name}: It is neither a file nor a block device");
        }
        let mut flags = OFlags::CLOEXEC | if writable { OFlags::RDWR } else { OFlags::RDONLY };
        if device && writable {
            // A block device that is mounted, or part of something else, is refused by the kernel.
            flags |= OFlags::EXCL;
        }
        let open = |flags| open(path, flags, Mode::empty()).map_err(io::Error::from);
        // A device that a predecessor had alone is free when the last of its threads has returned from the disk.
        let plain = when_free(ErrorKind::ResourceBusy, || open(flags)).with_context(|| format!("Cannot open image {name}"))?;
        let data = if direct {
            let past = open(flags.difference(OFlags::EXCL) | OFlags::DIRECT).with_context(|| {
                format!("Cannot open image {name} past the page cache: Its file system may not offer O_DIRECT")
            })?;
            Arc::new(past)
        } else {
            Arc::new(plain.try_clone().context("Cannot share the image")?)
        };
        // What is in flight when the process dies goes through this descriptor, so it is this one whose lock has to outlast it.
        lock(&data, writable).with_context(|| format!("Cannot use image {name}"))?;
        Ok(Opened { plain, data, device, direct })
    }

    /// As the image's code wants it. `files` learns how its data moves.
    fn storage(&self, files: &mut Vec<(FileId, File)>) -> Result<Arc<dyn Storage>> {
        let file = FileStorage::new(self.plain.try_clone().context("Cannot share the image")?)?;
        files.push((file.id(), File::new(Arc::clone(&self.data))));
        Ok(Arc::new(file))
    }

    fn topology(&self, config: &Config) -> Topology {
        let mut topology = topology::of(&self.data, self.device, self.direct);
        config.blocks.apply(&mut topology);
        topology
    }

    fn abilities(&self, config: &Config) -> Abilities {
        let lifetime = if self.device { topology::lifetime(&self.plain) } else { None };
        Abilities { read_only: config.read_only, secure_erase: false, lifetime }
    }
}

/// One writer, or many readers. The lock goes with the last use of the open file.
fn lock(file: &OwnedFd, writable: bool) -> Result<()> {
    match when_free(ErrorKind::WouldBlock, || lock_file(file.as_fd(), writable)) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("Another process has it open for writing"),
        locked => locked.context("It cannot be locked"),
    }
}

/// Tries again and again what somebody else still keeps from being done, for a while.
fn when_free<T>(taken: ErrorKind, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for tried in 0..LOCK_TRIES {
        match attempt() {
            Err(error) if error.kind() == taken => sleep(LOCK_WAIT),
            outcome => return outcome,
        }
        if tried == WORTH_A_LINE {
            tracing::info!("another process has the image open; waiting for it to let go");
        }
    }
    attempt()
}
