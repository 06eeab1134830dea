//! `outboard ps`: the machines that run, and which process serves which device.

use anyhow::{Context, Result, bail};

use crate::args::Ps;
use crate::control::client::Client;
use crate::control::report::{Report, table};
use crate::{notices, runtime};

/// The command.
pub fn run(args: &Ps) -> Result<u8> {
    let base = runtime::base()?;
    let mut reports = Vec::new();
    for name in runtime::machines(&base)? {
        if args.name.as_ref().is_some_and(|wanted| *wanted != name) {
            continue;
        }
        // A machine that ends just now is no error.
        if let Ok(report) = ask(&base.join(&name).join(runtime::CONTROL)) {
            reports.push(report);
        }
    }
    if let Some(name) = &args.name
        && reports.is_empty()
    {
        bail!("No machine called `{name}` is running");
    }
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&reports).context("Cannot write JSON")?)
    } else if reports.is_empty() {
        "No machine is running.\n".to_owned()
    } else {
        table(&reports)
    };
    notices::answer(&text)?;
    Ok(0)
}

fn ask(path: &std::path::Path) -> Result<Report> {
    let mut report = Client::connect(path)?.report()?;
    report.look();
    Ok(report)
}
