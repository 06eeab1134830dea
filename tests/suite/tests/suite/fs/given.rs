//! A directory that is handed in, and what only the file system of the host knows of its files.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use suite::virtiofsd::{Virtiofsd, Whose};
use suite::{Scratch, disktools, program, run};

use super::mapped::map;
use super::mounted::{Mounted, can_mount, in_each_mode, serve};
use super::owners::{NOBODY, USER, by, error, make_all, owner};

/// Whoever starts the server may have a descriptor of the directory, and no path.
#[test]
fn a_directory_comes_as_a_descriptor() {
    if !can_mount("a directory that is handed in") {
        return;
    }
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    fs::write(house.join("file"), "there").unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec 9<\"$1\" \"$0\" --shared-fd 9 \"$2\" \"$3\"", program("outboard-virtiofsd").to_str().unwrap()]);
    // What follows is the socket, with its flag.
    command.arg(&house);
    let server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
    let socket = server.socket.clone();
    let mut mounted = Mounted::of(scratch, &socket, Some(server), &[]);
    assert_eq!(fs::read(mounted.seen.join("file")).unwrap(), b"there");
    fs::create_dir(mounted.seen.join("new")).unwrap();
    fs::rename(mounted.seen.join("file"), mounted.seen.join("new/file")).unwrap();
    assert!(house.join("new/file").exists());
    mounted.unmount();
}

/// Flags of a file, which programs set with `chattr`, are those of the file here; what takes a right that the server does not have is refused.
#[test]
fn flags_of_files_and_directories() {
    in_each_mode("flags of files", |mounted| {
        let (here, there) = mounted.both("flagged");
        File::create(&there).unwrap();
        fs::create_dir(mounted.house.join("folder")).unwrap();
        let tool = |name: &str, words: &[&str], path: &Path| run(Command::new(name).args(words).arg(path));
        if tool("chattr", &["+d"], &there).code != Some(0) {
            return println!("This file system has no flags.");
        }
        assert_eq!(tool("chattr", &["+A"], &here).code, Some(0));
        for (path, words) in [(&here, &["-l"][..]), (&there, &["-l"]), (&mounted.seen.join("folder"), &["-d", "-l"])] {
            let told = tool("lsattr", words, path);
            assert_eq!(told.code, Some(0), "{}", told.err);
            let flagged = told.out.contains("No_Dump") && told.out.contains("No_Atime");
            assert_eq!(flagged, !path.ends_with("folder"), "{}", told.out);
        }
        let refused = tool("chattr", &["+i"], &here);
        assert!(refused.code != Some(0) && refused.err.contains("not permitted"), "{}", refused.err);
        fs::write(&here, "it can still be written").unwrap();
    });
}

/// A server of a new directory as a detached mount: user 1234 of this host is root there, and 2000 to 2009 are 1000 to 1009.
fn mapped(read_only: bool, words: &[&str]) -> Mounted {
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    chown(&house, Some(USER), Some(USER)).unwrap();
    fs::set_permissions(&house, PermissionsExt::from_mode(0o777)).unwrap();
    // The server starts with that copy alone.
    let serve = r#"exec @rest, "--shared-fd", $mount or die"#;
    let mut command = map(&house, &format!("{USER} 0 1\n2000 1000 10\n"), read_only, serve);
    command.arg(program("outboard-virtiofsd")).args(words);
    let server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
    let socket = server.socket.clone();
    Mounted::of(scratch, &socket, Some(server), &[])
}

#[test]
fn a_mount_with_other_owners_is_handed_in() {
    if !can_mount("a mount with ids mapped") {
        return;
    }
    for words in [
        &[][..],
        &["--inode-file-handles", "mandatory"],
        &["--cache", "always", "--writeback", "--posix-acl"],
        &["--uid-map", ":0:0:65536:", "--gid-map", ":0:0:65536:"],
    ] {
        let mut mounted = mapped(false, words);
        let seen = |name: &str| owner(&mounted.seen.join(name));
        let own = |name: &str| owner(&mounted.house.join(name));
        for (name, user, shown) in [("mine", USER, 0), ("theirs", 2003, 1003), ("root's", 0, NOBODY), ("none's", 1003, NOBODY)] {
            fs::write(mounted.house.join(name), name).unwrap();
            chown(mounted.house.join(name), Some(user), Some(user)).unwrap();
            assert_eq!(seen(name), (shown, shown), "{words:?} {name}");
            assert_eq!(fs::read_to_string(mounted.seen.join(name)).unwrap(), name);
        }
        for made in make_all(&mounted.seen).unwrap() {
            let there = mounted.house.join(made.file_name().unwrap());
            assert_eq!((owner(&made), owner(&there)), ((0, 0), (USER, USER)), "{}", made.display());
        }
        assert_eq!(by(1004, &["mkdir"], &mounted.seen.join("folder of 1004")).code, Some(0));
        assert_eq!(by(1004, &["sh", "-c", "echo x > \"$0\""], &mounted.seen.join("of 1004")).code, Some(0));
        assert_eq!([seen("of 1004"), own("of 1004"), own("folder of 1004")], [(1004, 1004), (2004, 2004), (2004, 2004)]);
        // What is given away, and back.
        let made = mounted.seen.join("made");
        chown(&made, Some(1009), Some(0)).unwrap();
        assert_eq!((seen("made"), own("made")), ((1009, 0), (2009, USER)));
        chown(&made, Some(0), Some(1000)).unwrap();
        assert_eq!((seen("made"), own("made")), ((0, 1000), (USER, 2000)));
        // Who is nobody here.
        for id in [77, USER, 1010] {
            let ended = by(id, &["sh", "-c", "echo x > \"$0\""], &mounted.seen.join("never"));
            assert!(ended.code != Some(0) && !mounted.house.join("never").exists(), "{id}: {}", ended.err);
            assert_eq!(error(chown(&made, Some(id), None)), Some(libc::EOVERFLOW), "{id}");
        }
        // What is nobody's there the host's root may take, through such a mount as well, and so may a guest's root whose server is the
        // host's root. One that is root in a namespace only may not.
        for name in ["root's", "none's"] {
            let path = mounted.seen.join(name);
            let closed = fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).is_err();
            assert!(closed && fs::write(&path, "written").is_err(), "{words:?} {name}");
            let taken = chown(&path, Some(0), Some(0)).is_ok();
            assert_eq!((taken, own(name) == (USER, USER)), (!words.contains(&"--uid-map"), taken), "{words:?} {name}");
        }
        mounted.unmount();
        assert_eq!(fs::read_to_string(mounted.house.join("root's")).unwrap(), "root's");
    }
}

/// Whoever made it read-only decides, whatever the server was told.
#[test]
fn a_mount_that_cannot_be_written_is_handed_in() {
    if !can_mount("a mount that is read-only") {
        return;
    }
    for words in [&[][..], &["--readonly"], &["--cache", "always", "--writeback"]] {
        let mut mounted = mapped(true, words);
        fs::write(mounted.house.join("file"), "content").unwrap();
        chown(mounted.house.join("file"), Some(USER), Some(USER)).unwrap();
        let file = mounted.seen.join("file");
        assert_eq!((fs::read_to_string(&file).unwrap(), owner(&file)), ("content".to_owned(), (0, 0)));
        for refused in [
            fs::write(&file, "other"),
            fs::create_dir(mounted.seen.join("folder")),
            fs::remove_file(&file),
            fs::rename(&file, mounted.seen.join("renamed")),
            chown(&file, Some(1000), None),
            fs::set_permissions(&file, PermissionsExt::from_mode(0o777)),
            fs::File::open(&file).and_then(|open| open.set_modified(std::time::SystemTime::UNIX_EPOCH)),
        ] {
            assert_eq!(error(refused), Some(libc::EROFS), "{words:?}");
        }
        mounted.unmount();
        assert_eq!(fs::read_to_string(mounted.house.join("file")).unwrap(), "content");
    }
}

/// A file system with projects, until it is dropped.
struct Projects(PathBuf);

impl Projects {
    /// Of the kinds that this host may have, the one whose projects need no more than the file system itself.
    fn new(scratch: &Scratch) -> Option<Projects> {
        let (image, folder) = (scratch.path("image"), scratch.path("house"));
        File::create(&image).unwrap().set_len(320 << 20).unwrap();
        fs::create_dir(&folder).unwrap();
        let made = run(disktools::tool("mkfs.xfs").arg("-q").arg(&image));
        assert_eq!(made.code, Some(0), "{}", made.err);
        let mounted = run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&folder));
        if mounted.code != Some(0) {
            println!("skipped: projects of files need loop devices and XFS: {}", mounted.err);
        }
        (mounted.code == Some(0)).then_some(Projects(folder))
    }
}

impl Drop for Projects {
    fn drop(&mut self) {
        let _unmounted = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

/// Projects, by which file systems count what belongs together, are those of the file here: set on either side, inherited, and a border that no
/// name crosses. Only root may set them, as on the host itself.
#[test]
fn projects_of_files() {
    if !can_mount("projects of files") {
        return;
    }
    for words in [&[][..], &["--cache", "always", "--writeback"], &["--owner-map", "me"]] {
        let scratch = Scratch::new();
        let Some(house) = Projects::new(&scratch) else { return };
        let (server, _) = serve(Whose::Ours, &scratch, words);
        let socket = server.socket.clone();
        let mut mounted = Mounted::of(scratch, &socket, Some(server), &[]);
        let (here, there) = mounted.both("project");
        fs::create_dir(&here).unwrap();
        let tool = |name: &str, words: &[&str], path: &Path| run(Command::new(name).args(words).arg(path));
        let project = |path: &Path| {
            let told = tool("lsattr", &["-d", "-p"], path);
            assert_eq!(told.code, Some(0), "{}", told.err);
            let mut told = told.out.split_whitespace();
            (told.next().unwrap().parse::<u32>().unwrap(), told.next().unwrap().contains('P'))
        };
        assert_eq!((project(&here), project(&there)), ((0, false), (0, false)), "{words:?}");
        let set = [tool("chattr", &["-p", "42"], &here), tool("chattr", &["+P"], &here)];
        if words.contains(&"me") {
            assert!(set.iter().all(|set| set.code != Some(0)) && project(&there) == (0, false), "{}", set[0].out);
        } else {
            assert!(set.iter().all(|set| set.code == Some(0)), "{}{}", set[0].err, set[1].err);
            assert_eq!((project(&here), project(&there)), ((42, true), (42, true)), "{words:?}");
            fs::write(here.join("file"), "inherits").unwrap();
            fs::create_dir(here.join("folder")).unwrap();
            assert_eq!([here.join("file"), there.join("file")].map(|path| project(&path)), [(42, false); 2]);
            assert_eq!(project(&here.join("folder")), (42, true));
            // Set on the host, and without a file that is open.
            assert_eq!(tool("chattr", &["-p", "4294967294"], &there.join("file")).code, Some(0));
            assert_eq!(project(&here.join("file")), (4_294_967_294, false));
            fs::write(mounted.seen.join("outside"), "x").unwrap();
            let linked = fs::hard_link(mounted.seen.join("outside"), here.join("inside"));
            assert_eq!(error(linked), Some(libc::EXDEV));
            let moved = run(Command::new("mv").arg(mounted.seen.join("outside")).arg(&here));
            assert_eq!((moved.code, project(&there.join("outside"))), (Some(0), (42, false)), "{}", moved.err);
        }
        mounted.unmount();
        drop(house);
    }
}
