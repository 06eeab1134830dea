//! `--watch`: what this host changes shows soon where it changes something often, and is believed for long elsewhere.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use suite::{Scratch, program, run};

use super::mounted::{Mounted, can_mount};

const SHORT: Duration = Duration::from_millis(100);
const LONGER: Duration = Duration::from_millis(700);

#[test]
fn where_the_host_changes_something_the_guest_asks_again_soon() {
    if !can_mount("what a guest believes") {
        return;
    }
    let mut mounted = Mounted::ours(&["--watch", "--timeout", "60", "--negative-timeout", "60"], &[]);
    for name in ["busy", "quiet", "own"] {
        let (_, there) = mounted.both(name);
        fs::create_dir(&there).unwrap();
        fs::write(there.join("file"), "x").unwrap();
    }
    let len = |mounted: &Mounted, dir: &str| fs::metadata(mounted.both(dir).0.join("file")).unwrap().len();
    let missing = |mounted: &Mounted, dir: &str, name: &str| fs::metadata(mounted.both(dir).0.join(name)).is_err();
    // A directory is watched from the first look into it.
    for name in ["busy", "quiet", "own"] {
        assert!(missing(&mounted, name, "other"));
    }
    fs::write(mounted.both("busy").1.join("other"), "x").unwrap();
    fs::write(mounted.both("own").0.join("another"), "x").unwrap();
    sleep(SHORT);
    for name in ["busy", "quiet", "own"] {
        assert_eq!(len(&mounted, name), 1);
        assert!(missing(&mounted, name, "later"));
        fs::write(mounted.both(name).1.join("file"), "xyz").unwrap();
        fs::write(mounted.both(name).1.join("later"), "x").unwrap();
    }
    sleep(LONGER);
    assert_eq!((len(&mounted, "busy"), missing(&mounted, "busy", "later")), (3, false), "the host had changed something there");
    assert_eq!((len(&mounted, "quiet"), missing(&mounted, "quiet", "later")), (1, true), "nothing had ever happened there");
    assert_eq!((len(&mounted, "own"), missing(&mounted, "own", "later")), (1, true), "what the guest does itself it knows");
    mounted.unmount();
}

#[test]
fn who_keeps_nothing_has_nothing_to_watch() {
    let scratch = Scratch::new();
    let mut server = Command::new(program("outboard-virtiofsd"));
    let ended =
        run(server.args(["--shared-dir", "/", "--watch", "--cache", "never", "--socket-path"]).arg(scratch.path("fs.sock")));
    assert_eq!((ended.code, ended.err.contains("not with --cache never")), (Some(1), true), "{}", ended.err);
}
