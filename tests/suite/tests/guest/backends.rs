//! Our VMM with other people's backends, and with backends that are none.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use suite::{Scratch, Server, program};

use super::boot::NO_TROUBLE;
use super::machine::{Machine, Plan, UNTIL_STOPPED};

/// A process that is ended with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn qemu_storage_daemon_serves_a_disk() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("qsd.img", 32 << 20), scratch.path("qsd.sock"));
    let daemon = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
        .arg("--export")
        .arg(format!("type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={}", socket.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let _daemon = Process(daemon);
    suite::wait_for("its socket", || socket.exists().then_some(()));
    let section = format!("[device.qsd]\nclass = \"blk\"\nqueues = 1\nsocket = \"{}\"\n", socket.display());
    let command = "set -e; for d in /dev/vdb /dev/vdc; do [ $(blockdev --getsize64 $d) = 33554432 ] && q=$d; done; echo disk $q\n\
                   dd if=/dev/urandom of=/tmp/data bs=1M count=8 status=none; dd if=/tmp/data of=$q bs=1M oflag=direct status=none\n\
                   dd if=$q of=/tmp/back bs=1M count=8 iflag=direct status=none; test \"$(sha256sum </tmp/data)\" = \"$(sha256sum </tmp/back)\"; sha256sum /tmp/data";
    let ended = Plan::run(&format!("{command}\n{NO_TROUBLE}")).with_disk().section(&section).finish().passed();
    let written = fs::read(&image).unwrap();
    assert!(written.iter().take(8 << 20).any(|byte| *byte != 0), "{}", ended.console);
}

/// A source that shares no line with ours: made of the crates `vhost-user-backend` and `virtio-queue`.
#[test]
fn a_backend_of_another_make_gives_randomness() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-peer-rng", &scratch, &[]);
    let section = format!("[device.peer]\nclass = \"rng\"\nsocket = \"{}\"\n", server.socket.display());
    let command = "set -e; test $(cat /sys/bus/virtio/devices/*/device | grep -c 0x0004) = 2\n\
                   for r in virtio_rng.0 virtio_rng.1; do echo $r >/sys/class/misc/hw_random/rng_current; \
                   dd if=/dev/hwrng bs=256 count=16 iflag=fullblock status=none >/tmp/$r; test $(wc -c </tmp/$r) = 4096; done\n\
                   if cmp -s /tmp/virtio_rng.0 /tmp/virtio_rng.1; then exit 7; fi; od -An -tx1 -N16 /tmp/virtio_rng.0; od -An -tx1 -N16 /tmp/virtio_rng.1";
    Plan::run(&format!("{command}\n{NO_TROUBLE}")).section(&section).finish().passed();
}

#[test]
fn a_backend_that_is_silent_is_named() {
    let scratch = Scratch::new();
    let socket = scratch.path("deaf.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let section = format!("[device.deaf]\nclass = \"rng\"\nsocket = \"{}\"\n", socket.display());
    let ended = Plan::run("true").section(&section).finish();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.tell());
    assert!(ended.err.contains("deaf"), "{}", ended.err);
    assert_eq!(ended.err.trim().lines().count(), 1, "{}", ended.err);
}

/// A device the VMM knows nothing of but its virtio id, served by a process that nobody of this machine has started; it is
/// killed, and comes back on the same path.
#[test]
fn any_virtio_id_can_be_plugged_in_and_comes_back() {
    let scratch = Scratch::new();
    let server = Server::start("outboard-rng", &scratch, &[]);
    let section = format!("[device.generic]\nid = 4\nqueues = 1\nsocket = \"{}\"\n", server.socket.display());
    let command = format!(
        "set -e; cat /sys/bus/virtio/devices/*/device; test $(cat /sys/bus/virtio/devices/*/device | grep -c 0x0004) = 2\n\
         echo virtio_rng.1 >/sys/class/misc/hw_random/rng_current\n\
         {UNTIL_STOPPED}; do dd if=/dev/hwrng bs=64 count=1 status=none | od -An -tx1 -N8; echo pass-done; sleep 0.2; done"
    );
    let mut machine = Plan::run(&command.replace("/dev/vdb", "/dev/vda")).section(&section).start();
    machine.wait_for("pass-done");
    let passes = |machine: &Machine| machine.console().matches("pass-done").count();
    drop(server);
    fs::remove_file(scratch.path("outboard-rng.sock")).unwrap();
    let _successor = Server::start("outboard-rng", &scratch, &[]);
    let before = passes(&machine);
    suite::wait_for("the guest to go on", || (passes(&machine) > before + 5).then_some(()));
    machine.stop_loop();
    machine.finish().passed();
}

/// Two tours through what a backend can do wrong, without those that only cost time; every one is met in `vmm/tests/evil.rs`.
const TOURS: [&[&str]; 2] = [
    &["interrupts", "twice", "descriptors", "inflight-garbage", "errors", "dies-set-vring-kick", "memory", "blocking", "number"],
    &["half", "unasked", "refuses", "requests", "inflight-pipe", "huge", "used", "silent-set-vring-addr", "features"],
];

/// What the guest's clock may jump by beyond what it jumps by without any evil, in hundredths of a second. Where one emulated
/// processor runs the machine, its VMM and two processes that spin, jumps of a third of a second are their share of it; a processor
/// that waited for a backend would wait for one of the VMM's limits, of which the shortest is 2 s. The limit of 100 ms for any access to
/// a register is tested where time means something: `vmm/tests/evil.rs`.
const STALL: u32 = 100;

fn evil(socket: &Path, out: &Path, words: &[String]) -> Process {
    let mut command = Command::new(program("outboard-evil-backend"));
    command.arg("--socket-path").arg(socket).args(words).stdin(Stdio::null()).stdout(fs::File::create(out).unwrap());
    let process = Process(command.spawn().unwrap());
    suite::wait_for("its socket", || socket.exists().then_some(()));
    process
}

/// The longest jump of the guest's clock in each second or so.
fn beats(console: &str) -> Vec<u32> {
    console.lines().filter_map(|line| line.trim().strip_prefix("beat ")?.parse().ok()).collect()
}

#[test]
fn evil_backends_do_not_stop_the_guest_and_good_ones_come_after_them() {
    let scratch = Scratch::new();
    let socket = |name: &str| scratch.path(&format!("{name}.sock"));
    let names = ["evil-a", "evil-b"];
    let good = names.map(|name| evil(&socket(name), &scratch.path("good"), &[]));
    let section = |name: &str| format!("[device.{name}]\nclass = \"rng\"\nsocket = \"{}\"\n", socket(name).display());
    // A second of beats of 20 ms, the longest one told; after the tours the drivers begin again.
    let command = format!(
        "set -e; {UNTIL_STOPPED}; do read u x </proc/uptime; l=${{u%.*}}${{u#*.}}; m=0; for j in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
         usleep 20000; read u x </proc/uptime; n=${{u%.*}}${{u#*.}}; g=$((n-l)); l=$n; [ $g -le $m ] || m=$g; done; echo beat $m; done\n\
         cd /sys/bus/virtio/drivers/virtio_rng; for d in $(ls -d virtio*); do echo $d >unbind; echo $d >bind; done; good=0\n\
         for r in $(cat /sys/class/misc/hw_random/rng_available); do echo $r >/sys/class/misc/hw_random/rng_current\n\
         if dd if=/dev/hwrng bs=256 count=4 status=none | grep -q 'random bytes'; then good=$((good+1)); fi; done; echo good $good; test $good = 2"
    );
    let command = command.replace("/dev/vdb", "/dev/vda");
    let machine = Plan::run(&command).section(&section(names[0])).section(&section(names[1])).start();
    suite::wait_for("a while without evil", || (beats(&machine.console()).len() >= 12).then_some(()));
    let control = beats(&machine.console());
    drop(good);
    let tours: Vec<Process> = names
        .iter()
        .zip(TOURS)
        .map(|(name, tour)| {
            let _gone = fs::remove_file(socket(name));
            let stops = tour.iter().chain(["good"].iter()).flat_map(|one| ["--behaviour".to_owned(), (*one).to_owned()]);
            let words: Vec<String> = stops.chain(["--tour".to_owned(), "700".to_owned()]).collect();
            evil(&socket(name), &scratch.path(name), &words)
        })
        .collect();
    for name in names {
        let done = || fs::read_to_string(scratch.path(name)).unwrap().lines().any(|line| line == "good");
        suite::wait_for("the end of the tour", || done().then_some(()));
    }
    let all = beats(&machine.console());
    let under_evil = all.get(control.len()..).unwrap().to_vec();
    machine.stop_loop();
    let ended = machine.finish().passed();
    drop(tours);
    let longest = |beats: &[u32]| beats.iter().copied().max().unwrap_or_default();
    println!("beats without evil {control:?}, with it {under_evil:?} (hundredths of a second)");
    assert!(under_evil.len() > 20, "the guest went on: {under_evil:?}");
    assert!(longest(&under_evil) <= longest(&control) + STALL, "{control:?}\n{under_evil:?}\n{}", ended.err);
    for name in names {
        assert!(ended.err.contains(&format!("{name}: the connection")), "it is reported: {}", ended.err);
        assert!(ended.err.contains(&format!("{name}: degraded")), "it is reported: {}", ended.err);
    }
}
