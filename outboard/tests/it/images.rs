//! `outboard image`: making images, saying what they are, and finding what is wrong.

use std::fs;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::machine::Machine;

#[test]
fn an_image_is_made_described_and_checked() {
    let machine = Machine::new();
    let made = machine.run(&["image", "create", "--format", "qcow2", "--size", "1G", "a.qcow2"]);
    assert_eq!(made.stdout, "a.qcow2: an empty qcow2 image of 1G (1073741824 bytes)\n", "{}", made.stderr);
    let again = machine.run(&["image", "create", "--format", "qcow2", "--size", "2G", "a.qcow2"]);
    assert_eq!(again.stderr, "outboard: Cannot make image a.qcow2: File exists (os error 17)\n");
    assert_eq!(again.status, Some(1));

    let info = machine.run(&["image", "info", "--format", "qcow2", "a.qcow2"]);
    let expected = "a.qcow2\n  format      qcow2\n  size        1G (1073741824 bytes)\n  file        256K (262144 bytes)\n  version     3\n\
                    \x20 clusters    64K\n  refcounts   16 bits\n  compression zlib\n  snapshots   0\n";
    assert_eq!((info.status, info.stdout.as_str(), info.stderr.as_str()), (Some(0), expected, ""));

    let overlay = ["image", "create", "--format", "qcow2", "--backing", "a.qcow2", "--backing-format", "qcow2", "--subclusters"];
    let made = machine.run(&[&overlay[..], &["b.qcow2"]].concat());
    assert_eq!(made.stdout, "b.qcow2: an empty qcow2 image of 1G (1073741824 bytes)\n", "{}", made.stderr);
    let info: Value =
        serde_json::from_str(&machine.run(&["image", "info", "--json", "--format", "qcow2", "b.qcow2"]).stdout).unwrap();
    assert_eq!(
        (&info["backing"], &info["backing-format"], &info["subclusters"]),
        (&"a.qcow2".into(), &"qcow2".into(), &true.into())
    );

    let checked = machine.run(&["image", "check", "--format", "qcow2", "b.qcow2"]);
    assert_eq!((checked.status, checked.stderr.as_str()), (Some(0), ""));
    assert_eq!(checked.stdout, "b.qcow2: no errors, nothing leaked; 0 clusters of the disk have data, the file has 4\n");
}

#[test]
fn what_is_wrong_is_found_and_what_leaked_is_given_back() {
    let machine = Machine::new();
    machine.run(&["image", "create", "--format", "qcow2", "--size", "1G", "a.qcow2"]);
    let file = fs::File::options().write(true).open(machine.dir.join("a.qcow2")).unwrap();
    // The refcount of cluster 9, which is not there; and then an L1 entry that leads nowhere.
    file.write_all_at(&[0, 1], 2 * 65536 + 18).unwrap();
    let check = ["image", "check", "--format", "qcow2", "a.qcow2"];
    let leaked = machine.run(&check);
    assert_eq!(leaked.status, Some(3), "{}", leaked.stdout);
    assert!(leaked.stdout.contains("1 leaked clusters"), "{}", leaked.stdout);
    let repaired = machine.run(&[&check[..], &["--repair"]].concat());
    assert_eq!(repaired.status, Some(0), "{}{}", repaired.stdout, repaired.stderr);
    assert_eq!(machine.run(&check).status, Some(0));
    file.write_all_at(&(0x1234_0000_0000_0000_u64 | 512).to_be_bytes(), 3 * 65536).unwrap();
    let corrupt = machine.run(&[&check[..], &["--json"]].concat());
    assert_eq!(corrupt.status, Some(4), "{}", corrupt.stderr);
    let report: Value = serde_json::from_str(&corrupt.stdout).unwrap();
    assert_eq!(report["corruptions"], 1);
    assert!(report["errors"][0].as_str().unwrap().contains("L1 entry 0"), "{report}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let machine = Machine::new();
    let says = |args: &[&str], status: i32, text: &str| {
        let outcome = machine.run(&[&["image"], args].concat());
        assert_eq!(outcome.status, Some(status), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(text), "{}", outcome.stderr);
    };
    says(&["create", "--format", "qcow2", "x"], 2, "An image needs a --size");
    says(&["create", "--format", "qcow2", "--size", "5", "x"], 2, "Cannot read the size `5`");
    says(&["create", "--format", "raw", "--size", "1M", "--subclusters", "x"], 2, "A raw image is nothing but its bytes");
    says(
        &["create", "--format", "qcow2", "--size", "1M", "--cluster-size", "3K", "x"],
        1,
        "Cannot make image x: The size of a cluster",
    );
    says(&["create", "--format", "qcow2", "--backing", "none", "--backing-format", "qcow2", "x"], 1, "Cannot open image none");
    says(&["create", "--format", "qcow2", "--backing", "disk.img", "--backing-format", "qcow2", "x"], 1, "not a qcow2 image");
    says(&["info", "--format", "qcow2", "disk.img"], 1, "Cannot read image disk.img: It is not a qcow2 image");
    says(&["info", "disk.img"], 2, "--format");
    says(&["check", "--format", "raw", "disk.img"], 2, "nothing to check in a raw image");
    assert!(!machine.dir.join("x").exists());
    let raw = machine.run(&["image", "create", "--format", "qcow2", "--backing", "disk.img", "--backing-format", "raw", "x"]);
    assert_eq!(raw.stdout, "x: an empty qcow2 image of 1M (1048576 bytes)\n", "{}", raw.stderr);
}
