//! One device of a machine without KVM: its control thread's part ([`Remote`]), driven by hand against a backend in a thread.

#![allow(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, reason = "what fails to be set up is a failed test")]

#[path = "agreeable.rs"]
mod agreeable;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agreeable::Agreeable;
use evil::Act;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::args::{DeviceSpec, Reach};
use vmm::classes;
use vmm::events::Doorbell;
use vmm::memory::Memory;
use vmm::pci::{Allocator, Function};
use vmm::virtio::remote::{Change, Remote, Site};

/// Where the rings are in guest memory.
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x10_1000;
const USED: u64 = 0x10_2000;
const BUFFER: u64 = 0x10_3000;

/// A backend in a thread of its own, and the other end of its connection.
pub(crate) fn backend(act: Act, turn: u64) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || evil::serve(theirs, act, turn, Duration::from_secs(60)));
    ours
}

pub(crate) struct Machine {
    memory: &'static Memory,
    pub(crate) remote: Remote,
}

/// A machine with one device, connected to this.
pub(crate) fn machine(class: &str, stream: UnixStream) -> Result<Machine, String> {
    let class = classes::named(class).unwrap();
    let memory: &'static Memory = Box::leak(Box::new(Memory::new(4 << 20).unwrap()));
    let (mut addresses, mut next_route) = (Allocator::default(), 24);
    let mut site = Site {
        memory,
        hypervisor: Arc::new(Agreeable),
        doorbell: Arc::new(Doorbell::new().unwrap()),
        addresses: &mut addresses,
        next_route: &mut next_route,
    };
    let (name, reach) = ("evil".to_owned(), Reach::Fd(-1));
    let spec = DeviceSpec { name, id: class.id, class, reach, queues: Some(1), queue_size: Some(16) };
    let remote = Remote::connect(&spec, stream, &mut site).map_err(|error| error.to_string())?;
    Ok(Machine { memory, remote })
}

impl Machine {
    pub(crate) fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.remote.function().memory_write(at, &bytes);
    }

    pub(crate) fn status(&self) -> u8 {
        let mut byte = [0];
        self.remote.function().memory_read(0x14, &mut byte);
        byte[0]
    }

    /// What a driver does up to DRIVER_OK, with a fresh ring and one buffer in it.
    pub(crate) fn bring_up(&self) {
        self.memory.write(DESC, &[0; 0x3000]).unwrap();
        self.memory.write(DESC, &BUFFER.to_le_bytes()).unwrap();
        self.memory.write(DESC + 8, &[64, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        self.memory.write(AVAIL + 2, &1u16.to_le_bytes()).unwrap();
        for status in [1, 3] {
            self.put(0x14, [status]);
        }
        self.put(0x08, 1u32.to_le_bytes());
        self.put(0x0c, 1u32.to_le_bytes());
        self.put(0x14, [11]);
        self.put(0x16, 0u16.to_le_bytes());
        self.put(0x18, 16u16.to_le_bytes());
        for (at, addr) in [(0x20, DESC), (0x28, AVAIL), (0x30, USED)] {
            self.put(at, u32::try_from(addr).unwrap().to_le_bytes());
        }
        self.put(0x1c, 1u16.to_le_bytes());
        self.put(0x14, [15]);
    }

    /// What the control thread does, for a while. Gives what it would have told people.
    pub(crate) fn run(&mut self, time: Duration) -> Vec<Change> {
        let (start, mut told) = (Instant::now(), Vec::new());
        while start.elapsed() < time {
            told.extend(self.remote.serve());
            let remote = &self.remote;
            let mut fds = Vec::new();
            let mut watch = |fd: Option<BorrowedFd<'_>>, flags| {
                let all = fd.map(|fd| fd.try_clone_to_owned().unwrap());
                fds.push((all, flags));
            };
            watch(remote.connection(), PollFlags::RDHUP);
            watch(remote.requests(), PollFlags::IN);
            watch(remote.ring_errors(), PollFlags::IN);
            let ready: Vec<bool> =
                fds.iter().map(|(fd, flags)| fd.as_ref().is_some_and(|fd| is_ready(fd.as_fd(), *flags))).collect();
            match ready.as_slice() {
                [_, true, _] => told.extend(self.remote.listen()),
                [_, _, true] => told.extend(self.remote.ring_error()),
                [true, ..] => told.extend(self.remote.hang_up()),
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
        told
    }

    /// Whether the one buffer came back.
    pub(crate) fn is_served(&self) -> bool {
        let mut index = [0; 2];
        self.memory.read(USED + 2, &mut index).unwrap();
        u16::from_le_bytes(index) == 1
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&now)).is_ok_and(|ready| ready > 0)
}
