//! `outboard-blk`: a vhost-user server for virtio-blk.

use std::process::ExitCode;
use std::sync::Arc;

use blk::args::{Args, Config};
use blk::device::{Blk, Engines};
use blk::image::Disk;
use blk::metrics;
use blk::sandbox::POLICY;
use vhost_user::Backend;

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let config = Config::try_from(startup.args())?;
        let trust = startup.args().memory.trust();
        let disk = Disk::open(&config)?;
        let engines = Engines::open(&disk, &config)?;
        virtio::metrics::publish_with(startup.metrics()?, &metrics::ALL, &metrics::TIMES, config.queues)?;
        let confined = startup.confine()?;
        let disk = Arc::new(disk);
        let mut backend = Backend::new(Blk::new(&disk, engines, &config, &confined)?, trust)?;
        let code = confined.serve(|frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?))?;
        // No ring runs any more.
        disk.close()?;
        Ok(code)
    })
}
