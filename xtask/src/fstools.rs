//! Other people's tests of file systems, built from crates.io: pjdfstest, which asks for everything that POSIX says, and fsx, which
//! compares a file with what it should be after each of many operations.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{build, cache, say};

const CRATES: &[&str] = &["pjdfstest@0.2.2", "fsx@0.3.2"];

/// The tree they are in, made or found made.
pub(crate) fn prepare() -> Result<PathBuf> {
    let product = cache::dir()?.join("fstools");
    cache::product(&product, &cache::key(&[CRATES.join(" ").as_bytes()]), |tree| {
        CRATES.iter().try_for_each(|name| {
            let mut command: Command = build::cargo();
            // What is set for our own programs is not for these: cargo looks for it from where it is started.
            command.current_dir(tree).env_remove("CARGO_TARGET_DIR").env_remove("CARGO_BUILD_TARGET").env_remove("RUSTFLAGS");
            command.args(["install", "--locked", "--quiet", "--root"]).arg(tree).arg(name);
            say::step(&format!("Build {name}"), || say::quietly(&mut command))?;
            Ok(())
        })
    })?;
    Ok(product)
}
