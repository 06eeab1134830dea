//! Fresh overlays: empty qcow2 images that take what is written from now on, made for disk processes, which cannot make files.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use image::{Create, FileStorage, create};
use rustix::fs::{Mode, OFlags, open};

use crate::args::ImageFormat;
use crate::images;
use crate::machine::disk::Image;

/// A disk has whole sectors.
const SECTOR: u64 = 512;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// An overlay at a path where nothing is yet, on this image.
pub fn named(path: &Path, bytes: u64, base: &Image) -> Result<File> {
    let made = images::new_file(path, |file| fill(file, bytes, base, true).and_then(|()| keep(path)));
    made.with_context(|| format!("Cannot make the overlay {}", path.display()))
}

/// The same beside a file whose place it will take, with that file's mode.
pub fn beside(path: &Path, bytes: u64, base: &Image) -> Result<(File, PathBuf)> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let place = path.with_file_name(name);
    let file = named(&place, bytes, base)?;
    if let Ok(old) = fs::metadata(path) {
        let _only_a_courtesy = file.set_permissions(fs::Permissions::from_mode(old.permissions().mode()));
    }
    Ok((file, place))
}

/// An overlay in a file without a name: it goes with the last process that has it open. Nothing of it has to outlive the host.
pub fn unnamed(dir: &Path, bytes: u64, base: &Image) -> Result<File> {
    let made = || -> Result<File> {
        let mut options = File::options();
        options.read(true).write(true).mode(0o600);
        let file = match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
            Ok(file) => file,
            // Not every file system has such files.
            Err(_) => {
                let path = dir.join(format!(".outboard-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
                let file = options.create_new(true).open(&path)?;
                fs::remove_file(&path)?;
                file
            }
        };
        fill(&file, bytes, base, false)?;
        Ok(file)
    };
    made().with_context(|| format!("Cannot make a file in {} for what is written to an ephemeral disk", dir.display()))
}

/// The same file, opened anew. What locks it must not be shared with a process that was killed: the late writes of that one keep the
/// lock of its open file for as long as they take, and a successor with a lock of its own waits for them.
pub fn again(file: &File, direct: bool) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | if direct { OFlags::DIRECT } else { OFlags::empty() };
    open(format!("/proc/self/fd/{}", file.as_raw_fd()), flags, Mode::empty()).context("Cannot open an overlay once more")
}

/// Bytes of the disk in an image.
pub fn disk_size(image: &Image) -> Result<u64> {
    let bytes = match image.format {
        ImageFormat::Qcow2 => images::qcow2_size(&image.path)?,
        // A block device has no length but its end.
        ImageFormat::Raw => File::open(&image.path)
            .and_then(|mut file| file.seek(SeekFrom::End(0)))
            .with_context(|| format!("Cannot find the size of the image {}", image.path.display()))?,
    };
    Ok(bytes - bytes % SECTOR)
}

fn fill(file: &File, bytes: u64, base: &Image, lasting: bool) -> Result<()> {
    let storage = FileStorage::new(file.try_clone()?.into())?;
    let storage = if lasting { storage } else { storage.without_sync() };
    let backing = Some((base.path.display().to_string(), base.format.name().to_owned()));
    Ok(create(&storage, &Create { size: bytes, backing, ..Create::default() })?)
}

/// A file whose name does not outlive the host takes everything with it that a guest has flushed since.
fn keep(path: &Path) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(File::open(dir)?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use image::{Format, Info};

    use super::*;

    #[test]
    fn overlays_are_made_where_nothing_is() {
        let dir = std::env::temp_dir().join(format!("outboard-overlay-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let base = Image { path: dir.join("base.img"), format: ImageFormat::Raw };
        File::create(&base.path).unwrap().set_len(10_000_000).unwrap();
        let bytes = disk_size(&base).unwrap();
        assert_eq!(bytes, 9_999_872);
        let path = dir.join("top.qcow2");
        let file = named(&path, bytes, &base).unwrap();
        let info = Info::read(Format::Qcow2, &FileStorage::new(file.into()).unwrap()).unwrap();
        assert_eq!((info.size, info.backing_format.as_deref()), (bytes, Some("raw")));
        let error = format!("{:#}", named(&path, bytes, &base).unwrap_err());
        assert!(error.ends_with("File exists (os error 17)"), "{error}");
        assert!(named(&dir.join("odd"), 5, &base).is_err() && !dir.join("odd").exists(), "what failed leaves nothing");
        let (_file, place) = beside(&path, bytes, &base).unwrap();
        assert_eq!(place.parent(), path.parent());
        let file = unnamed(&dir, bytes, &base).unwrap();
        let once_more = FileStorage::new(again(&file, false).unwrap()).unwrap();
        assert_eq!(Info::read(Format::Qcow2, &once_more).unwrap().size, bytes);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3, "it has no name");
        fs::remove_dir_all(&dir).unwrap();
    }
}
