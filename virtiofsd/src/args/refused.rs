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
    #[arg(long, value_name = "GROUP", hide = true)]
    socket_group: Option<String>,
    #[arg(long, hide = true)]
    syslog: bool,
    #[arg(short = 'o', value_name = "OPTIONS", hide = true)]
    compat: Vec<String>,
    #[arg(long, value_name = "RULES", hide = true)]
    xattrmap: Option<String>,
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "always", hide = true)]
    security_label: Option<String>,
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
        if self.socket_group.is_some() {
            bail!("--socket-group: put the socket into a directory that this group may enter, or hand it over with --fd");
        }
        if self.syslog {
            bail!(
                "--syslog: the log goes to standard error, where systemd and outboard take it; --log-format json is for machines"
            );
        }
        if let Some(options) = self.compat.first() {
            bail!("-o {options}: give each option by its own name, as in --cache=auto; --help lists them");
        }
        if self.xattrmap.is_some() {
            bail!("--xattrmap is not known yet: without it, names of attributes are the same on both sides");
        }
        if self.security_label.as_deref().is_some_and(|when| when == "always") {
            bail!("--security-label: a guest's labels would be taken for this host's. Leave it out, or say never");
        }
        Ok(())
    }
}
