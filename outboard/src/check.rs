//! `outboard check`: all that is wrong with a machine file, at once, and nothing is started.

use anyhow::Result;

use crate::args::Check;
use crate::machine::file::{self, Problem};
use crate::machine::{check, size};
use crate::notices;

/// The command.
pub fn run(args: &Check) -> Result<u8> {
    let (text, dir) = file::open(&args.file)?;
    let name = args.file.display().to_string();
    let (problems, machine) = match file::look(&text, &name, &dir) {
        Err(problems) => (problems, None),
        Ok(read) => {
            let line = |about: &str| read.lines.get(about).copied().unwrap_or(0);
            let mut problems: Vec<Problem> = check::all(&read.machine)
                .into_iter()
                .map(|(about, error)| Problem { line: line(&about), says: format!("{error:#}") })
                .collect();
            problems.sort();
            (problems, Some(read.machine))
        }
    };
    for problem in &problems {
        notices::show(&problem.sentence(&name));
    }
    if !problems.is_empty() {
        return Ok(crate::USAGE);
    }
    if let Some(machine) = machine {
        let devices = match machine.devices.len() {
            1 => "1 device".to_owned(),
            count => format!("{count} devices"),
        };
        let (cpus, memory) = (machine.cpus, size::show(machine.memory));
        let processors = if cpus == 1 { "processor" } else { "processors" };
        notices::answer(&format!("{name}: `{}` makes sense: {cpus} {processors}, {memory}, {devices}\n", machine.name))?;
    }
    Ok(0)
}
