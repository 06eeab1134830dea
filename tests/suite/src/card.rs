//! An eMMC card as a program, behind the kernel's own drivers: the one kind of medium that erases securely and tells how worn it is,
//! where neither this host nor QEMU has one.
//!
//! ```text
//!   /dev/mmcblk0 ── mmc_block, mmc_core ── rtsx_usb_sdmmc, rtsx_usb ── vhci_hcd ── a socket ── Reader ── Emmc
//!   └───────────────────────────── the kernel's, unchanged ───────────────────────┘  └──── these files ────┘
//! ```
//!
//! What is a program here is the chip ([`emmc`]: JESD84-B50, its registers and commands) and the USB card reader it is in (`reader`:
//! Realtek's RTS5129, which the kernel drives without firmware). They reach the kernel as any USB device does that is plugged in
//! somewhere else (USB/IP). All that a disk server meets is the kernel's: the block device, its limits, the request to erase, and what
//! sysfs says. QEMU has a card, too, but only on boards that have it soldered on, and it neither erases securely nor wears.
//!
//! It takes root and modules, so it is for the [nested machine](../../../xtask/src/nested.rs) only.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::{run, wait_for};

pub mod emmc;
mod reader;

use emmc::{Emmc, Erasure};
use reader::{Reader, Urb};

/// Bytes of a message's header (the kernel's Documentation/usb/usbip_protocol.rst).
const HEADER: usize = 48;

const SUBMIT: u32 = 1;
const UNLINK: u32 = 2;
const SUBMITTED: u32 = 3;
const UNLINKED: u32 = 4;

/// `ECONNRESET`: it is taken back before there was an answer.
const TAKEN_BACK: i32 = -104;

/// A high-speed device.
const SPEED: u32 = 3;

/// A card in its reader, plugged in until the process ends.
#[derive(Debug)]
pub struct Card {
    memory: Arc<Mutex<Emmc>>,
    /// Where the kernel shows it.
    pub disk: PathBuf,
}

impl Card {
    /// Loads the kernel's drivers from a folder, in the order that a file there gives, plugs a reader with a card in at a port, and waits
    /// for the disk, whose number is the port's if they are plugged in in turn.
    pub fn insert(modules: &Path, port: u32, card: Emmc) -> Card {
        let order = fs::read_to_string(modules.join("order")).expect("the modules' order can be read");
        for module in order.lines() {
            let ended = run(Command::new("busybox").arg("insmod").arg(modules.join(format!("{module}.ko"))));
            assert!(ended.code == Some(0) || ended.err.contains("File exists"), "{module}: {}", ended.err);
        }
        let (ours, kernels) = UnixStream::pair().expect("there are sockets");
        let card = Arc::new(Mutex::new(card));
        let reader = Reader::new(Arc::clone(&card));
        thread::spawn(move || serve(reader, ours));
        let line = format!("{port} {} {} {SPEED}", kernels.as_raw_fd(), port + 1);
        fs::write("/sys/devices/platform/vhci_hcd.0/attach", line).expect("the reader can be plugged in");
        let disk = PathBuf::from(format!("/dev/mmcblk{port}"));
        wait_for("the card's disk", || disk.exists().then_some(()));
        Card { memory: card, disk }
    }

    /// What was erased until now, in its order.
    pub fn erasures(&self) -> Vec<Erasure> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).erasures.clone()
    }
}

fn word(header: &[u8; HEADER], at: usize) -> u32 {
    header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// Answers the kernel until it hangs up.
fn serve(mut reader: Reader, mut socket: UnixStream) {
    let mut header = [0; HEADER];
    while socket.read_exact(&mut header).is_ok() {
        let sequence = word(&header, 4);
        let answer = match word(&header, 0) {
            SUBMIT => submit(&mut reader, &mut socket, &header).map(|(status, data, length)| {
                let length = length.to_be_bytes();
                (SUBMITTED, status, length, data)
            }),
            UNLINK => Some((UNLINKED, TAKEN_BACK, [0; 4], Vec::new())),
            other => panic!("the kernel sends a message of kind {other}"),
        };
        let Some((kind, status, length, data)) = answer else { continue };
        let mut message = Vec::with_capacity(HEADER + data.len());
        message.extend(kind.to_be_bytes());
        message.extend(sequence.to_be_bytes());
        message.extend([0; 12]);
        message.extend(status.to_be_bytes());
        message.extend(length);
        message.resize(HEADER, 0);
        message.extend(data);
        if socket.write_all(&message).is_err() {
            return;
        }
    }
}

/// One transfer: its status, what the kernel gets, and how many bytes were moved. `None`: there is nothing to say yet.
fn submit(reader: &mut Reader, socket: &mut UnixStream, header: &[u8; HEADER]) -> Option<(i32, Vec<u8>, u32)> {
    let (to_host, endpoint, length) = (word(header, 12) == 1, word(header, 16), word(header, 24));
    let room = usize::try_from(length).unwrap_or(0);
    let mut sent = vec![0; if to_host { 0 } else { room }];
    socket.read_exact(&mut sent).ok()?;
    let setup = header.get(40..HEADER)?.try_into().ok()?;
    let urb = if endpoint == 0 {
        Urb::Control(setup, room)
    } else if to_host {
        Urb::In(endpoint, room)
    } else {
        Urb::Out(sent)
    };
    match reader.transfer(urb)? {
        Ok(data) => {
            let moved = if to_host { u32::try_from(data.len()).unwrap_or(0) } else { length };
            Some((0, data, moved))
        }
        Err(status) => Some((status, Vec::new(), 0)),
    }
}
