//! FUSE messages of a guest, spread over descriptors.
//!
//! An input: a byte of choices, how many bytes of layout follow (one byte), the layout (see `rings::spread`), and the message, the rest.
//! With the choice [`WHOLE`] the length in the header is that of the chain, which a fuzzer would find too seldom.

use virtio::Chain;
use virtiofsd::abi::{self, opcode};
use virtiofsd::request::{self, Bad, Dialect, Fetched, MAX_NAME, MAX_TARGET, Name, Operation, Request, Scratch};
use virtiofsd::state::{State, Writer};

use crate::bytes::Bytes;
use crate::rings;

/// The session has agreed on the longer form of SETXATTR.
const EXT: u8 = 1;
/// The length in the header is made right.
const WHOLE: u8 = 2;
/// The input describes the descriptors as they are, as for other devices.
const RAW: u8 = 4;
/// The session has agreed on labels of new files.
const LABELS: u8 = 8;

const LAST: u64 = i64::MAX as u64;

/// A file system's requests.
pub fn virtiofsd(mut bytes: Bytes<'_>) {
    let choices = bytes.byte();
    let dialect = Dialect { setxattr_ext: choices & EXT != 0, security_ctx: choices & LABELS != 0 };
    let chain = if choices & RAW != 0 { rings::described(&mut bytes) } else { spread(&mut bytes, choices & WHOLE != 0) };
    let Some(chain) = chain else { return };
    let mut scratch = Scratch::new();
    let Ok(fetched) = request::fetch_bytes(&chain, &mut scratch) else {
        assert!(chain.readable().len() < abi::sent::HEADER, "a header is there");
        return;
    };
    let outcome = fetched.parse(dialect);
    let boxed = fetched.boxed();
    assert_eq!(boxed.parse(dialect), outcome, "the copy means the same");
    let mut all = vec![0; fetched.room().readable.min(0x2_0000) as usize];
    chain.readable().copy_to(&mut all);
    assert_eq!(request::parse(&all, fetched.room(), dialect).ok(), outcome.ok(), "nothing is missing that matters");
    if let Ok(request) = &outcome {
        let pairs = request::forgotten(request::data(&chain, &request.operation)).count();
        assert!(pairs as u64 * 16 <= u64::from(chain.readable().len()));
    }
    match outcome {
        Ok(request) => good(&request, &fetched),
        Err(Bad::Unanswerable) => {
            let silent = [opcode::FORGET, opcode::BATCH_FORGET].contains(&opcode_of(fetched.bytes()));
            assert!(silent || chain.writable().len() < abi::answer::HEADER, "it could be answered");
        }
        Err(bad @ Bad::Refused { unique, errno, .. }) => {
            assert_eq!(unique.to_le_bytes(), fetched.bytes()[8..16]);
            assert!((1..=133).contains(&errno), "{bad}");
            assert!(chain.writable().len() >= abi::answer::HEADER);
        }
    }
}

fn spread(bytes: &mut Bytes<'_>, whole: bool) -> Option<Chain> {
    let count = usize::from(bytes.byte());
    let mut layout = Bytes::new(bytes.take(count));
    let mut message = bytes.rest().to_vec();
    let chain = rings::spread(&mut layout.clone(), &message)?;
    if !whole || message.len() < 4 {
        return Some(chain);
    }
    message[..4].copy_from_slice(&chain.readable().len().to_le_bytes());
    rings::spread(&mut layout, &message)
}

fn opcode_of(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[4..8].try_into().expect("a header"))
}

/// What a request promises to whoever executes it.
fn good(request: &Request<'_>, fetched: &Fetched<'_>) {
    let room = fetched.room();
    let for_data = room.writable.saturating_sub(abi::answer::HEADER);
    let sent = room.readable - abi::sent::HEADER;
    match request.operation {
        Operation::Read { offset, size, .. } => assert!(size <= for_data && offset + u64::from(size) <= LAST),
        Operation::ReadDir { size, offset, .. } => assert!(size <= for_data && offset <= LAST),
        Operation::Write { offset, size, .. } => {
            assert!(size <= sent - abi::sent::WRITE && offset + u64::from(size) <= LAST);
        }
        Operation::GetXattr { size, .. } | Operation::ListXattr { size } => {
            assert!(size <= for_data && size <= request::MAX_XATTR && for_data > 0);
        }
        Operation::SetXattr { value, .. } => assert!(value.len() <= 65536),
        Operation::Ioctl { input, output, .. } => assert!(input.len() <= 4096 && output <= 4096 && output + 16 <= for_data),
        Operation::BatchForget { count } => {
            assert!(u64::from(count) * 16 <= u64::from(sent - abi::sent::BATCH_FORGET));
        }
        Operation::FAllocate { offset, length, .. } => assert!(length > 0 && offset + length <= LAST),
        Operation::LSeek { offset, whence, .. } => assert!(offset <= LAST && whence <= abi::seek::HOLE),
        Operation::CopyFileRange { offset, to_offset, length, long, .. } => {
            assert!(offset + length <= LAST && to_offset + length <= LAST);
            assert!(long || u32::try_from(length).is_ok());
        }
        Operation::SetAttr(set) => {
            assert!(set.uid != Some(u32::MAX) && set.gid != Some(u32::MAX));
            assert!(set.mode.is_none_or(|mode| mode <= 0o7777) && set.size.is_none_or(|size| size <= LAST));
            for time in [set.atime, set.mtime] {
                assert!(!matches!(time, Some(request::Time::At(_, 1_000_000_000..))));
            }
        }
        Operation::GetLock { lock, .. } | Operation::SetLock { lock, .. } => {
            assert!(lock.start <= lock.end && lock.start <= LAST);
        }
        _ => names(request),
    }
}

/// Every name is one component; whoever makes something is somebody.
fn names(request: &Request<'_>) {
    let (mut makes, mut seen): (bool, Vec<Name<'_>>) = (false, Vec::new());
    match request.operation {
        Operation::Lookup { name } | Operation::Unlink { name } | Operation::RmDir { name } => seen.push(name),
        Operation::Link { name, .. } => seen.push(name),
        Operation::Rename { name, new_name, flags, .. } => {
            seen.extend([name, new_name]);
            assert!([0, 1, 2, 4, 5].contains(&flags));
        }
        Operation::Symlink { name, target } => {
            (makes, seen) = (true, vec![name]);
            assert!((1..=MAX_TARGET).contains(&target.to_bytes().len()));
        }
        Operation::Create { name, .. } | Operation::MkNod { name, .. } | Operation::MkDir { name, .. } => {
            (makes, seen) = (true, vec![name]);
        }
        Operation::TmpFile { .. } => makes = true,
        _ => {}
    }
    for name in seen {
        let bytes = name.as_c_str().to_bytes();
        assert!((1..=MAX_NAME).contains(&bytes.len()) && bytes != b"." && bytes != b".." && !bytes.contains(&b'/'));
    }
    let somebody = request.uid != u32::MAX && request.gid != u32::MAX && request.group != Some(u32::MAX);
    assert!(!makes || somebody, "nobody makes something");
    assert!(makes || request.group.is_none());
}

/// What a file server is told of a guest that comes from another host. What is accepted is written again as it was.
pub fn state(mut bytes: Bytes<'_>) {
    // Most of the head has to be right.
    let whole = if bytes.byte() == 0 {
        bytes.rest().to_vec()
    } else {
        [&b"outbfs"[..], &virtiofsd::state::VERSION.to_le_bytes(), bytes.rest()].concat()
    };
    let Ok(state) = State::read(&whole) else { return };
    let mut writer = Writer::new(state.agreed);
    for inode in state.inodes() {
        let name = inode.name.as_c_str().to_bytes();
        assert!((1..=255).contains(&name.len()) && !name.contains(&b'/') && !matches!(name, b"." | b".."), "{name:?}");
        writer.inode(&inode);
    }
    writer.end_inodes();
    state.opens().for_each(|open| writer.open(&open));
    assert!(writer.finish() == whole, "all of it was read");
}
