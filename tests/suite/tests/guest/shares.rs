//! Directories of the host in a guest of ours: `[share.NAME]`, served by our virtiofsd.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use probe::random::Random;
use rustix::process::{Pid, Signal, kill_process};
use suite::Scratch;

use super::boot::NO_TROUBLE;
use super::machine::{Plan, UNTIL_STOPPED, images};

/// The user that starts the machines here, an ordinary one.
const USER: u32 = 1000;

/// A directory of that user.
fn house(scratch: &Scratch) -> PathBuf {
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    give(&house);
    give(&scratch.path(""));
    house
}

fn give(path: &Path) {
    chown(path, Some(USER), Some(USER)).unwrap();
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    give(path);
}

fn section(house: &Path, more: &str) -> String {
    format!("[share.house]\npath = \"{}\"\n{more}", house.display())
}

fn plan(command: &str) -> Plan {
    Plan { user: Some(USER), ..Plan::run(command) }
}

#[test]
fn an_ordinary_user_shares_a_directory_and_the_owners_are_right_on_both_sides() {
    let scratch = Scratch::new();
    let house = house(&scratch);
    let mut random = Random::new(26);
    let bytes: Vec<u8> = (0..3 << 20).map(|_| random.below(256).to_le_bytes()[0]).collect();
    write(&house.join("in"), &bytes);
    fs::write(house.join("of-root"), b"x").unwrap();
    let command = format!(
        "set -e; mkdir -p /mnt; mount -t virtiofs house /mnt; cd /mnt; sha256sum <in | cut -c1-64 >sum; cp in out; mkdir new; mv out new/out\n\
         echo from-the-guest >>new/out; chmod 4750 new/out; ln -s new/out link; stat -c '%n %u %g %a' in of-root new/out >stat; sync -f .\n\
         test $(stat -c %u in) = 0; test $(stat -c %u of-root) = 65534; ! chown 5 in; chown 0:0 in; cd /; umount /mnt\n\
         mount -t virtiofs house /mnt; tail -n 1 /mnt/link; umount /mnt; {NO_TROUBLE}"
    );
    let ended = plan(&command).section(&section(&house, "")).finish().passed();
    assert!(ended.console.contains("from-the-guest"), "{}", ended.tell());
    let sum = Command::new("sha256sum").arg(house.join("in")).output().unwrap();
    assert_eq!(fs::read(house.join("sum")).unwrap().get(..64), sum.stdout.get(..64), "the guest has read what is there");
    let out = house.join("new/out");
    assert_eq!(fs::read(&out).unwrap(), [&bytes[..], b"from-the-guest\n"].concat(), "and wrote what it had");
    for path in ["sum", "new", "new/out", "link", "in"] {
        let about = fs::symlink_metadata(house.join(path)).unwrap();
        assert_eq!((about.uid(), about.gid()), (USER, USER), "{path} is the user's");
    }
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o7777, 0o4750);
}

/// The guest's whole root is a directory of an ordinary user's.
#[test]
fn a_guest_boots_from_a_directory() {
    let scratch = Scratch::new();
    let house = house(&scratch);
    for dir in ["bin", "sbin", "proc", "sys", "dev", "tmp", "run", "root", "etc"] {
        fs::create_dir(house.join(dir)).unwrap();
        give(&house.join(dir));
    }
    fs::copy("/usr/bin/busybox", house.join("bin/busybox")).unwrap();
    give(&house.join("bin/busybox"));
    for name in [
        "sh", "mount", "hostname", "mkdir", "ln", "cat", "tr", "sync", "poweroff", "dmesg", "grep", "sleep", "id", "stat",
        "reboot",
    ] {
        std::os::unix::fs::symlink("busybox", house.join("bin").join(name)).unwrap();
    }
    let init = house.join("sbin/init");
    let dump = format!("dump /sbin/init {}", init.display());
    assert!(Command::new("debugfs").arg("-R").arg(dump).arg(images().join("root.img")).output().unwrap().status.success());
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    give(&init);
    let command = "set -e; mount | grep ' / ' >/etc/mounts; grep -q 'house on / type virtiofs (rw' /etc/mounts; test $(stat -c %u /sbin/init) = 0\n\
                   echo was-here >/root/mark; mkdir -p /a/b/c; echo deep >/a/b/c/d; sync";
    let plan = plan(command).cmdline("root=virtiofs:house rw").section(&section(&house, "cache = \"always\"\nxattr = true\n"));
    plan.finish().passed();
    assert_eq!(fs::read(house.join("root/mark")).unwrap(), b"was-here\n");
    let deep = fs::metadata(house.join("a/b/c/d")).unwrap();
    assert_eq!((deep.uid(), deep.len()), (USER, 5));
}

/// A reboot forgets what the guest knew; the process and its socket stay.
#[test]
fn a_guest_that_reboots_finds_its_share_again() {
    let scratch = Scratch::new();
    let house = house(&scratch);
    let command = "set -e; mkdir -p /mnt; mount -t virtiofs house /mnt; if [ ! -e /mnt/once ]; then exec 5>/mnt/open; rm /mnt/open; echo 1 >/mnt/once; sync; reboot -f; sleep 60; fi\n\
                   cat /mnt/once; ls /mnt; echo 2 >/mnt/twice; umount /mnt";
    plan(command).section(&section(&house, "")).finish().passed();
    assert_eq!(fs::read(house.join("twice")).unwrap(), b"2\n");
    assert!(!house.join("open").exists());
}

/// Mounts in the directory are mounts in the guest, with numbers of their own; all queues of a machine with four processors work.
#[test]
fn mounts_in_a_share_and_many_queues() {
    let scratch = Scratch::new();
    let house = house(&scratch);
    let inner = house.join("inner");
    fs::create_dir(&inner).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "mode=777", "inner"]).arg(&inner).status().unwrap();
    assert!(mounted.success());
    fs::write(inner.join("file"), b"in-the-mount").unwrap();
    let command = format!(
        "set -e; mkdir -p /mnt; mount -t virtiofs house /mnt; cat /mnt/inner/file; test $(stat -c %d /mnt) != $(stat -c %d /mnt/inner)\n\
         for i in 1 2 3 4 5 6 7 8; do (taskset $((1 << (i % 4))) dd if=/dev/urandom of=/mnt/f$i bs=64k count=8 2>/dev/null; sha256sum </mnt/f$i >/mnt/s$i; sync -f /mnt) & done; wait\n\
         for i in 1 2 3 4 5 6 7 8; do test \"$(sha256sum </mnt/f$i)\" = \"$(cat /mnt/s$i)\"; done; ls /mnt | wc -l; umount /mnt/inner; umount /mnt; {NO_TROUBLE}"
    );
    let plan = plan(&command).machine("cpus = 4\nmemory = \"512M\"\n").section(&section(&house, ""));
    let ended = plan.finish();
    let unmounted = Command::new("umount").arg(&inner).status().unwrap();
    assert!(unmounted.success());
    let ended = ended.passed();
    assert!(ended.console.contains("in-the-mount"), "{}", ended.tell());
}

/// What the guest had open when the process was killed is lost, and says so; everything else goes on.
#[test]
fn a_guest_goes_on_when_its_share_s_process_is_killed() {
    let scratch = Scratch::new();
    let house = house(&scratch);
    // There is no other disk than the one with the command.
    let until_stopped = UNTIL_STOPPED.replace("vdb", "vda");
    let command = format!(
        "mkdir -p /mnt; mount -t virtiofs house /mnt || exit 1; exec 5>/mnt/open; echo one >&5; good=0 bad=0; echo loop-runs\n\
         {until_stopped}; do if echo $good >/mnt/f && test \"$(cat /mnt/f)\" = $good && ls /mnt >/dev/null; then good=$((good + 1)); else bad=$((bad + 1)); fi; done 2>/tmp/err\n\
         echo good $good bad $bad; echo two >&5 && exit 2; exec 5>&-; echo three >/mnt/open || exit 3; cat /mnt/open; ls -la /mnt; test $good -gt 5; umount /mnt"
    );
    let mut machine = plan(&command).section(&section(&house, "")).start();
    machine.wait_for("loop-runs");
    let mut last = 0;
    for _ in 0..3 {
        std::thread::sleep(std::time::Duration::from_secs(2));
        let pid = suite::wait_for("the next process", || Some(machine.pid("house")).filter(|pid| *pid != last));
        last = pid;
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    suite::wait_for("the last process", || (machine.pid("house") != last).then_some(()));
    std::thread::sleep(std::time::Duration::from_secs(3));
    machine.stop_loop();
    let ended = machine.finish().passed();
    assert!(ended.console.contains("three"), "{}", ended.tell());
    assert_eq!(fs::read(house.join("open")).unwrap(), b"three\n");
}
