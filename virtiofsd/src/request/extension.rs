//! What may follow a message that makes something: the supplementary group that the parent belongs to, if it is one of the caller's
//! (`FUSE_CREATE_SUPP_GROUP`), and the label of what is made (`FUSE_SECURITY_CTX`). Linux sends one of each or none, never a list, so a list is
//! refused, and a label that was not agreed on. Behind messages that make nothing no extension is looked for: their field in the header was
//! padding once.

use super::message::{Wrong, invalid};
use super::name::attribute;
use super::{Label, MAX_LABEL};
use crate::abi::extension::{GROUPS, HEADER, MAX_SECURITY_CONTEXT, UNIT};

/// What there was.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extensions<'a> {
    pub(super) group: Option<u32>,
    pub(super) label: Option<Label<'a>>,
}

/// The extensions of a message.
pub(super) fn all(mut bytes: &[u8], with_labels: bool) -> Result<Extensions<'_>, Wrong> {
    let (mut groups, mut labels) = (None, None);
    while !bytes.is_empty() {
        let Some(([s0, s1, s2, s3, k0, k1, k2, k3], _)) = bytes.split_first_chunk() else {
            return invalid("an extension that is cut short");
        };
        let size = u32::from_le_bytes([*s0, *s1, *s2, *s3]);
        let whole = usize::try_from(size).ok().filter(|_| size >= HEADER && size.is_multiple_of(UNIT));
        let Some((this, rest)) = whole.and_then(|size| bytes.split_at_checked(size)) else {
            return invalid("an extension with a wrong size");
        };
        let Some((_, content)) = this.split_first_chunk::<8>() else { return invalid("an extension that is cut short") };
        match u32::from_le_bytes([*k0, *k1, *k2, *k3]) {
            GROUPS if groups.is_none() => groups = Some(one(content)?),
            GROUPS => return invalid("two lists of groups"),
            0..=MAX_SECURITY_CONTEXT if !with_labels => return invalid("a security context, which was not agreed on"),
            count @ 0..=MAX_SECURITY_CONTEXT if labels.is_none() => labels = Some(label(count, content)?),
            0..=MAX_SECURITY_CONTEXT => return invalid("two lists of security contexts"),
            _ => return invalid("an unknown extension"),
        }
        bytes = rest;
    }
    Ok(Extensions { group: groups.flatten(), label: labels.flatten() })
}

/// The group in one extension.
fn one(content: &[u8]) -> Result<Option<u32>, Wrong> {
    if content.len() > UNIT as usize {
        return invalid("more than one group");
    }
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

/// The label in one extension: its length and a gap, the name of its attribute, itself, and what is missing to whole units.
fn label(count: u32, content: &[u8]) -> Result<Option<Label<'_>>, Wrong> {
    match count {
        0 if content.is_empty() => return Ok(None),
        1 => {}
        _ => return invalid("security contexts of another number than one"),
    }
    let Some(([l0, l1, l2, l3, _, _, _, _], rest)) = content.split_first_chunk() else {
        return invalid("a security context without its length");
    };
    let len = usize::try_from(u32::from_le_bytes([*l0, *l1, *l2, *l3])).unwrap_or(usize::MAX);
    let (name, rest) = attribute(rest)?;
    match rest.split_at_checked(len) {
        _ if len == 0 || len > MAX_LABEL => invalid("a security context of no bytes, or of more than a page"),
        Some((value, gap)) if gap.len() < UNIT as usize => Ok(Some(Label { name, value })),
        Some(_) => invalid("bytes behind the end of a security context"),
        None => invalid("a security context that is cut short"),
    }
}
