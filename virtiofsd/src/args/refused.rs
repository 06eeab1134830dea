//! Options of the virtiofsd that people know which are not honoured here, each with the reason.

use anyhow::{Result, bail};
use clap::Args;

/// They are known, so that whoever uses one is told what to do instead.
#[derive(Args, Debug)]
pub(super) struct Refused {
    /// How the process is confined: always in namespaces
    #[arg(long, value_name = "MODE", default_value = "namespace", hide = true)]
    sandbox: String,
    /// What becomes of a process that calls what it may not: always its end
    #[arg(long, value_name = "ACTION", default_value = "kill", hide = true)]
    seccomp: String,
    #[arg(long, value_name = "CAPABILITIES", hide = true)]
    modcaps: Option<String>,
    /// Options as upstream once had them: source=DIR, cache=none, xattr and so on. None of them is for what is given by name as well
    #[arg(short = 'o', value_name = "OPTION[,OPTION...]")]
    compat: Vec<String>,
}

impl Refused {
    /// # Errors
    /// When one was given that cannot be honoured.
    pub(super) fn check(&self) -> Result<()> {
        match self.sandbox.as_str() {
            "namespace" => {}
            "chroot" => bail!("--sandbox chroot is weaker than namespaces, which need no privileges here: leave it out"),
            "none" => bail!("--sandbox none: there is no way to run unconfined. Leave it out; no privileges are needed"),
            other => bail!("--sandbox {other}: only namespace is known"),
        }
        if self.seccomp != "kill" {
            bail!("--seccomp {}: a process that calls what it may not is ended, always. Leave it out", self.seccomp);
        }
        if self.modcaps.is_some() {
            bail!("--modcaps: which capabilities are kept follows from whose files are served (--owner-map). Leave it out");
        }
        // Those that stand where they are looked for have become others by now.
        if let Some(options) = self.compat.first() {
            bail!("-o {options}: -o has to be a word by itself, or to begin one");
        }
        Ok(())
    }
}
