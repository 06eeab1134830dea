//! `cargo xtask attack --shares`: how servers of files take the requests of `outboard-probe fs attack`, ours beside upstream's, as the page
//! `docs/virtiofsd-attacks.md`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::cases;
use crate::{build, host, say, virtiofsd};

const INTRODUCTION: &str = "# How servers of files take requests that no kernel sends

<!-- Made by: cargo xtask attack --shares > docs/virtiofsd-attacks.md -->

Every request of [`outboard-probe fs attack`](probe.md#fs-attack) to our file server and to upstream's, each server started anew
for each request and as root. A name of an error is what the guest was told. **Bold** is what should not be: the server is gone, or does not serve
the next request, or something beside the shared folder has changed.

The requests under *names* are every operation that takes a name with everything that is no name: `above` is `../outboard-foe-was-here`,
`through-link` a path through a link that leads out of the share. Where upstream's server does not escape in its namespace, it may still have
done what was asked somewhere else in the share.
";

/// Who is attacked.
struct Server {
    name: &'static str,
    command: Vec<String>,
}

/// Prints the page.
pub(super) fn run(wanted: &[String]) -> Result<()> {
    host::prepare(&host::Wanted::default())?;
    let (programs, tree) = (build::programs(false)?, virtiofsd::prepare()?);
    let servers = servers(&programs, &tree);
    let mut reports = Vec::new();
    for server in &servers {
        let mut command = Command::new(programs.join("outboard-probe"));
        command
            .args(["fs", "attack", "--json"])
            .args(wanted.iter().flat_map(|case| ["--case", case]))
            .arg("--")
            .args(&server.command);
        // Status 1 says that one was not taken rightly: that is an answer.
        let output = say::step(&format!("Attack {}", server.name), || command.output().context("Cannot start the probe"))?;
        let report = serde_json::from_slice::<Value>(&output.stdout);
        reports.push(report.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?);
    }
    println!("{}", page(&servers, &reports).trim_end());
    Ok(())
}

fn servers(programs: &Path, tree: &Path) -> Vec<Server> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let path = |part: &str| tree.join(part).display().to_string();
    let places = ["--socket-path", "{socket}", "--shared-dir", "{share}", "--xattr"];
    let program = programs.join("outboard-virtiofsd").display().to_string();
    let ours = words(&[&[program.as_str()], &places[..]].concat());
    let libraries = path("usr/lib/x86_64-linux-gnu");
    let loader = [path("usr/lib64/ld-linux-x86-64.so.2"), "--library-path".to_owned(), libraries, path("usr/libexec/virtiofsd")];
    let theirs = |sandbox: &str| [loader.to_vec(), words(&places), words(&["--sandbox", sandbox])].concat();
    vec![
        Server { name: "ours", command: ours },
        Server { name: "upstream", command: theirs("namespace") },
        Server { name: "upstream, no sandbox", command: theirs("none") },
    ]
}

fn page(servers: &[Server], reports: &[Value]) -> String {
    let mut text = format!(
        "{INTRODUCTION}\n| server | requests | taken rightly | died | escaped | hung or confused |\n|---|---|---|---|---|---|\n"
    );
    for (server, report) in servers.iter().zip(reports) {
        let count = |outcomes: &[&str]| cases(report).filter(|case| outcomes.iter().any(|one| case["outcome"] == *one)).count();
        let (died, escaped, worse) = (count(&["died"]), count(&["escaped"]), count(&["hung", "confused"]));
        let (all, right) = (&report["attacks"], &report["right"]);
        text.push_str(&format!("| {} | {all} | {right} | {died} | {escaped} | {worse} |\n", server.name));
    }
    text.push_str("\nUpstream's is virtiofsd 1.13.2 of Debian. \"Taken rightly\" is our idea of what is right: one of the errors that say what is wrong.\n");
    let names: Vec<&str> = servers.iter().map(|server| server.name).collect();
    let all: Vec<Vec<&Value>> = reports.iter().map(|report| cases(report).collect()).collect();
    let mut theme = "";
    for (row, case) in all.first().into_iter().flatten().enumerate() {
        let now = case["theme"].as_str().unwrap_or_default();
        if now != theme {
            theme = now;
            text.push_str(&format!("\n## {theme}\n\n| request | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len())));
        }
        let cells: Vec<String> = all.iter().map(|report| report.get(row).map_or_else(String::new, |case| cell(case))).collect();
        text.push_str(&format!("| {} | {} |\n", case["case"].as_str().unwrap_or_default(), cells.join(" | ")));
    }
    text
}

fn cell(case: &Value) -> String {
    let outcome = case["outcome"].as_str().unwrap_or_default();
    if case["survived"] == true { outcome.to_owned() } else { format!("**{outcome}**") }
}
