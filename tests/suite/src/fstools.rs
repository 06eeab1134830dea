//! Other people's tests of file systems, from the tree that `cargo xtask test` makes.

use std::path::PathBuf;
use std::process::Command;

/// A program of the tree.
pub fn tool(name: &str) -> Command {
    let tree = std::env::var_os("OUTBOARD_FSTOOLS").map(PathBuf::from).unwrap_or_default();
    let program = tree.join("bin").join(name);
    assert!(program.exists(), "OUTBOARD_FSTOOLS does not say where {name} is; run cargo xtask test");
    Command::new(program)
}
