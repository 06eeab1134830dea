//! What this host offers.

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use rustix::system::uname;
use sandbox::{Floor, Kernel, NetNamespace};
use virtio::metrics::page;

use super::{Finding, State};
use crate::runtime;
use crate::supervisor::programs::PROGRAMS;

/// Everything, in the order in which a machine needs it.
pub fn look() -> Vec<Finding> {
    let kernel = Kernel::running();
    let mut findings = vec![
        version(),
        kvm(
            File::options().read(true).write(true).open("/dev/kvm").map(drop).map_err(|error| error.kind()),
            Path::new("/sys/module/kvm_pvm").exists(),
            &read("/proc/cpuinfo"),
        ),
        user_namespaces(),
        landlock(kernel),
        executable_memory(kernel),
        system_calls(&read("/proc/sys/kernel/seccomp/actions_avail")),
        sealed_memory(),
        huge_pages(&read("/proc/meminfo")),
    ];
    findings.push(programs());
    findings.push(match runtime::base() {
        Ok(base) => Finding::ok("directory", base.display().to_string()),
        Err(error) => {
            Finding::missing("directory", format!("{error:#}"), "set XDG_RUNTIME_DIR to a directory of yours of mode 700")
        }
    });
    findings
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn version() -> Finding {
    let name = uname();
    Finding::ok("kernel", format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy()))
}

fn kvm(opened: Result<(), ErrorKind>, in_software: bool, cpuinfo: &str) -> Finding {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    let processor = if has("vmx") { Some("VT-x") } else { has("svm").then_some("AMD-V") };
    match (opened, processor) {
        (Ok(()), _) if in_software => Finding::missing(
            "KVM",
            "/dev/kvm works without processor support (kvm_pvm); most kernels do not run on it",
            "use a host whose processor offers VT-x or AMD-V, or enable nested virtualisation for this one",
        ),
        (Ok(()), Some(processor)) => Finding::ok("KVM", format!("/dev/kvm opens, and the processor has {processor}")),
        (Ok(()), None) => Finding::new("KVM", State::Note, "/dev/kvm opens, but the processor names neither VT-x nor AMD-V"),
        (Err(ErrorKind::PermissionDenied), _) => {
            Finding::missing("KVM", "you may not open /dev/kvm", "as root: usermod -aG kvm YOU; then log in again")
        }
        (Err(ErrorKind::NotFound), Some("VT-x")) => {
            Finding::missing("KVM", "there is no /dev/kvm, though the processor has VT-x", "as root: modprobe kvm_intel")
        }
        (Err(ErrorKind::NotFound), Some(_)) => {
            Finding::missing("KVM", "there is no /dev/kvm, though the processor has AMD-V", "as root: modprobe kvm_amd")
        }
        (Err(ErrorKind::NotFound), None) => Finding::missing(
            "KVM",
            "there is no /dev/kvm, and the processor offers neither VT-x nor AMD-V",
            "enable virtualisation in the firmware, or nested virtualisation if this is a virtual machine itself",
        ),
        (Err(kind), _) => Finding::missing("KVM", format!("/dev/kvm does not open: {kind}"), "see the kernel's log"),
    }
}

/// The sysctls by which hosts forbid user namespaces, what they are set to then, and what to do.
const RESTRICTIONS: [(&str, &str, &str); 3] = [
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "as root: an AppArmor profile for outboard with `userns,`, or sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("kernel/unprivileged_userns_clone", "0", "as root: sysctl kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "as root: sysctl user.max_user_namespaces=10000"),
];

fn user_namespaces() -> Finding {
    let Err(error) = NetNamespace::new() else {
        return Finding::ok("namespaces", "you may make user and network namespaces");
    };
    let is_set = |path: &str, value: &str| read(&format!("/proc/sys/{path}")).trim() == value;
    let reason = RESTRICTIONS.iter().find(|(path, value, _)| is_set(path, value));
    let remedy =
        reason.map_or("a container runtime's filter may forbid them; allow clone and unshare there", |(_, _, what)| what);
    Finding::missing("namespaces", format!("{error}"), remedy)
}

fn landlock(kernel: Kernel) -> Finding {
    let version = kernel.landlock;
    match (version, kernel.floor()) {
        (0, _) => Finding::missing(
            "Landlock",
            "the kernel has none, or it is not enabled",
            "boot with landlock among lsm=..., or use Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK",
        ),
        (_, Some(Floor::Linux612)) => Finding::ok("Landlock", format!("version {version}")),
        (1..6, floor) => Finding::missing(
            "Landlock",
            format!("version {version}; version 6 is needed"),
            match floor {
                Some(floor) => format!("use Linux 6.12, or accept less with --sandbox-floor {floor}"),
                None => "use Linux 6.12".to_owned(),
            },
        ),
        _ => Finding::ok("Landlock", format!("version {version}")),
    }
}

fn executable_memory(kernel: Kernel) -> Finding {
    if kernel.refuses_executable_memory {
        return Finding::ok("memory", "can be refused to be both writable and executable");
    }
    let remedy = "use Linux 6.3 or later, or accept less with --sandbox-floor linux-6.1";
    Finding::missing("memory", "cannot be refused to be both writable and executable", remedy)
}

fn system_calls(actions: &str) -> Finding {
    if actions.split_whitespace().any(|action| action == "kill_process") {
        return Finding::ok("system calls", "can be filtered (seccomp)");
    }
    Finding::missing("system calls", "cannot be filtered", "use a kernel with CONFIG_SECCOMP_FILTER")
}

fn sealed_memory() -> Finding {
    match page::make() {
        Ok(_) => Finding::ok("guest memory", "can be sealed against shrinking (memfd)"),
        Err(error) => {
            Finding::missing("guest memory", format!("cannot be sealed: {error}"), "use a kernel with CONFIG_MEMFD_CREATE")
        }
    }
}

/// Guest memory does not ask for huge pages by itself; the host may give them to shared memory all the same.
fn huge_pages(meminfo: &str) -> Finding {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()).unwrap_or("0").to_owned()
    };
    let shared = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let chosen = shared.split(['[', ']']).nth(1).unwrap_or("never");
    let says = match chosen {
        "always" | "force" => format!("shared memory gets them (shmem_enabled is {chosen})"),
        _ => format!("shared memory gets none (shmem_enabled is {chosen}); guests are slower"),
    };
    let reserved = field("HugePages_Total");
    let reserved = if reserved == "0" { String::new() } else { format!("; {reserved} are reserved, for others") };
    let state = if chosen == "always" || chosen == "force" { State::Ok } else { State::Note };
    Finding::new("huge pages", state, format!("{says}{reserved}"))
}

fn programs() -> Finding {
    let dir = env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf)).unwrap_or_default();
    let missing: Vec<&str> = PROGRAMS.into_iter().filter(|name| !dir.join(name).is_file()).collect();
    if missing.is_empty() {
        return Finding::ok("programs", format!("all {} are in {}", PROGRAMS.len(), dir.display()));
    }
    let remedy = "install all programs into one directory";
    Finding::missing("programs", format!("{} has no {}", dir.display(), missing.join(", ")), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_kvm_can_be_away_has_its_remedy() {
        let (intel, amd, none) = ("flags\t\t: fpu vmx sse", "flags\t\t: fpu svm", "flags\t\t: fpu");
        let remedy = |opened, software, cpu| kvm(opened, software, cpu).remedy.unwrap_or_default();
        assert_eq!(kvm(Ok(()), false, intel).state, State::Ok);
        assert_eq!(kvm(Ok(()), false, none).state, State::Note);
        assert!(remedy(Ok(()), true, intel).contains("nested virtualisation"));
        assert!(remedy(Err(ErrorKind::PermissionDenied), false, intel).contains("usermod -aG kvm"));
        assert!(remedy(Err(ErrorKind::NotFound), false, intel).ends_with("modprobe kvm_intel"));
        assert!(remedy(Err(ErrorKind::NotFound), false, amd).ends_with("modprobe kvm_amd"));
        assert!(remedy(Err(ErrorKind::NotFound), false, none).contains("firmware"));
    }

    #[test]
    fn an_old_kernel_is_told_which_floor_it_reaches() {
        let old = Kernel { landlock: 2, refuses_executable_memory: false };
        assert!(landlock(old).remedy.unwrap().ends_with("--sandbox-floor linux-6.1"));
        assert_eq!(executable_memory(old).state, State::Missing);
        let new = Kernel { landlock: 7, refuses_executable_memory: true };
        assert_eq!((landlock(new).state, executable_memory(new).state), (State::Ok, State::Ok));
        assert_eq!(system_calls("kill_thread errno").state, State::Missing);
    }
}
