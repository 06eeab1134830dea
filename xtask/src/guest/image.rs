//! Disk images from directories, without root: `mke2fs -d` inside a user namespace, so that files belong to root.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::geteuid;

use crate::{host, say};

/// What kind of file system to make.
#[derive(Debug)]
pub(crate) struct Shape<'a> {
    /// The disk's size; it is sparse, so this costs nothing.
    pub(crate) megabytes: u64,
    /// With a journal, as real disks have, or without, because nothing ever reads it after a crash.
    pub(crate) journal: bool,
    pub(crate) label: &'a str,
}

/// Makes an ext4 file system with the content of a directory.
pub(crate) fn ext4(tree: &Path, disk: &Path, shape: &Shape<'_>) -> Result<()> {
    let file = File::create(disk).with_context(|| format!("Cannot create {}", disk.display()))?;
    file.set_len(shape.megabytes << 20)?;
    let mut command = if geteuid().is_root() {
        host::command("mke2fs")
    } else {
        let mut unshare = host::command("unshare");
        unshare.args(["--map-root-user", "--", "mke2fs"]);
        unshare
    };
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", shape.label, "-E", "root_owner=0:0,lazy_itable_init=1,nodiscard"]);
    if shape.journal {
        command.args(["-J", "size=8"]);
    } else {
        command.args(["-O", "^has_journal"]);
    }
    say::quietly(command.arg("-d").arg(tree).arg(disk))?;
    Ok(())
}

/// Copies a tree with links and rights; where the file system can share blocks, it does.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    say::quietly(Command::new("cp").args(["-a", "--reflink=auto", "--sparse=always", "--"]).arg(from).arg(to))?;
    Ok(())
}

/// The files a system without an installer lacks, and the mount points a script cannot make on a read-only disk.
pub(crate) fn basic_files(tree: &Path, host: &str) -> Result<()> {
    for dir in ["dev", "proc", "sys", "run", "tmp", "root", "mnt", "outboard", "home/user", "var/tmp"] {
        fs::create_dir_all(tree.join(dir)).with_context(|| format!("Cannot create {dir}"))?;
    }
    let files = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/home/user:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n"
                .to_owned(),
        ),
        ("etc/group", "root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n".to_owned()),
        ("etc/hosts", format!("127.0.0.1 localhost {host}\n")),
        ("etc/hostname", format!("{host}\n")),
        ("etc/fstab", String::new()),
        ("root/.bashrc", format!("PS1='{host}:\\w# '\nalias ls='ls --color=auto'\n")),
    ];
    for (name, content) in files {
        fs::write(tree.join(name), content).with_context(|| format!("Cannot write {name}"))?;
    }
    // Debian's base-files arranges this when it is configured.
    let shell = tree.join("usr/bin/sh");
    if !shell.exists() {
        std::os::unix::fs::symlink("bash", &shell)?;
    }
    fs::set_permissions(tree.join("home/user"), Permissions::from_mode(0o777))?;
    fs::set_permissions(tree.join("tmp"), Permissions::from_mode(0o1777))?;
    Ok(())
}

/// Makes a file executable.
pub(crate) fn executable(file: &Path) -> Result<()> {
    fs::set_permissions(file, Permissions::from_mode(0o755)).with_context(|| format!("Cannot change {}", file.display()))
}
