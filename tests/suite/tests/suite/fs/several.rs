//! Several shares in one process (`--also`).

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use probe::fs::message::ROOT;
use probe::fs::raw::Raw;
use rustix::io::{FdFlags, fcntl_setfd};
use suite::virtiofsd::Virtiofsd;
use suite::{Scratch, program, run, wait_for};

use super::mounted::{Mounted, can_mount};

fn info(socket: &std::path::Path) -> String {
    let ended = run(Command::new(program("outboard-probe")).args(["fs", "info"]).arg(socket));
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    ended.out
}

#[test]
fn each_share_is_itself_and_outlives_the_guests_of_the_others() {
    if !can_mount("several shares") {
        return;
    }
    let scratch = [Scratch::new(), Scratch::new(), Scratch::new()];
    for (number, scratch) in scratch.iter().enumerate() {
        fs::create_dir(scratch.path("house")).unwrap();
        fs::write(scratch.path("house").join("which"), number.to_string()).unwrap();
    }
    let [socket, second, third] = scratch.each_ref().map(|scratch| scratch.path("fs.sock"));
    let houses = scratch.each_ref().map(|scratch| scratch.path("house"));
    let listener = UnixListener::bind(&third).unwrap();
    fcntl_setfd(&listener, FdFlags::empty()).unwrap();
    let mut command = Command::new(program("outboard-virtiofsd"));
    command.arg("--shared-dir").arg(&houses[0]).args(["--tag", "first", "--num-request-queues", "2"]);
    command.arg("--also").arg(format!("path={},socket={},tag=second,readonly", houses[1].display(), second.display()));
    command.arg("--also").arg(format!("path={},fd={},tag=third", houses[2].display(), listener.as_raw_fd()));
    let server = Virtiofsd::launch_ours(command, socket.clone());
    drop(listener);
    for (socket, tag) in [(&socket, "first"), (&second, "second"), (&third, "third")] {
        wait_for("its socket", || socket.exists().then_some(()));
        assert!(info(socket).contains(tag), "{tag}: {}", info(socket));
    }
    // Each has a thread that talks to its frontend, and can do all that this takes.
    let mut guest = Raw::begin(UnixStream::connect(&second).unwrap(), 2).unwrap();
    let node = guest.lookup(ROOT, "which").unwrap();
    assert!(guest.device.save_state().unwrap().len() > 50, "a state with {node} in it");
    drop(guest);
    let [one, two, three] = scratch;
    let mut one = Mounted::of(one, &socket, Some(server), &["--queues", "2"]);
    let mut two = Mounted::of(two, &second, None, &[]);
    let mut three = Mounted::of(three, &third, None, &[]);
    for (number, mounted) in [&one, &two, &three].into_iter().enumerate() {
        assert_eq!(fs::read_to_string(mounted.seen.join("which")).unwrap(), number.to_string());
        let written = fs::write(mounted.seen.join("new"), number.to_string());
        assert_eq!(written.err().and_then(|error| error.raw_os_error()), (number == 1).then_some(libc::EROFS), "{number}");
    }
    // A guest that goes takes nothing of the others with it, and may come back.
    let open = fs::File::open(three.seen.join("which")).unwrap();
    two.unmount();
    assert!(info(&second).contains("second"));
    assert_eq!(fs::read_to_string(one.seen.join("new")).unwrap(), "0");
    assert_eq!(open.metadata().unwrap().len(), 1);
    drop(open);
    three.unmount();
    one.unmount();
    drop(one.server.take());
    assert!(!socket.exists() && !second.exists(), "its sockets are gone, and what it was given is not its own");
}

#[test]
fn what_cannot_be_shared_besides_is_said() {
    let scratch = Scratch::new();
    let start = |also: &str| {
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.arg("--shared-dir").arg(scratch.path("")).arg("--socket-path").arg(scratch.path("fs.sock"));
        run(command.args(["--also", also]))
    };
    let missing = start(&format!("path=/nowhere/at/all,socket={}", scratch.path("b.sock").display()));
    assert!(missing.code == Some(1) && missing.err.contains("Cannot share /nowhere/at/all"), "{}", missing.err);
    let twice = start(&format!("path=/,socket={}", scratch.path("fs.sock").display()));
    assert!(twice.code == Some(1) && twice.err.contains("fs.sock"), "{}", twice.err);
    let wrong = start("path=/");
    assert!(wrong.code == Some(2) && wrong.err.contains("socket=PATH or fd=FD is missing"), "{}", wrong.err);
    assert!(!scratch.path("fs.sock").exists() && !scratch.path("b.sock").exists());
}
