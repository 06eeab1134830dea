//! `outboard-probe fs attack`: requests that no guest's kernel would send, and names that are none, against our server and upstream's.

use std::process::Command;

use serde_json::Value;
use suite::{program, run, virtiofsd};

fn attack(cases: &[&str], server: &[String]) -> (Option<i32>, Value) {
    let mut command = Command::new(program("outboard-probe"));
    command.args(["fs", "attack", "--json"]).args(cases.iter().flat_map(|case| ["--case", case])).arg("--").args(server);
    let ended = run(&mut command);
    let report = serde_json::from_str(&ended.out).unwrap_or_else(|_| panic!("{}{}", ended.out, ended.err));
    (ended.code, report)
}

fn ours(more: &[&str]) -> Vec<String> {
    let program = program("outboard-virtiofsd").display().to_string();
    let words = ["--log-level", "error", "--socket-path", "{socket}", "--shared-dir", "{share}"];
    [program.as_str()].into_iter().chain(words).chain(more.iter().copied()).map(str::to_owned).collect()
}

/// What the cases of a report that are not so are called.
fn without(report: &Value, key: &str) -> Vec<String> {
    let cases = report["cases"].as_array().unwrap().iter().filter(|case| case[key] != true);
    cases.map(|case| format!("{}/{}: {} {}", case["theme"], case["case"], case["outcome"], case["detail"])).collect()
}

#[test]
fn every_bad_request_is_refused_and_the_next_is_served() {
    let (code, report) = attack(&[], &ours(&["--xattr"]));
    let wrong = without(&report, "right");
    assert!(wrong.is_empty() && code == Some(0), "{wrong:#?}");
    let cases = report["cases"].as_array().unwrap();
    assert!(cases.len() > 350, "all of them: {}", cases.len());
}

/// The same where other files are behind them, and where none can be changed.
#[test]
fn bad_requests_in_other_shares() {
    const ALL: &[&str] = &["layouts/", "numbers/", "above", "short"];
    // Nothing can be opened to be written there.
    const STILL: &[&str] = &["layouts/", "numbers/node", "above", "short"];
    let shares: [(&[&str], &[&str]); 3] = [
        (STILL, &["--readonly"]),
        (ALL, &["--xattr", "--posix-acl", "--killpriv-v2", "--cache", "always"]),
        (ALL, &["--owner-map", "squash"]),
    ];
    for (cases, more) in shares {
        let (_, report) = attack(cases, &ours(more));
        let bad = without(&report, "survived");
        assert!(bad.is_empty(), "{more:?}: {bad:#?}");
    }
}

/// What is known to end upstream's server: the judge has to see that, and that a name got out.
#[test]
fn deaths_and_escapes_are_told_from_errors() {
    let cases = ["layouts/header-short", "messages/rename-one-name", "names/mkdir-above", "files/fifo-open"];
    let command = virtiofsd::command(&["--socket-path", "{socket}", "--shared-dir", "{share}", "--sandbox", "none"]);
    let (code, report) = attack(&cases, &command);
    let outcome = |name: &str| {
        let case = report["cases"].as_array().unwrap().iter().find(|case| case["case"] == name).unwrap();
        case["outcome"].as_str().unwrap().to_owned()
    };
    assert_eq!(code, Some(1));
    assert_eq!([outcome("header-short"), outcome("rename-one-name"), outcome("mkdir-above")], ["died", "died", "escaped"]);
    assert_eq!(outcome("fifo-open"), "EBADF");
}
