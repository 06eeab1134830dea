//! Every operation that takes a name, with everything that is no name.

use libc::{EACCES, EEXIST, EINVAL, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY, EPERM, EXDEV, O_CREAT, O_RDWR};

use super::Good::Error;
use super::stage::ABSOLUTE;
use super::{Case, Good};
use crate::fs::message::{Message, ROOT, longs, op, text, words};

/// What stands where a name should, with its zero if it has one.
fn bad_names() -> Vec<(&'static str, Vec<u8>, &'static [Good])> {
    // Which error says it best is up to the server: with the exception of what is too long.
    const NONE: &[Good] = &[
        Error(EINVAL),
        Error(ENOENT),
        Error(EACCES),
        Error(EPERM),
        Error(EXDEV),
        Error(EEXIST),
        Error(ENOTDIR),
        Error(EISDIR),
        Error(ENOTEMPTY),
        Error(libc::EBUSY),
    ];
    vec![
        ("empty", text(""), NONE),
        ("dot", text("."), NONE),
        ("dotdot", text(".."), NONE),
        ("slash", text("/"), NONE),
        ("with-slash", text("dir/deep"), NONE),
        ("trailing-slash", text("dir/"), NONE),
        ("new-with-slash", text("dir/new"), NONE),
        ("absolute", text(ABSOLUTE), NONE),
        ("above", text("../outboard-foe-was-here"), NONE),
        ("above-victim", text("../victim"), NONE),
        ("above-and-down", text("../beside/victims"), NONE),
        ("through-link", text("out/victims"), NONE),
        ("256-bytes", text([b'n'; 256]), &[Error(ENAMETOOLONG)]),
        ("4096-bytes", text([b'n'; 4096]), &[Error(ENAMETOOLONG)]),
        ("no-zero", b"unended".to_vec(), &[Error(EINVAL)]),
        ("zero-within", b"with\0in\0".to_vec(), &[Error(EINVAL)]),
    ]
}

/// Puts a name into a request.
type Build = fn(&[u8]) -> Message;

const OPERATIONS: [(&str, Build); 12] = [
    ("lookup", |name| Message::new(op::LOOKUP, ROOT, name)),
    ("mkdir", |name| Message::new(op::MKDIR, ROOT, [&words(&[0o755, 0])[..], name].concat())),
    ("mknod", |name| Message::new(op::MKNOD, ROOT, [&words(&[libc::S_IFREG | 0o644, 0, 0, 0])[..], name].concat())),
    ("symlink", |name| Message::new(op::SYMLINK, ROOT, [name, &text("target")].concat())),
    ("create", |name| {
        let flags = (O_RDWR | O_CREAT).cast_unsigned();
        Message::new(op::CREATE, ROOT, [&words(&[flags, 0o644, 0, 0])[..], name].concat())
    }),
    ("link", |name| Message::new(op::LINK, ROOT, [&longs(&[FILE])[..], name].concat())),
    ("unlink", |name| Message::new(op::UNLINK, ROOT, name)),
    ("rmdir", |name| Message::new(op::RMDIR, ROOT, name)),
    ("rename-old", |name| Message::new(op::RENAME, ROOT, [&longs(&[ROOT])[..], name, &text("new")].concat())),
    ("rename-new", |name| Message::new(op::RENAME, ROOT, [&longs(&[ROOT])[..], &text("file"), name].concat())),
    ("rename2-old", |name| Message::new(op::RENAME2, ROOT, [&longs(&[ROOT])[..], &words(&[0, 0]), name, &text("new")].concat())),
    ("rename2-new", |name| Message::new(op::RENAME2, ROOT, [&longs(&[ROOT])[..], &words(&[0, 0]), &text("file"), name].concat())),
];

/// Stands for the node of `file` in a request that is built before that is known.
const FILE: u64 = 0xf11e_f11e_f11e_f11e;

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (operation, build) in OPERATIONS {
        for (name, bytes, good) in bad_names() {
            // What follows ends a name that has no end of its own: it is another name then, and too few come after it.
            let odd = matches!((operation, name), ("symlink" | "rename-old" | "rename2-old", "no-zero" | "zero-within"));
            let good = if odd { &[Error(EINVAL)] } else { good };
            all.push(Case::new(format!("{operation}-{name}"), good, move |foe| {
                let mut message = build(&bytes);
                if operation == "link" {
                    message.body.splice(..8, foe.file.to_le_bytes());
                }
                foe.say(&message)
            }));
        }
    }
    all
}
