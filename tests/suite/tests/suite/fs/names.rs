//! Names and what hangs on them: their lengths and bytes, links, extended attributes and access control lists.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{
    Mode, OFlags, XattrFlags, getxattr, lgetxattr, llistxattr, lremovexattr, lsetxattr, mkdirat, open, openat, setxattr,
};
use rustix::io::Errno;
use suite::run;

use super::mounted::{Mounted, can_mount, in_each_mode};

#[test]
fn names_of_any_bytes_and_of_any_length() {
    in_each_mode("names", |mounted| {
        let long = vec![b'n'; 255];
        let names: [&[u8]; 6] = [&long, b"\xff\xfe not text \x80", b"a\nb\tc", b"-", b"...", "Übergröße 名".as_bytes()];
        for name in names {
            let (here, there) = mounted.both(OsStr::from_bytes(name));
            fs::write(&here, name).unwrap();
            assert_eq!(fs::read(&there).unwrap(), name);
            let listed: Vec<_> = fs::read_dir(&mounted.seen).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(listed, [OsStr::from_bytes(name)]);
            let (moved, _) = mounted.both("moved");
            fs::rename(&here, &moved).unwrap();
            fs::rename(&moved, &here).unwrap();
            fs::remove_file(&here).unwrap();
        }
        let too_long = mounted.seen.join(OsStr::from_bytes(&[b'n'; 256]));
        for error in [
            fs::write(&too_long, "").err(),
            fs::create_dir(&too_long).err(),
            symlink("x", &too_long).err(),
            fs::metadata(&too_long).err(),
        ] {
            assert_eq!(error.and_then(|error| error.raw_os_error()), Some(libc::ENAMETOOLONG));
        }
    });
}

#[test]
fn links_to_anywhere() {
    in_each_mode("symbolic links", |mounted| {
        let (here, there) = mounted.both("link");
        let targets = ["x".repeat(4095), "/etc/passwd".to_owned(), "../../outside".to_owned(), "nowhere".to_owned()];
        for target in targets {
            let natively = symlink(&target, mounted.house.join("natively"));
            assert_eq!(
                symlink(&target, &here).err().map(|error| error.raw_os_error()),
                natively.as_ref().err().map(|error| error.raw_os_error())
            );
            if natively.is_err() {
                println!("A link of {} bytes cannot be made here", target.len());
                continue;
            }
            assert_eq!([&here, &there].map(|path| fs::read_link(path).unwrap()), [Path::new(&target); 2]);
            assert_eq!(fs::symlink_metadata(&here).unwrap().len(), target.len() as u64);
            fs::remove_file(&here).unwrap();
            fs::remove_file(mounted.house.join("natively")).unwrap();
        }
        fs::write(mounted.seen.join("file"), "x").unwrap();
        symlink("file", &here).unwrap();
        fs::hard_link(&here, mounted.seen.join("second")).unwrap();
        assert_eq!(fs::symlink_metadata(mounted.house.join("second")).unwrap().nlink(), 2);
        assert_eq!(fs::read_to_string(mounted.seen.join("second")).unwrap(), "x");
    });
}

/// The directory at the end of a long way.
fn deep(top: &Path, make: bool) -> OwnedFd {
    let name = "d".repeat(200);
    let how = OFlags::RDONLY | OFlags::DIRECTORY;
    (0..40).fold(open(top, how, Mode::empty()).unwrap(), |folder, _| {
        if make {
            mkdirat(&folder, &*name, Mode::RWXU).unwrap();
        }
        openat(&folder, &*name, how, Mode::empty()).unwrap()
    })
}

#[test]
fn deeper_than_a_path_can_say() {
    in_each_mode("deep directories", |mounted| {
        let folder = deep(&mounted.seen, true);
        let file = openat(&folder, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        fs::File::from(file).write_all(b"deep").unwrap();
        for top in [&mounted.seen, &mounted.house] {
            let file = openat(deep(top, false), "file", OFlags::RDONLY, Mode::empty()).unwrap();
            assert_eq!(io::read_to_string(fs::File::from(file)).unwrap(), "deep");
        }
        drop(folder);
        let ended = run(Command::new("rm").args(["-r", &"d".repeat(200)]).current_dir(&mounted.seen));
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
        assert_eq!(fs::read_dir(&mounted.house).unwrap().count(), 0);
    });
}

/// As on the directory itself, but for what takes the right to administer this host (`trusted`, most of `security`): the server has it not.
#[test]
fn attributes_of_files_directories_and_links() {
    if !can_mount("extended attributes of all kinds") {
        return;
    }
    let mut mounted = Mounted::ours(&["--xattr"], &[]);
    for (name, number) in [("file", 0), ("folder", 1), ("link", 2), ("dead", 3)] {
        let (here, there) = mounted.both(name);
        match number {
            0 => fs::write(&here, "x").unwrap(),
            1 => fs::create_dir(&here).unwrap(),
            2 => symlink("file", &here).unwrap(),
            _ => symlink("nowhere", &here).unwrap(),
        }
        if number < 2 {
            lsetxattr(&here, "user.one", b"first", XattrFlags::CREATE).unwrap();
            assert_eq!(lsetxattr(&here, "user.one", b"x", XattrFlags::CREATE), Err(Errno::EXIST));
            assert_eq!(lsetxattr(&here, "user.two", b"x", XattrFlags::REPLACE), Err(Errno::NODATA));
            lsetxattr(&here, "user.one", b"", XattrFlags::REPLACE).unwrap();
            assert_eq!(lgetxattr(&there, "user.one", &mut [0u8; 10][..]), Ok(0));
            assert_eq!(lremovexattr(&here, "user.two"), Err(Errno::NODATA));
            lremovexattr(&here, "user.one").unwrap();
        } else {
            assert_eq!(lsetxattr(&here, "user.one", b"x", XattrFlags::empty()), Err(Errno::PERM));
        }
        for attribute in ["trusted.one", "security.one"] {
            // Those that the host has set can be read, as far as whoever has no right to administer it can read them.
            lsetxattr(&there, attribute, b"of the host", XattrFlags::empty()).unwrap();
            assert_eq!(lsetxattr(&here, attribute, b"x", XattrFlags::empty()), Err(Errno::PERM), "{name} {attribute}");
            let mut value = [0u8; 100];
            let got = lgetxattr(&here, attribute, &mut value[..]);
            assert_eq!(got, if attribute.starts_with("security") { Ok(11) } else { Err(Errno::NODATA) }, "{name} {attribute}");
        }
        let mut list = [0u8; 300];
        let len = llistxattr(&here, &mut list[..]).unwrap();
        let names = String::from_utf8_lossy(&list[..len]).into_owned();
        assert!(names.contains("security.one\0") && !names.contains("trusted."), "{names:?}");
    }
    let mut big = vec![7; 65_536];
    assert!(setxattr(mounted.seen.join("file"), "user.big", &[big.as_slice(), &[0]].concat(), XattrFlags::empty()).is_err());
    let [here, own] = ["file", "natively"].map(|name| mounted.both(name));
    fs::write(&own.1, "x").unwrap();
    let set = |path: &Path, value: &[u8]| setxattr(path, "user.big", value, XattrFlags::empty());
    for len in [65_536, 4096, 3000, 255] {
        big.truncate(len);
        assert_eq!(set(&here.0, &big), set(&own.1, &big), "{len}");
    }
    assert_eq!(getxattr(&here.0, "user.big", &mut [0u8; 100][..]), Err(Errno::RANGE));
    mounted.unmount();
    let mut mounted = Mounted::ours(&[], &[]);
    fs::write(mounted.seen.join("file"), "").unwrap();
    assert_eq!(setxattr(mounted.seen.join("file"), "user.one", b"x", XattrFlags::empty()), Err(Errno::OPNOTSUPP));
    mounted.unmount();
}

/// An access control list, as the kernel has it in an attribute: the owner, one more user, the group, the mask, others.
fn list(owner: u16, user: (u32, u16), group: u16, mask: u16, other: u16) -> Vec<u8> {
    let nobody = u32::MAX;
    let entries =
        [(0x01u16, owner, nobody), (0x02, user.1, user.0), (0x04, group, nobody), (0x10, mask, nobody), (0x20, other, nobody)];
    let entry = |(tag, rights, id): (u16, u16, u32)| [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat();
    [2u32.to_le_bytes().to_vec(), entries.into_iter().flat_map(entry).collect()].concat()
}

fn attribute(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = [0u8; 300];
    getxattr(path, name, &mut value[..]).map(|len| value[..len].to_vec())
}

/// What is made in a directory gets the directory's default list, and a list is what counts: as on the directory itself.
#[test]
fn lists_of_who_may_what() {
    const LIST: &str = "system.posix_acl_access";
    const DEFAULT: &str = "system.posix_acl_default";
    if !can_mount("access control lists") {
        return;
    }
    let mut mounted = Mounted::ours(&["--posix-acl", "--xattr"], &[]);
    let make = |top: &Path| -> Result<(), Errno> {
        let top = top.to_path_buf();
        fs::create_dir(&top).unwrap();
        fs::set_permissions(&top, PermissionsExt::from_mode(0o755)).unwrap();
        setxattr(&top, DEFAULT, &list(7, (1234, 5), 5, 7, 0), XattrFlags::empty())?;
        fs::write(top.join("file"), "for 1234").unwrap();
        fs::create_dir(top.join("folder")).unwrap();
        fs::write(top.join("folder/deeper"), "for nobody").unwrap();
        setxattr(top.join("folder/deeper"), LIST, &list(6, (1234, 0), 4, 4, 4), XattrFlags::empty())?;
        fs::write(top.join("chmodded"), "").unwrap();
        fs::set_permissions(top.join("chmodded"), PermissionsExt::from_mode(0o640)).unwrap();
        let plain = run(Command::new("sh").args(["-c", "umask 077; echo x > \"$1/umask\"; mkdir \"$1/masked\"", "sh"]).arg(&top));
        assert_eq!(plain.err, "");
        Ok(())
    };
    let (here, there) = mounted.both("lists");
    let own = mounted.house.join("natively");
    if make(&own).is_err() {
        println!("skipped: the folder's file system has no access control lists");
        return;
    }
    make(&here).unwrap();
    let all = ["", "file", "folder", "folder/deeper", "chmodded", "umask", "masked"].map(PathBuf::from);
    for name in &all {
        let about = |top: &Path| {
            let path = top.join(name);
            (fs::metadata(&path).unwrap().mode(), attribute(&path, LIST), attribute(&path, DEFAULT))
        };
        assert_eq!((about(&here), about(&there)), (about(&own), about(&own)), "{}", name.display());
    }
    let read = |top: &Path, name: &str| {
        let words = ["--reuid", "1234", "--regid", "1234", "--clear-groups", "cat"];
        run(Command::new("setpriv").args(words).arg(top.join(name))).code
    };
    for top in [&here, &there, &own] {
        assert_eq!((read(top, "file"), read(top, "folder/deeper")), (Some(0), Some(1)), "{}", top.display());
    }
    mounted.unmount();
}
