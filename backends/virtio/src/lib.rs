//! RINGS placeholder
/// m
pub mod memory {
    /// e
    #[derive(Debug, thiserror::Error)]
    #[error("x")]
    pub struct Error;
}
