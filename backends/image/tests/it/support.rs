//! What the tests share: QEMU's programs, a seeded source of numbers, a model of a disk, and a file in memory that remembers in
//! which order it was written.

use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard};

use image::{Error, FileId, FileStorage, Format, Image, Layer, Lookup, Options, Storage};

/// Numbers that are the same each time.
#[derive(Clone, Debug)]
pub(crate) struct Seeded(u64);

impl Seeded {
    /// `OUTBOARD_IMAGE_SEED` makes it other numbers, the same ones each time again.
    pub(crate) fn new(seed: u64) -> Seeded {
        let more = std::env::var("OUTBOARD_IMAGE_SEED").ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let seed = seed.wrapping_add(more.wrapping_mul(1_000_003));
        Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// A folder that is removed at the end.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("outboard-image-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _best_effort = fs::remove_dir_all(&self.0);
    }
}

/// One of QEMU's programs, in the folder of the images.
pub(crate) fn qemu(program: &str, scratch: &Scratch, args: &[&str]) -> Output {
    let cached = || std::env::home_dir().unwrap_or_default().join(".cache/outboard/qemu");
    let tree = std::env::var_os("OUTBOARD_QEMU").map(PathBuf::from).unwrap_or_else(cached);
    assert!(tree.join("usr/bin").join(program).exists(), "OUTBOARD_QEMU does not say where QEMU is; run cargo xtask test");
    let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu")).arg(tree.join("usr/bin").join(program));
    command.args(args).current_dir(&scratch.0).output().unwrap()
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub(crate) fn qemu_img(scratch: &Scratch, args: &[&str]) {
    let output = qemu("qemu-img", scratch, args);
    assert!(output.status.success(), "qemu-img {args:?}: {}", text(&output));
}

/// QEMU's own engine carries these out.
pub(crate) fn qemu_io(scratch: &Scratch, image: &str, commands: &[String]) {
    for some in commands.chunks(200) {
        let mut args = vec!["-f", "qcow2", "--discard=unmap", "-t", "unsafe"];
        some.iter().for_each(|command| args.extend(["-c", command]));
        args.push(image);
        let output = qemu("qemu-io", scratch, &args);
        let said = text(&output);
        assert!(output.status.success() && !said.contains("failed"), "qemu-io {commands:?}: {said}");
    }
}

/// What QEMU thinks of an image: 0 nothing to say, 3 leaks, anything else is bad.
pub(crate) fn qemu_check(scratch: &Scratch, image: &str) -> (Option<i32>, String) {
    let output = qemu("qemu-img", scratch, &["check", "-f", "qcow2", image]);
    (output.status.code(), text(&output))
}

#[track_caller]
pub(crate) fn assert_clean(scratch: &Scratch, image: &str, what: &str) {
    let (code, said) = qemu_check(scratch, image);
    assert_eq!(code, Some(0), "{what}: {said}");
}

/// The disk as QEMU sees it.
pub(crate) fn qemu_reads(scratch: &Scratch, image: &str, more: &[&str]) -> Vec<u8> {
    let args = [&["convert", "-f", "qcow2", "-O", "raw"], more, &[image, "view.raw"]].concat();
    qemu_img(scratch, &args);
    let bytes = fs::read(scratch.path("view.raw")).unwrap();
    fs::remove_file(scratch.path("view.raw")).unwrap();
    bytes
}

pub(crate) fn file(path: &Path) -> Arc<dyn Storage> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Arc::new(FileStorage::new(file.into()).unwrap().without_sync())
}

pub(crate) fn layer(format: Format, path: &Path) -> Layer {
    Layer { format, file: file(path), data: None }
}

pub(crate) fn open(layers: &[Layer]) -> Arc<Image> {
    Image::open(layers, Options::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// What the disk should be, byte for byte.
#[derive(Clone, Debug)]
pub(crate) struct Model(pub(crate) Vec<u8>);

impl Model {
    pub(crate) fn write(&mut self, bytes: &[u8], offset: u64) {
        self.0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn at(&self, offset: u64, len: u64) -> &[u8] {
        &self.0[offset as usize..][..len as usize]
    }
}

/// Where two disks differ first.
#[track_caller]
pub(crate) fn assert_same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}: the sizes");
    if found == wanted {
        return;
    }
    if let Some(at) = found.iter().zip(wanted).position(|(a, b)| a != b) {
        let differing = found.iter().zip(wanted).filter(|(a, b)| a != b).count();
        panic!("{what}: byte {at:#x} is {:#x}, not {:#x}; {differing} bytes differ", found[at], wanted[at]);
    }
}

pub(crate) fn read_all(lookup: &mut Lookup) -> Vec<u8> {
    let mut bytes = vec![0; lookup.image().size() as usize];
    for (at, piece) in bytes.chunks_mut(1 << 20).enumerate() {
        lookup.read(piece, (at as u64) << 20).unwrap_or_else(|error| panic!("{error}"));
    }
    bytes
}

/// One step of a random stream, on the engine and on the model.
pub(crate) fn step(random: &mut Seeded, lookup: &mut Lookup, model: &mut Model, most: u64) {
    let size = model.0.len() as u64;
    let unit = if random.chance(3) { 4096 } else { 512 };
    let offset = random.below(size / unit) * unit;
    let len = ((random.below(most / unit) + 1) * unit).min(size - offset);
    let what = random.below(16);
    let done: Result<(), Error> = match what {
        0..=7 => {
            let bytes = vec![(random.below(255) + 1) as u8; len as usize];
            model.write(&bytes, offset);
            lookup.write(&bytes, offset)
        }
        8..=10 => {
            model.write(&vec![0; len as usize], offset);
            lookup.zero(offset, len, what == 8)
        }
        11..=12 => {
            let done = lookup.discard(offset, len);
            let mut now = vec![0; len as usize];
            lookup.read(&mut now, offset).unwrap();
            for (block, old) in now.chunks(512).zip(model.at(offset, len).chunks(512)) {
                assert!(block == old || block == [0; 512], "a discard at {offset:#x} shows what was never there");
            }
            model.write(&now, offset);
            done
        }
        13 => lookup.flush(),
        _ => {
            let mut bytes = vec![0xee; len as usize];
            let done = lookup.read(&mut bytes, offset);
            assert_same(&bytes, model.at(offset, len), &format!("a read of {len} at {offset:#x}"));
            done
        }
    };
    done.unwrap_or_else(|error| panic!("step {what} of {len} at {offset:#x}: {error}"));
}

/// What was done to a file.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Len(u64),
    Sync,
    /// Put there by a test.
    Mark(usize),
}

/// What was done to which file, since it was remembered.
type Log = Arc<Mutex<Option<Vec<(usize, Event)>>>>;

/// A file in memory, and what was done to it since it was told to remember.
pub(crate) struct Ram {
    id: FileId,
    number: usize,
    bytes: Mutex<Vec<u8>>,
    log: Log,
    /// Changes until some fail, and how many then do.
    faults: Mutex<(u64, u64)>,
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ram")
    }
}

impl Ram {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Ram> {
        Arc::new(Ram { id: FileId::new(), number: 0, bytes: Mutex::new(bytes), log: Arc::default(), faults: Mutex::default() })
    }

    /// A second file of the same disk. What is done to both is remembered in one order.
    pub(crate) fn beside(&self, bytes: Vec<u8>) -> Arc<Ram> {
        let log = Arc::clone(&self.log);
        Arc::new(Ram { id: FileId::new(), number: self.number + 1, bytes: Mutex::new(bytes), log, faults: Mutex::default() })
    }

    fn content(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.content().clone()
    }

    pub(crate) fn record(&self) {
        *self.log.lock().unwrap() = Some(Vec::new());
    }

    pub(crate) fn mark(&self, number: usize) {
        self.note(Event::Mark(number));
    }

    /// Everything in its order, with the number of the file.
    pub(crate) fn take_log(&self) -> Vec<(usize, Event)> {
        self.log.lock().unwrap().take().unwrap_or_default()
    }

    /// After so many changes, so many fail: the disk is full.
    pub(crate) fn fail(&self, after: u64, count: u64) {
        *self.faults.lock().unwrap() = (after, count);
    }

    fn change(&self, event: Event) -> io::Result<()> {
        let mut faults = self.faults.lock().unwrap();
        match &mut *faults {
            (0, 0) => {}
            (0, left) => {
                *left -= 1;
                return Err(io::ErrorKind::StorageFull.into());
            }
            (until, _) => *until -= 1,
        }
        drop(faults);
        self.note(event);
        Ok(())
    }

    fn note(&self, event: Event) {
        let mut bytes = self.content();
        apply(&mut bytes, &event);
        if let Some(log) = &mut *self.log.lock().unwrap() {
            log.push((self.number, event));
        }
    }
}

pub(crate) fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(offset, data) => {
            let end = *offset as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset as usize..end].copy_from_slice(data);
        }
        Event::Zero(offset, len) => {
            let end = ((offset + len) as usize).min(bytes.len());
            bytes[(*offset as usize).min(end)..end].fill(0);
        }
        Event::Len(len) => bytes.resize(*len as usize, 0),
        Event::Sync | Event::Mark(_) => {}
    }
}

impl Storage for Ram {
    fn id(&self) -> FileId {
        self.id
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content().len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // Others get a chance to be in the way.
        std::thread::yield_now();
        let bytes = self.content();
        let from = (offset as usize).min(bytes.len());
        let len = buffer.len().min(bytes.len() - from);
        buffer[..len].copy_from_slice(&bytes[from..from + len]);
        Ok(len)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(Event::Write(offset, bytes.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        // What others do until it returns is not covered by it.
        self.change(Event::Sync)?;
        std::thread::sleep(std::time::Duration::from_micros(200));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(Event::Zero(offset, len))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(Event::Zero(offset, len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Event::Len(len))
    }
}
