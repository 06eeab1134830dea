//! `outboard-console`: a vhost-user server for virtio-console.

use std::process::ExitCode;

use console::args::{Args, Config};
use console::device::Console;
use console::metrics;
use console::port::Port;
use console::sandbox::POLICY;
use vhost_user::Backend;

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let config = Config::from(startup.args());
        let trust = startup.args().memory.trust();
        let (port, _restored_at_the_end) = Port::open(&config)?;
        virtio::metrics::publish(startup.metrics()?, &metrics::ALL, 2)?;
        let confined = startup.confine()?;
        let mut backend = Backend::new(Console::new(port, &confined)?, trust)?;
        confined.serve(|frontend, stop| Ok(backend.serve(frontend, stop).map(drop)?))
    })
}
