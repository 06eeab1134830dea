//! See `fuzz::targets::request_console`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::run("request_console", data));
