//! The kernel's drivers for a flash card in a USB reader that is plugged in over a socket (`tests/suite/src/card.rs`): modules that the
//! nested machine does not load by itself.

use std::path::PathBuf;

use anyhow::Result;

use crate::debian::Packages;
use crate::guest::modules;
use crate::{cache, guest};

/// USB devices that are elsewhere, the reader, the card, its disk.
const MODULES: &[&str] = &["vhci-hcd", "rtsx_usb", "rtsx_usb_sdmmc", "mmc_block"];

/// The modules and the list of them, made or found made.
pub(crate) fn prepare() -> Result<PathBuf> {
    let product = cache::dir()?.join("card");
    cache::product(&product, &cache::key(&[guest::key()?.as_bytes(), MODULES.join(" ").as_bytes()]), |dir| {
        let packages = Packages::default();
        let userland = guest::userland(&packages)?;
        modules::unpack(dir, &guest::kernel(&packages, &userland)?, MODULES, &userland)
    })?;
    Ok(product)
}
