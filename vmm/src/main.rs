//! `outboard-vmm`: one virtual machine.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use vmm::args::{Args, Config};
use vmm::machine::Opened;
use vmm::sandbox::{POLICY, PROCESSOR};

fn main() -> ExitCode {
    daemon::main(&POLICY, |startup: daemon::Startup<Args>| {
        let config = Config::try_from(startup.args())?;
        vmm::metrics::publish(startup.metrics()?, config.devices.len())?;
        let opened = Opened::open(config, |fd| startup.inherited(fd).map_err(io::Error::other))?;
        let (machine, cpus, shared) = opened.build()?;
        let confined = startup.confine()?;
        for cpu in cpus {
            let shared = Arc::clone(&shared);
            confined.spawn(PROCESSOR, cpu.thread_name(), move || cpu.run(&shared))?;
        }
        confined.run(|stop| Ok(machine.start()?.run(stop)?.into()))
    })
}
