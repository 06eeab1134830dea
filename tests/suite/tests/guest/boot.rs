//! What a guest finds: processors, memory, devices, and the kernels it can be booted from.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use suite::{Scratch, program};

use super::machine::{Plan, images};

/// Lines that a healthy kernel does not write.
pub(crate) const NO_TROUBLE: &str = "if dmesg | grep -v Speculative | grep -iE 'WARNING:|BUG:|Oops|Call Trace|I/O error|is not a head|unexpected|timed out'; then exit 9; fi";

#[test]
fn debian_finds_its_devices() {
    let command = format!(
        "set -e; nproc; cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=32 count=1 status=none | od -An -tx1\n\
         test $(nproc) = 2; test \"$(cat /sys/class/misc/hw_random/rng_current)\" = virtio_rng.0\n\
         ls /sys/bus/virtio/devices; test $(ls /sys/bus/virtio/devices | wc -l) = 4; {NO_TROUBLE}"
    );
    Plan::run(&command).with_disk().finish().passed();
}

#[test]
fn a_bzimage_boots_as_well() {
    let mut plan = Plan::run("uname -r");
    plan.kernel = "vmlinuz";
    let ended = plan.finish().passed();
    assert!(ended.console.contains("-amd64"), "{}", ended.console);
}

#[test]
fn memory_reaches_beyond_the_hole_below_four_gigabytes() {
    let command = "set -e; awk '/MemTotal/ {exit !($2 > 4800000)}' /proc/meminfo\n\
                   dd if=/dev/zero of=/dev/shm/x bs=1M count=32; grep 'System RAM' /proc/iomem; grep -q '^1.*System RAM' /proc/iomem";
    Plan::run(command).machine("cpus = 1\nmemory = \"5G\"\n").finish().passed();
}

#[test]
fn many_processors_start() {
    Plan::run("set -e; cat /sys/devices/system/cpu/online; test $(nproc) = 8")
        .machine("cpus = 8\nmemory = \"1G\"\n")
        .finish()
        .passed();
}

#[test]
fn a_disk_is_written_with_many_queues_and_kept() {
    let scratch = suite::Scratch::new();
    let image = scratch.image("data.img", 64 << 20);
    let section = format!("[disk.c-data]\npath = \"{}\"\nqueues = 2\nserial = \"data-1\"\n", image.display());
    let command = "set -e; d=/dev/vdc; test $(cat /sys/block/vdc/serial) = data-1; test $(ls /sys/block/vdc/mq | wc -l) = 2\n\
                   mkfs.ext4 -q $d; mount $d /mnt; cp -r /usr/bin/. /mnt/ 2>/dev/null || true; sync; (cd /mnt; sha256sum * 2>/dev/null >/tmp/sums || true)\n\
                   umount /mnt; e2fsck -fn $d; mount $d /mnt; cd /mnt; sha256sum --quiet -c /tmp/sums; rm -rf /mnt/*; fstrim -v /mnt; cd /; umount /mnt; e2fsck -fn $d";
    Plan::run(&format!("{command}\n{NO_TROUBLE}")).with_disk().section(&section).finish().passed();
}

#[test]
fn an_ordinary_user_runs_a_machine() {
    let mut plan = Plan::run("id -u; ls /dev/vda /dev/hwrng");
    plan.user = Some(1000);
    plan.finish().passed();
}

/// The same as a machine file, said with flags; and a console on a pseudo-terminal, a serial port in a file, a table of who serves
/// what, and a guest whose reboot is the end.
#[test]
fn flags_make_a_machine_as_well() {
    let scratch = Scratch::new();
    let (serial, script) = (scratch.path("serial.log"), scratch.path("script.img"));
    let mut bytes = b"echo ask-me; read answer; test \"$answer\" = yes && echo well-answered; nproc; ls /dev/hwrng".to_vec();
    bytes.resize(4096, 0);
    fs::write(&script, bytes).unwrap();
    let mut child = Command::new(program("outboard"))
        .args(["run", "--announce", "--name", "by-flags", "--memory", "256M", "--cpus", "2", "--rng", "--console", "pty"])
        .args(["--on-reboot", "exit", "--sandbox-floor", "linux-6.1"])
        .arg("--kernel")
        .arg(images().join("vmlinux"))
        .arg("--initrd")
        .arg(images().join("initrd.img"))
        .args(["--cmdline", "console=ttyS0 console=hvc0 outboard.script=/dev/vda outboard.end=reboot"])
        .arg("--disk")
        .arg(format!("path={},format=raw,readonly,queues=2,serial=flags", script.display()))
        .arg("--serial")
        .arg(&serial)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(scratch.path("err")).unwrap())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let path = said.find(|line| line.starts_with("/dev/pts/")).unwrap();
    let mut terminal = suite::open_terminal(&path);
    let mut shown = Vec::new();
    let mut see = |terminal: &mut File, text: &str| {
        let mut piece = [0; 4096];
        while !String::from_utf8_lossy(&shown).contains(text) {
            let count = terminal.read(&mut piece).unwrap();
            shown.extend_from_slice(&piece[..count]);
        }
    };
    see(&mut terminal, "ask-me");
    terminal.write_all(b"yes\r").unwrap();
    see(&mut terminal, "well-answered");
    // The terminal is read to the end, or the guest would wait for it.
    let reader = std::thread::spawn(move || terminal.read_to_end(&mut Vec::new()));
    assert_eq!(said.count(), 0, "standard output has the terminal's name and nothing else");
    assert_eq!(child.wait().unwrap().code(), Some(3), "the reboot was the end");
    let table = fs::read_to_string(scratch.path("err")).unwrap();
    assert!(table.lines().any(|line| line.contains("outboard-console") && line.contains("connected")), "{table}");
    drop(reader);
    let early = fs::read_to_string(&serial).unwrap();
    assert!(early.contains("Linux version"), "the serial port has the kernel's first words: {early}");
}
