//! What the table says, and that it fits.

use crate::control::report::Report;

use super::*;

fn stats(pid: i32, cpu: f64, chains: u64) -> Stats {
    let mut process = Report::example().processes.remove(0);
    process.pid = Some(pid);
    process.restarts = 12;
    process.role = "a-disk-with-a-long-name".to_owned();
    process.state = "restarting".to_owned();
    let usage = Usage { cpu_seconds: cpu, resident_bytes: 5 << 20, private_bytes: 700 << 10, threads: 2 };
    let counters = [("queue_chains", chains), ("queue_kicks", 10), ("queue_calls", 10), ("blk_read_bytes", chains * 4096)];
    let counters = counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Stats { process, usage: Some(usage), counters }
}

fn look(at: Instant, stats: Stats) -> Look {
    Look { at, machines: [("web".to_owned(), vec![stats])].into() }
}

#[test]
fn a_second_look_makes_rates() {
    let start = Instant::now();
    let before = look(start, stats(7, 1.0, 1000));
    let now = look(start + Duration::from_secs(2), stats(7, 2.5, 51_000));
    let text = now.text(&before);
    let row = text.lines().nth(2).unwrap();
    assert_eq!(row, "a-disk-wi~ restarting  75.0   5.0M   700K  12  61s  25.0k      0      0   97.6M");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let json = now.json(&before);
    assert_eq!(json["machines"][0]["processes"][0]["rates"]["requests"], 25_000.0);
}

#[test]
fn a_successor_has_no_past() {
    let start = Instant::now();
    let before = look(start, stats(7, 100.0, 1000));
    let now = look(start + Duration::from_secs(1), stats(8, 0.5, 3));
    assert!(now.text(&before).contains(" restarting   0.0 "), "{}", now.text(&before));
}

#[test]
fn amounts_have_three_digits_and_a_unit() {
    let bytes = |value| amount(value, 1024);
    assert_eq!([0, 999, 1000, 1 << 20, 150 << 20, 2 << 40].map(bytes), ["0", "999", "0.9K", "1.0M", "150M", "2.0T"]);
    assert_eq!([999, 1000, 12_345, 999_999].map(|value| amount(value, 1000)), ["999", "1.0k", "12.3k", "999k"]);
    assert_eq!(amount(u64::MAX, 1000), ">999P");
    assert_eq!([99, 100, 7200, 400_000].map(uptime), ["99s", "1m", "2h", "4d"]);
}
