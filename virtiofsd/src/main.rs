//! `outboard-virtiofsd`: a vhost-user server for virtio-fs.

use std::process::ExitCode;

use anyhow::{Context, Result};
use daemon::Server;
use sandbox::{IdentityKind, Needs};
use vhost_user::Backend;
use virtiofsd::args::{Args, Config};
use virtiofsd::device::Fs;
use virtiofsd::fs::Session;
use virtiofsd::metrics;
use virtiofsd::sandbox::{OF_MANY, OF_ONE, POLICY};
use virtiofsd::share::Opened;

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let several = startup.identity() != IdentityKind::Own;
        let configs = Config::all(startup.args(), several)?;
        let trust = startup.args().memory.trust();
        let open = |config| Ok((Opened::open(&config, |fd| startup.inherited(fd))?, config));
        let shares = configs.into_iter().map(open).collect::<Result<Vec<_>>>()?;
        let (queues, descriptors) = shares.first().map(|(_, config)| (config.queues, config.descriptors)).unzip();
        virtio::metrics::publish_with(startup.metrics()?, &metrics::ALL, &metrics::TIMES, queues.unwrap_or_default())?;
        let mut kept = match startup.args().session_fd {
            Some(fd) => Some(Session::kept(startup.inherited(fd)?).context("Cannot share the page of a session")?),
            None => None,
        };
        let reach: Vec<_> = shares.iter().map(|(opened, config)| opened.reach(config)).collect();
        let keep = Some(if several { OF_MANY } else { OF_ONE });
        let threads = Some(POLICY.limits.threads.saturating_mul(reach.len() as u64));
        let confined = startup.confine_with(&Needs { reach: &reach, keep, descriptors, threads })?;
        drop(reach);
        let mut servers = Vec::new();
        for (opened, config) in shares {
            let session = kept.take().unwrap_or_else(Session::new);
            let device = Fs::new(opened.share(&config, session)?, &config, several, &confined)?;
            let mut backend = Backend::new(device, trust)?;
            let server: Server = Box::new(move |frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?));
            servers.push(server);
        }
        confined.serve_all(servers)
    })
}
