//! Names, by which a guest could reach where it may not.

use std::ffi::CStr;

use super::message::{Wrong, invalid};
use super::{MAX_TARGET, Name};
use crate::abi::errno::{EINVAL, ENAMETOOLONG, ENOENT, ERANGE};

/// Longest name in a directory, and of an extended attribute, in bytes without the zero at its end (`NAME_MAX`, `XATTR_NAME_MAX`).
pub const MAX_NAME: usize = 255;

/// A name in a directory, and what follows it.
pub(super) fn name(bytes: &[u8]) -> Result<(Name<'_>, &[u8]), Wrong> {
    let (text, rest) = text(bytes, MAX_NAME, ENAMETOOLONG)?;
    Ok((checked(text)?, rest))
}

/// The rules of a name. `.` and `..` are none: a guest that may look them up (`FUSE_EXPORT_SUPPORT`) was offered that, and it is not.
pub(super) fn checked(text: &CStr) -> Result<Name<'_>, Wrong> {
    let bytes = text.to_bytes();
    if bytes.len() > MAX_NAME {
        return Err(Wrong { errno: ENAMETOOLONG, why: "a name of more than 255 bytes" });
    }
    match bytes {
        b"" => invalid("an empty name"),
        b"." | b".." => invalid("a name that is `.` or `..`"),
        _ if bytes.contains(&b'/') => invalid("a name with a slash"),
        _ => Ok(Name(text)),
    }
}

/// Where a symbolic link leads, which is nobody's business but the guest's, and what follows it.
pub(super) fn target(bytes: &[u8]) -> Result<(&CStr, &[u8]), Wrong> {
    let (text, rest) = text(bytes, MAX_TARGET, ENAMETOOLONG)?;
    if text.is_empty() {
        return Err(Wrong { errno: ENOENT, why: "a symbolic link to nothing" });
    }
    Ok((text, rest))
}

/// The name of an extended attribute, and what follows it. Any bytes will do.
pub(super) fn attribute(bytes: &[u8]) -> Result<(&CStr, &[u8]), Wrong> {
    let (text, rest) = text(bytes, MAX_NAME, ERANGE)?;
    if text.is_empty() {
        return invalid("an attribute without a name");
    }
    Ok((text, rest))
}

/// At most `most` bytes and the zero behind them. Of what has no end, no more is looked at than that.
fn text(bytes: &[u8], most: usize, too_long: i32) -> Result<(&CStr, &[u8]), Wrong> {
    let window = bytes.get(..=most).unwrap_or(bytes);
    let Ok(text) = CStr::from_bytes_until_nul(window) else {
        let long = window.len() > most;
        let errno = if long { too_long } else { EINVAL };
        return Err(Wrong { errno, why: if long { "a name that is too long" } else { "a name without an end" } });
    };
    let rest = bytes.get(text.to_bytes_with_nul().len()..).unwrap_or_default();
    Ok((text, rest))
}
