//! What distinguishes errors: whether the user asked for something that makes no sense.

/// The user's words cannot be carried out: exit status 2. Every other error is exit status 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Ends with a [`Usage`] error.
#[macro_export]
macro_rules! usage {
    ($($text:tt)*) => {
        return Err($crate::error::Usage(format!($($text)*)).into())
    };
}
