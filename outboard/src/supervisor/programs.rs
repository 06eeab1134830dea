//! Where the programs are: beside `outboard` itself, so that a build and an installation never mix.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::machine::{Backend, Machine};

/// The VMM's file name.
pub const VMM: &str = "outboard-vmm";
/// All programs that a machine may need.
pub const PROGRAMS: [&str; 5] = [VMM, "outboard-blk", "outboard-rng", "outboard-console", "outboard-virtiofsd"];

/// The directory of the programs.
#[derive(Debug)]
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// Finds every program that a machine needs.
    pub fn find(machine: &Machine) -> Result<Self> {
        let own = env::current_exe().context("Cannot find out where outboard itself is")?;
        let dir = own.parent().context("outboard is in no directory")?.to_path_buf();
        let programs = Self { dir };
        programs.check(VMM, "every machine")?;
        for device in &machine.devices {
            if let Backend::Process(program) = &device.backend {
                programs.check(program.name, &format!("the device `{}`", device.name))?;
            }
        }
        Ok(programs)
    }

    /// The path of one of them.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn check(&self, name: &str, who: &str) -> Result<()> {
        if !self.path(name).is_file() {
            bail!("Cannot find the program {}, which {who} needs", self.path(name).display());
        }
        Ok(())
    }
}
