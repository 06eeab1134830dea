//! Guests of a few instructions: how a machine ends, what a reset keeps, and what its owner is told.
//!
//! They need a /dev/kvm, but no kernel: even a KVM that emulates every instruction runs them in milliseconds.

#![expect(clippy::unwrap_used, reason = "what fails to be set up is a failed test")]

#[path = "support/run.rs"]
mod common;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread;

use common::{Dir, HALT, PROGRAM, Run, ZEROES, has_kvm, in8, out8, power_off, tiny_kernel};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, kill_process};

fn machine(code: &[u8], extra: &[&str]) -> Option<Run> {
    if !has_kvm() {
        return None;
    }
    let dir = Dir::new("guest");
    let kernel = dir.file("kernel", &tiny_kernel(code));
    let mut command = Command::new(PROGRAM);
    command.args(["--kernel", &kernel, "--memory", "32M"]).args(extra);
    Some(Run::of(command, b""))
}

fn ends_with(code: &[u8], extra: &[&str], status: i32) {
    if let Some(run) = machine(code, extra) {
        if run.sentence().contains("kvm_pvm, which") {
            return eprintln!("skipped, because this machine's KVM cannot do it: {}", run.sentence());
        }
        assert_eq!(run.status, Some(status), "{run:?}");
    }
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out8(0x3f8, byte)).collect()
}

#[test]
fn power_off_is_0() {
    ends_with(&power_off(), &[], 0);
}

#[test]
fn both_reset_registers_are_3_when_a_reboot_is_the_end() {
    for (port, value) in [(0xcf9, 6), (0x64, 0xfe)] {
        ends_with(&[out8(port, value), HALT.to_vec()].concat(), &["--on-reboot", "exit"], 3);
    }
}

#[test]
fn a_panic_is_4() {
    ends_with(&[out8(0x505, 1), HALT.to_vec()].concat(), &[], 4);
}

#[test]
fn a_triple_fault_is_5() {
    // lidt [zeroes]; int3
    let code = [&[0x0f, 0x01, 0x1d][..], &ZEROES.to_le_bytes(), &[0xcc], &HALT].concat();
    ends_with(&code, &[], 5);
}

#[test]
fn output_arrives_before_the_end() {
    if let Some(run) = machine(&[print("hello\n"), power_off()].concat(), &[]) {
        assert_eq!((run.status, run.output.as_str()), (Some(0), "hello\n"), "{run:?}");
    }
}

/// Counts in a byte of CMOS memory, which has a battery; resets until it reaches `times`.
fn count_to(times: u8, reset: &[u8]) -> Vec<u8> {
    let skip = u8::try_from(reset.len() + HALT.len()).unwrap();
    let mut code = [print("x"), out8(0x70, 0x40), in8(0x71)].concat();
    // inc al; out dx, al; cmp al, times; jae skip
    code.extend([0xfe, 0xc0, 0xee, 0x3c, times, 0x73, skip]);
    code.extend(reset);
    code.extend(HALT);
    code.extend(power_off());
    code
}

#[test]
fn a_reset_begins_again_in_the_same_process() {
    for cpus in ["1", "4"] {
        if let Some(run) = machine(&count_to(5, &out8(0xcf9, 6)), &["--cpus", cpus]) {
            assert_eq!((run.status, run.output.as_str()), (Some(0), "xxxxx"), "{run:?}");
        }
    }
}

#[test]
fn memory_is_zero_again_after_a_reset() {
    // cmp byte [zeroes], 0; je +2; jmp $ ; mov byte [zeroes], 1
    let zeroes = ZEROES.to_le_bytes();
    let check = [&[0x80, 0x3d][..], &zeroes, &[0, 0x74, 0x02, 0xeb, 0xfe, 0xc6, 0x05], &zeroes, &[1]].concat();
    let code = [check, count_to(3, &out8(0x64, 0xfe))].concat();
    ends_with(&code, &[], 0);
}

#[test]
fn a_terminal_that_nobody_reads_does_not_stop_the_guest() {
    if !has_kvm() {
        return;
    }
    let dir = Dir::new("stuck");
    // mov ecx, 400000; mov dx, 0x3f8; mov al, 'x'; out dx, al; loop -3
    let flood = [&[0xb9][..], &400_000u32.to_le_bytes(), &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xe2, 0xfd]].concat();
    let kernel = dir.file("kernel", &tiny_kernel(&[flood, power_off()].concat()));
    let mut command = Command::new(PROGRAM);
    command.args(["--kernel", &kernel, "--memory", "32M"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _unread = child.stdout.take().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

struct Owner {
    socket: OwnedFd,
    child: Child,
    _dir: Dir,
}

impl Owner {
    fn new(code: &[u8]) -> io::Result<Self> {
        let dir = Dir::new("owner");
        let kernel = dir.file("kernel", &tiny_kernel(code));
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let mut command = Command::new(PROGRAM);
        command.args(["--kernel", &kernel, "--memory", "32M", "--control-fd", &theirs.as_raw_fd().to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        Ok(Self { socket: ours, child, _dir: dir })
    }

    fn say(&self, text: &str) {
        rustix::net::send(&self.socket, text.as_bytes(), SendFlags::NOSIGNAL).unwrap();
    }

    fn hear(&self) -> String {
        let mut bytes = [0; 4096];
        let len = rustix::io::read(&self.socket, &mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    fn end(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

#[test]
fn the_owner_hears_what_happens_and_can_end_it() {
    if !has_kvm() {
        return;
    }
    let owner = Owner::new(&HALT).unwrap();
    assert_eq!(owner.hear(), r#"{"event":"started"}"#);
    owner.say("nonsense");
    assert!(owner.hear().starts_with(r#"{"event":"error","message":"Cannot understand"#));
    owner.say(r#"{"command":"replug","device":"none"}"#);
    assert!(owner.hear().contains("Cannot replug none"));
    for _ in 0..3 {
        owner.say(r#"{"command":"reset"}"#);
        assert_eq!(owner.hear(), r#"{"event":"guest","what":"reset"}"#);
    }
    owner.say(r#"{"command":"quit"}"#);
    assert_eq!(owner.end(), Some(0));
}

#[test]
fn the_power_button_reaches_the_guest() {
    if !has_kvm() {
        return;
    }
    // Polls PM1 status until bit 8 is set: in al, dx; test al, 1; jz -5
    let poll = [in8(0x601), vec![0xa8, 0x01, 0x74, 0xfb]].concat();
    let owner = Owner::new(&[poll, power_off()].concat()).unwrap();
    assert_eq!(owner.hear(), r#"{"event":"started"}"#);
    owner.say(r#"{"command":"power-button"}"#);
    assert_eq!(owner.hear(), r#"{"event":"guest","what":"shutdown"}"#);
    assert_eq!(owner.end(), Some(0));
}

#[test]
fn sigterm_is_a_way_to_end_it() {
    if !has_kvm() {
        return;
    }
    let owner = Owner::new(&HALT).unwrap();
    assert_eq!(owner.hear(), r#"{"event":"started"}"#);
    kill_process(Pid::from_child(&owner.child), Signal::TERM).unwrap();
    assert_eq!(owner.end(), Some(0));
}

#[test]
fn a_machine_without_its_owner_ends() {
    if !has_kvm() {
        return;
    }
    let Owner { socket, mut child, _dir } = Owner::new(&HALT).unwrap();
    drop(socket);
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn many_machines_at_once() {
    let threads: Vec<_> = (0..4).map(|_| thread::spawn(|| ends_with(&power_off(), &["--cpus", "2"], 0))).collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn a_guest_that_this_kvm_cannot_run_is_one_sentence() {
    // Code that is not there: the processor runs into the hole below 4 GiB. mov eax, 0xd0000000; jmp eax
    if let Some(run) = machine(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0], &[]) {
        assert_eq!(run.status, Some(1), "{run:?}");
        assert!(run.sentence().starts_with("outboard-vmm: This machine's KVM cannot run this guest: "), "{run:?}");
    }
}
