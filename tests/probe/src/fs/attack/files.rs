//! Files that are none: pipes, sockets, devices, links. A server that opens one waits for ever, or reaches a driver of the host.

use anyhow::{Result, anyhow};
use libc::{EACCES, EBADF, EEXIST, EINVAL, ELOOP, ENODEV, ENXIO, EOPNOTSUPP, EPERM, ESTALE, O_CREAT, O_RDONLY, O_RDWR, O_TRUNC};

use super::Good::{Done, Error};
use super::{Case, Foe, Good, NotOffered};
use crate::fs::message::{self, ROOT};
use crate::fs::raw::node_of;

const KINDS: [&str; 4] = ["fifo", "sock", "device", "link"];

/// It is refused, however that is said.
const REFUSED: &[Good] = &[
    Error(EBADF),
    Error(ELOOP),
    Error(EINVAL),
    Error(EEXIST),
    Error(EACCES),
    Error(EPERM),
    Error(EOPNOTSUPP),
    Error(ENXIO),
    Error(ENODEV),
    Error(ESTALE),
    Error(libc::ENOSYS),
];

type Attack = fn(&mut Foe, u64, &'static str) -> Result<super::Heard>;

pub(super) fn cases() -> Vec<Case> {
    let attacks: [(&str, &'static [Good], Attack); 9] = [
        ("open", REFUSED, |foe, node, _| foe.say(&message::open(node, O_RDONLY))),
        ("open-to-write", REFUSED, |foe, node, _| foe.say(&message::open(node, O_RDWR | O_TRUNC))),
        ("open-nonblock", REFUSED, |foe, node, _| foe.say(&message::open(node, O_RDWR | libc::O_NONBLOCK))),
        ("create", REFUSED, |foe, _, name| foe.say(&message::create(ROOT, name, O_RDWR | O_CREAT, 0o644))),
        ("truncate", REFUSED, |foe, node, _| foe.say(&message::truncate(node, 0))),
        ("allocate", REFUSED, |foe, node, _| foe.say(&message::fallocate(node, 0, 0, 100))),
        ("read", REFUSED, |foe, node, _| foe.say(&message::read(node, 0, 0, 100))),
        ("set-attribute", REFUSED, |foe, node, _| foe.say(&message::setxattr(node, "user.a", b"x"))),
        ("look", &[Done], |foe, node, _| foe.say(&message::getattr(node))),
    ];
    let mut all = Vec::new();
    for kind in KINDS {
        for (name, good, attack) in attacks {
            all.push(Case::new(format!("{kind}-{name}"), good, move |foe| {
                let node = foe.raw.lookup(ROOT, kind).map_err(|_| anyhow!(NotOffered))?;
                attack(foe, node, kind)
            }));
        }
    }
    all.push(Case::new("open-through-a-link", &[Error(libc::ENOTDIR)], |foe| {
        let out = foe.raw.lookup(ROOT, "out")?;
        foe.say(&message::lookup(out, "secret"))
    }));
    all.push(Case::new("make-device-and-open", REFUSED, |foe| {
        let device = libc::makedev(1, 1);
        let made = foe.raw.ask(&message::mknod(ROOT, "memory", libc::S_IFCHR | 0o666, u32::try_from(device)?));
        let node = made.map(|made| node_of(&made)).map_err(|_| anyhow!(NotOffered))?;
        foe.say(&message::open(node, O_RDWR))
    }));
    all
}
