//! Kernel modules for an initrd: those asked for, those they depend on, in an order in which they can be loaded.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::guest::Kernel;

/// Adds the modules, uncompressed, and the list `/modules/order`.
pub(crate) fn add(archive: &mut Archive, kernel: &Kernel, names: &[&str], userland: &Path) -> Result<()> {
    for (name, content) in files(kernel, names, userland)? {
        archive.file(&format!("modules/{name}"), &content);
    }
    Ok(())
}

/// The same in a directory, for a machine that runs already.
pub(crate) fn unpack(dir: &Path, kernel: &Kernel, names: &[&str], userland: &Path) -> Result<()> {
    for (name, content) in files(kernel, names, userland)? {
        let path = dir.join(name);
        fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The modules, and the list.
fn files(kernel: &Kernel, names: &[&str], userland: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut set = Set { files: HashMap::new(), busybox: userland.join("usr/bin/busybox"), loaded: Vec::new() };
    set.index(&kernel.0.join("modules/kernel"))?;
    for name in names {
        set.load(name)?;
    }
    let order: String = set.loaded.iter().map(|(name, _)| format!("{name}\n")).collect();
    let modules = set.loaded.into_iter().map(|(name, content)| (format!("{name}.ko"), content));
    Ok(modules.chain([("order".to_owned(), order.into_bytes())]).collect())
}

struct Set {
    /// By name as the kernel compares it: `_` for `-`.
    files: HashMap<String, PathBuf>,
    busybox: PathBuf,
    loaded: Vec<(String, Vec<u8>)>,
}

impl Set {
    fn index(&mut self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("Cannot read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                self.index(&path)?;
            } else if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko.xz")) {
                self.files.insert(canonical(name), path.clone());
            }
        }
        Ok(())
    }

    fn load(&mut self, name: &str) -> Result<()> {
        let name = canonical(name);
        if self.loaded.iter().any(|(loaded, _)| *loaded == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            bail!("Debian's kernel has no module {name}");
        };
        let file = fs::File::open(path).with_context(|| format!("Cannot open {}", path.display()))?;
        let output = Command::new(&self.busybox).args(["xzcat"]).stdin(Stdio::from(file)).output()?;
        if !output.status.success() {
            bail!("Cannot uncompress {}", path.display());
        }
        for needed in dependencies(&output.stdout) {
            self.load(&needed)?;
        }
        self.loaded.push((name, output.stdout));
        Ok(())
    }
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// What a module says it depends on: the strings `depends=a,b` in its `.modinfo` section. There is no `modules.dep` to read,
/// because installing the package would make it.
fn dependencies(module: &[u8]) -> Vec<String> {
    let strings = module.split(|byte| *byte == 0);
    let lists = strings.filter_map(|text| text.strip_prefix(b"depends="));
    let names = lists.flat_map(|list| list.split(|byte| *byte == b','));
    names.filter(|name| !name.is_empty()).map(|name| String::from_utf8_lossy(name).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(dependencies(b"\x7fELF\0license=GPL\0depends=mbcache,jbd2\0name=ext4\0"), ["mbcache", "jbd2"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
    }
}
