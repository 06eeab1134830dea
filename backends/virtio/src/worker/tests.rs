//! A thread, its queue, and both ways out.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::memory::Memory;
use crate::memory::tests::guest;
use crate::queue::Config;

struct Echo(Arc<AtomicU32>);

impl Serve for Echo {
    fn serve(&mut self, _index: u16, chain: &Chain, _attempt: &mut Attempt<'_>) -> Served {
        self.0.fetch_add(1, Ordering::SeqCst);
        Served::Done(u32::try_from(chain.writable().copy_from(b"done")).unwrap())
    }
}

/// A ring of eight with as many requests of 16 writable bytes each, in this memory: and its call descriptor.
fn ring(memory: &Arc<Memory>, requests: u16) -> (Queue, OwnedFd) {
    ring_with(memory, requests, true)
}

fn ring_with(memory: &Arc<Memory>, requests: u16, event_idx: bool) -> (Queue, OwnedFd) {
    let put = |at: u64, bytes: &[u8]| {
        let span = memory.span(at, u32::try_from(bytes.len()).unwrap()).unwrap();
        memory.write(span, bytes);
    };
    for index in 0..requests {
        let at = 0x1000 + 16 * u64::from(index);
        put(at, &(0x4000 + 16 * u64::from(index)).to_le_bytes());
        put(at + 8, &16u32.to_le_bytes());
        put(at + 12, &2u16.to_le_bytes());
        put(0x2004 + 2 * u64::from(index), &index.to_le_bytes());
    }
    put(0x2002, &requests.to_le_bytes());
    let event = || Some(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let config = Config {
        index: 0,
        size: 8,
        desc: 0x1000,
        avail: 0x2000,
        used: 0x3000,
        event_idx,
        next_avail: 0,
        kick: event(),
        call: event(),
        error: event(),
        log: None,
        dirty: None,
        used_address: None,
    };
    let call = config.call.as_ref().unwrap().try_clone().unwrap();
    (Queue::new(Arc::clone(memory), config).unwrap(), call)
}

#[test]
fn a_queue_is_handed_over_served_and_given_back() {
    let memory = Arc::new(guest(&[(0, 0x10000)]));
    let (queue, call) = ring(&memory, 1);
    let served = Arc::new(AtomicU32::new(0));
    let (worker, mailbox) = Worker::new().unwrap();
    let server = Echo(Arc::clone(&served));
    let thread = thread::spawn(move || run(server, mailbox));
    assert!(worker.stop(0).is_none(), "not running yet");
    worker.start(queue).unwrap();
    // Nobody kicked: a ring is looked at once when it starts.
    poll(&mut [PollFd::new(&call, PollFlags::IN)], Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
    let state = worker.stop(0).unwrap();
    assert_eq!(state.next_avail, 1);
    assert!(worker.stop(0).is_none(), "stopping twice is allowed");
    assert_eq!(served.load(Ordering::SeqCst), 1);
    let mut bytes = [0; 4];
    memory.read(memory.span(0x4000, 4).unwrap(), &mut bytes);
    assert_eq!(&bytes, b"done");
    worker.end();
    thread.join().unwrap();
}

/// Says at each request how many the guest has been shown, and whether it was interrupted.
struct Watch(OwnedFd, Arc<Memory>, Vec<(u16, bool)>);

impl Serve for Watch {
    fn serve(&mut self, _index: u16, _chain: &Chain, _attempt: &mut Attempt<'_>) -> Served {
        let used = self.1.load_u16(self.1.span(0x3000, 4).unwrap(), 2, Ordering::Acquire);
        let mut call = [PollFd::new(&self.0, PollFlags::IN)];
        let called = poll(&mut call, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0;
        self.2.push((used, called));
        Served::Done(0)
    }
}

#[test]
fn a_guest_is_woken_while_the_rest_of_a_batch_is_served() {
    let memory = Arc::new(guest(&[(0, 0x10000)]));
    let (queue, call) = ring(&memory, 8);
    let mut watch = Watch(call, Arc::clone(&memory), Vec::new());
    let mut slot = Slot::new(queue);
    assert!(!slot.drain(&mut watch));
    let (one, five) = ((1, true), (5, true));
    assert_eq!(watch.2, [(0, false), one, one, one, one, five, five, five]);
    assert_eq!(memory.load_u16(memory.span(0x3000, 4).unwrap(), 2, Ordering::Acquire), 8);
}

#[test]
fn a_guest_that_cannot_say_when_to_be_woken_is_shown_whole_batches() {
    let memory = Arc::new(guest(&[(0, 0x10000)]));
    let (queue, call) = ring_with(&memory, 8, false);
    let mut watch = Watch(call, Arc::clone(&memory), Vec::new());
    assert!(!Slot::new(queue).drain(&mut watch));
    assert_eq!(watch.2, [(0, false); 8]);
}

/// What is looked at is the end of a process, so the test runs itself again as one.
#[test]
fn a_queue_that_does_not_come_back_ends_the_process() {
    const CHILD: &str = "OUTBOARD_TEST_STUCK_QUEUE";
    if std::env::var_os(CHILD).is_some() {
        let (worker, _mailbox_nobody_looks_into) = Worker::new().unwrap();
        let state = worker.within(Duration::from_millis(50)).stop(0);
        println!("gone on, {state:?}");
        return;
    }
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "worker::tests::a_queue_that_does_not_come_back_ends_the_process", "--nocapture"]);
    let output = again.env(CHILD, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.code() == Some(1) && !said.contains("gone on"), "{:?} {said}", output.status);
}
