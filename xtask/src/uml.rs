//! User-mode Linux, a guest kernel that is a process and a vhost-user frontend of its own, with an initrd that has its modules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::debian::Packages;
use crate::{cache, guest, say};

/// Modules of the initrd; the rest is built in.
const MODULES: &[&str] = &["drivers/block/virtio_blk", "drivers/char/virtio_console"];
/// Increase when what is made from the same inputs changes.
const VERSION: &[u8] = b"1";

/// The directory of `linux.uml` and `initrd.img`, made or found made.
pub(crate) fn prepare() -> Result<PathBuf> {
    let packages = Packages::default();
    let userland = guest::userland(&packages)?;
    let product = cache::dir()?.join("uml");
    let parts = [VERSION, guest::script("uml-init")?.as_bytes(), MODULES.join(" ").as_bytes()].map(<[u8]>::to_vec);
    let key = cache::key(&parts.each_ref().map(Vec::as_slice));
    cache::product(&product, &key, |dir| {
        let tree = dir.join("tree");
        packages.apt()?.unpack_one("user-mode-linux", &tree)?;
        fs::rename(tree.join("usr/bin/linux.uml"), dir.join("linux.uml")).context("Cannot find linux.uml in its package")?;
        say::step("Make user-mode Linux's initrd", || initrd(&tree, &userland, &dir.join("initrd.img")))?;
        cache::remove_tree(&tree)
    })?;
    Ok(product)
}

fn initrd(tree: &Path, userland: &Path, image: &Path) -> Result<()> {
    let mut archive = guest::skeleton(userland)?;
    archive.program("init", &cache::tree().join("tests/guest/uml-init"))?;
    let releases = tree.join("usr/lib/uml/modules");
    let release = fs::read_dir(&releases)?.next().context("User-mode Linux comes without modules")??.path();
    for module in MODULES {
        let path = release.join("kernel").join(module).with_extension("ko");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let content = fs::read(&path).with_context(|| format!("Cannot read {}", path.display()))?;
        archive.file(&format!("modules/{name}"), &content);
    }
    fs::write(image, archive.finish()).with_context(|| format!("Cannot write {}", image.display()))
}
