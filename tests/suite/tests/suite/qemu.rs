//! QEMU as the frontend of our device processes: a Debian guest, under software emulation, boots from our disk and gets its random
//! numbers from our source. `cargo xtask test` says where the guest and QEMU are.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use suite::{Scratch, Server, program};

const LIMIT: Duration = Duration::from_secs(300);

fn place(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).unwrap_or_default();
    assert!(path.exists(), "{variable} does not say where it is; run cargo xtask test");
    path
}

/// A machine of QEMU's.
struct Qemu {
    child: Child,
    console: PathBuf,
}

impl Qemu {
    /// Boots the guest with these devices.
    fn start(scratch: &Scratch, cmdline: &str, devices: &[String]) -> Qemu {
        let (tree, images, console) = (place("OUTBOARD_QEMU"), place("OUTBOARD_GUEST"), scratch.path("console"));
        let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu")).arg(tree.join("usr/bin/qemu-system-x86_64"));
        command.arg("-L").arg(tree.join("usr/share/qemu")).arg("-L").arg(tree.join("usr/share/seabios"));
        command.args(["-M", "q35,memory-backend=m,hpet=off", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-smp", "1"]);
        command.args(["-object", "memory-backend-memfd,id=m,size=512M,share=on"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-serial").arg(OsString::from(format!("file:{}", console.display())));
        command.args(devices);
        command.arg("-kernel").arg(images.join("vmlinux")).arg("-initrd").arg(images.join("initrd.img"));
        command
            .arg("-append")
            .arg(format!("console=ttyS0 quiet root=/dev/vda outboard.overlay outboard.script=/dev/vdb {cmdline}"));
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        Qemu { child, console }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        while !self.text().contains(text) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && start.elapsed() < LIMIT, "waiting for {text:?}: {ended:?}\n{}", self.text());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn script(scratch: &Scratch, command: &str) -> PathBuf {
    let path = scratch.path("script.img");
    let mut bytes = command.as_bytes().to_vec();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    fs::write(&path, bytes).unwrap();
    path
}

/// A disk for QEMU, served by us.
fn disk(server: &Server, id: &str, queues: u16) -> Vec<String> {
    let path = server.socket.display();
    [
        "-chardev".to_owned(),
        format!("socket,id={id},path={path},reconnect-ms=100"),
        "-device".to_owned(),
        format!("vhost-user-blk-pci,chardev={id},num-queues={queues}"),
    ]
    .to_vec()
}

fn blk(scratch: &Scratch, image: &Path, more: &[&str]) -> Server {
    Server::start("outboard-blk", scratch, &[&["--blk-file", image.to_str().unwrap(), "--format", "raw"][..], more].concat())
}

#[test]
fn a_guest_of_qemu_boots_from_our_disk_and_is_given_our_randomness() {
    let (one, two, three, rest) = (Scratch::new(), Scratch::new(), Scratch::new(), Scratch::new());
    let command = "set -e; test $(cat /sys/class/misc/hw_random/rng_current) = virtio_rng.0; dd if=/dev/hwrng bs=64 count=4 status=none | od -An -tx1 -N16\n\
        mkfs.ext4 -q /dev/vdc; mount /dev/vdc /mnt; cp /usr/bin/[a-f]* /mnt; sync; umount /mnt; e2fsck -fn /dev/vdc; echo 3 >/proc/sys/vm/drop_caches\n\
        mount /dev/vdc /mnt; test \"$(sha256sum </usr/bin/bash)\" = \"$(sha256sum </mnt/bash)\"; fstrim /mnt; umount /mnt\n\
        if dmesg | grep -v Speculative | grep -iE 'WARNING:|BUG:|I/O error|is not a head'; then exit 9; fi";
    let root = blk(&one, &place("OUTBOARD_GUEST").join("root.img"), &["--read-only"]);
    let text = blk(&two, &script(&rest, command), &["--read-only"]);
    let data = blk(&three, &rest.image("data.img", 64 << 20), &["--num-queues", "2"]);
    let rng = Server::start("outboard-rng", &rest, &[]);
    let mut devices = [disk(&root, "a", 1), disk(&text, "b", 1), disk(&data, "c", 2)].concat();
    devices.extend(["-chardev".to_owned(), format!("socket,id=r,path={}", rng.socket.display())]);
    devices.extend(["-device".to_owned(), "vhost-user-rng-pci,chardev=r".to_owned()]);
    let mut qemu = Qemu::start(&rest, "", &devices);
    qemu.wait_for("outboard-run: exit");
    assert!(qemu.text().contains("outboard-run: exit 0"), "{}", qemu.text());
}

#[test]
fn a_guest_of_qemu_does_not_notice_that_its_disk_was_killed() {
    let (one, two, three, rest) = (Scratch::new(), Scratch::new(), Scratch::new(), Scratch::new());
    let command = "fio --name=storm --filename=/dev/vdc --direct=1 --rw=randwrite --bs=4k --iodepth=8 --ioengine=libaio --size=8M \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --loops=1000 --time_based --runtime=30 >/tmp/log 2>&1 & job=$!\n\
        echo fio-runs; wait $job; s=$?; tail -n 5 /tmp/log; exit $s";
    let root = blk(&one, &place("OUTBOARD_GUEST").join("root.img"), &["--read-only"]);
    let text = blk(&two, &script(&rest, command), &["--read-only"]);
    let image = rest.image("data.img", 16 << 20);
    let mut data = blk(&three, &image, &[]);
    let devices = [disk(&root, "a", 1), disk(&text, "b", 1), disk(&data, "c", 1)].concat();
    let mut qemu = Qemu::start(&rest, "", &devices);
    qemu.wait_for("fio-runs");
    for _ in 0..5 {
        std::thread::sleep(Duration::from_secs(2));
        drop(data);
        fs::remove_file(three.path("outboard-blk.sock")).unwrap();
        data = blk(&three, &image, &[]);
    }
    qemu.wait_for("outboard-run: exit");
    assert!(qemu.text().contains("outboard-run: exit 0"), "{}", qemu.text());
}

/// The server of a directory, run by an ordinary user.
struct Directory {
    server: Child,
    socket: PathBuf,
}

impl Directory {
    const USER: u32 = 1000;

    fn share(scratch: &Scratch, directory: &Path) -> Directory {
        let socket = scratch.path("fs.sock");
        chown(scratch.path(""), Some(Directory::USER), Some(Directory::USER)).unwrap();
        let mut command = Command::new(program("outboard-virtiofsd"));
        command.arg("--shared-dir").arg(directory).arg("--socket-path").arg(&socket).args(["--cache", "always", "--xattr"]);
        let server = command.uid(Directory::USER).gid(Directory::USER).spawn().unwrap();
        suite::wait_for("the server of the directory", || socket.exists().then_some(()));
        Directory { server, socket }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _already_gone = self.server.kill();
        let _reaped = self.server.wait();
    }
}

/// Debian, all of it in a directory of an ordinary user's. Everything there is root's in the guest, and that user's here.
#[test]
fn a_guest_of_qemu_boots_from_a_directory_that_an_ordinary_user_shares() {
    let (one, two, rest) = (Scratch::new(), Scratch::new(), Scratch::new());
    let house = rest.path("house");
    fs::create_dir(&house).unwrap();
    let image = place("OUTBOARD_GUEST").join("root.img");
    let dump = Command::new("debugfs").arg("-R").arg(format!("rdump / {}", house.display())).arg(&image).output().unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let owner = format!("{0}:{0}", Directory::USER);
    assert!(Command::new("chown").args(["-Rh", &owner]).arg(&house).status().unwrap().success());
    let command = "set -e; grep -q 'house / virtiofs rw' /proc/mounts; test $(stat -c %u /usr/bin/bash) = 0; bash -c 'echo made-by-bash >/root/made'\n\
        cp -a /usr/bin /root/bin; (cd /usr/bin; sha256sum [a-m]*) >/tmp/sums; (cd /root/bin; sha256sum -c --quiet /tmp/sums); find /usr /etc | wc -l; mkfifo /root/pipe; ln -s made /root/link\n\
        chmod 2711 /root/bin; setfattr 2>/dev/null -n user.x -v 1 /root/made || true; dd if=/dev/zero of=/root/big bs=1M count=32 status=none; sync; rm /root/big\n\
        if dmesg | grep -v Speculative | grep -iE 'WARNING:|BUG:|virtio.*error'; then exit 9; fi";
    let directory = Directory::share(&rest, &house);
    let root = blk(&one, &image, &["--read-only"]);
    let text = blk(&two, &script(&rest, command), &["--read-only"]);
    let mut devices = [disk(&root, "a", 1), disk(&text, "b", 1)].concat();
    devices.extend(["-chardev".to_owned(), format!("socket,id=f,path={}", directory.socket.display())]);
    devices.extend(["-device".to_owned(), "vhost-user-fs-pci,chardev=f,tag=house".to_owned()]);
    let mut qemu = Qemu::start(&rest, "root=virtiofs:house rw", &devices);
    qemu.wait_for("outboard-run: exit");
    assert!(qemu.text().contains("outboard-run: exit 0"), "{}", qemu.text());
    assert_eq!(fs::read(house.join("root/made")).unwrap(), b"made-by-bash\n");
    for path in ["root/made", "root/bin", "root/bin/bash", "root/pipe", "root/link"] {
        let about = fs::symlink_metadata(house.join(path)).unwrap();
        assert_eq!((about.uid(), about.gid()), (Directory::USER, Directory::USER), "{path} is the user's");
    }
    assert!(!house.join("root/big").exists());
}

/// What is said to QEMU over its control socket, and what it answers.
fn say(socket: &Path, command: &str, arguments: Value) -> Value {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap();
    let mut answer = Value::Null;
    for (command, arguments) in [("qmp_capabilities", json!({})), (command, arguments)] {
        writeln!(&stream, "{}", json!({ "execute": command, "arguments": arguments })).unwrap();
        let mut told = lines.by_ref().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        answer = told.find(|told| told.get("event").is_none()).unwrap();
    }
    answer
}

/// Waits until a guest has moved. Gives why it has not.
fn moved(socket: &Path) -> Result<(), String> {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LIMIT, "the guest does not arrive");
        let told = say(socket, "query-migrate", json!({}))["return"].clone();
        match told["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => return Err(told.to_string()),
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// A place to which a guest can move: a machine of QEMU's, and a server for each of its devices.
struct Place {
    qemu: Qemu,
    control: PathBuf,
    share: Server,
    _disks: [Server; 2],
    _scratches: [Scratch; 4],
}

impl Place {
    fn new(script: &Path, house: &Path, words: &[&str], incoming: Option<&Path>) -> Place {
        let [one, two, three, rest] = [(); 4].map(|()| Scratch::new());
        let root = blk(&one, &place("OUTBOARD_GUEST").join("root.img"), &["--read-only"]);
        let text = blk(&two, script, &["--read-only"]);
        let share =
            Server::start("outboard-virtiofsd", &three, &[&["--shared-dir", house.to_str().unwrap()][..], words].concat());
        let control = rest.path("control");
        let mut devices = [disk(&root, "a", 1), disk(&text, "b", 1)].concat();
        devices.extend(["-chardev".to_owned(), format!("socket,id=f,path={}", share.socket.display())]);
        devices.extend(["-device".to_owned(), "vhost-user-fs-pci,chardev=f,tag=house".to_owned()]);
        devices.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", control.display())]);
        if let Some(socket) = incoming {
            devices.extend(["-incoming".to_owned(), format!("unix:{}", socket.display())]);
        }
        let qemu = Qemu::start(&rest, "", &devices);
        Place { qemu, control, share, _disks: [root, text], _scratches: [one, two, three, rest] }
    }
}

/// The guest has files open, reads a directory, writes all the time and is in a directory of the share; then it is on another machine,
/// with another server of the same directory.
#[test]
fn a_guest_of_qemu_takes_its_open_files_to_another_machine() {
    let rest = Scratch::new();
    let house = rest.path("house");
    fs::create_dir_all(house.join("dir/sub")).unwrap();
    fs::write(house.join("long"), (0..200_000).map(|n| format!("line {n}\n")).collect::<String>()).unwrap();
    let command = "set -e; mount -t virtiofs house /mnt; cd /mnt/dir/sub\n\
        exec 3<>/mnt/file 4</mnt/long 5>>/mnt/log; echo before >&3; read first <&4; read second <&4; echo made >/mnt/dir/made\n\
        n=0; while ! [ -e /mnt/moved ]; do n=$((n+1)); echo tick $n >&5; echo $n >/mnt/dir/n-$n; [ $n = 3 ] && echo ready-to-move; sleep 0.1; done\n\
        echo after >&3; read third <&4; echo \"$first $second $third\" >>/mnt/read; echo $n >/mnt/count; echo here >here; cat /mnt/dir/made\n\
        test \"$(cat /proc/self/fd/4 | wc -l)\" -ge 100000; test $(ls /mnt/dir | wc -l) = $((n+2)); mv /mnt/file /mnt/dir/file; echo more >&3\n\
        if dmesg | grep -v Speculative | grep -iE 'WARNING:|BUG:|virtio.*error'; then exit 9; fi";
    let script = script(&rest, command);
    let socket = rest.path("way");
    let mut here = Place::new(&script, &house, &[], None);
    here.qemu.wait_for("ready-to-move");
    let mut there = Place::new(&script, &house, &[], Some(&socket));
    suite::wait_for("the other machine", || socket.exists().then_some(()));
    say(&here.control, "migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
    moved(&here.control).unwrap();
    let worker = here.share.worker();
    drop(here);
    suite::wait_for("the end of who served it before", || (!Path::new("/proc").join(worker.to_string()).exists()).then_some(()));
    fs::write(house.join("moved"), "").unwrap();
    there.qemu.wait_for("outboard-run: exit");
    assert!(there.qemu.text().contains("outboard-run: exit 0"), "{}", there.qemu.text());
    assert_eq!(fs::read_to_string(house.join("dir/file")).unwrap(), "before\nafter\nmore\n");
    assert_eq!(fs::read_to_string(house.join("read")).unwrap(), "line 0 line 1 line 2\n");
    let count: usize = fs::read_to_string(house.join("count")).unwrap().trim().parse().unwrap();
    let ticks: String = (1..=count).map(|n| format!("tick {n}\n")).collect();
    assert_eq!(fs::read_to_string(house.join("log")).unwrap(), ticks, "nothing is lost, and nothing done twice");
    assert_eq!(fs::read_to_string(house.join("dir/sub/here")).unwrap(), "here\n");
}

/// A guest that has something open which has no name stays where it is, and goes on.
#[test]
fn a_guest_of_qemu_that_cannot_move_stays() {
    let rest = Scratch::new();
    let house = rest.path("house");
    fs::create_dir(&house).unwrap();
    let command = "set -e; mount -t virtiofs house /mnt; exec 3<>/mnt/gone; rm /mnt/gone; echo begun >&3; echo ready-to-move\n\
        while ! [ -e /mnt/stayed ]; do sleep 0.1; done; echo ended >&3; cat /proc/self/fd/3 >/mnt/content";
    let script = script(&rest, command);
    let socket = rest.path("way");
    let mut here = Place::new(&script, &house, &[], None);
    here.qemu.wait_for("ready-to-move");
    let there = Place::new(&script, &house, &[], Some(&socket));
    suite::wait_for("the other machine", || socket.exists().then_some(()));
    say(&here.control, "migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
    let why = moved(&here.control).unwrap_err();
    assert!(why.contains("vhost-user-fs"), "{why}");
    drop(there);
    say(&here.control, "cont", json!({}));
    fs::write(house.join("stayed"), "").unwrap();
    here.qemu.wait_for("outboard-run: exit");
    assert!(here.qemu.text().contains("outboard-run: exit 0"), "{}", here.qemu.text());
    assert_eq!(fs::read_to_string(house.join("content")).unwrap(), "begun\nended\n");
}
