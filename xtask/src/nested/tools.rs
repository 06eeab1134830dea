//! What the nested machine is made of: QEMU for the host (unpacked, not installed), and the machine's initrd and tools disk.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::debian::{self, Packages};
use crate::guest::{self, image, modules};
use crate::{cache, say};

/// QEMU with its disk server, which the benchmark compares ours with.
const QEMU: &[&str] = &["qemu-system-x86", "seabios", "qemu-utils"];
/// What the machine has beyond the guest's userland: the disk server we compare ourselves with, and tools for tests.
const EXTRA: &[&str] = &["qemu-utils", "qemu-system-common", "strace", "psmisc", "libcap2-bin"];
/// Modules of the machine: its disks and their file systems, KVM, and what tests of other devices load.
const MODULES: &[&str] =
    &["virtio_blk", "virtio-rng", "crc32c_generic", "ext4", "overlay", "irqbypass", "ccp", "kvm", "kvm_amd", "tun"];
/// Increase when what is made from the same inputs changes.
const VERSION: &[u8] = b"4";

/// Where the parts are.
#[derive(Debug)]
pub(crate) struct Tools {
    /// The tree QEMU runs from.
    pub(crate) qemu: PathBuf,
    /// The machine's own kernel, initrd and disk.
    pub(crate) vmlinux: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) disk: PathBuf,
    /// The name of all of this, for the snapshot.
    pub(crate) key: String,
}

fn key() -> Result<String> {
    let texts = [guest::script("nested-init")?, guest::script("nested")?, guest::key()?, MODULES.join(" "), EXTRA.join(" ")];
    let mut parts: Vec<&[u8]> = vec![VERSION];
    parts.extend(texts.iter().map(String::as_bytes));
    Ok(cache::key(&parts))
}

fn qemu_key() -> String {
    cache::key(&[VERSION, QEMU.join(" ").as_bytes()])
}

/// Is there nothing to do any more?
pub(crate) fn is_ready() -> Result<bool> {
    let dir = cache::dir()?;
    Ok(cache::has(&dir.join("nested"), &key()?) && cache::has(&dir.join("qemu"), &qemu_key()))
}

/// Makes the parts, or finds them made.
pub(crate) fn prepare(images: &Path) -> Result<Tools> {
    let dir = cache::dir()?;
    let packages = Packages::default();
    let qemu = qemu(&packages)?;
    let nested = dir.join("nested");
    let key = key()?;
    cache::product(&nested, &key, |fresh| {
        let userland = guest::userland(&packages)?;
        let kernel = guest::kernel(&packages, &userland)?;
        say::step("Make the nested machine's initrd", || {
            let mut archive = guest::skeleton(&userland)?;
            archive.program("init", &cache::tree().join("tests/guest/nested-init"))?;
            modules::add(&mut archive, &kernel, MODULES, &userland)?;
            fs::write(fresh.join("initrd.img"), archive.finish()).context("Cannot write initrd.img")
        })?;
        disk(&packages, &userland, images, &fresh.join("tools.img"))
    })?;
    let part = |name: &str| nested.join(name);
    Ok(Tools { qemu, vmlinux: images.join("vmlinux"), initrd: part("initrd.img"), disk: part("tools.img"), key })
}

/// QEMU, unpacked.
pub(crate) fn qemu(packages: &Packages) -> Result<PathBuf> {
    let tree = cache::dir()?.join("qemu");
    cache::product(&tree, &qemu_key(), |fresh| {
        packages.apt()?.unpack_all(debian::BACKPORTS, QEMU, |_| false, fresh)?;
        guest::slim(fresh)
    })?;
    Ok(tree)
}

fn disk(packages: &Packages, userland: &Path, images: &Path, disk: &Path) -> Result<()> {
    let tree = disk.with_extension("tree");
    image::copy_tree(userland, &tree)?;
    packages.apt()?.unpack_all(debian::RELEASE, EXTRA, guest::is_ballast, &tree)?;
    guest::slim(&tree)?;
    say::step("Make the nested machine's disk", || {
        image::basic_files(&tree, "nested")?;
        let script = tree.join("usr/sbin/nested");
        fs::copy(cache::tree().join("tests/guest/nested"), &script)?;
        image::executable(&script)?;
        fs::create_dir(tree.join("guest"))?;
        for file in ["vmlinuz", "vmlinux", "initrd.img", "root.img"] {
            image::copy_tree(&images.join(file), &tree.join("guest").join(file))?;
        }
        image::ext4(&tree, disk, &image::Shape { megabytes: 4096, journal: false, label: "tools" })
    })?;
    cache::remove_tree(&tree)
}
