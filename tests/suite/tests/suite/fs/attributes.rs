//! Extended attributes that have other names on the host.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use libc::{ENODATA, ENOSYS, EOPNOTSUPP, EPERM, ERANGE, O_RDWR, O_TRUNC};
use probe::fs::message::{self, Message, ROOT, Set, set};
use probe::fs::raw::{Raw, word};
use rustix::fs::{XattrFlags, lgetxattr, listxattr, listxattr_query, lsetxattr, removexattr, setxattr};
use suite::share::Shared;

use super::mounted::{Mounted, can_mount};

/// All of the guest's are the host's `user.virtiofs.` ones.
const ALL: &str = ":map::user.virtiofs.:";

/// What setcap writes for `cap_net_raw+ep`: revision 2 with the bit for "effective", then pairs of permitted and inheritable.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// What the capabilities of a guest's program are called on the host.
const MAPPED: &str = "user.virtiofs.security.capability";

fn value(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut room = [0; 256];
    let len = lgetxattr(path, name, &mut room[..]).ok()?;
    Some(room[..len].to_vec())
}

fn names(list: &[u8]) -> BTreeSet<String> {
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect()
}

/// Whether there can be such attributes at all.
fn has_attributes(path: &Path) -> bool {
    let has = lsetxattr(path, "user.probe", b"", XattrFlags::empty()).is_ok() && removexattr(path, "user.probe").is_ok();
    if !has {
        println!("skipped: the folder's file system has no extended attributes");
    }
    has
}

#[test]
fn names_are_mapped_both_ways() {
    if !can_mount("names of attributes that are mapped") {
        return;
    }
    let mut mounted = Mounted::ours(&["--xattrmap", ALL], &[]);
    let (here, there) = mounted.both("file");
    fs::write(&there, "x").unwrap();
    if !has_attributes(&there) {
        return;
    }
    setxattr(&here, "trusted.overlay", b"guest", XattrFlags::CREATE).unwrap();
    setxattr(&here, "user.own", b"1", XattrFlags::empty()).unwrap();
    lsetxattr(&there, "user.host", b"host", XattrFlags::empty()).unwrap();
    lsetxattr(&there, "trusted.overlay", b"host", XattrFlags::empty()).unwrap();
    assert_eq!(value(&there, "user.virtiofs.trusted.overlay").unwrap(), b"guest");
    assert_eq!(
        (value(&here, "trusted.overlay").unwrap(), value(&there, "trusted.overlay").unwrap()),
        (b"guest".to_vec(), b"host".to_vec())
    );
    assert_eq!(value(&here, "user.host"), None);
    let mut room = [0u8; 4096];
    let len = listxattr(&here, &mut room[..]).unwrap();
    assert_eq!(names(&room[..len]), ["trusted.overlay", "user.own"].map(str::to_owned).into());
    assert_eq!(listxattr_query(&here).unwrap(), len, "asked how long they are");
    let mut exact = vec![0u8; len];
    assert_eq!(listxattr(&here, &mut exact[..]).unwrap(), len, "it is enough, though the host has more");
    assert!(listxattr(&here, &mut exact[1..]).is_err());
    removexattr(&here, "user.own").unwrap();
    assert_eq!(value(&there, "user.virtiofs.user.own"), None);
    mounted.unmount();
}

#[test]
fn each_kind_of_rule() {
    let rules = "/bad/all/trusted./trusted./ :unsupported:all:security.selinux:security.selinux: /ok/client/user.one//
        ,prefix,client,user.,user.guest.,  ,prefix,server,,user.guest., ,ok,server,,user.one, ,bad,all,,,";
    let shared = Shared::new(&["--xattrmap", rules], |house| fs::write(house.join("file"), "x").unwrap());
    let file = shared.house.join("file");
    if !has_attributes(&file) {
        return;
    }
    let mut guest = shared.guest();
    let node = guest.lookup(ROOT, "file").unwrap();
    let long = format!("user.{}", "n".repeat(245));
    let cases: [(&str, i32, i32); 6] = [
        ("trusted.overlay", EPERM, ENODATA),
        ("security.selinux", EOPNOTSUPP, EOPNOTSUPP),
        ("security.other", EPERM, ENODATA),
        ("system.posix_acl_access", EOPNOTSUPP, EOPNOTSUPP),
        (&long, ERANGE, ERANGE),
        (&long[..244], 0, 0),
    ];
    for (name, changed, got) in cases {
        assert_eq!(guest.call(&message::setxattr(node, name, b"v")).unwrap().error, changed, "{name}");
        assert_eq!(guest.call(&message::getxattr(node, name, 10)).unwrap().error, got, "{name}");
        assert_eq!(guest.call(&message::removexattr(node, name)).unwrap().error, changed, "{name}");
    }
    for name in ["user.one", "user.two"] {
        guest.ask(&message::setxattr(node, name, name.as_bytes())).unwrap();
        assert_eq!(guest.ask(&message::getxattr(node, name, 100)).unwrap(), name.as_bytes());
    }
    assert_eq!(
        (value(&file, "user.one").unwrap(), value(&file, "user.guest.user.two").unwrap()),
        (b"user.one".to_vec(), b"user.two".to_vec())
    );
    for hidden in ["user.three", "user.guest."] {
        lsetxattr(&file, hidden, b"", XattrFlags::empty()).unwrap();
    }
    let told = guest.ask(&message::listxattr(node, 1000)).unwrap();
    assert_eq!(names(&told), ["user.one", "user.two"].map(str::to_owned).into());
    assert_eq!(word(&guest.ask(&message::listxattr(node, 0)).unwrap(), 0) as usize, told.len());
    assert_eq!(guest.call(&message::listxattr(node, 5)).unwrap().error, ERANGE);
    // Without the option there is nothing at all.
    let plain = Shared::new(&[], |house| fs::write(house.join("file"), "x").unwrap());
    let mut guest = plain.guest();
    let node = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.call(&message::listxattr(node, 100)).unwrap().error, ENOSYS);
}

/// Ways in which a file is changed.
fn changes(guest: &mut Raw, node: u64) -> Vec<(&'static str, Message)> {
    let handle = guest.open_file(node, O_RDWR).unwrap();
    let (other, other_handle) = guest.create(ROOT, "other", O_RDWR, 0o755).unwrap();
    guest.ask(&message::write(other, other_handle, 0, b"other")).unwrap();
    let owner = |valid, uid, gid| message::setattr(node, Set { valid, uid, gid, ..Set::default() });
    vec![
        ("write", message::write(node, handle, 0, b"evil")),
        ("a write of what was collected", message::write_as(node, handle, 0, b"evil", 1)),
        ("truncate", message::truncate(node, 2)),
        ("truncate by handle", message::setattr(node, Set { valid: set::SIZE | set::FH, size: 3, handle, ..Set::default() })),
        ("open to empty it", message::open(node, O_RDWR | O_TRUNC)),
        ("fallocate", message::fallocate(node, handle, 0, 100)),
        ("copy_file_range", message::copy((other, other_handle), (node, handle), 5)),
        ("owner", owner(set::UID, 0, 0)),
        ("group", owner(set::GID, 0, 0)),
    ]
}

/// CVE-2021-20263: a program with capabilities that a guest's user may write to would keep them, whatever is written there.
#[test]
fn capabilities_under_another_name_go_when_a_file_is_changed() {
    for words in [&["--xattrmap", ALL][..], &["--xattrmap", ALL, "--killpriv-v2"]] {
        let shared = Shared::new(words, |house| fs::write(house.join("program"), "content").unwrap());
        let file = shared.house.join("program");
        if !has_attributes(&file) {
            return;
        }
        let mut guest = shared.guest();
        let node = guest.lookup(ROOT, "program").unwrap();
        for (what, change) in changes(&mut guest, node) {
            guest.ask(&message::setxattr(node, "security.capability", &CAPABILITY)).unwrap();
            assert_eq!(value(&file, MAPPED).as_deref(), Some(&CAPABILITY[..]), "{what}");
            guest.ask(&message::setattr(node, Set { valid: set::MODE, mode: 0o755, ..Set::default() })).unwrap();
            assert_eq!(guest.ask(&message::getxattr(node, "security.capability", 100)).unwrap(), CAPABILITY, "{what}");
            let reply = guest.call(&change).unwrap();
            assert_eq!(reply.error, 0, "{what}");
            assert_eq!(value(&file, MAPPED), None, "{what}");
            // There are none now.
            assert_eq!(guest.call(&change).unwrap().error, 0, "{what}, again");
            assert_eq!(guest.call(&message::getxattr(node, "security.capability", 100)).unwrap().error, ENODATA, "{what}");
        }
    }
}

/// The same through a kernel, which leaves it to the server once that is agreed on.
#[test]
fn a_kernel_that_leaves_capabilities_to_the_server() {
    if !can_mount("capabilities under another name") {
        return;
    }
    for words in [&["--xattrmap", ALL, "--killpriv-v2"][..], &["--xattrmap", ALL]] {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("program");
        fs::write(&here, "x").unwrap();
        if !has_attributes(&there) {
            return;
        }
        setxattr(&here, "security.capability", &CAPABILITY, XattrFlags::empty()).unwrap();
        assert_eq!(value(&there, MAPPED).as_deref(), Some(&CAPABILITY[..]), "{words:?}");
        fs::write(&here, "y").unwrap();
        assert_eq!((value(&there, MAPPED), value(&here, "security.capability")), (None, None), "{words:?}");
        mounted.unmount();
    }
}
