//! Upstream's virtiofsd under our VMM, as a device of the class `fs`: a backend we had no part in, for a device we do not have.

use std::fs;
use std::process::Command;

use probe::random::Random;
use suite::Scratch;
use suite::virtiofsd::{Virtiofsd, Whose};

use super::boot::NO_TROUBLE;
use super::machine::Plan;

#[test]
fn a_guest_shares_a_folder_through_upstream_s_virtiofsd() {
    let scratch = Scratch::new();
    let folder = scratch.path("house");
    fs::create_dir(&folder).unwrap();
    let mut random = Random::new(26);
    let bytes: Vec<u8> = (0..3 << 20).map(|_| random.below(256).to_le_bytes()[0]).collect();
    fs::write(folder.join("in"), &bytes).unwrap();
    let mut server = Virtiofsd::start(Whose::Upstreams, scratch.path("fs.sock"), &folder, &["--tag", "house"]);
    let section = format!("[device.share]\nclass = \"fs\"\nsocket = \"{}\"\n", server.socket.display());
    let command = format!(
        "set -e; mkdir -p /mnt; mount -t virtiofs house /mnt; sha256sum </mnt/in | cut -c1-64 >/mnt/sum; cp /mnt/in /mnt/out; mkdir /mnt/new; \
         mv /mnt/out /mnt/new/out; echo from-the-guest >>/mnt/new/out; ls -l /mnt /mnt/new; umount /mnt; {NO_TROUBLE}"
    );
    Plan::run(&command).section(&section).finish().passed();
    let sum = Command::new("sha256sum").arg(folder.join("in")).output().unwrap();
    assert_eq!(fs::read(folder.join("sum")).unwrap().get(..64), sum.stdout.get(..64), "the guest has read what is there");
    assert_eq!(fs::read(folder.join("new/out")).unwrap(), [&bytes[..], b"from-the-guest\n"].concat(), "and wrote what it had");
    suite::wait_for("the end of virtiofsd, when the VMM hangs up", || server.ended());
}
