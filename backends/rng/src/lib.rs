//! The rng process.
