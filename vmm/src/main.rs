//! The program.
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use vmm::args::{Args, Config};
use vmm::machine::Opened;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("outboard-vmm: {e:#}");
            ExitCode::from(1)
        }
    }
}

fn run() -> anyhow::Result<u8> {
    let config = Config::try_from(Args::parse())?;
    let (machine, cpus, shared) = Opened::open(config)?.build()?;
    for cpu in cpus {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || cpu.run(&shared));
    }
    Ok(machine.start()?.run()?.into())
}
