//! The program `outboard`; see the library for what it does and why.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    outboard::main()
}
