//! Upstream's virtiofsd under our VMM, as a device of the class `fs`: a backend we had no part in, for a device we do not have.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use probe::random::Random;
use suite::Scratch;

use super::boot::NO_TROUBLE;
use super::machine::Plan;

/// Serves a folder; one guest, then it ends.
struct Virtiofsd(Child);

impl Virtiofsd {
    fn start(scratch: &Scratch, folder: &str) -> (Virtiofsd, PathBuf) {
        let tree = std::env::var_os("OUTBOARD_VIRTIOFSD").map(PathBuf::from).unwrap_or_default();
        let program = tree.join("usr/libexec/virtiofsd");
        assert!(program.exists(), "OUTBOARD_VIRTIOFSD does not say where virtiofsd is; run cargo xtask test");
        let socket = scratch.path("fs.sock");
        let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu")).arg(program);
        command.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(scratch.path(folder));
        command.args(["--tag", "house", "--sandbox", "none"]).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        suite::wait_for("virtiofsd", || {
            assert!(child.try_wait().unwrap().is_none(), "virtiofsd has ended");
            socket.exists().then_some(())
        });
        (Virtiofsd(child), socket)
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn a_guest_shares_a_folder_through_upstream_s_virtiofsd() {
    let scratch = Scratch::new();
    let folder = scratch.path("house");
    fs::create_dir(&folder).unwrap();
    let mut random = Random::new(26);
    let bytes: Vec<u8> = (0..3 << 20).map(|_| random.below(256).to_le_bytes()[0]).collect();
    fs::write(folder.join("in"), &bytes).unwrap();
    let (mut server, socket) = Virtiofsd::start(&scratch, "house");
    let section = format!("[device.share]\nclass = \"fs\"\nsocket = \"{}\"\n", socket.display());
    let command = format!(
        "set -e; mkdir -p /mnt; mount -t virtiofs house /mnt; sha256sum </mnt/in | cut -c1-64 >/mnt/sum; cp /mnt/in /mnt/out; mkdir /mnt/new; \
         mv /mnt/out /mnt/new/out; echo from-the-guest >>/mnt/new/out; ls -l /mnt /mnt/new; umount /mnt; {NO_TROUBLE}"
    );
    Plan::run(&command).section(&section).finish().passed();
    let sum = Command::new("sha256sum").arg(folder.join("in")).output().unwrap();
    assert_eq!(fs::read(folder.join("sum")).unwrap().get(..64), sum.stdout.get(..64), "the guest has read what is there");
    assert_eq!(fs::read(folder.join("new/out")).unwrap(), [&bytes[..], b"from-the-guest\n"].concat(), "and wrote what it had");
    suite::wait_for("the end of virtiofsd, when the VMM hangs up", || server.0.try_wait().unwrap());
}
