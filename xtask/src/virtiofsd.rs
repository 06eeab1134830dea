//! Upstream's virtiofsd, somebody else's backend for our VMM, with the libraries it was built for.

use std::path::PathBuf;

use anyhow::Result;

use crate::debian::{self, Apt};
use crate::{cache, guest};

const PACKAGES: &[&str] = &["virtiofsd"];

/// The tree it runs from, made or found made.
pub(crate) fn prepare() -> Result<PathBuf> {
    let product = cache::dir()?.join("virtiofsd");
    cache::product(&product, &cache::key(&[debian::NEXT.as_bytes(), PACKAGES.join(" ").as_bytes()]), |tree| {
        Apt::next()?.unpack_all(debian::NEXT, PACKAGES, guest::is_ballast, tree)?;
        guest::slim(tree)
    })?;
    Ok(product)
}
