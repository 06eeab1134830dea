//! Kills while a disk changes its image.
//!
//! A snapshot puts a fresh overlay on the disk's images, at a moment that only the backend knows: when it is killed, nobody can tell whether
//! the switch had happened. It need not be told. The successor gets the overlay in any case: before the switch nothing was written to
//! it, so it shows what is below; after it, it has what was acknowledged since. Without the overlay the successor would lose just that.
//!
//! A chain that has become long is read through after a kill, and goes on as one raw image. The images that are given up are checked:
//! what they count has to be what they use, but for leaks.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use image::{Create, FileStorage, Format, Image, Layer, Options, Storage, check, create};
use sandbox::lock_file;

use super::Report;
use crate::link::Backend;
use crate::owner;

/// Images of a chain before it is read through.
const LONGEST: usize = 8;

/// How long the last writes of a dead backend may keep an image.
const LOCKED: Duration = Duration::from_secs(10);

/// The images, and the snapshot that was asked for last.
#[derive(Debug)]
pub(super) struct Snapshots {
    folder: PathBuf,
    bytes: u64,
    /// The one that is written first.
    chain: Vec<(PathBuf, Format)>,
    made: u32,
    asked: Option<(PathBuf, UnixStream)>,
}

impl Snapshots {
    /// Makes the first image of a disk of so many bytes, and tells the backend's command of it.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn new(folder: &Path, bytes: u64, backend: &mut Backend) -> Result<Snapshots> {
        fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let mut snapshots = Snapshots { folder: folder.to_owned(), bytes, chain: Vec::new(), made: 0, asked: None };
        let path = snapshots.next("raw");
        let file = File::create(&path).and_then(|file| file.set_len(bytes));
        file.with_context(|| format!("Cannot make image {}", path.display()))?;
        snapshots.chain.push((path, Format::Raw));
        snapshots.tell(backend);
        Ok(snapshots)
    }

    fn next(&mut self, kind: &str) -> PathBuf {
        self.made += 1;
        self.folder.join(format!("{}.{kind}", self.made))
    }

    fn control(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    /// The words of the command that say what the images are.
    fn tell(&self, backend: &mut Backend) {
        let _not_there = fs::remove_file(self.control());
        let names = [("--blk-file", "--format"), ("--backing-file", "--backing-format")];
        let words = self.chain.iter().enumerate().flat_map(|(depth, (path, format))| {
            let (file, kind) = names[depth.min(1)];
            [file.to_owned(), path.display().to_string(), kind.to_owned(), format.name().to_owned()]
        });
        backend.give("{disk}", words.collect());
        backend.give("{control}", vec![self.control().display().to_string()]);
    }

    /// Asks for a snapshot, and does not wait for it.
    ///
    /// # Errors
    /// When the overlay cannot be made, or nobody listens.
    pub(super) fn ask(&mut self) -> Result<()> {
        let path = self.next("qcow2");
        let Some((below, format)) = self.chain.first() else { bail!("There is no image to take a snapshot of") };
        // As people look at them: beside each other.
        let name = below.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let backing = Some((name, format.name().to_owned()));
        let cannot = || format!("Cannot make image {}", path.display());
        let file = File::options().read(true).write(true).create_new(true).open(&path).with_context(cannot)?;
        // The lock belongs to the open file, so the one that is sent is not kept here.
        let sent = OwnedFd::from(File::options().read(true).write(true).open(&path).with_context(cannot)?);
        create(&FileStorage::new(file.into())?, &Create { size: self.bytes, backing, ..Create::default() })
            .with_context(cannot)?;
        let stream = owner::say(&self.control(), r#"{"command": "snapshot"}"#, Some(sent.as_fd()))?;
        self.asked = Some((path, stream));
        Ok(())
    }

    /// The backend is dead: the overlay that it was asked to go on in is on top, and a long chain becomes one image.
    ///
    /// # Errors
    /// When it has refused, or an image cannot be read.
    pub(super) fn succeed(&mut self, backend: &mut Backend, report: &mut Report) -> Result<()> {
        if let Some((path, mut stream)) = self.asked.take() {
            let mut answer = String::new();
            // The end, or a connection that was cut off.
            let _what_there_is = stream.read_to_string(&mut answer);
            if answer.contains("\"ok\":false") {
                bail!("The backend takes no snapshot: {}", answer.trim());
            }
            report.taken += u64::from(answer.contains("\"ok\":true"));
            self.chain.insert(0, (path, Format::Qcow2));
        }
        if self.chain.len() > LONGEST {
            report.corrupted += self.read_through()?;
        }
        self.tell(backend);
        Ok(())
    }

    /// Copies what the chain shows into one raw image, and gives the number of errors in the images that are given up.
    fn read_through(&mut self) -> Result<u64> {
        let files = self.chain.iter().map(|(path, format)| Ok((open(path)?, *format)));
        let files: Vec<(Arc<dyn Storage>, Format)> = files.collect::<Result<_>>()?;
        let layers: Vec<Layer> =
            files.iter().map(|(file, format)| Layer { format: *format, file: Arc::clone(file), data: None }).collect();
        let image = Image::open(&layers, Options { writable: false, ..Options::default() }).context("Cannot read the chain")?;
        let mut content = vec![0; usize::try_from(self.bytes)?];
        image.lookup().read(&mut content, 0).context("Cannot read the chain")?;
        let path = self.next("raw");
        let flat = File::create(&path).with_context(|| format!("Cannot make image {}", path.display()))?;
        flat.write_all_at(&content, 0).with_context(|| format!("Cannot write image {}", path.display()))?;
        let mut errors = 0;
        for (file, _) in files.iter().filter(|(_, format)| *format == Format::Qcow2) {
            errors += check(file, false).context("Cannot check an image")?.corruptions;
        }
        for (old, _) in std::mem::replace(&mut self.chain, vec![(path, Format::Raw)]) {
            let _in_nobodys_way = fs::remove_file(old);
        }
        Ok(errors)
    }
}

/// Opens an image when the last writes of its dead server are through: until then they keep its lock.
fn open(path: &Path) -> Result<Arc<dyn Storage>> {
    let cannot = || format!("Cannot open image {}", path.display());
    let file = File::open(path).with_context(cannot)?;
    let start = Instant::now();
    while let Err(error) = lock_file(file.as_fd(), false) {
        if start.elapsed() > LOCKED {
            return Err(error).with_context(cannot);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Arc::new(FileStorage::new(file.into()).with_context(cannot)?))
}
