//! A driver, written from the specification, against the device's side of a ring.

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::memory::tests::guest;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x4000;
const SIZE: u16 = 4;

struct Driver {
    memory: Arc<Memory>,
    next: u16,
}

impl Driver {
    fn new() -> Driver {
        let driver = Driver { memory: Arc::new(guest(&[(0, 0x10000)])), next: 0 };
        for index in 0..SIZE {
            driver.describe(index, DATA + u64::from(index) * 16, 16, 2);
        }
        driver
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let span = self.memory.span(at, u32::try_from(bytes.len()).unwrap()).unwrap();
        self.memory.write(span, bytes);
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(self.memory.span(at, 2).unwrap(), &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn describe(&self, index: u16, addr: u64, len: u32, flags: u16) {
        let at = DESC + u64::from(index) * 16;
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
    }

    fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + u64::from(self.next % SIZE) * 2, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.put(AVAIL + 2, &self.next.to_le_bytes());
    }

    fn queue(&self, event_idx: bool, log: Option<Log>) -> Queue {
        Queue::new(Arc::clone(&self.memory), self.config(event_idx, log)).unwrap()
    }

    fn config(&self, event_idx: bool, log: Option<Log>) -> Config {
        let event = || Some(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let (kick, call, error) = (event(), event(), event());
        Config {
            index: 0,
            size: SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            event_idx,
            next_avail: 0,
            kick,
            call,
            error,
            log,
            dirty: None,
            used_address: None,
        }
    }
}

fn count(fd: &Option<OwnedFd>) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd.as_ref().unwrap(), &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

#[test]
fn a_batch_is_published_once_with_one_signal() {
    for event_idx in [false, true] {
        let mut driver = Driver::new();
        let mut queue = driver.queue(event_idx, None);
        let mut chain = queue.chain();
        (0..3).for_each(|head| driver.offer(head));
        for written in 1..=3 {
            let token = queue.pop(&mut chain).unwrap();
            queue.complete(token, written);
        }
        assert_eq!(driver.get(USED + 2), 0, "nothing is visible before the batch");
        queue.publish();
        assert_eq!(driver.get(USED + 2), 3);
        assert_eq!(driver.get(USED + 4 + 8 + 4), 2, "the length of the second");
        assert_eq!(count(&queue.call), 1);
        assert!(!queue.arm());
        assert!(queue.pop(&mut chain).is_none());
    }
}

#[test]
fn event_idx_decides_about_kicks_and_interrupts() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(true, None);
    let mut chain = queue.chain();
    let mut serve = |queue: &mut Queue| {
        while let Some(token) = queue.pop(&mut chain) {
            queue.complete(token, 0);
        }
        queue.publish();
        queue.arm();
    };
    driver.offer(0);
    serve(&mut queue);
    assert_eq!(count(&queue.call), 1, "of the first batch the guest is always told");
    assert_eq!(driver.get(USED + 4 + 8 * u64::from(SIZE)), 1, "avail_event asks for the next kick");
    // used_event 2: tell me when index 2 has been used, that is, when the third is done.
    driver.put(AVAIL + 4 + 2 * u64::from(SIZE), &2u16.to_le_bytes());
    driver.offer(1);
    serve(&mut queue);
    assert_eq!(count(&queue.call), 0);
    driver.offer(2);
    serve(&mut queue);
    assert_eq!(count(&queue.call), 1);
}

#[test]
fn without_event_idx_the_flags_decide() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false, None);
    let mut chain = queue.chain();
    driver.put(AVAIL, &1u16.to_le_bytes());
    driver.offer(0);
    queue.disarm();
    assert_eq!(driver.get(USED), 1);
    let token = queue.pop(&mut chain).unwrap();
    queue.complete(token, 0);
    queue.publish();
    assert_eq!(count(&queue.call), 0, "the guest wants no interrupt");
    queue.arm();
    assert_eq!(driver.get(USED), 0);
}

#[test]
fn arming_notices_what_came_meanwhile() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(true, None);
    assert!(!queue.arm());
    driver.offer(0);
    assert!(queue.arm());
}

#[test]
fn a_driver_that_breaks_the_rules_breaks_its_ring_once() {
    type Attack = fn(&mut Driver);
    let breaks: [(&str, Attack); 4] = [
        ("jump", |driver| driver.put(AVAIL + 2, &(SIZE + 1).to_le_bytes())),
        ("head", |driver| driver.offer(SIZE)),
        ("in use", |driver| {
            driver.offer(0);
            driver.offer(0);
        }),
        ("chain", |driver| {
            driver.describe(0, u64::MAX - 1, 16, 2);
            driver.offer(0);
        }),
    ];
    for (name, attack) in breaks {
        let mut driver = Driver::new();
        let mut queue = driver.queue(true, None);
        let mut chain = queue.chain();
        attack(&mut driver);
        let mut tokens = Vec::new();
        while let Some(token) = queue.pop(&mut chain) {
            tokens.push(token);
        }
        assert!(queue.broken().is_some(), "{name}");
        assert_eq!(count(&queue.error), 1, "{name}");
        assert!(queue.pop(&mut chain).is_none() && !queue.arm(), "{name}: nothing more is read");
        assert_eq!(count(&queue.error), 0, "{name}: reported once");
        for token in tokens {
            queue.complete(token, 0);
        }
    }
}

#[test]
fn a_successor_serves_what_was_in_flight_first_and_in_order() {
    let region = Arc::new(guest(&[(0, 4096)]));
    let log = || Some(Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap());
    let mut driver = Driver::new();
    let mut queue = driver.queue(true, log());
    let mut chain = queue.chain();
    for head in [2, 0, 3, 1] {
        driver.offer(head);
    }
    let first = queue.pop(&mut chain).unwrap();
    let second = queue.pop(&mut chain).unwrap();
    let third = queue.pop(&mut chain).unwrap();
    queue.complete(second, 7);
    queue.publish();
    // Death: the tokens are gone, the fourth was never taken.
    let heads = (first.head(), third.head());
    drop(queue);
    let mut successor = driver.queue(true, log());
    let mut order = Vec::new();
    assert!(successor.arm(), "there is something to do");
    while let Some(token) = successor.pop(&mut chain) {
        order.push(token.head());
        successor.complete(token, 0);
    }
    assert_eq!(order, [heads.0, heads.1, 1]);
    successor.publish();
    assert_eq!(driver.get(USED + 2), 4);
    assert_eq!(successor.into_state().next_avail, 4);
}

#[test]
fn a_stopped_ring_says_where_it_stopped() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false, None);
    let mut chain = queue.chain();
    driver.offer(0);
    driver.offer(1);
    let token = queue.pop(&mut chain).unwrap();
    queue.complete(token, 0);
    let state = queue.into_state();
    assert_eq!(state.next_avail, 1);
    assert_eq!(driver.get(USED + 2), 1, "what was finished is shown");
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let driver = Driver::new();
    let refused = |change: fn(&mut Config)| {
        let mut config = driver.config(true, None);
        change(&mut config);
        Queue::new(Arc::clone(&driver.memory), config).is_err()
    };
    assert!(refused(|config| config.size = 0));
    assert!(refused(|config| config.size = 3));
    assert!(refused(|config| config.desc = DESC + 8));
    assert!(refused(|config| config.avail = AVAIL + 1));
    assert!(refused(|config| config.used = USED + 2));
    assert!(refused(|config| config.used = 0xfffc));
    assert!(refused(|config| config.desc = 1 << 40));
}

#[test]
fn only_plain_event_descriptors_are_kicks() {
    let plain = eventfd(0, EventfdFlags::empty()).unwrap();
    check_kick(plain.as_fd()).unwrap();
    assert!(rustix::fs::fcntl_getfl(&plain).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    let semaphore = eventfd(5, EventfdFlags::SEMAPHORE).unwrap();
    assert!(matches!(check_kick(semaphore.as_fd()), Err(KickError::Semaphore)));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(matches!(check_kick(pipe.as_fd()), Err(KickError::NoEvent)));
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(check_call(socket.as_fd()), Err(KickError::NoEvent)));
    check_socket(socket.as_fd()).unwrap();
    assert!(matches!(check_socket(plain.as_fd()), Err(KickError::NoEvent)));
    let timer =
        rustix::time::timerfd_create(rustix::time::TimerfdClockId::Monotonic, rustix::time::TimerfdFlags::empty()).unwrap();
    assert!(check_kick(timer.as_fd()).is_err());
}

#[test]
fn a_request_that_ends_every_server_is_condemned_and_the_others_are_not() {
    let mut driver = Driver::new();
    let region = Arc::new(guest(&[(0, inflight::region_size(1, SIZE).next_multiple_of(4096))]));
    let log = || Some(Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap());
    (0..3).for_each(|head| driver.offer(head));
    // The first server takes all three and dies; each successor finishes the first and dies of the second.
    let mut queue = driver.queue(true, log());
    let mut chain = queue.chain();
    let first = queue.pop(&mut chain).unwrap();
    queue.note(&first, 0x1234_5678);
    assert!((first.note(), first.is_replayed()) == (None, false), "nobody was there before");
    let (_second, _third) = (queue.pop(&mut chain), queue.pop(&mut chain));
    for death in 1..inflight::CONDEMNED {
        let mut queue = driver.queue(true, log());
        let mut token = queue.pop(&mut chain).unwrap();
        assert!(token.is_replayed());
        if death == 1 {
            assert_eq!((token.head(), token.note()), (0, Some(0x1234_5678)));
            queue.complete(token, 0);
            queue.publish();
            token = queue.pop(&mut chain).unwrap();
        }
        assert_eq!((token.head(), token.is_condemned()), (1, false), "death {death}");
    }
    let mut queue = driver.queue(true, log());
    let token = queue.pop(&mut chain).unwrap();
    assert!(token.is_condemned());
    queue.complete(token, 0);
    queue.publish();
    let token = queue.pop(&mut chain).unwrap();
    assert_eq!((token.head(), token.is_condemned()), (2, false), "it never got its turn");
    queue.complete(token, 0);
    queue.publish();
    driver.offer(1);
    let token = queue.pop(&mut chain).unwrap();
    assert!(!token.is_replayed(), "a new request with the same head is a new one");
    queue.complete(token, 0);
}

/// Runs what could wait for ever, in a thread of its own.
fn in_time(work: impl FnOnce() + Send + 'static) -> bool {
    let thread = std::thread::spawn(work);
    let start = std::time::Instant::now();
    while !thread.is_finished() && start.elapsed() < std::time::Duration::from_secs(5) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    thread.is_finished()
}

/// Whoever sent a descriptor shares its flags: it can block again after it was looked at.
#[test]
fn descriptors_that_were_made_to_block_again_block_nobody() {
    let mut driver = Driver::new();
    let mut config = driver.config(true, None);
    let (kick, call) = (eventfd(0, EventfdFlags::empty()).unwrap(), eventfd(0, EventfdFlags::empty()).unwrap());
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    (config.kick, config.call) = (Some(kick), Some(call.try_clone().unwrap()));
    let mut queue = Queue::new(Arc::clone(&driver.memory), config).unwrap();
    driver.offer(0);
    let served = in_time(move || {
        let mut chain = queue.chain();
        queue.acknowledge_kick();
        let token = queue.pop(&mut chain).unwrap();
        queue.complete(token, 0);
        queue.publish();
    });
    assert!(served, "an empty kick and a full call are passed over");
    assert_eq!(driver.get(USED + 2), 1);
}
