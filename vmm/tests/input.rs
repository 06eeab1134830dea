//! Wrong input: each mistake is one sentence and status 1 (or 2, for the command line), never a panic and never a wait without end.
//!
//! Nothing here needs a guest to run. The tests of backends need a /dev/kvm that opens; without one they say so and pass.

#![expect(clippy::unwrap_used, reason = "what fails to be set up is a failed test")]

#[path = "support/run.rs"]
mod common;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{Dir, PROGRAM, Run, has_kvm, run, tiny_kernel};

fn refused(run: &Run, part: &str) {
    assert_eq!(run.status, Some(1), "{run:?}");
    let sentence = run.sentence();
    assert!(sentence.starts_with("outboard-vmm: ") && sentence.contains(part), "{sentence}");
    assert!(!run.errors.contains("panicked"), "{run:?}");
}

#[test]
fn wrong_usage_is_status_2() {
    for args in [
        &["--kernel"][..],
        &[],
        &["--kernel", "k", "--cpus", "0"],
        &["--kernel", "k", "--memory", "lots"],
        &["--kernel", "k", "--device", "disk0"],
        &["--kernel", "k", "--serial", "printer"],
    ] {
        assert_eq!(run(args).status, Some(2), "{args:?}");
    }
}

#[test]
fn a_kernel_that_is_not_there() {
    refused(&run(&["--kernel", "/no/such/kernel"]), "Cannot open kernel /no/such/kernel: No such file");
    refused(&run(&["--kernel", "/dev"]), "not a regular file");
}

#[test]
fn a_kernel_that_is_none() {
    let dir = Dir::new("none");
    refused(&run(&["--kernel", &dir.file("text", b"hello")]), "neither a bzImage nor an ELF vmlinux");
    refused(&run(&["--kernel", &dir.file("empty", b"")]), "neither a bzImage nor an ELF vmlinux");
    let mut elf = tiny_kernel(&[0xf4]);
    elf[2048 + 8] = 0;
    refused(&run(&["--kernel", &dir.file("elf", &elf)]), "without a PVH note");
}

#[test]
fn a_kernel_that_is_cut_short() {
    let dir = Dir::new("short");
    let whole = tiny_kernel(&[0xf4; 64]);
    refused(&run(&["--kernel", &dir.file("cut", &whole[..4100])]), "is cut short");
    refused(&run(&["--kernel", &dir.file("head", &whole[..100])]), "is cut short");
}

#[test]
fn too_little_memory_for_what_has_to_go_into_it() {
    let dir = Dir::new("memory");
    let kernel = dir.file("kernel", &tiny_kernel(&[0xf4]));
    let initrd = dir.file("initrd", &vec![1; 20 << 20]);
    let run = run(&["--kernel", &kernel, "--initrd", &initrd, "--memory", "16M"]);
    refused(&run, "Guest memory of 16 MiB is too small: the kernel needs 2 MiB and the initrd 20 MiB");
}

#[test]
fn an_initrd_that_is_not_there_or_empty() {
    let dir = Dir::new("initrd");
    let kernel = dir.file("kernel", &tiny_kernel(&[0xf4]));
    refused(&run(&["--kernel", &kernel, "--initrd", "/no/such"]), "Cannot open initrd /no/such");
    refused(&run(&["--kernel", &kernel, "--initrd", &dir.file("empty", b"")]), "is empty");
}

/// Only /dev/null is left, which every program needs.
const EMPTY_DEV: &str =
    "mount -t tmpfs none $new && touch $new/null && mount --bind /dev/null $new/null && mount --rbind $new /dev";

/// Runs the program where `change` has been done to /dev, in a mount namespace of its own.
fn with_dev(change: &str) -> Option<Run> {
    let dir = Dir::new("dev");
    let kernel = dir.file("kernel", &tiny_kernel(&[0xf4]));
    let new = dir.path("new");
    fs::create_dir(&new).unwrap();
    let script = format!("new={new}; {change} && exec {PROGRAM} --kernel {kernel} --serial none");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    let run = Run::of(command, b"");
    let possible = run.errors.contains("outboard-vmm");
    if !possible {
        eprintln!("skipped, because /dev cannot be changed here: {}", run.errors);
    }
    possible.then_some(run)
}

#[test]
fn no_kvm_says_what_to_do() {
    if let Some(run) = with_dev(EMPTY_DEV) {
        refused(&run, "This machine has no /dev/kvm: ");
    }
}

#[test]
fn no_right_to_kvm_says_which_group() {
    if !has_kvm() {
        return;
    }
    if let Some(run) = with_dev("mount --bind /dev/kvm /dev/kvm && mount -o remount,bind,nodev /dev/kvm") {
        refused(&run, "sudo usermod -aG kvm");
    }
}

#[test]
fn something_else_in_the_place_of_kvm() {
    if let Some(run) = with_dev(&format!("{EMPTY_DEV} && touch /dev/kvm")) {
        refused(&run, "/dev/kvm is not KVM");
    }
}

#[test]
fn a_device_nobody_serves() {
    if !has_kvm() {
        return;
    }
    let dir = Dir::new("nobody");
    let kernel = dir.file("kernel", &tiny_kernel(&[0xf4]));
    let run1 = run(&["--kernel", &kernel, "--device", "d,class=blk,socket=/no/such.sock"]);
    refused(&run1, "Cannot reach device d: /no/such.sock: No such file");
    let run2 = run(&["--kernel", &kernel, "--device", "d,class=blk,fd=77"]);
    refused(&run2, "Cannot use descriptor 77 as the socket of a device");
}

/// Starts a machine with a "backend" that does `act` with its connection.
fn with_backend(name: &str, act: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static) {
    if !has_kvm() {
        return;
    }
    let dir = Dir::new(name);
    let kernel = dir.file("kernel", &tiny_kernel(&[0xf4]));
    let socket = dir.path("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let backend = thread::spawn(move || act(listener.accept().unwrap().0));
    let start = Instant::now();
    let run = run(&["--kernel", &kernel, "--device", &format!("disk0,class=blk,socket={socket}")]);
    assert!(start.elapsed() < Duration::from_secs(20), "{run:?}");
    refused(&run, "Device disk0 does not answer as a vhost-user backend: ");
    backend.join().unwrap();
}

#[test]
fn a_backend_that_speaks_something_else() {
    with_backend("other", |mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        thread::sleep(Duration::from_secs(1));
    });
}

#[test]
fn a_backend_that_is_silent() {
    with_backend("silent", |stream| {
        thread::sleep(Duration::from_secs(5));
        drop(stream);
    });
}

#[test]
fn a_backend_that_dies_in_the_handshake() {
    with_backend("dies", drop);
}
