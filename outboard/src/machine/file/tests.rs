//! Golden texts: what a person reads who has made a mistake in a machine file.

use super::*;
use crate::machine::share;

fn error(text: &str) -> String {
    let error = parse(text, "machine.toml", Path::new("/vm")).unwrap_err();
    assert!(error.is::<Usage>(), "{error:#}");
    error.to_string()
}

const GOOD: &str = r#"
[machine]
kernel = "vmlinuz"
memory = "1G"
on-reboot = "exit"

[rng.entropy]
max-bytes = 1024
period = 1000

[disk.zeta]
path = "z.img"
readonly = true

[disk.alpha]
path = "/images/a.img"
queues = 2

[console.main]
output = "file"
path = "log"

[device.share]
class = "fs"
socket = "fs.sock"
"#;

#[test]
fn a_machine_file_is_read_in_its_own_order_and_relative_to_itself() {
    let machine = parse(GOOD, "dir/web.toml", Path::new("/vm")).unwrap();
    assert_eq!((machine.name.as_str(), machine.memory, machine.cpus), ("web", 1 << 30, 1));
    assert_eq!(machine.kernel, Path::new("/vm/vmlinuz"));
    let names: Vec<&str> = machine.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["entropy", "zeta", "alpha", "main", "share"]);
    let Backend::Process(disk) = &machine.devices[1].backend else { panic!("a disk is a process") };
    assert_eq!(disk.args, ["--read-only"]);
    let images = disk.disk.as_ref().map(|disk| disk.images.clone()).unwrap();
    assert_eq!(images, [Image { path: "/vm/z.img".into(), format: ImageFormat::Raw }]);
    assert_eq!(machine.devices[4].backend, Backend::Socket("/vm/fs.sock".into()));
}

#[test]
fn a_share_with_everything() {
    let text = r#"
[machine]
kernel = "k"
cpus = 3
[share.home]
path = "here"
[share.more]
path = "/there"
readonly = true
cache = "always"
owner = "squash=7"
writeback = true
xattr = true
xattrmap = ":map::user.guest.:"
posix-acl = true
negative-timeout = 5
queues = 2
"#;
    let machine = parse(text, "m.toml", Path::new("/vm")).unwrap();
    let args = |index: usize| {
        let Backend::Process(program) = &machine.devices[index].backend else { panic!("a share is a process") };
        program.args.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(args(0), "--shared-dir /vm/here --tag home --num-request-queues 3 --owner-map me");
    assert_eq!(
        args(1),
        "--shared-dir /there --tag more --num-request-queues 2 --readonly --writeback --xattr --posix-acl \
         --owner-map squash=7 --cache always --xattrmap :map::user.guest.: --negative-timeout 5"
    );
    let queues: Vec<_> = machine.devices.iter().map(|device| device.queues).collect();
    assert_eq!(queues, [Some(4), Some(3)], "one more for what must not wait");
    let check = |owner: &str| share::check(&Share { path: "/".into(), owner: Some(owner.into()), ..Share::default() }, "s");
    assert!(["me", "me=1000", "squash", "squash=0"].into_iter().all(|owner| check(owner).is_ok()));
    assert!(check("exact").unwrap_err().to_string().contains("[device.NAME]"));
    assert!(check("you").unwrap_err().to_string().contains("is not one of me, me=ID"));
    let gone = share::check(&Share { path: "/not/there".into(), ..Share::default() }, "s").unwrap_err().to_string();
    assert_eq!(gone, "Cannot find the directory /not/there of the share `s`");
}

#[test]
fn a_disk_with_everything() {
    let text = r#"
[machine]
kernel = "k"
[disk.root]
path = "top.qcow2"
format = "qcow2"
backing = [{ path = "middle.qcow2", format = "qcow2" }, { path = "/base.img", format = "raw" }]
ephemeral = true
ephemeral-dir = "scratch"
cache = "direct"
engine = "threads"
limit-ops = 100
limit-ops-burst = 500
limit-bytes = "1M"
limit-bytes-burst = "4M"
limit-group = "slow"
queues = 2
serial = "S"
[disk.data]
path = "d.qcow2"
format = "qcow2"
data-file = "d.raw"
"#;
    let machine = parse(text, "web.toml", Path::new("/vm")).unwrap();
    let disk = |index: usize| match &machine.devices[index].backend {
        Backend::Process(program) => (program.args.clone(), program.disk.clone().unwrap()),
        Backend::Socket(_) => panic!("a disk is a process"),
    };
    let (args, root) = disk(0);
    assert_eq!(args, ["--direct", "--engine", "threads", "--num-queues", "2", "--serial", "S"]);
    let paths: Vec<&Path> = root.files().collect();
    assert_eq!(paths, [Path::new("/vm/top.qcow2"), Path::new("/vm/middle.qcow2"), Path::new("/base.img")]);
    assert_eq!((root.ephemeral.as_deref(), root.limit_group.as_deref()), (Some(Path::new("/vm/scratch")), Some("slow")));
    assert_eq!((root.limits.operations.argument(), root.limits.bytes.argument()), ("100:500".into(), "1048576:4194304".into()));
    assert_eq!(disk(1).1.data_file.as_deref(), Some(Path::new("/vm/d.raw")));
    let wrong = "[machine]\nkernel = \"k\"\n[disk.a]\npath = \"x\"\nformat = \"qcow2\"\nbacking = [{ path = \"b\" }]\n";
    assert_eq!(
        error(wrong),
        "machine.toml:6: Each image of `backing` in [disk.a] must have a `path` and a `format`, which is one of \"raw\", \"qcow2\", and nothing else"
    );
}

#[test]
fn a_typo_names_the_line_the_table_and_the_nearest_key() {
    let text = "[machine]\nkernel = \"k\"\n\n[disk.root]\npath = \"x\"\n\nfromat = \"raw\"\n";
    assert_eq!(error(text), "machine.toml:7: Unknown key `fromat` in [disk.root]; did you mean `format`?");
}

#[test]
fn an_unknown_table_and_a_key_like_no_other() {
    assert_eq!(error("[machine]\nkernel = \"k\"\n[disks.root]\n"), "machine.toml:3: Unknown table `disks`; did you mean `disk`?");
    assert_eq!(
        error("[machine]\nkernel = \"k\"\n[rng.r]\ncolour = 1\n"),
        "machine.toml:4: Unknown key `colour` in [rng.r]; known are `max-bytes`, `period`"
    );
}

#[test]
fn what_is_missing_or_of_the_wrong_kind_is_said() {
    assert_eq!(error("[machine]\ncpus = 2\n"), "machine.toml:1: [machine] needs `kernel`");
    assert_eq!(error("[disk.a]\npath = \"x\"\n"), "machine.toml: The machine file needs a table [machine]");
    assert_eq!(
        error("[machine]\nkernel = \"k\"\ncpus = \"two\"\n"),
        "machine.toml:3: `cpus` in [machine] must be a number from 1 to 64, not \"two\""
    );
    assert_eq!(
        error("[machine]\nkernel = \"k\"\nmemory = \"12\"\n"),
        "machine.toml:3: Cannot read the size `12`: write a number and a unit, such as 512M or 2G"
    );
    assert_eq!(
        error("[machine]\nkernel = \"k\"\n[disk.a]\npath = \"x\"\nformat = \"row\"\n"),
        "machine.toml:5: Unknown value `row` in [disk.a]; did you mean `raw`?"
    );
}

#[test]
fn tables_whose_keys_depend_on_each_other() {
    let with = |table: &str| error(&format!("[machine]\nkernel = \"k\"\n{table}"));
    assert_eq!(with("[console.c]\noutput = \"file\"\n"), "machine.toml:3: [console.c] needs a `path`");
    assert_eq!(with("[rng.r]\nperiod = 5\n"), "machine.toml:3: [rng.r] has `period` and no `max-bytes` to go with it");
    assert_eq!(with("[device.d]\nsocket = \"s\"\n"), "machine.toml:3: [device.d] needs either `class` or `id`");
}

#[test]
fn all_mistakes_are_found_at_once_in_the_order_of_the_file() {
    let text = "[machine]\ncpus = 65\nkernal = \"k\"\n[disk.a]\nreadonly = \"yes\"\n[disk]\nb = 1\n[console.c]\noutput = \"hologram\"\npath = \"\"\n";
    let problems = look(text, "machine.toml", Path::new("/vm")).unwrap_err();
    let says: Vec<String> = problems.iter().map(|problem| problem.sentence("m")).collect();
    assert_eq!(
        says,
        [
            "m:1: [machine] needs `kernel`",
            "m:2: `cpus` in [machine] must be a number from 1 to 64, not 65",
            "m:3: Unknown key `kernal` in [machine]; did you mean `kernel`?",
            "m:4: [disk.a] needs `path`",
            "m:5: `readonly` in [disk.a] must be true or false, not \"yes\"",
            "m:7: `b` is in no disk: write [disk.NAME] above it",
            "m:9: Unknown value `hologram` in [console.c]; known are `terminal`, `attach`, `pty`, `file`, `socket`",
            "m:10: `path` in [console.c] must be a path, not \"\"",
        ]
    );
    let error = parse(text, "m", Path::new("/vm")).unwrap_err().to_string();
    assert_eq!(error, "m:1: [machine] needs `kernel` (7 more: outboard check m)");
}

#[test]
fn what_is_no_toml_is_told_by_its_line() {
    let problems = look("[machine]\nkernel = \"k\ncpus = \n", "m", Path::new("/vm")).unwrap_err();
    assert!(problems.iter().all(|problem| problem.line >= 2), "{problems:?}");
    assert!(look("kernel", "m", Path::new("/")).is_err());
}
