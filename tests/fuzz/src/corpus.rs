//! Kept inputs: all of one target in one file, because thousands of tiny files are a burden to everybody who has the tree.
//!
//! The format: for each input its length (four bytes, little endian), then its bytes.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// The packed inputs of a target, in the folder of this crate.
pub fn packed(folder: &Path, target: &str) -> PathBuf {
    folder.join("corpus").join(format!("{target}.bin"))
}

/// The inputs in a packed file; none, if it is not there.
///
/// # Errors
/// The system's, and a file that is cut short.
pub fn read(path: &Path) -> io::Result<Vec<Vec<u8>>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let short = || io::Error::other("A packed corpus is cut short");
    let mut rest = bytes.as_slice();
    let mut inputs = Vec::new();
    while !rest.is_empty() {
        let (len, after) = rest.split_first_chunk::<4>().ok_or_else(short)?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(io::Error::other)?;
        inputs.push(after.get(..len).ok_or_else(short)?.to_vec());
        rest = &after[len..];
    }
    Ok(inputs)
}

/// Packs inputs, the shortest first.
///
/// # Errors
/// The system's.
pub fn write(path: &Path, mut inputs: Vec<Vec<u8>>) -> io::Result<()> {
    inputs.sort_by_key(|input| (input.len(), input.clone()));
    inputs.dedup();
    let mut bytes = Vec::new();
    for input in inputs {
        let len = u32::try_from(input.len()).map_err(io::Error::other)?;
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&input);
    }
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    fs::write(path, bytes)
}
