//! Debian packages without installing any: apt with its own state, lists and cache resolves and downloads, `dpkg-deb` and
//! `tar` unpack. Nothing here needs root, and nothing of the host's own package state is read except the mirror's address,
//! the archive's keyring and the settings of the network (`Acquire`).

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{cache, say};

/// The release that userland comes from.
pub(crate) const RELEASE: &str = "bookworm";
/// Where the kernel and QEMU come from: 6.12 and 10.0 instead of 6.1 and 7.2.
pub(crate) const BACKPORTS: &str = "bookworm-backports";
/// Where programs come from that are newer still and are only tested against. Their libraries come with them.
pub(crate) const NEXT: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const FALLBACK_MIRROR: &str = "http://deb.debian.org/debian";

/// apt, set up when the first package is needed: a second run of a task needs none, and no network either.
#[derive(Debug, Default)]
pub(crate) struct Packages(OnceCell<Apt>);

impl Packages {
    /// The one apt of this run.
    pub(crate) fn apt(&self) -> Result<&Apt> {
        if let Some(apt) = self.0.get() {
            return Ok(apt);
        }
        let apt = Apt::new()?;
        Ok(self.0.get_or_init(|| apt))
    }
}

/// apt, confined to a directory of its own.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Sets up the directory and fetches the package lists.
    pub(crate) fn new() -> Result<Self> {
        Self::of("apt", &[RELEASE, BACKPORTS])
    }

    /// The same for the next release, beside the other: no package of one is taken for the other's.
    pub(crate) fn next() -> Result<Self> {
        Self::of("apt-next", &[NEXT])
    }

    fn of(dir: &str, releases: &[&str]) -> Result<Self> {
        let apt = Self { dir: cache::dir()?.join(dir) };
        for dir in ["lists/partial", "archives/partial", "none/partial", "state"] {
            let dir = apt.dir.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("Cannot create {}", dir.display()))?;
        }
        apt.write("state/status", "")?;
        apt.write("sources.list", &sources(releases))?;
        apt.write("apt.conf", &apt.configuration()?)?;
        say::step("Fetch the package lists", || say::quietly(apt.command("apt-get").arg("update")))?;
        Ok(apt)
    }

    /// The package that a meta package such as `linux-image-amd64` stands for.
    pub(crate) fn stands_for(&self, meta: &str) -> Result<String> {
        let output = say::quietly(self.command("apt-cache").args(["depends", "-t", BACKPORTS, meta]))?;
        let text = String::from_utf8_lossy(&output).into_owned();
        let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(name.with_context(|| format!("Debian's {meta} depends on nothing"))?.to_owned())
    }

    /// Unpacks one package, without what it depends on, into `tree`.
    pub(crate) fn unpack_one(&self, package: &str, tree: &Path) -> Result<()> {
        let download = self.dir.join("one");
        cache::remove_tree(&download)?;
        fs::create_dir_all(&download)?;
        say::step(&format!("Download {package}"), || {
            let mut command = self.command("apt-get");
            say::quietly(command.args(["download", "-t", BACKPORTS, package]).current_dir(&download))
        })?;
        for entry in fs::read_dir(&download)? {
            unpack(&entry?.path(), tree)?;
        }
        cache::remove_tree(&download)
    }

    /// Unpacks packages with all they depend on, except what `skip` rejects, into `tree`.
    pub(crate) fn unpack_all(&self, release: &str, packages: &[&str], skip: fn(&str) -> bool, tree: &Path) -> Result<()> {
        let needed = self.closure(release, packages)?;
        let heading = format!("Download {} packages for {}", needed.len(), packages.first().unwrap_or(&""));
        say::step(&heading, || {
            let mut command = self.command("apt-get");
            say::quietly(command.args(["install", "-y", "--download-only", "-t", release]).args(packages))
        })?;
        say::step("Unpack them", || {
            for file in needed.iter().filter(|file| !skip(file)) {
                unpack(&self.dir.join("archives").join(file), tree)?;
            }
            Ok(())
        })
    }

    /// The archive files of packages and of everything they depend on.
    fn closure(&self, release: &str, packages: &[&str]) -> Result<Vec<String>> {
        // Files that are already in the archive directory are left out of this list: it must look empty here.
        let mut command = self.command("apt-get");
        command.arg("-o").arg(option("Dir::Cache::archives", &self.dir.join("none")));
        let output = say::quietly(command.args(["install", "-y", "--print-uris", "-t", release]).args(packages))?;
        let text = String::from_utf8_lossy(&output).into_owned();
        let files: Vec<String> = text
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned))
            .collect();
        if files.is_empty() {
            bail!("apt found no package for {}", packages.join(", "));
        }
        Ok(files)
    }

    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.dir.join("apt.conf")).env("LC_ALL", "C").arg("-q");
        command
    }

    /// Our configuration, read before (and instead of) the host's, with the host's settings of the network.
    fn configuration(&self) -> Result<String> {
        let at = |name: &str| self.dir.join(name).display().to_string();
        let network = say::quietly(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let network = String::from_utf8_lossy(&network).into_owned();
        Ok(format!(
            "Dir::Etc::Parts \"/dev/null\";\nDir::Etc::Main \"/dev/null\";\nDir::Etc::SourceParts \"/dev/null\";\n\
             Dir::Etc::SourceList \"{}\";\nDir::State \"{}\";\nDir::State::status \"{}\";\nDir::State::Lists \"{}\";\n\
             Dir::Cache \"{}\";\nDir::Cache::archives \"{}\";\nAPT::Install-Recommends \"0\";\n\
             APT::Architecture \"amd64\";\nAPT::Sandbox::User \"root\";\n{network}Acquire::Languages \"none\";\n",
            at("sources.list"),
            at("state"),
            at("state/status"),
            at("lists"),
            at(""),
            at("archives"),
        ))
    }

    fn write(&self, name: &str, content: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))
    }
}

/// Unpacks a package into a tree whose `/bin`, `/sbin` and `/lib` are links into `/usr`, as Debian's are.
fn unpack(package: &Path, tree: &Path) -> Result<()> {
    for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        if !tree.join(link).exists() {
            fs::create_dir_all(tree.join(target))?;
            std::os::unix::fs::symlink(target, tree.join(link))?;
        }
    }
    let mut archive = Command::new("dpkg-deb");
    archive.arg("--fsys-tarfile").arg(package).stdout(Stdio::piped());
    let mut reader = archive.spawn().context("Cannot start dpkg-deb")?;
    let content = reader.stdout.take().context("Cannot read from dpkg-deb")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "--no-same-owner", "--warning=no-timestamp", "-C"]).arg(tree).stdin(content);
    let unpacked = tar.status().context("Cannot start tar")?;
    if !reader.wait()?.success() || !unpacked.success() {
        bail!("Cannot unpack {}", package.display());
    }
    Ok(())
}

/// A program of an unpacked tree, run with that tree's own loader and libraries.
pub(crate) fn program(tree: &Path, program: &str) -> Command {
    let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu")).arg(tree.join(program));
    command
}

fn option(name: &str, value: &Path) -> String {
    format!("{name}={}", value.display())
}

/// A list of sources for the host's mirror, so that a mirror nearby is used where one is configured.
fn sources(releases: &[&str]) -> String {
    let mirror = mirror().unwrap_or_else(|| FALLBACK_MIRROR.to_owned());
    let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    releases.iter().map(|release| format!("deb {signed}{mirror} {release} main\n")).collect()
}

fn mirror() -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let mut more: Vec<PathBuf> =
        fs::read_dir("/etc/apt/sources.list.d").ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    more.sort();
    files.extend(more);
    files.iter().find_map(|file| mirror_in(&fs::read_to_string(file).ok()?))
}

/// The address of the main archive in one file of sources, in either of apt's two formats.
fn mirror_in(text: &str) -> Option<String> {
    let addresses = text.lines().map(str::trim).filter_map(|line| {
        line.strip_prefix("URIs:")
            .or_else(|| line.strip_prefix("deb "))
            .and_then(|rest| rest.split_whitespace().find(|word| word.contains(":/")))
    });
    let mut main = addresses.filter(|address| address.trim_end_matches('/').ends_with("/debian"));
    main.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_found_in_both_formats() {
        let new = "Types: deb\nURIs: http://mirror.example/debian-security\n\nURIs: http://mirror.example/debian/\n";
        assert_eq!(mirror_in(new).as_deref(), Some("http://mirror.example/debian/"));
        let old = "# c\ndeb [arch=amd64 signed-by=/k] http://old.example/debian bookworm main\n";
        assert_eq!(mirror_in(old).as_deref(), Some("http://old.example/debian"));
        assert_eq!(mirror_in("deb https://packages.example/apt stable main\n"), None);
    }
}
