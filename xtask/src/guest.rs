//! The guest: Debian's stock kernel, an initrd with the modules it needs, and a small Debian root disk.
//!
//! There is no systemd in it and no package is configured: the two scripts in `tests/guest/` are all that runs before the
//! shell or the test's command, so a guest is up seconds after the kernel starts even where everything is emulated.

pub(crate) mod image;
pub(crate) mod modules;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::debian::{self, Packages};
use crate::{cache, say};

/// What the guest's root disk consists of.
const USERLAND: &[&str] = &[
    "bash",
    "coreutils",
    "util-linux",
    "mount",
    "e2fsprogs",
    "procps",
    "grep",
    "sed",
    "fio",
    "busybox-static",
    "zstd",
    "xz-utils",
];
/// Modules of the guest's initrd: its devices (the processes' and the VMM's own), its file systems, the power button.
const MODULES: &[&str] =
    &["virtio_blk", "virtio-rng", "crc32c_generic", "ext4", "overlay", "pvpanic-pci", "pvpanic-mmio", "button", "evdev"];
/// Increase when what is made from the same inputs changes.
const VERSION: &[u8] = b"3";

/// Debian's kernel: `vmlinuz`, `vmlinux` and `modules/`.
#[derive(Debug)]
pub(crate) struct Kernel(pub(crate) PathBuf);

/// Makes the guest's files, or finds them made. Returns the directory of `vmlinuz`, `vmlinux`, `initrd.img`, `root.img`.
pub(crate) fn prepare() -> Result<PathBuf> {
    let packages = Packages::default();
    let userland = userland(&packages)?;
    let kernel = kernel(&packages, &userland)?;
    let product = cache::dir()?.join("guest");
    cache::product(&product, &key()?, |dir| {
        for file in ["vmlinuz", "vmlinux"] {
            fs::copy(kernel.0.join(file), dir.join(file)).with_context(|| format!("Cannot copy {file}"))?;
        }
        say::step("Make the guest's initrd", || initrd(&kernel, &userland, &dir.join("initrd.img")))?;
        say::step("Make the guest's root disk", || root_disk(&userland, &dir.join("root.img")))
    })?;
    Ok(product)
}

/// Is there nothing to do any more?
pub(crate) fn is_ready() -> Result<bool> {
    Ok(cache::has(&cache::dir()?.join("guest"), &key()?))
}

/// The name of everything the guest is made from.
pub(crate) fn key() -> Result<String> {
    let scripts = [script("init")?, script("session")?];
    let names = [USERLAND.join(" "), MODULES.join(" ")];
    Ok(cache::key(&[VERSION, scripts[0].as_bytes(), scripts[1].as_bytes(), names[0].as_bytes(), names[1].as_bytes()]))
}

/// A script of `tests/guest/`.
pub(crate) fn script(name: &str) -> Result<String> {
    let path = cache::tree().join("tests/guest").join(name);
    fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
}

/// The unpacked Debian userland, a tree that is never entered, only copied onto disks.
pub(crate) fn userland(packages: &Packages) -> Result<PathBuf> {
    let product = cache::dir()?.join("userland");
    cache::product(&product, &cache::key(&[VERSION, USERLAND.join(" ").as_bytes()]), |tree| {
        packages.apt()?.unpack_all(debian::RELEASE, USERLAND, is_ballast, tree)?;
        slim(tree)
    })?;
    Ok(product)
}

/// The kernel with its modules.
pub(crate) fn kernel(packages: &Packages, userland: &Path) -> Result<Kernel> {
    let product = cache::dir()?.join("kernel");
    cache::product(&product, &cache::key(&[VERSION, b"kernel"]), |dir| {
        let apt = packages.apt()?;
        let package = apt.stands_for("linux-image-amd64")?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let tree = dir.join("tree");
        apt.unpack_one(&package, &tree)?;
        fs::rename(tree.join("boot").join(format!("vmlinuz-{release}")), dir.join("vmlinuz"))?;
        fs::rename(tree.join("usr/lib/modules").join(&release), dir.join("modules"))?;
        cache::remove_tree(&tree)?;
        say::step("Uncompress the kernel", || uncompress(&dir.join("vmlinuz"), &dir.join("vmlinux"), userland))
    })?;
    Ok(Kernel(product))
}

/// Packages that others only depend on for their installation scripts, or for parts nobody uses here.
pub(crate) fn is_ballast(file: &str) -> bool {
    const BALLAST: &[&str] = &[
        "python3",
        "libpython3",
        "adduser",
        "debconf",
        "perl",
        "libsqlite3",
        "media-types",
        "dmsetup",
        "passwd",
        "login_",
        "libdb5",
        "sensible-utils",
        "libsemanage",
        "logsave",
    ];
    BALLAST.iter().any(|prefix| file.starts_with(prefix))
}

/// Takes away what only people read.
pub(crate) fn slim(tree: &Path) -> Result<()> {
    for dir in
        ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "usr/share/bash-completion"]
    {
        cache::remove_tree(&tree.join(dir))?;
    }
    Ok(())
}

/// Finds the ELF image inside a bzImage: the payload that begins with zstd's magic number.
fn uncompress(compressed: &Path, plain: &Path, userland: &Path) -> Result<()> {
    const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
    let image = fs::read(compressed).with_context(|| format!("Cannot read {}", compressed.display()))?;
    let starts = image.windows(ZSTD.len()).enumerate().filter(|(_, window)| *window == ZSTD).map(|(at, _)| at);
    for start in starts {
        let payload = plain.with_extension("zst");
        fs::write(&payload, &image[start..])?;
        // What follows the payload is no zstd data, so the exit status is that of a failure in any case.
        let output = debian::program(userland, "usr/bin/zstd").args(["-dcq"]).arg(&payload).stderr(Stdio::null()).output()?;
        fs::remove_file(&payload)?;
        if output.stdout.starts_with(b"\x7fELF") {
            return fs::write(plain, output.stdout).with_context(|| format!("Cannot write {}", plain.display()));
        }
    }
    bail!("Cannot find a kernel compressed with zstd in {}", compressed.display());
}

fn initrd(kernel: &Kernel, userland: &Path, image: &Path) -> Result<()> {
    let mut archive = skeleton(userland)?;
    archive.program("init", &cache::tree().join("tests/guest/init"))?;
    archive.program("session", &cache::tree().join("tests/guest/session"))?;
    modules::add(&mut archive, kernel, MODULES, userland)?;
    fs::write(image, archive.finish()).with_context(|| format!("Cannot write {}", image.display()))
}

/// An initrd with busybox under the names that scripts use, and the console.
pub(crate) fn skeleton(userland: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "run", "tmp", "etc", "root", "modules"] {
        archive.directory(dir);
    }
    let busybox = userland.join("usr/bin/busybox");
    archive.program("bin/busybox", &busybox)?;
    let names = Command::new(&busybox).arg("--list").output().context("Cannot start busybox")?;
    for name in String::from_utf8_lossy(&names.stdout).lines().filter(|name| *name != "busybox") {
        archive.symlink(&format!("bin/{name}"), "busybox");
    }
    archive.symlink("sbin", "bin");
    archive.device("dev/console", 5, 1);
    Ok(archive)
}

fn root_disk(userland: &Path, disk: &Path) -> Result<()> {
    let tree = disk.with_extension("tree");
    image::copy_tree(userland, &tree)?;
    image::basic_files(&tree, "guest")?;
    let init = tree.join("usr/sbin/init");
    fs::copy(cache::tree().join("tests/guest/session"), &init)?;
    image::executable(&init)?;
    image::ext4(&tree, disk, &image::Shape { megabytes: 1024, journal: true, label: "root" })?;
    cache::remove_tree(&tree)
}
