//! The host resource: the image's files, or a block device, opened and locked while there are still paths ([`Files`]), and read when there
//! are none any more ([`Disk`]): what an image says of itself may be anybody's.
//!
//! What they mean is the crate `image`'s affair; this is how the process comes to them. The first file is the one that is written. It is
//! locked against every other writer and reader, the others against writers, in a way that QEMU's own locks notice and that notices
//! them.
//!
//! A file that is used past the page cache is open twice: the image's own tables are small, and stay in the page cache; data does not.
//! They never meet in one block, since tables and data have clusters of their own.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use daemon::Confined;
use image::{Create, FileId, FileStorage, Format, Image, Info, Layer, Options, Storage, create};
use rustix::event::poll;
use rustix::fs::{Mode, OFlags, open};
use sandbox::lock_file;

use crate::args::{Config, Place};
use crate::direct::Alignment;
use crate::engine::File;
use crate::request::SECTOR;
use crate::sandbox::IMAGE;
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

/// The files of an image, open and locked. What is in them is an attacker's, and nobody has looked at it yet.
#[derive(Debug)]
pub struct Files {
    layers: Vec<Layer>,
    files: Vec<(FileId, File)>,
    topology: Topology,
    direct: Option<Alignment>,
    abilities: Abilities,
    /// The first of them has nothing in it yet: it is to become an overlay on the others.
    fresh: bool,
}

impl Files {
    /// Opens and locks the files. `given` takes descriptors over that arguments name.
    ///
    /// # Errors
    /// With the path: not there, no right to it, or in use.
    pub fn open(config: &Config, given: impl Fn(RawFd) -> Result<OwnedFd>) -> Result<Files> {
        let (mut files, mut layers) = (Vec::new(), Vec::new());
        let mut top = None;
        for (depth, link) in config.chain.iter().enumerate() {
            let writable = depth == 0 && !config.read_only && config.ephemeral.is_none();
            let access = Access { writable, direct: config.direct };
            let opened = Opened::find(&link.place, access, &given)?;
            let file = opened.storage(&mut files)?;
            let data = match &link.data {
                Some(path) => Some(Opened::at(path, access)?.storage(&mut files)?),
                None => None,
            };
            layers.push(Layer { format: link.format, file, data });
            top = top.or(Some(opened));
        }
        if let Some(dir) = &config.ephemeral {
            let scratch = scratch(dir, config)?;
            let file = scratch.storage(&mut files)?;
            layers.insert(0, Layer { format: Format::Qcow2, file, data: None });
            top = Some(scratch);
        }
        let (topology, direct, abilities) = match &top {
            Some(top) => (top.topology(config), config.direct.then(|| topology::alignment(&top.data)), top.abilities(config)),
            None => Files::of_nothing(config),
        };
        Ok(Files { layers, files, topology, direct, abilities, fresh: config.ephemeral.is_some() })
    }

    fn of_nothing(config: &Config) -> (Topology, Option<Alignment>, Abilities) {
        let mut topology = Topology::default();
        config.blocks.apply(&mut topology);
        (topology, None, Abilities { read_only: config.read_only, ..Abilities::default() })
    }

    /// Reads what they say, on a thread that may do little else.
    ///
    /// # Errors
    /// When it is no image, or none that can be used so.
    pub fn read(self, config: &Config, confined: &Confined) -> Result<(Disk, Afterwards)> {
        let ((tell, news), (send, tasks)) = (channel(), channel::<Task>());
        let config = config.clone();
        confined.spawn(IMAGE, "image".to_owned(), move || {
            if tell.send(Disk::of(self, &config)).is_ok()
                && let Ok(task) = tasks.recv()
            {
                task();
            }
            // A thread's end takes system calls that nothing else needs.
            loop {
                let _interrupted = poll(&mut [], None);
            }
        })?;
        let disk = news.recv().context("The image was not read to its end")??;
        Ok((disk, Afterwards(send)))
    }
}

type Task = Box<dyn FnOnce() + Send>;

/// The thread that has read the image, for what there is to do with it while it is in use.
#[derive(Debug)]
pub struct Afterwards(Sender<Task>);

impl Afterwards {
    /// What it does from now on.
    pub fn run(self, task: impl FnOnce() + Send + 'static) {
        let _it_never_ends = self.0.send(Box::new(task));
    }
}

impl Disk {
    fn of(files: Files, config: &Config) -> Result<Disk> {
        if let Some(bytes) = config.null {
            return Disk::null(bytes, config);
        }
        let Files { layers, files, topology, direct, abilities, fresh } = files;
        let name = config.chain.first().map(|link| link.place.to_string()).unwrap_or_default();
        if let (true, [overlay, base, ..]) = (fresh, layers.as_slice()) {
            fill(overlay, base, config).context("Cannot make an overlay for what is written to the ephemeral disk")?;
        }
        let image = whole(&layers, config).with_context(|| format!("Cannot use image {name}"))?;
        let (files, epoch) = (Mutex::new(files), AtomicU64::new(0));
        let two_files = config.chain.first().is_some_and(|link| link.data.is_some());
        Ok(Disk { image, files, epoch, topology, direct, abilities, two_files, null: false })
    }

    /// A disk of so many bytes that keeps nothing: what is left is what it costs to be asked.
    fn null(bytes: u64, config: &Config) -> Result<Disk> {
        let layer = Layer { format: Format::Raw, file: Arc::new(Nothing(FileId::new(), bytes)), data: None };
        let image = Image::open(&[layer], Options { writable: true, ..Options::default() })?;
        let (topology, direct, abilities) = Files::of_nothing(config);
        let (files, epoch) = (Mutex::default(), AtomicU64::new(0));
        Ok(Disk { image, files, epoch, topology, direct, abilities, two_files: false, null: true })
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

/// How a file is used.
#[derive(Clone, Copy, Debug)]
struct Access {
    writable: bool,
    direct: bool,
}

impl Opened {
    fn find(place: &Place, access: Access, given: &impl Fn(RawFd) -> Result<OwnedFd>) -> Result<Opened> {
        match place {
            Place::Path(path) => Opened::at(path, access),
            Place::Given(fd, past) => {
                let plain = given(*fd)?;
                let past = past.map(given).transpose()?;
                Opened::locked(plain, past, false, access).with_context(|| format!("Cannot use the image {place}"))
            }
        }
    }

    fn at(path: &Path, access: Access) -> Result<Opened> {
        let name = path.display();
        let metadata = fs::metadata(path).with_context(|| format!("Cannot open image {name}"))?;
        let device = metadata.file_type().is_block_device();
        if !device && !metadata.is_file() {
            bail!("Cannot open image {name}: It is neither a file nor a block device");
        }
        let mut flags = OFlags::CLOEXEC | if access.writable { OFlags::RDWR } else { OFlags::RDONLY };
        if device && access.writable {
            // A block device that is mounted, or part of something else, is refused by the kernel.
            flags |= OFlags::EXCL;
        }
        let open = |flags| open(path, flags, Mode::empty()).map_err(io::Error::from);
        // A device that a predecessor had alone is free when the last of its threads has returned from the disk.
        let plain = when_free(ErrorKind::ResourceBusy, || open(flags)).with_context(|| format!("Cannot open image {name}"))?;
        let past = || {
            let opened = open(flags.difference(OFlags::EXCL) | OFlags::DIRECT);
            opened
                .with_context(|| format!("Cannot open image {name} past the page cache: Its file system may not offer O_DIRECT"))
        };
        let past = access.direct.then(past).transpose()?;
        Opened::locked(plain, past, device, access).with_context(|| format!("Cannot use image {name}"))
    }

    fn locked(plain: OwnedFd, past: Option<OwnedFd>, device: bool, access: Access) -> Result<Opened> {
        let data = match past {
            Some(past) => past,
            None => plain.try_clone().context("Cannot share the image")?,
        };
        // What is in flight when the process dies goes through this descriptor, so it is this one whose lock has to outlast it.
        lock(&data, access.writable)?;
        Ok(Opened { plain, data: Arc::new(data), device, direct: access.direct })
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
        // Below a format or an overlay the guest's ranges are no ranges of the device.
        let alone = matches!(config.chain.as_slice(), [link] if link.format == Format::Raw) && config.ephemeral.is_none();
        let secure_erase = self.device && alone && !config.read_only && topology::erases_securely(&self.plain);
        Abilities { read_only: config.read_only, lifetime, secure_erase }
    }
}

/// The image that all layers make, if it can be used as it is to be.
fn whole(layers: &[Layer], config: &Config) -> Result<Arc<Image>> {
    let options = Options { writable: !config.read_only, cache_bytes: config.cache_bytes };
    let image = Image::open(layers, options)?;
    if image.size() < SECTOR {
        bail!("It has less than one sector of {SECTOR} bytes");
    }
    let clusters = image.cluster_size();
    if config.direct && (1..DIRECT_CLUSTER).contains(&clusters) {
        bail!("Its clusters of {clusters} bytes are smaller than {DIRECT_CLUSTER}, so it cannot be used past the page cache");
    }
    Ok(image)
}

/// Bytes of the disk in an image, with whole sectors.
fn size(base: &Layer, config: &Config) -> Result<u64> {
    let info = Info::read(base.format, &*base.file);
    let name = config.chain.first().map(|link| link.place.to_string()).unwrap_or_default();
    let bytes = info.with_context(|| format!("Cannot use image {name}"))?.size;
    Ok(bytes - bytes % SECTOR)
}

/// A file without a name: it goes with the last process that has it open.
fn scratch(dir: &Path, config: &Config) -> Result<Opened> {
    let access = Access { writable: true, direct: config.direct };
    let made = || -> Result<Opened> {
        let file = fs::File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir)?;
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let past =
            config.direct.then(|| open(own, OFlags::CLOEXEC | OFlags::RDWR | OFlags::DIRECT, Mode::empty())).transpose()?;
        Opened::locked(file.into(), past, false, access)
    };
    made().with_context(|| format!("Cannot make an overlay in {} for what is written to the ephemeral disk", dir.display()))
}

/// Makes an empty file an overlay on an image.
fn fill(overlay: &Layer, base: &Layer, config: &Config) -> Result<()> {
    let backing = config.chain.first().map(|link| (link.place.to_string(), link.format.name().to_owned()));
    Ok(create(&*overlay.file, &Create { size: size(base, config)?, backing, ..Create::default() })?)
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
