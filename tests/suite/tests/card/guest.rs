//! A real guest erases securely: Linux's own driver believes what the disk offers, and what it asks for reaches the card.

use std::path::PathBuf;

use suite::card::Card;
use suite::card::emmc::{Emmc, Erasure, GROUP};

use super::machine::Plan;

#[test]
fn what_linux_erases_in_a_guest_the_card_erases() {
    let modules: PathBuf = std::env::var_os("OUTBOARD_CARD").expect("the kernel's modules").into();
    let card = Card::insert(&modules, 0, Emmc::new());
    // One group of three is erased; what is left of each is counted.
    let command = format!(
        "set -e; head -c {all} /dev/zero | tr '\\0' x | dd of=/dev/vdb bs={GROUP} iflag=fullblock oflag=direct status=none; \
         echo offered-$(cut -c17 /sys/block/vdb/device/features); blkdiscard -s -o {GROUP} -l {GROUP} /dev/vdb; \
         for i in 0 1 2; do echo left-$i-$(dd if=/dev/vdb bs={GROUP} skip=$i count=1 iflag=direct status=none | tr -d '\\0' | wc -c); done",
        all = 3 * GROUP,
    );
    let ended = Plan::run(&command).section(&format!("[disk.c-card]\npath = \"{}\"\n", card.disk.display())).finish().passed();
    assert_eq!(card.erasures(), [Erasure { start: GROUP, end: 2 * GROUP, secure: true }], "{}", ended.tell());
    for line in ["offered-1".to_owned(), format!("left-0-{GROUP}"), "left-1-0".to_owned(), format!("left-2-{GROUP}")] {
        assert!(ended.console.contains(&line), "{line}: {}", ended.tell());
    }
}
