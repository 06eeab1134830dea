//! Every process of a running machine, looked at from outside.

use std::collections::BTreeSet;
use std::fs;

use suite::{Scratch, status};

use super::machine::Plan;

/// What a descriptor may be, by process; standard streams besides.
fn allowed(role: &str) -> &'static [&'static str] {
    match role {
        "vmm" => &["anon_inode:", "socket:", "memfd:", "/dev/kvm", "vmlinux", "initrd.img"],
        "a-root" => &["anon_inode:", "socket:", "memfd:", "root.img"],
        "b-script" => &["anon_inode:", "socket:", "memfd:", "script.img"],
        "main" => &["anon_inode:", "socket:", "memfd:", "console.log"],
        _ => &["anon_inode:", "socket:", "memfd:"],
    }
}

#[test]
fn every_process_of_a_machine_is_confined() {
    let scratch = Scratch::new();
    let house = scratch.path("house");
    fs::create_dir(&house).unwrap();
    let share = format!("[share.house]\npath = \"{}\"\n", house.display());
    let mut machine = Plan::run("echo up; sleep 1000").with_disk().section(&share).start();
    machine.wait_for("up");
    let ours = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    let mut pid_namespaces = BTreeSet::new();
    for role in ["vmm", "a-root", "b-script", "entropy", "main", "house"] {
        let pid = u32::try_from(machine.pid(role)).unwrap();
        assert_eq!(status(pid, "NoNewPrivs"), "1", "{role}");
        // The server of a directory keeps rights over its own user's files: to pass their permissions by, as the guest's root expects.
        let kept = if role == "house" { "000000008000000e" } else { "0000000000000000" };
        for (set, expected) in [("CapInh", ""), ("CapPrm", kept), ("CapEff", kept), ("CapBnd", ""), ("CapAmb", "")] {
            assert_eq!(status(pid, set).trim_start_matches('0'), expected.trim_start_matches('0'), "{role} {set}");
        }
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let text = fs::read_to_string(task.path().join("status")).unwrap();
            assert!(text.contains("Seccomp:\t2"), "{role}: each thread has its filter");
        }
        for name in ["user", "mnt", "uts", "ipc", "pid", "net"] {
            assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap(), ours(name), "{role} {name}");
        }
        pid_namespaces.insert(fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap());
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{role}: {mounts}");
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap().display().to_string();
            let standard = fd.file_name().to_string_lossy().parse::<u32>().unwrap() < 3;
            // Its share, and the list of its own descriptors, are mounts that are attached nowhere: all there is of them is a root.
            let own = role == "house" && target == "/";
            let known = own || allowed(role).iter().any(|part| target.contains(part));
            assert!(standard || known, "{role}: descriptor {:?} is {target}", fd.file_name());
        }
    }
    assert_eq!(pid_namespaces.len(), 6, "each is alone");
    let doctor = machine.outboard(&["doctor", &machine.name]);
    assert!(doctor.contains("over its user's own files") && !doctor.contains("end the machine"), "{doctor}");
    let composer = u32::try_from(machine.id()).unwrap();
    assert_eq!(status(composer, "NoNewPrivs"), "1");
    assert_eq!(status(composer, "Seccomp"), "2");
    assert_eq!(status(composer, "CapEff"), "0000000000000000");
    // KVM has a thread of its own in each machine's process.
    let tasks = fs::read_dir(format!("/proc/{}/task", machine.pid("vmm"))).unwrap().flatten();
    let names = tasks.map(|task| fs::read_to_string(task.path().join("comm")).unwrap_or_default());
    let threads: Vec<String> = names.filter(|name| !name.starts_with("kvm-")).collect();
    assert_eq!(threads.len(), 3, "{threads:?}: a thread for control and one for each processor, none for a device");
}
