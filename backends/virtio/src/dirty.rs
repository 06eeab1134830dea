//! The log of guest pages that a device has written, for a frontend that moves the guest to another host (vhost-user, "Migration").
//!
//! One bit for each page of 4 KiB of guest addresses, in memory that the frontend gives. A bit is set after the page was written and
//! before the guest hears of it: the other way round the frontend could take the bit, copy the page as it was, and never look again.
//!
//! What is marked is all that a chain lets the device write, once for each chain that is given back, and the used ring whenever it
//! changes. That may be more than was written, and never less, whoever wrote it: this process, the kernel for it, or a disk.

use std::sync::atomic::Ordering;

use crate::memory::{self, Memory, RegionFile, Span, Trust};

/// The feature bit by which a frontend switches the log on. It is between the two ends; no guest sees it.
pub const LOG_ALL: u64 = 1 << 26;

/// Bytes of a page of the log, whatever the host's are.
const PAGE: u64 = 4096;

/// The log of one frontend.
#[derive(Debug)]
pub struct DirtyLog {
    memory: Memory,
    span: Span,
}

impl DirtyLog {
    /// In this file, from its `offset` on.
    ///
    /// # Errors
    /// When it cannot be mapped: see [`Memory::with`].
    pub fn new(region: RegionFile, trust: Trust) -> Result<DirtyLog, memory::Error> {
        let bytes = u32::try_from(region.size).unwrap_or(u32::MAX);
        let memory = Memory::default().with(RegionFile { guest_addr: 0, ..region }, trust)?;
        let span = memory.span(0, bytes)?;
        Ok(DirtyLog { memory, span })
    }

    /// So many bytes from a guest address on were written. What the log has no bits for is not logged.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.saturating_add(len - 1) / PAGE;
        let end = last.min(u64::from(self.span.len()).saturating_mul(8).saturating_sub(1));
        let mut page = addr / PAGE;
        while page <= end {
            // As many bits of one byte as belong to it.
            let byte = page / 8;
            let stop = end.min(byte.saturating_mul(8).saturating_add(7));
            let bits = (page..=stop).fold(0_u8, |bits, page| bits | 1 << (page % 8));
            self.memory.or_u8(self.span, usize::try_from(byte).unwrap_or(usize::MAX), bits, Ordering::Release);
            page = stop.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::sealed_memfd;

    #[test]
    fn each_page_that_was_touched_has_its_bit() {
        let fd = sealed_memfd("log", 4096).unwrap();
        let region = RegionFile { guest_addr: 0, size: 4, user_addr: 0, offset: 8, fd: fd.try_clone().unwrap() };
        let log = DirtyLog::new(region, Trust::Sealed).unwrap();
        log.mark(0x1fff, 2);
        log.mark(7 * 4096, 4096 * 3);
        log.mark(0, 0);
        // Of what lies behind the log nothing is noted, and nothing is harmed.
        log.mark(31 * 4096, u64::MAX);
        log.mark(u64::MAX, 1);
        let mut bytes = [0; 16];
        rustix::io::pread(&fd, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0b1000_0110, 0b0000_0011, 0, 0b1000_0000, 0, 0, 0, 0]);
    }
}
