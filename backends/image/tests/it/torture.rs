//! Many queues on the same clusters at once. Each thread owns some blocks, strewn over clusters that others have blocks in, and
//! some whole clusters; it knows what it last wrote to each, and reads it back all the time.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use image::{Create, Error, Format, Image, Layer, Lookup, Options, Place, Storage, check, create};

use crate::differential::{Backing, Kind};
use crate::support::{Ram, Scratch, Seeded, assert_clean, assert_same, file, open, qemu_reads, read_all};

const THREADS: u64 = 4;

struct Worker {
    number: u64,
    block: u64,
    cluster: u64,
    random: Seeded,
    lookup: Lookup,
    /// Its own view: right for its own blocks.
    model: Vec<u8>,
}

impl Worker {
    /// A block of its own: in the first half of the disk any thread has blocks in any cluster, in the second half whole clusters.
    fn own(&mut self) -> (u64, u64) {
        let half = self.model.len() as u64 / 2 / self.cluster / THREADS * self.cluster * THREADS;
        if self.random.chance(3) {
            let clusters = half / self.cluster / THREADS;
            let at = half + (self.random.below(clusters) * THREADS + self.number) * self.cluster;
            return (at, self.cluster);
        }
        let blocks = half / self.block / THREADS;
        ((self.random.below(blocks) * THREADS + self.number) * self.block, self.block)
    }

    fn model(&mut self, at: u64, len: u64) -> &mut [u8] {
        &mut self.model[at as usize..][..len as usize]
    }

    /// Some requests as one batch, as an engine does it: one commit for all.
    fn batch(&mut self) {
        let mut ranges = Vec::new();
        for _ in 0..self.random.below(6) + 1 {
            let (at, len) = self.own();
            let byte = self.random.below(255) as u8 + 1;
            let range = loop {
                match self.lookup.share(at, len) {
                    Err(Error::Busy) => {
                        self.lookup.commit().unwrap();
                        ranges.clear();
                    }
                    other => break other.unwrap(),
                }
            };
            ranges.push(range);
            let mut done = 0;
            while done < len {
                let extent = match self.lookup.map_write(at + done, len - done) {
                    Err(Error::Busy) => {
                        self.lookup.commit().unwrap();
                        continue;
                    }
                    other => other.unwrap(),
                };
                let Place::Data { file, offset } = extent.place else { panic!("{extent:?}") };
                let file = Arc::clone(self.lookup.file(file).unwrap());
                file.write_at(&vec![byte; extent.len as usize], offset).unwrap();
                done += extent.len;
            }
            self.model(at, len).fill(byte);
        }
        self.lookup.commit().unwrap();
    }

    fn step(&mut self) {
        let (at, len) = self.own();
        match self.random.below(12) {
            0..=3 => self.batch(),
            4..=5 => {
                let byte = self.random.below(255) as u8 + 1;
                self.lookup.write(&vec![byte; len as usize], at).unwrap();
                self.model(at, len).fill(byte);
            }
            6..=7 => {
                let unmap = self.random.chance(2);
                self.lookup.zero(at, len, unmap).unwrap();
                self.model(at, len).fill(0);
            }
            8 => {
                self.lookup.discard(at, len).unwrap();
                let mut now = vec![0; len as usize];
                self.lookup.read(&mut now, at).unwrap();
                let old = self.model(at, len);
                assert!(now == old || now.iter().all(|byte| *byte == 0), "a discard at {at:#x} shows what was never there");
                old.copy_from_slice(&now);
            }
            9 if self.random.chance(8) => self.lookup.flush().unwrap(),
            _ => {
                let mut found = vec![0xee; len as usize];
                self.lookup.read(&mut found, at).unwrap();
                let what = format!("thread {}, {len} bytes at {at:#x}", self.number);
                assert_same(&found, self.model(at, len), &what);
            }
        }
    }
}

fn torture(kind: Kind, block: u64, seed: u64) {
    let scratch = Scratch::new();
    let mut random = Seeded::new(seed);
    kind.make(&scratch, &mut random);
    let start = qemu_reads(&scratch, "top.qcow2", &[]);
    let image: Arc<Image> = open(&kind.layers(&scratch));
    let end = Instant::now() + Duration::from_millis(1500);
    let workers: Vec<_> = (0..THREADS)
        .map(|number| {
            let random = Seeded::new(seed * 100 + number);
            let (lookup, model) = (image.lookup(), start.clone());
            let mut worker = Worker { number, block, cluster: kind.cluster, random, lookup, model };
            thread::spawn(move || {
                while Instant::now() < end {
                    worker.step();
                }
                (worker.number, worker.model)
            })
        })
        .collect();
    let mut whole = start;
    let half = whole.len() as u64 / 2 / kind.cluster / THREADS * kind.cluster * THREADS;
    for worker in workers {
        let (number, model) = worker.join().unwrap();
        for at in (0..half / block).filter(|at| at % THREADS == number) {
            let range = (at * block) as usize..((at + 1) * block) as usize;
            whole[range.clone()].copy_from_slice(&model[range]);
        }
        for at in (0..half / kind.cluster).filter(|at| at % THREADS == number) {
            let range = (half + at * kind.cluster) as usize..(half + (at + 1) * kind.cluster) as usize;
            whole[range.clone()].copy_from_slice(&model[range]);
        }
    }
    assert_same(&read_all(&mut image.lookup()), &whole, &format!("{kind:?} at the end"));
    image.close().unwrap();
    let report = check(&file(&scratch.path("top.qcow2")), false).unwrap();
    assert!(report.is_clean(), "{kind:?}: {report:?}");
    assert_clean(&scratch, "top.qcow2", &format!("{kind:?}"));
    assert_same(&qemu_reads(&scratch, "top.qcow2", &[]), &whole, &format!("{kind:?} as QEMU sees it"));
}

#[test]
fn queues_share_clusters() {
    torture(Kind { clusters: Some(64), ..Kind::PLAIN }, 4096, 41);
    torture(Kind { cluster: 4096, clusters: Some(800), ..Kind::PLAIN }, 512, 42);
}

#[test]
fn queues_share_clusters_of_an_overlay() {
    torture(Kind { backing: Backing::Qcow2, clusters: Some(64), ..Kind::PLAIN }, 4096, 43);
    torture(Kind { backing: Backing::Raw, v2: true, cluster: 4096, clusters: Some(800), ..Kind::PLAIN }, 512, 44);
}

#[test]
fn queues_share_clusters_of_a_snapshot() {
    torture(Kind { snapshot: true, compressed: Some("zlib"), clusters: Some(64), ..Kind::PLAIN }, 4096, 45);
    torture(Kind { extended: true, backing: Backing::Raw, snapshot: true, clusters: Some(64), ..Kind::PLAIN }, 2048, 46);
}

#[test]
fn a_cache_that_is_far_too_small_changes_nothing() {
    let scratch = Scratch::new();
    let kind = Kind { cluster: 512, clusters: Some(60_000), ..Kind::PLAIN };
    kind.make(&scratch, &mut Seeded::new(47));
    let start = qemu_reads(&scratch, "top.qcow2", &[]);
    let layer = Layer { format: Format::Qcow2, file: file(&scratch.path("top.qcow2")), data: None };
    let image = Image::open(&[layer], Options { writable: true, cache_bytes: 0 }).unwrap();
    let end = Instant::now() + Duration::from_millis(1500);
    let workers: Vec<_> = (0..THREADS)
        .map(|number| {
            let (lookup, model) = (image.lookup(), start.clone());
            let mut worker = Worker { number, block: 512, cluster: 512, random: Seeded::new(470 + number), lookup, model };
            thread::spawn(move || {
                while Instant::now() < end {
                    worker.step();
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    image.close().unwrap();
    assert_clean(&scratch, "top.qcow2", "after a cache of nearly nothing");
}

/// All threads come to each fresh cluster of an overlay at the same moment, and write to or zero blocks of their own in it. Who
/// looks before it locks loses one of them.
#[test]
fn writing_and_zeroing_meet_in_fresh_clusters() {
    const CLUSTERS: u64 = 3000;
    for round in 0..6_u64 {
        let (base, top) = (Ram::new(vec![0x77; (CLUSTERS * 4096) as usize]), Ram::new(Vec::new()));
        let backing = Some(("base".to_owned(), "raw".to_owned()));
        create(&*top, &Create { size: CLUSTERS * 4096, cluster_size: 4096, backing, ..Create::default() }).unwrap();
        let layers = [
            Layer { format: Format::Qcow2, file: top.clone(), data: None },
            Layer { format: Format::Raw, file: base, data: None },
        ];
        let image = open(&layers);
        let start = Arc::new(Barrier::new(THREADS as usize));
        let workers: Vec<_> = (0..THREADS)
            .map(|number| {
                let (mut lookup, start) = (image.lookup(), Arc::clone(&start));
                thread::spawn(move || {
                    for cluster in 0..CLUSTERS {
                        if cluster % 50 == 0 {
                            start.wait();
                        }
                        let at = cluster * 4096 + number * 512;
                        match (number + cluster + round) % 4 {
                            0 => lookup.zero(at, 512, true).unwrap(),
                            _ => lookup.write(&[number as u8 + 1; 512], at).unwrap(),
                        }
                        if cluster % 64 == number {
                            lookup.flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        let found = read_all(&mut image.lookup());
        for cluster in 0..CLUSTERS {
            for number in 0..THREADS {
                let wanted = if (number + cluster + round) % 4 == 0 { 0 } else { number as u8 + 1 };
                let at = (cluster * 4096 + number * 512) as usize;
                assert!(
                    found[at..at + 512].iter().all(|byte| *byte == wanted),
                    "round {round}, cluster {cluster}, block {number}"
                );
            }
            let rest = &found[(cluster * 4096 + THREADS * 512) as usize..(cluster * 4096 + 4096) as usize];
            assert!(rest.iter().all(|byte| *byte == 0x77), "round {round}, cluster {cluster}: what nobody wrote to");
        }
        image.close().unwrap();
        assert!(check(&(top as Arc<dyn Storage>), false).unwrap().is_clean());
    }
}

/// One queue discards and zeroes whole clusters while others write to and read from the very same ones. What a reader sees is
/// always all of one writer's, or zeroes; never another cluster's data.
#[test]
fn discarding_meets_reading_and_writing() {
    const CLUSTERS: u64 = 16;
    let top = Ram::new(Vec::new());
    create(&*top, &Create { size: CLUSTERS * 4096, cluster_size: 4096, ..Create::default() }).unwrap();
    let image = open(&[Layer { format: Format::Qcow2, file: top.clone(), data: None }]);
    let end = Instant::now() + Duration::from_secs(2);
    let workers: Vec<_> = (0..THREADS)
        .map(|number| {
            let (mut lookup, mut random) = (image.lookup(), Seeded::new(number + 60));
            thread::spawn(move || {
                while Instant::now() < end {
                    let cluster = random.below(CLUSTERS);
                    let at = cluster * 4096;
                    match (number, random.below(4)) {
                        (0, 0) => lookup.discard(at, 4096).unwrap(),
                        (0, 1) => lookup.flush().unwrap(),
                        (0, _) => lookup.zero(at, 4096, true).unwrap(),
                        // Every cluster has bytes of its own, whoever writes it.
                        (1, _) => lookup.write(&[cluster as u8 + 1; 4096], at).unwrap(),
                        _ => {
                            let mut found = [0; 4096];
                            lookup.read(&mut found, at).unwrap();
                            assert!(
                                found.iter().all(|byte| *byte == 0 || *byte == cluster as u8 + 1),
                                "cluster {cluster}: {}",
                                found[0]
                            );
                        }
                    }
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    image.close().unwrap();
    assert!(check(&(top as Arc<dyn Storage>), false).unwrap().is_clean());
}
