//! A disk: the images it is made of, and how it is used.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Backend, Class, Device, Program, Stdio, size};
use crate::args::ImageFormat;
use crate::error::Usage;
use crate::usage;

/// Where what is written to an ephemeral disk goes: on a disk, where there is room for it. The machine's own directory lies in memory.
pub const SCRATCH: &str = "/var/tmp";

/// An image with its format, which is never guessed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The file or block device.
    pub path: PathBuf,
    /// What it is written in.
    pub format: ImageFormat,
}

/// What is allowed in a second, and at once after a pause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// In a second; zero: as much as there is.
    pub per_second: u64,
    /// At once; zero: as the process thinks right.
    pub burst: u64,
}

impl Rate {
    /// As an argument of the process.
    #[must_use]
    pub fn argument(&self) -> String {
        match self.burst {
            0 => self.per_second.to_string(),
            burst => format!("{}:{burst}", self.per_second),
        }
    }
}

/// How much a disk or a share may be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests.
    pub operations: Rate,
    /// Bytes.
    pub bytes: Rate,
}

/// For people.
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits { operations, bytes } = self;
        let mut words = Vec::new();
        if operations.per_second != 0 {
            words.push(format!("{} requests a second ({} at once)", operations.per_second, operations.burst));
        }
        if bytes.per_second != 0 {
            words.push(format!("{} a second ({} at once)", size::show(bytes.per_second), size::show(bytes.burst)));
        }
        if words.is_empty() { f.write_str("without limits") } else { write!(f, "at most {}", words.join(" and ")) }
    }
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// Its images, from the top down.
    pub images: Vec<Image>,
    /// The file with the data of the top image, if it keeps it apart.
    pub data_file: Option<PathBuf>,
    /// Where what is written goes that is to be forgotten.
    pub ephemeral: Option<PathBuf>,
    /// Without writing to it.
    pub readonly: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Who waits for the disk.
    pub engine: Option<String>,
    /// How much it may be used.
    pub limits: Limits,
    /// With which other disks it shares that.
    pub limit_group: Option<String>,
    /// Request queues.
    pub queues: Option<u16>,
    /// What the guest reads as the disk's serial number.
    pub serial: Option<String>,
}

impl Disk {
    /// The device. The arguments about images and limits are not among those of its program: they change while it runs.
    #[must_use]
    pub fn device(self, name: String) -> Device {
        let mut args: Vec<OsString> = Vec::new();
        if self.readonly {
            args.push("--read-only".into());
        }
        if self.direct {
            args.push("--direct".into());
        }
        if let Some(engine) = &self.engine {
            args.extend(["--engine".into(), engine.into()]);
        }
        if let Some(queues) = self.queues {
            args.extend(["--num-queues".into(), queues.to_string().into()]);
        }
        if let Some(serial) = &self.serial {
            args.extend(["--serial".into(), serial.into()]);
        }
        let queues = self.queues;
        let program = Program { name: "outboard-blk", args, stdio: Stdio::Nothing, disk: Some(Box::new(self)), share: None };
        Device { name, class: Class::Named("blk".to_owned()), queues, backend: Backend::Process(program) }
    }

    /// All its files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.images.iter().map(|image| image.path.as_path()).chain(self.data_file.as_deref())
    }

    /// Whether its parts fit together.
    pub fn check(&self, name: &str) -> Result<()> {
        let raw = |image: &Image| image.format == ImageFormat::Raw;
        let mut above = self.images.iter().take(self.images.len().saturating_sub(1));
        if let Some(above) = above.find(|image| raw(image)) {
            usage!(
                "The disk `{name}` has a `backing` image below {}, which is raw and can have none: only qcow2 images have one",
                above.path.display()
            );
        }
        if self.data_file.is_some() && self.images.first().is_none_or(raw) {
            usage!(
                "The disk `{name}` has a `data-file`, but its image is raw: only a qcow2 image keeps its data in another file"
            );
        }
        if self.ephemeral.is_some() && self.readonly {
            usage!("The disk `{name}` cannot be both `readonly` and `ephemeral`: nothing is written that could be forgotten");
        }
        if self.ephemeral.is_some() && self.data_file.is_some() {
            usage!("The disk `{name}` cannot be `ephemeral`: an image that others are based on keeps its data in its own file");
        }
        self.limits.check("disk", name)
    }
}

impl Limits {
    /// Whether its parts fit together.
    ///
    /// # Errors
    /// When they do not, in words about the `kind` of device of that name.
    pub fn check(&self, kind: &str, name: &str) -> Result<()> {
        for (rate, what) in [(self.operations, "limit-ops"), (self.bytes, "limit-bytes")] {
            if rate.per_second == 0 && rate.burst != 0 {
                usage!("The {kind} `{name}` has a burst and no `{what}` to go with it");
            }
        }
        Ok(())
    }
}

/// Whether the disks of each group agree on what they share. The error has the name of the one that does not.
pub fn check_groups<'a>(disks: impl Iterator<Item = (&'a str, &'a Disk)>) -> Result<(), (String, anyhow::Error)> {
    let mut groups: BTreeMap<&str, (&str, Limits)> = BTreeMap::new();
    for (name, disk) in disks {
        let Some(group) = &disk.limit_group else { continue };
        let (first, limits) = groups.entry(group).or_insert((name, disk.limits));
        if *limits != disk.limits {
            let says = format!(
                "The disks `{first}` and `{name}` share the limits of the group `{group}`, but have different ones: give them the same"
            );
            return Err((name.to_owned(), Usage(says).into()));
        }
    }
    Ok(())
}

/// `N[:BURST]`, each a number.
pub fn operations(text: &str) -> Result<Rate> {
    rate(text, |text| match text.parse() {
        Ok(number) => Ok(number),
        Err(_) => usage!("`{text}` is not a number of requests"),
    })
}

/// `SIZE[:BURST]`, each with a unit.
pub fn bytes(text: &str) -> Result<Rate> {
    rate(text, size::parse)
}

fn rate(text: &str, number: impl Fn(&str) -> Result<u64>) -> Result<Rate> {
    let (per_second, burst) = text.split_once(':').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
    Ok(Rate { per_second: number(per_second)?, burst: burst.map_or(Ok(0), number)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(formats: &[ImageFormat]) -> Disk {
        let image = |(index, format): (usize, &ImageFormat)| Image { path: format!("/{index}").into(), format: *format };
        Disk { images: formats.iter().enumerate().map(image).collect(), ..Disk::default() }
    }

    #[test]
    fn what_does_not_fit_together_is_said() {
        let (raw, qcow2) = (ImageFormat::Raw, ImageFormat::Qcow2);
        let says = |disk: Disk| disk.check("d").unwrap_err().to_string();
        assert!(disk(&[qcow2, qcow2, raw]).check("d").is_ok());
        assert_eq!(
            says(disk(&[qcow2, raw, raw])),
            "The disk `d` has a `backing` image below /1, which is raw and can have none: only qcow2 images have one"
        );
        assert!(says(Disk { data_file: Some("/x".into()), ..disk(&[raw]) }).contains("its image is raw"));
        let ephemeral = Disk { ephemeral: Some(SCRATCH.into()), ..disk(&[qcow2]) };
        assert!(ephemeral.check("d").is_ok());
        assert!(says(Disk { readonly: true, ..ephemeral.clone() }).contains("both `readonly` and `ephemeral`"));
        assert!(says(Disk { data_file: Some("/x".into()), ..ephemeral }).contains("cannot be `ephemeral`"));
        let limits = Limits { bytes: Rate { per_second: 0, burst: 1 }, ..Limits::default() };
        assert!(says(Disk { limits, ..disk(&[raw]) }).contains("no `limit-bytes`"));
    }

    #[test]
    fn disks_of_a_group_have_the_same_limits() {
        let limits = |per_second| Limits { operations: Rate { per_second, burst: 0 }, ..Limits::default() };
        let member = |rate| Disk { limit_group: Some("slow".into()), limits: limits(rate), ..disk(&[ImageFormat::Raw]) };
        let (a, b, c) = (member(5), member(5), member(6));
        assert!(check_groups([("a", &a), ("b", &b)].into_iter()).is_ok());
        let (about, error) = check_groups([("a", &a), ("c", &c)].into_iter()).unwrap_err();
        let says = "The disks `a` and `c` share the limits of the group `slow`, but have different ones: give them the same";
        assert_eq!((about.as_str(), error.to_string().as_str()), ("c", says));
    }

    #[test]
    fn rates_may_have_a_burst() {
        assert_eq!(operations("100").unwrap().argument(), "100");
        assert_eq!(operations("100:500").unwrap().argument(), "100:500");
        assert_eq!(bytes("1M:2M").unwrap(), Rate { per_second: 1 << 20, burst: 2 << 20 });
        assert_eq!(operations("x").unwrap_err().to_string(), "`x` is not a number of requests");
        assert!(bytes("100").is_err());
    }
}
