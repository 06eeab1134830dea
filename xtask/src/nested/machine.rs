//! One run of the nested machine: its QEMU, its snapshot, and the four ports through which a command and its results pass.

use std::fs::{self, File};
use std::io::{self, Read, Write, copy, stderr, stdin, stdout};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::Job;
use super::tools::{self, Tools};
use crate::guest::image;
use crate::{cache, guest, host, say};

/// Enough for a guest of 1 GiB, a copy of its disk in memory, and the tools.
const MEMORY: &str = "4G";
/// With two emulated processors the machine's own kernel fails within minutes of running guests (an exception in its interrupt
/// entry, again and again until the stack ends), under QEMU's guests as under ours; with one it does not.
const CPUS: &str = "1";
/// Disks keep their size from run to run, see the theory of operation.
const RUN_DISK_MEGABYTES: u64 = 8192;
/// Booting takes 10 to 15 s on a quiet machine, several times that on a busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// What the machine needs beside the command: restoring, mounting, powering off.
const OVERHEAD: Duration = Duration::from_secs(60);
/// It gives a sign of life every 5 s. Its emulated processor sometimes gets stuck for ever.
const SILENCE: Duration = Duration::from_secs(60);
/// The status that `timeout` gives, for a command that ran too long.
const TIMED_OUT: u8 = 124;
/// The kernel's own noise is kept short; a panic ends the machine; the clock of an emulated processor is good enough.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off \
                       random.trust_cpu=on audit=0";

/// Runs a job whose run disk gets the content of a directory.
pub(super) fn run(job: &Job, dir: &Path, content: &Path) -> Result<u8> {
    let tools = tools::prepare(&guest::prepare()?)?;
    let disk = dir.join("run.img");
    image::ext4(content, &disk, &image::Shape { megabytes: RUN_DISK_MEGABYTES, journal: false, label: "run" })?;
    let snapshot = if job.snapshot { Some(snapshot(&tools)?) } else { None };
    let mut machine = Machine::new(&tools, dir, &disk)?;
    if let Some(state) = &snapshot {
        machine.qemu.args(["-global", "migration.mapped-ram=on", "-incoming"]).arg(format!("file:{}", state.display()));
    }
    machine.command(job)
}

/// The saved memory of a machine that waits for its command; made on the first run.
fn snapshot(tools: &Tools) -> Result<PathBuf> {
    let product = cache::dir()?.join("snapshot");
    cache::product(&product, &cache::key(&[tools.key.as_bytes(), include_bytes!("machine.rs")]), |fresh| {
        say::step("Boot the nested machine once and keep a snapshot", || {
            let empty = fresh.join("content");
            fs::create_dir(&empty)?;
            let disk = fresh.join("run.img");
            image::ext4(&empty, &disk, &image::Shape { megabytes: RUN_DISK_MEGABYTES, journal: false, label: "run" })?;
            Machine::new(tools, fresh, &disk)?.save(&fresh.join("memory"))?;
            fs::remove_file(disk).context("Cannot remove the empty disk")
        })
    })?;
    Ok(product.join("memory"))
}

struct Machine {
    qemu: Command,
    console: PathBuf,
    out: UnixListener,
    err: UnixListener,
    rc: UnixListener,
    ctl: UnixListener,
}

impl Machine {
    /// A machine that is not started yet.
    fn new(tools: &Tools, dir: &Path, disk: &Path) -> Result<Self> {
        let console = dir.join("console");
        let listen = |name: &str| {
            let path = dir.join(name);
            UnixListener::bind(&path).with_context(|| format!("Cannot listen on {}", path.display()))
        };
        let machine = Self {
            qemu: qemu(tools, dir, disk, &console),
            out: listen("out")?,
            err: listen("err")?,
            rc: listen("rc")?,
            ctl: listen("ctl")?,
            console,
        };
        Ok(machine)
    }

    /// Boots, waits for the waiting point and saves the memory.
    fn save(&mut self, memory: &Path) -> Result<()> {
        self.qemu.args(["-chardev", "null,id=tty", "-monitor", "stdio"]);
        self.qemu.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.qemu.spawn().context("Cannot start QEMU")?;
        let result = self.wait_until_waiting(&mut child).and_then(|()| {
            let mut monitor = child.stdin.take().context("QEMU has no monitor")?;
            let commands = format!("migrate_set_capability mapped-ram on\nmigrate file:{}\nquit\n", memory.display());
            monitor.write_all(commands.as_bytes()).context("Cannot command QEMU")?;
            child.wait().context("Cannot wait for QEMU")
        });
        if result.is_err() {
            drop(child.kill());
            self.show_failure(&mut child);
        }
        let status = result?;
        if !status.success() || !memory.exists() {
            bail!("QEMU could not save the nested machine ({status})");
        }
        Ok(())
    }

    fn wait_until_waiting(&self, child: &mut Child) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < BOOT_LIMIT {
            let console = String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned();
            if let Some(failure) = console.lines().find(|line| line.contains("nested: FAILED")) {
                bail!("The nested machine did not start: {failure}");
            }
            if console.contains("nested: WAITING") {
                return Ok(());
            }
            if let Some(status) = child.try_wait()? {
                bail!("QEMU ended while the nested machine booted ({status})");
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("The nested machine did not boot in {} s", BOOT_LIMIT.as_secs());
    }

    /// Starts the machine, gives it the job's command and waits for the end of both.
    fn command(mut self, job: &Job) -> Result<u8> {
        let terminal = Terminal::save(job.tty);
        if job.tty {
            self.qemu.args(["-chardev", "stdio,id=tty,mux=off,signal=off", "-monitor", "none"]).stdin(Stdio::inherit());
        } else {
            self.qemu.args(["-chardev", "null,id=tty", "-monitor", "none"]).stdin(Stdio::null());
        }
        self.qemu.stdout(if job.tty { Stdio::inherit() } else { Stdio::null() }).stderr(Stdio::piped());
        let mut child = self.qemu.spawn().context("Cannot start QEMU")?;
        let out = pump(self.out.try_clone()?, stdout());
        let err = pump(self.err.try_clone()?, stderr());
        let rc = pump(self.rc.try_clone()?, Vec::new());
        let began = Instant::now();
        let order = order(job);
        let ctl = self.ctl.try_clone()?;
        let give = thread::spawn(move || -> io::Result<UnixStream> {
            let mut stream = ctl.accept()?.0;
            stream.write_all(order.as_bytes())?;
            Ok(stream) // open until the machine ends: its closing would read as an end of file there
        });
        let ended = wait(&mut child, began + job.limit + OVERHEAD + BOOT_LIMIT, &self.console)?;
        drop(terminal);
        self.unblock();
        drop(give.join());
        if job.verbose {
            drop(io::stderr().write_all(&fs::read(&self.console).unwrap_or_default()));
        }
        drop((out.join(), err.join()));
        let status = rc.join().ok().and_then(|text| String::from_utf8_lossy(&text).trim().parse::<i32>().ok());
        match status {
            // busybox's timeout kills with SIGKILL and reports what the shell makes of that.
            Some(137 | 143) if began.elapsed() >= job.limit => Ok(TIMED_OUT),
            Some(status) => Ok(u8::try_from(status).unwrap_or(1)),
            None => {
                self.show_failure(&mut child);
                match ended {
                    true => bail!("The nested machine ended without a result"),
                    false => bail!("The nested machine hung"),
                }
            }
        }
    }

    /// Ends the threads that still wait for a QEMU that never connected.
    fn unblock(&self) {
        for listener in [&self.out, &self.err, &self.rc, &self.ctl] {
            if let Ok(address) = listener.local_addr()
                && let Some(path) = address.as_pathname()
            {
                drop(UnixStream::connect(path));
            }
        }
    }

    fn show_failure(&self, child: &mut Child) {
        let mut text = String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).replace("nested: alive", "");
        if let Some(mut errors) = child.stderr.take() {
            drop(errors.read_to_string(&mut text));
        }
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(30)) {
            say::line(&format!("  | {line}"));
        }
    }
}

/// The line on the port `ctl`, see `tests/guest/nested`.
fn order(job: &Job) -> String {
    let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let user = if job.user { "user" } else { "root" };
    let tty = if job.tty { "tty" } else { "pipe" };
    let size = if job.tty { tcgetwinsize(stdin()).ok() } else { None };
    let (rows, columns) = size.map_or((24, 80), |size| (size.ws_row, size.ws_col));
    format!("{now} {user} {tty} {} {rows} {columns}\n", job.limit.as_secs())
}

/// QEMU without the console's and the monitor's other ends.
fn qemu(tools: &Tools, dir: &Path, disk: &Path, console: &Path) -> Command {
    let mut command = host::command("setpriv");
    // QEMU must not outlive this task, however the task ends.
    command.args(["--pdeathsig", "KILL", "--"]);
    let tree = &tools.qemu;
    command.arg(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu"));
    command.arg(tree.join("usr/bin/qemu-system-x86_64"));
    command.arg("-L").arg(tree.join("usr/share/qemu")).arg("-L").arg(tree.join("usr/share/seabios"));
    // With `-cpu max` emulation is up to three times slower; without nested paging the inner guest hangs.
    command.args(["-M", "q35,hpet=off", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC,+svm,+npt"]);
    command.args(["-smp", CPUS, "-m", MEMORY, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=tty"]);
    command.args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
    for port in ["out", "err", "rc", "ctl"] {
        command.arg("-chardev").arg(format!("socket,id={port},path={}", dir.join(port).display()));
        command.arg("-device").arg(format!("virtserialport,chardev={port},name={port}"));
    }
    for (name, path, readonly) in [("tools", &tools.disk, "on"), ("run", &disk.to_path_buf(), "off")] {
        command.arg("-drive");
        command.arg(format!("if=none,id={name},file={},format=raw,cache=unsafe,readonly={readonly}", path.display()));
        command.arg("-device").arg(format!("virtio-blk-pci,drive={name},serial={name}"));
    }
    command.arg("-chardev").arg(format!("file,id=serial,path={}", console.display())).args(["-serial", "chardev:serial"]);
    command.arg("-kernel").arg(&tools.vmlinux).arg("-initrd").arg(&tools.initrd).args(["-append", CMDLINE]);
    command
}

/// Copies what arrives on a port, and returns the writer's content at its end.
fn pump<W: Write + Send + 'static>(listener: UnixListener, mut to: W) -> JoinHandle<W> {
    thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            drop(copy(&mut stream, &mut to));
            drop(to.flush());
        }
        to
    })
}

/// Waits for QEMU; kills it at the deadline, or when the machine says nothing any more. Did it end by itself?
fn wait(child: &mut Child, deadline: Instant, console: &Path) -> Result<bool> {
    let (mut said, mut heard) = (0, Instant::now());
    while Instant::now() < deadline {
        if child.try_wait().context("Cannot wait for QEMU")?.is_some() {
            return Ok(true);
        }
        let length = fs::metadata(console).map_or(0, |file| file.len());
        if length != said {
            (said, heard) = (length, Instant::now());
        } else if said > 0 && heard.elapsed() > SILENCE {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().context("Cannot end QEMU")?;
    child.wait().context("Cannot wait for QEMU")?;
    Ok(false)
}

/// The terminal's settings, put back when this is dropped: QEMU makes it raw, and may be killed.
struct Terminal(Option<(File, Termios)>);

impl Terminal {
    fn save(wanted: bool) -> Self {
        let open = || {
            let file = File::open("/dev/tty").ok()?;
            let settings = tcgetattr(&file).ok()?;
            Some((file, settings))
        };
        Self(if wanted { open() } else { None })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some((file, settings)) = &self.0 {
            let _ = tcsetattr(file, OptionalActions::Now, settings);
        }
    }
}
