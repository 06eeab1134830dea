//! The card reader: a file of registers, some of which make the card do something, in USB transfers.
//!
//! The host sends packets: a list of registers to write, to read and to check, or bytes from or to a run of registers. What was read
//! comes back in one piece. Data of the card moves through the reader's buffer, which is a run of registers (up to a block), or in
//! transfers of its own between the packet and its answer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::emmc::{Emmc, Response};

/// A transfer that the host asks for.
#[derive(Debug)]
pub(super) enum Urb {
    /// The eight bytes of a request, and room for an answer.
    Control([u8; 8], usize),
    /// The endpoint, and room for data.
    In(u32, usize),
    /// Data.
    Out(Vec<u8>),
}

/// The kernel's `EPIPE`: not known.
const STALL: i32 = -32;

/// The endpoint with answers and data; the other one never has anything to say.
const BULK_IN: u32 = 2;

/// All register addresses begin with these bits.
const REGISTERS: u16 = 0xc000;

const SD_BUS_STAT: u16 = 0xfda5;
const SD_CFG2: u16 = 0xfda1;
const SD_CMD0: u16 = 0xfda9;
const SD_BYTE_CNT: u16 = 0xfdaf;
const SD_BLOCK_CNT: u16 = 0xfdb1;
const SD_TRANSFER: u16 = 0xfdb3;
const SD_DATA_STATE: u16 = 0xfdb6;
const CARD_EXIST: u16 = 0xfd6f;
const BUFFER: u16 = 0xfa00;

/// The data lines are high: the card is not busy.
const LINES_HIGH: u8 = 0x1e;
const DATA_IDLE: u8 = 0x80;
/// An SD or MMC card is in.
const CARD_IS_IN: u8 = 0x04;

const START: u8 = 0x80;
const ENDED: u8 = 0x60;
const FAILED: u8 = 0x10;

/// What `SD_TRANSFER` may be told to do: a command, a command with data in the buffer, or data only.
const COMMAND: u8 = 0x08;
const COMMAND_READ: u8 = 0x0c;
const COMMAND_WRITE: u8 = 0x0a;
const READ: u8 = 0x05;
const WRITE: u8 = 0x01;

/// What comes after a packet: an answer, and before it data to the card.
const ANSWER: u8 = 0x01;
const DATA_OUT: u8 = 0x04;

const DEVICE: [u8; 18] = [18, 1, 0, 2, 0xff, 0xff, 0xff, 64, 0xda, 0x0b, 0x29, 0x01, 0, 0x01, 0, 0, 0, 1];

/// One configuration with one interface of three endpoints.
const CONFIGURATION: [u8; 39] = [
    9, 2, 39, 0, 1, 1, 0, 0x80, 250, // the configuration
    9, 4, 0, 0, 3, 0xff, 0xff, 0xff, 0, // the interface
    7, 5, 0x01, 2, 0, 2, 0, // bulk, to the reader
    7, 5, 0x82, 2, 0, 2, 0, // bulk, to the host
    7, 5, 0x83, 3, 3, 0, 10, // interrupts, of which there are none
];

/// The reader with its card.
#[derive(Debug)]
pub(super) struct Reader {
    card: Arc<Mutex<Emmc>>,
    registers: Vec<u8>,
    /// What the host has not fetched.
    to_host: VecDeque<u8>,
    /// Bytes that are to come for the card, and the answer to give then.
    to_card: usize,
    afterwards: Vec<u8>,
}

impl Reader {
    pub(super) fn new(card: Arc<Mutex<Emmc>>) -> Reader {
        let registers = vec![0; usize::from(!REGISTERS) + 1];
        Reader { card, registers, to_host: VecDeque::new(), to_card: 0, afterwards: Vec::new() }
    }

    fn card(&self) -> MutexGuard<'_, Emmc> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the host gets, or why not; nothing as long as there is nothing to say.
    pub(super) fn transfer(&mut self, urb: Urb) -> Option<Result<Vec<u8>, i32>> {
        match urb {
            Urb::Control(setup, room) => Some(self.control(setup).map(|mut data| {
                data.truncate(room);
                data
            })),
            Urb::In(BULK_IN, room) => Some(Ok(self.to_host.drain(..room.min(self.to_host.len())).collect())),
            Urb::In(..) => None,
            Urb::Out(bytes) => {
                if self.to_card > 0 {
                    self.data(&bytes);
                } else {
                    self.packet(&bytes);
                }
                Some(Ok(Vec::new()))
            }
        }
    }

    fn control(&mut self, [kind, request, v0, v1, i0, i1, ..]: [u8; 8]) -> Result<Vec<u8>, i32> {
        let register = u16::from_be_bytes([v0, v1]) | REGISTERS;
        match (kind, request, v1) {
            (0x80, 6, 1) => Ok(DEVICE.to_vec()),
            (0x80, 6, 2) => Ok(CONFIGURATION.to_vec()),
            (0x80..=0x82, 0, _) => Ok(vec![0, 0]),
            // A configuration, an interface, an end of halts.
            (0..=2, 1 | 9 | 11, _) => Ok(Vec::new()),
            (0x40, 0, _) => {
                self.write(register, i0, i1);
                Ok(Vec::new())
            }
            (0xc0, 0, _) => Ok(vec![self.read(register)]),
            _ => Err(STALL),
        }
    }

    fn packet(&mut self, bytes: &[u8]) {
        let [b'R', b'T', b'C', b'R', kind, c0, c1, stages, rest @ ..] = bytes else { panic!("a packet: {bytes:x?}") };
        let count = usize::from(u16::from_be_bytes([*c0, *c1]));
        match (kind, rest) {
            (0, commands) => self.batch(commands, *stages),
            (1, [a0, a1, ..]) => {
                let first = u16::from_be_bytes([*a0, *a1]);
                let run: Vec<u8> = (first..).take(count).map(|register| self.read(register)).collect();
                self.to_host.extend(run);
            }
            (2, [a0, a1, _, _, data @ ..]) => {
                for (register, byte) in (u16::from_be_bytes([*a0, *a1])..).zip(data.iter().take(count)) {
                    self.write(register, 0xff, *byte);
                }
            }
            other => panic!("a packet of kind {other:?}"),
        }
    }

    /// Registers to read, to write, and to wait for.
    fn batch(&mut self, commands: &[u8], stages: u8) {
        let mut answer = Vec::new();
        for command in commands.chunks_exact(4) {
            let [high, low, mask, data] = *command else { continue };
            let register = u16::from_be_bytes([high, low]) | REGISTERS;
            if high >> 6 == 1 { self.write(register, mask, data) } else { answer.push(self.read(register)) }
        }
        if stages & ANSWER == 0 {
            return;
        }
        answer.resize(answer.len().next_multiple_of(4), 0);
        if stages & DATA_OUT == 0 { self.to_host.extend(answer) } else { self.afterwards = answer }
    }

    fn data(&mut self, bytes: &[u8]) {
        self.card().write(bytes);
        self.to_card = self.to_card.saturating_sub(bytes.len());
        if self.to_card == 0 {
            self.to_host.extend(std::mem::take(&mut self.afterwards));
        }
    }

    fn place(register: u16) -> usize {
        usize::from(register & !REGISTERS)
    }

    fn read(&self, register: u16) -> u8 {
        match register {
            SD_BUS_STAT => LINES_HIGH,
            SD_DATA_STATE => DATA_IDLE,
            CARD_EXIST => CARD_IS_IN,
            _ => self.registers[Reader::place(register)],
        }
    }

    fn write(&mut self, register: u16, mask: u8, data: u8) {
        let place = &mut self.registers[Reader::place(register)];
        *place = *place & !mask | data & mask;
        if register == SD_TRANSFER && data & START != 0 {
            let ok = self.start(data & 0x0f);
            self.registers[Reader::place(SD_TRANSFER)] = if ok { ENDED } else { ENDED | FAILED };
        }
    }

    fn pair(&self, low: u16) -> usize {
        usize::from(u16::from_le_bytes([self.read(low), self.read(low + 1)]))
    }

    /// Does what the registers say; whether the card has answered.
    fn start(&mut self, mode: u8) -> bool {
        let bytes = self.pair(SD_BYTE_CNT);
        let all = bytes * self.pair(SD_BLOCK_CNT);
        match mode {
            COMMAND => self.command(false),
            COMMAND_READ => {
                let ok = self.command(true);
                let data = self.card().read(bytes);
                self.put(BUFFER, &data);
                ok
            }
            COMMAND_WRITE => {
                let ok = self.command(true);
                let data: Vec<u8> = (BUFFER..).take(bytes).map(|register| self.read(register)).collect();
                self.card().write(&data);
                ok
            }
            READ => {
                let data = self.card().read(all);
                self.to_host.extend(data);
                true
            }
            WRITE => {
                self.to_card = all;
                true
            }
            other => panic!("the reader is told to do {other:x}"),
        }
    }

    fn put(&mut self, first: u16, bytes: &[u8]) {
        let first = Reader::place(first);
        self.registers[first..first + bytes.len()].copy_from_slice(bytes);
    }

    fn command(&mut self, with_data: bool) -> bool {
        let [index, a, b, c, d] = [0, 1, 2, 3, 4].map(|at| self.read(SD_CMD0 + at));
        let index = index & 0x3f;
        let answer = self.card().command(index, u32::from_be_bytes([a, b, c, d]), with_data);
        match answer {
            Some(Response::Short(word)) => {
                let [a, b, c, d] = word.to_be_bytes();
                self.put(SD_CMD0, &[index, a, b, c, d]);
                true
            }
            Some(Response::Long(register)) => {
                self.put(BUFFER, &[0x3f]);
                self.put(BUFFER + 1, &register);
                true
            }
            // Was an answer waited for?
            None => self.read(SD_CFG2) & 0x03 == 0,
        }
    }
}
