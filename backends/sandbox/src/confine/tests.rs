//! A confined process, asked from inside. Each case runs in a worker's place: this test's program again, told by variables which part
//! to play, and where.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, RenameFlags, ResolveFlags, linkat, mkdirat, openat2, renameat_with, unlinkat};
use rustix::io::Errno;
use rustix::process::{Uid, geteuid};
use rustix::thread::set_thread_res_uid;

use super::*;
use crate::spawn::tests::{ask_as, several};
use crate::{Access, Detach, Identity, detach, lower, raise};

const PART: &str = "OUTBOARD_CONFINE_TEST";
const PLACE: &str = "OUTBOARD_CONFINE_PLACE";
const KIND: &str = "OUTBOARD_CONFINE_KIND";

const POLICY: Policy = Policy {
    name: "test",
    limits: Limits { descriptors: 64, threads: 8 },
    capabilities: &[Capability::CAP_CHOWN, Capability::CAP_SETUID],
    control: &[],
    threads: &[],
};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("outboard-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Plays a part in a worker's place, and gives the lines it has said.
fn play(part: &str, place: &Path) -> Vec<String> {
    play_as(Identity::Own, part, place)
}

fn play_as(identity: Identity, part: &str, place: &Path) -> Vec<String> {
    let me = std::env::current_exe().unwrap();
    let script = format!(
        "{PART}={part} {PLACE}={} {KIND}={} exec {} --exact confine::tests::the_part --nocapture --test-threads=1",
        place.display(),
        identity.kind(),
        me.display()
    );
    let said = ask_as(identity, &script, vec![], None);
    said.lines().filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect()
}

/// The least of what the running kernel has: what is tested here does not depend on more.
fn confined(needs: &Needs<'_>) -> Result<Kernel> {
    let kind = std::env::var(KIND).unwrap().parse().unwrap();
    confine(&POLICY, needs, kind, Kernel::running().floor().unwrap())
}

#[test]
fn the_part() {
    let Ok(part) = std::env::var(PART) else { return };
    let place = PathBuf::from(std::env::var_os(PLACE).unwrap());
    // The line has begun with the name of this test.
    println!();
    match part.as_str() {
        "share" => share(&place, Access::ReadWrite),
        "read-only" => share(&place, Access::ReadOnly),
        "again" => again(&place),
        "submounts" => submounts(&place),
        "locked" => locked(),
        "served" => served(&place),
        "capabilities" => capabilities(),
        "descriptors" => descriptors(),
        _ => {}
    }
}

/// What a call has come to, as a line.
fn tell<T>(what: &str, outcome: rustix::io::Result<T>) {
    let known = [
        (Errno::NOENT, "ENOENT"),
        (Errno::ACCESS, "EACCES"),
        (Errno::ROFS, "EROFS"),
        (Errno::XDEV, "EXDEV"),
        (Errno::NOTDIR, "ENOTDIR"),
        (Errno::PERM, "EPERM"),
    ];
    let name = |errno: Errno| known.iter().find(|(one, _)| *one == errno).map_or("another error", |(_, name)| name);
    println!("- {what}: {}", outcome.map_or_else(name, |_| "done"));
}

fn open_beneath(root: &OwnedFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    openat2(root, path, flags, Mode::from(if flags.contains(OFlags::CREATE) { 0o600 } else { 0 }), ResolveFlags::empty())
}

fn share(place: &Path, access: Access) {
    let taken = detach(CWD, &place.join("share"), Detach { read_only: access == Access::ReadOnly, submounts: false }).unwrap();
    let beside = open(place, OFlags::PATH, Mode::empty()).unwrap();
    let root = &taken.root;
    confined(&Needs { reach: &[Reach { root: root.as_fd(), access }], ..Needs::default() }).unwrap();
    let file = open_beneath(root, "one/file", OFlags::RDONLY);
    let mut text = String::new();
    File::from(file.unwrap()).read_to_string(&mut text).unwrap();
    println!("- read: {text}");
    tell("list", open_beneath(root, "one", OFlags::RDONLY | OFlags::DIRECTORY));
    tell("write", open_beneath(root, "one/file", OFlags::RDWR | OFlags::TRUNC));
    tell("create", open_beneath(root, "one/new", OFlags::RDWR | OFlags::CREATE));
    tell("directory", mkdirat(root, "three", Mode::from(0o700)));
    tell("link", linkat(root, "one/file", root, "two/link", AtFlags::empty()));
    tell("rename", renameat_with(root, "one/file", root, "two/moved", RenameFlags::NOREPLACE));
    tell("unlink", unlinkat(root, "two/old", AtFlags::empty()));
    // A handle is what a server keeps of a directory.
    let two = open_beneath(root, "two", OFlags::PATH).unwrap();
    tell("by handle", open_beneath(&two, "old2", OFlags::RDONLY));
    tell("above", open_beneath(root, "../secret", OFlags::RDONLY));
    tell("above a handle", open_beneath(&two, "../../secret", OFlags::RDONLY));
    tell("by a link", open_beneath(root, "out", OFlags::RDONLY));
    tell("by a path", open(place.join("secret"), OFlags::RDONLY, Mode::empty()));
    tell("by a leak", open_beneath(&beside, "secret", OFlags::RDONLY));
}

/// A directory with a share in it, and something beside that.
fn place(name: &str) -> Scratch {
    let scratch = Scratch::new(name);
    let path = |name: &str| scratch.0.join(name);
    for directory in ["share", "share/one", "share/two"] {
        fs::create_dir(path(directory)).unwrap();
    }
    for file in ["secret", "share/one/file", "share/two/old", "share/two/old2"] {
        fs::write(path(file), "words").unwrap();
    }
    symlink(path("secret"), path("share/out")).unwrap();
    scratch
}

/// What is outside stays there, however it is tried.
const OUTSIDE: [&str; 5] =
    ["above: ENOENT", "above a handle: ENOENT", "by a link: ENOENT", "by a path: ENOENT", "by a leak: EACCES"];

#[test]
fn beneath_a_share_everything_can_be_done_and_beside_it_nothing() {
    let scratch = place("share");
    let said = play("share", &scratch.0);
    let expected = ["read: words", "list: done", "write: done", "create: done", "directory: done", "link: done", "rename: done"];
    assert_eq!(said[..7], expected);
    assert_eq!(said[7..9], ["unlink: done", "by handle: done"]);
    assert_eq!(said[9..14], OUTSIDE);
    let seen = |name: &str| scratch.0.join("share").join(name).exists();
    assert!(seen("three") && seen("one/new") && seen("two/moved") && seen("two/link") && !seen("two/old"));
}

#[test]
fn beneath_a_read_only_share_nothing_is_written() {
    let scratch = place("read-only");
    let said = play("read-only", &scratch.0);
    assert_eq!(said[..2], ["read: words", "list: done"]);
    assert_eq!(said[2..5], ["write: EROFS", "create: EROFS", "directory: EROFS"]);
    assert_eq!(said[5..9], ["link: EROFS", "rename: EROFS", "unlink: EROFS", "by handle: done"]);
    assert_eq!(said[9..14], OUTSIDE);
    assert_eq!(fs::read_to_string(scratch.0.join("share/one/file")).unwrap(), "words");
}

/// What is open without the right to read or write has to be opened again for that: by its number, in a mount of `/proc/self/fd` that
/// is attached nowhere either.
fn again(place: &Path) {
    let taken = detach(CWD, &place.join("share/one/file"), Detach::default()).unwrap();
    let beside = open(place.join("secret"), OFlags::PATH, Mode::empty()).unwrap();
    let own = detach(CWD, Path::new("/proc/self/fd"), Detach { read_only: true, submounts: false }).unwrap();
    let reach = [Reach { root: taken.root.as_fd(), access: Access::ReadWrite }];
    confined(&Needs { reach: &reach, ..Needs::default() }).unwrap();
    let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
    tell("beneath a file", open_beneath(&taken.root, "../file", OFlags::RDONLY));
    tell("without a path", open_beneath(&taken.root, "", OFlags::RDONLY));
    tell("by its number", open_beneath(&own.root, &number(&taken.root), OFlags::RDWR | OFlags::TRUNC));
    tell("a leak by its number", open_beneath(&own.root, &number(&beside), OFlags::RDONLY));
    tell("the process", open_beneath(&own.root, "../status", OFlags::PATH));
    tell("the system", open_beneath(&own.root, "../../uptime", OFlags::PATH));
}

#[test]
fn a_single_file_can_be_a_share_and_what_is_open_can_be_opened_again() {
    let scratch = place("again");
    let said = play("again", &scratch.0);
    assert_eq!(said[..3], ["beneath a file: ENOTDIR", "without a path: ENOENT", "by its number: done"]);
    assert_eq!(said[3..], ["a leak by its number: EACCES", "the process: ENOENT", "the system: ENOENT"]);
    assert_eq!(fs::read_to_string(scratch.0.join("share/one/file")).unwrap(), "");
}

fn submounts(place: &Path) {
    let (share, mounted) = (place.join("share"), place.join("share/one"));
    mount(c"test", &mounted, c"tmpfs", MountFlags::empty(), None).unwrap();
    File::create(mounted.join("on the mount")).unwrap().write_all(b"words").unwrap();
    let with = detach(CWD, &share, Detach { read_only: false, submounts: true }).unwrap();
    let there = open(&share, OFlags::PATH, Mode::empty()).unwrap();
    let without = detach(&there, Path::new(""), Detach { read_only: true, submounts: false }).unwrap();
    let reach = [&with, &without].map(|taken| Reach { root: taken.root.as_fd(), access: Access::ReadWrite });
    confined(&Needs { reach: &reach, ..Needs::default() }).unwrap();
    println!("- came along: {} {}", with.submounts, without.submounts);
    tell("a file on the mount", open_beneath(&with.root, "one/on the mount", OFlags::RDWR));
    tell("a new one", open_beneath(&with.root, "one/new", OFlags::RDWR | OFlags::CREATE));
    tell("the way up", open_beneath(&with.root, "one/../two/old", OFlags::RDWR));
    let across = openat2(&with.root, "one/on the mount", OFlags::RDONLY, Mode::empty(), ResolveFlags::NO_XDEV);
    tell("without stepping across", across);
    tell("what the mount hid", open_beneath(&without.root, "one/file", OFlags::RDONLY));
    tell("the mount", open_beneath(&without.root, "one/on the mount", OFlags::RDONLY));
}

#[test]
fn mounts_beneath_a_share_come_along_if_that_is_asked() {
    let scratch = place("submounts");
    let said = play("submounts", &scratch.0);
    assert_eq!(said[0], "came along: true false");
    assert_eq!(
        said[1..5],
        ["a file on the mount: done", "a new one: done", "the way up: done", "without stepping across: EXDEV"]
    );
    assert_eq!(said[5..], ["what the mount hid: done", "the mount: ENOENT"]);
}

fn locked() {
    let taken = detach(CWD, Path::new("/"), Detach { read_only: true, submounts: false }).unwrap();
    println!("- came along: {}", taken.submounts);
    let across = openat2(&taken.root, "proc/self/status", OFlags::PATH, Mode::empty(), ResolveFlags::NO_XDEV);
    tell("across", across);
}

#[test]
fn mounts_that_the_host_made_come_along_in_any_case_and_can_be_told() {
    assert_eq!(play("locked", Path::new("/")), ["came along: true", "across: EXDEV"]);
    if geteuid().is_root() {
        let without = play_as(Identity::Host, "locked", Path::new("/"));
        assert_eq!(without, ["came along: false", "across: ENOENT"], "who is not in a user namespace may look beneath mounts");
    }
}

/// Serves files in the name of user 5, and then of nobody in particular.
fn served(place: &Path) {
    let status = || File::open("/proc/thread-self/status").unwrap();
    let (before, after) = (status(), status());
    let limit = open(c"/proc/sys/user/max_user_namespaces", OFlags::RDONLY, Mode::empty()).unwrap();
    let taken = detach(CWD, &place.join("share"), Detach::default()).unwrap();
    let reach = [Reach { root: taken.root.as_fd(), access: Access::ReadWrite }];
    confined(&Needs { reach: &reach, ..Needs::default() }).unwrap();
    show(before, &["NoNewPrivs", "Groups", "CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"]);
    let five = Some(Uid::from_raw(5));
    tell("become 5", set_thread_res_uid(None, five, None));
    tell("create", open_beneath(&taken.root, "five", OFlags::RDWR | OFlags::CREATE));
    show(after, &["CapPrm", "CapEff"]);
    tell("become root again", set_thread_res_uid(None, Some(Uid::ROOT), None));
    tell("chown", rustix::fs::chownat(&taken.root, "five", Some(Uid::from_raw(6)), None, AtFlags::empty()));
    tell("what was not kept", rustix::process::chroot("/"));
    let mut text = String::new();
    File::from(limit).read_to_string(&mut text).unwrap();
    println!("- user namespaces: {}", text.trim());
}

const SERVED: [&str; 7] = [
    "NoNewPrivs: 1",
    "Groups:",
    "CapPrm: 0000000000000081",
    "CapEff: 0000000000000081",
    "CapBnd: 0000000000000000",
    "CapInh: 0000000000000000",
    "CapAmb: 0000000000000000",
];

/// A change of the effective user alone changes no capability: that is locked.
const ACTED: [&str; 7] = [
    "become 5: done",
    "create: done",
    "CapPrm: 0000000000000081",
    "CapEff: 0000000000000081",
    "become root again: done",
    "chown: done",
    "what was not kept: EPERM",
];

/// What a server in the place of others says, and whose the file is that it has made.
fn serve_as(identity: Identity, name: &str) -> (Vec<String>, u32) {
    let scratch = place(name);
    fs::set_permissions(scratch.0.join("share"), fs::Permissions::from_mode(0o777)).unwrap();
    let said = play_as(identity, "served", &scratch.0);
    (said, fs::metadata(scratch.0.join("share/five")).unwrap().uid())
}

#[test]
fn a_process_on_the_host_keeps_what_it_names_and_changes_nothing_of_the_host() {
    if !geteuid().is_root() {
        println!("For root only.");
        return;
    }
    let limit = || fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap();
    let before = limit();
    let (said, owner) = serve_as(Identity::Host, "host");
    assert_eq!(said[..7], SERVED);
    assert_eq!(said[7..14], ACTED);
    assert_eq!(said[14], format!("user namespaces: {}", before.trim()));
    assert_eq!((owner, limit()), (6, before));
}

#[test]
fn a_process_with_a_map_serves_in_the_name_of_whom_the_map_has() {
    let Some((identity, first, _)) = several() else { return };
    let (said, owner) = serve_as(identity, "mapped");
    assert_eq!(said[..7], SERVED);
    assert_eq!(said[7..14], ACTED);
    assert_eq!(said[14], "user namespaces: 0");
    assert_eq!(owner, first + 5);
}

/// These lines of what the kernel says of a thread, as they are now.
fn show(mut status: File, names: &[&str]) {
    let mut text = String::new();
    status.read_to_string(&mut text).unwrap();
    for name in names {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        println!("- {}", line.replace('\t', " ").trim());
    }
}

fn capabilities() {
    // Opened while there is a /proc; its words are those of the moment it is read.
    let status = || File::open("/proc/thread-self/status").unwrap();
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
    let (first, second, third) = (status(), status(), status());
    confined(&Needs { keep: Some(&[Capability::CAP_CHOWN]), ..Needs::default() }).unwrap();
    show(first, &sets);
    lower(&[Capability::CAP_CHOWN]).unwrap();
    show(second, &sets);
    raise(&[Capability::CAP_CHOWN]).unwrap();
    show(third, &sets);
    println!("- {}", raise(&[Capability::CAP_SETUID]).unwrap_err());
}

#[test]
fn a_process_keeps_the_capabilities_it_names_and_a_thread_can_lower_them() {
    let said = play("capabilities", Path::new("/"));
    let line = |name: &str, value: u64| format!("{name}: {value:016x}");
    let sets = |effective| {
        [("CapInh", 0), ("CapPrm", 1), ("CapEff", effective), ("CapBnd", 0), ("CapAmb", 0)].map(|(name, set)| line(name, set))
    };
    assert_eq!(said[..5], sets(1));
    assert_eq!(said[5..10], sets(0));
    assert_eq!(said[10..15], sets(1));
    assert_eq!(said[15..], ["Cannot change what a thread has in force of its capabilities"]);
}

#[test]
fn what_is_not_in_the_policy_cannot_be_kept() {
    let error = POLICY.kept(&Needs { keep: Some(&[Capability::CAP_SYS_ADMIN]), ..Needs::default() }).unwrap_err();
    assert_eq!(error.to_string(), "The policy does not leave the process CAP_SYS_ADMIN");
    assert_eq!(POLICY.kept(&Needs::default()).unwrap(), POLICY.capabilities);
}

fn descriptors() {
    let hard = getrlimit(Resource::Nofile).maximum.unwrap();
    let wanted = hard + 1;
    let refused = confined(&Needs { descriptors: Some(wanted), ..Needs::default() }).unwrap_err().to_string();
    println!(
        "- refused: {}",
        refused.starts_with(&format!("Cannot hold {wanted} descriptors, since the hard limit is {hard}; "))
    );
    let show = || println!("- {:?}", getrlimit(Resource::Nofile).maximum);
    limit_descriptors(POLICY.limits.descriptors + 8).unwrap();
    show();
    limit(&POLICY.limits, Some(POLICY.limits.descriptors + 3)).unwrap();
    show();
    limit(&POLICY.limits, Some(1)).unwrap();
    show();
}

#[test]
fn more_descriptors_can_be_had_up_to_the_hard_limit() {
    assert_eq!(play("descriptors", Path::new("/")), ["refused: true", "Some(72)", "Some(67)", "Some(64)"]);
}
