//! Whole guests, side by side where a stock kernel boots: how long until the first program runs, and how long one small
//! request to the random number generator takes from inside.
//!
//! On a host whose KVM cannot run a stock kernel both sides run in the same emulated machine; see `cargo xtask nested`.

use std::env;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Bench;
use super::process;
use super::table::{Row, Target};
use crate::{host, nested, say};

/// Requests to the random number generator in each guest.
const REQUESTS: u32 = 2000;
const OURS: &str = "outboard";
/// Without a clock (`rtc=on`) Debian's kernel waits for one until it gives up, 3.6 s here: this is microvm at its best.
const MACHINES: [(&str, &str); 2] = [("microvm", "-M microvm,pcie=on,rtc=on"), ("q35", "-M q35")];
/// Seconds for one boot where it is emulated twice over, with room for a busy host.
const ONE_BOOT: u64 = 60;
/// After so many seconds no new round is begun.
const ROUNDS_END: u64 = 240;
/// With a last round in which everybody hangs.
const WHOLE: u64 = ROUNDS_END + 3 * ONE_BOOT;
/// What else a run needs: to boot the emulated machine for the first time.
const AROUND: u64 = 300;
/// The emulated machine's own kernel fails now and then; what was measured until then is kept, and nothing at all is no result.
const ATTEMPTS: u32 = 2;

/// What all sides run: the same kernel, initrd, disk and command, one processor, 512 MiB of shared memory. `$EPOCHREALTIME`
/// is read by the shell itself: a program would take longer to start than some of what is measured.
///
/// QEMU's microvm puts the initrd at the very end of memory, where its firmware has put the ACPI tables (`pvh.bin`, unlike the
/// loader for a bzImage, does not look): the kernel takes the archive's last bytes for a table of 800 MB and adds it up, byte by
/// byte, mostly where there is no memory, for hours. The initrd's place begins at a page, so one of whole pages ends a page earlier and leaves the tables alone.
/// Zeroes after an archive mean nothing; everybody gets the same.
const SCRIPT: &str = r#"
shopt -s lastpipe
G=$OUTBOARD_GUEST
words="console=ttyS0 quiet panic=-1 root=/dev/vda ro outboard.run=\"echo out''board-up; dd if=/dev/hwrng of=/dev/null bs=64 count=$REQUESTS\""
cp "$G/initrd.img" "$W/initrd.img"
truncate -s %4096 "$W/initrd.img"
ours=(outboard run --kernel "$G/vmlinux" --initrd "$W/initrd.img" --memory 512M --serial stdio --rng
    --disk "path=$G/root.img,format=raw,readonly" --cmdline "$words")
qemu=("$Q/usr/lib64/ld-linux-x86-64.so.2" --library-path "$Q/usr/lib/x86_64-linux-gnu" "$Q/usr/bin/qemu-system-x86_64"
    -L "$Q/usr/share/qemu" -L "$Q/usr/share/seabios")
theirs=(-object memory-backend-memfd,id=m,size=512M,share=on -accel kvm -cpu host -m 512M -smp 1
    -nodefaults -no-user-config -display none -no-reboot -serial stdio -kernel "$G/vmlinux" -initrd "$W/initrd.img"
    -append "$words" -drive "if=none,id=d,file=$G/root.img,format=raw,readonly=on" -device virtio-blk-pci,drive=d
    -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r)
# One that has failed is not tried again: it would take as long as all the others.
declare -A failed
boot() {
    local name=$1 begin=$EPOCHREALTIME line up=
    shift
    [ -z "${failed[$name]}" ] || return
    timeout -k 5 "$LIMIT" "$@" </dev/null 2>>"$W/log" | while IFS= read -r line; do
        case $line in
        *outboard-up*) up=$EPOCHREALTIME; echo "boot $name $((${up/[.,]/} - ${begin/[.,]/}))" ;;
        *copied,*) line=${line#*copied, }; echo "rng $name ${line%% s*}" ;;
        esac
    done
    [ -n "$up" ] || { failed[$name]=yes; tail -n 3 "$W/log" >&2; }
}
cat "$G/vmlinux" "$W/initrd.img" >/dev/null
"${qemu[@]}" --version >/dev/null
outboard --version >/dev/null
for ((round = 0; round < ROUNDS && SECONDS < END; round++)); do
    boot outboard "${ours[@]}"
    boot microvm "${qemu[@]}" -M microvm,pcie=on,rtc=on,memory-backend=m "${theirs[@]}"
    boot q35 "${qemu[@]}" -M q35,memory-backend=m "${theirs[@]}"
done
"#;

/// The group.
pub(crate) fn rows(bench: &Bench) -> Result<Vec<Row>> {
    let (lines, place) = measure(bench)?;
    let values = |kind: &str, name: &str, scale: f64| -> Vec<f64> {
        let lines = lines.iter().filter_map(|line| line.strip_prefix(kind)?.trim_start().strip_prefix(name));
        lines.filter_map(|rest| rest.trim().parse::<f64>().ok()).map(|value| value * scale).collect()
    };
    let per_request = 1e6 / f64::from(REQUESTS);
    let mut rows = Vec::new();
    for (kind, what, unit, scale, target) in [
        ("boot", "exec to the guest's first program", "s", 1e-6, Some(Target::Ratio(1.0))),
        ("rng", "64 bytes from /dev/hwrng", "us", per_request, None),
    ] {
        for (name, machine) in MACHINES {
            let inside = if kind == "rng" { ", virtio-rng-pci inside" } else { "" };
            let row = Row::new(what, unit, bench.qemu_name(&format!("{machine}{inside}")));
            let row = target.into_iter().fold(row, Row::target);
            let (ours, theirs) = (values(kind, OURS, scale), values(kind, name, scale));
            let counted = format!("{} and {} times", ours.len(), theirs.len());
            let failed = match (ours.is_empty(), theirs.is_empty()) {
                (true, _) => format!("; our guest did not get so far in {ONE_BOOT} s"),
                (_, true) => format!("; the peer's guest did not get so far in {ONE_BOOT} s"),
                _ => String::new(),
            };
            rows.push(row.of(ours, theirs).note(format!("{counted}, {place}{failed}")));
        }
    }
    Ok(rows)
}

/// What the script prints, and where it ran.
fn measure(bench: &Bench) -> Result<(Vec<String>, String)> {
    let mut attempt = 1;
    loop {
        let (mut command, place) = script(bench)?;
        let mut lines = Vec::new();
        let outcome = process::heard(&mut command, Duration::from_secs(WHOLE + AROUND), |line| {
            say::line(&format!("    {line}"));
            lines.push(line.to_owned());
        });
        match outcome {
            Ok(()) => return Ok((lines, place)),
            Err(error) if !lines.is_empty() => return Ok((lines, format!("{place}; cut short: {error:#}"))),
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(error) => say::line(&format!("    once more, since {error:#}")),
        }
        attempt += 1;
    }
}

/// The command that runs all boots, and where that is.
fn script(bench: &Bench) -> Result<(Command, String)> {
    let rounds = bench.rounds(5);
    let text = |qemu: &str, work: &str| {
        format!("Q={qemu} W={work} ROUNDS={rounds} REQUESTS={REQUESTS} LIMIT={ONE_BOOT} END={ROUNDS_END}\n{SCRIPT}")
    };
    let script = bench.dir.join("guests.sh");
    match host::kvm() {
        host::Kvm::Direct => {
            let (qemu, work) = (nested::quote(&bench.qemu.to_string_lossy()), nested::quote(&bench.dir.to_string_lossy()));
            fs::write(&script, text(&qemu, &work))?;
            let mut command = Command::new("bash");
            let path = env::var("PATH").unwrap_or_default();
            command.arg(&script).env("PATH", format!("{}:{path}", bench.programs.display()));
            command.env("OUTBOARD_GUEST", &bench.images).env("XDG_RUNTIME_DIR", &bench.dir);
            Ok((command, "on this host's KVM".to_owned()))
        }
        host::Kvm::Nested(reason) => {
            nested::prepare()?;
            let name = bench.qemu.file_name().unwrap_or_default().to_string_lossy().into_owned();
            fs::write(&script, text(&format!("/outboard/files/{name}"), "/tmp"))?;
            // An interrupted bench takes the machine with it.
            let mut command = host::command("setpriv");
            command.args(["--pdeathsig", "KILL", "--"]);
            command.arg(env::current_exe().context("Cannot find this program's own file")?);
            command.args(["nested", "--release", "--timeout", &WHOLE.to_string(), "--file"]).arg(&bench.qemu);
            command.arg("--file").arg(&script).args(["--", "bash", "/outboard/files/guests.sh"]);
            Ok((command, format!("all in the emulated machine: {reason}")))
        }
    }
}
