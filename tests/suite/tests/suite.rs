//! The device processes, through the probe and from outside.
//!
//! A module a topic; what belongs where is said at its top.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod suite {
    mod attack;
    mod bad_hosts;
    mod bad_input;
    mod calls;
    mod console;
    mod device;
    mod disks;
    mod ephemeral;
    mod escapes;
    mod fs;
    mod hostile;
    mod identities;
    mod kills;
    mod late_writes;
    mod measures;
    mod migration;
    mod nbd;
    mod outside;
    mod pipelines;
    mod protocol;
    mod qemu;
    mod share_attacks;
    mod share_limits;
    mod share_moves;
    mod share_owners;
    mod share_races;
    mod share_sequences;
    mod slow;
    mod stepped;
    mod thrift;
}
