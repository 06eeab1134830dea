//! A running machine as an operator sees it: counters that count what the guest does, events of a crash, every layer in force.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::machine::{Machine, Plan, UNTIL_STOPPED};

/// The value of a metric whose line contains all of these.
fn metric(machine: &Machine, name: &str, labels: &[&str]) -> Option<f64> {
    let base = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR").unwrap());
    let mut stream = UnixStream::connect(base.join("outboard").join(&machine.name).join("metrics")).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let line = text.lines().find(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_crash_is_seen_and_what_the_guest_does_is_counted() {
    let command =
        format!("{UNTIL_STOPPED}; do dd if=/dev/hwrng of=/dev/null bs=64 count=1 status=none; echo turn; sleep 0.2; done");
    let mut machine = Plan::run(&command).with_disk().start();
    machine.wait_for("turn");
    let rings = metric(&machine, "outboard_vmm_rings", &["device=\"entropy\""]);
    assert_eq!(rings, Some(1.0));
    for (name, process) in [
        ("outboard_blk_reads_total", "a-root"),
        ("outboard_blk_read_bytes_total", "a-root"),
        ("outboard_queue_kicks_total", "a-root"),
        ("outboard_queue_calls_total", "a-root"),
        ("outboard_rng_bytes_total", "entropy"),
        ("outboard_console_shown_bytes_total", "main"),
    ] {
        let value = metric(&machine, name, &[&format!("process=\"{process}\"")]);
        assert!(value.is_some_and(|value| value > 0.0), "{name}: {value:?}");
    }
    let guest_memory = metric(&machine, "outboard_process_resident_bytes", &["process=\"vmm\""]).unwrap();
    let own = metric(&machine, "outboard_process_private_bytes", &["process=\"vmm\""]).unwrap();
    assert!(guest_memory > 32e6 && own < 16e6, "guest memory is not private: {guest_memory} {own}");

    let before = machine.pid("a-root");
    kill_process(Pid::from_raw(before).unwrap(), Signal::KILL).unwrap();
    suite::wait_for("the event", || machine.outboard(&["events", &machine.name]).contains("device back").then_some(()));
    let events = machine.outboard(&["events", &machine.name, "--json"]);
    let events: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_root: Vec<&str> =
        events.iter().filter(|event| event["device"] == "a-root").filter_map(|event| event["event"].as_str()).collect();
    assert_eq!((of_root[0], *of_root.last().unwrap()), ("device-connected", "device-back"));
    for between in ["process-ended", "process-restarted", "device-lost"] {
        assert!(of_root.contains(&between), "{of_root:?}");
    }
    assert_eq!(metric(&machine, "outboard_process_restarts_total", &["process=\"a-root\""]), Some(1.0));

    let top = machine.outboard(&["top", &machine.name, "--once"]);
    println!("{top}\n{}", machine.outboard(&["events", &machine.name]));
    assert!(top.lines().any(|line| line.starts_with("a-root     connected ")), "{top}");
    machine.stop_loop();
    machine.finish().passed();
}

#[test]
fn the_doctor_sees_every_layer_as_any_user() {
    for user in [None, Some(1000)] {
        let mut plan = Plan::run("echo up; sleep 1000");
        plan.user = user;
        let mut machine = plan.start();
        machine.wait_for("up");
        let found: Value = serde_json::from_str(&machine.outboard_status(&["doctor", "--json", &machine.name]).1).unwrap();
        let processes = found["machine"]["processes"].as_array().unwrap();
        assert_eq!(processes.len(), 5, "{found:#}");
        for process in processes {
            for finding in process["findings"].as_array().unwrap() {
                assert_eq!(finding["state"], "ok", "{user:?} {} {finding}", process["role"]);
            }
        }
        println!("{}", machine.outboard_status(&["doctor", &machine.name]).1);
        machine.outboard(&["stop", &machine.name]);
        assert_eq!(machine.finish().status.code(), Some(0));
    }
}

#[test]
fn who_attaches_to_a_console_sees_what_came_before() {
    let command = "echo before-attach >/dev/hvc1; echo said; read word </dev/hvc1; echo answer-$word >/dev/hvc1; sleep 1000";
    let mut machine = Plan::run(command).section("[console.second]\noutput = \"attach\"\n").start();
    machine.wait_for("said");
    let mut attach = Command::new(suite::program("outboard"));
    attach.args(["console", &machine.name]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut person = attach.spawn().unwrap();
    let mut keys = person.stdin.take().unwrap();
    keys.write_all(b"hello\n").unwrap();
    let mut screen = person.stdout.take().unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("answer-hello") {
        let mut piece = [0; 256];
        let count = screen.read(&mut piece).unwrap();
        assert!(count > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&piece[..count]);
    }
    assert!(String::from_utf8_lossy(&seen).contains("before-attach"), "{}", String::from_utf8_lossy(&seen));
    machine.outboard(&["stop", &machine.name]);
    assert_eq!(machine.finish().status.code(), Some(0));
    drop(keys);
    assert_eq!(person.wait().unwrap().code(), Some(0));
}
