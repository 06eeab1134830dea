//! User-mode Linux as the frontend of our device processes: another kernel's own idea of the protocol, with its own drivers.
//!
//! It has habits no other frontend has: acknowledgements are asked for by the very request that negotiates them, and what others
//! make event descriptors are sockets. Its 6.1, as Debian has it, comes without a driver for virtio-rng, so of that
//! device only the handshake is seen; and it does not connect again to a process that was replaced.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use suite::{Scratch, Server};

/// For one line's answer; everything is emulated.
const LIMIT: Duration = Duration::from_secs(60);

fn place() -> PathBuf {
    let path = std::env::var_os("OUTBOARD_UML").map(PathBuf::from).unwrap_or_default();
    assert!(path.join("linux.uml").exists(), "OUTBOARD_UML does not say where user-mode Linux is; run cargo xtask test");
    path
}

/// A guest that does what is typed on its virtio console.
struct Uml {
    child: Child,
    log: PathBuf,
    console: UnixStream,
    shown: String,
    questions: u32,
}

impl Uml {
    fn start(scratch: &Scratch, console: &Path, devices: &[(&Server, u32)]) -> Uml {
        let (images, log) = (place(), scratch.path("uml.log"));
        let mut command = Command::new(images.join("linux.uml"));
        command.args(["mem=128M", "rdinit=/init", "con=null", "con0=fd:0,fd:1"]);
        command.arg(format!("initrd={}", images.join("initrd.img").display()));
        command.arg(format!("uml_dir={}", scratch.path("uml").display()));
        for (server, id) in devices {
            command.arg(format!("virtio_uml.device={}:{id}", server.socket.display()));
        }
        command.stdin(Stdio::null()).stdout(File::create(&log).unwrap()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let console = UnixStream::connect(console).unwrap();
        console.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        Uml { child, log, console, shown: String::new(), questions: 0 }
    }

    /// Runs a command in the guest; it has to end well.
    fn does(&mut self, command: &str) -> String {
        self.questions += 1;
        // The terminal echoes what is typed: the mark is spelled so that only its evaluation matches.
        writeln!(self.console, "{command}; echo end-$(({0}+0))-$?.", self.questions).unwrap();
        let said = self.hear(&format!("end-{}-", self.questions));
        let status = self.hear(".");
        assert!(status.starts_with("0"), "{command}: {said}{status}\n{}", self.kernel());
        said
    }

    /// What the console shows before this.
    fn hear(&mut self, mark: &str) -> String {
        let start = Instant::now();
        loop {
            if let Some((said, rest)) = self.shown.split_once(mark).map(|(said, rest)| (said.to_owned(), rest.to_owned())) {
                self.shown = rest;
                return said;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the guest has ended: {}", self.kernel());
            assert!(start.elapsed() < LIMIT, "no {mark} on the console:\n{}\n{}", self.shown, self.kernel());
            let mut piece = [0; 4096];
            if let Ok(count) = self.console.read(&mut piece) {
                assert!(count > 0, "the console has hung up: {}", self.kernel());
                self.shown.push_str(&String::from_utf8_lossy(piece.get(..count).unwrap_or_default()));
            }
        }
    }

    fn kernel(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Uml {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[test]
fn user_mode_linux_works_with_our_disk_console_and_randomness() {
    if fs::read_to_string("/proc/cpuinfo").unwrap_or_default().contains(" amx_tile") {
        println!("not done: user-mode Linux 6.1 cannot run its processes on a processor with AMX");
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 64 << 20);
    let trusting = "--allow-unsealed-memory";
    let blk = Server::start(
        "outboard-blk",
        &scratch,
        &["--blk-file", image.to_str().unwrap(), "--format", "raw", "--serial", "uml-7", trusting],
    );
    let rng = Server::start("outboard-rng", &scratch, &[trusting]);
    let screen = scratch.path("screen");
    let console =
        Server::start("outboard-console", &scratch, &["--socket", screen.to_str().unwrap(), "--keep", "65536", trusting]);
    let mut guest = Uml::start(&scratch, &screen, &[(&blk, 2), (&rng, 4), (&console, 3)]);

    guest.hear("ready");
    assert!(guest.does("echo $((6*7))-$(uname -n)").contains("42-"), "the console works both ways");
    assert!(guest.does("cat /sys/block/vda/serial /sys/block/vda/size").contains("uml-7"));
    assert!(guest.does("cat /sys/bus/virtio/devices/virtio1/device").contains("0x0004"), "the handshake with the rng");
    guest.does("mke2fs -q /dev/vda && mount -t ext4 /dev/vda /mnt");
    guest.does("dd if=/dev/urandom of=/mnt/a bs=64k count=200 2>/dev/null && sync && cp /mnt/a /mnt/b && cp /bin/busybox /mnt/c");
    guest.does("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /mnt && cmp /mnt/a /mnt/b && cmp /bin/busybox /mnt/c");
    guest.does("umount /mnt && ! dmesg | grep -E 'I/O error|WARNING:|slave reports'");
    writeln!(guest.console, "exit").unwrap();
    suite::wait_for("the guest's end", || guest.child.try_wait().unwrap());
    let check = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&image).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    for server in [blk, rng, console] {
        assert_eq!(server.terminate(), Some(0));
    }
}
