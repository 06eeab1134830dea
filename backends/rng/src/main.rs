//! `outboard-rng`: a vhost-user server for virtio-rng.

use std::process::ExitCode;

use rng::args::{Args, Config};
use rng::device::Rng;
use rng::metrics;
use rng::sandbox::POLICY;
use vhost_user::Backend;

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let config = Config::from(startup.args());
        let trust = startup.args().memory.trust();
        virtio::metrics::publish(startup.metrics()?, &metrics::ALL, 1)?;
        let confined = startup.confine()?;
        let mut backend = Backend::new(Rng::new(&config, &confined)?, trust)?;
        confined.serve(|frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?))
    })
}
