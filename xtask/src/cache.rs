//! Where products are kept between runs, and how a product knows that it is still the right one.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::{env, process};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// The cache directory: `$OUTBOARD_CACHE`, `$XDG_CACHE_HOME/outboard` or `~/.cache/outboard`.
pub(crate) fn dir() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = if let Some(dir) = set("OUTBOARD_CACHE") {
        dir
    } else if let Some(dir) = set("XDG_CACHE_HOME") {
        dir.join("outboard")
    } else if let Some(dir) = set("HOME") {
        dir.join(".cache/outboard")
    } else {
        bail!("Cannot choose a cache directory: neither OUTBOARD_CACHE nor HOME is set");
    };
    fs::create_dir_all(&dir).with_context(|| format!("Cannot create {}", dir.display()))?;
    fs::canonicalize(&dir).with_context(|| format!("Cannot find {}", dir.display()))
}

/// The top of the source tree.
pub(crate) fn tree() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// A short name for everything a product is made from.
pub(crate) fn key(parts: &[&[u8]]) -> String {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Makes `product` unless it was made from the same `key` before. `make` fills a fresh directory beside it, which is then
/// renamed: a task that is interrupted leaves no half product. Tasks that run at the same time take turns.
pub(crate) fn product(product: &Path, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let stamp = |dir: &Path| dir.join(".key");
    let lock_path = product.with_extension("lock");
    let lock = File::create(&lock_path).with_context(|| format!("Cannot create {}", lock_path.display()))?;
    flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("Cannot lock {}", lock_path.display()))?;
    if fs::read_to_string(stamp(product)).is_ok_and(|made_from| made_from == key) {
        return Ok(());
    }
    let fresh = product.with_extension(format!("new-{}", process::id()));
    remove_tree(&fresh)?;
    fs::create_dir_all(&fresh).with_context(|| format!("Cannot create {}", fresh.display()))?;
    if let Err(error) = make(&fresh) {
        drop(remove_tree(&fresh));
        return Err(error);
    }
    fs::write(stamp(&fresh), key).with_context(|| format!("Cannot write {}", stamp(&fresh).display()))?;
    remove_tree(product)?;
    fs::rename(&fresh, product).with_context(|| format!("Cannot rename {}", fresh.display()))
}

/// Removes a directory with everything in it, if it is there.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Has the product of this key been made?
pub(crate) fn has(product: &Path, key: &str) -> bool {
    fs::read_to_string(product.join(".key")).is_ok_and(|made_from| made_from == key)
}
