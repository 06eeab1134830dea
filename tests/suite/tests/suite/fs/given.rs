//! A directory that is handed in, and what only the file system of the host knows of its files.

use std::fs::{self, File};
use std::process::Command;

use suite::virtiofsd::Virtiofsd;
use suite::{Scratch, program, run};

use super::mounted::{Mounted, can_mount, in_each_mode};

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
        let tool = |name: &str, words: &[&str], path: &std::path::Path| run(Command::new(name).args(words).arg(path));
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
