//! Whole guests, side by side where a stock kernel boots: how long until the first program runs, and how long one small
//! request to the random number generator takes from inside.
//!
//! On a host whose KVM cannot run a stock kernel both sides run in the same emulated machine; see `cargo xtask nested`.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use super::Bench;
use super::table::{Row, Target};
use crate::{host, nested, say};

/// Requests to the random number generator in each guest.
const REQUESTS: u32 = 2000;
const OURS: &str = "outboard";
const MACHINES: [(&str, &str); 2] = [("microvm", "-M microvm,pcie=on"), ("q35", "-M q35")];
/// Seconds for one boot where it is emulated twice over, with room for a busy host.
const ONE_BOOT: u32 = 60;

/// What both sides run: the same kernel, initrd, disk and command, one processor, 512 MiB of shared memory. `$EPOCHREALTIME`
/// is read by the shell itself: a program would take longer to start than some of what is measured.
const SCRIPT: &str = r#"
qemu() {
    timeout 60 "$Q/usr/lib64/ld-linux-x86-64.so.2" --library-path "$Q/usr/lib/x86_64-linux-gnu" "$Q/usr/bin/qemu-system-x86_64" \
        -L "$Q/usr/share/qemu" -L "$Q/usr/share/seabios" "$@"
}
qemu_guest() {
    qemu -M "$1,memory-backend=m" -object memory-backend-memfd,id=m,size=512M,share=on -accel kvm -cpu host -m 512M -smp 1 \
        -nodefaults -no-user-config -display none -no-reboot -serial stdio -kernel "$G/vmlinux" -initrd "$G/initrd.img" \
        -append "$words" -drive "if=none,id=d,file=$G/root.img,format=raw,readonly=on" -device virtio-blk-pci,drive=d \
        -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r
}
our_guest() {
    outboard run --kernel "$G/vmlinux" --initrd "$G/initrd.img" --memory 512M --serial stdio --rng \
        --disk "path=$G/root.img,format=raw,readonly" --cmdline "$words"
}
boot() {
    local name=$1 begin=$EPOCHREALTIME line up
    shift
    "$@" </dev/null 2>>"$LOG" | while IFS= read -r line; do
        case $line in
        *outboard-up*) up=$EPOCHREALTIME; echo "boot $name $((${up/[.,]/} - ${begin/[.,]/}))" ;;
        *copied,*) line=${line#*copied, }; echo "rng $name ${line%% s*}" ;;
        esac
    done
}
G=$OUTBOARD_GUEST
words="console=ttyS0 quiet panic=-1 root=/dev/vda ro outboard.run=\"echo out''board-up; dd if=/dev/hwrng of=/dev/null bs=64 count=$REQUESTS\""
cat "$G/vmlinux" "$G/initrd.img" >/dev/null
qemu --version >/dev/null
for ((round = 0; round < ROUNDS; round++)); do
    boot outboard our_guest
    boot microvm qemu_guest microvm,pcie=on,acpi=on
    boot q35 qemu_guest q35
done
"#;

/// The group.
pub(crate) fn rows(bench: &Bench) -> Result<Vec<Row>> {
    let (text, place) = measure(bench)?;
    let values = |kind: &str, name: &str, scale: f64| -> Vec<f64> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(kind)?.trim_start().strip_prefix(name));
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
            let failed = if theirs.is_empty() { "; the peer's guest did not get so far in 60 s" } else { "" };
            rows.push(row.of(ours, theirs).note(format!("{place}{failed}")));
        }
    }
    Ok(rows)
}

/// What the script prints, and where it ran.
fn measure(bench: &Bench) -> Result<(String, String)> {
    let rounds = bench.rounds(3);
    let head = |qemu: &str, log: &str| format!("Q={qemu} LOG={log} ROUNDS={rounds} REQUESTS={REQUESTS}\n{SCRIPT}");
    let script = bench.dir.join("guests.sh");
    let (mut command, place) = match host::kvm() {
        host::Kvm::Direct => {
            let (qemu, log) = (nested::quote(&bench.qemu.to_string_lossy()), bench.dir.join("guests.log"));
            fs::write(&script, head(&qemu, &nested::quote(&log.to_string_lossy())))?;
            let mut command = Command::new("bash");
            let path = env::var("PATH").unwrap_or_default();
            command.arg(&script).env("PATH", format!("{}:{path}", bench.programs.display()));
            command.env("OUTBOARD_GUEST", &bench.images).env("XDG_RUNTIME_DIR", &bench.dir);
            (command, "on this host's KVM".to_owned())
        }
        host::Kvm::Nested(reason) => {
            let name = bench.qemu.file_name().unwrap_or_default().to_string_lossy().into_owned();
            fs::write(&script, head(&format!("/outboard/files/{name}"), "/tmp/log"))?;
            let mut command = Command::new(env::current_exe().context("Cannot find this program's own file")?);
            let limit = (rounds * 3 * ONE_BOOT).to_string();
            command.args(["nested", "--release", "--timeout", &limit, "--file"]).arg(&bench.qemu).arg("--file").arg(&script);
            command.args(["--", "bash", "/outboard/files/guests.sh"]);
            (command, format!("both in the emulated machine: {reason}"))
        }
    };
    let output = say::quietly(&mut command)?;
    Ok((String::from_utf8_lossy(&output).into_owned(), place))
}
