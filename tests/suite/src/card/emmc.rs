//! The chip: an eMMC of version 5.0, as far as the kernel's driver uses it (JESD84-B50).

/// Bytes of the card. Not more than 2 GiB, so addresses are in bytes.
pub const BYTES: usize = 32 << 20;

/// Bytes of an erase group: what is erased together.
pub const GROUP: usize = 512 << 10;

/// How worn it is: reserved blocks, and its two kinds of memory, in the numbers of the standard.
pub const WEAR: [u8; 3] = [2, 3, 7];

const SECTOR: usize = 512;

/// The operation conditions: powered up, at all voltages.
const OCR: u32 = 0x80ff_8080;

/// Ready for data.
const READY: u32 = 1 << 8;
const STATE: u32 = 9;
const OUT_OF_RANGE: u32 = 1 << 31;

const STANDBY: u32 = 3;
const TRANSFER: u32 = 4;

/// Arguments of the command to erase.
const ERASE: u32 = 0;
const TRIM: u32 = 1;
const DISCARD: u32 = 3;
const SECURE_ERASE: u32 = 0x8000_0000;
const SECURE_TRIM_MARK: u32 = 0x8000_0001;
const SECURE_TRIM: u32 = 0x8000_8000;

/// A range that was erased, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Erasure {
    /// Its first byte.
    pub start: usize,
    /// The byte after it.
    pub end: usize,
    /// The content cannot be found by whoever looks into the chip.
    pub secure: bool,
}

/// How the card answers.
#[derive(Clone, Copy, Debug)]
pub enum Response {
    /// Its status, or its conditions.
    Short(u32),
    /// One of its registers.
    Long([u8; 16]),
}

/// Where data of a command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Data {
    Memory,
    ExtCsd,
    BusTest,
}

/// The card.
#[derive(Debug)]
pub struct Emmc {
    memory: Vec<u8>,
    ext_csd: [u8; 512],
    /// What of it has been erased.
    pub erasures: Vec<Erasure>,
    state: u32,
    rca: u32,
    error: u32,
    data: Data,
    at: usize,
    group: [usize; 2],
    pattern: Vec<u8>,
}

impl Default for Emmc {
    fn default() -> Emmc {
        Emmc::new()
    }
}

impl Emmc {
    /// One of version 4.41, which neither erases securely nor tells how worn it is.
    pub fn old() -> Emmc {
        let mut card = Emmc::new();
        card.ext_csd[192] = 5;
        card.ext_csd[231] = 0;
        card.ext_csd[267..270].fill(0);
        card
    }

    /// One that erases in whole groups only: it has no trim.
    pub fn coarse() -> Emmc {
        let mut card = Emmc::new();
        card.ext_csd[231] &= !0x10;
        card
    }

    /// A new one, on which nobody has erased anything.
    pub fn new() -> Emmc {
        Emmc {
            memory: vec![0; BYTES],
            ext_csd: ext_csd(),
            erasures: Vec::new(),
            state: 0,
            rca: 0,
            error: 0,
            data: Data::Memory,
            at: 0,
            group: [0; 2],
            pattern: Vec::new(),
        }
    }

    fn status(&mut self) -> Option<Response> {
        Some(Response::Short(self.state << STATE | READY | std::mem::take(&mut self.error)))
    }

    /// Does a command. Without an answer it is one that this card does not know, or that has none.
    pub fn command(&mut self, index: u8, argument: u32, with_data: bool) -> Option<Response> {
        match index {
            0 => {
                (self.state, self.rca) = (0, 0);
                return None;
            }
            1 => return Some(Response::Short(OCR)),
            2 | 10 => return Some(Response::Long(CID)),
            3 => (self.rca, self.state) = (argument >> 16, STANDBY),
            6 => self.switch(argument),
            7 if argument >> 16 != self.rca => {
                self.state = STANDBY;
                return None;
            }
            7 => self.state = TRANSFER,
            // An SD card would answer where there is no data: it is asked for its voltages.
            8 if with_data => (self.data, self.at) = (Data::ExtCsd, 0),
            9 => return Some(Response::Long(csd())),
            12 | 13 | 16 => {}
            14 | 19 => (self.data, self.at) = (Data::BusTest, 0),
            17 | 18 | 24 | 25 => (self.data, self.at) = (Data::Memory, self.place(argument)),
            35 => self.group[0] = self.place(argument),
            36 => self.group[1] = self.place(argument),
            38 => self.erase(argument),
            _ => return None,
        }
        self.status()
    }

    fn place(&mut self, argument: u32) -> usize {
        let at = usize::try_from(argument).unwrap_or(usize::MAX);
        self.error |= if at < BYTES { 0 } else { OUT_OF_RANGE };
        at
    }

    /// Changes a byte of the extended register, or bits of it.
    fn switch(&mut self, argument: u32) {
        let [_, value, index, access] = argument.to_le_bytes();
        let byte = &mut self.ext_csd[usize::from(index)];
        match access & 3 {
            1 => *byte |= value,
            2 => *byte &= !value,
            3 => *byte = value,
            _ => {}
        }
    }

    /// Groups are erased as wholes; a trim keeps to sectors.
    fn erase(&mut self, how: u32) {
        let [first, last] = self.group;
        let (start, end) = match how {
            ERASE | SECURE_ERASE => (first / GROUP * GROUP, (last / GROUP + 1) * GROUP),
            TRIM | DISCARD | SECURE_TRIM => (first, last + SECTOR),
            // Only said for now; the next step does it.
            SECURE_TRIM_MARK => return,
            other => panic!("the card is to erase in the way {other:x}"),
        };
        self.memory[start..end].fill(0);
        self.erasures.push(Erasure { start, end, secure: how & SECURE_ERASE != 0 });
    }

    /// Data of the last command, for the host.
    pub fn read(&mut self, bytes: usize) -> Vec<u8> {
        let from = match self.data {
            Data::Memory => &self.memory[..],
            Data::ExtCsd => &self.ext_csd,
            // What the host has sent, the other way round: so it learns which lines there are.
            Data::BusTest => return self.pattern.iter().map(|byte| !byte).chain([0; 8]).take(bytes).collect(),
        };
        let data = from[self.at..self.at + bytes].to_vec();
        self.at += bytes;
        data
    }

    /// Data of the last command, from the host.
    pub fn write(&mut self, bytes: &[u8]) {
        match self.data {
            Data::Memory => self.memory[self.at..self.at + bytes.len()].copy_from_slice(bytes),
            Data::ExtCsd => {}
            Data::BusTest => self.pattern = bytes.to_vec(),
        }
        self.at += bytes.len();
    }
}

/// Who has made it, what it is called, and when it was made.
const CID: [u8; 16] = [0x15, 1, 0, b'O', b'U', b'T', b'B', b'R', b'D', 1, 0, 0, 0, 1, 0x51, 1];

/// Puts a number into so many bits of a register, which are counted from its end.
fn put(register: &mut [u8; 16], low: usize, bits: usize, value: u32) {
    for bit in 0..bits {
        let (byte, place) = (15 - (low + bit) / 8, (low + bit) % 8);
        register[byte] |= u8::from(value >> bit & 1 == 1) << place;
    }
}

/// The card-specific data.
fn csd() -> [u8; 16] {
    let mut csd = [0; 16];
    let size = u32::try_from(BYTES >> 18).unwrap_or(0);
    for (low, bits, value) in [
        (126, 2, 3),        // the extended register tells the version
        (122, 4, 4),        // version 4
        (112, 8, 0x27),     // access time
        (96, 8, 0x32),      // speed
        (84, 12, 0x0f5),    // classes of commands, to erase among them
        (80, 4, 9),         // blocks of 512 bytes are read
        (62, 12, size - 1), // units of 256 KiB
        (47, 3, 7),
        (42, 5, 31), // erase groups of 32 * 32 sectors
        (37, 5, 31),
        (22, 4, 9), // blocks of 512 bytes are written
        (0, 1, 1),
    ] {
        put(&mut csd, low, bits, value);
    }
    csd
}

/// The extended card-specific data.
fn ext_csd() -> [u8; 512] {
    let mut register = [0; 512];
    let sectors = u32::try_from(BYTES / SECTOR).unwrap_or(0).to_le_bytes();
    register[212..216].copy_from_slice(&sectors);
    for (index, value) in [
        (192, 7), // version 5.0
        (194, 2), // version of the register
        (196, 3), // high speed
        (221, 1), // write-protect groups of one erase group
        (222, 1), // reliable writes of one sector
        (223, 1), // times to erase, in 300 ms
        (224, 1), // erase groups of 512 KiB
        (229, 1), // times for secure trims and erases
        (230, 1),
        (231, 0x15), // secure erase, of bad blocks too, and trim
        (232, 1),    // time to trim
        (248, 10),   // time of a switch, in 10 ms
        (504, 1),    // commands of the standard
    ] {
        register[index] = value;
    }
    register[267..270].copy_from_slice(&WEAR);
    register
}
