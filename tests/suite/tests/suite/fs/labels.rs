//! Labels that the guest's security module gives to what it makes.

use std::fs;
use std::path::{Path, PathBuf};

use libc::{EINVAL, EOPNOTSUPP, EPERM, O_EXCL, O_RDWR};
use probe::fs::message::{self, Message, ROOT};
use probe::fs::raw::{Raw, long, node_of};
use rustix::fs::{XattrFlags, lgetxattr, setxattr};
use suite::share::Shared;
use suite::virtiofsd::Virtiofsd;

use super::mounted::can_mount;
use super::owners::of_a_user;

/// SECURITY_CTX.
const LABELS: u64 = 1 << 32;

const NAME: &str = "security.selinux";
const LABEL: &[u8] = b"system_u:object_r:unlabeled_t:s0\0";

const MAP: [&str; 3] = ["--security-label", "--xattrmap", ":map::user.guest.:"];

fn label(path: &Path) -> Option<Vec<u8>> {
    let mut room = [0; 256];
    let len = lgetxattr(path, "user.guest.security.selinux", &mut room[..]).ok()?;
    Some(room[..len].to_vec())
}

/// Each way to make something under a name, and whether that can have `user.` attributes.
fn makers(name: &str) -> [(Message, bool); 5] {
    [
        (message::create(ROOT, name, O_RDWR | O_EXCL, 0o400), true),
        (message::mkdir(ROOT, name, 0o555), true),
        (message::mknod(ROOT, name, libc::S_IFREG | 0o644, 0), true),
        (message::mknod(ROOT, name, libc::S_IFIFO | 0o644, 0), false),
        (message::symlink(ROOT, name, "target"), false),
    ]
}

fn has_attributes(path: &Path) -> bool {
    let has = setxattr(path, "user.probe", b"", XattrFlags::empty()).is_ok();
    if !has {
        println!("skipped: the folder's file system has no extended attributes");
    }
    has
}

fn make_all(guest: &mut Raw, house: &Path, owner: (u32, u32)) {
    for (index, (message, can)) in makers("made").into_iter().enumerate() {
        let made = house.join("made");
        let reply = guest.call(&message.by(owner.0, owner.1).in_group(owner.1).labelled(NAME, LABEL)).unwrap();
        if can {
            assert_eq!((reply.error, label(&made).as_deref()), (0, Some(LABEL)), "{index}");
            assert_eq!(guest.ask(&message::getxattr(node_of(&reply.body), NAME, 100)).unwrap(), LABEL, "{index}");
            if made.is_dir() { fs::remove_dir(&made).unwrap() } else { fs::remove_file(&made).unwrap() }
        } else {
            // Linux has no such attributes of these: nothing stays that has no label.
            assert_eq!((reply.error, fs::symlink_metadata(&made).is_ok()), (EPERM, false), "{index}");
        }
    }
}

#[test]
fn what_is_made_has_its_label() {
    let shared = Shared::new(&MAP, |_| {});
    if !has_attributes(&shared.house) {
        return;
    }
    let mut guest = shared.guest();
    make_all(&mut guest, &shared.house, (0, 0));
    if rustix::process::geteuid().is_root() {
        make_all(&mut guest, &shared.house, (1000, 1000));
    }
    let made = guest.ask(&message::tmpfile(ROOT, O_RDWR, 0o600).labelled(NAME, LABEL)).unwrap();
    assert_eq!(guest.ask(&message::getxattr(node_of(&made), NAME, 100)).unwrap(), LABEL);
    guest.ask(&message::link(ROOT, "linked", node_of(&made))).unwrap();
    assert_eq!(label(&shared.house.join("linked")).as_deref(), Some(LABEL));
    // What is there already is opened as it is.
    let opened = guest.ask(&message::create(ROOT, "linked", O_RDWR, 0o600).labelled(NAME, b"another")).unwrap();
    assert_eq!((node_of(&opened), label(&shared.house.join("linked")).as_deref()), (node_of(&made), Some(LABEL)));
    assert_ne!(long(&opened, 128), 0);
    // A module of the guest's may have nothing to say.
    let mut nothing = message::create(ROOT, "without", O_RDWR, 0o600);
    nothing.extension = message::words(&[8, 0]);
    guest.ask(&nothing).unwrap();
    assert_eq!(label(&shared.house.join("without")), None);
}

#[test]
fn what_cannot_have_its_label_is_not_made() {
    let shared = Shared::new(&["--security-label", "--xattrmap", "/unsupported/all/security./security.//ok/all///"], |_| {});
    let mut guest = shared.guest();
    let nonsense = |message: Message| Message { extension: message::words(&[16, 2, 0, 0]), ..message };
    for (message, _) in makers("made").into_iter().chain([(message::tmpfile(ROOT, O_RDWR, 0o600), true)]) {
        assert_eq!(guest.call(&message.clone().labelled(NAME, LABEL)).unwrap().error, EOPNOTSUPP);
        assert_eq!(guest.call(&nonsense(message.clone())).unwrap().error, EINVAL);
        assert_eq!(guest.call(&message.labelled(NAME, LABEL).labelled(NAME, LABEL)).unwrap().error, EINVAL);
        assert_eq!(fs::read_dir(&shared.house).unwrap().count(), 0);
    }
    // Where it was not agreed on it is nonsense, too.
    let plain = Shared::new(&["--xattr"], |_| {});
    let mut guest = plain.guest();
    assert_eq!(guest.call(&message::mkdir(ROOT, "made", 0o755).labelled(NAME, LABEL)).unwrap().error, EINVAL);
    assert_eq!(fs::read_dir(&plain.house).unwrap().count(), 0);
}

#[test]
fn a_guest_without_labels() {
    for (words, served) in [("--security-label", false), ("--security-label=always", false), ("--security-label=auto", true)] {
        let shared = Shared::new(&[words], |_| {});
        let mut guest = Raw::open(shared.connect(), 2).unwrap();
        let settled = guest.init(!LABELS);
        assert_eq!(settled.is_ok(), served, "{words}");
        if served {
            assert_eq!(settled.unwrap().flags & LABELS, 0);
            guest.ask(&message::mkdir(ROOT, "made", 0o755)).unwrap();
        } else {
            assert_eq!(settled.unwrap_err().to_string(), "FUSE_INIT is answered with error 71");
            // It may come again with them.
            assert_eq!(guest.init(!0).unwrap().flags & LABELS, LABELS);
        }
    }
}

/// With names that everybody may set, it takes no privilege.
#[test]
fn an_ordinary_users_process_labels_what_is_made() {
    if !can_mount("labels of an ordinary user") {
        return;
    }
    let mut mounted = of_a_user(&MAP);
    if !has_attributes(&mounted.house) {
        return;
    }
    // The kernel here has no module that gives labels, and says so with each request.
    fs::write(mounted.seen.join("plain"), "x").unwrap();
    fs::create_dir(mounted.seen.join("plain folder")).unwrap();
    setxattr(mounted.seen.join("plain"), "trusted.x", b"guest", XattrFlags::empty()).unwrap();
    let house: PathBuf = mounted.house.clone();
    let server = mounted.server.take().unwrap();
    mounted.unmount();
    labels_by(&server, &house);
}

fn labels_by(server: &Virtiofsd, house: &Path) {
    let mut guest = Raw::begin(std::os::unix::net::UnixStream::connect(&server.socket).unwrap(), 1).unwrap();
    make_all(&mut guest, house, (0, 0));
}
