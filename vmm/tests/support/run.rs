//! Running the program, and kernels of a few instructions.

#![allow(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, reason = "a test that cannot run its program has failed")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{process, thread};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_outboard-vmm");
/// Far more than anything here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct Run {
    /// None: it did not end.
    pub(crate) status: Option<i32>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl Run {
    pub(crate) fn of(mut command: Command, input: &[u8]) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(input);
        let read = |mut from: Box<dyn Read + Send>| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = from.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let output = read(Box::new(child.stdout.take().unwrap()));
        let errors = read(Box::new(child.stderr.take().unwrap()));
        let end = Instant::now() + LIMIT;
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None if Instant::now() > end => {
                    child.kill().unwrap();
                    break None;
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        Self { status, output: output.join().unwrap(), errors: errors.join().unwrap() }
    }

    /// What a person sees: the last line.
    pub(crate) fn sentence(&self) -> &str {
        self.errors.lines().last().unwrap_or_default()
    }
}

pub(crate) fn run(args: &[&str]) -> Run {
    let mut command = Command::new(PROGRAM);
    command.args(args);
    Run::of(command, b"")
}

/// Whether /dev/kvm opens here; says so if not.
pub(crate) fn has_kvm() -> bool {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &opened {
        eprintln!("skipped, because /dev/kvm cannot be opened: {e}");
    }
    opened.is_ok()
}

/// A folder that goes away.
pub(crate) struct Dir(PathBuf);

impl Dir {
    pub(crate) fn new(name: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("outboard-vmm-{}-{number}-{name}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where the code of a tiny kernel lies.
pub(crate) const CODE: u32 = 0x10_0000;
/// Zeroes after it.
pub(crate) const ZEROES: u32 = CODE + 0x8_0000;

/// An ELF file with a PVH note whose entry is this 32-bit code.
pub(crate) fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let header = |kind: u32, offset: u64, addr: u64, len: u64, memory: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        for value in [offset, addr, addr, len, memory, 0] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    };
    put(64, &header(1, 4096, CODE.into(), code.len() as u64, 0x10_0000));
    put(120, &header(4, 2048, 0, 20, 20));
    put(2048, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(2060, b"Xen\0");
    put(2064, &CODE.to_le_bytes());
    image.extend(code);
    image
}

/// `out` of a byte.
pub(crate) fn out8(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `out` of a word.
pub(crate) fn out16(port: u16, value: u16) -> Vec<u8> {
    let ([a, b], [c, d]) = (port.to_le_bytes(), value.to_le_bytes());
    vec![0x66, 0xba, a, b, 0x66, 0xb8, c, d, 0x66, 0xef]
}

/// `in` of a byte into AL.
pub(crate) fn in8(port: u16) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xec]
}

/// Waits for ever.
pub(crate) const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// ACPI soft-off.
pub(crate) fn power_off() -> Vec<u8> {
    [out16(0x604, 5 << 10 | 1 << 13), HALT.to_vec()].concat()
}
