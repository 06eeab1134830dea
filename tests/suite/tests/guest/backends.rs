//! Our VMM with other people's backends, and with backends that are none.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use suite::{Scratch, Server};

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
    let server = Server::listening("outboard-peer-rng", &scratch, &[]);
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
