//! What a person or a monitoring system sees of a machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::machine::{Machine, kill, process};

const DEVICES: &str = "[disk.root]\npath = \"disk.img\"\n[rng.entropy]\n";

fn scrape(machine: &Machine) -> String {
    let mut stream = UnixStream::connect(machine.dir.join("run/outboard/web/metrics")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn metrics_of_every_process_are_on_one_socket() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    kill("-KILL", running.pid("root"));
    running.until("it is back", |report| {
        let root = process(report, "root");
        root["state"] == "connected" && root["restarts"] == 1
    });
    let answer = scrape(&machine);
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    let root = "machine=\"web\",process=\"root\",device=\"root\"";
    for line in [
        "outboard_machine_running{machine=\"web\"} 1".to_owned(),
        format!("outboard_blk_reads_total{{{root}}} 7"),
        format!("outboard_process_restarts_total{{{root}}} 1"),
        format!("outboard_device_connected{{{root}}} 1"),
    ] {
        assert!(text.lines().any(|have| have == line), "{line}\n{text}");
    }
    for role in ["composer", "vmm", "root", "entropy"] {
        let label = format!("process=\"{role}\"");
        for name in ["process_resident_bytes", "process_private_bytes", "process_cpu_seconds_total"] {
            let of = |line: &&str| line.starts_with(&format!("outboard_{name}{{")) && line.contains(&label);
            let value = text.lines().find(of).and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            assert!(value.is_some_and(|value| value > 0.0 || name.contains("cpu")), "{name} of {role}\n{text}");
        }
    }
    assert!(!text.contains(" 1000\n"), "a process cannot count what only the composer knows: {text}");
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
    assert!(machine.is_gone());
}

#[test]
fn the_doctor_finds_what_is_not_confined() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let outcome = machine.run(&["doctor", "web", "--json"]);
    let found: Value = serde_json::from_str(&outcome.stdout).unwrap();
    // The stand-ins do not confine themselves: they still see the files of this host.
    let root = found["machine"]["processes"].as_array().unwrap().iter().find(|one| one["role"] == "root").unwrap();
    let state = |name: &str| {
        let findings = root["findings"].as_array().unwrap();
        findings.iter().find(|finding| finding["name"] == name).unwrap()["state"].clone()
    };
    assert_eq!((state("files"), state("namespaces")), (json!("missing"), json!("ok")), "{root:#}");
    assert!(found["host"].as_array().unwrap().iter().any(|one| one["name"] == "programs" && one["state"] == "ok"));
    assert_eq!(outcome.status, Some(1));
    let text = machine.run(&["doctor", "web"]).stdout;
    assert!(text.contains("    MISSING  files         it sees "), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let stranger = machine.run(&["doctor", "nobody"]);
    assert_eq!((stranger.status, stranger.stderr.as_str()), (Some(1), "outboard: No machine called `nobody` is running\n"));
    machine.run(&["stop", "web"]);
    running.end();
}
