//! `--owner-map exact` for an ordinary user: the guest's users are the host's subordinate ids, which `newuidmap` and `newgidmap` give out.
//!
//! The tables that say who has which are this machine's; here are others over them, in a mount namespace that ends with the server.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown};
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use suite::virtiofsd::Virtiofsd;
use suite::{Ended, Scratch, program, run, status};

use super::mounted::{Mounted, can_mount};
use super::owners::{NOBODY, USER, by, error, make_all, owner};

/// The first subordinate id of a user, and how many there are. Groups have others.
const USERS: u32 = 700_000;
const GROUPS: u32 = 800_000;
const COUNT: u32 = 2000;

/// Names the user, and grants what is said. Then the server starts as that user, who finds programs along a path.
const SCRIPT: &str = r#"folder=$1 user=$2 path=$3
shift 3
cd "$folder"
{ cat /etc/passwd; echo "sharer:x:$user:$user::/:/bin/sh"; } > passwd
for table in passwd subuid subgid; do mount --bind $table /etc/$table; done
exec setpriv --reuid $user --regid $user --clear-groups env PATH="$path" "$0" --shared-dir "$folder/house" "$@"
"#;

/// A place where the user has a program, a directory, and room for a socket.
fn place(grants: [&str; 2]) -> Scratch {
    let scratch = Scratch::new();
    fs::copy(program("outboard-virtiofsd"), scratch.path("outboard-virtiofsd")).unwrap();
    fs::set_permissions(scratch.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    for folder in ["house", "sockets"] {
        fs::create_dir(scratch.path(folder)).unwrap();
        chown(scratch.path(folder), Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(scratch.path("house"), PermissionsExt::from_mode(0o777)).unwrap();
    for (table, text) in ["subuid", "subgid"].into_iter().zip(grants) {
        fs::write(scratch.path(table), text).unwrap();
    }
    scratch
}

/// What starts the server there, up to its socket.
fn command(scratch: &Scratch, path: &str, words: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", SCRIPT]).arg(scratch.path("outboard-virtiofsd"));
    command.arg(scratch.path("")).arg(USER.to_string()).arg(path).args(["--owner-map", "exact"]).args(words);
    command
}

fn granted() -> Scratch {
    // Others come first; and a table may have the number instead of the name.
    place([&format!("somebody:1:1\nsharer:{USERS}:{COUNT}\n"), &format!("{USER}:{GROUPS}:{COUNT}\n")])
}

/// Whether this host has the programs that give out subordinate ids.
fn can_map(test: &str) -> bool {
    let has = Path::new("/usr/bin/newuidmap").exists() && Path::new("/usr/bin/newgidmap").exists();
    if !has {
        println!("skipped: {test} needs newuidmap (package uidmap of Debian)");
    }
    has && can_mount(test)
}

fn serve(words: &[&str]) -> Mounted {
    let scratch = granted();
    let server = Virtiofsd::launch_ours(command(&scratch, PATH, words), scratch.path("sockets/fs.sock"));
    let worker = server.pid().as_raw_nonzero().get().cast_unsigned();
    assert_eq!(status(worker, "Uid"), [USER; 4].map(|id| id.to_string()).join("\t"));
    let socket = server.socket.clone();
    Mounted::of(scratch, &socket, Some(server), &[])
}

const PATH: &str = "/usr/bin:/bin";

/// The guest's root is the user; its user 1000 is the 1000th subordinate one.
const GUESTS: (u32, u32) = (USERS + 999, GROUPS + 999);

#[test]
fn a_guests_users_are_the_subordinate_ids_of_who_shares() {
    if !can_map("subordinate ids") {
        return;
    }
    let mut mounted = serve(&[]);
    let own = |name: &str| owner(&mounted.house.join(name));
    let seen = |name: &str| owner(&mounted.seen.join(name));
    for made in make_all(&mounted.seen).unwrap() {
        let there = mounted.house.join(made.file_name().unwrap());
        assert_eq!((owner(&made), owner(&there)), ((0, 0), (USER, USER)), "{}", made.display());
    }
    assert_eq!(by(1000, &["touch"], &mounted.seen.join("of 1000")).code, Some(0));
    assert_eq!(by(1000, &["mkdir"], &mounted.seen.join("folder of 1000")).code, Some(0));
    for name in ["of 1000", "folder of 1000"] {
        assert_eq!((seen(name), own(name)), ((1000, 1000), GUESTS), "{name}");
    }
    // The first and the last there is.
    for (id, user, group) in [(1, USERS, GROUPS), (COUNT, USERS + COUNT - 1, GROUPS + COUNT - 1)] {
        let name = format!("of {id}");
        assert_eq!(by(id, &["touch"], &mounted.seen.join(&name)).code, Some(0));
        assert_eq!((seen(&name), own(&name)), ((id, id), (user, group)));
    }
    // What this host gives to somebody.
    for (name, user, group, shown) in [
        ("mine", USER, USER, (0, 0)),
        ("theirs", GUESTS.0, GUESTS.1, (1000, 1000)),
        ("a user's of another group", GUESTS.0, GUESTS.0, (1000, NOBODY)),
        ("a stranger's", 4321, 4321, (NOBODY, NOBODY)),
        ("root's", 0, 0, (NOBODY, NOBODY)),
    ] {
        fs::write(mounted.house.join(name), name).unwrap();
        chown(mounted.house.join(name), Some(user), Some(group)).unwrap();
        assert_eq!(seen(name), shown, "{name}");
        assert_eq!(fs::read_to_string(mounted.seen.join(name)).unwrap(), name);
    }
    mounted.unmount();
}

#[test]
fn owners_are_changed_among_those_that_there_are() {
    if !can_map("owners among subordinate ids") {
        return;
    }
    let mut mounted = serve(&[]);
    let (here, there) = mounted.both("file");
    fs::write(&here, "root's").unwrap();
    fs::set_permissions(&here, PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(by(1000, &["cat"], &here).code, Some(1));
    chown(&here, Some(1000), Some(7)).unwrap();
    assert_eq!((owner(&here), owner(&there)), ((1000, 7), (GUESTS.0, GROUPS + 6)));
    assert_eq!(by(1000, &["cat"], &here).out, "root's");
    std::os::unix::fs::symlink("file", mounted.seen.join("link")).unwrap();
    lchown(mounted.seen.join("link"), Some(5), Some(0)).unwrap();
    assert_eq!(owner(&mounted.house.join("link")), (USERS + 4, USER));
    chown(&here, Some(0), Some(0)).unwrap();
    assert_eq!((owner(&here), owner(&there)), ((0, 0), (USER, USER)));
    // Nobody here: the host has no such user for this guest.
    for id in [COUNT + 1, NOBODY, USERS] {
        assert_eq!(error(chown(&here, Some(id), None)), Some(libc::EINVAL), "{id}");
        assert_eq!(error(chown(&here, None, Some(id))), Some(libc::EINVAL), "{id}");
        let ended = by(id, &["touch"], &mounted.seen.join("never"));
        assert!(ended.code == Some(1) && ended.err.contains("Operation not permitted"), "{id}: {}", ended.err);
    }
    assert!(!mounted.house.join("never").exists() && owner(&there) == (USER, USER));
    // A stranger's file stays a stranger's, whatever the guest's root does.
    fs::write(mounted.house.join("stranger's"), "x").unwrap();
    chown(mounted.house.join("stranger's"), Some(4321), Some(4321)).unwrap();
    let stranger = mounted.seen.join("stranger's");
    assert_eq!(error(chown(&stranger, Some(0), Some(0))), Some(libc::EPERM));
    assert_eq!(error(fs::set_permissions(&stranger, PermissionsExt::from_mode(0o777))), Some(libc::EPERM));
    assert_eq!(error(fs::write(&stranger, "mine")), Some(libc::EACCES));
    // What a guest's user has kept to himself the guest's root reads all the same; this host's user could not.
    let (kept, _) = mounted.both("kept");
    assert_eq!(by(1000, &["sh", "-c", "umask 077; echo secret > \"$0\""], &kept).code, Some(0));
    assert_eq!(fs::read_to_string(&kept).unwrap(), "secret\n");
    assert_eq!(by(USER, &["cat"], &mounted.house.join("kept")).code, Some(1));
    let device = rustix::fs::mknodat(CWD, mounted.seen.join("device"), FileType::CharacterDevice, Mode::RUSR, 0x103);
    assert_eq!(device, Err(Errno::PERM));
    mounted.unmount();
}

/// What is missing is said in one line, with what to do about it.
#[test]
fn what_is_missing_for_subordinate_ids_is_said() {
    if !can_mount("what is missing for subordinate ids") {
        return;
    }
    let start = |scratch: &Scratch, path: &str| -> Ended {
        run(command(scratch, path, &[]).arg("--socket-path").arg(scratch.path("sockets/fs.sock")))
    };
    let begins = "outboard-virtiofsd: ";
    for (scratch, path, said) in [
        (granted(), "/nowhere", "newuidmap, which is not in PATH; install it (package uidmap of Debian)"),
        (place(["", ""]), PATH, "/etc/subuid grants no subordinate ids to user 1234: add some with usermod --add-subuids"),
        (
            place(["sharer:1:1\n", "root:1:1\n"]),
            PATH,
            "/etc/subgid grants no subordinate ids to user 1234: add some with usermod",
        ),
    ] {
        let ended = start(&scratch, path);
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        assert!(ended.err.starts_with(begins) && ended.err.contains(said), "{}", ended.err);
        assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
    }
}
