//! `outboard-blk`: a vhost-user server for virtio-blk.

use std::process::ExitCode;

use blk::args::{Args, Config};
use blk::device::{Blk, Engines};
use blk::image::Image;
use blk::metrics;
use blk::sandbox::POLICY;
use vhost_user::Backend;

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let config = Config::from(startup.args());
        let trust = startup.args().memory.trust();
        let image = Image::open(&config)?;
        let engines = Engines::open(&image, &config)?;
        virtio::metrics::publish(startup.metrics()?, &metrics::ALL, config.queues)?;
        let confined = startup.confine()?;
        let mut backend = Backend::new(Blk::new(image, engines, &config, &confined)?, trust)?;
        confined.serve(|frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?))
    })
}
