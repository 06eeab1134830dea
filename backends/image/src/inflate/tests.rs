//! Bytes that claim to be compressed.

use super::*;

#[test]
fn a_stream_that_ends_early_or_is_none_is_an_error() {
    // One stored block of three bytes.
    let stored = [1, 3, 0, 0xfc, 0xff, b'a', b'b', b'c', 0xee, 0xee];
    let mut three = [0; 3];
    inflate(Method::Deflate, &stored, &mut three).unwrap();
    assert_eq!(&three, b"abc");
    assert!(inflate(Method::Deflate, &stored, &mut [0; 4]).is_err());
    for noise in [&[][..], &[0xff; 64], &[0; 64]] {
        assert!(inflate(Method::Deflate, noise, &mut [0; 512]).is_err());
        assert!(inflate(Method::Zstd, noise, &mut [0; 512]).is_err());
    }
}

#[test]
fn a_zstd_window_is_bounded() {
    let magic = [0x28, 0xb5, 0x2f, 0xfd];
    let frame = |rest: &[u8]| [&magic[..], rest].concat();
    assert_eq!(window(&frame(&[0, 0x58])), Some(2 << 20));
    assert_eq!(window(&frame(&[0, 0xff])), Some((1 << 41) / 8 * 15));
    assert_eq!(window(&frame(&[0x20, 200])), Some(200));
    assert_eq!(window(&frame(&[0x60, 0, 1])), Some(512));
    assert_eq!(window(&frame(&[0xe0, 1, 2])), None);
    assert_eq!(window(&[]), None);
    assert!(inflate(Method::Zstd, &frame(&[0, 0xff, 0, 0]), &mut [0; 512]).is_err());
}
