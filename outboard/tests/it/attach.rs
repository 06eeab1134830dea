//! A machine in the background, and terminals that come and go.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Child;

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};

use crate::machine::{Machine, Outcome, eventually, kill, process, terminal};

/// A machine in the background is nobody's child: it is ended with the test.
struct Background<'a>(&'a Machine);

impl Background<'_> {
    fn start(machine: &Machine) -> Background<'_> {
        let outcome = machine.run(&["run", "--detach", "web.toml"]);
        let says = "web: running in the background; see `outboard ps`, `outboard console web`\n";
        assert_eq!((outcome.status, outcome.stdout.as_str(), outcome.stderr.as_str()), (Some(0), says, ""));
        Background(machine)
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        self.0.run(&["stop", "--timeout", "0", "web"]);
    }
}

/// A person at a terminal with `outboard console`.
struct Person {
    child: Child,
    keys: File,
    terminal: File,
    seen: String,
}

impl Person {
    fn attach(machine: &Machine) -> Person {
        let (keys, terminal) = terminal();
        let mut command = machine.command(&["console", "web"]);
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        let child = command.spawn().unwrap();
        Person { child, keys, terminal, seen: String::new() }
    }

    fn sees(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let mut piece = [0; 256];
            let count = self.keys.read(&mut piece).unwrap();
            self.seen.push_str(&String::from_utf8_lossy(&piece[..count]));
        }
        self.seen.clear();
    }

    fn end(self) -> Outcome {
        let outcome = Outcome::from(&self.child.wait_with_output().unwrap());
        assert!(tcgetattr(&self.terminal).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO), "it is put back");
        outcome
    }
}

const CONSOLE: &str = "[console.main]\noutput = \"attach\"\n";

#[test]
fn a_terminal_attaches_and_detaches_and_the_machine_goes_on() {
    let machine = Machine::new().file(CONSOLE);
    let _background = Background::start(&machine);
    for _ in 0..2 {
        let mut person = Person::attach(&machine);
        person.sees("hello ");
        person.keys.write_all(b"ls\r").unwrap();
        person.sees("ls\r");
        let second = machine.run(&["console", "web"]);
        let says = "outboard: Another terminal is attached to the console of `web`; detach it there with Ctrl-] q\n";
        assert_eq!((second.status, second.stderr.as_str()), (Some(1), says));
        person.keys.write_all(b"\x1dq").unwrap();
        let outcome = person.end();
        assert_eq!(outcome.status, Some(0));
        assert!(outcome.stderr.starts_with("outboard: This is the console of `web`; Ctrl-] q detaches."), "{}", outcome.stderr);
        assert!(outcome.stderr.trim_end().ends_with("outboard: Detached; `web` goes on."), "{}", outcome.stderr);
    }
    assert!(machine.run(&["ps", "web"]).stdout.contains("main      console  outboard-console"));
}

#[test]
fn who_is_attached_stays_when_the_process_is_replaced_and_leaves_with_the_machine() {
    let machine = Machine::new().file(CONSOLE);
    let _background = Background::start(&machine);
    let mut person = Person::attach(&machine);
    person.sees("hello ");
    let report = || serde_json::from_str::<serde_json::Value>(&machine.run(&["ps", "--json", "web"]).stdout).unwrap()[0].clone();
    kill("-KILL", process(&report(), "main")["pid"].as_u64().unwrap());
    person.sees("hello ");
    person.keys.write_all(b"again").unwrap();
    person.sees("again");
    assert_eq!(machine.run(&["stop", "web"]).status, Some(0));
    let outcome = person.end();
    assert_eq!(outcome.status, Some(0));
    assert!(outcome.stderr.trim_end().ends_with("outboard: `web` has ended."), "{}", outcome.stderr);
    eventually("nothing is left", || machine.is_gone());
}

#[test]
fn a_console_on_the_terminal_becomes_one_to_attach_to_in_the_background() {
    let machine = Machine::new().file("[console.main]\n");
    let _background = Background::start(&machine);
    let mut person = Person::attach(&machine);
    person.sees("hello ");
    person.keys.write_all(b"\x1dq").unwrap();
    assert_eq!(person.end().status, Some(0));
}

#[test]
fn what_goes_wrong_before_the_machine_runs_is_told_to_the_caller() {
    let failing = |machine: &Machine| {
        let outcome = machine.run(&["run", "--detach", "web.toml"]);
        assert_eq!(outcome.stdout, "");
        eventually("nothing is left", || machine.is_gone() || !machine.dir.join("run/outboard").exists());
        (outcome.status, outcome.stderr)
    };
    let machine = Machine::new().file("[disk.root]\npath = \"disk.img\"\n").pretend("blk:1");
    let says = "web: The device `root` did not start: Cannot open image /x.img: it is in use\n";
    assert_eq!(failing(&machine), (Some(1), says.to_owned()));
    let machine = Machine::new().file("").pretend("vmm:die");
    let says = "web: The VMM failed: Cannot open /dev/kvm: Permission denied (os error 13)\n";
    assert_eq!(failing(&machine), (Some(1), says.to_owned()));
    let both = machine.run(&["run", "--detach", "--announce", "web.toml"]);
    assert!(both.status == Some(2) && both.stderr.contains("cannot be used with"), "{}", both.stderr);
    let machine = Machine::new().file("serial = \"stdio\"\n");
    let says = "outboard: A machine in the background has no terminal for its serial port: give it a file\n";
    assert_eq!(failing(&machine), (Some(2), says.to_owned()));
}

#[test]
fn a_machine_without_a_name_is_told_the_one_it_got() {
    let machine = Machine::new();
    let outcome = machine.run(&["run", "--detach", "--kernel", "kernel", "--memory", "64M", "--rng"]);
    let name = outcome.stdout.split(':').next().unwrap();
    let listed = machine.run(&["ps", name]);
    let stopped = machine.run(&["stop", name]);
    assert_eq!((outcome.status, listed.status, stopped.status), (Some(0), Some(0), Some(0)), "{outcome:?} {listed:?}");
}

#[test]
fn who_stops_waiting_for_a_machine_has_stopped_it() {
    let machine = Machine::new().file("[disk.root]\npath = \"disk.img\"\n").pretend("blk:mute");
    let mut waiting = machine.command(&["run", "--detach", "web.toml"]).spawn().unwrap();
    eventually("it starts", || machine.run(&["ps", "web"]).stdout.contains("root      blk"));
    kill_process(Pid::from_child(&waiting), Signal::INT).unwrap();
    assert!(!waiting.wait().unwrap().success());
    eventually("it is gone", || machine.is_gone());
}

#[test]
fn a_machine_without_a_console_to_attach_to_says_so() {
    let machine = Machine::new().file("[console.main]\noutput = \"file\"\npath = \"log\"\n");
    let _background = Background::start(&machine);
    let outcome = machine.run(&["console", "web"]);
    let says = "outboard: `web` has no console to attach to: give it one with output = \"attach\"\n";
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(1), says));
}
