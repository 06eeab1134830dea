//! The probe process.
