//! What may follow a message that makes something: the supplementary group that the parent belongs to, if it is one of the caller's
//! (`FUSE_CREATE_SUPP_GROUP`). Linux sends that one or none, never a list, so a list is refused; security contexts are refused because
//! they were not offered. Behind messages that make nothing no extension is looked for: their field in the header was padding once.

use super::message::{Wrong, invalid};
use crate::abi::extension::{GROUPS, HEADER, MAX_SECURITY_CONTEXT, UNIT};

/// The group in the extensions of a message.
pub(super) fn group(mut bytes: &[u8]) -> Result<Option<u32>, Wrong> {
    let mut groups = None;
    while !bytes.is_empty() {
        let Some(([s0, s1, s2, s3, k0, k1, k2, k3], _)) = bytes.split_first_chunk() else {
            return invalid("an extension that is cut short");
        };
        let size = u32::from_le_bytes([*s0, *s1, *s2, *s3]);
        let whole = usize::try_from(size).ok().filter(|_| size >= HEADER && size.is_multiple_of(UNIT));
        let Some((this, rest)) = whole.and_then(|size| bytes.split_at_checked(size)) else {
            return invalid("an extension with a wrong size");
        };
        match u32::from_le_bytes([*k0, *k1, *k2, *k3]) {
            GROUPS if groups.is_none() => groups = Some(one(this)?),
            GROUPS => return invalid("two lists of groups"),
            0..=MAX_SECURITY_CONTEXT => return invalid("a security context, which was not agreed on"),
            _ => return invalid("an unknown extension"),
        }
        bytes = rest;
    }
    Ok(groups.flatten())
}

/// The group in one extension, its header included.
fn one(bytes: &[u8]) -> Result<Option<u32>, Wrong> {
    let Some((_, content)) = bytes.split_first_chunk::<8>() else { return invalid("an extension that is cut short") };
    let Some((count, groups)) = content.split_first_chunk() else { return invalid("groups without their number") };
    match (u32::from_le_bytes(*count), groups.first_chunk()) {
        (0, _) => Ok(None),
        (1, Some(group)) => match u32::from_le_bytes(*group) {
            u32::MAX => invalid("a group that is none"),
            group => Ok(Some(group)),
        },
        (1, None) => invalid("fewer groups than there are said to be"),
        _ => invalid("more than one group"),
    }
}
