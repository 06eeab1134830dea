//! `outboard stop`: the power button, a deadline, the end.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::args::Stop;
use crate::control::client::Client;
use crate::supervisor::PRESS_AGAIN;
use crate::{notices, runtime};

/// How long the composer may take to end the processes of a machine that was told to end at once.
const END_LIMIT: Duration = Duration::from_secs(15);

/// The command.
pub fn run(args: &Stop) -> Result<u8> {
    let mut client = Client::connect(&runtime::find(&args.name)?.join(runtime::CONTROL))?;
    if powers_off(&mut client, Duration::from_secs(args.timeout))? {
        notices::line(&format!("{}: powered off", args.name));
        return Ok(0);
    }
    client.execute("quit")?;
    if !client.wait_for_end(END_LIMIT)? {
        bail!("The machine `{}` does not end; its composer no longer answers", args.name);
    }
    notices::line(&format!("{}: did not power off in {} s and was ended", args.name, args.timeout));
    Ok(0)
}

/// Presses the power button, again and again, because a guest that is still starting does not hear it.
fn powers_off(client: &mut Client, limit: Duration) -> Result<bool> {
    let began = Instant::now();
    loop {
        client.execute("system_powerdown")?;
        let left = limit.saturating_sub(began.elapsed());
        if client.wait_for_end(left.min(PRESS_AGAIN))? {
            return Ok(true);
        }
        if began.elapsed() >= limit {
            return Ok(false);
        }
    }
}
