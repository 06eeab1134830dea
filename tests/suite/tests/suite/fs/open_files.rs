//! Files and directories that are open, or stood in, while their names change or go.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, linkat, open, openat, renameat_with};
use rustix::io::Errno;
use suite::counters::Counters;
use suite::run;

use super::mounted::{Mounted, can_mount, in_each_mode};

fn new_file(path: &PathBuf, bytes: &[u8]) -> File {
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn content(file: &File) -> String {
    let mut bytes = vec![0; 100];
    let len = file.read_at(&mut bytes, 0).unwrap();
    String::from_utf8(bytes[..len].to_vec()).unwrap()
}

#[test]
fn a_file_whose_name_is_gone() {
    in_each_mode("a file without a name", |mounted| {
        let (here, there) = mounted.both("file");
        let file = new_file(&here, b"0123456789");
        fs::remove_file(&here).unwrap();
        assert!(!there.exists());
        let about = file.metadata().unwrap();
        assert_eq!((about.nlink(), about.len()), (0, 10));
        file.set_len(5).unwrap();
        file.set_permissions(PermissionsExt::from_mode(0o640)).unwrap();
        let about = file.metadata().unwrap();
        assert_eq!((about.mode() & 0o7777, about.len()), (0o640, 5));
        let again = OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert_eq!(content(&again), "01234");
        again.write_all_at(b"AB", 0).unwrap();
        again.sync_all().unwrap();
        assert_eq!(content(&file), "AB234");
        // Another of that name is another.
        let other = new_file(&here, b"another");
        drop(file);
        assert_eq!((content(&again).as_str(), content(&other).as_str()), ("AB234", "another"));
    });
}

#[test]
fn a_directory_whose_name_is_gone() {
    in_each_mode("a directory without a name", |mounted| {
        let (here, _) = mounted.both("folder");
        fs::create_dir(&here).unwrap();
        let folder = open(&here, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        fs::remove_dir(&here).unwrap();
        let made = openat(&folder, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
        assert_eq!(made.err(), Some(Errno::NOENT));
        assert_eq!(
            Dir::read_from(&folder)
                .unwrap()
                .filter(|entry| !entry.as_ref().unwrap().file_name().to_bytes().starts_with(b"."))
                .count(),
            0
        );
    });
}

#[test]
fn a_file_that_another_takes_the_place_of() {
    in_each_mode("renames over open files", |mounted| {
        let ((old, old_there), (new, new_there)) = (mounted.both("old"), mounted.both("new"));
        let (first, second) = (new_file(&old, b"first"), new_file(&new, b"second"));
        let exists = renameat_with(CWD, &new, CWD, &old, RenameFlags::NOREPLACE);
        assert_eq!(exists, Err(Errno::EXIST));
        renameat_with(CWD, &new, CWD, &old, RenameFlags::EXCHANGE).unwrap();
        [&first, &second].into_iter().for_each(|file| file.sync_all().unwrap());
        let read = |path: &PathBuf| fs::read_to_string(path).unwrap();
        assert_eq!([&old, &old_there, &new, &new_there].map(read), ["second", "second", "first", "first"]);
        fs::rename(&new, &old).unwrap();
        assert_eq!((content(&first).as_str(), content(&second).as_str()), ("first", "second"));
        assert_eq!((first.metadata().unwrap().nlink(), second.metadata().unwrap().nlink()), (1, 0));
        assert_eq!((read(&old), read(&old_there), new_there.exists()), ("first".to_owned(), "first".to_owned(), false));
    });
}

/// Where a file ends is for this host's kernel to say, whatever a guest believes.
#[test]
fn two_guests_append_to_a_file() {
    const EACH: usize = 300;
    if !can_mount("two mounts of a directory") {
        return;
    }
    for words in [&[][..], &["--cache", "never"], &["--cache", "always"]] {
        let mut one = Mounted::ours(words, &[]);
        let mut two = one.beside(words, &[]);
        fs::write(one.house.join("file"), "").unwrap();
        thread::scope(|scope| {
            for (writer, seen) in [&one.seen, &one.seen, &two.seen, &two.seen].into_iter().enumerate() {
                scope.spawn(move || {
                    let mut file = OpenOptions::new().append(true).open(seen.join("file")).unwrap();
                    for number in 0..EACH {
                        file.write_all(format!("{:<31}\n", format!("{writer} {number}")).as_bytes()).unwrap();
                    }
                });
            }
        });
        let text = fs::read_to_string(one.house.join("file")).unwrap();
        let lines: BTreeSet<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!((text.len(), lines.len()), (4 * EACH * 32, 4 * EACH), "{words:?}");
        two.unmount();
        one.unmount();
    }
}

/// What is not removed is seen once, whatever is removed meanwhile.
#[test]
fn a_directory_that_shrinks_while_it_is_read() {
    in_each_mode("directories read while files go", |mounted| {
        let (here, there) = mounted.both("folder");
        fs::create_dir(&there).unwrap();
        let names: BTreeSet<String> = (0..3000).map(|number| format!("file-{number}")).collect();
        names.iter().for_each(|name| drop(File::create(there.join(name)).unwrap()));
        let mut seen = BTreeSet::new();
        for (count, entry) in fs::read_dir(&here).unwrap().enumerate() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if count % 3 == 0 {
                fs::remove_file(here.join(&name)).unwrap();
            }
            assert!(seen.insert(name), "seen twice");
        }
        assert!(seen == names);
        assert_eq!(fs::read_dir(&there).unwrap().count(), 2000);
    });
}

#[test]
fn a_place_in_a_directory_stays_what_it_was() {
    in_each_mode("places in directories", |mounted| {
        let (here, there) = mounted.both("folder");
        fs::create_dir(&there).unwrap();
        (0..1000).for_each(|number| drop(File::create(there.join(format!("file-{number}"))).unwrap()));
        let mut dir = Dir::read_from(File::open(&here).unwrap()).unwrap();
        let mut entries = Vec::new();
        for entry in dir.by_ref() {
            let entry = entry.unwrap();
            entries.push((entry.file_name().to_str().unwrap().to_owned(), entry.offset()));
        }
        assert_eq!(entries.len(), 1002);
        for at in (0..entries.len() - 1).rev().step_by(37) {
            let ((before, place), (name, _)) = (&entries[at], &entries[at + 1]);
            if before.starts_with("file-") {
                fs::remove_file(here.join(before)).unwrap();
            }
            dir.seek(*place).unwrap();
            assert_eq!(dir.next().unwrap().unwrap().file_name().to_str(), Ok(name.as_str()));
        }
    });
}

#[test]
fn who_stands_in_a_directory_that_gets_another_name() {
    in_each_mode("the current directory", |mounted| {
        let (here, _) = mounted.both("one");
        fs::create_dir_all(here.join("two/three")).unwrap();
        let script = "cd \"$1/one/two/three\"; mv \"$1/one/two\" \"$1/moved\"; mv \"$1/one\" \"$1/moved/three/one\"; cd -P one; exec /bin/pwd -P";
        let ended = run(Command::new("sh").args(["-ec", script, "sh"]).arg(&mounted.seen));
        assert_eq!((ended.out.trim(), ended.err.as_str()), (mounted.seen.join("moved/three/one").to_str().unwrap(), ""));
        assert!(mounted.house.join("moved/three/one").is_dir());
    });
}

#[test]
fn a_file_that_gets_its_first_name_late() {
    in_each_mode("O_TMPFILE", |mounted| {
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        let natively = open(&mounted.house, flags, Mode::RUSR | Mode::WUSR);
        if natively.err() == Some(Errno::OPNOTSUPP) {
            println!("skipped: the folder's file system has no O_TMPFILE");
            return;
        }
        let mut file = File::from(open(&mounted.seen, flags, Mode::RUSR | Mode::WUSR).unwrap());
        file.write_all(b"without a name").unwrap();
        assert_eq!((file.metadata().unwrap().nlink(), fs::read_dir(&mounted.house).unwrap().count()), (0, 0));
        let number = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, &number, CWD, mounted.seen.join("name"), AtFlags::SYMLINK_FOLLOW).unwrap();
        file.write_all(b", with one").unwrap();
        file.sync_all().unwrap();
        assert_eq!(fs::read_to_string(mounted.house.join("name")).unwrap(), "without a name, with one");
        let mut text = String::new();
        File::open(mounted.seen.join("name")).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), file.metadata().unwrap().nlink()), ("without a name, with one", 1));
        let unnamed = open(&mounted.seen, flags | OFlags::EXCL, Mode::RUSR | Mode::WUSR).unwrap();
        let number = format!("/proc/self/fd/{}", unnamed.as_raw_fd());
        assert_eq!(linkat(CWD, &number, CWD, mounted.seen.join("never"), AtFlags::SYMLINK_FOLLOW), Err(Errno::NOENT));
    });
}

/// The host's kernel takes a while over it, during which everybody else's requests would wait.
#[test]
fn another_thread_empties_a_large_file() {
    if !can_mount("emptying a large file") {
        return;
    }
    let counters = Counters::new();
    let mut mounted = Mounted::ours(&["--metrics-fd", &counters.fd()], &[]);
    let handed_on = || counters.count("virtiofsd_handed_on");
    for (size, more) in [(3 << 20, 1), (4096, 0)] {
        let (here, there) = mounted.both(format!("of-{size}"));
        let ways: [(&str, &dyn Fn()); 2] = [
            ("open", &|| drop(File::create(&here).unwrap())),
            ("set_len", &|| OpenOptions::new().append(true).open(&here).unwrap().set_len(0).unwrap()),
        ];
        for (way, empty) in ways {
            fs::write(&there, vec![7; size]).unwrap();
            let before = handed_on();
            empty();
            assert_eq!(fs::metadata(&there).unwrap().len(), 0, "{way}");
            assert_eq!(handed_on() - before, more, "{way} of {size} bytes");
        }
    }
    mounted.unmount();
}
