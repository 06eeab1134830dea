//! Stands in for every other program in the composer's tests: under the name `outboard-vmm` it answers as a VMM does, under
//! the name of a device it holds its connection until the other end hangs up. What it is to do differently is in the
//! environment variable `PRETEND`, words of the form `NAME:WHAT` separated by spaces:
//!
//! - `vmm:4` ends with status 4 once started, `vmm:deaf` ignores the power button, `vmm:die` fails with a sentence,
//!   `vmm:lose` gives the first device's connection up a moment later;
//! - `console:raw` makes the terminal raw and leaves it so;
//! - `blk:mute` never says that it serves;
//! - a console with `--socket` greets each client and gives back what is typed;
//! - every stand-in shows one counter of its own, 7, and one that is not its own;
//! - a disk obeys its control socket; `blk:refuse` refuses overlays, `blk:takes` dies when it has got one, `blk:silent` never answers;
//! - `blk:1` fails with status 1 and a sentence, `blk:crash` aborts after serving for a moment, `console:leave` ends with 0.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut, Read, Write, stdin};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{ExitCode, abort};
use std::time::Duration;
use std::{env, fs, thread};

use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use virtio::metrics::{Counter, publish};

fn main() -> ExitCode {
    let args: Vec<String> = env::args_os().map(|arg: OsString| arg.to_string_lossy().into_owned()).collect();
    let name = args.first().and_then(|path| path.rsplit("outboard-").next()).unwrap_or_default().to_owned();
    let wishes = env::var("PRETEND").unwrap_or_default();
    let wish = wishes.split(' ').find_map(|word| word.strip_prefix(&format!("{name}:"))).unwrap_or_default();
    if args.get(1).is_some_and(|arg| arg == "--print-man") {
        println!(".TH outboard-{name} 8");
        return ExitCode::SUCCESS;
    }
    match name.as_str() {
        "vmm" => vmm(&args, wish),
        _ => device(&name, &args, wish),
    }
}

fn value<'a>(args: &'a [String], flag: &str) -> Option<&'a str> {
    args.iter().position(|arg| arg == flag).and_then(|at| args.get(at + 1)).map(String::as_str)
}

fn descriptor(args: &[String], flag: &str) -> Option<OwnedFd> {
    sandbox::inherited(value(args, flag)?.parse().ok()?)
}

fn device(name: &str, args: &[String], wish: &str) -> ExitCode {
    if let Ok(status) = wish.parse::<u8>() {
        eprintln!("outboard-{name}: Cannot open image /x.img: it is in use");
        return ExitCode::from(status);
    }
    let Some(connection) = descriptor(args, "--fd") else {
        return ExitCode::from(2);
    };
    count(name, args);
    if let Some(path) = value(args, "--socket") {
        echo(path);
    }
    if let Some(control) = descriptor(args, "--control-fd") {
        let (args, wish) = (args.to_vec(), wish.to_owned());
        thread::spawn(move || obey(&control, &args, &wish));
    }
    let mut connection = UnixStream::from(connection);
    if wish == "mute" {
        let _hung_up = connection.read(&mut [0]);
    }
    let _vmm_gone = connection.write_all(b"+");
    if !wish.is_empty() {
        thread::sleep(Duration::from_millis(300));
        match wish {
            "crash" => abort(),
            "leave" => return ExitCode::SUCCESS,
            "raw" => make_raw(),
            _ => {}
        }
    }
    let _hung_up = connection.read(&mut [0]);
    ExitCode::SUCCESS
}

/// A disk of 1 MiB that does what its owner wants.
fn obey(control: &OwnedFd, args: &[String], wish: &str) {
    let limit = |flag: &str| {
        let (rate, burst) = value(args, flag).map_or(("0", "0"), |text| text.split_once(':').unwrap_or((text, "0")));
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        json!({"per_second": number(rate), "burst": number(burst)})
    };
    let mut limits = json!({"operations": limit("--limit-ops"), "bytes": limit("--limit-bytes")});
    let mut bytes = 1_u64 << 20;
    while let Some((command, overlay)) = hear(control) {
        let mut refused = None;
        match command["command"].as_str().unwrap_or_default() {
            "resize" => bytes = command["bytes"].as_u64().unwrap_or(0),
            "limit" => limits = json!({"operations": command["operations"], "bytes": command["bytes"]}),
            "snapshot" | "reset" if wish == "takes" => abort(),
            "snapshot" | "reset" if wish == "refuse" => refused = Some("The overlay cannot be used"),
            "snapshot" | "reset" if overlay.is_none() => refused = Some("There is no overlay"),
            _ if wish == "silent" => continue,
            _ => {}
        }
        let answer = match refused {
            Some(says) => json!({"ok": false, "error": says}),
            None => json!({"ok": true, "bytes": bytes, "read-only": false, "direct": false, "limits": limits}),
        };
        let mut none = SendAncillaryBuffer::default();
        let line = format!("{answer}\n");
        let _composer_gone = sendmsg(control, &[IoSlice::new(line.as_bytes())], &mut none, SendFlags::NOSIGNAL);
    }
}

/// A console to attach to: it greets each client and gives back what is typed.
fn echo(path: &str) {
    let _stale = fs::remove_file(path);
    let Ok(listener) = UnixListener::bind(path) else { return };
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _gone = client.write_all(b"hello ");
            let mut piece = [0; 64];
            while let Ok(count @ 1..) = client.read(&mut piece) {
                let _gone = client.write_all(piece.get(..count).unwrap_or_default());
            }
        }
    });
}

/// What a process that is somebody else's by now would show: also what only the composer can know.
fn count(name: &str, args: &[String]) {
    static OWN: Counter = Counter::new();
    static FORGED: Counter = Counter::new();
    OWN.add(7);
    FORGED.add(1000);
    let own = if name == "blk" { "blk_reads" } else { "queue_kicks" };
    let counters = [(own, &OWN, "Counted"), ("process_restarts", &FORGED, "Forged")];
    let _not_shown = publish(descriptor(args, "--metrics-fd"), &counters, 0);
}

fn make_raw() {
    if let Ok(mut settings) = tcgetattr(stdin()) {
        settings.make_raw();
        let _no_terminal = tcsetattr(stdin(), OptionalActions::Now, &settings);
    }
}

fn vmm(args: &[String], wish: &str) -> ExitCode {
    if wish == "die" {
        eprintln!("outboard-vmm: Cannot open /dev/kvm: Permission denied (os error 13)");
        return ExitCode::FAILURE;
    }
    let Some(control) = descriptor(args, "--control-fd") else {
        return ExitCode::from(2);
    };
    let mut connections = Vec::new();
    let devices = args.windows(2).filter(|pair| pair.first().is_some_and(|flag| flag == "--device"));
    let names: Vec<String> = devices.filter_map(|pair| Some(pair.get(1)?.split(',').next()?.to_owned())).collect();
    for device in args.iter().filter(|arg| arg.contains(",fd=")) {
        let number = device.split(",fd=").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
        connections.extend(number.and_then(sandbox::inherited));
    }
    tell(&control, &json!({"event": "started"}));
    let mut connections: Vec<UnixStream> = connections.into_iter().map(UnixStream::from).collect();
    for (name, connection) in names.iter().zip(&mut connections) {
        serve(&control, name, connection);
    }
    if let Ok(status) = wish.parse::<u8>() {
        thread::sleep(Duration::from_millis(200));
        return ExitCode::from(status);
    }
    if wish == "lose" {
        thread::sleep(Duration::from_millis(200));
        let reason = "It did not stop a ring within 10 s";
        tell(&control, &json!({"event": "device", "device": names.first(), "state": "lost", "reason": reason}));
    }
    while let Some((message, descriptor)) = hear(&control) {
        match message["command"].as_str() {
            Some("power-button") if wish == "deaf" => {}
            Some("power-button" | "quit") => break,
            Some("replug") => {
                let name = message["device"].as_str().unwrap_or_default();
                if let Some(mut connection) = descriptor.map(UnixStream::from) {
                    serve(&control, name, &mut connection);
                    connections.push(connection);
                }
            }
            _ => tell(&control, &json!({"event": "guest", "what": "reset"})),
        }
    }
    for connection in connections {
        drop(connection.shutdown(Shutdown::Both));
    }
    ExitCode::SUCCESS
}

/// A backend counts as connected when it has said something.
fn serve(control: &OwnedFd, name: &str, connection: &mut UnixStream) {
    if !name.starts_with("share") && connection.read_exact(&mut [0]).is_err() {
        return;
    }
    tell(control, &json!({"event": "device", "device": name, "state": "connected"}));
}

fn tell(control: &OwnedFd, event: &Value) {
    let text = event.to_string();
    let mut none = SendAncillaryBuffer::default();
    let _composer_gone = sendmsg(control, &[IoSlice::new(text.as_bytes())], &mut none, SendFlags::NOSIGNAL);
}

fn hear(control: &OwnedFd) -> Option<(Value, Option<OwnedFd>)> {
    let mut buffer = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let count = recvmsg(control.as_fd(), &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, RecvFlags::empty()).ok()?.bytes;
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        rustix::net::RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let descriptor = descriptors.next().and_then(|mut rights| rights.next());
    let message = serde_json::from_slice(buffer.get(..count)?).ok()?;
    Some((message, descriptor))
}
