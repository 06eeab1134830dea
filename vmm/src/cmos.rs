//! The CMOS clock: an index port, a data port, 128 bytes of which the first are the time of day in UTC.
//!
//! The time is the host's, read when the guest reads a register: nothing ticks, so there is never an update in progress
//! to be polled for. The time cannot be set and no alarm ever rings (the ACPI device has no interrupt); the rest are bytes.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::Port;

/// Index at this port, data at the next.
pub const PORT: u16 = 0x70;
const SIZE: usize = 128;
/// The top bit of the index masks NMIs on a PC.
const INDEX_MASK: u8 = 0x7f;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// 32768 Hz, 1024 Hz periodic rate: what firmware sets.
const RATE: u8 = 0x26;
const HOURS_24: u8 = 2;
const VALID: u8 = 0x80;

struct State {
    index: u8,
    bytes: [u8; SIZE],
}

/// The clock and its memory.
pub struct Cmos(Mutex<State>);

impl Default for Cmos {
    fn default() -> Self {
        Self(Mutex::new(State { index: 0, bytes: [0; SIZE] }))
    }
}

/// Seconds since 1970 as year, month, day, weekday (Sunday is 1), hour, minute, second.
fn civil(seconds: u64) -> (u64, u64, u64, u64, u64, u64, u64) {
    let days = seconds / 86400;
    // Days are counted from 1 March of year 0, so that the leap day is the last of its year (Howard Hinnant's method).
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day, (days + 4) % 7 + 1, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

fn register(index: u8, bytes: &[u8; SIZE], seconds: u64) -> u8 {
    let (year, month, day, weekday, hour, minute, second) = civil(seconds);
    let number = match index {
        0 => second,
        2 => minute,
        4 => hour,
        6 => weekday,
        7 => day,
        8 => month,
        9 => year % 100,
        CENTURY => year / 100,
        STATUS_A => return RATE,
        STATUS_B => return HOURS_24,
        STATUS_C => return 0,
        STATUS_D => return VALID,
        other => return bytes.get(usize::from(other)).copied().unwrap_or(0),
    };
    // Two decimal digits. Guests may ask for binary, but all of them understand what firmware leaves behind.
    u8::try_from(number / 10 * 16 + number % 10).unwrap_or(0)
}

impl Port for Cmos {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let (1, [byte]) = (offset, data) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            *byte = register(state.index, &state.bytes, now);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data) {
            (0, [index]) => state.index = index & INDEX_MASK,
            (1, [value]) => {
                let at = usize::from(state.index);
                if let Some(byte) = state.bytes.get_mut(at) {
                    *byte = *value;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(civil(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(civil(4_102_444_799), (2099, 12, 31, 5, 23, 59, 59));
    }

    #[test]
    fn numbers_are_decimal_digits() {
        let at = |index| register(index, &[0; SIZE], 4_102_444_799);
        assert_eq!([at(0), at(2), at(4), at(7), at(8), at(9), at(CENTURY)], [0x59, 0x59, 0x23, 0x31, 0x12, 0x99, 0x20]);
    }

    #[test]
    fn bytes_are_kept_and_odd_sizes_are_harmless() {
        let cmos = Cmos::default();
        cmos.write(0, &[0x40]);
        cmos.write(1, &[7]);
        let mut byte = [0];
        cmos.read(1, &mut byte);
        assert_eq!(byte, [7]);
        for len in 0..5 {
            cmos.write(0, &vec![0xff; len]);
            cmos.write(1, &vec![0xff; len]);
            cmos.read(1, &mut vec![0; len]);
        }
    }
}
