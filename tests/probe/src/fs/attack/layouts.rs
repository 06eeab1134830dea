//! How a request lies in the ring, and what its header says of that.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Good::{Broken, Done, Error, Nothing};
use super::{Case, Foe, ROOM};
use crate::fs::message::{self, ROOT};
use crate::fs::raw::{FIRST, Heard, Reply};
use crate::ring::Buffer;

/// Where no memory is.
const NOWHERE: u64 = 0x6666_0000_0000;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("header-short", &[Nothing], |foe| shortened(foe, 20)),
        Case::new("header-39", &[Nothing], |foe| shortened(foe, 39)),
        Case::new("no-readable", &[Nothing], |foe| laid(foe, |both| both.retain(|one| one.write))),
        Case::new("no-writable", &[Nothing], |foe| laid(foe, |both| both.retain(|one| !one.write))),
        Case::new("writable-first", &[Broken], |foe| laid(foe, |both| both.reverse())),
        Case::new("answer-8", &[Nothing], |foe| laid(foe, |both| both.iter_mut().skip(1).for_each(|one| one.len = 8))),
        Case::new("answer-15", &[Nothing], |foe| laid(foe, |both| both.iter_mut().skip(1).for_each(|one| one.len = 15))),
        Case::new("answer-16", &[Error(libc::EINVAL)], |foe| {
            laid(foe, |both| both.iter_mut().skip(1).for_each(|one| one.len = 16))
        }),
        Case::new("answer-one-less", &[Error(libc::EINVAL)], |foe| {
            laid(foe, |both| both.iter_mut().skip(1).for_each(|one| one.len = 16 + 103))
        }),
        Case::new("answer-just", &[Done], |foe| laid(foe, |both| both.iter_mut().skip(1).for_each(|one| one.len = 16 + 104))),
        Case::new("request-outside", &[Broken], |foe| laid(foe, |both| both.iter_mut().take(1).for_each(nowhere))),
        Case::new("answer-outside", &[Broken], |foe| laid(foe, |both| both.iter_mut().skip(1).for_each(nowhere))),
        Case::new("request-4g", &[Broken], |foe| laid(foe, |both| both.iter_mut().take(1).for_each(|one| one.len = u32::MAX))),
        Case::new("answer-4g", &[Broken], |foe| laid(foe, |both| both.iter_mut().skip(1).for_each(|one| one.len = u32::MAX))),
        Case::new("wraps-around", &[Broken], |foe| {
            laid(foe, |both| both.iter_mut().take(1).for_each(|one| one.addr = u64::MAX - 8))
        }),
        Case::new("empty-buffer", &[Broken, Nothing, Done], |foe| {
            laid(foe, |both| both.insert(0, Buffer { addr: NOWHERE, len: 0, write: false }))
        }),
        Case::new("answer-over-request", &[Done], over_itself),
        Case::new("len-0", &[Error(libc::EINVAL)], |foe| said_len(foe, 0)),
        Case::new("len-39", &[Error(libc::EINVAL)], |foe| said_len(foe, 39)),
        Case::new("len-more-than-there-is", &[Error(libc::EINVAL)], |foe| said_len(foe, 57)),
        Case::new("len-4g", &[Error(libc::EINVAL)], |foe| said_len(foe, u32::MAX)),
        Case::new("request-split-everywhere", &[Done], |foe| {
            let len = 40 + 5;
            everywhere(foe, len, |both, at| cut(both, 0, at))
        }),
        Case::new("answer-split-everywhere", &[Done], |foe| everywhere(foe, 16 + 128, |both, at| cut(both, 1, at))),
        Case::new("byte-by-byte", &[Done], byte_by_byte),
    ]
}

fn nowhere(one: &mut Buffer) {
    one.addr = NOWHERE;
}

fn shortened(foe: &mut Foe, len: u32) -> Result<Heard> {
    laid(foe, |both| both.iter_mut().take(1).for_each(|one| one.len = len))
}

fn laid(foe: &mut Foe, change: impl FnOnce(&mut Vec<Buffer>)) -> Result<Heard> {
    let bytes = message::getattr(ROOT).bytes(foe.raw.next_unique());
    let mut both = foe.lay(&bytes, ROOM)?;
    change(&mut both);
    foe.raw.offer(FIRST, &both)
}

fn said_len(foe: &mut Foe, len: u32) -> Result<Heard> {
    let mut bytes = message::getattr(ROOT).bytes(foe.raw.next_unique());
    bytes.splice(..4, len.to_le_bytes());
    foe.say_bytes(&bytes, ROOM)
}

/// The answer is to be written where the request is.
fn over_itself(foe: &mut Foe) -> Result<Heard> {
    let place = foe.raw.place();
    let bytes = message::lookup(ROOT, "file").bytes(foe.raw.next_unique());
    foe.raw.device.memory().write(place.answer, &bytes);
    let len = u32::try_from(bytes.len())?;
    let both = [Buffer { addr: place.answer, len, write: false }, Buffer { addr: place.answer, len: ROOM, write: true }];
    // `offer` clears what lies there, so the request is laid out behind its back.
    let head = foe.raw.device.submit(FIRST, &both);
    foe.raw.device.kick(FIRST);
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        if let Some(used) = foe.raw.device.completion(FIRST)? {
            anyhow::ensure!(Some(used.head) == head, "another request came back");
            let mut header = [0; 4];
            foe.raw.device.memory().read(place.answer, &mut header);
            let same = u32::from_le_bytes(header) == used.len && used.len == 16 + 128;
            let done = Heard::Answer(Reply { error: 0, body: Vec::new() });
            return Ok(if same { done } else { Heard::Nonsense(format!("{} bytes are used", used.len)) });
        }
        if let Some(state) = foe.raw.state() {
            return Ok(state);
        }
        foe.raw.device.wait(Duration::from_millis(5));
    }
    Ok(Heard::Silence)
}

/// Cuts a buffer in two.
fn cut(both: &mut Vec<Buffer>, which: usize, at: u32) {
    if let Some(one) = both.get_mut(which) {
        let rest = Buffer { addr: one.addr + u64::from(at), len: one.len - at, write: one.write };
        one.len = at;
        both.insert(which + 1, rest);
    }
}

fn everywhere(foe: &mut Foe, len: u32, change: impl Fn(&mut Vec<Buffer>, u32)) -> Result<Heard> {
    let mut last = Heard::Nothing;
    for at in 1..len {
        let bytes = message::lookup(ROOT, "file").bytes(foe.raw.next_unique());
        let mut both = foe.lay(&bytes, ROOM)?;
        change(&mut both, at);
        last = foe.raw.offer(FIRST, &both)?;
        if !matches!(&last, Heard::Answer(reply) if reply.error == 0 && reply.body.len() == 128) {
            return Ok(last);
        }
    }
    Ok(last)
}

fn byte_by_byte(foe: &mut Foe) -> Result<Heard> {
    let bytes = message::lookup(ROOT, "dir").bytes(foe.raw.next_unique());
    let both = foe.lay(&bytes, 16 + 128)?;
    let split = |one: &Buffer| {
        let one = *one;
        let step = if one.write { 7 } else { 1 };
        (0..one.len).step_by(usize::try_from(step).unwrap_or(1)).map(move |at| Buffer {
            addr: one.addr + u64::from(at),
            len: step.min(one.len - at),
            write: one.write,
        })
    };
    let all: Vec<Buffer> = both.iter().flat_map(split).collect();
    foe.raw.offer(FIRST, &all)
}
