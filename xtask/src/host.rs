//! What the host must have: said first, then installed (as root) or asked for with one line to type.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use rustix::process::geteuid;
use sandbox::{Floor, Kernel};

use crate::say;

/// What a task needs of the host, besides cargo.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// Tools that make file systems and take packages apart.
    pub(crate) images: bool,
    /// A C++ compiler: libFuzzer is written in it.
    pub(crate) cxx: bool,
}

/// A program and the Debian package that brings it. All but the compiler, and the two at the
/// end, with which a shared directory is used as people use one, belong to every Debian system, except in containers.
const PROGRAMS: &[(&str, &str)] = &[
    ("cc", "gcc libc6-dev"),
    ("mke2fs", "e2fsprogs"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("tar", "tar"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
    ("git", "git"),
    ("sqlite3", "sqlite3"),
];

/// Checks that the host has what is wanted; as root, installs what is missing.
pub(crate) fn prepare(wanted: &Wanted) -> Result<()> {
    let programs = if wanted.images { PROGRAMS } else { &PROGRAMS[..1] };
    let cxx: &[_] = if wanted.cxx { &[("c++", "g++")] } else { &[] };
    let mut missing: Vec<&str> = Vec::new();
    for (program, package) in programs.iter().chain(cxx) {
        if !is_there(program) && !missing.contains(package) {
            missing.push(package);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !geteuid().is_root() {
        bail!("The host lacks {packages}; run: sudo apt-get install {packages}");
    }
    say::line(&format!("The host lacks {packages}; installing with apt-get."));
    let noninteractive = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q").args(arguments);
        command
    };
    say::step("Fetch the host's package lists", || say::quietly(&mut noninteractive(&["update"])))?;
    let mut install = noninteractive(&["install", "-y", "--no-install-recommends"]);
    install.args(packages.split(' '));
    say::step(&format!("Install {packages}"), || say::quietly(&mut install))?;
    Ok(())
}

/// The floor of the sandbox that programs have to be told of on this host, as an environment variable: Debian 12's own kernel
/// does not reach the default one. What is missing there is said.
pub(crate) fn floor() -> Option<(&'static str, String)> {
    const VARIABLE: &str = "OUTBOARD_SANDBOX_FLOOR";
    let kernel = Kernel::running();
    let lower = kernel.floor().filter(|floor| *floor != Floor::default())?;
    if env::var_os(VARIABLE).is_some() {
        return None;
    }
    let error = kernel.require(Floor::default()).err()?;
    say::line(&format!("{error}: done, with {VARIABLE}={lower}."));
    Some((VARIABLE, lower.to_string()))
}

/// Is there a program of this name? The directories for administrators count even where they are not in PATH.
pub(crate) fn is_there(program: &str) -> bool {
    let path = env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| Path::new(dir).join(program).is_file())
}

/// A command whose program may live in a directory for administrators.
pub(crate) fn command(program: &str) -> Command {
    let path = env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// How a guest can run on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kvm {
    /// The host's own KVM runs stock kernels.
    Direct,
    /// It does not, for this reason.
    Nested(String),
}

/// Decides by looking, never by trying: a KVM in software takes most of a minute to fail.
pub(crate) fn kvm() -> Kvm {
    let nested = |why: &str| Kvm::Nested(why.to_owned());
    if let Some(choice) = env::var_os("OUTBOARD_KVM") {
        return if choice == "direct" { Kvm::Direct } else { nested("OUTBOARD_KVM asks for it") };
    }
    if !Path::new("/dev/kvm").exists() {
        return nested("this host has no /dev/kvm");
    }
    if Path::new("/sys/module/kvm_pvm").exists() {
        return nested("this host's /dev/kvm works in software (kvm_pvm) and cannot run a stock kernel");
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return nested("this host's processor offers neither vmx nor svm");
    }
    let rights = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    if rustix::fs::access("/dev/kvm", rights).is_err() {
        return nested("you may not open /dev/kvm (usually: join the group kvm)");
    }
    Kvm::Direct
}
