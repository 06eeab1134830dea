//! A console under kills: numbered lines go out, and the file the console writes has to hold each of them once, in order.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Load, Plan, Report, next, run};
use crate::device::{Device, Shape};
use crate::link::Backend;
use crate::ring::Buffer;

/// From the guest to the port.
const TRANSMIT: u16 = 1;

/// Bytes of a line, its end included.
const LINE: usize = 64;
const LINE_BYTES: u32 = 64;

/// Runs a storm on a console that writes `file`. What is in the file already is left out of account.
///
/// # Errors
/// As [`super::blk`].
pub fn console(backend: &mut Backend, file: &Path, plan: Plan, progress: impl FnMut(u32)) -> Result<Report> {
    let stream = backend.start()?;
    let shape = Shape { queues: 2, ..plan.shape };
    let mut device = Device::connect(stream, shape, 0)?;
    let mut idle = Vec::new();
    for place in 0..plan.depth as u64 {
        idle.push(device.memory_mut().take(LINE_BYTES.into(), 1, place)?);
    }
    device.start()?;
    let before = fs::metadata(file).with_context(|| format!("Cannot look at {}", file.display()))?.len();
    let before = usize::try_from(before)?;
    run(&mut ConsoleLoad { device, idle, out: Vec::new(), lines: 0, file: file.to_owned(), before }, backend, plan, progress)
}

struct ConsoleLoad {
    device: Device,
    idle: Vec<u64>,
    out: Vec<(u16, u64)>,
    /// Lines that were put in.
    lines: u64,
    file: PathBuf,
    before: usize,
}

/// The line of that number.
fn line(number: u64) -> [u8; LINE] {
    let mut bytes = [b'.'; LINE];
    for (to, from) in bytes.iter_mut().zip(format!("line {number} ").bytes()) {
        *to = from;
    }
    bytes[LINE - 1] = b'\n';
    bytes
}

impl Load for ConsoleLoad {
    fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    fn fill(&mut self) {
        while let Some(at) = self.idle.pop() {
            self.device.memory().write(at, &line(self.lines));
            let Some(head) = self.device.submit(TRANSMIT, &[Buffer { addr: at, len: LINE_BYTES, write: false }]) else {
                self.idle.push(at);
                break;
            };
            self.lines += 1;
            self.out.push((head, at));
        }
        self.device.kick(TRANSMIT);
    }

    fn take(&mut self, report: &mut Report) -> Result<u64> {
        let mut count = 0;
        while let Some(used) = next(&mut self.device, TRANSMIT, report) {
            count += 1;
            let Some(place) = self.out.iter().position(|(head, _)| *head == used.head) else { continue };
            self.idle.push(self.out.swap_remove(place).1);
        }
        Ok(count)
    }

    /// Everything that was put in is done, so the file is the lines, one after the other, and nothing else.
    fn finish(&mut self, report: &mut Report) -> Result<()> {
        let content = fs::read(&self.file).with_context(|| format!("Cannot read {}", self.file.display()))?;
        let Some(shown) = content.get(self.before..) else { bail!("{} has become shorter", self.file.display()) };
        let mut next = 0;
        for shown in shown.chunks(LINE) {
            match number(shown) {
                Some(found) if found >= next => {
                    report.lost += found - next;
                    next = found + 1;
                }
                Some(_) => report.duplicated += 1,
                None => report.corrupted += 1,
            }
        }
        if report.lost == 0 {
            report.lost = self.lines.saturating_sub(next);
        }
        Ok(())
    }
}

/// The number of a line that is as it was sent.
fn number(shown: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(shown).ok()?;
    let number = text.strip_prefix("line ")?.split(' ').next()?.parse().ok()?;
    (shown == line(number)).then_some(number)
}
