//! `outboard disk`: what becomes of a disk's images while its process comes and goes.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::machine::{Machine, Running, eventually, kill, process};

const DISK: &str = "[disk.root]\npath = \"disk.img\"\n";

/// The command line of the disk's process.
fn words(machine: &Machine) -> String {
    let found = machine.processes().into_iter().find(|(_, words)| words.contains("outboard-blk"));
    let (_, words) = found.unwrap_or_default();
    words.replace(&machine.dir.display().to_string(), "DIR")
}

fn kill_disk(running: &Running<'_>) {
    let (pid, restarts) = (running.pid("root"), process(&running.report().unwrap(), "root")["restarts"].as_u64().unwrap());
    kill("-KILL", pid);
    running.until("a new process serves", |report| {
        let root = process(report, "root");
        root["state"] == "connected" && root["restarts"].as_u64() > Some(restarts)
    });
}

fn state(machine: &Machine) -> Value {
    let outcome = machine.run(&["disk", "web", "status", "root", "--json"]);
    serde_json::from_str::<Value>(&outcome.stdout).unwrap_or_else(|_| panic!("{outcome:?}"))[0].clone()
}

#[test]
fn a_snapshot_is_what_a_successor_begins_with() {
    let machine = Machine::new().file(DISK);
    let running = machine.start();
    assert!(words(&machine).contains("--blk-file DIR/disk.img --format raw"), "{}", words(&machine));
    let outcome = machine.run(&["disk", "web", "snapshot", "root", "new.qcow2"]);
    let says = outcome.stdout.replace(&machine.dir.display().to_string(), "DIR");
    let expected = "root: goes on in DIR/new.qcow2\nBefore the machine is started again, its file has to say so:\n[disk.root]\n\
                    path = \"DIR/new.qcow2\"\nformat = \"qcow2\"\nbacking = [{ path = \"DIR/disk.img\", format = \"raw\" }]\n";
    assert_eq!((outcome.status, says.as_str()), (Some(0), expected), "{}", outcome.stderr);
    let info = machine.run(&["image", "info", "--json", "--format", "qcow2", "new.qcow2"]);
    let info: Value = serde_json::from_str(&info.stdout).unwrap();
    assert_eq!((&info["size"], &info["backing-format"]), (&(1 << 20).into(), &"raw".into()));
    kill_disk(&running);
    let begun = "--blk-file DIR/new.qcow2 --format qcow2 --backing-file DIR/disk.img --backing-format raw";
    assert!(words(&machine).contains(begun), "{}", words(&machine));
    // What is there is never overwritten.
    let again = machine.run(&["disk", "web", "snapshot", "root", "new.qcow2"]);
    assert_eq!(again.status, Some(1));
    assert!(again.stderr.contains("Cannot make the overlay") && again.stderr.contains("File exists"), "{}", again.stderr);
    // An overlay can be thrown away; its name stays.
    fs::write(machine.dir.join("before"), fs::read(machine.dir.join("new.qcow2")).unwrap()).unwrap();
    let reset = machine.run(&["disk", "web", "reset", "root"]);
    assert_eq!(reset.stdout, "root: what was written is forgotten\n", "{}", reset.stderr);
    let left: Vec<_> = fs::read_dir(&machine.dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("new.qcow2.")), "{left:?}");
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
}

#[test]
fn a_process_that_dies_with_an_overlay_in_hand_is_followed_by_one_that_begins_with_it() {
    let machine = Machine::new().file(DISK).pretend("blk:takes");
    let running = machine.start();
    let outcome = machine.run(&["disk", "web", "snapshot", "root", "new.qcow2"]);
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    assert!(words(&machine).contains("--blk-file DIR/new.qcow2"), "{}", words(&machine));
    let first = fs::read(machine.dir.join("new.qcow2")).unwrap();
    let reset = machine.run(&["disk", "web", "reset", "root"]);
    assert_eq!(reset.status, Some(0), "{}", reset.stderr);
    assert!(words(&machine).contains("--blk-file DIR/new.qcow2"), "it has its name: {}", words(&machine));
    assert_eq!(fs::read(machine.dir.join("new.qcow2")).unwrap(), first, "empty, as the first one was");
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
}

#[test]
fn a_link_to_an_overlay_stays_one_when_the_overlay_is_reset() {
    let file = "[disk.root]\npath = \"link\"\nformat = \"qcow2\"\nbacking = [{ path = \"disk.img\", format = \"raw\" }]\n";
    let machine = Machine::new().file(file);
    fs::create_dir(machine.dir.join("images")).unwrap();
    let top = machine.dir.join("images/top.qcow2");
    fs::write(&top, "used").unwrap();
    fs::set_permissions(&top, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("images/top.qcow2", machine.dir.join("link")).unwrap();
    let running = machine.start();
    assert_eq!(machine.run(&["disk", "web", "reset", "root"]).status, Some(0));
    assert_eq!(fs::read_link(machine.dir.join("link")).unwrap(), std::path::Path::new("images/top.qcow2"));
    let new = fs::metadata(&top).unwrap();
    assert!(new.len() > 4 && std::os::unix::fs::PermissionsExt::mode(&new.permissions()) & 0o777 == 0o640);
    assert_eq!(fs::read_dir(machine.dir.join("images")).unwrap().count(), 1);
    machine.run(&["stop", "web"]);
    running.end();
}

#[test]
fn an_overlay_that_is_refused_leaves_everything_as_it_was() {
    let machine = Machine::new().file(DISK).pretend("blk:refuse");
    let running = machine.start();
    let outcome = machine.run(&["disk", "web", "snapshot", "root", "new.qcow2"]);
    let expected = "outboard: The machine refused blockdev-snapshot-sync: The overlay cannot be used\n";
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(1), expected));
    assert!(!machine.dir.join("new.qcow2").exists());
    kill_disk(&running);
    assert!(words(&machine).contains("--blk-file DIR/disk.img --format raw"), "{}", words(&machine));
    machine.run(&["stop", "web"]);
    running.end();
}

#[test]
fn an_ephemeral_disk_keeps_its_file_without_a_name() {
    let machine = Machine::new().file(&format!("{DISK}ephemeral = true\nephemeral-dir = \"scratch\"\n"));
    fs::create_dir(machine.dir.join("scratch")).unwrap();
    let running = machine.start();
    let written = |running: &Running<'_>| {
        let pid = running.pid("root");
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let found = fds.filter_map(|fd| {
            fs::metadata(fd.path())
                .ok()
                .filter(|_| fs::read_link(fd.path()).is_ok_and(|target| target.to_string_lossy().contains("scratch")))
        });
        let mut files: Vec<u64> = found.map(|file| std::os::unix::fs::MetadataExt::ino(&file)).collect();
        files.dedup();
        files
    };
    let begun = "--blk-fd 5 --format qcow2 --backing-file DIR/disk.img --backing-format raw";
    assert!(words(&machine).contains(begun), "{}", words(&machine));
    let first = written(&running);
    assert_eq!(first.len(), 1);
    kill_disk(&running);
    assert_eq!(written(&running), first, "its successor has the same file");
    assert!(words(&machine).contains(begun), "{}", words(&machine));
    assert_eq!(machine.run(&["disk", "web", "reset", "root"]).status, Some(0));
    kill_disk(&running);
    assert_ne!(written(&running), first, "after a reset there is another one");
    assert_eq!(fs::read_dir(machine.dir.join("scratch")).unwrap().count(), 0);
    let snapshot = machine.run(&["disk", "web", "snapshot", "root", "new.qcow2"]);
    assert!(snapshot.stderr.contains("Cannot make a snapshot of the disk `root`: it is ephemeral"), "{}", snapshot.stderr);
    assert_eq!(state(&machine)["ephemeral"], true);
    machine.run(&["stop", "web"]);
    running.end();
}

#[test]
fn limits_outlive_a_process_and_what_is_not_given_stays() {
    let machine = Machine::new().file(&format!("{DISK}limit-ops = 100\nlimit-ops-burst = 500\n"));
    let running = machine.start();
    assert!(words(&machine).contains("--limit-ops 100:500"), "{}", words(&machine));
    let outcome = machine.run(&["disk", "web", "limit", "root", "--bytes", "2M:8M"]);
    let expected = "root: at most 100 requests a second (500 at once) and 2M a second (8M at once)\n";
    assert_eq!(outcome.stdout, expected, "{}", outcome.stderr);
    kill_disk(&running);
    assert!(words(&machine).contains("--limit-ops 100:500 --limit-bytes 2097152:8388608"), "{}", words(&machine));
    let outcome = machine.run(&["disk", "web", "limit", "root", "--ops", "0"]);
    assert_eq!(outcome.stdout, "root: at most 2M a second (8M at once)\n", "{}", outcome.stderr);
    assert_eq!(machine.run(&["disk", "web", "resize", "root", "2M"]).stdout, "root: has 2M\n");
    let table = machine.run(&["disk", "web", "status"]).stdout.replace(&machine.dir.display().to_string(), "DIR");
    let expected = "root: 2M, read and written, through the page cache; at most 2M a second (8M at once)\n  raw   DIR/disk.img\n";
    assert_eq!(table, expected);
    machine.run(&["stop", "web"]);
    running.end();
}

/// Also a snapshot that nobody knows the old process to have made: its successor begins with it.
#[test]
fn what_becomes_of_a_disk_is_among_the_events() {
    let machine = Machine::new().file(DISK).pretend("blk:takes");
    let running = machine.start();
    let path = machine.dir.join("new.qcow2").display().to_string();
    for words in [&["resize", "root", "2M"][..], &["limit", "root", "--ops", "50:100"], &["snapshot", "root", &path]] {
        let outcome = machine.run(&[&["disk", "web"], words].concat());
        assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    }
    assert_eq!(machine.run(&["disk", "web", "reset", "root"]).status, Some(0));
    assert_eq!(machine.run(&["disk", "web", "snapshot", "root", "new.qcow2"]).status, Some(1), "it is there already");
    machine.run(&["disk", "web", "status"]);
    let said = machine.run(&["events", "web", "--json"]).stdout;
    let all = said.lines().map(|line| serde_json::from_str(line).unwrap());
    let of_disks = all.filter(|event: &Value| event["event"].as_str().unwrap().starts_with("disk-"));
    let without_time = |mut event: Value| {
        event.as_object_mut().unwrap().remove("time");
        event
    };
    let limits = json!({"operations": {"per_second": 50, "burst": 100}, "bytes": {"per_second": 0, "burst": 0}});
    let expected = [
        json!({"event": "disk-resized", "device": "root", "bytes": 2 << 20}),
        json!({"event": "disk-limited", "device": "root", "limits": limits}),
        json!({"event": "disk-snapshot", "device": "root", "file": path}),
        json!({"event": "disk-reset", "device": "root"}),
    ];
    assert_eq!(of_disks.map(without_time).collect::<Vec<_>>(), expected);
    let people = machine.run(&["events", "web"]).stdout;
    for line in ["disk limited       root      at most 50 requests a second (100 at once)", "disk reset         root"] {
        assert!(people.lines().any(|one| one.ends_with(line)), "{people}");
    }
    machine.run(&["stop", "web"]);
    assert_eq!(running.end().status, Some(0));
}

#[test]
fn the_disks_of_a_group_share_a_page() {
    let limited = "limit-ops = 50\nlimit-group = \"slow\"\n";
    let [a, b] = ["a", "b"].map(|name| format!("[disk.{name}]\npath = \"disk.img\"\nreadonly = true\n"));
    let machine = Machine::new().file(&format!("{DISK}{a}{limited}{b}{limited}"));
    let running = machine.start();
    let page = |role: &str| {
        let words = fs::read_to_string(format!("/proc/{}/cmdline", running.pid(role))).unwrap().replace('\0', " ");
        let number = words.split("--limit-fd ").nth(1)?.split(' ').next()?.to_owned();
        let page = fs::metadata(format!("/proc/{}/fd/{number}", running.pid(role))).unwrap();
        Some(std::os::unix::fs::MetadataExt::ino(&page))
    };
    assert!(page("a").is_some());
    assert_eq!((page("a"), page("root")), (page("b"), None));
    machine.run(&["stop", "web"]);
    running.end();
    let wrong = Machine::new().file(&format!("{DISK}limit-group = \"slow\"\n{b}{limited}"));
    let outcome = wrong.run(&["check", "web.toml"]);
    assert!(
        outcome.stderr.contains("web.toml:7: The disks `root` and `b` share the limits of the group `slow`"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn what_cannot_be_done_is_said() {
    let machine = Machine::new().file(&format!("{DISK}[disk.fixed]\npath = \"disk.img\"\nreadonly = true\n[rng.entropy]\n"));
    let running = machine.start();
    let says = |words: &[&str]| machine.run(&[&["disk", "web"], words].concat()).stderr;
    let refused = says(&["reset", "root"]);
    assert!(refused.contains("Cannot reset the disk `root`: it has only one image"), "{refused}");
    assert!(says(&["snapshot", "fixed", "x"]).contains("Cannot make a snapshot of the disk `fixed`: it is only read"));
    assert!(says(&["status", "entropy"]).contains("The machine has no disk called `entropy`"));
    assert!(says(&["resize", "root", "12"]).contains("Cannot read the size `12`"));
    assert!(says(&["limit", "root", "--ops", "x"]).contains("`x` is not a number of requests"));
    machine.run(&["stop", "web"]);
    running.end();
}

/// Nobody waits for a disk's process but who asked it.
#[test]
fn a_disk_that_does_not_answer_holds_nobody_up() {
    let machine = Machine::new().file(DISK).pretend("blk:silent");
    let running = machine.start();
    let mut asking: std::process::Child = {
        let mut command: Command = machine.command(&["disk", "web", "status", "root"]);
        command.spawn().unwrap()
    };
    for _ in 0..3 {
        assert_eq!(running.report().unwrap()["status"], "running");
    }
    kill_disk(&running);
    assert!(asking.try_wait().unwrap().is_none(), "the successor was asked, and is silent as well");
    machine.run(&["stop", "web"]);
    running.end();
    eventually("who asked is told of the end", || asking.try_wait().unwrap().is_some());
}
