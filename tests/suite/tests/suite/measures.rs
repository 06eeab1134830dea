//! What `outboard-probe blk bench` and `fs bench` say of a server is what it has done.

use std::process::Command;

use suite::counters::Counters;
use suite::{Scratch, Server, program, run};

/// Measures a disk of 8 MiB: what the probe says, and what the disk counted (reads, read bytes, writes, written bytes).
fn measured(words: &[&str]) -> (serde_json::Value, [u64; 4]) {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 8 << 20);
    let counters = Counters::new();
    let number = counters.fd();
    let disk = ["--format", "raw", "--blk-file", image.to_str().unwrap(), "--num-queues", "2", "--metrics-fd", &number];
    let server = Server::start("outboard-blk", &scratch, &disk);
    let mut probe = Command::new(program("outboard-probe"));
    probe.args(["blk", "bench", "--json", "--seconds", "0.05"]).args(words).arg(&server.socket);
    let ended = run(&mut probe);
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{words:?}");
    let counted = ["blk_reads", "blk_read_bytes", "blk_writes", "blk_written_bytes"].map(|name| counters.count(name));
    (serde_json::from_str(&ended.out).unwrap(), counted)
}

#[test]
fn a_bench_counts_what_the_disk_has_served() {
    for (words, writes, size) in [
        (&[][..], false, 4096),
        (&["--load", "randwrite", "--poll"], true, 4096),
        (&["--load", "read", "--indirect", "--queue-size", "64", "--depth", "64", "--block-size", "512"], false, 512),
        (&["--load", "write", "--queues", "2", "--depth", "5", "--no-event-idx", "--block-size", "65536"], true, 65536),
        (&["--load", "randread", "--depth", "1", "--seed", "9"], false, 4096),
    ] {
        let (said, [reads, read, written, bytes]) = measured(words);
        let requests = said["requests"].as_u64().unwrap();
        let expected = if writes { [0, 0, requests, requests * size] } else { [requests, requests * size, 0, 0] };
        assert!(requests > 0, "{words:?}: {said}");
        assert_eq!([reads, read, written, bytes], expected, "{words:?}: {said}");
        let [half, most, rate] = ["p50_us", "p99_us", "requests_per_second"].map(|name| said[name].as_f64().unwrap());
        assert!(0.0 < half && half <= most && rate > 0.0, "{words:?}: {said}");
    }
}

#[test]
fn a_bench_says_why_it_cannot_be() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 4096);
    let server =
        Server::start("outboard-blk", &scratch, &["--format", "raw", "--blk-file", image.to_str().unwrap(), "--read-only"]);
    for (words, reason) in [
        (&["--block-size", "8192"][..], "The disk is smaller than one request"),
        (&["--depth", "64"], "no room for this depth"),
        (&["--block-size", "1000"], "multiples of 512"),
        (&["--load", "write"], "the disk answered IoError"),
    ] {
        let ended = run(Command::new(program("outboard-probe")).args(["blk", "bench"]).args(words).arg(&server.socket));
        assert!(ended.code == Some(1) && ended.err.contains(reason), "{words:?}: {}", ended.err);
    }
}

/// Measures a share that is served with `options`: what the probe says, and what the server counted (requests, waits for a limit).
fn measured_share(options: &[&str], words: &[&str]) -> (serde_json::Value, [u64; 2]) {
    let scratch = Scratch::new();
    let folder = scratch.path("shared");
    std::fs::create_dir(&folder).unwrap();
    let counters = Counters::new();
    let number = counters.fd();
    let mut shared = vec!["--shared-dir", folder.to_str().unwrap(), "--num-request-queues", "2", "--metrics-fd", &number];
    shared.extend(options);
    let server = Server::start("outboard-virtiofsd", &scratch, &shared);
    let mut probe = Command::new(program("outboard-probe"));
    probe.args(["fs", "bench", "--json"]).args(words).arg(&server.socket);
    let ended = run(&mut probe);
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{words:?}");
    let counted = ["virtiofsd_requests", "virtiofsd_limited"].map(|name| counters.count(name));
    (serde_json::from_str(&ended.out).unwrap(), counted)
}

#[test]
fn a_bench_of_a_share_counts_what_the_server_has_answered() {
    // The session, the file that is used, and 64 MiB in pieces of 128 KiB to fill it.
    const BEFORE: u64 = 2 + 512;
    for words in [
        &[][..],
        &["--load", "getattr", "--poll", "--depth", "8"],
        &["--load", "lookup", "--queues", "2", "--depth", "8"],
        &["--load", "lookup-miss", "--queue-size", "128", "--depth", "32"],
        &["--load", "read", "--block-size", "65536", "--indirect"],
        &["--load", "write", "--block-size", "512", "--no-event-idx", "--seed", "7"],
        &["--load", "nothing"],
    ] {
        let words = [&["--seconds", "0.05"], words].concat();
        let (said, [counted, limited]) = measured_share(&[], &words);
        let requests = said["requests"].as_u64().unwrap();
        // What no server knows is not carried out.
        let known = if words.contains(&"nothing") { 0 } else { requests };
        assert!(requests > 0 && counted == known + BEFORE && limited == 0, "{words:?}: {counted} of {said}");
        let [half, most, rate] = ["p50_us", "p99_us", "requests_per_second"].map(|name| said[name].as_f64().unwrap());
        assert!(0.0 < half && half <= most && rate > 0.0, "{words:?}: {said}");
    }
}

#[test]
fn a_limited_share_keeps_to_its_rates() {
    // What fills the file is a burst, which may be there again when half a second of measuring begins.
    let (said, [_, limited]) = measured_share(&["--limit-ops", "1000:600"], &["--seconds", "0.5", "--depth", "8"]);
    let requests = said["requests"].as_u64().unwrap();
    assert!((300..=1200).contains(&requests) && limited > 0, "1000 a second: {said}, {limited}");
    let limits = ["--limit-bytes", "33554432:67108864"];
    let (said, [_, limited]) = measured_share(&limits, &["--seconds", "0.5", "--load", "read", "--block-size", "65536"]);
    let bytes = said["requests"].as_u64().unwrap() << 16;
    assert!(((8 << 20)..=(96 << 20)).contains(&bytes) && limited > 0, "32 MiB a second: {said}, {limited}");
    let (said, [_, limited]) = measured_share(&limits, &["--seconds", "0.1", "--depth", "8"]);
    assert!(said["requests"].as_u64().unwrap() > 500 && limited == 0, "what moves no bytes is not limited by them: {said}");
}
