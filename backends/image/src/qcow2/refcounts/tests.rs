//! Refcounts of every width.

use super::*;

#[test]
fn every_width_keeps_its_neighbours() {
    for order in 0..=6 {
        let mut piece = [0; 64];
        let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
        write(&mut piece, order, 3, most);
        assert_eq!((2..5).map(|number| read(&piece, order, number)).collect::<Vec<_>>(), [0, most, 0], "order {order}");
        write(&mut piece, order, 4, 1);
        write(&mut piece, order, 3, 0);
        assert_eq!((2..5).map(|number| read(&piece, order, number)).collect::<Vec<_>>(), [0, 0, 1], "order {order}");
        // Beyond the end there is nothing, and nothing happens.
        write(&mut piece, order, u64::MAX, 1);
        assert_eq!(read(&piece, order, u64::MAX), 0);
    }
}

#[test]
fn below_a_byte_the_first_is_lowest_and_above_the_highest_byte_is_first() {
    let mut piece = [0; 8];
    write(&mut piece, 1, 1, 3);
    write(&mut piece, 4, 1, 0x1234);
    assert_eq!(piece[..4], [0b1100, 0, 0x12, 0x34]);
}
