//! See `fuzz::targets`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::run("state_virtiofsd", data));
