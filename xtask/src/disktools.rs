//! Other people's clients of a vhost-user disk: nbdkit with its blkio plugin, libnbd's programs, and QEMU's tools with the block
//! driver `virtio-blk-vhost-user`, each with the libraries it was built for.

use std::path::PathBuf;

use anyhow::Result;

use crate::debian::{self, Apt};
use crate::{cache, guest};

const PACKAGES: &[&str] = &["nbdkit", "libnbd-bin", "qemu-utils", "qemu-block-extra", "fuse3", "xfsprogs", "e2fsprogs"];

/// The tree they run from, made or found made.
pub(crate) fn prepare() -> Result<PathBuf> {
    let product = cache::dir()?.join("disktools");
    cache::product(&product, &cache::key(&[debian::NEXT.as_bytes(), PACKAGES.join(" ").as_bytes()]), |tree| {
        Apt::next()?.unpack_all(debian::NEXT, PACKAGES, guest::is_ballast, tree)?;
        guest::slim(tree)
    })?;
    Ok(product)
}
