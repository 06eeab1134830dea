//! COM1: a 16550 whose output never makes a processor wait.
//!
//! A processor that writes a byte puts it into a bounded buffer and goes on; the control thread moves the buffer to the
//! terminal, file or pipe when that can take it. If it cannot for long (a stopped terminal, a full pipe) the buffer fills
//! and what comes then is dropped and counted: a stuck reader costs the guest its messages, never its time.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use crate::bus::Port;
use crate::kvm::Event;

/// Where COM1 has been since 1981.
pub const PORT: u16 = 0x3f8;
/// And its interrupt.
pub const IRQ: u32 = 4;

/// What may wait for a slow reader: a kernel's whole boot log fits.
const BUFFER: usize = 256 << 10;
/// At the end a reader gets this long for what is left.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// No more than a pipe takes at once after saying that it is writable.
const CHUNK: usize = 4096;

#[derive(Debug)]
struct Buffer {
    bytes: Mutex<VecDeque<u8>>,
    /// Readable while there is something in it.
    filled: Event,
    dropped: AtomicU64,
}

/// The processors' end of the buffer.
#[derive(Debug)]
struct Sender(Arc<Buffer>);

impl io::Write for Sender {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = bytes.is_empty();
        let room = BUFFER.saturating_sub(bytes.len()).min(data.len());
        bytes.extend(data.iter().take(room));
        let lost = data.len().saturating_sub(room);
        self.0.dropped.fetch_add(lost as u64, Ordering::Relaxed);
        if was_empty && room > 0 {
            self.0.filled.signal();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt line, as an irqfd.
#[derive(Debug)]
struct Irq(Event);

impl Trigger for Irq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.signal();
        Ok(())
    }
}

/// The registers.
pub struct Com1 {
    uart: Mutex<Serial<Irq, NoEvents, Sender>>,
    buffer: Arc<Buffer>,
}

impl Com1 {
    /// `interrupt` is attached to line [`IRQ`].
    pub fn new(interrupt: Event) -> io::Result<Self> {
        let filled = Event::new()?;
        let buffer = Arc::new(Buffer { bytes: Mutex::default(), filled, dropped: AtomicU64::new(0) });
        let uart = Mutex::new(Serial::new(Irq(interrupt), Sender(Arc::clone(&buffer))));
        Ok(Self { uart, buffer })
    }

    /// Bytes somebody typed. What the UART has no room for is lost, as on a real one.
    pub fn type_in(&self, mut bytes: &[u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        while !bytes.is_empty() && uart.fifo_capacity() > 0 {
            let Ok(taken) = uart.enqueue_raw_bytes(bytes) else { return };
            bytes = bytes.get(taken..).unwrap_or_default();
        }
    }

    /// Room for typed bytes.
    pub fn room(&self) -> usize {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner).fifo_capacity()
    }

    /// The machine is reset: no interrupts until a driver asks for them again.
    pub fn reset(&self) {
        const INTERRUPT_ENABLE: u8 = 1;
        const LINE_CONTROL: u8 = 3;
        const EIGHT_BITS: u8 = 3;
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = uart.write(LINE_CONTROL, EIGHT_BITS);
        let _ = uart.write(INTERRUPT_ENABLE, 0);
    }

    /// How many bytes of output found no room.
    pub fn dropped(&self) -> u64 {
        self.buffer.dropped.load(Ordering::Relaxed)
    }
}

impl Port for Com1 {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.uart.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // An interrupt that cannot be raised is one that is pending already.
            let _ = self.uart.lock().unwrap_or_else(PoisonError::into_inner).write(offset, *byte);
        }
    }
}

/// The control thread's end: where output goes and input comes from.
#[derive(Debug)]
pub struct Terminal {
    output: OwnedFd,
    input: Option<OwnedFd>,
    buffer: Arc<Buffer>,
    /// Set while the reader is not ready: then its descriptor is polled, not the buffer.
    waiting: bool,
    reported: u64,
}

impl Terminal {
    /// `output` should have gone through [`own_description`].
    pub fn new(com1: &Com1, output: OwnedFd, input: Option<OwnedFd>) -> Self {
        let buffer = Arc::clone(&com1.buffer);
        Self { output, input, buffer, waiting: false, reported: 0 }
    }

    /// What to poll, and for what.
    pub fn output(&self) -> (BorrowedFd<'_>, PollFlags) {
        if self.waiting { (self.output.as_fd(), PollFlags::OUT) } else { (self.filled(), PollFlags::IN) }
    }

    /// The descriptor to read typed bytes from.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    fn filled(&self) -> BorrowedFd<'_> {
        self.buffer.filled.as_fd()
    }

    /// Moves typed bytes into the UART.
    pub fn receive(&mut self, com1: &Com1) {
        let mut bytes = [0u8; 64];
        let part = bytes.get_mut(..com1.room().min(64)).unwrap_or_default();
        let Some(input) = &self.input else { return };
        match rustix::io::read(input, &mut *part) {
            Ok(0) => self.input = None,
            Ok(n) => com1.type_in(part.get(..n).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.input = None,
        }
    }

    /// Moves what the reader takes without waiting.
    pub fn send(&mut self) {
        self.buffer.filled.take();
        loop {
            let chunk: Vec<u8> = {
                let bytes = self.buffer.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                bytes.iter().take(CHUNK).copied().collect()
            };
            self.waiting = !chunk.is_empty();
            if chunk.is_empty() || !self.is_ready(Duration::ZERO) {
                break;
            }
            match rustix::io::write(&self.output, &chunk) {
                Ok(n) => {
                    self.buffer.bytes.lock().unwrap_or_else(PoisonError::into_inner).drain(..n.min(chunk.len()));
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                // Nobody is left to read: drop it, or the same error would keep us busy for ever.
                Err(_) => self.buffer.bytes.lock().unwrap_or_else(PoisonError::into_inner).clear(),
            }
        }
        self.report();
    }

    fn is_ready(&self, wait: Duration) -> bool {
        let mut fds = [PollFd::new(&self.output, PollFlags::OUT)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        poll(&mut fds, Some(&timeout)).is_ok_and(|n| n > 0)
    }

    fn report(&mut self) {
        // Once per power of two: a guest that floods cannot flood the log.
        let dropped = self.buffer.dropped.load(Ordering::Relaxed);
        if dropped >= self.reported.saturating_mul(2).max(1) {
            self.reported = dropped;
            tracing::warn!("COM1 has dropped {dropped} bytes, because nobody reads them");
        }
    }

    /// The process is about to end: gives the reader a moment for what is left.
    pub fn flush(&mut self) {
        let end = Instant::now() + LAST_WORDS;
        loop {
            self.send();
            let left = end.saturating_duration_since(Instant::now());
            if !self.waiting || left.is_zero() || !self.is_ready(left) {
                return;
            }
        }
    }
}

/// A descriptor for output that does not block, if that is possible without changing anybody else's.
///
/// O_NONBLOCK belongs to the open file, which a shell shares with us. Terminals and pipes can be opened again by
/// their number, which gives an open file of our own; a regular file never blocks, and opening it again would start
/// writing at its beginning. Needs /proc, so it comes before the process is confined.
pub fn own_description(fd: OwnedFd) -> OwnedFd {
    let kind = rustix::fs::fstat(&fd).map(|s| FileType::from_raw_mode(s.st_mode));
    if !matches!(kind, Ok(FileType::CharacterDevice | FileType::Fifo)) {
        return fd;
    }
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    OpenOptions::new().write(true).custom_flags(flags).open(path).map_or(fd, OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn com1() -> Com1 {
        Com1::new(Event::new().unwrap()).unwrap()
    }

    #[test]
    fn a_stuck_reader_costs_bytes_and_no_time() {
        let com1 = com1();
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let mut terminal = Terminal::new(&com1, own_description(writer), None);
        for _ in 0..BUFFER + (128 << 10) {
            com1.write(0, b"x");
        }
        terminal.send();
        for _ in 0..BUFFER {
            com1.write(0, b"y");
        }
        terminal.send();
        assert!(com1.dropped() > 0);
        assert!(terminal.waiting);
    }

    #[test]
    fn what_is_written_arrives() {
        let com1 = com1();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut terminal = Terminal::new(&com1, own_description(writer), None);
        for byte in b"hello" {
            com1.write(0, &[*byte]);
        }
        terminal.send();
        let mut got = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut got).unwrap(), 5);
        assert_eq!(&got[..5], b"hello");
    }

    #[test]
    fn any_access_is_harmless() {
        let com1 = com1();
        for offset in [0, 1, 2, 3, 4, 5, 6, 7, 8, 255, 256, u16::MAX] {
            for len in 0..9 {
                com1.write(offset, &vec![0xff; len]);
                com1.read(offset, &mut vec![0; len]);
            }
        }
    }
}
