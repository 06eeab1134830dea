//! Whose files are whose, where an ordinary user shares a directory; and a directory in which nothing can be changed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timestamps, XattrFlags};
use rustix::io::Errno;
use suite::virtiofsd::Virtiofsd;
use suite::{Ended, Scratch, program, run, status};

use super::mounted::{Mounted, can_mount};

/// Who shares.
pub(super) const USER: u32 = 1234;

/// Somebody else of the host, and what such a one is in a guest.
const OTHER: u32 = 4321;
pub(super) const NOBODY: u32 = 65534;

/// A directory of an ordinary user, who serves it, mounted by root.
pub(super) fn of_a_user(words: &[&str]) -> Mounted {
    let scratch = Scratch::new();
    let (place, house, copy) = (scratch.path("of the user"), scratch.path("house"), scratch.path("outboard-virtiofsd"));
    // The program may be where only its builder can go.
    fs::copy(program("outboard-virtiofsd"), &copy).unwrap();
    fs::set_permissions(scratch.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    for folder in [&place, &house] {
        fs::create_dir(folder).unwrap();
        chown(folder, Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(&house, PermissionsExt::from_mode(0o777)).unwrap();
    let user = USER.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]).arg(copy).arg("--shared-dir").arg(&house).args(words);
    let server = Virtiofsd::launch_ours(command, place.join("fs.sock"));
    let worker = server.pid().as_raw_nonzero().get().cast_unsigned();
    assert_eq!(status(worker, "Uid"), [USER; 4].map(|id| id.to_string()).join("\t"));
    let socket = server.socket.clone();
    Mounted::of(scratch, &socket, Some(server), &[])
}

pub(super) fn owner(path: &Path) -> (u32, u32) {
    let about = fs::symlink_metadata(path).unwrap();
    (about.uid(), about.gid())
}

/// A command as another user of this machine.
pub(super) fn by(user: u32, words: &[&str], path: &Path) -> Ended {
    let user = user.to_string();
    run(Command::new("setpriv").args(["--reuid", &user, "--regid", &user, "--clear-groups"]).args(words).arg(path))
}

pub(super) fn error<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Files of the user and of somebody else.
fn furnish(house: &Path) {
    for (name, user) in [("mine", USER), ("others", OTHER), ("roots", 0)] {
        fs::write(house.join(name), name).unwrap();
        chown(house.join(name), Some(user), Some(user)).unwrap();
    }
}

/// Makes one of each kind as whoever runs the test, which is root, and gives their paths.
pub(super) fn make_all(seen: &Path) -> io::Result<Vec<PathBuf>> {
    let names = ["made", "made folder", "made link", "made pipe"].map(|name| seen.join(name));
    fs::write(&names[0], "x")?;
    fs::create_dir(&names[1])?;
    symlink("made", &names[2])?;
    rustix::fs::mknodat(CWD, &names[3], FileType::Fifo, Mode::RUSR, 0)?;
    Ok(names.to_vec())
}

#[test]
fn a_users_files_are_the_guests_roots() {
    if !can_mount("an ordinary user's directory") {
        return;
    }
    let mut mounted = of_a_user(&[]);
    furnish(&mounted.house);
    let seen = |name: &str| owner(&mounted.seen.join(name));
    assert_eq!(([seen("mine"), seen(".")], [seen("others"), seen("roots")]), ([(0, 0); 2], [(NOBODY, NOBODY); 2]));
    for made in make_all(&mounted.seen).unwrap() {
        let own = mounted.house.join(made.file_name().unwrap());
        assert_eq!((owner(&made), owner(&own)), ((0, 0), (USER, USER)), "{}", made.display());
    }
    let made = mounted.seen.join("made");
    for id in [5, USER, NOBODY] {
        assert_eq!(error(chown(&made, Some(id), None)), Some(libc::EPERM));
        assert_eq!(error(chown(&made, None, Some(id))), Some(libc::EPERM));
        assert_eq!(error(lchown(mounted.seen.join("made link"), Some(id), Some(id))), Some(libc::EPERM));
    }
    chown(&made, Some(0), Some(0)).unwrap();
    fs::set_permissions(&made, PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(fs::metadata(mounted.house.join("made")).unwrap().mode() & 0o7777, 0o600);
    // Another's are another's, also for the guest's root.
    assert_eq!(error(fs::set_permissions(mounted.seen.join("others"), PermissionsExt::from_mode(0o600))), Some(libc::EPERM));
    assert_eq!(error(OpenOptions::new().write(true).open(mounted.seen.join("roots"))), Some(libc::EACCES));
    assert_eq!(fs::read_to_string(mounted.seen.join("others")).unwrap(), "others");
    // A user of the guest who is nobody here makes nothing, and may read what all may.
    let ended = by(77, &["touch"], &mounted.seen.join("of 77"));
    assert!(ended.code == Some(1) && ended.err.contains("Operation not permitted"), "{}", ended.err);
    assert!(!mounted.house.join("of 77").exists());
    assert_eq!(by(77, &["cat"], &mounted.seen.join("mine")).out, "mine");
    assert_eq!(by(77, &["cat"], &made).code, Some(1), "it is the guest's root's alone");
    // Who owns a file does what its permissions do not let him, as root does everywhere.
    fs::set_permissions(&made, PermissionsExt::from_mode(0o0)).unwrap();
    fs::write(&made, "written all the same").unwrap();
    assert_eq!(fs::read_to_string(&made).unwrap(), "written all the same");
    let device = rustix::fs::mknodat(CWD, mounted.seen.join("device"), FileType::CharacterDevice, Mode::RUSR, 0x103);
    assert_eq!(device, Err(Errno::PERM));
    fs::remove_file(mounted.seen.join("others")).unwrap();
    assert!(!mounted.house.join("others").exists(), "the directory is the user's");
    mounted.unmount();
}

#[test]
fn a_users_files_are_another_one_users_of_the_guest() {
    if !can_mount("--owner-map me=1000") {
        return;
    }
    let mut mounted = of_a_user(&["--owner-map", "me=1000"]);
    furnish(&mounted.house);
    let seen = |name: &str| owner(&mounted.seen.join(name));
    assert_eq!((seen("mine"), seen("others"), seen("roots")), ((1000, 1000), (NOBODY, NOBODY), (NOBODY, NOBODY)));
    assert_eq!(by(1000, &["touch"], &mounted.seen.join("of 1000")).code, Some(0));
    assert_eq!((seen("of 1000"), owner(&mounted.house.join("of 1000"))), ((1000, 1000), (USER, USER)));
    assert_eq!(by(1000, &["mkdir"], &mounted.seen.join("folder of 1000")).code, Some(0));
    for user in [0, 77] {
        assert!(by(user, &["touch"], &mounted.seen.join("never")).err.contains("Operation not permitted"), "{user}");
    }
    assert_eq!(error(make_all(&mounted.seen)), Some(libc::EPERM));
    assert!(!mounted.house.join("never").exists() && !mounted.house.join("made").exists());
    assert_eq!(error(chown(mounted.seen.join("mine"), Some(0), Some(0))), Some(libc::EPERM));
    mounted.unmount();
}

#[test]
fn everybodys_files_are_one_users_of_the_guest() {
    if !can_mount("--owner-map squash=7") {
        return;
    }
    let mut mounted = of_a_user(&["--owner-map", "squash=7"]);
    furnish(&mounted.house);
    let seen = |name: &str| owner(&mounted.seen.join(name));
    assert_eq!([seen("mine"), seen("others"), seen("roots")], [(7, 7); 3]);
    for (user, name) in [(77, "of 77"), (7, "of 7"), (0, "of 0")] {
        // Who made it is not who owns it, and may not set its times: touch would say so.
        let ended = by(user, &["sh", "-c", "echo x > \"$0\""], &mounted.seen.join(name));
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{name}");
        assert_eq!((seen(name), owner(&mounted.house.join(name))), ((7, 7), (USER, USER)), "{name}");
    }
    for made in make_all(&mounted.seen).unwrap() {
        assert_eq!((owner(&made), owner(&mounted.house.join(made.file_name().unwrap()))), ((7, 7), (USER, USER)));
    }
    mounted.unmount();
}

/// Whoever runs the server as root shares each file as whose it is, and a guest's users make files as themselves.
#[test]
fn roots_directory_has_the_hosts_owners() {
    if !can_mount("root's directory") {
        return;
    }
    let mut mounted = Mounted::ours(&[], &[]);
    furnish(&mounted.house);
    fs::set_permissions(&mounted.house, PermissionsExt::from_mode(0o777)).unwrap();
    let seen = |name: &str| owner(&mounted.seen.join(name));
    assert_eq!((seen("mine"), seen("others"), seen("roots")), ((USER, USER), (OTHER, OTHER), (0, 0)));
    assert_eq!(by(77, &["touch"], &mounted.seen.join("of 77")).code, Some(0));
    assert_eq!((seen("of 77"), owner(&mounted.house.join("of 77"))), ((77, 77), (77, 77)));
    // What is made in a directory with the set-group-id bit has the directory's group, and keeps no such bit of a stranger's.
    let (here, there) = mounted.both("shared");
    fs::create_dir(&here).unwrap();
    chown(&here, Some(0), Some(500)).unwrap();
    fs::set_permissions(&here, PermissionsExt::from_mode(0o2777)).unwrap();
    assert_eq!(
        by(77, &["sh", "-c", "umask 0; cp /bin/true \"$0/file\"; chmod 2755 \"$0/file\"; mkdir \"$0/folder\""], &here).code,
        Some(0)
    );
    assert_eq!((owner(&there.join("file")), owner(&there.join("folder"))), ((77, 500), (77, 500)));
    let mode = |name: &str| fs::metadata(there.join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("file"), mode("folder")), (0o755, 0o2777));
    mounted.unmount();
}

/// Bits that give a program its file's owner's rights do not outlive a change of the file, whoever makes it.
#[test]
fn a_changed_program_does_not_run_as_its_owner() {
    if !can_mount("set-user-id bits") {
        return;
    }
    for words in
        [&[][..], &["--killpriv-v2"], &["--cache", "never"], &["--cache", "always", "--writeback"], &["--xattr", "--killpriv-v2"]]
    {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("program");
        let changes: [(&str, &[&str]); 4] = [
            ("written", &["sh", "-c", "echo x >> \"$0\""]),
            ("emptied", &["sh", "-c", ": > \"$0\""]),
            ("shortened", &["truncate", "-s", "3"]),
            ("allocated", &["fallocate", "-l", "9999"]),
        ];
        for (what, change) in changes {
            fs::write(&there, "a program").unwrap();
            chown(&there, Some(0), Some(0)).unwrap();
            fs::set_permissions(&there, PermissionsExt::from_mode(0o6777)).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(if words.is_empty() { 1100 } else { 0 }));
            let (here, there) = if words.contains(&"always") {
                // The guest is not told of what the host does: it does it itself.
                fs::remove_file(&there).unwrap();
                let here = mounted.seen.join(what);
                fs::write(&here, "a program").unwrap();
                fs::set_permissions(&here, PermissionsExt::from_mode(0o6777)).unwrap();
                (here, mounted.house.join(what))
            } else {
                (here.clone(), there.clone())
            };
            let ended = by(77, change, &here);
            assert_eq!(ended.code, Some(0), "{words:?} {what}: {}", ended.err);
            run(Command::new("sync").arg(&here));
            assert_eq!(fs::metadata(&there).unwrap().mode() & 0o7777, 0o777, "{words:?} {what}");
        }
        mounted.unmount();
    }
}

/// Everything that would change it is refused as a read-only file system refuses it.
#[test]
fn nothing_can_be_changed() {
    if !can_mount("--readonly") {
        return;
    }
    let mut mounted = Mounted::ours(&["--readonly", "--xattr"], &[]);
    let house = &mounted.house;
    fs::create_dir(house.join("folder")).unwrap();
    fs::write(house.join("file"), "content").unwrap();
    symlink("file", house.join("link")).unwrap();
    let [file, folder, new] = ["file", "folder", "new"].map(|name| mounted.seen.join(name));
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    assert_eq!(fs::read_dir(&mounted.seen).unwrap().count(), 3);
    let flags = |flags: OFlags| i32::try_from(flags.bits()).unwrap();
    let refused: Vec<(&str, Option<i32>)> = vec![
        ("write", error(OpenOptions::new().write(true).open(&file))),
        ("both", error(OpenOptions::new().read(true).write(true).open(&file))),
        ("append", error(OpenOptions::new().append(true).open(&file))),
        ("O_TRUNC", error(rustix::fs::open(&file, OFlags::RDONLY | OFlags::TRUNC, Mode::empty()).map_err(Into::into))),
        ("O_CREAT", error(File::create(&new))),
        ("O_CREAT to read", error(OpenOptions::new().read(true).custom_flags(flags(OFlags::CREATE)).open(&new))),
        ("O_TMPFILE", error(OpenOptions::new().write(true).custom_flags(flags(OFlags::TMPFILE)).open(&folder))),
        ("mkdir", error(fs::create_dir(&new))),
        ("mknod", error(rustix::fs::mknodat(CWD, &new, FileType::Fifo, Mode::RUSR, 0).map_err(Into::into))),
        ("symlink", error(symlink("x", &new))),
        ("link", error(fs::hard_link(&file, &new))),
        ("unlink", error(fs::remove_file(&file))),
        ("rmdir", error(fs::remove_dir(&folder))),
        ("rename", error(fs::rename(&file, &new))),
        ("exchange", error(rustix::fs::renameat_with(CWD, &file, CWD, &folder, RenameFlags::EXCHANGE).map_err(Into::into))),
        ("chmod", error(fs::set_permissions(&file, PermissionsExt::from_mode(0o600)))),
        ("chown", error(chown(&file, Some(1), Some(1)))),
        ("truncate", error(nix::unistd::truncate(&file, 1).map_err(Into::into))),
        ("utimes", error(now(&file).map_err(Into::into))),
        ("setxattr", error(rustix::fs::setxattr(&file, "user.x", b"x", XattrFlags::empty()).map_err(Into::into))),
        ("removexattr", error(rustix::fs::removexattr(&file, "user.x").map_err(Into::into))),
    ];
    let other: Vec<_> = refused.iter().filter(|(_, number)| *number != Some(libc::EROFS)).collect();
    assert!(other.is_empty(), "{other:?}");
    // What is there can be opened with O_CREAT as long as nothing has to be made.
    let open = OpenOptions::new().read(true).custom_flags(flags(OFlags::CREATE)).open(&file).unwrap();
    assert!(open.set_len(1).is_err() && open.write_at(b"x", 0).is_err());
    assert_eq!(fs::read_to_string(mounted.house.join("link")).unwrap(), "content");
    assert_eq!(fs::read_dir(&mounted.house).unwrap().count(), 3);
    drop(open);
    mounted.unmount();
}

fn now(path: &Path) -> rustix::io::Result<()> {
    let time = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 };
    rustix::fs::utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::empty())
}
