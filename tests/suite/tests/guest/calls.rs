//! Each system call that the VMM's filters allow is made, and each request to KVM among them: by a machine that is traced from its
//! start over a new disk server, a reset and the power button to its end. What nothing makes does not belong into a filter.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::sys::ptrace;
use nix::unistd::Pid;
use rustix::io::{FdFlags, IoSlice, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, sendmsg,
    socketpair,
};
use serde_json::Value;
use suite::tracer::{Event, Filters, argument, can_trace, launch};
use suite::{Scratch, Server, program, run, wait_for};

use super::machine::images;

/// What this machine does not do, with the request where there are several, and why.
const NOT_HERE: [(&str, &str, u64, &str); 6] = [
    ("control", "brk", 0, "only when the heap has no room left"),
    ("control", "clock_gettime", 0, "only where the kernel offers no faster way"),
    ("cpu", "brk", 0, "only when the heap has no room left"),
    ("cpu", "clock_gettime", 0, "only where the kernel offers no faster way"),
    ("cpu", "exit_group", 0, "only a panic: the control thread ends the process"),
    (
        "cpu",
        "ioctl",
        0x8090_ae81,
        "only where KVM gives a guest up, as in the VMM's own a_guest_that_this_kvm_cannot_run_is_one_sentence",
    ),
];

/// What the guest does: its last device is taken from its driver, then asked which of its interrupts are pending, in the page of
/// its memory where MSI-X keeps that. No driver asks.
const GUEST: &str = "for d in /sys/bus/pci/devices/*; do :; done; read -r at rest <$d/resource; \
                     echo ${d##*/} >/sys/bus/pci/drivers/virtio-pci/unbind; devmem $((at + 0x6000)) 32; \
                     dd if=/dev/vda of=/dev/null bs=4096 count=1; echo gu''est-is-up; sleep 1000";

/// One allowed call: its number, and what one of its arguments has to be.
type Rule = (i64, Option<(usize, u64)>);

/// The rules of each kind of thread, with their names and reasons.
fn rules() -> BTreeMap<String, BTreeMap<Rule, String>> {
    let said = run(Command::new(program("outboard-vmm")).arg("--print-sandbox"));
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let mut kinds = BTreeMap::new();
    for thread in value["threads"].as_array().unwrap() {
        let rules: &mut BTreeMap<Rule, String> = kinds.entry(thread["thread"].as_str().unwrap().to_owned()).or_default();
        for rule in thread["rules"].as_array().unwrap() {
            let wanted = rule["when"][0].as_str().map(|text| {
                let (index, value) = text.strip_prefix("argument ").and_then(|rest| rest.split_once(" is 0x")).unwrap();
                (index.parse().unwrap(), u64::from_str_radix(value, 16).unwrap())
            });
            let text = |key: &str| rule[key].as_str().unwrap().to_owned();
            rules.insert((rule["number"].as_i64().unwrap(), wanted), text("call"));
        }
    }
    kinds
}

/// A machine under the tracer, in a thread of its own: the tracer's. Gives the rules that were used.
fn traced(args: Vec<String>) -> thread::JoinHandle<BTreeMap<String, BTreeSet<Rule>>> {
    thread::spawn(move || {
        let rules = rules();
        let (_child, mut tracer) = launch(&program("outboard-vmm"), &args, Filters::InForce);
        let (mut filtered, mut used) = (BTreeMap::<Pid, String>::new(), BTreeMap::<String, BTreeSet<Rule>>::new());
        while let Some(event) = tracer.event() {
            let (tid, call) = match event {
                Event::Call(tid, call) => (tid, call),
                Event::Return(tid, _) => {
                    tracer.go(tid);
                    continue;
                }
                Event::Died(..) => continue,
            };
            if let Some(kind) = filtered.get(&tid) {
                let fits = |(number, when): &&Rule| *number == call && when.is_none_or(|(at, value)| argument(tid, at) == value);
                used.entry(kind.clone()).or_default().extend(rules[kind].keys().filter(fits));
            }
            if call == libc::SYS_seccomp {
                filtered.insert(tid, kind(tid));
            }
            let waits_a_while = call == libc::SYS_futex && argument(tid, 3) != 0;
            let begun_again = used.get("control").is_some_and(|used| used.contains(&(libc::SYS_restart_syscall, None)));
            tracer.go(tid);
            // Stopped in such a wait, as by SIGSTOP, a thread is told by the kernel to make the rest of it.
            if waits_a_while && !begun_again && filtered.get(&tid).is_some_and(|kind| kind == "control") {
                ptrace::interrupt(tid).unwrap();
            }
        }
        used
    })
}

fn kind(tid: Pid) -> String {
    let name = fs::read_to_string(format!("/proc/{tid}/comm")).unwrap();
    if name.starts_with("cpu") { "cpu".to_owned() } else { "control".to_owned() }
}

fn command(owner: &OwnedFd, text: &str, with: Option<UnixStream>) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = with.iter().map(AsFd::as_fd).collect();
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(owner, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// The last event of a machine that is gone.
fn last_words(owner: &OwnedFd) -> String {
    let (mut packet, mut last) = ([0; 4096], String::new());
    while let Ok((_, length @ 1..)) = recv(owner, &mut packet, RecvFlags::DONTWAIT) {
        last = String::from_utf8_lossy(&packet[..length]).into_owned();
    }
    last
}

fn words(scratch: &Scratch, sockets: &[(&str, &Path)], control: &OwnedFd) -> Vec<String> {
    let image = |name: &str| images().join(name).to_str().unwrap().to_owned();
    let cmdline = format!("console=hvc0 quiet outboard.run=\"{GUEST}\"");
    let fd = control.as_raw_fd().to_string();
    let (kernel, initrd) = (image("vmlinux"), image("initrd.img"));
    let fixed =
        ["--kernel", &kernel, "--initrd", &initrd, "--memory", "256M", "--cpus", "2", "--cmdline", &cmdline, "--control-fd", &fd];
    let devices = sockets.iter().map(|(class, socket)| {
        let name = socket.strip_prefix(scratch.path("")).unwrap().to_str().unwrap().trim_end_matches(".sock").replace('/', "-");
        format!("--device={name},class={class},socket={}", socket.display())
    });
    fixed.into_iter().map(str::to_owned).chain(devices).collect()
}

#[test]
fn the_vmm_makes_every_call_it_may_make() {
    assert!(can_trace(), "guests are traced by root");
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 4 << 20);
    let disk = |socket: &str| {
        let name = "outboard-blk";
        let server = Server::start(name, &scratch, &["--format", "raw", "--blk-file", image.to_str().unwrap()]);
        let renamed = scratch.path(socket);
        fs::rename(&server.socket, &renamed).unwrap();
        (server, renamed)
    };
    let log = scratch.path("console.log");
    let console = Server::start("outboard-console", &scratch, &["--file", log.to_str().unwrap()]);
    let entropy = Server::start("outboard-rng", &scratch, &[]);
    let (first, at) = disk("disk.sock");
    let (owner, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
    let sockets = [("blk", at.as_path()), ("console", console.socket.as_path()), ("rng", entropy.socket.as_path())];
    let machine = traced(words(&scratch, &sockets, &theirs));
    let boots = |count| {
        let text = || fs::read_to_string(&log).unwrap_or_default();
        wait_for("the guest", || (text().matches("guest-is-up").count() == count || machine.is_finished()).then_some(()));
        assert!(!machine.is_finished(), "the machine has ended:\n{}", text());
    };
    boots(1);
    drop(first);
    let (_second, at) = disk("again.sock");
    command(&owner, r#"{"command":"replug","device":"disk"}"#, Some(UnixStream::connect(at).unwrap()));
    command(&owner, r#"{"command":"reset"}"#, None);
    boots(2);
    command(&owner, r#"{"command":"power-button"}"#, None);
    let used = machine.join().unwrap();
    assert_eq!(last_words(&owner), r#"{"event":"guest","what":"shutdown"}"#);
    let excused = |kind: &str, call: &str, value| {
        NOT_HERE.iter().any(|(thread, name, argument, _)| (*thread, *name, *argument) == (kind, call, value))
    };
    let mut idle = Vec::new();
    for (kind, rules) in rules() {
        for ((number, when), call) in rules {
            let value = when.map_or(0, |(_, value)| value);
            if !used[&kind].contains(&(number, when)) && !excused(&kind, &call, value) {
                idle.push(format!("{kind}: {call} {value:#x}"));
            }
        }
    }
    assert!(idle.is_empty(), "allowed and never made: {idle:#?}");
}
