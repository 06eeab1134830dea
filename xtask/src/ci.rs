//! `cargo xtask ci`: the form of the source first, then all that `cargo xtask test` does.

use anyhow::Result;

use crate::{build, say};

/// The task.
pub(crate) fn run() -> Result<()> {
    say::openly(build::cargo().args(["fmt", "--all", "--check"]))?;
    say::openly(build::cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    say::openly(build::cargo().args(["xtask", "test"]))
}
