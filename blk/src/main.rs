//! `outboard-blk`: a vhost-user server for virtio-blk.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use blk::args::{Args, Config};
use blk::commands::Entrance;
use blk::device::{Blk, Engines};
use blk::image::Files;
use blk::metrics;
use blk::sandbox::POLICY;
use vhost_user::Backend;
use virtio::limit::Limits;

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let config = Config::try_from(startup.args())?;
        let trust = startup.args().memory.trust();
        let files = Files::open(&config, |fd| startup.inherited(fd))?;
        let engines = Engines::open(&config)?;
        virtio::metrics::publish_with(startup.metrics()?, &metrics::ALL, &metrics::TIMES, config.queues)?;
        let entrance = entrance(&startup)?;
        let limits = limits(&startup)?;
        let confined = startup.confine()?;
        let (disk, afterwards) = files.read(&config, &confined)?;
        let disk = Arc::new(disk);
        let device = Blk::new(&disk, engines, limits, &config, &confined)?;
        if let Some(entrance) = entrance {
            device.obey(entrance, &disk, afterwards);
        }
        let mut backend = Backend::new(device, trust)?;
        let code = confined.serve(|frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?))?;
        // No ring runs any more.
        disk.close()?;
        Ok(code)
    })
}

/// Its own limits, or those of its group.
fn limits(startup: &daemon::Startup<Args>) -> anyhow::Result<Limits> {
    let Some(fd) = startup.args().limit_fd else {
        return Ok(Limits::default());
    };
    let words = virtio::words::map(startup.inherited(fd)?).context("Cannot share the limits of a group")?;
    Ok(Limits::of_group(words))
}

/// Where commands come in, if they may.
fn entrance(startup: &daemon::Startup<Args>) -> anyhow::Result<Option<Entrance>> {
    let args = startup.args();
    Ok(match (&args.control_path, args.control_fd) {
        (Some(path), _) => Some(Entrance::Listening(daemon::listen(path)?)),
        (None, Some(fd)) => Some(Entrance::Connected(startup.inherited(fd)?.into())),
        (None, None) => None,
    })
}
