//! Disk servers on what only some media have: a flash card that erases securely and tells how worn it is, behind the kernel's own
//! drivers ([`suite::card`]).
//!
//! `cargo xtask test` runs this in the nested machine, as root and with the kernel's modules. Started by hand elsewhere, every test
//! fails and says so; none is skipped.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod card {
    mod flash;
    mod guest;
    #[expect(dead_code, reason = "one machine needs little of it")]
    #[path = "../guest/machine.rs"]
    mod machine;
}
