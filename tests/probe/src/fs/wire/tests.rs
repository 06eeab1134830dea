//! Answers that are none, and how long they may be.

use super::{DESTROY, IN_HEADER, INTERRUPT, Request, Settled, WRITE, bare, check, error, init, narrow_answer, narrow_request};

fn asked(opcode: u32, body: &[u32]) -> Request {
    let bytes = super::request(opcode, 8, &body.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
    Request::read(&bytes).unwrap()
}

fn answer(len: u32, error: i32, unique: u64, data: usize) -> Vec<u8> {
    [&len.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes(), &vec![7; data]].concat()
}

#[test]
fn the_room_for_an_answer() {
    let read = [0, 0, 0, 0, 131_072];
    for opcode in [15, 28, 44] {
        assert_eq!(asked(opcode, &read).room, Some(131_072), "{opcode}");
    }
    assert_eq!(asked(22, &[256]).room, Some(256));
    assert_eq!(asked(23, &[0]).room, Some(8));
    assert_eq!(asked(39, &[0, 0, 0, 0, 0, 0, 4, 512]).room, Some(528));
    assert_eq!(asked(39, &[0, 0, 0, 0, 0, 0, 4, u32::MAX]).room, Some(u32::MAX));
    assert_eq!(asked(5, &[]).room, Some(4096));
    assert_eq!(asked(WRITE, &[0; 10]).room, Some(8));
    assert_eq!(asked(999, &[]).room, Some(4096));
    for opcode in [2, 41, 42] {
        assert_eq!(asked(opcode, &[]).room, None, "{opcode}");
    }
    assert!(asked(2, &[]).is_urgent() && asked(42, &[]).is_urgent() && asked(INTERRUPT, &[]).is_urgent());
    assert!(!asked(18, &[]).is_urgent());
    assert_eq!(Request::read(&[0; 39]), None);
}

#[test]
fn answers_that_are_right() {
    let read = asked(15, &[0, 0, 0, 0, 100]);
    for data in [0, 1, 100] {
        let len = 16 + u32::try_from(data).unwrap();
        let bytes = answer(len, 0, 8, data);
        assert_eq!(check(&read, len, 116, bytes.clone()).unwrap(), bytes);
    }
    assert_eq!(error(&check(&read, 16, 116, answer(16, -2, 8, 0)).unwrap()), 2);
    assert!(check(&asked(2, &[]), 0, 0, Vec::new()).unwrap().is_empty());
    for opcode in [INTERRUPT, DESTROY] {
        assert!(check(&asked(opcode, &[]), 0, 16, Vec::new()).unwrap().is_empty());
    }
}

#[test]
fn answers_that_are_lies() {
    let read = asked(15, &[0, 0, 0, 0, 100]);
    let say = |used: u32, bytes: Vec<u8>| check(&read, used, 116, bytes).unwrap_err().to_string();
    assert_eq!(say(117, answer(117, 0, 8, 100)), "The server says it wrote 117 bytes in answer to READ, and 116 were offered");
    assert_eq!(say(0, Vec::new()), "The server answered READ with 0 bytes: that is less than a header");
    assert_eq!(say(15, vec![0; 15]), "The server answered READ with 15 bytes: that is less than a header");
    assert_eq!(
        say(20, answer(24, 0, 8, 4)),
        "The server says it wrote 20 bytes in answer to READ, and in them that there are 24"
    );
    assert_eq!(say(16, answer(16, 0, 9, 0)), "The server answered READ number 8 with an answer to number 9");
    assert_eq!(say(16, answer(16, 5, 8, 0)), "The server answered READ with an error that is none (0x5)");
    assert_eq!(say(16, answer(16, -512, 8, 0)), "The server answered READ with an error that is none (0xfffffe00)");
    assert_eq!(say(17, answer(17, -5, 8, 1)), "The server answered READ with error 5 and with 1 bytes of data");
    let forget = check(&asked(2, &[]), 16, 0, Vec::new()).unwrap_err().to_string();
    assert_eq!(forget, "The server says it wrote 16 bytes in answer to FORGET, which has no answer");
}

#[test]
fn what_is_settled_fits_into_a_slot() {
    let mut request = init(2);
    assert_eq!(request.len(), 104);
    assert_eq!(Request::read(&request).unwrap().room, Some(64));
    super::put(&mut request, 56, &u32::MAX.to_le_bytes());
    narrow_request(&mut request);
    assert_eq!(super::word(&request, 56), Some(!0x220u32));
    let words = [7, 38, 131_072, 1 << 30 | 1 << 22, u32::from(u16::MAX), 16 << 20, 1, 4096, u32::MAX];
    let mut bytes = [&answer(80, 0, 2, 0)[..], &words.map(u32::to_le_bytes).concat(), &[0; 28]].concat();
    narrow_answer(&mut bytes);
    let settled = Settled::read(&bytes);
    assert_eq!((settled.max_write, settled.max_pages, settled.time_gran), (1 << 20, 256, 1));
    assert_eq!((settled.major, settled.minor, settled.max_background), (7, 38, u16::MAX));
    assert_eq!(settled.flags, 1 << 30 | 1 << 22 | u64::from(!0x220u32) << 32);
    // A server from long ago says less.
    let mut short: Vec<u8> = bytes.iter().copied().take(40).collect();
    narrow_answer(&mut short);
    assert_eq!((Settled::read(&short).max_write, Settled::read(&short).max_pages), (1 << 20, 0));
    narrow_answer(&mut answer(16, -71, 2, 0));
    assert_eq!(bare(DESTROY, 4).len(), usize::try_from(IN_HEADER).unwrap());
}
