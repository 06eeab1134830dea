//! The blk process.
