//! Nodes and handles that a guest was never given, or was not given for this; references that it does not have; the wrong queues.

use libc::{EBADF, EINVAL, EISDIR, ENOENT, ENOTDIR, ESTALE, O_RDONLY, O_RDWR};

use super::Good::{Done, Error, Nothing};
use super::{Case, Foe, Good, ROOM};
use crate::fs::message::{self, Message, ROOT, longs, op};
use crate::fs::raw::{Heard, URGENT};

/// There is no such node.
const GONE: &[Good] = &[Error(ESTALE), Error(EBADF), Error(ENOENT)];
/// There is no such handle.
const BAD: &[Good] = &[Error(EBADF)];

pub(super) fn cases() -> Vec<Case> {
    [nodes(), handles(), references(), queues()].into_iter().flatten().collect()
}

fn nodes() -> Vec<Case> {
    let node = |name, guess: fn(u64) -> u64| {
        Case::new(name, GONE, move |foe| {
            let node = guess(foe.file);
            foe.say(&message::getattr(node))
        })
    };
    vec![
        node("node-0", |_| 0),
        node("node-2", |_| 2),
        node("node-max", |_| u64::MAX),
        node("node-next-generation", |node| node.wrapping_add(1 << 32)),
        node("node-earlier-generation", |node| node.wrapping_sub(1 << 32)),
        node("node-next-place", |node| node.wrapping_add(1 << 12)),
        Case::new("node-forgotten", GONE, |foe| {
            let node = foe.file;
            foe.say_with(&message::forget(node, 1), 0)?;
            foe.say(&message::getattr(node))
        }),
        Case::new("node-forgotten-and-filled-again", GONE, |foe| {
            let node = foe.file;
            foe.say_with(&message::forget(node, 1), 0)?;
            for name in ["other", "file", "link", "empty"] {
                foe.raw.lookup(ROOT, name)?;
            }
            // Whatever is there now is not what this number was given for, unless it is.
            let again = foe.raw.lookup(ROOT, "file")?;
            if again == node { foe.say(&message::getattr(u64::MAX)) } else { foe.say(&message::getattr(node)) }
        }),
        Case::new("lookup-in-file", &[Error(ENOTDIR)], |foe| {
            let node = foe.file;
            foe.say(&message::lookup(node, "x"))
        }),
        Case::new("create-in-file", &[Error(ENOTDIR)], |foe| {
            let node = foe.file;
            foe.say(&message::create(node, "x", O_RDWR, 0o644))
        }),
        Case::new("rename-to-nowhere", GONE, |foe| foe.say(&message::rename(ROOT, "file", 0x1234_5678, "x", 0))),
        Case::new("link-nothing", GONE, |foe| foe.say(&message::link(ROOT, "x", 0x1234_5678))),
        Case::new("readlink-of-file", &[Error(EINVAL)], |foe| {
            let node = foe.file;
            foe.say(&Message::new(op::READLINK, node, []))
        }),
        Case::new("open-directory", &[Error(EISDIR)], |foe| foe.say(&message::open(ROOT, O_RDONLY))),
        Case::new("opendir-file", &[Error(ENOTDIR)], |foe| {
            let node = foe.file;
            foe.say(&message::opendir(node))
        }),
    ]
}

fn handles() -> Vec<Case> {
    let handle = |name, guess: fn(u64) -> u64| {
        Case::new(name, BAD, move |foe: &mut Foe| {
            let handle = guess(foe.open(foe.file, O_RDONLY)?);
            let node = foe.file;
            foe.say(&message::read(node, handle, 0, 100))
        })
    };
    vec![
        handle("handle-max", |_| u64::MAX),
        handle("handle-plus-1", |handle| handle.wrapping_add(1)),
        handle("handle-minus-1", |handle| handle.wrapping_sub(1)),
        handle("handle-next-generation", |handle| handle.wrapping_add(1 << 32)),
        Case::new("handle-never", BAD, |foe| {
            let node = foe.file;
            foe.say(&message::read(node, 12345, 0, 100))
        }),
        Case::new("handle-of-another", BAD, |foe| {
            let other = foe.raw.lookup(ROOT, "other")?;
            let (node, handle) = (foe.file, foe.open(other, O_RDWR)?);
            foe.say(&message::write(node, handle, 0, b"not mine"))
        }),
        Case::new("handle-released", BAD, |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            foe.raw.ask(&message::release(node, handle))?;
            foe.say(&message::read(node, handle, 0, 100))
        }),
        Case::new("handle-released-and-filled-again", BAD, |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            foe.raw.ask(&message::release(node, handle))?;
            foe.open(node, O_RDONLY)?;
            foe.say(&message::read(node, handle, 0, 100))
        }),
        Case::new("release-twice", BAD, |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            foe.raw.ask(&message::release(node, handle))?;
            foe.say(&message::release(node, handle))
        }),
        Case::new("read-directory-handle", &[Error(EBADF), Error(EISDIR)], |foe| {
            let (dir, handle) = (foe.dir, foe.open_dir(foe.dir)?);
            foe.say(&message::read(dir, handle, 0, 100))
        }),
        Case::new("write-directory-handle", &[Error(EBADF), Error(EISDIR)], |foe| {
            let (dir, handle) = (foe.dir, foe.open_dir(foe.dir)?);
            foe.say(&message::write(dir, handle, 0, b"x"))
        }),
        Case::new("readdir-file-handle", &[Error(EBADF), Error(ENOTDIR)], |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            foe.say(&message::readdir(node, handle, 0, 1000, false))
        }),
        Case::new("write-read-only-handle", BAD, |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            foe.say(&message::write(node, handle, 0, b"x"))
        }),
        Case::new("copy-to-handle-of-another", BAD, |foe| {
            let other = foe.raw.lookup(ROOT, "other")?;
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDWR)?);
            foe.say(&message::copy((node, handle), (other, handle), 10))
        }),
        Case::new("truncate-by-handle-of-another", BAD, |foe| {
            let other = foe.raw.lookup(ROOT, "other")?;
            let (node, handle) = (foe.file, foe.open(other, O_RDWR)?);
            let valid = message::set::SIZE | message::set::FH;
            foe.say(&message::setattr(node, message::Set { valid, handle, ..message::Set::default() }))
        }),
    ]
}

fn references() -> Vec<Case> {
    vec![
        Case::new("forget-root", &[Done], |foe| {
            foe.say_with(&message::forget(ROOT, u64::MAX), 0)?;
            foe.say(&message::getattr(ROOT))
        }),
        Case::new("forget-too-much", GONE, |foe| {
            let node = foe.file;
            foe.say_with(&message::forget(node, u64::MAX), 0)?;
            foe.say(&message::getattr(node))
        }),
        Case::new("forget-parent-in-use", &[Done], |foe| {
            let dir = foe.dir;
            let inner = foe.raw.lookup(dir, "inner")?;
            foe.say_with(&message::forget(dir, 1), 0)?;
            foe.say(&message::getattr(inner))
        }),
        Case::new("batch-forget-root-and-nonsense", &[Done], |foe| {
            let all = [(ROOT, u64::MAX), (0, 1), (u64::MAX, u64::MAX), (foe.dir + 1, 7)];
            foe.say_with(&message::forget_many(4, &all), 0)?;
            foe.say(&message::getattr(ROOT))
        }),
        Case::new("forget-while-reading", &[Done], |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            let ticket = foe.raw.post(1, &message::read(node, handle, 0, 1 << 20))?;
            foe.raw.post_bytes(URGENT, &message::forget(node, 1).bytes(7))?;
            let reply = foe.raw.wait(ticket)?;
            anyhow::ensure!(reply.error != 0 || reply.body.len() == 10_000, "{} bytes were read", reply.body.len());
            foe.say(&message::read(node, handle, 0, 100))
        }),
        Case::new("forget-with-answer-room", &[Nothing], |foe| {
            let node = foe.file;
            foe.say(&message::forget(node, 1))
        }),
        Case::new("destroy-and-go-on", GONE, |foe| {
            let node = foe.file;
            foe.say(&Message::new(op::DESTROY, 0, []))?;
            let heard = foe.say(&message::getattr(node))?;
            foe.raw.init(!0)?;
            Ok(heard)
        }),
        Case::new("destroy-while-reading", &[Done, Nothing], |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDONLY)?);
            let ticket = foe.raw.post(1, &message::read(node, handle, 0, 1 << 20))?;
            let gone = foe.say(&Message::new(op::DESTROY, 0, []))?;
            foe.raw.wait(ticket)?;
            foe.raw.init(!0)?;
            Ok(gone)
        }),
    ]
}

fn queues() -> Vec<Case> {
    let on = |foe: &mut Foe, queue: u16, message: &Message, room: u32| -> anyhow::Result<Heard> {
        let bytes = message.bytes(foe.raw.next_unique());
        let buffers = foe.lay(&bytes, room)?;
        foe.raw.offer(queue, &buffers)
    };
    vec![
        Case::new("getattr-on-the-urgent-queue", &[Done, Nothing], move |foe| on(foe, URGENT, &message::getattr(ROOT), ROOM)),
        Case::new("write-on-the-urgent-queue", &[Done, Nothing], move |foe| {
            let (node, handle) = (foe.file, foe.open(foe.file, O_RDWR)?);
            on(foe, URGENT, &message::write(node, handle, 0, &[7; 200_000]), ROOM)
        }),
        Case::new("forget-on-a-request-queue", &[Nothing], |foe| {
            let node = foe.file;
            foe.say_with(&message::forget(node, 1), 0)
        }),
        Case::new("interrupt-of-nothing", &[Done, Nothing], move |foe| {
            on(foe, URGENT, &Message::new(36, 0, longs(&[999_999])), ROOM)
        }),
    ]
}
