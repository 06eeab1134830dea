//! What is wrong is said in one sentence, before anything has been started.

use std::os::unix::net::UnixListener;

use crate::machine::Machine;

const DISK: &str = "[disk.root]\npath = \"disk.img\"\n";

/// Exit status and the one line on stderr, with the test's directory taken out.
fn refused(machine: &Machine, args: &[&str]) -> (Option<i32>, String) {
    let outcome = machine.run(args);
    assert_eq!(outcome.stdout, "");
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    assert!(machine.is_gone() || !machine.dir.join("run/outboard").exists());
    (outcome.status, outcome.stderr.trim_end().replace(&machine.dir.display().to_string(), "DIR"))
}

fn run(machine: &Machine) -> (Option<i32>, String) {
    refused(machine, &["run", "web.toml"])
}

fn failed(sentence: &str) -> (Option<i32>, String) {
    (Some(1), format!("outboard: {sentence}"))
}

fn usage(sentence: &str) -> (Option<i32>, String) {
    (Some(2), format!("outboard: {sentence}"))
}

#[test]
fn a_missing_machine_file() {
    let expected = failed("Cannot read the machine file none.toml: No such file or directory (os error 2)");
    assert_eq!(refused(&Machine::new(), &["run", "none.toml"]), expected);
}

#[test]
fn a_typo_in_the_machine_file() {
    let machine = Machine::new().file("[disk.root]\npath = \"disk.img\"\nfromat = \"raw\"\n");
    let expected = usage("web.toml:6: Unknown key `fromat` in [disk.root]; did you mean `format`?");
    assert_eq!(run(&machine), expected);
}

#[test]
fn a_file_and_flags_at_once() {
    let machine = Machine::new().file("");
    let all = [
        ("--name", "x"),
        ("--kernel", "k"),
        ("--initrd", "i"),
        ("--cmdline", "c"),
        ("--memory", "1G"),
        ("--cpus", "2"),
        ("--disk", "path=d"),
        ("--console", "pty"),
        ("--device", "d,class=fs,socket=s"),
        ("--serial", "none"),
        ("--on-reboot", "exit"),
        ("--sandbox-floor", "linux-6.1"),
    ];
    for (flag, value) in all {
        let expected = usage(&format!("A machine is a file or flags, not both: with web.toml leave out {flag}"));
        assert_eq!(refused(&machine, &["run", "web.toml", flag, value]), expected);
    }
    let expected = usage("A machine is a file or flags, not both: with web.toml leave out --cpus, --rng");
    assert_eq!(refused(&machine, &["run", "web.toml", "--rng", "--cpus", "2"]), expected);
    let expected = usage("A machine needs a kernel: give --kernel or a machine file");
    assert_eq!(refused(&machine, &["run", "--rng"]), expected);
}

#[test]
fn a_missing_kernel() {
    let machine = Machine::new().file("");
    std::fs::remove_file(machine.dir.join("kernel")).unwrap();
    assert_eq!(run(&machine), failed("Cannot open the kernel DIR/kernel: No such file or directory (os error 2)"));
}

#[test]
fn a_missing_image() {
    let machine = Machine::new().file("[disk.root]\npath = \"none.img\"\n");
    let expected = "Cannot open the image DIR/none.img of the disk `root`: No such file or directory (os error 2)";
    assert_eq!(run(&machine), failed(expected));
}

#[test]
fn an_image_in_use_is_what_its_process_says() {
    let machine = Machine::new().file(DISK).pretend("blk:1");
    assert_eq!(run(&machine), {
        let sentence = "web: The device `root` did not start: Cannot open image /x.img: it is in use";
        (Some(1), sentence.to_owned())
    });
}

#[test]
fn too_little_memory() {
    let machine = Machine::new().file("");
    let args = ["run", "--kernel", "kernel", "--memory", "8M"];
    let expected = usage("Memory of 8M is too little: this kernel and its initrd need at least 33M");
    assert_eq!(refused(&machine, &args), expected);
}

#[test]
fn a_device_program_that_is_not_installed() {
    let machine = Machine::new().file(DISK);
    std::fs::remove_file(machine.dir.join("bin/outboard-blk")).unwrap();
    let expected = "Cannot find the program DIR/bin/outboard-blk, which the device `root` needs";
    assert_eq!(run(&machine), failed(expected));
}

#[test]
fn a_backend_that_is_not_there_or_does_not_listen() {
    let machine = Machine::new().file("[device.share]\nclass = \"fs\"\nsocket = \"fs.sock\"\n");
    let expected = "Cannot connect the device `share` to DIR/fs.sock: No such file or directory (os error 2)";
    assert_eq!(run(&machine), failed(expected));
    drop(UnixListener::bind(machine.dir.join("fs.sock")).unwrap());
    let expected = "Cannot connect the device `share` to DIR/fs.sock: Connection refused (os error 111)";
    assert_eq!(run(&machine), failed(expected));
    std::fs::remove_file(machine.dir.join("fs.sock")).unwrap();
    std::fs::write(machine.dir.join("fs.sock"), "").unwrap();
    let expected = "Cannot connect the device `share` to DIR/fs.sock: not a socket";
    assert_eq!(run(&machine), failed(expected));
}

#[test]
fn two_devices_of_one_name_and_two_terminals() {
    let machine = Machine::new().file(&format!("{DISK}[rng.root]\n"));
    assert_eq!(run(&machine), usage("Two devices are called `root`: each needs a name of its own"));
    let machine = Machine::new().file("[console.a]\n[console.b]\n");
    assert_eq!(run(&machine), usage("Only one console can have the terminal"));
}

#[test]
fn a_vmm_that_cannot_start_says_why() {
    let machine = Machine::new().file(DISK).pretend("vmm:die");
    let expected = "web: The VMM failed: Cannot open /dev/kvm: Permission denied (os error 13)";
    assert_eq!(run(&machine), (Some(1), expected.to_owned()));
}

#[test]
fn machines_that_do_not_run() {
    let machine = Machine::new();
    assert_eq!(refused(&machine, &["stop", "web"]), failed("No machine called `web` is running"));
    assert_eq!(machine.run(&["ps"]).stdout, "No machine is running.\n");
    assert_eq!(machine.run(&["ps", "--json"]).stdout, "[]\n");
}
