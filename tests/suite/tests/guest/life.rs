//! The ends of a machine, each told apart, and what is left behind: nothing.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use rustix::process::{Pid, Signal, kill_process};

use super::machine::{Machine, Plan, images};

fn pids(machine: &Machine) -> Vec<i32> {
    ["vmm", "b-script", "entropy", "main"].iter().map(|role| machine.pid(role)).collect()
}

fn gone(pids: &[i32]) {
    for pid in pids {
        let path = format!("/proc/{pid}");
        suite::wait_for("its end", || (!Path::new(&path).exists()).then_some(()));
    }
}

fn runtime(machine: &Machine) -> std::path::PathBuf {
    let base = std::env::var_os("XDG_RUNTIME_DIR").unwrap();
    Path::new(&base).join("outboard").join(&machine.name)
}

#[test]
fn the_ends_of_a_guest_are_told_apart() {
    for (end, machine, code, says) in [
        ("outboard.end=panic", "", 4, "panicked"),
        ("outboard.end=reboot", "on-reboot = \"exit\"\n", 3, "rebooted"),
        ("outboard.end=reboot reboot=t", "on-reboot = \"exit\"\n", 5, "triple fault"),
    ] {
        let lines = format!("cpus = 1\nmemory = \"256M\"\n{machine}");
        let ended = Plan::run("true").cmdline(end).machine(&lines).finish();
        assert_eq!(ended.status.code(), Some(code), "{end}: {}", ended.tell());
        assert!(ended.err.contains(says), "{end}: {}", ended.tell());
    }
}

#[test]
fn a_reboot_keeps_every_process() {
    let lines = "cpus = 2\nmemory = \"256M\"\n";
    let mut machine = Plan::run("echo alive; sleep 1").cmdline("outboard.end=reboot").machine(lines).start();
    machine.wait_for("alive");
    let before = pids(&machine);
    let boots = |machine: &Machine| machine.console().matches("outboard-run: exit 0").count();
    suite::wait_for("three boots", || (boots(&machine) >= 3).then_some(()));
    assert_eq!(pids(&machine), before, "{}", machine.err());
    assert!(machine.processes().iter().all(|process| process["restarts"] == 0), "{:?}", machine.processes());
}

#[test]
fn the_power_button_ends_a_guest() {
    let mut machine = Plan::run("echo up; sleep 1000").start();
    machine.wait_for("up");
    let (all, dir, name) = (pids(&machine), runtime(&machine), machine.name.clone());
    assert_eq!(fs::metadata(&dir).map(|dir| std::os::unix::fs::PermissionsExt::mode(&dir.permissions()) & 0o777).unwrap(), 0o700);
    machine.outboard(&["stop", &name, "--timeout", "120"]);
    let ended = machine.finish();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.tell());
    gone(&all);
    assert!(!dir.exists());
}

#[test]
fn a_guest_that_does_not_listen_is_ended_after_the_deadline() {
    let mut machine = Plan::run("killall acpid; echo deaf; sleep 1000").start();
    machine.wait_for("deaf");
    let (all, name) = (pids(&machine), machine.name.clone());
    let output = std::process::Command::new(suite::program("outboard")).args(["stop", &name, "--timeout", "3"]).output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stderr));
    machine.finish();
    gone(&all);
}

#[test]
fn a_killed_composer_leaves_nothing_behind() {
    let mut machine = Plan::run("echo up; sleep 1000").start();
    machine.wait_for("up");
    let (all, dir) = (pids(&machine), runtime(&machine));
    assert!(dir.exists());
    kill_process(Pid::from_raw(machine.id()).unwrap(), Signal::KILL).unwrap();
    gone(&all);
    suite::wait_for("the folder's end", || (!dir.exists()).then_some(()));
}

#[test]
fn everything_killed_at_once_leaves_nothing_behind() {
    let mut machine = Plan::run("echo up; sleep 1000").start();
    machine.wait_for("up");
    let (mut all, dir) = (pids(&machine), runtime(&machine));
    all.push(machine.id());
    for pid in &all {
        kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL).unwrap();
    }
    let ended = machine.finish();
    assert_eq!(ended.status.code(), None, "{}", ended.tell());
    gone(&all);
    suite::wait_for("the folder's end", || (!dir.exists()).then_some(()));
    let memory = "memfd:";
    let holders = fs::read_dir("/proc").unwrap().flatten().filter(|process| {
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|file| file.to_string_lossy().contains(memory))
    });
    assert_eq!(holders.count(), 0, "nobody holds a machine's memory");
}

#[test]
fn a_killed_vmm_ends_the_machine_with_a_reason() {
    let mut machine = Plan::run("echo up; sleep 1000").start();
    machine.wait_for("up");
    let all = pids(&machine);
    kill_process(Pid::from_raw(machine.pid("vmm")).unwrap(), Signal::KILL).unwrap();
    let ended = machine.finish();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.tell());
    assert_eq!(ended.err.trim().lines().count(), 1, "one sentence: {}", ended.err);
    gone(&all);
}

#[test]
fn a_stopped_device_does_not_stop_the_guest() {
    let mut machine = Plan::run("i=0; while [ $i -lt 1000 ]; do echo tick-$i; i=$((i+1)); sleep 0.2; done").start();
    machine.wait_for("tick-1");
    let pid = Pid::from_raw(machine.pid("entropy")).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let last = machine.console().matches("tick-").count();
    suite::wait_for("the successor", || (machine.pid("entropy") != pid.as_raw_nonzero().get()).then_some(()));
    assert!(machine.console().matches("tick-").count() > last, "the guest goes on");
}

/// Who leaves the console gets the terminal back, and the guest, whose console still has to be taken, powers off.
#[test]
fn leaving_the_console_lets_the_guest_power_off() {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let slave = suite::open_terminal(ptsname(&master, Vec::new()).unwrap().to_str().unwrap());
    let mut child = Command::new(suite::program("outboard"))
        .args(["run", "--memory", "256M", "--console", "terminal", "--cmdline", "console=hvc0 quiet"])
        .arg("--kernel")
        .arg(images().join("vmlinux"))
        .arg("--initrd")
        .arg(images().join("initrd.img"))
        .stdin(Stdio::from(slave.try_clone().unwrap()))
        .stdout(Stdio::from(slave.try_clone().unwrap()))
        .stderr(Stdio::from(slave.try_clone().unwrap()))
        .spawn()
        .unwrap();
    let (mut person, mut shown) = (File::from(master), Vec::new());
    let mut piece = [0; 4096];
    while !String::from_utf8_lossy(&shown).contains("You are root") {
        let count = person.read(&mut piece).unwrap();
        shown.extend_from_slice(&piece[..count]);
    }
    person.write_all(b"\x1dq").unwrap();
    // Somebody reads the terminal to the end, as its window does.
    let mut reader = person.try_clone().unwrap();
    std::thread::spawn(move || while reader.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {});
    let status = suite::wait_for("the power-off", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0), "within its time, not after it");
    let modes = rustix::termios::tcgetattr(&slave).unwrap().local_modes;
    assert!(modes.contains(rustix::termios::LocalModes::ICANON), "the terminal is put back");
}
