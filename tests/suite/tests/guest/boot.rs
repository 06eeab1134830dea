//! What a guest finds: processors, memory, devices, and the kernels it can be booted from.

use super::machine::Plan;

/// Lines that a healthy kernel does not write.
pub(crate) const NO_TROUBLE: &str = "if dmesg | grep -v Speculative | grep -iE 'WARNING:|BUG:|Oops|Call Trace|I/O error|is not a head|unexpected|timed out'; then exit 9; fi";

#[test]
fn debian_finds_its_devices() {
    let command = format!(
        "set -e; nproc; cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=32 count=1 status=none | od -An -tx1\n\
         test $(nproc) = 2; test \"$(cat /sys/class/misc/hw_random/rng_current)\" = virtio_rng.0\n\
         ls /sys/bus/virtio/devices; test $(ls /sys/bus/virtio/devices | wc -l) = 4; {NO_TROUBLE}"
    );
    Plan::run(&command).with_disk().finish().passed();
}

#[test]
fn a_bzimage_boots_as_well() {
    let mut plan = Plan::run("uname -r");
    plan.kernel = "vmlinuz";
    let ended = plan.finish().passed();
    assert!(ended.console.contains("-amd64"), "{}", ended.console);
}

#[test]
fn memory_reaches_beyond_the_hole_below_four_gigabytes() {
    let command = "set -e; awk '/MemTotal/ {exit !($2 > 4800000)}' /proc/meminfo\n\
                   dd if=/dev/zero of=/dev/shm/x bs=1M count=32; grep 'System RAM' /proc/iomem; grep -q '^1.*System RAM' /proc/iomem";
    Plan::run(command).machine("cpus = 1\nmemory = \"5G\"\n").finish().passed();
}

#[test]
fn many_processors_start() {
    Plan::run("set -e; cat /sys/devices/system/cpu/online; test $(nproc) = 8")
        .machine("cpus = 8\nmemory = \"1G\"\n")
        .finish()
        .passed();
}

#[test]
fn a_disk_is_written_with_many_queues_and_kept() {
    let scratch = suite::Scratch::new();
    let image = scratch.image("data.img", 64 << 20);
    let section = format!("[disk.c-data]\npath = \"{}\"\nqueues = 2\nserial = \"data-1\"\n", image.display());
    let command = "set -e; d=/dev/vdc; test $(cat /sys/block/vdc/serial) = data-1; test $(ls /sys/block/vdc/mq | wc -l) = 2\n\
                   mkfs.ext4 -q $d; mount $d /mnt; cp -r /usr/bin/. /mnt/ 2>/dev/null || true; sync; (cd /mnt; sha256sum * 2>/dev/null >/tmp/sums || true)\n\
                   umount /mnt; e2fsck -fn $d; mount $d /mnt; cd /mnt; sha256sum --quiet -c /tmp/sums; rm -rf /mnt/*; fstrim -v /mnt; cd /; umount /mnt; e2fsck -fn $d";
    Plan::run(&format!("{command}\n{NO_TROUBLE}")).with_disk().section(&section).finish().passed();
}

#[test]
fn an_ordinary_user_runs_a_machine() {
    let mut plan = Plan::run("id -u; ls /dev/vda /dev/hwrng");
    plan.user = Some(1000);
    plan.finish().passed();
}
