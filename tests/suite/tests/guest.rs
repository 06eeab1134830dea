//! Whole machines with real guests: Debian's stock kernel and userland under our VMM, composed by `outboard`.
//!
//! `cargo xtask test` runs this where KVM works: on the host, or inside the nested machine. Every test boots at least one guest.
//! Started by hand where KVM does not work, every test fails and says so; none is skipped.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guest {
    mod backends;
    mod boot;
    mod calls;
    mod disks;
    mod escapes;
    mod kills;
    mod life;
    mod machine;
    mod outside;
    mod shares;
    mod uml;
    mod view;
    mod virtiofsd;
}
