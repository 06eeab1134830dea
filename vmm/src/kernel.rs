//! The kernel and the initrd: what kind of file this is, whether it fits, and how it gets into guest memory.
//!
//! Two kinds of kernel are known: a bzImage, entered by Linux's 64-bit boot protocol, and an ELF vmlinux with a PVH
//! note. [`Images::open`] reads the headers once and turns them into a checked `Plan`; [`Images::load`] carries
//! the plan out, at start and again at every reset. The files stay open, so that a reset needs no path.
//!
//! The headers are parsed here and not by a library because a person who passes a wrong file deserves to be told which
//! of four things is wrong: not a kernel, cut short, no entry we can use, or too little memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::{io, mem};

use thiserror::Error;

use crate::memory::{self, Memory};

const PAGE: u64 = 4096;
/// Kernels are loaded from 1 MiB on; what is below belongs to [`crate::boot`].
const HIGH_MEMORY: u64 = 1 << 20;
/// Sector size of the real-mode part of a bzImage.
const SECTOR: u64 = 512;
/// Enough for an ELF header and the longest setup header of a bzImage.
const HEAD: usize = 1024;
/// More segments or a bigger note section than any kernel has; they bound what a hostile file makes us read.
const MAX_SEGMENTS: u16 = 64;
const MAX_NOTES: u64 = 64 << 10;
/// What Linux accepts on x86 when the image does not say (`COMMAND_LINE_SIZE` - 1).
const DEFAULT_CMDLINE: u32 = 2047;

/// Why a kernel or initrd cannot be used. Each variant is one sentence about one file.
#[derive(Debug, Error)]
pub enum Error {
    /// The file could not be opened or read.
    #[error("Cannot open {what} {path}", path = .path.display())]
    Open {
        /// "kernel" or "initrd".
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither of the two kinds.
    #[error("Kernel {path} is neither a bzImage nor an ELF vmlinux", path = .path.display())]
    Unknown {
        /// As given.
        path: PathBuf,
    },
    /// The right kind, but cannot be entered.
    #[error("Kernel {path} cannot be started: {reason}", path = .path.display())]
    Unusable {
        /// As given.
        path: PathBuf,
        /// What is missing.
        reason: &'static str,
    },
    /// The headers promise more than the file has.
    #[error("Kernel {path} is cut short: its headers describe {needed} bytes and the file has {len}", path = .path.display())]
    Truncated {
        /// As given.
        path: PathBuf,
        /// Described by the headers.
        needed: u64,
        /// Size of the file.
        len: u64,
    },
    /// An initrd without a byte.
    #[error("Initrd {path} is empty", path = .path.display())]
    Empty {
        /// As given.
        path: PathBuf,
    },
    /// They do not fit.
    #[error("Guest memory of {} MiB is too small: the kernel needs {} MiB and the initrd {} MiB", .have >> 20, mib(*.kernel), mib(*.initrd))]
    Memory {
        /// Guest memory.
        have: u64,
        /// Bytes up to the end of the kernel.
        kernel: u64,
        /// Bytes of the initrd.
        initrd: u64,
    },
    /// The command line does not fit.
    #[error("The kernel command line has {len} bytes and this kernel takes {max}")]
    Cmdline {
        /// Bytes given.
        len: usize,
        /// Bytes taken.
        max: u32,
    },
    /// Reading into guest memory failed.
    #[error("Cannot load {what} {path}", path = .path.display())]
    Load {
        /// "kernel" or "initrd".
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: memory::Error,
    },
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// How the first processor enters the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit Linux boot protocol: this setup header goes back into the zero page.
    Linux64 {
        /// The bytes of the image from 0x1f1 on.
        header: Vec<u8>,
    },
    /// 32-bit PVH entry.
    Pvh,
}

/// One piece of the file and its place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    len: u64,
    addr: u64,
}

/// What has to be done to load the kernel: checked against the file, not yet against memory.
#[derive(Clone, Debug)]
struct Plan {
    segments: Vec<Segment>,
    entry: u64,
    /// The first byte of memory the kernel does not need while it starts.
    end: u64,
    /// The initrd may not reach beyond this.
    initrd_limit: u64,
    cmdline_max: u32,
    protocol: Protocol,
}

/// Where things lie after loading; `boot` tells the kernel.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Guest physical address of the entry.
    pub entry: u64,
    /// How to enter.
    pub protocol: Protocol,
    /// Address and size of the initrd.
    pub initrd: Option<(u64, u64)>,
}

/// The open images.
#[derive(Debug)]
pub struct Images {
    kernel: (PathBuf, File),
    initrd: Option<(PathBuf, File, u64)>,
    plan: Plan,
}

impl Images {
    /// Opens and checks both files, and that the command line fits.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, Error> {
        let (file, len) = open("kernel", kernel)?;
        let plan = Plan::read(kernel, &file, len)?;
        if cmdline.len() > plan.cmdline_max as usize {
            return Err(Error::Cmdline { len: cmdline.len(), max: plan.cmdline_max });
        }
        let initrd = match initrd {
            None => None,
            Some(path) => {
                let (file, len) = open("initrd", path)?;
                if len == 0 {
                    return Err(Error::Empty { path: path.into() });
                }
                Some((path.into(), file, len))
            }
        };
        Ok(Self { kernel: (kernel.into(), file), initrd, plan })
    }

    /// Where the initrd goes, or the sentence that says why nothing fits. Needs no memory yet, so that the mistake is
    /// reported before anything is started.
    pub fn place(&self, ram: u64) -> Result<Option<(u64, u64)>, Error> {
        let low_end = ram.min(memory::LOW_RAM_END);
        let size = self.initrd.as_ref().map_or(0, |i| i.2);
        let too_small = || Error::Memory { have: ram, kernel: self.plan.end, initrd: size };
        if self.plan.end > low_end {
            return Err(too_small());
        }
        if self.initrd.is_none() {
            return Ok(None);
        }
        // As high as possible: the kernel unpacks upwards from its own end.
        let top = low_end.min(self.plan.initrd_limit);
        let at = top.checked_sub(size).ok_or_else(too_small)? & !(PAGE - 1);
        if at < self.plan.end { Err(too_small()) } else { Ok(Some((at, size))) }
    }

    /// Puts kernel and initrd into guest memory.
    pub fn load(&self, memory: &Memory) -> Result<Loaded, Error> {
        let initrd = self.place(memory.size())?;
        let failed = |what, path: &Path| {
            let path = path.into();
            move |source| Error::Load { what, path, source }
        };
        let (path, file) = &self.kernel;
        for segment in &self.plan.segments {
            memory.read_file(segment.addr, file, segment.offset, segment.len).map_err(failed("kernel", path))?;
        }
        if let (Some((addr, size)), Some((path, file, _))) = (initrd, &self.initrd) {
            memory.read_file(addr, file, 0, size).map_err(failed("initrd", path))?;
        }
        Ok(Loaded { entry: self.plan.entry, protocol: self.plan.protocol.clone(), initrd })
    }
}

fn open(what: &'static str, path: &Path) -> Result<(File, u64), Error> {
    let failed = |source| Error::Open { what, path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    Ok((file, meta.len()))
}

/// Bytes of a header, read without a panic: outside of it everything is zero.
struct Header<'a>(&'a [u8]);

impl Header<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let slice = at.checked_add(N).and_then(|end| self.0.get(at..end));
        slice.and_then(|s| s.try_into().ok()).unwrap_or([0; N])
    }
    fn u8(&self, at: usize) -> u8 {
        self.bytes::<1>(at)[0]
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

impl Plan {
    fn read(path: &Path, file: &File, len: u64) -> Result<Self, Error> {
        let mut head = [0u8; HEAD];
        let have = read_up_to(file, &mut head, 0).map_err(|source| Error::Open { what: "kernel", path: path.into(), source })?;
        let head = Header(head.get(..have).unwrap_or_default());
        let context = Context { path, file, len };
        if head.bytes(0) == *b"\x7fELF" {
            Self::elf(&context, &head)
        } else if head.bytes(0x202) == *b"HdrS" {
            Self::bzimage(&context, &head)
        } else {
            Err(Error::Unknown { path: path.into() })
        }
    }

    /// Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
    fn bzimage(context: &Context<'_>, head: &Header<'_>) -> Result<Self, Error> {
        const LOADED_HIGH: u8 = 1;
        const XLF_KERNEL_64: u16 = 1;
        if head.u16(0x206) < 0x020c || head.u8(0x211) & LOADED_HIGH == 0 || head.u16(0x236) & XLF_KERNEL_64 == 0 {
            return Err(context.unusable("it has no 64-bit entry (it is a 32-bit kernel, or older than Linux 3.8)"));
        }
        let sectors = match head.u8(0x1f1) {
            0 => 4,
            n => u64::from(n),
        };
        let setup = (sectors + 1) * SECTOR;
        let body = u64::from(head.u32(0x1f4)) * 16;
        context.has(setup.saturating_add(body))?;
        // The preferred address saves the kernel from moving itself there.
        let addr = match (head.u8(0x234), head.u64(0x258)) {
            (0, _) => HIGH_MEMORY,
            (_, preferred) if (HIGH_MEMORY..memory::LOW_RAM_END).contains(&preferred) => preferred,
            _ => HIGH_MEMORY,
        };
        let end = addr.saturating_add(u64::from(head.u32(0x260)).max(body));
        // The header ends where the short jump at 0x200 leads.
        let header_end = 0x202usize.saturating_add(usize::from(head.u8(0x201))).min(0x290);
        let header = head.0.get(0x1f1..header_end).unwrap_or_default().to_vec();
        Ok(Self {
            segments: vec![Segment { offset: setup, len: body, addr }],
            entry: addr + 0x200,
            end,
            initrd_limit: u64::from(head.u32(0x22c)).saturating_add(1),
            cmdline_max: head.u32(0x238),
            protocol: Protocol::Linux64 { header },
        })
    }

    fn elf(context: &Context<'_>, head: &Header<'_>) -> Result<Self, Error> {
        const ELFCLASS64: u8 = 2;
        const LITTLE_ENDIAN: u8 = 1;
        const EM_X86_64: u16 = 62;
        const PROGRAM_HEADER: u64 = 56;
        if head.u8(4) != ELFCLASS64 || head.u8(5) != LITTLE_ENDIAN || head.u16(18) != EM_X86_64 {
            return Err(context.unusable("it is an ELF file, but not for x86_64"));
        }
        let (table, size, count) = (head.u64(32), u64::from(head.u16(54)), head.u16(56));
        if size != PROGRAM_HEADER || count == 0 || count > MAX_SEGMENTS {
            return Err(context.unusable("its ELF program headers make no sense"));
        }
        let bytes = context.read(table, PROGRAM_HEADER * u64::from(count))?;
        let (mut segments, mut entry, mut end) = (Vec::new(), None, 0);
        for header in bytes.chunks_exact(usize::from(head.u16(54))).map(Header) {
            const PT_LOAD: u32 = 1;
            const PT_NOTE: u32 = 4;
            let (offset, addr, len, memory) = (header.u64(8), header.u64(24), header.u64(32), header.u64(40));
            match header.u32(0) {
                PT_LOAD if memory > 0 => {
                    if addr < HIGH_MEMORY || len > memory {
                        return Err(context.unusable("it wants to be loaded below 1 MiB"));
                    }
                    context.has(offset.saturating_add(len))?;
                    end = end.max(addr.saturating_add(memory));
                    segments.push(Segment { offset, len, addr });
                }
                PT_NOTE if len <= MAX_NOTES => entry = entry.or(pvh_entry(&context.read(offset, len)?)),
                _ => {}
            }
        }
        let Some(entry) = entry else {
            return Err(context.unusable("it is an ELF file without a PVH note (CONFIG_PVH)"));
        };
        if segments.is_empty() {
            return Err(context.unusable("it has nothing to load"));
        }
        Ok(Self {
            segments,
            entry: u64::from(entry),
            end,
            initrd_limit: memory::LOW_RAM_END,
            cmdline_max: DEFAULT_CMDLINE,
            protocol: Protocol::Pvh,
        })
    }
}

struct Context<'a> {
    path: &'a Path,
    file: &'a File,
    len: u64,
}

impl Context<'_> {
    fn unusable(&self, reason: &'static str) -> Error {
        Error::Unusable { path: self.path.into(), reason }
    }

    fn has(&self, needed: u64) -> Result<(), Error> {
        if needed <= self.len {
            return Ok(());
        }
        Err(Error::Truncated { path: self.path.into(), needed, len: self.len })
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        self.has(offset.saturating_add(len))?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.file.read_exact_at(&mut bytes, offset).map_err(|source| Error::Open {
            what: "kernel",
            path: self.path.into(),
            source,
        })?;
        Ok(bytes)
    }
}

fn read_up_to(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64))? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// The note of type `XEN_ELFNOTE_PHYS32_ENTRY`.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    const PHYS32_ENTRY: u32 = 18;
    const HEADER: usize = 3 * mem::size_of::<u32>();
    let mut rest = notes;
    loop {
        let header = Header(rest.get(..HEADER)?);
        let (name_len, desc_len) = (header.u32(0) as usize, header.u32(4) as usize);
        let name = rest.get(HEADER..HEADER.checked_add(name_len)?)?;
        let desc_at = HEADER.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc = rest.get(desc_at..desc_at.checked_add(desc_len)?)?;
        if header.u32(8) == PHYS32_ENTRY && name == b"Xen\0" {
            return Some(Header(desc.get(..4)?).u32(0));
        }
        rest = rest.get(desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?..)?;
    }
}

#[cfg(test)]
mod tests;
