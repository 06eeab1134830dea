//! The same disk by our engine, by a model, and by QEMU's engine, in both directions, over what the format allows.

use std::fs;

use image::{Format, Layer, check};

use crate::support::{
    Model, Scratch, Seeded, assert_clean, assert_same, file, layer, open, qemu_img, qemu_io, qemu_reads, read_all, step,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    None,
    Raw,
    Qcow2,
}

/// One kind of image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) cluster: u64,
    pub(crate) refcount_bits: u64,
    pub(crate) v2: bool,
    pub(crate) backing: Backing,
    pub(crate) compressed: Option<&'static str>,
    pub(crate) data_file: Option<bool>,
    pub(crate) snapshot: bool,
    pub(crate) extended: bool,
    pub(crate) odd_end: bool,
    /// Clusters of the disk, if not the usual number.
    pub(crate) clusters: Option<u64>,
}

impl Kind {
    pub(crate) const PLAIN: Kind = Kind {
        cluster: 65536,
        refcount_bits: 16,
        v2: false,
        backing: Backing::None,
        compressed: None,
        data_file: None,
        snapshot: false,
        extended: false,
        odd_end: false,
        clusters: None,
    };

    /// Whether there can be such an image.
    fn is_possible(&self) -> bool {
        let external = self.data_file.is_some();
        !(self.v2 && (self.refcount_bits != 16 || external || self.extended || self.compressed == Some("zstd")))
            && !(external && (self.compressed.is_some() || self.snapshot))
            && !(self.data_file == Some(true) && self.backing != Backing::None)
            && !(self.extended && self.cluster < 16384)
            && !(self.snapshot && self.refcount_bits == 1)
            // Several compressed clusters share one of the file's.
            && !(self.compressed.is_some() && self.refcount_bits < 8)
    }

    fn size(&self) -> u64 {
        if let Some(clusters) = self.clusters {
            return clusters * self.cluster;
        }
        let clusters = match self.cluster {
            512 => 3000,
            4096 => 600,
            65536 => 60,
            _ => 5,
        };
        clusters * self.cluster + if self.odd_end { 512 * 3 } else { 0 }
    }

    fn options(&self) -> String {
        let mut all = vec![format!("cluster_size={}", self.cluster), format!("compat={}", if self.v2 { "0.10" } else { "1.1" })];
        if !self.v2 {
            all.push(format!("refcount_bits={}", self.refcount_bits));
            all.push(format!("extended_l2={}", if self.extended { "on" } else { "off" }));
            all.push(format!("compression_type={}", self.compressed.unwrap_or("zlib")));
        }
        if let Some(raw) = self.data_file {
            all.push(format!("data_file=top.data,data_file_raw={}", if raw { "on" } else { "off" }));
        }
        match self.backing {
            Backing::None => {}
            Backing::Raw => all.push("backing_file=base.raw,backing_fmt=raw".to_owned()),
            Backing::Qcow2 => all.push("backing_file=base.qcow2,backing_fmt=qcow2".to_owned()),
        }
        all.join(",")
    }

    pub(crate) fn layers(&self, scratch: &Scratch) -> Vec<Layer> {
        let mut top = layer(Format::Qcow2, &scratch.path("top.qcow2"));
        top.data = self.data_file.map(|_| file(&scratch.path("top.data")));
        match self.backing {
            Backing::None => vec![top],
            Backing::Raw => vec![top, layer(Format::Raw, &scratch.path("base.raw"))],
            Backing::Qcow2 => vec![top, layer(Format::Qcow2, &scratch.path("base.qcow2"))],
        }
    }

    /// An image by QEMU, with something of everything in it.
    pub(crate) fn make(&self, scratch: &Scratch, random: &mut Seeded) {
        let size = self.size();
        // Shorter than the image, and not a whole number of clusters.
        let base = size / 4 * 3 / 512 * 512;
        if self.backing != Backing::None {
            let bytes: Vec<u8> = (0..base / 512).flat_map(|block| [(block % 5 * 50) as u8; 512]).collect();
            fs::write(scratch.path("base.raw"), bytes).unwrap();
            let to = ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", "base.raw", "base.qcow2"];
            qemu_img(scratch, &to);
        }
        qemu_img(scratch, &["create", "-q", "-f", "qcow2", "-o", &self.options(), "top.qcow2", &size.to_string()]);
        let mut commands = Vec::new();
        if self.compressed.is_some() {
            let clusters = size / self.cluster;
            let (start, step) = (random.below(clusters), (clusters / 8).max(1));
            for number in 0..clusters.min(8) {
                let at = (start + number * step) % clusters * self.cluster;
                commands.push(format!("write -c -P {} {at} {}", random.below(200) + 1, self.cluster));
            }
        }
        commands.extend(script(random, size, 12).0);
        qemu_io(scratch, "top.qcow2", &commands);
        if self.snapshot {
            qemu_img(scratch, &["snapshot", "-c", "before", "top.qcow2"]);
            qemu_io(scratch, "top.qcow2", &script(random, size, 4).0);
        }
    }
}

/// Steps for QEMU's engine, and what they do to a disk.
fn script(random: &mut Seeded, size: u64, steps: u64) -> (Vec<String>, Vec<(u64, u64, u8)>) {
    let (mut commands, mut effects) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let at = random.below(size / 512) * 512;
        let len = ((random.below(size / 512 / 8) + 1) * 512).min(size - at);
        match random.below(5) {
            0 => commands.push(format!("write -z {at} {len}")),
            1 => commands.push(format!("write -z -u {at} {len}")),
            _ => {
                let byte = random.below(255) as u8 + 1;
                commands.push(format!("write -P {byte} {at} {len}"));
                effects.push((at, len, byte));
                continue;
            }
        }
        effects.push((at, len, 0));
    }
    (commands, effects)
}

/// One kind of image through all of it.
fn exchange(kind: Kind, seed: u64, steps: u64) {
    let what = format!("{kind:?} (seed {seed})");
    let (scratch, mut random) = (Scratch::new(), Seeded::new(seed));
    kind.make(&scratch, &mut random);
    let mut model = Model(qemu_reads(&scratch, "top.qcow2", &[]));
    let snapshot = kind.snapshot.then(|| qemu_reads(&scratch, "top.qcow2", &["-l", "before"]));
    let most = (kind.cluster * 5 / 2).clamp(8192, kind.size() / 2);
    for round in 0..3 {
        let image = open(&kind.layers(&scratch));
        let mut lookup = image.lookup();
        assert_same(&read_all(&mut lookup), &model.0, &format!("{what}, round {round}: what QEMU wrote, as we see it"));
        for _ in 0..steps {
            step(&mut random, &mut lookup, &mut model, most);
        }
        assert_same(&read_all(&mut lookup), &model.0, &format!("{what}, round {round}: what we wrote, as we see it"));
        drop(lookup);
        image.close().unwrap();
        let report = check(&file(&scratch.path("top.qcow2")), false).unwrap();
        assert!(report.is_clean(), "{what}, round {round}: {report:?}");
        assert_clean(&scratch, "top.qcow2", &format!("{what}, round {round}: after us"));
        assert_same(
            &qemu_reads(&scratch, "top.qcow2", &[]),
            &model.0,
            &format!("{what}, round {round}: what we wrote, as QEMU sees it"),
        );
        if kind.data_file == Some(true) {
            let data = fs::read(scratch.path("top.data")).unwrap();
            assert_same(&data[..model.0.len()], &model.0, &format!("{what}, round {round}: the raw data file"));
        }
        let (commands, effects) = script(&mut random, kind.size(), 8);
        qemu_io(&scratch, "top.qcow2", &commands);
        for (at, len, byte) in effects {
            model.write(&vec![byte; len as usize], at);
        }
        if let Some(snapshot) = &snapshot {
            assert_same(&qemu_reads(&scratch, "top.qcow2", &["-l", "before"]), snapshot, &format!("{what}: the snapshot"));
        }
    }
    assert_clean(&scratch, "top.qcow2", &format!("{what}: at the end"));
}

/// All kinds there can be, in a fixed order.
fn kinds() -> Vec<Kind> {
    let mut all = Vec::new();
    for cluster in [512, 4096, 65536, 2 << 20] {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            for bits in 0_u32..16 {
                for backing in [Backing::None, Backing::Raw, Backing::Qcow2] {
                    for compressed in [None, Some("zlib"), Some("zstd")] {
                        for data_file in [None, Some(false), Some(true)] {
                            all.push(Kind {
                                cluster,
                                refcount_bits,
                                v2: bits & 1 != 0,
                                backing,
                                compressed,
                                data_file,
                                snapshot: bits & 2 != 0,
                                extended: bits & 4 != 0,
                                odd_end: bits & 8 != 0,
                                clusters: None,
                            });
                        }
                    }
                }
            }
        }
    }
    all.retain(Kind::is_possible);
    all
}

#[test]
fn the_plain_kinds_go_back_and_forth() {
    exchange(Kind::PLAIN, 1, 200);
    exchange(Kind { v2: true, ..Kind::PLAIN }, 2, 100);
    exchange(Kind { cluster: 512, odd_end: true, ..Kind::PLAIN }, 3, 200);
    exchange(Kind { cluster: 4096, refcount_bits: 1, ..Kind::PLAIN }, 4, 200);
}

#[test]
fn overlays_go_back_and_forth() {
    exchange(Kind { backing: Backing::Raw, ..Kind::PLAIN }, 5, 200);
    exchange(Kind { backing: Backing::Qcow2, odd_end: true, ..Kind::PLAIN }, 6, 200);
    exchange(Kind { backing: Backing::Raw, v2: true, ..Kind::PLAIN }, 7, 200);
}

#[test]
fn snapshots_and_compressed_clusters_go_back_and_forth() {
    exchange(Kind { snapshot: true, ..Kind::PLAIN }, 8, 200);
    exchange(Kind { compressed: Some("zlib"), snapshot: true, cluster: 4096, ..Kind::PLAIN }, 9, 200);
    exchange(Kind { compressed: Some("zstd"), backing: Backing::Qcow2, ..Kind::PLAIN }, 10, 200);
}

#[test]
fn subclusters_and_data_files_go_back_and_forth() {
    exchange(Kind { extended: true, ..Kind::PLAIN }, 11, 200);
    exchange(Kind { extended: true, backing: Backing::Raw, snapshot: true, compressed: Some("zlib"), ..Kind::PLAIN }, 12, 200);
    exchange(Kind { data_file: Some(false), ..Kind::PLAIN }, 13, 200);
    exchange(Kind { data_file: Some(true), ..Kind::PLAIN }, 14, 200);
    exchange(Kind { data_file: Some(false), backing: Backing::Raw, extended: true, ..Kind::PLAIN }, 15, 200);
}

/// A sample of the matrix; a larger one with OUTBOARD_IMAGE_MATRIX=500; all of it, for an hour, with OUTBOARD_IMAGE_MATRIX=full.
#[test]
fn a_sample_of_all_kinds_goes_back_and_forth() {
    let all = kinds();
    let wanted = std::env::var("OUTBOARD_IMAGE_MATRIX").unwrap_or_default();
    let full = wanted == "full";
    let mut random = Seeded::new(2026);
    let count = if full { all.len() } else { wanted.parse().unwrap_or(24) };
    for number in 0..count {
        let kind = if full { all[number] } else { all[random.below(all.len() as u64) as usize] };
        exchange(kind, 100 + number as u64, 60);
    }
}
