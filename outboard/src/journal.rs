//! Lines that are kept while a machine runs: a file of bounded size in its runtime directory, and the one before it.
//!
//! Who reads needs nothing of the composer: a reader opens the files, and to follow them it looks again from time to time. A file
//! whose name is gone has ended: what is left in it is read, and then either there is a new one, or the machine has ended.

use std::collections::VecDeque;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::runtime::older;

/// How often a follower looks. A person does not notice, and it costs two system calls.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The writing end.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    size: usize,
    limit: usize,
}

impl Journal {
    /// An empty one, in which each of the two files has at most `limit` bytes.
    pub fn new(path: PathBuf, limit: usize) -> Result<Self> {
        let file = create(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        Ok(Self { path, file, size: 0, limit })
    }

    /// Adds a line. Where the file system is full it is lost: the machine matters more.
    pub fn append(&mut self, line: &str) {
        let bytes = format!("{line}\n");
        if self.size > 0 && self.size.saturating_add(bytes.len()) > self.limit && self.rotate().is_err() {
            return;
        }
        if self.file.write_all(bytes.as_bytes()).is_ok() {
            self.size = self.size.saturating_add(bytes.len());
        }
    }

    /// Each step replaces a name that is there by another file: whoever looks finds a file under the journal's name at any time, and
    /// under the older one's the one before it, or that same one.
    fn rotate(&mut self) -> io::Result<()> {
        let aside = self.path.with_extension("new");
        // What an attempt left that found no room.
        drop(fs::remove_file(&aside));
        fs::hard_link(&self.path, &aside)?;
        fs::rename(&aside, older(&self.path))?;
        self.file = create(&aside)?;
        fs::rename(&aside, &self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().append(true).create_new(true).mode(0o600).open(path)
}

/// The reading end.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: Option<File>,
    partial: Vec<u8>,
    lines: VecDeque<String>,
}

impl Reader {
    /// From the first line that is kept.
    pub fn open(path: PathBuf) -> Result<Self> {
        let mut reader = Self { path, file: None, partial: Vec::new(), lines: VecDeque::new() };
        // The newer one first: whatever is written meanwhile, it is this one or comes after it. The name of the older one may have
        // become its own by then.
        let file = File::open(&reader.path).with_context(|| format!("Cannot open {}", reader.path.display()))?;
        if let Ok(mut old) = File::open(older(&reader.path))
            && !is_same(old.metadata(), file.metadata())
        {
            reader.read(&mut old)?;
        }
        reader.file = Some(file);
        Ok(reader)
    }

    /// The next line. At the end of what there is, `None`; to a follower only when the machine has ended.
    pub fn next(&mut self, follow: bool) -> Result<Option<String>> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Ok(Some(line));
            }
            let Some(mut file) = self.file.take() else {
                return Ok(None);
            };
            // Asked before it is read: what was written before its name went is read all the same.
            let is_named = self.is_named(&file);
            let found = self.read(&mut file)?;
            match (found, is_named, follow) {
                (true, ..) => self.file = Some(file),
                (false, false, _) => self.file = File::open(&self.path).ok(),
                (false, true, true) => {
                    self.file = Some(file);
                    thread::sleep(LOOK_AGAIN);
                }
                (false, true, false) => return Ok(None),
            }
        }
    }

    fn is_named(&self, file: &File) -> bool {
        is_same(file.metadata(), fs::metadata(&self.path))
    }

    /// Reads what there is. Was there anything?
    fn read(&mut self, file: &mut File) -> Result<bool> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("Cannot read {}", self.path.display()))?;
        self.partial.extend_from_slice(&bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let rest = self.partial.split_off(end.saturating_add(1));
            let line = std::mem::replace(&mut self.partial, rest);
            self.lines.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        Ok(!bytes.is_empty())
    }
}

fn is_same(one: io::Result<Metadata>, other: io::Result<Metadata>) -> bool {
    match (one, other) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("outboard-journal-{name}-{}", std::process::id()));
        for path in [path.clone(), older(&path)] {
            drop(fs::remove_file(path));
        }
        path
    }

    fn all(reader: &mut Reader, follow: bool) -> Vec<String> {
        std::iter::from_fn(|| reader.next(follow).unwrap()).collect()
    }

    #[test]
    fn it_keeps_the_last_lines_and_no_more_than_it_may() {
        let path = scratch("limit");
        let mut journal = Journal::new(path.clone(), 100).unwrap();
        for number in 0..1000 {
            journal.append(&format!("line {number}"));
        }
        let size = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(size(&path) <= 100 && size(&older(&path)) <= 100);
        let lines = all(&mut Reader::open(path).unwrap(), false);
        assert_eq!(lines.last().unwrap(), "line 999");
        let first = 1000 - lines.len();
        assert!(lines.len() > 10 && lines[0] == format!("line {first}"), "{lines:?}");
    }

    #[test]
    fn a_follower_hears_all_until_the_end() {
        let path = scratch("follow");
        let mut journal = Journal::new(path.clone(), 1 << 20).unwrap();
        journal.append("first");
        let mut reader = Reader::open(path.clone()).unwrap();
        let follower = thread::spawn(move || all(&mut reader, true));
        thread::sleep(LOOK_AGAIN);
        journal.append("second");
        journal.rotate().unwrap();
        journal.append("third");
        thread::sleep(LOOK_AGAIN * 3);
        journal.append("last");
        fs::remove_file(&path).unwrap();
        assert_eq!(follower.join().unwrap(), ["first", "second", "third", "last"]);
    }

    #[test]
    fn there_is_never_a_moment_without_a_file() {
        let path = scratch("moment");
        let mut journal = Journal::new(path.clone(), 1 << 20).unwrap();
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            // To a follower, a name that is gone is the end of the machine.
            let looks = scope.spawn(|| {
                let mut looks = 0;
                while !ended.load(Ordering::Relaxed) {
                    assert!(fs::metadata(&path).is_ok(), "gone at look {looks}");
                    looks += 1;
                }
                looks
            });
            for _ in 0..20_000 {
                journal.rotate().unwrap();
            }
            ended.store(true, Ordering::Relaxed);
            assert!(looks.join().unwrap() > 1000);
        });
    }
}
