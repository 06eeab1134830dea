//! Programs that people use on a shared directory: git, compilers, a database that is killed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use suite::run;

use super::mounted::{Mounted, can_mount, random};

/// Runs a program that has to succeed, and gives what it said.
fn done(command: &mut Command) -> String {
    let ended = run(command);
    assert_eq!(ended.code, Some(0), "{command:?}: {}{}", ended.out, ended.err);
    ended.out
}

/// Every file below a place with its content.
fn files(top: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut all, mut left) = (BTreeMap::new(), vec![top.to_path_buf()]);
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => left.push(entry.path()),
                _ => drop(all.insert(entry.path().strip_prefix(top).unwrap().to_path_buf(), fs::read(entry.path()).unwrap())),
            }
        }
    }
    all
}

/// git as somebody who has set nothing up.
fn git(folder: &Path, words: &[&str]) -> String {
    let mut command = Command::new("git");
    command
        .arg("-C")
        .arg(folder)
        .args(["-c", "user.name=A", "-c", "user.email=a@b", "-c", "gc.auto=0", "-c", "safe.directory=*"])
        .args(words);
    done(command.env("HOME", "/nonexistent").env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null"))
}

fn grow(folder: &Path, round: u64) {
    for number in 0..90 {
        let path = folder.join(format!("part-{}/file-{number}", number % 7));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, random(usize::try_from(number * 97 % 6000).unwrap(), number + round % 2 * (number % 3) * 1000 + round))
            .unwrap();
    }
}

/// Makes one with a past, two branches that meet, and packs it.
fn history(here: &Path) {
    fs::create_dir(here).unwrap();
    git(here, &["init", "-q", "-b", "main"]);
    for round in 0..3 {
        grow(here, round);
        git(here, &["add", "-A"]);
        git(here, &["commit", "-q", "-m", &format!("round {round}")]);
        git(here, &["tag", &format!("round-{round}")]);
    }
    git(here, &["checkout", "-q", "-b", "side", "round-1"]);
    fs::write(here.join("aside"), "x").unwrap();
    git(here, &["add", "-A"]);
    git(here, &["commit", "-q", "-m", "aside"]);
    git(here, &["checkout", "-q", "main"]);
    git(here, &["merge", "-q", "--no-edit", "side"]);
    git(here, &["gc", "-q", "--prune=now"]);
    git(here, &["fsck", "--full", "--strict"]);
    assert_eq!(git(here, &["status", "--porcelain"]), "");
}

fn a_repository(words: &[&str]) {
    if !can_mount("git") {
        return;
    }
    let mut mounted = Mounted::ours(words, &[]);
    let (here, there) = mounted.both("one");
    history(&here);
    git(&mounted.seen, &["clone", "-q", "--no-hardlinks", "one", "two"]);
    git(&mounted.seen, &["clone", "-q", "one", "linked"]);
    let outside = mounted.scratch.path("outside");
    git(&mounted.scratch.path(""), &["clone", "-q", there.to_str().unwrap(), outside.to_str().unwrap()]);
    run(Command::new("sync").arg("-f").arg(&mounted.seen));
    git(&there, &["fsck", "--full", "--strict"]);
    assert_eq!(git(&there, &["status", "--porcelain"]), "", "the host sees the same");
    let head = git(&outside, &["rev-parse", "HEAD"]);
    let worktree = |top: &Path| {
        let mut all = files(top);
        all.retain(|path, _| !path.starts_with(".git"));
        all
    };
    for clone in ["one", "two", "linked"] {
        assert_eq!(git(&mounted.seen.join(clone), &["rev-parse", "HEAD"]), head);
        assert!(worktree(&mounted.seen.join(clone)) == worktree(&outside), "{clone}");
    }
    assert!(files(&mounted.seen) == files(&mounted.house));
    mounted.unmount();
}

#[test]
fn a_repository_that_is_kept_for_a_second() {
    a_repository(&[]);
}

#[test]
fn a_repository_of_which_nothing_is_kept() {
    a_repository(&["--cache", "never", "--allow-mmap"]);
}

#[test]
fn a_repository_that_is_kept_with_what_is_written() {
    a_repository(&["--cache", "always", "--writeback", "--num-request-queues", "2"]);
}

const MODULES: usize = 24;

/// A program in C, of many files, that are compiled two at a time; and one in Rust.
fn build(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let mut header = String::new();
    let mut calls = String::new();
    for number in 0..MODULES {
        let body = (0..200).map(|line| format!("    sum = sum * {} + {line};\n", number + 3)).collect::<String>();
        let text =
            format!("#include \"all.h\"\n#include <stdio.h>\nint module_{number}(int sum) {{\n{body}    return sum;\n}}\n");
        fs::write(folder.join(format!("module_{number}.c")), text).unwrap();
        header.push_str(&format!("int module_{number}(int);\n"));
        calls.push_str(&format!("    sum = module_{number}(sum);\n"));
    }
    fs::write(folder.join("all.h"), header).unwrap();
    let main = format!(
        "#include \"all.h\"\n#include <stdio.h>\nint main(void) {{\n    unsigned sum = 1;\n{calls}    printf(\"%x\\n\", sum);\n    return 0;\n}}\n"
    );
    fs::write(folder.join("main.c"), main).unwrap();
    fs::write(
        folder.join("part.rs"),
        "pub fn words(text: &str) -> Vec<String> { text.split(' ').map(str::to_owned).collect() }\n",
    )
    .unwrap();
    fs::write(folder.join("main.rs"), "fn main() { println!(\"{:?}\", part::words(\"built here\")); }\n").unwrap();
    let script = "ls *.c | xargs -P 2 -n 4 cc -fwrapv -O1 -c && ar rcD liball.a module_*.o && cc -o program main.o liball.a && ./program > said";
    done(Command::new("sh").args(["-ec", script]).current_dir(folder));
    // What is compiled is not to tell where.
    let remap = format!("--remap-path-prefix={}=/here", folder.display());
    let rust = |words: &[&str]| {
        let mut command = Command::new("rustc");
        command.args(["--edition", "2021", "-C", "codegen-units=4", &remap]).args(words).current_dir(folder);
        done(&mut command)
    };
    rust(&["--crate-type", "rlib", "--crate-name", "part", "part.rs"]);
    rust(&["--extern", "part=libpart.rlib", "-o", "rusty", "main.rs"]);
    assert_eq!(done(&mut Command::new(folder.join("rusty"))), "[\"built\", \"here\"]\n");
}

#[test]
fn what_is_built_is_what_is_built_elsewhere() {
    if !can_mount("a build") {
        return;
    }
    let words = ["--num-request-queues", "2"];
    let mut mounted = Mounted::ours(&words, &["--queues", "2"]);
    let elsewhere = mounted.scratch.path("elsewhere");
    build(&elsewhere);
    let (here, there) = mounted.both("project");
    build(&here);
    let (own, ours, hosts) = (files(&elsewhere), files(&here), files(&there));
    let differ: Vec<_> = own
        .iter()
        .filter(|(path, bytes)| ours.get(*path) != Some(bytes) || hosts.get(*path) != Some(bytes))
        .map(|(path, _)| path)
        .collect();
    assert!(differ.is_empty() && ours.len() == own.len() && hosts.len() == own.len(), "{differ:?}");
    assert!(own.len() > 2 * MODULES);
    mounted.unmount();
}

/// Transactions as fast as they come, each said when it is done.
fn transactions(from: u64) -> String {
    let one = |number: u64| {
        format!(
            "BEGIN; INSERT INTO t VALUES({number}, randomblob({})); UPDATE t SET v = randomblob(300) WHERE n = {}; COMMIT; SELECT 'done {number}';\n",
            number * 37 % 3000,
            number / 2
        )
    };
    (from..from + 3000).map(one).collect()
}

fn sql(database: &Path, words: &str) -> String {
    done(Command::new("sqlite3").arg(database).arg(words)).trim().to_owned()
}

/// What was said to be done is there after the program was killed, and the database is whole.
#[test]
fn a_database_whose_program_is_killed_again_and_again() {
    if !can_mount("sqlite") {
        return;
    }
    for (words, journal) in [(&[][..], "delete"), (&["--cache", "always", "--writeback"], "wal")] {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("database");
        sql(&here, &format!("PRAGMA journal_mode={journal}; CREATE TABLE t(n INTEGER PRIMARY KEY, v BLOB);"));
        let mut known = 0;
        for round in 0..10 {
            let mut command = Command::new("sqlite3");
            command.arg("-bail").arg(&here).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let mut input = child.stdin.take().unwrap();
            let text = transactions(known + 1);
            let feeder = thread::spawn(move || drop(input.write_all(text.as_bytes())));
            thread::sleep(Duration::from_millis(40 + 17 * round));
            child.kill().unwrap();
            let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
            feeder.join().unwrap();
            let last = said.lines().rev().find_map(|line| line.strip_prefix("done ")?.parse::<u64>().ok()).unwrap_or(known);
            assert_eq!(sql(&here, "PRAGMA integrity_check;"), "ok", "{words:?}, round {round}");
            let count = sql(&here, "SELECT count(*), max(n) FROM t;");
            let there_are: u64 = count.split('|').next().unwrap().parse().unwrap();
            assert!(there_are >= last, "{words:?}, round {round}: {count} of {last}");
            known = there_are;
        }
        assert!(known > 20, "{known}");
        println!("{known} transactions");
        run(Command::new("sync").arg(&here));
        assert!(fs::read(&here).unwrap() == fs::read(&there).unwrap());
        mounted.unmount();
        assert_eq!(sql(&there, "PRAGMA integrity_check;"), "ok");
        assert_eq!(sql(&there, "SELECT count(*) FROM t;"), known.to_string());
    }
}

/// Whoever opens a file to read it may empty it by that. Were the server to do so when it is opened, as FUSE offers, it would be done before the
/// guest's kernel has looked whether the file is a program that runs.
#[test]
fn a_program_that_runs_is_not_emptied() {
    if !can_mount("a program that runs") {
        return;
    }
    for words in [&["--cache", "always"][..], &[], &["--cache", "never", "--allow-mmap"]] {
        let mut mounted = Mounted::ours(words, &[]);
        let (here, there) = mounted.both("program");
        fs::copy("/usr/bin/sleep", &here).unwrap();
        let before = fs::read(&there).unwrap();
        let mut running = Command::new(&here).arg("60").spawn().unwrap();
        let how = OFlags::RDONLY | OFlags::TRUNC | OFlags::CLOEXEC;
        assert_eq!(rustix::fs::open(&here, how, Mode::empty()).unwrap_err(), Errno::TXTBSY, "{words:?}");
        assert!(fs::read(&there).unwrap() == before, "{words:?}: it has changed");
        thread::sleep(Duration::from_millis(50));
        assert!(running.try_wait().unwrap().is_none(), "{words:?}: it has ended");
        running.kill().unwrap();
        running.wait().unwrap();
        rustix::fs::open(&here, how, Mode::empty()).unwrap();
        assert_eq!(fs::metadata(&there).unwrap().len(), 0, "{words:?}");
        mounted.unmount();
    }
}
