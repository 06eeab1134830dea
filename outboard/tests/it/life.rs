//! How a machine lives and ends.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};

use crate::machine::{LIMIT, Machine, Running, eventually, is_alive, kill, process, terminal};

const DEVICES: &str = "[disk.root]\npath = \"disk.img\"\n[rng.entropy]\n[console.main]\noutput = \"pty\"\n";

#[test]
fn a_machine_runs_is_shown_and_is_stopped() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let table = machine.run(&["ps"]).stdout;
    for line in ["web      composer", "web      vmm", "web      root      blk      outboard-blk"] {
        assert!(table.contains(line), "{table}");
    }
    let second = machine.run(&["run", "web.toml"]);
    assert_eq!(second.stderr, "outboard: A machine called `web` is running already; see `outboard ps`\n");
    let stop = machine.run(&["stop", "web"]);
    assert_eq!((stop.status, stop.stderr.as_str()), (Some(0), "web: powered off\n"));
    let outcome = running.end();
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), "web: The guest powered off.\n"));
    assert!(machine.is_gone());
}

#[test]
fn each_end_of_the_guest_has_its_status() {
    let sentences = [
        (0, "The guest powered off."),
        (3, "The guest rebooted."),
        (4, "The guest's kernel panicked."),
        (5, "The guest's processor shut down (triple fault)."),
    ];
    for (status, sentence) in sentences {
        let machine = Machine::new().file(DEVICES).pretend(&format!("vmm:{status}"));
        let outcome = machine.run(&["run", "web.toml"]);
        assert_eq!((outcome.status, outcome.stderr), (Some(status), format!("web: {sentence}\n")));
        assert!(machine.is_gone());
    }
}

#[test]
fn a_device_process_that_is_killed_is_replaced() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    for round in 1..=3 {
        let pid = running.pid("root");
        kill("-KILL", pid);
        running.until("a new process serves", |report| {
            let root = process(report, "root");
            root["state"] == "connected" && root["restarts"] == round && root["pid"].as_u64() != Some(pid)
        });
    }
    machine.run(&["stop", "web"]);
    let outcome = running.end();
    assert_eq!(outcome.status, Some(0));
    let first = outcome.stderr.lines().next().unwrap();
    assert_eq!(first, "root: the process was killed by signal 9; starting it again at once");
}

#[test]
fn a_device_that_crashes_again_and_again_is_tried_more_and_more_rarely() {
    let machine = Machine::new().file(DEVICES).pretend("blk:crash");
    let running = machine.start();
    running.until("it was restarted", |report| process(report, "root")["restarts"].as_u64() >= Some(3));
    machine.run(&["stop", "web"]);
    let outcome = running.end();
    assert!(outcome.stderr.contains("starting it again at once"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("starting it again in 0.1 s"), "{}", outcome.stderr);
}

#[test]
fn restarting_can_be_forbidden() {
    let machine = Machine::new().file(&format!("restart = \"never\"\n{DEVICES}")).pretend("blk:crash");
    let running = machine.start();
    running.until("the process is gone", |report| process(report, "root")["pid"].is_null());
    machine.run(&["stop", "web"]);
    let outcome = running.end();
    assert!(outcome.stderr.contains("it is not started again"), "{}", outcome.stderr);
}

#[test]
fn a_guest_that_ignores_its_power_button_is_ended() {
    let machine = Machine::new().file(DEVICES).pretend("vmm:deaf");
    let running = machine.start();
    let began = Instant::now();
    let stop = machine.run(&["stop", "web", "--timeout", "1"]);
    assert_eq!(stop.stderr, "web: did not power off in 1 s and was ended\n");
    assert!(began.elapsed() < LIMIT);
    assert_eq!(running.end().stderr, "web: The machine was ended.\n");
}

#[test]
fn a_signal_presses_the_power_button_and_a_second_one_ends() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    kill("-TERM", running.child.id().into());
    let outcome = running.end();
    assert_eq!(outcome.status, Some(0));
    assert!(outcome.stderr.ends_with("web: The guest powered off.\n"), "{}", outcome.stderr);

    let machine = Machine::new().file(DEVICES).pretend("vmm:deaf");
    let running = machine.start();
    kill("-INT", running.child.id().into());
    std::thread::sleep(Duration::from_millis(200));
    kill("-INT", running.child.id().into());
    let outcome = running.end();
    assert_eq!(outcome.status, Some(1));
    assert!(outcome.stderr.ends_with("web: The machine was ended before the guest had powered off.\n"), "{}", outcome.stderr);
}

#[test]
fn leaving_the_console_powers_the_machine_off() {
    let machine = Machine::new().file("[console.main]\n").pretend("console:leave");
    let outcome = machine.run(&["run", "web.toml"]);
    assert_eq!(outcome.status, Some(0));
    assert!(outcome.stderr.contains("You have left the console"), "{}", outcome.stderr);
}

#[test]
fn a_vmm_that_is_killed_takes_the_machine_with_it() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let root = running.pid("root");
    kill("-KILL", running.pid("vmm"));
    let outcome = running.end();
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(1), "web: The VMM was killed by signal 9.\n"));
    assert!(!is_alive(root));
    assert!(machine.is_gone());
}

#[test]
fn a_composer_that_is_killed_leaves_nothing_behind() {
    let machine = Machine::new().file(DEVICES);
    let mut running = machine.start();
    let pids = ["root", "entropy", "main", "vmm"].map(|role| running.pid(role));
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    eventually("every process ends", || !pids.iter().any(|pid| is_alive(*pid)));
    eventually("the runtime directory goes", || machine.is_gone());
    let events = machine.run(&["events", "web"]).stdout;
    assert!(events.contains("  started"), "what had happened is still known: {events}");
}

#[test]
fn devices_that_are_killed_in_the_same_instant_are_all_replaced() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let roles = ["root", "entropy", "main"];
    let before = roles.map(|role| running.pid(role));
    kill_all(&before);
    running.until("all are served again", |report| {
        roles.iter().all(|role| {
            let process = process(report, role);
            process["state"] == "connected" && process["restarts"] == 1 && !before.contains(&process["pid"].as_u64().unwrap_or(0))
        })
    });
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
    assert_eq!(machine.processes(), []);
}

/// Whoever is killed together with the composer: the kernel ends its children, and the janitor takes the directory away.
#[test]
fn whatever_is_killed_with_the_composer_nothing_is_left() {
    for others in [&["outboard-vmm"][..], &["outboard-blk", "outboard-rng", "outboard-console"], &["outboard-"]] {
        let machine = Machine::new().file(DEVICES);
        let mut running = machine.start();
        let all = machine.processes();
        assert_eq!(all.len(), 6, "composer, janitor, VMM and three devices: {all:?}");
        let is_chosen = |words: &str| others.iter().any(|other| words.contains(&format!("/bin/{other}")));
        let mut victims: Vec<u64> = all.iter().filter(|(_, words)| is_chosen(words)).map(|(pid, _)| *pid).collect();
        victims.push(running.child.id().into());
        kill_all(&victims);
        running.child.wait().unwrap();
        eventually("every process ends", || machine.processes().is_empty());
        eventually("the runtime directory goes", || machine.is_gone());
    }
}

/// Then nobody is left to take the directory away, until somebody looks, or takes the name again.
#[test]
fn what_a_killed_composer_and_a_killed_janitor_leave_is_taken_away_by_the_next_command() {
    for again in ["ps", "run"] {
        let machine = Machine::new().file(DEVICES);
        let mut running = machine.start();
        let janitor = machine.processes().into_iter().find(|(_, words)| words.contains("outboard janitor ")).unwrap().0;
        // The janitor first: it is quick.
        kill_all(&[janitor, running.child.id().into()]);
        running.child.wait().unwrap();
        eventually("every process ends", || machine.processes().is_empty());
        assert!(!machine.is_gone(), "this is what the test is about");
        if again == "ps" {
            assert_eq!(machine.run(&["ps"]).stdout, "No machine is running.\n");
        } else {
            let running = machine.start();
            machine.run(&["stop", "web"]);
            assert_eq!(running.end().status, Some(0));
        }
        assert!(machine.is_gone());
    }
}

fn kill_all(pids: &[u64]) {
    let pids: Vec<String> = pids.iter().map(u64::to_string).collect();
    assert!(Command::new("kill").arg("-KILL").args(pids).status().unwrap().success());
}

#[test]
fn a_backend_of_somebody_else_is_connected_again() {
    use std::os::unix::net::UnixListener;

    let machine = Machine::new().file("[device.share]\nclass = \"fs\"\nsocket = \"fs.sock\"\n");
    let listener = UnixListener::bind(machine.dir.join("fs.sock")).unwrap();
    let running = machine.start();
    let (connection, _) = listener.accept().unwrap();
    running.until("it is connected", |report| process(report, "share")["state"] == "connected");
    drop(connection);
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
}

#[test]
fn the_terminal_is_put_back_however_the_machine_ends() {
    for signal in [Signal::TERM, Signal::KILL] {
        let machine = Machine::new().file("[console.main]\n").pretend("console:raw");
        let (_controller, terminal) = terminal();
        let is_raw = || !tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON);
        let mut command = machine.command(&["run", "web.toml"]);
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        let mut running = Running { machine: &machine, child: command.stderr(Stdio::null()).spawn().unwrap() };
        eventually("the console process makes the terminal raw", is_raw);
        kill_with(signal, &running.child);
        running.child.wait().unwrap();
        eventually("the terminal is put back", || !is_raw());
        eventually("the runtime directory goes", || machine.is_gone());
    }
}

fn kill_with(signal: Signal, child: &Child) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_device_process_that_is_stopped_is_replaced() {
    let machine = Machine::new().file(DEVICES);
    let running = machine.start();
    let pid = running.pid("root");
    // Whoever stops it for a moment only is not robbed of it.
    kill("-STOP", pid);
    std::thread::sleep(Duration::from_millis(100));
    kill("-CONT", pid);
    std::thread::sleep(Duration::from_millis(900));
    assert_eq!(running.pid("root"), pid);
    let began = Instant::now();
    kill("-STOP", pid);
    eventually("it is killed", || !is_alive(pid));
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    running.until("a new process serves", |report| {
        process(report, "root")["state"] == "connected" && process(report, "root")["restarts"] == 1
    });
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
    let events = machine.run(&["events", "web"]).stdout;
    let hung = events.lines().find(|line| line.contains("process hung")).unwrap_or_default();
    assert!(hung.ends_with("it is stopped"), "{events}");
}

/// That is what becomes of one that does not answer, or does not stop its rings: the VMM gives it up.
#[test]
fn a_device_process_that_the_vmm_has_given_up_is_replaced() {
    let machine = Machine::new().file(DEVICES).pretend("vmm:lose");
    let running = machine.start();
    let first = running.until("the first device is replaced", |report| {
        let processes = report["processes"].as_array().unwrap();
        processes.iter().any(|process| process["restarts"] == 1 && process["state"] == "connected")
    });
    assert_eq!(first["status"], "running");
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
    let events = machine.run(&["events", "web"]).stdout;
    let order =
        ["It did not stop a ring within 10 s", "it lives on without its connection", "was killed by signal 9", "device back"];
    let places: Vec<_> = order.iter().map(|what| events.find(what)).collect();
    assert!(places.is_sorted() && places.iter().all(Option::is_some), "{events}");
}

#[test]
fn a_stopped_device_process_that_is_not_to_be_replaced_is_left_to_who_looks_into_it() {
    let machine = Machine::new().file(&format!("restart = \"never\"\n{DEVICES}"));
    let running = machine.start();
    let pid = running.pid("root");
    kill("-STOP", pid);
    eventually("it is told of", || machine.run(&["events", "web"]).stdout.contains("process hung"));
    assert!(is_alive(pid));
    kill("-CONT", pid);
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
}
