//! The vmm process.
