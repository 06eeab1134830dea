//! The outboard process.
