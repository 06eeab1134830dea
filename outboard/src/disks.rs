//! `outboard disk`: the disks of a running machine, looked at and changed while the guest goes on.

use std::path::absolute;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use crate::args::{Disk, DiskCommand};
use crate::control::client::Client;
use crate::machine::disk::{self, Limits, Rate};
use crate::machine::size;
use crate::{notices, runtime};

/// The program that serves them.
const PROGRAM: &str = "outboard-blk";

/// The command.
pub fn run(args: &Disk) -> Result<u8> {
    let mut client = Client::connect(&runtime::find(&args.machine)?.join(runtime::CONTROL))?;
    let answer = match &args.command {
        DiskCommand::Status { disk, json } => status(&mut client, disk.as_deref(), *json)?,
        DiskCommand::Snapshot { disk, new_file } => {
            let path = absolute(new_file).with_context(|| format!("Cannot find {}", new_file.display()))?;
            let path = path.to_str().context("The new file's name is not UTF-8")?;
            let now = client.disk("blockdev-snapshot-sync", &json!({"device": disk, "snapshot-file": path}))?;
            format!("{disk}: goes on in {path}{}\n{}", pause(&now), in_file(disk, &now))
        }
        DiskCommand::Reset { disk } => {
            let now = client.disk("outboard-disk-reset", &json!({"device": disk}))?;
            format!("{disk}: what was written is forgotten{}\n", pause(&now))
        }
        DiskCommand::Resize { disk, size } => {
            let now = client.disk("block_resize", &json!({"device": disk, "size": size::parse(size)?}))?;
            format!("{disk}: has {}\n", size::show(number(&now, "/bytes")))
        }
        DiskCommand::Limit { disk, ops, bytes } => {
            let now = client.disk("block_set_io_throttle", &limit(disk, ops.as_deref(), bytes.as_deref())?)?;
            format!("{disk}: {}\n", limits(&now))
        }
    };
    notices::answer(&answer)?;
    Ok(0)
}

fn status(client: &mut Client, only: Option<&str>, as_json: bool) -> Result<String> {
    let disks = match only {
        Some(disk) => vec![disk.to_owned()],
        None => client.report()?.processes.into_iter().filter(|one| one.program == PROGRAM).map(|one| one.role).collect(),
    };
    let mut states = Vec::new();
    for disk in &disks {
        states.push(client.disk("query-outboard-disk", &json!({"device": disk}))?);
    }
    if as_json {
        return Ok(format!("{:#}\n", Value::from(states)));
    }
    if states.is_empty() {
        bail!("The machine has no disk that a process of ours serves");
    }
    Ok(states.iter().map(text).collect())
}

fn text(state: &Value) -> String {
    let use_of_it = match (state["read-only"] == true, state["ephemeral"] == true) {
        (true, _) => "only read",
        (_, true) => "ephemeral",
        _ => "read and written",
    };
    let cache = if state["direct"] == true { "past the page cache" } else { "through the page cache" };
    let name = state["device"].as_str().unwrap_or_default();
    let mut text = format!("{name}: {}, {use_of_it}, {cache}; {}\n", size::show(number(state, "/bytes")), limits(state));
    for (path, format) in images(state) {
        text.push_str(&format!("  {format:<6}{}\n", path.escape_debug()));
    }
    text
}

fn images(state: &Value) -> impl Iterator<Item = (&str, &str)> {
    let images = state["images"].as_array().into_iter().flatten();
    images.filter_map(|image| Some((image["path"].as_str()?, image["format"].as_str()?)))
}

fn number(state: &Value, pointer: &str) -> u64 {
    state.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn limits(state: &Value) -> Limits {
    serde_json::from_value(state["limits"].clone()).unwrap_or_default()
}

fn pause(state: &Value) -> String {
    let micros = state["pause-microseconds"].as_u64();
    micros.map_or_else(String::new, |micros| format!("; the guest waited {}.{} ms", micros / 1000, micros % 1000 / 100))
}

/// What has to stand in the machine file from now on: its next run would write to an image that another one is based on.
fn in_file(disk: &str, state: &Value) -> String {
    // TOML writes text as JSON does.
    let quoted = |path: &str| Value::from(path).to_string();
    let mut images = images(state);
    let (top, _) = images.next().unwrap_or_default();
    let below: Vec<String> =
        images.map(|(path, format)| format!("{{ path = {}, format = \"{format}\" }}", quoted(path))).collect();
    format!(
        "Before the machine is started again, its file has to say so:\n[disk.{disk}]\npath = {}\nformat = \"qcow2\"\nbacking = [{}]\n",
        quoted(top),
        below.join(", ")
    )
}

fn limit(disk: &str, ops: Option<&str>, bytes: Option<&str>) -> Result<Value> {
    let mut arguments = Map::from_iter([("device".to_owned(), disk.into())]);
    let mut set = |rate: Option<Rate>, name: &str| {
        if let Some(rate) = rate {
            arguments.insert(name.to_owned(), rate.per_second.into());
            arguments.insert(format!("{name}_max"), rate.burst.into());
        }
    };
    set(ops.map(disk::operations).transpose()?, "iops");
    set(bytes.map(disk::bytes).transpose()?, "bps");
    Ok(arguments.into())
}
