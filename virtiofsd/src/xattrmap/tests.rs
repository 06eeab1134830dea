//! Rules, and what becomes of names under them.

use super::*;

fn map(text: &str) -> XattrMap {
    text.parse().unwrap()
}

fn host(map: &XattrMap, name: &CStr) -> Result<String, Errno> {
    let mut room = [0xff; MAX_NAME + 1];
    map.to_host(name, &mut room).map(|name| name.to_str().unwrap().to_owned())
}

fn guest(map: &XattrMap, names: &[&str]) -> Vec<String> {
    let mut list: Vec<u8> = names.iter().flat_map(|name| [name.as_bytes(), &[0]].concat()).collect();
    let len = map.list(&mut list, |name| name.starts_with(b"hidden."));
    list[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect()
}

#[test]
fn the_first_rule_decides() {
    let some = map("/prefix/all/trusted./user.virtiofs./\n /bad/server//trusted./\t/bad/client/user.virtiofs.//  ;ok;all;;;");
    assert_eq!(host(&some, c"trusted.overlay"), Ok("user.virtiofs.trusted.overlay".to_owned()));
    assert_eq!(host(&some, c"user.virtiofs.trusted.overlay"), Err(Errno::PERM));
    assert_eq!(host(&some, c"user.other"), Ok("user.other".to_owned()));
    let names = ["user.virtiofs.trusted.overlay", "trusted.mine", "user.other", "user.virtiofs.", "hidden.x"];
    assert_eq!(guest(&some, &names), ["trusted.overlay", "user.other"]);
    let not = map("/unsupported/all/security.selinux/security.selinux//ok/all///");
    assert_eq!((host(&not, c"security.selinux"), host(&not, c"security.x").is_ok()), (Err(Errno::OPNOTSUPP), true));
    assert_eq!(guest(&not, &["security.selinux", "security.x"]), ["security.x"]);
    assert_eq!(guest(&not, &[]), [""; 0]);
}

#[test]
fn a_map_stands_for_several_rules() {
    assert_eq!(map(":map::user.virtiofs.:"), map(":prefix:all::user.virtiofs.::bad:all:::"));
    assert_eq!(
        map("/map/trusted./user.virtiofs./"),
        map("/prefix/all/trusted./user.virtiofs.//bad/all/user.virtiofs./trusted.//ok/all///")
    );
}

#[test]
fn names_are_as_long_as_a_name_may_be() {
    let some = map(":map::user.:");
    let name = |len: usize| CString::new("n".repeat(len)).unwrap();
    assert_eq!(host(&some, &name(250)).unwrap().len(), 255);
    assert_eq!(host(&some, &name(251)), Err(Errno::RANGE));
    let long = map(&format!(":map::user.{}:", "p".repeat(300)));
    assert_eq!(host(&long, c"x"), Err(Errno::RANGE));
}

#[test]
fn capabilities_under_another_name_are_known() {
    assert_eq!(map(":map::user.virtiofs.:").capability(), Some(c"user.virtiofs.security.capability"));
    for same in [":ok:all:::", ":bad:all:security.capability:security.capability::ok:all:::", "/map/trusted./user.virtiofs./"] {
        assert_eq!(map(same).capability(), None, "{same}");
    }
}

#[test]
fn lists_of_access_pass_or_do_not() {
    let both =
        |map: &XattrMap| [c"system.posix_acl_access", c"system.posix_acl_default"].map(|name| map.passes(name)) == [true; 2];
    for same in [":ok:all:::", ":ok:all:system.:system.::map::user.:", "/map/trusted./user.virtiofs./"] {
        assert!(both(&map(same)), "{same}");
    }
    for other in [":map::user.:", ":ok:client::::bad:server:::", ":bad:client:system.posix_acl_default:::ok:all:::"] {
        assert!(!both(&map(other)), "{other}");
    }
}

#[test]
fn what_is_wrong_is_told_with_the_rule() {
    for (text, expected) in [
        ("", "there is none: "),
        (" \n", "there is none: "),
        (":ok:client::::bad:server:::x", "rule 3: it ends before its type does"),
        (":ok:client::::ok:server::x:", "no rule is about all names that the host may list: "),
        (":prefix:server:::", "no rule is about all names that the guest may say: "),
        (":foo:all:::", "rule 1: the type \"foo\" is none of prefix, ok, bad, unsupported, map"),
        (":ok:all::: :ok:both:::", "rule 2: the scope \"both\" is none of client, server, all"),
        (":prefix:all:trusted.:user.", "rule 1: it ends before its prepend does, for which it takes a ':'"),
        (":map::user.: :ok:all:::", "rule 1: a map has to be the last rule"),
        ("ok", "rule 1: it ends before its type does, for which it takes a 'o'"),
    ] {
        let wrong = text.parse::<XattrMap>().unwrap_err().to_string();
        assert!(wrong.starts_with(expected), "{text:?}: {wrong}");
    }
}
