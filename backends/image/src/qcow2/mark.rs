//! The mark that a process is writing to an image: a header extension of ours.
//!
//! Order alone keeps an image consistent, so a process that dies leaves nothing worse than clusters nobody points at: the rest of
//! its reserve. The mark says that there may be some, and the next one that opens the image looks for them. Other programs keep
//! extensions they do not know.
//!
//! The format's own dirty bit would say more than is true: QEMU would check the whole image before it uses it, others would refuse
//! it. Where an image has no room for the mark, it is always taken for in use: then it is checked at each opening.

use crate::error::{Error, Result};
use crate::qcow2::header::{EXTENSION_IN_USE, Header};
use crate::storage::Storage;

/// Bytes the mark needs: its head, its data, and the end marker behind it.
const ROOM: u64 = 24;

/// Says, durably, that the image is in use, or that it is not any more.
pub(crate) fn set(file: &dyn Storage, header: &mut Header, in_use: bool) -> Result<()> {
    if header.mark.is_none() && in_use {
        insert(file, header)?;
    }
    let Some((offset, _)) = header.mark else { return Ok(()) };
    write(file, &[u8::from(in_use), 0, 0, 0, 0, 0, 0, 0], offset)?;
    header.mark = Some((offset, in_use));
    sync(file)
}

/// Clears the features that are only true for as long as nobody writes to the image who does not know them.
pub(crate) fn clear_autoclear(file: &dyn Storage, header: &mut Header, known: u64) -> Result<()> {
    if header.version < 3 || header.autoclear & !known == 0 {
        return Ok(());
    }
    header.autoclear &= known;
    write(file, &header.autoclear.to_be_bytes(), 88)?;
    sync(file)
}

/// Whether somebody may have written to the image and not have closed it: the mark says so, or there is no room for one.
pub(crate) fn is_unclean(header: &Header) -> bool {
    header.mark.map_or_else(|| place(header).is_none(), |(_, in_use)| in_use)
}

/// Where the name of the backing file has to go to make room, if it has to. `None`: there is no room.
fn place(header: &Header) -> Option<Option<u64>> {
    let (at, cluster) = (header.extensions_end, header.geometry.cluster_size());
    let (end, len) = (at.saturating_add(ROOM), header.backing_len);
    if header.backing.is_none() || header.backing_offset >= end {
        return (end <= cluster).then_some(None);
    }
    // The name is right behind the extensions.
    let to = end.max(header.backing_offset.saturating_add(len)).next_multiple_of(8);
    (header.backing_offset >= at && to.saturating_add(len) <= cluster).then_some(Some(to))
}

fn write(file: &dyn Storage, bytes: &[u8], offset: u64) -> Result<()> {
    file.write_at(bytes, offset).map_err(Error::io("Cannot write the header of the image"))
}

fn sync(file: &dyn Storage) -> Result<()> {
    file.sync().map_err(Error::io("Cannot make the header of the image durable"))
}

/// Makes room for the mark behind the other extensions, where the cluster has any. No state in between is a broken header.
fn insert(file: &dyn Storage, header: &mut Header) -> Result<()> {
    let Some(to) = place(header) else { return Ok(()) };
    let at = header.extensions_end;
    if let Some(to) = to {
        // The name is copied further up first, and then pointed to: one word in the first sector.
        let mut bytes = vec![0; usize::try_from(header.backing_len).unwrap_or(0)];
        file.read_exact(&mut bytes, header.backing_offset).map_err(Error::io("Cannot read the header of the image"))?;
        write(file, &bytes, to)?;
        sync(file)?;
        write(file, &to.to_be_bytes(), 8)?;
        sync(file)?;
        header.backing_offset = to;
    }
    // What is behind the old end marker first, then the eight bytes that make it the head of an extension.
    write(file, &[0; 16], at.saturating_add(8))?;
    sync(file)?;
    let [a, b, c, d] = EXTENSION_IN_USE.to_be_bytes();
    write(file, &[a, b, c, d, 0, 0, 0, 8], at)?;
    (header.mark, header.extensions_end) = (Some((at.saturating_add(8), false)), at.saturating_add(16));
    Ok(())
}
