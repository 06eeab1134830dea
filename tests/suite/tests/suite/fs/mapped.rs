//! A guest that maps ids itself, on a mount of the share (`FUSE_ALLOW_IDMAP`): whoever looks through that mount is somebody else, and makes
//! files in the name of that one.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use suite::run;

use super::mounted::{Mounted, can_mount};

/// Takes a copy of the mount at a path and maps its ids, as a user namespace does, of which there has to be a process for the moment.
const MAP: &str = r#"
my ($from, $users, $read_only, @rest) = @ARGV;
my $nothing = "";
pipe(my $made, my $tell); pipe(my $done, my $end);
my $child = fork() // die;
if (!$child) { syscall(272, 0x10000000) == 0 or die "unshare: $!"; syswrite $tell, "x"; close $end; sysread $done, my $x, 1; exit }
close $tell; close $done; sysread $made, my $x, 1;
for my $kind ("uid", "gid") { open my $map, ">", "/proc/$child/${kind}_map" or die; syswrite $map, $users or die "$kind: $!" }
open my $namespace, "<", "/proc/$child/ns/user" or die;
my $mount = syscall(428, -100, $from, 1); $mount >= 0 or die "open_tree: $!";
my $attributes = pack("QQQQ", 0x100000 | $read_only, 0, 0, fileno $namespace);
syscall(442, $mount, $nothing, 0x1000, $attributes, 32) == 0 or die "mount_setattr: $!";
close $end; waitpid $child, 0;
"#;

/// A command that maps the ids of what is mounted at `from`, perhaps makes it read-only, and does `then` (perl) with `$mount`, which is attached
/// nowhere; its further arguments are `@rest`.
pub(super) fn map(from: &Path, users: &str, read_only: bool, then: &str) -> Command {
    let mut command = Command::new("perl");
    command.args(["-e", &format!("{MAP}{then};")]).arg(from).args([users, if read_only { "1" } else { "0" }]);
    command
}

/// Somebody who is root behind the mount.
const USER: u32 = 1000;

#[test]
fn a_guest_that_maps_ids_itself() {
    if !can_mount("a mount with ids mapped") {
        return;
    }
    for words in [&[][..], &["--cache", "always", "--writeback", "--posix-acl", "--killpriv-v2"]] {
        let mut mounted = Mounted::ours(words, &[]);
        let mapped = mounted.scratch.path("mapped");
        fs::create_dir(&mapped).unwrap();
        fs::set_permissions(mounted.scratch.path(""), PermissionsExt::from_mode(0o755)).unwrap();
        for (name, user) in [("root's", 0), ("user's", USER)] {
            fs::write(mounted.house.join(name), name).unwrap();
            chown(mounted.house.join(name), Some(user), Some(user)).unwrap();
        }
        let attach = r#"syscall(429, $mount, $nothing, -100, $rest[0], 4) == 0 or die "move_mount: $!""#;
        let attached = run(map(&mounted.seen, &format!("0 {USER} 1\n"), false, attach).arg(&mapped));
        assert_eq!(attached.code, Some(0), "{}", attached.err);
        let owner = |name: &str| fs::metadata(mapped.join(name)).map(|about| (about.uid(), about.gid())).unwrap();
        let own = |name: &str| fs::metadata(mounted.house.join(name)).map(|about| (about.uid(), about.gid())).unwrap();
        assert_eq!((owner("root's"), owner("user's")), ((USER, USER), (65534, 65534)), "{words:?}");
        let user = USER.to_string();
        let mut shell = Command::new("setpriv");
        shell.args(["--reuid", &user, "--regid", &user, "--clear-groups", "sh", "-ec"]).current_dir(&mapped);
        let script = "umask 22; echo x > file; mkdir folder; ln -s file link; mkfifo pipe; mv file folder/; ln folder/file file
            echo more >> \"root's\"; chmod 600 file; touch -d @5 file; rm link; ! echo x > \"user's\"; ! chmod 777 \"user's\"";
        let done = run(shell.arg(script));
        assert_eq!(done.code, Some(0), "{words:?}: {}", done.err);
        for name in ["file", "folder", "folder/file", "pipe"] {
            assert_eq!((own(name), owner(name)), ((0, 0), (USER, USER)), "{words:?}: {name}");
        }
        assert_eq!(fs::read_to_string(mounted.house.join("root's")).unwrap(), "root'smore\n");
        assert_eq!(fs::metadata(mounted.house.join("file")).unwrap().mode() & 0o777, 0o600);
        // Whoever is nobody behind the mount makes nothing.
        assert_eq!(fs::write(mapped.join("never"), "x").unwrap_err().raw_os_error(), Some(libc::EOVERFLOW), "{words:?}");
        assert_eq!(run(Command::new("umount").arg(&mapped)).code, Some(0));
        mounted.unmount();
    }
}
