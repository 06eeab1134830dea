//! Our VMM with other people's backends, and with backends that are none.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use suite::Scratch;

use super::boot::NO_TROUBLE;
use super::machine::Plan;

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
