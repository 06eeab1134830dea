//! Requests for what only the file system of the host knows: flags of files, and projects.

use std::os::fd::AsFd;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::abi::flag;
use crate::fs::{Io, Outcome, Share};
use crate::reply;
use crate::sys;

/// Flags of a file (`FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS`): eight bytes says the number, four it is.
pub(crate) const GET_FLAGS: u32 = 0x8008_6601;
pub(crate) const SET_FLAGS: u32 = 0x4008_6602;

/// Flags and project of a file (`FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR`).
pub(crate) const GET_MORE: u32 = 0x801c_581f;
pub(crate) const SET_MORE: u32 = 0x401c_5820;

/// Bytes of the longest of these.
const MOST: usize = 28;

/// Whether a command changes the file.
pub(super) fn changes(command: u32) -> bool {
    matches!(command, SET_FLAGS | SET_MORE)
}

impl Share {
    pub(super) fn ioctl(
        &self,
        (node, handle): (u64, u64),
        (flags, command): (u32, u32),
        input: &[u8],
        output: u32,
        io: Io<'_>,
    ) -> Outcome {
        if !matches!(command, GET_FLAGS | SET_FLAGS | GET_MORE | SET_MORE) {
            return Err(Errno::NOTTY);
        }
        let mut buffer = [0; MOST];
        let given = input.get(..input.len().min(MOST)).unwrap_or_default();
        buffer.get_mut(..given.len()).unwrap_or_default().copy_from_slice(given);
        let opened;
        let open;
        let file = match self.file(node, handle) {
            Ok(handle) => {
                open = handle;
                open.file.as_fd()
            }
            Err(_) if flags & flag::IOCTL_DIR != 0 && handle == 0 => {
                opened = self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)?;
                opened.as_fd()
            }
            Err(errno) => return Err(errno),
        };
        let result = sys::ioctl(file, command, &mut buffer)?;
        let told = if changes(command) { 0 } else { usize::try_from(output).unwrap_or_default().min(MOST) };
        let mut answer = [0; 16 + MOST];
        let (first, second) = answer.split_at_mut(16);
        first.copy_from_slice(&reply::ioctl(result.cast_signed(), 0));
        second.copy_from_slice(&buffer);
        io.answer(answer.get(..told.saturating_add(16)).unwrap_or_default())
    }
}
