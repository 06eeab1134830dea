//! What a machine file can say: one table, from which come what `file` accepts, the JSON Schema, and the reference in the
//! documents.

pub mod json;
pub mod page;

/// A kind of table in the file.
#[derive(Debug)]
pub struct Table {
    /// Its name in the file.
    pub name: &'static str,
    /// There can be many, each with a name of its own: `[disk.NAME]`.
    pub named: bool,
    /// What it is.
    pub about: &'static str,
    /// What else there is to say, for the documents.
    pub notes: &'static str,
    /// Its keys, in the order in which people read them.
    pub keys: &'static [Key],
    /// What keys have to do with each other.
    pub rules: &'static [Rule],
}

/// A key of a table.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What it can be.
    pub kind: Kind,
    /// What it means.
    pub about: &'static str,
    /// What holds without it.
    pub without: Without,
}

/// What a value can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A path, relative to the file.
    Path,
    /// Text of at most so many bytes, if there is a limit.
    Text(Option<u32>),
    /// The name of a machine.
    Name,
    /// A number and a unit.
    Size,
    /// Yes or no.
    Bool,
    /// A number from one to the other.
    Number(u32, u32),
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Images, each with a path and one of these formats.
    Chain(&'static [&'static str]),
    /// One of these words, or a path.
    ChoiceOrPath(&'static [&'static str]),
}

/// What holds without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// The file makes no sense.
    Required,
    /// This, as it would be written.
    Default(&'static str),
    /// This, in words.
    Words(&'static str),
}

/// What keys of one table have to do with each other.
#[derive(Debug)]
pub enum Rule {
    /// The first makes sense only with the second.
    Needs(&'static str, &'static str),
    /// Exactly one of the two.
    OneOf(&'static str, &'static str),
    /// Where `key` is one of `words`, `other` is required, and elsewhere it makes no sense.
    Only {
        /// The key.
        key: &'static str,
        /// What it is.
        words: &'static [&'static str],
        /// The key that goes with that.
        other: &'static str,
    },
}

/// The classes the VMM has a name for.
pub const CLASSES: [&str; 10] = ["net", "blk", "console", "rng", "balloon", "gpu", "input", "vsock", "snd", "fs"];
/// What images are written in.
pub const FORMATS: [&str; 2] = ["raw", "qcow2"];
/// The VMM's own limit.
pub const MOST_CPUS: u32 = 64;

const fn key(name: &'static str, kind: Kind, about: &'static str, without: Without) -> Key {
    Key { name, kind, about, without }
}

const REQUIRED: Without = Without::Required;

const LIMIT_OPS: Key = key("limit-ops", Kind::Number(1, u32::MAX), "most requests in a second", Without::Words("no limit"));
const LIMIT_OPS_BURST: Key =
    key("limit-ops-burst", Kind::Number(1, u32::MAX), "so many at once after a pause", Without::Words("a tenth of a second's"));
const LIMIT_BYTES: Key = key("limit-bytes", Kind::Size, "most bytes in a second", Without::Words("no limit"));
const LIMIT_BYTES_BURST: Key =
    key("limit-bytes-burst", Kind::Size, "so many at once after a pause", Without::Words("a tenth of a second's"));

/// All tables.
pub const TABLES: [Table; 6] = [
    Table {
        name: "machine",
        named: false,
        about: "",
        notes: "With `on-reboot = \"restart\"` the guest's memory is emptied before it starts again; no process ends \
                and no connection is made anew.",
        keys: &[
            key("kernel", Kind::Path, "a bzImage, or an ELF `vmlinux` with a PVH note", REQUIRED),
            key("name", Kind::Name, "the machine's name, for `ps` and `stop`", Without::Words("the file's name without `.toml`")),
            key("cpus", Kind::Number(1, MOST_CPUS), "processors", Without::Default("1")),
            key(
                "memory",
                Kind::Size,
                "whole MiB; at least 32 MiB more than the kernel and initrd files take",
                Without::Default("\"512M\""),
            ),
            key("initrd", Kind::Path, "the initial RAM disk", Without::Words("none")),
            key("cmdline", Kind::Text(None), "the kernel's command line", Without::Words("empty")),
            key(
                "serial",
                Kind::ChoiceOrPath(&["none", "stdio"]),
                "where COM1 leads; a file is appended to",
                Without::Default("\"none\""),
            ),
            key(
                "on-reboot",
                Kind::Choice(&["restart", "exit"]),
                "whether the same processes go on and the guest starts again, or the machine ends with status 3",
                Without::Default("\"restart\""),
            ),
            key(
                "restart",
                Kind::Choice(&["always", "never"]),
                "whether device processes that die are started again, and lost sockets of others tried again, for ever; \
                 or the guest goes on without the device",
                Without::Default("\"always\""),
            ),
            key(
                "sandbox-floor",
                Kind::Choice(&["linux-6.12", "linux-6.1", "linux-5.15"]),
                "see the [threat model](threat-model.md#floors)",
                Without::Default("\"linux-6.12\""),
            ),
        ],
        rules: &[],
    },
    Table {
        name: "disk",
        named: true,
        about: "Served by [outboard-blk](blk.md).",
        notes: "An ephemeral disk begins as its image is each time the machine starts; a disk process that dies loses nothing. \
                What can be done with a disk while it is in use is told with [outboard disk](outboard.md#outboard-disk).",
        keys: &[
            key("path", Kind::Path, "an image file or block device", REQUIRED),
            key("format", Kind::Choice(&FORMATS), "what the image is; it is never guessed", Without::Default("\"raw\"")),
            key("backing", Kind::Chain(&FORMATS), "those it is based on, from the top down", Without::Words("none")),
            key("data-file", Kind::Path, "the file with the data of a qcow2 image that keeps it apart", Without::Words("none")),
            key(
                "ephemeral",
                Kind::Bool,
                "what the guest writes is forgotten when the machine ends; the image is only read",
                Without::Default("false"),
            ),
            key("ephemeral-dir", Kind::Path, "the directory in which it is kept until then", Without::Default("\"/var/tmp\"")),
            key(
                "cache",
                Kind::Choice(&["page", "direct"]),
                "whether data passes through the host's page cache",
                Without::Default("\"page\""),
            ),
            key(
                "engine",
                Kind::Choice(&["auto", "io-uring", "threads"]),
                "who waits for the disk: io_uring where the host has it, or threads",
                Without::Default("\"auto\""),
            ),
            LIMIT_OPS,
            LIMIT_OPS_BURST,
            LIMIT_BYTES,
            LIMIT_BYTES_BURST,
            key(
                "limit-group",
                Kind::Text(Some(40)),
                "a name: all disks with this one are limited together, and say the same limits",
                Without::Words("limits of its own"),
            ),
            key("readonly", Kind::Bool, "the guest cannot write", Without::Default("false")),
            key("queues", Kind::Number(1, 64), "each with a thread", Without::Default("1")),
            key("serial", Kind::Text(Some(20)), "the serial number the guest reads", Without::Words("empty")),
        ],
        rules: &[
            Rule::Needs("ephemeral-dir", "ephemeral"),
            Rule::Needs("limit-ops-burst", "limit-ops"),
            Rule::Needs("limit-bytes-burst", "limit-bytes"),
        ],
    },
    Table {
        name: "share",
        named: true,
        about: "A directory of this host, served by [outboard-virtiofsd](virtiofsd.md). The table's name is the tag: \
                `mount -t virtiofs NAME /mnt`.",
        notes: "Files of whoever starts the machine are the guest's root's, both ways, without any privilege; \
                [more about owners](virtiofsd.md#whose-files-are-whose). When the process dies, another one goes on; what the \
                guest had open gives an error (`ESTALE`, `EBADF`) and is to be opened again.",
        keys: &[
            key("path", Kind::Path, "the directory", REQUIRED),
            key("readonly", Kind::Bool, "the guest cannot write", Without::Default("false")),
            key(
                "cache",
                Kind::Choice(&["never", "metadata", "auto", "always"]),
                "what the guest keeps: nothing, what is known of files, that and data for a second, everything",
                Without::Default("\"auto\""),
            ),
            key(
                "owner",
                Kind::Text(Some(20)),
                "whose files are whose: `me` or `me=ID`, mine are those of the guest's user of that number; `squash` or \
                 `squash=ID`, all are",
                Without::Default("\"me\""),
            ),
            key("writeback", Kind::Bool, "the guest collects what is written", Without::Default("false")),
            key("xattr", Kind::Bool, "extended attributes", Without::Default("false")),
            key(
                "xattrmap",
                Kind::Text(None),
                "names of extended attributes that are others on the host, as [rules](virtiofsd.md#extended-attributes)",
                Without::Words("they are the same"),
            ),
            key("posix-acl", Kind::Bool, "access control lists, and extended attributes", Without::Default("false")),
            key(
                "negative-timeout",
                Kind::Number(1, 86400),
                "for how many seconds the guest believes that something is not there",
                Without::Words("it asks each time"),
            ),
            LIMIT_OPS,
            LIMIT_OPS_BURST,
            LIMIT_BYTES,
            LIMIT_BYTES_BURST,
            key("queues", Kind::Number(1, 16), "request queues, each with a thread", Without::Words("one for each processor")),
        ],
        rules: &[Rule::Needs("limit-ops-burst", "limit-ops"), Rule::Needs("limit-bytes-burst", "limit-bytes")],
    },
    Table {
        name: "rng",
        named: true,
        about: "Served by [outboard-rng](rng.md). The table may be empty.",
        notes: "",
        keys: &[
            key("max-bytes", Kind::Number(1, u32::MAX), "most bytes in each period", Without::Words("no limit")),
            key("period", Kind::Number(1, u32::MAX), "in milliseconds", Without::Default("1000")),
        ],
        rules: &[Rule::Needs("period", "max-bytes")],
    },
    Table {
        name: "console",
        named: true,
        about: "Served by [outboard-console](console.md). The first console is `hvc0` in the guest.",
        notes: "`\"terminal\"` is the one `outboard run` was started on, for one console at most. `\"attach\"` is \
                whatever terminal `outboard console` is called on, for one console at most; what the guest writes \
                meanwhile is kept. `outboard run` prints the path of a `\"pty\"` on standard output, again when the \
                console's process was started again.",
        keys: &[
            key(
                "output",
                Kind::Choice(&["terminal", "attach", "pty", "file", "socket"]),
                "where it leads",
                Without::Default("\"terminal\""),
            ),
            key("path", Kind::Path, "of the file or the socket", Without::Words("")),
        ],
        rules: &[Rule::Only { key: "output", words: &["file", "socket"], other: "path" }],
    },
    Table {
        name: "device",
        named: true,
        about: "Somebody else's backend. It must listen already when the machine starts. It is not started and not \
                confined by us.",
        notes: "The backend must offer virtio 1 (`VIRTIO_F_VERSION_1`) and accept guest memory in a sealed memfd. If it \
                keeps no in-flight log (`INFLIGHT_SHMFD`), its successor begins at the ring's used index: what it had \
                in hand when it died may be lost or done twice.\n\nAn `fs` backend that keeps no configuration space, \
                as virtiofsd without a tag, gets the device's name as its tag: `mount -t virtiofs share /mnt`.",
        keys: &[
            key("socket", Kind::Path, "the unix socket it listens on", REQUIRED),
            key("class", Kind::Choice(&CLASSES), "what the guest sees", Without::Words("")),
            key("id", Kind::Number(1, 63), "instead of `class`: any other virtio device id", Without::Words("")),
            key("queues", Kind::Number(1, 256), "how many to use", Without::Words("what is usual for the class")),
        ],
        rules: &[Rule::OneOf("class", "id"), Rule::Needs("id", "queues")],
    },
];

impl Table {
    /// The key of that name.
    #[must_use]
    pub fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// Its heading in a file.
    #[must_use]
    pub fn heading(&self, name: &str) -> String {
        if self.named { format!("[{}.{name}]", self.name) } else { format!("[{}]", self.name) }
    }
}

impl Kind {
    /// After "must be".
    #[must_use]
    pub fn words(&self) -> String {
        let quoted = |words: &[&str]| words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
        match self {
            Self::Path => "a path".to_owned(),
            Self::Text(None) => "text".to_owned(),
            Self::Text(Some(most)) => format!("text of at most {most} bytes"),
            Self::Name => "a name".to_owned(),
            Self::Size => "a size such as \"512M\"".to_owned(),
            Self::Bool => "true or false".to_owned(),
            Self::Number(least, u32::MAX) => format!("a number from {least}"),
            Self::Number(least, most) => format!("a number from {least} to {most}"),
            Self::Choice([one]) => format!("\"{one}\""),
            Self::Choice(words) => format!("one of {}", quoted(words)),
            Self::Chain(_) => "a list of images".to_owned(),
            Self::ChoiceOrPath(words) => format!("{} or a path", quoted(words)),
        }
    }
}

#[cfg(test)]
mod tests;
