//! What can go wrong, as sentences.

use std::io;

/// What every call of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// An error is a sentence with what, on what, and why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else is at these bytes, and the caller holds claims or ranges itself: it has to commit and let go, and try again.
    #[error("Somebody else is at these bytes of the image")]
    Busy,
    /// The system's.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// The image cannot be used as it was asked to.
    #[error("{0}")]
    Refused(String),
    /// The image contradicts itself.
    #[error("The image is corrupt: {0}")]
    Corrupt(String),
    /// The caller asks for what is outside of the image.
    #[error("The range is outside of the image")]
    Range,
    /// The image was opened for reading.
    #[error("The image is read-only")]
    ReadOnly,
}

impl Error {
    pub(crate) fn refused<T>(why: impl Into<String>) -> Result<T> {
        Err(Error::Refused(why.into()))
    }

    pub(crate) fn corrupt<T>(why: impl Into<String>) -> Result<T> {
        Err(Error::Corrupt(why.into()))
    }

    /// For what was tried on a file.
    pub(crate) fn io(tried: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::Io(tried, error)
    }
}
