//! What a person or a monitoring system sees of a machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::{Value, json};

use crate::machine::{Machine, Outcome, eventually, kill, process, terminal};

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

/// The events of a machine that has run, in the words of `events --json`.
fn events(machine: &Machine, args: &[&str]) -> Vec<Value> {
    let outcome = machine.run(&[&["events", "web", "--json"], args].concat());
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), ""));
    outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn events_tell_the_story_of_a_machine_to_its_end() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let follower = machine.command(&["events", "web", "--follow", "--json"]).spawn().unwrap();
    let pid = running.pid("root");
    kill("-KILL", pid);
    running.until("it is back", |report| {
        let root = process(report, "root");
        root["state"] == "connected" && root["restarts"] == 1
    });
    let so_far = events(&machine, &[]);
    let of = |list: &[Value], device: &str| {
        let of = list.iter().filter(|event| event["device"] == device);
        of.map(|event| event["event"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(of(&so_far, "root"), ["device-connected", "process-ended", "process-restarted", "device-back"], "{so_far:#?}");
    assert_eq!(so_far[0]["event"], "started");
    let ended = so_far.iter().find(|event| event["event"] == "process-ended").unwrap();
    assert_eq!(ended["reason"], "was killed by signal 9");
    let people = machine.run(&["events", "web"]).stdout;
    assert!(people.lines().any(|line| line.ends_with("process ended      root      was killed by signal 9")), "{people}");
    machine.run(&["stop", "web"]);
    running.end();
    let followed = Outcome::from(&follower.wait_with_output().unwrap());
    let last: Vec<Value> = followed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(followed.status, Some(0));
    assert_eq!(last[..so_far.len()], so_far[..]);
    let names: Vec<&str> = last[so_far.len()..].iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["power-button", "ended"]);
    assert!(machine.is_gone());
    assert_eq!(events(&machine, &["--follow"]), last, "what has happened can still be seen");
    let stranger = machine.run(&["events", "nobody"]).stderr;
    assert_eq!(stranger, "outboard: No machine called `nobody` is running, or has ended lately\n");
    assert_eq!((&last.last().unwrap()["status"], &last.last().unwrap()["reason"]), (&json!(0), &json!("The guest powered off.")));
}

#[test]
fn what_the_guest_does_is_an_event_and_a_word_of_the_control_socket() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let mut stream = UnixStream::connect(machine.dir.join("run/outboard/web/control")).unwrap();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"system_reset\"}\n").unwrap();
    let mut heard = String::new();
    while !heard.contains("\"RESET\"") {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "{heard}");
        heard.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
    assert!(events(&machine, &[]).iter().any(|event| event["event"] == "guest-rebooted"));
    kill("-KILL", running.pid("root"));
    while !heard.contains("\"restarted\"") {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).unwrap();
        heard.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
    assert!(heard.contains("OUTBOARD_PROCESS") && heard.contains("was killed by signal 9"), "{heard}");
    machine.run(&["stop", "web"]);
    running.end();
}

#[test]
fn who_is_not_started_again_is_given_up() {
    let machine = Machine::new().file(&format!("restart = \"never\"\n{DEVICES}"));
    let running = machine.start();
    kill("-KILL", running.pid("root"));
    eventually("it is given up", || {
        events(&machine, &[]).iter().any(|event| event["event"] == "gave-up" && event["device"] == "root")
    });
    machine.run(&["stop", "web"]);
    running.end();
}

#[test]
fn logs_are_kept_beside_what_is_shown() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let follower = machine.command(&["logs", "web", "--follow"]).spawn().unwrap();
    for _ in 0..2 {
        let before = running.pid("root");
        kill("-KILL", before);
        running.until("it is back", |report| {
            let root = process(report, "root");
            root["state"] == "connected" && root["pid"].as_u64() != Some(before)
        });
    }
    let lines = |args: &[&str]| {
        let outcome = machine.run(&[&["logs", "web"], args].concat());
        assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
        outcome.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let all = lines(&[]);
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(all[0].ends_with("Z root: the process was killed by signal 9; starting it again at once"), "{all:?}");
    assert_eq!(lines(&["--process", "root"]), all);
    assert_eq!(lines(&["--process", "entropy"]), [""; 0]);
    assert_eq!(lines(&["--since", "1h"]), all);
    assert_eq!(lines(&["--since", "2999-01-01"]), [""; 0]);
    let wrong = machine.run(&["logs", "web", "--since", "yesterday"]);
    assert!(wrong.status == Some(2) && wrong.stderr.contains("write 90s, 5m, 2h or 1d"), "{}", wrong.stderr);
    machine.run(&["stop", "web"]);
    let outcome = running.end();
    let followed = Outcome::from(&follower.wait_with_output().unwrap());
    let said: Vec<&str> = followed.stdout.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(said, outcome.stderr.lines().collect::<Vec<_>>(), "what was shown is what is kept");
    assert!(machine.is_gone());
}

#[test]
fn top_shows_every_process_once_or_as_json() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let text = machine.run(&["top", "web", "--once", "--interval", "0.2"]).stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("web: 4 processes, "), "{text}");
    assert!(lines[1].starts_with("PROCESS    STATE       CPU%    RES   PRIV RST   UP"), "{text}");
    for (line, start) in
        lines[2..].iter().zip(["composer   watching", "vmm        running", "root       connected", "entropy    connected"])
    {
        assert!(line.starts_with(start), "{text}");
    }
    assert_eq!(lines.len(), 6, "{text}");
    let json = machine.run(&["top", "--once", "--interval", "0.2", "--json"]).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    let root = &json["machines"][0]["processes"][2];
    assert_eq!(
        (&root["role"], &root["counters"]["blk_reads"], &root["rates"]["requests"]),
        (&json!("root"), &json!(7), &json!(0.0))
    );
    let wrong = machine.run(&["top", "--interval", "0"]);
    assert!(wrong.status == Some(2) && wrong.stderr.contains("between 0.1 and 3600"), "{}", wrong.stderr);
    assert_eq!(machine.run(&["top", "nobody"]).stderr, "outboard: No machine called `nobody` is running\n");
    machine.run(&["stop", "web"]);
    running.end();
}

#[test]
fn top_gives_the_terminal_back() {
    for (key, signal) in [(Some(b'q'), None), (Some(3), None), (None, Some(Signal::TERM))] {
        let machine = Machine::new().file(DEVICES);
        let running = machine.start();
        let (mut controller, terminal) = terminal();
        let before = tcgetattr(&terminal).unwrap();
        let mut command = machine.command(&["top", "web"]);
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        let child = command.spawn().unwrap();
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("entropy") {
            let mut piece = [0; 4096];
            let count = controller.read(&mut piece).unwrap();
            seen.extend_from_slice(&piece[..count]);
        }
        assert!(!tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ECHO));
        match (key, signal) {
            (Some(key), _) => controller.write_all(&[key]).unwrap(),
            (None, signal) => kill_process(Pid::from_child(&child), signal.unwrap()).unwrap(),
        }
        let ended = Outcome::from(&child.wait_with_output().unwrap());
        assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""));
        assert_eq!(tcgetattr(&terminal).unwrap().local_modes, before.local_modes);
        let mut rest = [0; 4096];
        let count = controller.read(&mut rest).unwrap();
        assert!(
            String::from_utf8_lossy(&rest[..count]).ends_with("\x1b[?25h\x1b[?1049l"),
            "the cursor and the page are put back"
        );
        machine.run(&["stop", "web"]);
        running.end();
    }
}
