//! Every state a crash can leave. The engine works on a file in memory that remembers what was done to it, in which order, and where
//! the barriers were.
//!
//! After a **power cut**, all before the last barrier is there, and of what came after it any part, in sectors. After a **kill**,
//! everything that was handed to the system is there. In both cases no check may find an error (leaks are allowed); what was
//! flushed has to be there after a power cut, and what was acknowledged after a kill.

use std::fs;
use std::sync::Arc;
use std::thread;

use image::{Barrier, Create, Format, Image, Layer, Options, Storage, check, create};

use crate::differential::{Backing, Kind};
use crate::support::{Event, Model, Ram, Scratch, Seeded, apply, assert_clean, open, qemu_check, qemu_reads, read_all, step};

/// The sector: what a disk writes as a whole.
const SECTOR: usize = 512;

/// What was done, and what the disk was after each step.
struct Run {
    /// The image, and the data file if there is one.
    before: Vec<Vec<u8>>,
    below: Vec<Layer>,
    log: Vec<(usize, Event)>,
    models: Vec<Model>,
    /// Steps that ended with a flush.
    flushed: Vec<usize>,
}

fn layers(files: &[Arc<Ram>], below: &[Layer]) -> Vec<Layer> {
    let data = files.get(1).map(|data| data.clone() as Arc<dyn Storage>);
    [vec![Layer { format: Format::Qcow2, file: files[0].clone(), data }], below.to_vec()].concat()
}

fn run(scratch: &Scratch, kind: Kind, seed: u64, steps: usize) -> Run {
    let mut random = Seeded::new(seed);
    kind.make(scratch, &mut random);
    let mut model = Model(qemu_reads(scratch, "top.qcow2", &[]));
    let ram = Ram::new(fs::read(scratch.path("top.qcow2")).unwrap());
    let data = kind.data_file.map(|_| ram.beside(fs::read(scratch.path("top.data")).unwrap()));
    let files: Vec<Arc<Ram>> = [Some(ram.clone()), data].into_iter().flatten().collect();
    let below = kind.layers(scratch).split_off(1);
    let image = open(&layers(&files, &below));
    let mut lookup = image.lookup();
    let before = files.iter().map(|file| file.bytes()).collect();
    ram.record();
    let (mut models, mut flushed) = (vec![model.clone()], vec![0]);
    let mut slow = SlowFlush::None;
    for number in 1..=steps {
        if kind.data_file.is_none() && random.chance(4) && slow.goes_on(&image, &ram) {
            flushed.push(number);
        } else if random.chance(6) {
            lookup.flush().unwrap();
            flushed.push(number);
        } else {
            step(&mut random, &mut lookup, &mut model, kind.cluster * 3);
        }
        models.push(model.clone());
        ram.mark(number);
    }
    drop(lookup);
    image.close().unwrap();
    ram.mark(steps + 1);
    models.push(model);
    Run { before, below, log: ram.take_log(), models, flushed }
}

/// A flush whose waiting is the caller's: whatever is done between its parts, it covers what was done before, and gives back no more.
enum SlowFlush {
    None,
    Begun(Barrier),
    Synced(Barrier),
}

impl SlowFlush {
    /// Does its next part. `true`: the sync.
    fn goes_on(&mut self, image: &Image, ram: &Ram) -> bool {
        let (next, synced) = match std::mem::replace(self, SlowFlush::None) {
            SlowFlush::None => (image.barrier().unwrap().map_or(SlowFlush::None, SlowFlush::Begun), false),
            SlowFlush::Begun(barrier) => {
                ram.sync().unwrap();
                (SlowFlush::Synced(barrier), true)
            }
            SlowFlush::Synced(barrier) => {
                image.settle(barrier).unwrap();
                (SlowFlush::None, false)
            }
        };
        *self = next;
        synced
    }
}

impl Run {
    /// The files if the power goes before this event. Each has barriers of its own.
    fn power_cut(&self, at: usize, random: &mut Seeded) -> Vec<Vec<u8>> {
        let mut files = self.before.clone();
        let last = |file: usize| self.log[..at].iter().rposition(|(of, event)| *of == file && matches!(event, Event::Sync));
        let durable: Vec<usize> = (0..files.len()).map(|file| last(file).unwrap_or(0)).collect();
        let kept = random.below(5);
        for (index, (file, event)) in self.log[..at].iter().enumerate() {
            let bytes = &mut files[*file];
            match event {
                event if index < durable[*file] => apply(bytes, event),
                Event::Write(offset, data) => {
                    let mut from = 0;
                    while from < data.len() {
                        let to = (from + SECTOR - (*offset as usize + from) % SECTOR).min(data.len());
                        if random.below(4) < kept {
                            apply(bytes, &Event::Write(offset + from as u64, data[from..to].to_vec()));
                        }
                        from = to;
                    }
                }
                event if random.below(4) < kept => apply(bytes, event),
                _ => {}
            }
        }
        files
    }

    /// The files if the process is killed before this event.
    fn kill(&self, at: usize) -> Vec<Vec<u8>> {
        let mut files = self.before.clone();
        self.log[..at].iter().for_each(|(file, event)| apply(&mut files[*file], event));
        files
    }

    /// The last step that was done before this event.
    fn step_before(&self, at: usize) -> usize {
        let marks = self.log[..at].iter().rev();
        marks.filter_map(|(_, event)| if let Event::Mark(number) = event { Some(*number) } else { None }).next().unwrap_or(0)
    }

    /// Judges a state of the files. Each sector is what it was after step `first`, or after a later one up to the one under way.
    fn judge(&self, state: &[Vec<u8>], first: usize, last: usize, what: &str) -> Vec<Arc<Ram>> {
        let files: Vec<Arc<Ram>> = state.iter().map(|bytes| Ram::new(bytes.clone())).collect();
        let report = check(&(files[0].clone() as Arc<dyn Storage>), false).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(report.corruptions, 0, "{what}: {:?}", report.errors);
        let image = Image::open(&layers(&files, &self.below), Options { writable: false, ..Options::default() });
        let image = image.unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = read_all(&mut image.lookup());
        for (number, sector) in found.chunks(SECTOR).enumerate() {
            let at = number * SECTOR;
            let known = self.models[first..=last].iter().any(|model| &model.0[at..at + sector.len()] == sector);
            assert!(known, "{what}: the sector at {at:#x} is {:#x}, which it was never after steps {first} to {last}", sector[0]);
        }
        files
    }
}

fn crashes(kind: Kind, seed: u64, states: u64) {
    let scratch = Scratch::new();
    let run = run(&scratch, kind, seed, 60);
    let mut random = Seeded::new(seed + 1);
    let steps = run.models.len() - 1;
    for state in 0..states {
        let at = random.below(run.log.len() as u64 + 1) as usize;
        let done = run.step_before(at);
        let current = (done + 1).min(steps);
        let kill = state % 3 == 0;
        let what = format!(
            "{kind:?}, seed {seed}, state {state}: {} before event {at} of {}",
            if kill { "a kill" } else { "a power cut" },
            run.log.len()
        );
        let (bytes, first) = if kill {
            (run.kill(at), done)
        } else {
            (run.power_cut(at, &mut random), run.flushed.iter().rev().find(|flushed| **flushed <= done).copied().unwrap_or(0))
        };
        let files = run.judge(&bytes, first, current, &what);
        if state % 10 == 0 {
            fs::write(scratch.path("top.qcow2"), &bytes[0]).unwrap();
            let (code, said) = qemu_check(&scratch, "top.qcow2");
            assert!(code == Some(0) || code == Some(3), "{what}: {said}");
        }
        if state % 20 == 0 {
            recovers(&run, &scratch, &files, &what, &mut random);
        }
    }
}

/// The image goes on being used: the leaks are gone, and everything is as it should be.
fn recovers(run: &Run, scratch: &Scratch, files: &[Arc<Ram>], what: &str, random: &mut Seeded) {
    let image = open(&layers(files, &run.below));
    let mut lookup = image.lookup();
    let mut model = Model(read_all(&mut lookup));
    for _ in 0..20 {
        step(random, &mut lookup, &mut model, 64 << 10);
    }
    assert!(read_all(&mut lookup) == model.0, "{what}: after recovery");
    drop(lookup);
    image.close().unwrap();
    fs::write(scratch.path("top.qcow2"), files[0].bytes()).unwrap();
    assert_clean(scratch, "top.qcow2", &format!("{what}: after recovery"));
}

/// Growing moves the L1 table, and the refcount table where it has become too short.
#[test]
fn growing_survives() {
    let scratch = Scratch::new();
    for refcount_bits in [16, 64] {
        let ram = Ram::new(Vec::new());
        create(&*ram, &Create { size: 1 << 20, cluster_size: 512, refcount_bits, ..Create::default() }).unwrap();
        let image = open(&[Layer { format: Format::Qcow2, file: ram.clone(), data: None }]);
        let mut lookup = image.lookup();
        lookup.write(&[1; 1 << 19], 0).unwrap();
        lookup.flush().unwrap();
        let before = ram.bytes();
        ram.record();
        image.resize(64 << 20).unwrap();
        lookup.write(&[2; 1 << 20], 63 << 20).unwrap();
        lookup.flush().unwrap();
        ram.mark(1);
        lookup.zero(32 << 20, 32 << 20, true).unwrap();
        drop(lookup);
        image.close().unwrap();
        let run = Run { before: vec![before], below: Vec::new(), log: ram.take_log(), models: Vec::new(), flushed: vec![0] };
        let mut random = Seeded::new(refcount_bits.into());
        for state in 0..300 {
            let at = if state < 200 { state.min(run.log.len()) } else { random.below(run.log.len() as u64 + 1) as usize };
            let what = format!("{refcount_bits} bits, state {state}, before event {at} of {}", run.log.len());
            let bytes = if state % 3 == 0 { run.kill(at) } else { run.power_cut(at, &mut random) };
            let bytes = &bytes[0];
            let ram = Ram::new(bytes.clone());
            let report = check(&(ram.clone() as Arc<dyn Storage>), false).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(report.corruptions, 0, "{what}: {:?}", report.errors);
            let image = open(&[Layer { format: Format::Qcow2, file: ram, data: None }]);
            assert!([1 << 20, 64 << 20].contains(&image.size()), "{what}");
            let mut first = vec![0; 1 << 20];
            image.lookup().read(&mut first, 0).unwrap();
            assert!(first[..1 << 19] == [1; 1 << 19] && first[1 << 19..] == [0; 1 << 19], "{what}");
            if state % 30 == 0 {
                fs::write(scratch.path("top.qcow2"), bytes).unwrap();
                let (code, said) = qemu_check(&scratch, "top.qcow2");
                assert!(code == Some(0) || code == Some(3), "{what}: {said}");
            }
        }
    }
}

/// Several queues write, discard and flush at once. Whenever it ends, no two things are in one place, and nothing that is used is
/// free.
fn queues(kind: Kind, seed: u64) {
    let scratch = Scratch::new();
    kind.make(&scratch, &mut Seeded::new(seed));
    let ram = Ram::new(fs::read(scratch.path("top.qcow2")).unwrap());
    let below = kind.layers(&scratch).split_off(1);
    let image = open(&layers(std::slice::from_ref(&ram), &below));
    let before = vec![ram.bytes()];
    let clusters = image.size() / kind.cluster;
    ram.record();
    let workers: Vec<_> = (0..4)
        .map(|number| {
            let (mut lookup, mut random) = (image.lookup(), Seeded::new(seed * 10 + number));
            let (image, ram, mut slow) = (Arc::clone(&image), Arc::clone(&ram), SlowFlush::None);
            thread::spawn(move || {
                for _ in 0..60 {
                    let at = random.below(clusters) * kind.cluster;
                    match random.below(9) {
                        8 => drop(slow.goes_on(&image, &ram)),
                        0 => lookup.discard(at, kind.cluster).unwrap(),
                        1 => lookup.zero(at, kind.cluster, true).unwrap(),
                        2 => lookup.flush().unwrap(),
                        _ => lookup.write(&[(at / kind.cluster) as u8 | 0x80; 1024], at + number * 1024).unwrap(),
                    }
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    image.close().unwrap();
    let run = Run { before, below, log: ram.take_log(), models: Vec::new(), flushed: Vec::new() };
    let mut random = Seeded::new(seed);
    for state in 0..300 {
        let at = random.below(run.log.len() as u64 + 1) as usize;
        let bytes = if state % 3 == 0 { run.kill(at) } else { run.power_cut(at, &mut random) };
        let what = format!("{kind:?}, queues, state {state}, before event {at} of {}", run.log.len());
        let report = check(&(Ram::new(bytes[0].clone()) as Arc<dyn Storage>), false).unwrap();
        assert_eq!(report.corruptions, 0, "{what}: {:?}", report.errors);
        if state % 30 == 0 {
            fs::write(scratch.path("top.qcow2"), &bytes[0]).unwrap();
            let (code, said) = qemu_check(&scratch, "top.qcow2");
            assert!(code == Some(0) || code == Some(3), "{what}: {said}");
        }
    }
}

#[test]
fn several_queues_survive() {
    queues(Kind { cluster: 4096, clusters: Some(64), ..Kind::PLAIN }, 51);
    queues(Kind { cluster: 4096, clusters: Some(64), snapshot: true, compressed: Some("zlib"), ..Kind::PLAIN }, 52);
    queues(Kind { backing: Backing::Raw, cluster: 4096, clusters: Some(64), ..Kind::PLAIN }, 53);
}

#[test]
fn plain_images_survive() {
    crashes(Kind { clusters: Some(24), ..Kind::PLAIN }, 21, 200);
    crashes(Kind { cluster: 4096, refcount_bits: 64, clusters: Some(300), ..Kind::PLAIN }, 22, 200);
    crashes(Kind { v2: true, clusters: Some(24), ..Kind::PLAIN }, 23, 100);
}

#[test]
fn tiny_clusters_survive_while_their_tables_grow() {
    crashes(Kind { cluster: 512, refcount_bits: 64, clusters: Some(2000), ..Kind::PLAIN }, 24, 200);
    crashes(Kind { cluster: 512, refcount_bits: 1, clusters: Some(2000), ..Kind::PLAIN }, 25, 100);
}

#[test]
fn overlays_survive() {
    crashes(Kind { backing: Backing::Raw, clusters: Some(24), ..Kind::PLAIN }, 26, 200);
    crashes(Kind { backing: Backing::Qcow2, cluster: 4096, clusters: Some(300), ..Kind::PLAIN }, 27, 200);
    crashes(Kind { backing: Backing::Raw, v2: true, cluster: 4096, clusters: Some(300), ..Kind::PLAIN }, 28, 200);
}

#[test]
fn snapshots_and_compressed_clusters_survive() {
    crashes(Kind { snapshot: true, clusters: Some(24), ..Kind::PLAIN }, 29, 200);
    crashes(Kind { snapshot: true, compressed: Some("zlib"), cluster: 4096, clusters: Some(300), ..Kind::PLAIN }, 30, 200);
}

#[test]
fn subclusters_survive() {
    crashes(Kind { extended: true, clusters: Some(24), ..Kind::PLAIN }, 31, 200);
    crashes(Kind { extended: true, backing: Backing::Raw, snapshot: true, clusters: Some(24), ..Kind::PLAIN }, 32, 200);
}

#[test]
fn data_files_survive() {
    crashes(Kind { data_file: Some(false), clusters: Some(24), ..Kind::PLAIN }, 33, 200);
    crashes(Kind { data_file: Some(true), clusters: Some(24), ..Kind::PLAIN }, 34, 100);
    crashes(Kind { data_file: Some(false), backing: Backing::Raw, cluster: 4096, clusters: Some(300), ..Kind::PLAIN }, 35, 200);
    crashes(Kind { data_file: Some(false), backing: Backing::Raw, extended: true, clusters: Some(24), ..Kind::PLAIN }, 36, 100);
}
