//! Who waits for whom.

use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use super::*;

const SOON: Duration = Duration::from_millis(50);

#[test]
fn ranges_that_do_not_touch_do_not_wait() {
    let ranges = Ranges::new(1 << 30);
    let (a, b) = (ranges.lane(), ranges.lane());
    let _one = a.share(0, 4096, true).unwrap();
    let _two = a.share(0, 4096, true).unwrap();
    let _three = b.exclude(8192, 4096).unwrap();
    let _four = a.share(4096, 4096, false).unwrap();
    assert!(matches!(a.share(8192, 1, false), Err(Error::Busy)), "it holds something, so it must not wait");
    assert!(matches!(a.exclude(1 << 20, 1), Err(Error::Busy)));
    assert!(!ranges.is_quiet(0, 1) && ranges.is_quiet(1 << 20, 1));
}

#[test]
fn an_exclusive_holder_waits_for_sharers_and_keeps_others_out() {
    let ranges = Ranges::new(1 << 30);
    let (a, b, c) = (ranges.lane(), ranges.lane(), ranges.lane());
    let (say, hear) = channel();
    let shared = a.share(0, 65536, true).unwrap();
    let other = thread::spawn({
        let say = say.clone();
        move || {
            let alone = b.exclude(65535, 1).unwrap();
            say.send("alone").unwrap();
            thread::sleep(SOON);
            say.send("not any more").unwrap();
            drop(alone);
        }
    });
    assert!(hear.recv_timeout(SOON).is_err());
    drop(shared);
    assert_eq!(hear.recv().unwrap(), "alone");
    let late = thread::spawn(move || {
        let _shared = c.share(61440, 4096, true).unwrap();
        say.send("shared").unwrap();
    });
    assert_eq!((hear.recv().unwrap(), hear.recv().unwrap()), ("not any more", "shared"));
    other.join().unwrap();
    late.join().unwrap();
}

#[test]
fn a_lane_has_so_many_slots() {
    let ranges = Ranges::new(u64::MAX);
    let lane = ranges.lane();
    let all: Vec<_> = (0..SLOTS as u64).map(|at| lane.share(at << 50, 512, true).unwrap()).collect();
    assert!(matches!(lane.share(0, 512, true), Err(Error::Busy)));
    drop(all);
    assert!(lane.share(u64::MAX - 1, 1, true).is_ok());
}
