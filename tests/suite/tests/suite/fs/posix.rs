//! pjdfstest through a mount: what POSIX says of each call, asked in every way that our server can be started.
//!
//! What is expected is not written down: the same tests are run on the directory itself, and each has to end the same way here. None may
//! fail. Those that are skipped are, but for one, skipped there as well: they need a second file system that can be mounted read-only or filled, or
//! a feature that no Linux has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use suite::{fstools, run};

use super::mounted::{Mounted, can_mount};

const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = false
expected_failures = []
[dummy_auth]
entries = [["nobody", "nogroup"], ["bin", "bin"]]
"#;

/// Fewer than this, and the tests have not been run.
const MOST_OF_THEM: usize = 350;

/// The C library knows how many names a file may have from the kind of its file system, and knows nothing of FUSE: skipped here alone.
const NOT_ASKED_HERE: &str = "link::link_count_max";

/// How each test ended in a new directory of this one.
fn results(scratch: &Path, folder: &Path) -> BTreeMap<String, String> {
    let (configuration, place) = (scratch.join("pjdfstest.toml"), folder.join("pjdfstest"));
    fs::write(&configuration, CONFIGURATION).unwrap();
    fs::create_dir(&place).unwrap();
    let ended = run(fstools::tool("pjdfstest").arg("-c").arg(configuration).arg("-p").arg(&place));
    fs::remove_dir_all(&place).unwrap();
    let results: BTreeMap<String, String> = ended.out.lines().filter_map(result).collect();
    assert!(results.len() > MOST_OF_THEM, "{}{}", ended.out, ended.err);
    let failed = results.values().any(|result| result == "FAILED") || ended.code != Some(0);
    assert!(!failed, "in {}:\n{}{}", folder.display(), ended.out, ended.err);
    results
}

/// A line with the name of a test, which has colons, and the word that says how it ended.
fn result(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace();
    let (name, result) = (words.next()?, words.next()?);
    (name.contains("::") && words.next().is_none()).then(|| (name.to_owned(), result.to_owned()))
}

fn is_like_the_directory_itself(server: &[&str], mount: &[&str]) {
    if !can_mount("pjdfstest") {
        return;
    }
    let mut mounted = Mounted::ours(server, mount);
    let scratch = mounted.scratch.path("");
    let there = results(&scratch, &mounted.house);
    let here = results(&scratch, &mounted.seen);
    let skipped: Vec<_> = here.iter().filter(|(_, result)| *result == "skipped").map(|(name, _)| name).collect();
    println!("{} passed, {} skipped: {skipped:?}", here.len() - skipped.len(), skipped.len());
    let asked = there.iter().filter(|(name, _)| *name != NOT_ASKED_HERE);
    let differ: Vec<_> = asked.filter(|(name, result)| here.get(*name) != Some(result)).collect();
    assert!(differ.is_empty() && here.len() == there.len(), "natively: {differ:?}");
    mounted.unmount();
}

#[test]
fn nothing_is_kept() {
    is_like_the_directory_itself(&["--cache", "never"], &[]);
}

#[test]
fn what_is_known_of_files_is_kept() {
    is_like_the_directory_itself(&["--cache", "metadata"], &["--indirect"]);
}

#[test]
fn all_is_kept_for_a_second() {
    let queues = ["--num-request-queues", "2", "--negative-timeout", "1"];
    is_like_the_directory_itself(&queues, &["--queues", "2", "--scatter", "--seed", "21"]);
}

#[test]
fn all_is_kept() {
    is_like_the_directory_itself(&["--cache", "always"], &[]);
}

#[test]
fn writes_are_collected() {
    is_like_the_directory_itself(&["--cache", "always", "--writeback"], &["--scatter", "--seed", "22"]);
}

#[test]
fn with_lists_attributes_and_the_guests_word_on_set_user_id_bits() {
    let words = ["--posix-acl", "--xattr", "--killpriv-v2", "--num-request-queues", "2"];
    is_like_the_directory_itself(&words, &["--queues", "2"]);
}

#[test]
fn nothing_is_kept_and_files_are_mapped() {
    is_like_the_directory_itself(&["--cache", "never", "--allow-mmap", "--no-readdirplus"], &["--queue-size", "16"]);
}

#[test]
fn by_handles() {
    is_like_the_directory_itself(&["--cache", "never", "--inode-file-handles", "mandatory", "--rlimit-nofile", "1000"], &[]);
}

#[test]
fn past_the_page_cache() {
    is_like_the_directory_itself(&["--cache", "never", "--allow-direct-io"], &[]);
}
