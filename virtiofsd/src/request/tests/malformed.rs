//! What a hostile guest says: names, sizes, extensions.

use super::*;
use crate::abi::errno::{E2BIG, EINVAL, ENAMETOOLONG, ENOENT, ERANGE};

/// Each message with one name or two, around the name that is put into it.
fn around(text: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let put = |front: Vec<u8>, back: &[u8]| [&front, text, back].concat();
    vec![
        (opcode::LOOKUP, put(vec![], b"")),
        (opcode::MKDIR, put(w(&[0o755, 0]), b"")),
        (opcode::MKNOD, put(w(&[0o644, 0, 0, 0]), b"")),
        (opcode::SYMLINK, put(vec![], b"target\0")),
        (opcode::CREATE, put(w(&[0, 0, 0, 0]), b"")),
        (opcode::LINK, put(q(&[9]), b"")),
        (opcode::UNLINK, put(vec![], b"")),
        (opcode::RMDIR, put(vec![], b"")),
        (opcode::RENAME, put(q(&[9]), b"other\0")),
        (opcode::RENAME, put([q(&[9]), b"other\0".to_vec()].concat(), b"")),
        (opcode::RENAME2, put(q(&[9, 0]), b"other\0")),
        (opcode::RENAME2, put([q(&[9, 0]), b"other\0".to_vec()].concat(), b"")),
    ]
}

#[test]
fn a_name_is_one_component() {
    let long = [vec![b'n'; 256], vec![0]].concat();
    let longest = [vec![b'n'; 255], vec![0]].concat();
    let endless = vec![b'n'; 70_000];
    let cases: [(&[u8], i32); 11] = [
        (b"\0", EINVAL),
        (b".\0", EINVAL),
        (b"..\0", EINVAL),
        (b"a/b\0", EINVAL),
        (b"/abs\0", EINVAL),
        (b"../x\0", EINVAL),
        (b"a/\0", EINVAL),
        (b"/\0", EINVAL),
        (&long, ENAMETOOLONG),
        (&endless, ENAMETOOLONG),
        (b"a\0b\0c\0", EINVAL),
    ];
    for (text, expected) in cases {
        for (opcode, body) in around(text) {
            let got = refused(opcode, &body);
            assert_eq!(got, expected, "{opcode}: {:?}", text.escape_ascii().to_string());
        }
    }
    for text in [&longest[..], b"a\0", b"...\0", b".a\0", b" \0", b"\xff\xfe\0", b"\n\0"] {
        for (opcode, body) in around(text) {
            assert!(parsed(&message(opcode, &body), AMPLE).is_ok(), "{opcode}: {:?}", text.escape_ascii().to_string());
        }
    }
}

#[test]
fn a_name_has_an_end() {
    for (opcode, body) in around(b"name\0") {
        let cut = &body[..body.len() - 1];
        assert_eq!(refused(opcode, cut), EINVAL, "{opcode}");
    }
    assert_eq!(refused(opcode::RENAME, &[q(&[9]), b"one\0".to_vec()].concat()), EINVAL);
    assert_eq!(refused(opcode::SYMLINK, b"one\0"), EINVAL);
    assert_eq!(refused(opcode::LOOKUP, b"one\0\0"), EINVAL);
}

#[test]
fn a_name_of_the_host_is_checked_like_the_guests() {
    assert!(Name::new(c"a").is_some());
    let long = std::ffi::CString::new(vec![b'n'; 256]).unwrap();
    for text in [c"", c".", c"..", c"a/b", &long] {
        assert_eq!(Name::new(text), None);
    }
}

#[test]
fn targets_are_not_names() {
    let target = |text: &[u8]| [b"a\0", text].concat();
    for text in [&b"/\0"[..], b"..\0", b"/etc/passwd\0", b"\xff\0", &[vec![b't'; 4095], vec![0]].concat()] {
        assert!(parsed(&message(opcode::SYMLINK, &target(text)), AMPLE).is_ok());
    }
    assert_eq!(refused(opcode::SYMLINK, &target(b"\0")), ENOENT);
    assert_eq!(refused(opcode::SYMLINK, &target(&[vec![b't'; 4096], vec![0]].concat())), ENAMETOOLONG);
    assert_eq!(refused(opcode::SYMLINK, &target(b"t\0t\0")), EINVAL);
}

#[test]
fn attributes_have_names_of_any_bytes() {
    let set = |size: u32, rest: &[u8]| [&w(&[size, 0, 0, 0]), rest].concat();
    let get = |rest: &[u8]| [&w(&[16, 0]), rest].concat();
    let longest = [vec![b'x'; 255], vec![0]].concat();
    for text in [&b"user.\xff\xfe\0"[..], b"user.a/b\0", &longest] {
        assert!(parsed(&message(opcode::SETXATTR, &set(2, &[text, b"vv"].concat())), AMPLE).is_ok());
        assert!(parsed(&message(opcode::GETXATTR, &get(text)), AMPLE).is_ok());
        assert!(parsed(&message(opcode::REMOVEXATTR, text), AMPLE).is_ok());
    }
    let long = [vec![b'x'; 256], vec![0]].concat();
    for (text, expected) in [(&long[..], ERANGE), (b"\0", EINVAL), (b"user.x", EINVAL), (b"user.x\0y\0", EINVAL)] {
        assert_eq!(refused(opcode::SETXATTR, &set(0, text)), expected);
        assert_eq!(refused(opcode::GETXATTR, &get(text)), expected);
        assert_eq!(refused(opcode::REMOVEXATTR, text), expected);
    }
}

#[test]
fn a_value_is_as_long_as_it_says() {
    let set = |size: u32, value: &[u8]| [&w(&[size, 0, 0, 0]), &b"user.x\0"[..], value].concat();
    assert_eq!(refused(opcode::SETXATTR, &set(4, b"abc")), EINVAL);
    assert_eq!(refused(opcode::SETXATTR, &set(2, b"abc")), EINVAL);
    assert_eq!(refused(opcode::SETXATTR, &set(65537, &[0; 65537])), E2BIG);
    assert_eq!(refused(opcode::SETXATTR, &set(u32::MAX, b"")), E2BIG);
    let most = message(opcode::SETXATTR, &set(65536, &[7; 65536]));
    let Operation::SetXattr { value, .. } = parsed(&most, AMPLE).unwrap().operation else { panic!() };
    assert_eq!(value, [7; 65536]);
}

/// Before `FUSE_SETXATTR_EXT` there were two fields less.
#[test]
fn the_short_form_of_setxattr() {
    let bytes = message(opcode::SETXATTR, &[&w(&[1, 2]), &b"user.x\0v"[..]].concat());
    let room = Room { readable: u32::try_from(bytes.len()).unwrap(), writable: 16 };
    let request = parse(&bytes, room, Dialect::default()).unwrap();
    assert_eq!(request.operation, Operation::SetXattr { name: c"user.x", value: b"v", flags: 2, clear_sgid: false });
    assert_eq!(errno(parse(&bytes, room, LONG)), EINVAL);
}

#[test]
fn the_length_in_a_header_is_where_a_message_ends() {
    let body = b"name\0";
    for (len, expected) in [(0, EINVAL), (39, EINVAL), (40, EINVAL), (44, EINVAL), (46, EINVAL), (0xffff_ffff, EINVAL)] {
        let bytes = message_of(len, opcode::LOOKUP, [UID, GID], 0, body);
        assert_eq!(errno(parsed(&bytes, AMPLE)), expected, "{len}");
    }
    let longer = message_of(45, opcode::LOOKUP, [UID, GID], 0, b"name\0 and more");
    assert_eq!(parsed(&longer, AMPLE).unwrap().operation, Operation::Lookup { name: name(c"name") });
}

#[test]
fn without_a_header_there_is_nobody_to_answer() {
    let bytes = message(opcode::LOOKUP, b"name\0");
    for len in 0..40 {
        assert_eq!(parsed(&bytes[..len], AMPLE).err(), Some(Bad::Unanswerable));
    }
}

#[test]
fn what_is_forgotten_is_all_there() {
    for count in [3, 4, 1 << 28, 0xffff_ffff] {
        let bytes = message(opcode::BATCH_FORGET, &[w(&[count, 0]), q(&[2, 1, 3, 1])].concat());
        assert_eq!(parsed(&bytes, 0).err(), Some(Bad::Unanswerable), "{count}");
        assert_eq!(parsed(&bytes, AMPLE).err(), Some(Bad::Unanswerable), "{count}");
    }
}

/// Messages that make something, with extensions behind them.
fn making(extensions: &[u8], units: u16) -> Vec<Vec<u8>> {
    let of = |opcode: u32, body: &[u8]| {
        let body = [body, extensions].concat();
        message_of(40 + body.len(), opcode, [UID, GID], units, &body)
    };
    let created = [w(&[0, 0, 0, 0]), b"a\0".to_vec()].concat();
    vec![
        of(opcode::CREATE, &created),
        of(opcode::TMPFILE, &created),
        of(opcode::MKNOD, &created),
        of(opcode::MKDIR, &[w(&[0, 0]), b"a\0".to_vec()].concat()),
        of(opcode::SYMLINK, b"a\0t\0"),
    ]
}

#[test]
fn one_group_may_follow() {
    for bytes in making(&w(&[16, 32, 1, 4242]), 2) {
        assert_eq!(parsed(&bytes, AMPLE).unwrap().group, Some(4242));
    }
    for bytes in making(&w(&[16, 32, 0, 4242]), 2) {
        assert_eq!(parsed(&bytes, AMPLE).unwrap().group, None);
    }
}

#[test]
fn other_extensions_are_refused() {
    let cases: Vec<(&str, Vec<u8>, u16)> = vec![
        ("cut short", w(&[16, 32, 1]), 2),
        ("more than the message", w(&[16, 32, 1, 42]), u16::MAX),
        ("not there", Vec::new(), 2),
        ("half of it", w(&[16, 32, 1, 42]), 1),
        ("of no size", w(&[0, 32, 1, 42]), 2),
        ("too large", w(&[24, 32, 1, 42]), 2),
        ("huge", w(&[u32::MAX, 32, 1, 42]), 2),
        ("odd", w(&[12, 32, 1, 42]), 2),
        ("no number", w(&[8, 32]), 1),
        ("two groups", w(&[24, 32, 2, 42, 43, 0]), 3),
        ("many groups", w(&[16, 32, u32::MAX, 42]), 2),
        ("twice", w(&[16, 32, 1, 42, 16, 32, 1, 43]), 4),
        ("no group", w(&[16, 32, 1, u32::MAX]), 2),
        ("security context", w(&[16, 1, 0, 0]), 2),
        ("unknown", w(&[16, 33, 0, 0]), 2),
    ];
    for (what, extensions, units) in cases {
        for bytes in making(&extensions, units) {
            assert_eq!(errno(parsed(&bytes, AMPLE)), EINVAL, "{what}");
        }
    }
}

/// An extension with one label, as Linux sends it.
fn label(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut content = [w(&[u32::try_from(value.len()).unwrap(), 0]), name.to_vec(), vec![0], value.to_vec()].concat();
    content.resize(content.len().next_multiple_of(8), 0);
    [w(&[u32::try_from(8 + content.len()).unwrap(), 1]), content].concat()
}

/// The same message where labels were agreed on.
fn with_labels(bytes: &[u8]) -> Result<Request<'_>, Bad> {
    let room = Room { readable: u32::try_from(bytes.len()).unwrap(), writable: AMPLE };
    parse(bytes, room, Dialect { security_ctx: true, ..LONG })
}

fn units(extensions: &[u8]) -> u16 {
    u16::try_from(extensions.len() / 8).unwrap()
}

#[test]
fn one_label_may_follow_where_that_was_agreed_on() {
    let long = vec![b'c'; MAX_LABEL];
    for value in [&b"c"[..], b"system_u:object_r:x_t:s0\0", &long] {
        let name = c"security.selinux";
        let (alone, group) = (label(name.to_bytes(), value), w(&[16, 32, 1, 42]));
        let orders =
            [(alone.clone(), None), ([&alone[..], &group].concat(), Some(42)), ([&group[..], &alone].concat(), Some(42))];
        for (extensions, group) in orders {
            for bytes in making(&extensions, units(&extensions)) {
                let request = with_labels(&bytes).unwrap();
                assert_eq!((request.label, request.group), (Some(Label { name, value }), group));
                assert_eq!(errno(parsed(&bytes, AMPLE)), EINVAL, "it was not agreed on");
            }
        }
    }
    for bytes in making(&w(&[8, 0]), 1).into_iter().chain(making(&[], 0)) {
        assert_eq!(with_labels(&bytes).unwrap().label, None, "the guest has none for it");
    }
}

#[test]
fn other_labels_are_refused() {
    let good = label(b"security.selinux", b"context");
    let with = |at: usize, word: u32| [&good[..at], &w(&[word]), &good[at + 4..]].concat();
    let cases: Vec<(&str, Vec<u8>, i32)> = vec![
        ("twice", [&good[..], &good].concat(), EINVAL),
        ("none, and one", [&w(&[8, 0])[..], &good].concat(), EINVAL),
        ("two", with(4, 2), EINVAL),
        ("most", with(4, 31), EINVAL),
        ("none, and something", w(&[16, 0, 0, 0]), EINVAL),
        ("nothing", w(&[8, 1]), EINVAL),
        ("no name", w(&[16, 1, 1, 0]), EINVAL),
        ("a name without an end", [w(&[24, 1, 1, 0]), vec![b'n'; 8]].concat(), EINVAL),
        ("an empty name", label(b"", b"context"), EINVAL),
        ("a long name", label(&[b'n'; 256], b"context"), ERANGE),
        ("no bytes", label(b"security.selinux", b""), EINVAL),
        ("more than there are", with(8, 20), EINVAL),
        ("as many as there can be", with(8, u32::MAX), EINVAL),
        (
            "fewer than there are",
            label(b"n", b"0123456789abcdef").iter().enumerate().map(|(at, byte)| if at == 8 { 3 } else { *byte }).collect(),
            EINVAL,
        ),
        ("more than a page", label(b"n", &[b'c'; MAX_LABEL + 1]), EINVAL),
        ("cut short", good[..good.len() - 8].to_vec(), EINVAL),
    ];
    for (what, extensions, expected) in cases {
        for bytes in making(&extensions, units(&extensions)) {
            assert_eq!(errno(with_labels(&bytes)), expected, "{what}");
        }
    }
}

/// -1 is what setresuid(2) takes for "leave it as it is", and what it is here is root.
#[test]
fn nobody_makes_nothing() {
    for owner in [[u32::MAX, GID], [UID, u32::MAX], [u32::MAX, u32::MAX]] {
        for mut bytes in making(&[], 0) {
            bytes[24..32].copy_from_slice(&w(&owner));
            assert_eq!(errno(parsed(&bytes, AMPLE)), EINVAL);
        }
        let bytes = message_of(45, opcode::LOOKUP, owner, 0, b"name\0");
        assert_eq!(parsed(&bytes, AMPLE).unwrap().uid, owner[0], "whoever makes nothing may be anybody");
    }
}

#[test]
fn what_is_wrong_is_a_sentence() {
    let text = parsed(&message(opcode::LOOKUP, b"..\0"), AMPLE).unwrap_err().to_string();
    assert_eq!(text, "A message was refused with error 22: a name that is `.` or `..`");
}
