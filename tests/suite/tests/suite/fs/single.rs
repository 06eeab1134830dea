//! A single file as a share.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::{Command, Stdio};

use suite::virtiofsd::Virtiofsd;
use suite::{Scratch, program, run, wait_for};

use super::mounted::can_mount;

#[test]
fn a_file_is_shared_and_nothing_beside_it() {
    if !can_mount("a file as a share") {
        return;
    }
    for words in [&[][..], &["--cache", "always"], &["--cache", "never", "--inode-file-handles", "prefer"]] {
        let scratch = Scratch::new();
        let [file, beside, seen, said] = ["file", "beside", "seen", "said"].map(|name| scratch.path(name));
        fs::write(&file, "of the host").unwrap();
        fs::write(&beside, "nobody's").unwrap();
        fs::write(&seen, "").unwrap();
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.arg("--shared-dir").arg(&file).args(words);
        let mut server = Virtiofsd::launch_ours(command, scratch.path("fs.sock"));
        let mut probe = Command::new(program("outboard-probe"));
        probe
            .args(["fs", "mount", "--file"])
            .arg(&server.socket)
            .arg(&seen)
            .stdin(Stdio::null())
            .stderr(File::create(&said).unwrap());
        let mut probe = probe.spawn().unwrap();
        wait_for("the mount", || fs::read_to_string(&said).unwrap().contains("is mounted").then_some(()));

        assert_eq!(fs::read_to_string(&seen).unwrap(), "of the host", "{words:?}");
        let mut open = OpenOptions::new().read(true).write(true).open(&seen).unwrap();
        open.seek(SeekFrom::Start(3)).unwrap();
        open.write_all(b"a guest, and longer").unwrap();
        open.sync_all().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "of a guest, and longer", "{words:?}");
        OpenOptions::new().append(true).open(&seen).unwrap().write_all(b" still").unwrap();
        fs::set_permissions(&seen, PermissionsExt::from_mode(0o640)).unwrap();
        chown(&seen, Some(12), Some(34)).unwrap();
        let about = fs::metadata(&file).unwrap();
        assert_eq!((about.mode() & 0o777, about.uid(), about.gid(), about.len()), (0o640, 12, 34, 28), "{words:?}");
        open.set_len(2).unwrap();
        let mut rest = String::new();
        open.rewind().unwrap();
        open.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), fs::read_to_string(&file).unwrap()), ("of", "of".to_owned()), "{words:?}");
        // There is no directory to look into, nor a name to take away.
        assert!(fs::read_dir(&seen).is_err() && fs::metadata(seen.join("beside")).is_err() && fs::remove_file(&seen).is_err());
        drop(open);
        assert_eq!(run(Command::new("umount").arg(&seen)).code, Some(0));
        assert!(probe.wait().unwrap().success(), "{}", fs::read_to_string(&said).unwrap());
        server.end();
        assert_eq!(fs::read_to_string(&beside).unwrap(), "nobody's");
    }
}

#[test]
fn a_file_of_which_the_guest_would_collect_writes() {
    let scratch = Scratch::new();
    fs::write(scratch.path("file"), "x").unwrap();
    let mut command = Command::new(program("outboard-virtiofsd"));
    command.arg("--shared-dir").arg(scratch.path("file")).arg("--socket-path").arg(scratch.path("fs.sock")).arg("--writeback");
    let ended = run(&mut command);
    assert!(ended.code == Some(1) && ended.err.contains("that takes a directory"), "{}", ended.err);
}
