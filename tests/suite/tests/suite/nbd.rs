//! Our probe as an NBD server: other people's clients read and write a vhost-user disk through it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use probe::random::Random;
use suite::disktools::{Running, done, tool};
use suite::{Scratch, Server, program, run, wait_for};

/// A disk, and the probe that serves it.
struct Export {
    _probe: Running,
    server: Server,
    socket: PathBuf,
    uri: String,
    image: PathBuf,
    scratch: Scratch,
}

fn export(words: &[&str]) -> Export {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 8 << 20);
    let all = [&["--format", "raw", "--blk-file", image.to_str().unwrap()], words].concat();
    let server = Server::start("outboard-blk", &scratch, &all);
    let socket = scratch.path("nbd.sock");
    let mut command = Command::new(program("outboard-probe"));
    let probe =
        Running::start(command.args(["blk", "nbd"]).arg(&server.socket).arg("--listen").arg(&socket).stderr(Stdio::null()));
    wait_for("the export", || socket.exists().then_some(()));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    Export { _probe: probe, server, socket, uri, image, scratch }
}

#[test]
fn nbdinfo_sees_what_the_disk_can_do() {
    for (words, writable) in [(&[][..], "true"), (&["--read-only"], "false")] {
        let export = export(words);
        let info: serde_json::Value = serde_json::from_str(&done("nbdinfo", &["--json", &export.uri]).out).unwrap();
        let disk = &info["exports"][0];
        assert_eq!(disk["export-size"], 8 << 20);
        assert_eq!(disk["is_read_only"], writable == "false", "{disk}");
        for ability in ["can_flush", "can_fua"] {
            assert_eq!(disk[ability], true, "{ability}: {disk}");
        }
        for ability in ["can_trim", "can_zero"] {
            assert_eq!(disk[ability], writable == "true", "{ability}: {disk}");
        }
        assert_eq!(disk["block_size_minimum"], 512);
    }
}

#[test]
fn nbdcopy_writes_and_reads_all_of_it() {
    let export = export(&[]);
    let mut random = Random::new(1);
    let content: Vec<u8> = (0..1 << 20).flat_map(|_| random.number().to_le_bytes()).collect();
    let (source, copy) = (export.scratch.path("source"), export.scratch.path("copy"));
    fs::write(&source, &content).unwrap();
    done("nbdcopy", &["--flush", source.to_str().unwrap(), &export.uri]);
    assert!(fs::read(&export.image).unwrap() == content);
    done("nbdcopy", &[&export.uri, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == content);
}

#[test]
fn qemu_io_does_all_that_there_is() {
    let export = export(&[]);
    let good = ["write -P 1 0 1M", "write -f -P 2 4k 4k", "write -z 8k 4k", "write -z -u 16k 4k", "discard 64k 64k", "flush"];
    let reads =
        ["read -P 1 0 4k", "read -P 2 4k 4k", "read -P 0 8k 4k", "read -P 0 16k 4k", "read -P 0 64k 64k", "read -P 1 128k 4k"];
    let mut words = vec!["-f", "raw"];
    good.iter().chain(&reads).for_each(|one| words.extend(["-c", *one]));
    words.push(&export.uri);
    let said = done("qemu-io", &words).out;
    assert!(!said.contains("fail"), "{said}");
    let bytes = fs::read(&export.image).unwrap();
    assert_eq!((bytes[0], bytes[4096], bytes[8192], bytes[16384], bytes[65536], bytes[131072]), (1, 2, 0, 0, 0, 1));
}

#[test]
fn a_disk_that_is_read_only_stays_as_it_is() {
    let export = export(&["--read-only"]);
    let ended = run(tool("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &export.uri]));
    assert!(ended.code != Some(0), "{}{}", ended.out, ended.err);
    assert!(fs::read(&export.image).unwrap().iter().all(|byte| *byte == 0));
}

/// A client that talks nonsense, or asks for what is not there, costs nobody else anything; a second one waits for its turn.
#[test]
fn bad_clients_and_waiting_ones() {
    let export = export(&[]);
    let mut first = UnixStream::connect(&export.socket).unwrap();
    let mut hello = [0; 18];
    first.read_exact(&mut hello).unwrap();
    assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
    // The oldest way in, then a read behind the end, one of a part of a sector, and an unknown request.
    first.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat()).unwrap();
    let mut size = [0; 10];
    first.read_exact(&mut size).unwrap();
    assert_eq!(size[..8], (8u64 << 20).to_be_bytes());
    let mut ask = |kind: u16, offset: u64, len: u32| {
        let head =
            [&0x2560_9513u32.to_be_bytes()[..], &[0, 0], &kind.to_be_bytes(), &[7; 8], &offset.to_be_bytes(), &len.to_be_bytes()];
        first.write_all(&head.concat()).unwrap();
        let mut reply = [0; 16];
        first.read_exact(&mut reply).unwrap();
        assert_eq!((&reply[..4], &reply[8..]), (&0x6744_6698u32.to_be_bytes()[..], &[7; 8][..]));
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    };
    assert_eq!([ask(0, 8 << 20, 512), ask(0, 100, 512), ask(0, u64::MAX, 512), ask(99, 0, 0)], [22, 22, 22, 95]);
    assert_eq!(ask(4, 0, 8 << 20), 0, "all of it is trimmed");
    let waiting = Running::start(tool("nbdinfo").args(["--size", &export.uri]).stdout(Stdio::null()));
    let mut nonsense = UnixStream::connect(&export.socket).unwrap();
    nonsense.write_all(&[0xff; 4096]).unwrap();
    drop(first);
    let mut waiting = waiting;
    wait_for("its turn", || (!waiting.runs()).then_some(()));
    drop(nonsense);
    assert_eq!(done("nbdinfo", &["--size", &export.uri]).out.trim(), "8388608");
    assert_eq!(export.server.terminate(), Some(0));
}
