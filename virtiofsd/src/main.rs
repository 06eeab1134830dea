//! `outboard-virtiofsd`: a vhost-user server for virtio-fs.

use std::process::ExitCode;

use anyhow::Context;
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
        let config = Config::new(startup.args(), several)?;
        let trust = startup.args().memory.trust();
        let opened = Opened::open(&config, |fd| startup.inherited(fd))?;
        virtio::metrics::publish_with(startup.metrics()?, &metrics::ALL, &metrics::TIMES, config.queues)?;
        let session = match startup.args().session_fd {
            Some(fd) => Session::kept(startup.inherited(fd)?).context("Cannot share the page of a session")?,
            None => Session::new(),
        };
        let confined = startup.confine_with(&Needs {
            reach: &[opened.reach(&config)],
            keep: Some(if several { OF_MANY } else { OF_ONE }),
            descriptors: Some(config.descriptors),
        })?;
        let device = Fs::new(opened.share(&config, session)?, &config, several, &confined)?;
        let mut backend = Backend::new(device, trust)?;
        confined.serve(|frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?))
    })
}
