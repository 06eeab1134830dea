//! What a disk image says of itself: its header, and its tables.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image::{Create, FileId, Format, Image, Info, Layer, Options, Storage, check, create};

use crate::bytes::Bytes;

/// Most bytes of a file: what is written beyond fails.
const MOST: usize = 1 << 20;

/// A file in memory.
#[derive(Debug)]
struct Ram(FileId, Mutex<Vec<u8>>);

impl Ram {
    fn new(bytes: Vec<u8>) -> Arc<Ram> {
        Arc::new(Ram(FileId::new(), Mutex::new(bytes)))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.1.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let end = start.saturating_add(len);
    if end > MOST { Err(io::ErrorKind::StorageFull.into()) } else { Ok(start..end) }
}

impl Storage for Ram {
    fn id(&self) -> FileId {
        self.0
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let (mut bytes, range) = (self.bytes(), place(offset, data.len())?);
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        bytes[range].copy_from_slice(data);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes();
        let end = bytes.len();
        let range = place(offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        bytes[range.start.min(end)..range.end.min(end)].fill(0);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let range = place(len, 0)?;
        self.bytes().resize(range.start, 0);
        Ok(())
    }
}

/// Everything a guest can do with an image. What it answers is its own business; that it answers is ours.
fn serve(bytes: Vec<u8>, script: &[u8]) {
    drop(check(&(Ram::new(bytes.clone()) as Arc<dyn Storage>), true));
    let file = Ram::new(bytes);
    let Ok(info) = Info::read(Format::Qcow2, &*file) else { return };
    let data = info.data_file.is_some().then(|| Ram::new(vec![3; 4096]) as Arc<dyn Storage>);
    let mut layers = vec![Layer { format: Format::Qcow2, file: file.clone(), data }];
    if info.backing.is_some() {
        layers.push(Layer { format: Format::Raw, file: Ram::new(vec![5; 70_000]), data: None });
    }
    let writable = script.len() % 8 != 7;
    let Ok(image) = Image::open(&layers, Options { writable, cache_bytes: 0 }) else { return };
    let (mut lookup, size) = (image.lookup(), image.size());
    for step in script.iter().take(32) {
        let at = (size >> 4).saturating_mul(u64::from(step & 15)) & !511;
        let len = (size.saturating_sub(at)).min(5120);
        let mut buffer = vec![1; usize::try_from(len).unwrap_or(0)];
        match step >> 4 {
            0..=4 => drop(lookup.read(&mut buffer, at)),
            5..=9 => drop(lookup.write(&buffer, at)),
            10 | 11 => drop(lookup.zero(at, len, step & 1 != 0)),
            12 | 13 => drop(lookup.discard(at, len)),
            14 => drop(lookup.flush()),
            _ => drop(image.resize(size.saturating_add(512))),
        }
    }
    drop(lookup);
    drop(image.close());
}

/// A header, and what may follow it: everything is the attacker's, or an honest header is with a few bytes changed.
pub fn header(mut bytes: Bytes<'_>) {
    let (choice, padding, steps) = (bytes.byte(), usize::from(bytes.u16()), bytes.u64().to_le_bytes());
    if choice & 1 == 0 {
        let mut file = bytes.rest().to_vec();
        file.resize(file.len() + padding * 4, 0);
        return serve(file, &steps);
    }
    let honest = Ram::new(Vec::new());
    let version = 2 | u32::from(choice >> 1 & 1);
    let backing = (choice & 4 != 0).then(|| ("base".to_owned(), "raw".to_owned()));
    let data_file = (choice & 12 == 8 && version == 3).then(|| "data".to_owned());
    let options =
        Create { size: 1 << 20, cluster_size: 512 << (choice >> 4 & 7), version, backing, data_file, ..Create::default() };
    create(&*honest, &options).expect("an honest image");
    let mut file = honest.bytes().clone();
    while !bytes.is_empty() {
        let at = usize::from(bytes.byte());
        file[at] = bytes.byte();
    }
    serve(file, &steps);
}

/// Tables: words of the attacker's where an honest image has its refcount table, a refcount block, its L1 and an L2 table.
pub fn tables(mut bytes: Bytes<'_>) {
    const CLUSTER: u64 = 4096;
    let file = Ram::new(Vec::new());
    let choice = bytes.byte();
    let options = Create {
        size: 4 << 20,
        cluster_size: CLUSTER,
        refcount_bits: 1 << (choice % 7),
        backing: (choice & 0x40 != 0).then(|| ("base".to_owned(), "raw".to_owned())),
        ..Create::default()
    };
    create(&*file, &options).expect("an honest image");
    let below = Layer { format: Format::Raw, file: Ram::new(vec![5; 70_000]), data: None };
    let top = Layer { format: Format::Qcow2, file: file.clone(), data: None };
    let layers = if options.backing.is_some() { vec![top, below] } else { vec![top] };
    let image = Image::open(&layers, Options::default()).expect("an honest image");
    image.lookup().write(&[1; 9000], 4096).expect("room");
    image.close().expect("an honest image");
    drop(image);
    let steps = bytes.u64().to_le_bytes();
    for _ in 0..bytes.byte() % 8 {
        let (cluster, word) = (u64::from(bytes.byte() % 8), u64::from(bytes.byte() % 32));
        // Small numbers of clusters, and flags, are what leads somewhere.
        let (host, flags) = (u64::from(bytes.byte()) * CLUSTER, u64::from(bytes.byte()) << 56);
        let value = if bytes.byte() & 1 == 0 { host | flags } else { bytes.u64() };
        drop(file.write_at(&value.to_be_bytes(), cluster * CLUSTER + word * 8));
    }
    let damaged = file.bytes().clone();
    serve(damaged, &steps);
}
