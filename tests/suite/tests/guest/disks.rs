//! Disks that are changed while the guest verifies what it writes to them.

use std::path::Path;
use std::process::Command;

use probe::random::Random;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::boot::NO_TROUBLE;
use super::machine::{Machine, Plan, UNTIL_STOPPED};

const SIZE: u64 = 32 << 20;

fn kill(machine: &Machine, role: &str) {
    let pid = machine.pid(role);
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    suite::wait_for("the successor", || (machine.pid(role) != pid).then_some(()));
}

/// What the guest was told.
const WORD: &str = "dd if=/dev/vdb bs=4096 skip=1 count=1 iflag=direct status=none";

/// The guest has begun and ended a pass of fio since this moment.
fn after_a_pass(machine: &mut Machine) {
    let passes = machine.console().matches("pass-done").count();
    machine.wait_until("two more passes", |console| console.matches("pass-done").count() >= passes + 2);
}

fn disk(machine: &Machine, words: &[&str]) -> String {
    machine.outboard(&[&["disk", &machine.name], words].concat())
}

fn status(machine: &Machine, name: &str) -> Value {
    serde_json::from_str::<Value>(&disk(machine, &["status", name, "--json"])).unwrap()[0].clone()
}

fn is_clean(path: &Path) {
    let outcome =
        Command::new(suite::program("outboard")).args(["image", "check", "--format", "qcow2"]).arg(path).output().unwrap();
    println!("{}", String::from_utf8_lossy(&outcome.stdout).trim());
    // A process that was killed leaves clusters that are counted and not used (3); nothing is corrupt (4).
    assert!(matches!(outcome.status.code(), Some(0 | 3)), "{outcome:?}");
}

/// `vdc` is snapshotted and grows, `vdd` is ephemeral and reset: the guest's mark on it is gone, the base's is there. A process of each
/// is killed in between. fio verifies all the time.
#[test]
fn snapshot_reset_and_resize_under_fio_with_kills() {
    let scratch = suite::Scratch::new();
    let (image, base) = (scratch.image("data.img", SIZE), scratch.path("base.img"));
    let mut random = Random::new(5);
    let mut bytes: Vec<u8> = (0..SIZE / 8).flat_map(|_| random.number().to_le_bytes()).collect();
    bytes[..4].copy_from_slice(b"base");
    std::fs::write(&base, &bytes).unwrap();
    let sections = format!(
        "[disk.c-data]\npath = \"{}\"\nqueues = 2\nengine = \"threads\"\n[disk.d-fresh]\npath = \"{}\"\nephemeral = true\nephemeral-dir = \"{}\"\n",
        image.display(),
        base.display(),
        scratch.path("").display()
    );
    let fio = "fio --name=storm --direct=1 --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --size=4M --verify=crc32c \
               --verify_fatal=1 --do_verify=1 --output=/tmp/log";
    let command = format!(
        "set -e; (printf mark; dd if=/dev/zero bs=4092 count=1 status=none) | dd of=/dev/vdd bs=4096 oflag=direct status=none; \
         {UNTIL_STOPPED}; do disks='vdc vdd'; if {WORD} | grep -q hold; then disks=vdc; echo hold-vdd; fi; \
         for disk in $disks; do {fio} --offset=1M --filename=/dev/$disk || {{ cat /tmp/log; exit 8; }}; grep -q 'err= 0' /tmp/log; done; \
         echo sectors-$(cat /sys/block/vdc/size); echo fresh-$(dd if=/dev/vdd bs=4096 count=1 iflag=direct status=none | head -c4); \
         echo pass-done; done; {NO_TROUBLE}"
    );
    let mut machine = Plan::run(&command).with_disk().section(&sections).start();
    machine.wait_for("pass-done");
    assert!(machine.console().contains("sectors-65536\r") && machine.console().contains("fresh-mark"), "{}", machine.console());

    let (first, second) = (scratch.path("first.qcow2"), scratch.path("second.qcow2"));
    print!("{}", disk(&machine, &["snapshot", "c-data", first.to_str().unwrap()]));
    kill(&machine, "c-data");
    after_a_pass(&mut machine);
    // Of an ephemeral disk that was killed, everything is still there.
    kill(&machine, "d-fresh");
    after_a_pass(&mut machine);
    assert!(!machine.console().contains("fresh-base"), "{}", machine.console());
    // A reset takes away what fio would look for: not while it does.
    machine.say(b"hold");
    machine.wait_for("hold-vdd");
    print!("{}", disk(&machine, &["reset", "d-fresh"]));
    machine.wait_for("fresh-base");
    kill(&machine, "d-fresh");
    machine.say(b"more");
    after_a_pass(&mut machine);
    print!("{}", disk(&machine, &["snapshot", "c-data", second.to_str().unwrap()]));
    print!("{}", disk(&machine, &["resize", "c-data", "48M"]));
    machine.wait_for("sectors-98304");
    print!("{}", disk(&machine, &["limit", "c-data", "--ops", "20000:1000"]));
    kill(&machine, "c-data");
    after_a_pass(&mut machine);
    let now = status(&machine, "c-data");
    println!("{now:#}");
    assert_eq!((&now["bytes"], now["images"].as_array().unwrap().len()), (&(48_u64 << 20).into(), 3));
    assert_eq!(now["limits"]["operations"]["per_second"], 20000);
    let frozen = std::fs::read(&first).unwrap();
    machine.stop_loop();
    machine.wait_for("outboard-run: exit 0");
    assert_eq!(std::fs::read(&first).unwrap(), frozen, "what lies below is not written to");
    machine.finish().passed();
    for path in [&first, &second] {
        is_clean(path);
    }
    assert_eq!(std::fs::read(&base).unwrap(), bytes, "the base of an ephemeral disk is not written to");
}

/// What the guest has seen last, as far as its line has come whole.
fn last_seen(console: &str) -> Option<&str> {
    console.split("seen-").skip(1).filter_map(|rest| rest.split_once('\r')).map(|(word, _)| word).last()
}

/// What the guest writes after a snapshot is gone with the overlay; limits that are set for one disk of a group are those of all.
#[test]
fn an_overlay_past_the_page_cache_is_reset_and_a_group_is_limited() {
    let scratch = suite::Scratch::new();
    let image = scratch.path("data.img");
    std::fs::write(&image, [&b"base"[..], &vec![7; (4 << 20) - 4]].concat()).unwrap();
    let limits = "limit-ops = 5000\nlimit-group = \"slow\"\n";
    let other = scratch.image("other.img", 1 << 20);
    let sections = format!(
        "[disk.c-data]\npath = \"{}\"\ncache = \"direct\"\n{limits}[disk.d-other]\npath = \"{}\"\n{limits}",
        image.display(),
        other.display()
    );
    let command = format!(
        "set -e; {UNTIL_STOPPED}; do if {WORD} | grep -q mark; then (printf mark; dd if=/dev/zero bs=4092 count=1 status=none) | \
         dd of=/dev/vdc bs=4096 oflag=direct status=none; fi; \
         echo seen-$(dd if=/dev/vdc bs=4096 count=1 iflag=direct status=none | head -c4); sleep 0.2; done; {NO_TROUBLE}"
    );
    let mut machine = Plan::run(&command).with_disk().section(&sections).start();
    machine.wait_for("seen-base");
    let top = scratch.path("top.qcow2");
    print!("{}", disk(&machine, &["snapshot", "c-data", top.to_str().unwrap()]));
    machine.say(b"mark");
    machine.wait_for("seen-mark");
    machine.say(b"____");
    kill(&machine, "c-data");
    let seen = |console: &str| console.matches("seen-").count();
    let now = seen(&machine.console());
    machine.wait_until("three more looks", |console| seen(console) >= now + 3);
    assert_eq!(last_seen(&machine.console()), Some("mark"), "{}", machine.console());
    print!("{}", disk(&machine, &["reset", "c-data"]));
    let now = seen(&machine.console());
    machine.wait_until("three more looks", |console| seen(console) >= now + 3);
    kill(&machine, "c-data");
    machine.wait_until("six more looks", |console| seen(console) >= now + 6);
    assert_eq!(last_seen(&machine.console()), Some("base"), "{}", machine.console());
    disk(&machine, &["limit", "c-data", "--ops", "4000"]);
    assert_eq!(status(&machine, "d-other")["limits"]["operations"]["per_second"], 4000);
    machine.stop_loop();
    machine.finish().passed();
    is_clean(&top);
    assert_eq!(std::fs::read(&image).unwrap()[..4], *b"base");
}
