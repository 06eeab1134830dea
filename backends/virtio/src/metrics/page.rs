//! The page in which a process shows its counters: a sealed file of fixed size, with descriptions in front and numbers behind.
//!
//! ```text
//! 0     what it is (MAGIC), number of families
//! 64    descriptions, 192 bytes each: name, help, kind, label, number of values
//! 8192  values, 8 bytes each, in the order of the families
//! ```
//!
//! Whoever reads it believes nothing: the process that writes it may be a guest's by now. [`read`] takes a copy and looks at it
//! once: names are of the one alphabet that metrics have, help is printable, numbers of values are what the page has room
//! for, and what does not fit is left out.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use vm_memory::{MmapRegion, VolatileMemory};

use super::Family;
use crate::memory::sealed_memfd;
use crate::words::map_for_ever;

/// Room for 42 families and 1024 values. A device with 64 queues has 256 values for its rings and a handful of its own.
pub const SIZE: usize = 16 * 1024;

const MAGIC: u64 = u64::from_le_bytes(*b"outbmet1");
const FIRST: usize = 64;
const STEP: usize = 192;
const NAME: usize = 48;
const HELP: usize = 128;
const VALUES: usize = 8192;
const MOST_VALUES: usize = 1024;
const MOST_FAMILIES: usize = 42;

/// Whether a number only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It does, until the process ends.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How often something took how long: see [`super::Histogram`].
    Histogram,
}

/// What the values of one name differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// There is one.
    None,
    /// The queue, from 0.
    Queue,
    /// The device, from 0, in the order of the machine.
    Device,
}

/// The page cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused.
    #[error("Cannot map the page of counters")]
    Map(#[source] io::Error),
    /// A mistake in the program.
    #[error("The page of counters has no room for {0}")]
    Full(&'static str),
}

/// A new page, empty.
///
/// # Errors
/// The system's.
pub fn make() -> io::Result<OwnedFd> {
    sealed_memfd("counters", u64::try_from(SIZE).unwrap_or_default())
}

/// The writing end: mapped for as long as the process lives.
pub(super) struct Writer {
    page: &'static MmapRegion,
    families: std::cell::Cell<usize>,
    values: std::cell::Cell<usize>,
}

impl Writer {
    pub(super) fn map(page: OwnedFd) -> Result<Writer, Error> {
        let page = map_for_ever(page, SIZE).map_err(Error::Map)?;
        Ok(Writer { page, families: 0.into(), values: 0.into() })
    }

    /// Adds a family and gives the places of its values.
    pub(super) fn describe(&self, family: &Family) -> Result<impl Iterator<Item = &'static AtomicU64> + use<>, Error> {
        let full = || Error::Full(family.name);
        let (index, first, count) = (self.families.get(), self.values.get(), family.values.len());
        let end = first.saturating_add(count);
        if index >= MOST_FAMILIES || end > MOST_VALUES || family.name.len() > NAME || family.help.len() > HELP {
            return Err(full());
        }
        let mut text = [0; STEP];
        let parts = [(0, family.name.as_bytes()), (NAME, family.help.as_bytes()), (NAME + HELP, &tail(family))];
        for (at, bytes) in parts {
            for (place, byte) in text.iter_mut().skip(at).zip(bytes) {
                *place = *byte;
            }
        }
        let at = FIRST.saturating_add(index.saturating_mul(STEP));
        self.page.get_slice(at, STEP).map_err(|_| full())?.copy_from(&text);
        let places = (first..end).map(|value| self.place(VALUES.saturating_add(value.saturating_mul(8))));
        let places = places.collect::<Option<Vec<_>>>().ok_or_else(full)?;
        self.families.set(index.saturating_add(1));
        self.values.set(end);
        // The number last: whoever reads meanwhile sees only what is whole.
        let number = u64::try_from(self.families.get()).unwrap_or_default();
        for (at, value) in [(8, number), (0, MAGIC)] {
            self.place(at).ok_or_else(full)?.store(value, std::sync::atomic::Ordering::Release);
        }
        Ok(places.into_iter())
    }

    fn place(&self, at: usize) -> Option<&'static AtomicU64> {
        self.page.get_atomic_ref(at).ok()
    }
}

fn tail(family: &Family) -> [u8; 4] {
    let kind = match family.kind {
        Kind::Counter => 0,
        Kind::Gauge => 1,
        Kind::Histogram => 2,
    };
    let label = match family.label {
        Label::None => 0,
        Label::Queue => 1,
        Label::Device => 2,
    };
    let [low, high] = u16::try_from(family.values.len()).unwrap_or_default().to_le_bytes();
    [kind, label, low, high]
}

/// What a process says of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Letters, digits and `_`.
    pub name: String,
    /// Printable, without quotes and backslashes.
    pub help: String,
    /// Whether it only grows.
    pub kind: Kind,
    /// What the values differ in.
    pub label: Label,
    /// The values.
    pub values: Vec<u64>,
}

/// What the page says, as far as it makes sense. Never waits.
pub fn read(page: BorrowedFd<'_>) -> Vec<Shown> {
    let mut bytes = vec![0; SIZE];
    match rustix::io::pread(page, &mut bytes, 0) {
        Ok(SIZE) => parse(&bytes),
        _ => Vec::new(),
    }
}

/// What these bytes say, as far as they make sense.
pub fn parse(bytes: &[u8]) -> Vec<Shown> {
    let number = |at: usize| {
        let word = bytes.get(at..)?.first_chunk().copied()?;
        Some(u64::from_le_bytes(word))
    };
    if number(0) != Some(MAGIC) {
        return Vec::new();
    }
    let families = number(8).and_then(|count| usize::try_from(count).ok()).unwrap_or(0).min(MOST_FAMILIES);
    let described = bytes.get(FIRST..VALUES).unwrap_or_default().chunks_exact(STEP).take(families);
    let mut values = bytes.get(VALUES..).unwrap_or_default().chunks_exact(8).filter_map(|word| word.first_chunk().copied());
    let mut shown: Vec<Shown> = Vec::new();
    for text in described {
        let count = text.get(NAME + HELP + 2..).and_then(|tail| tail.first_chunk().copied()).map_or(0, u16::from_le_bytes);
        let values = values.by_ref().take(usize::from(count)).map(u64::from_le_bytes).collect();
        shown.extend(family(text, values).filter(|new| shown.iter().all(|old| old.name != new.name)));
    }
    shown
}

fn family(text: &[u8], values: Vec<u64>) -> Option<Shown> {
    let name = string(text.get(..NAME)?)?;
    let help = string(text.get(NAME..NAME + HELP)?)?;
    let starts = name.bytes().next()?.is_ascii_lowercase();
    let is_name = starts && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    let is_help = help.bytes().all(|byte| (byte.is_ascii_graphic() || byte == b' ') && byte != b'"' && byte != b'\\');
    let kind = match text.get(NAME + HELP)? {
        0 => Kind::Counter,
        1 => Kind::Gauge,
        2 if values.len() == super::BOUNDS.len().saturating_add(2) => Kind::Histogram,
        _ => return None,
    };
    let label = match text.get(NAME + HELP + 1)? {
        0 if values.len() == 1 || kind == Kind::Histogram => Label::None,
        1 => Label::Queue,
        2 => Label::Device,
        _ => return None,
    };
    (is_name && is_help).then_some(Shown { name, help, kind, label, values })
}

fn string(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next()?;
    String::from_utf8(text.to_vec()).ok()
}
