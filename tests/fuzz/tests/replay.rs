//! What fuzzing has kept, run again: the corpora, and each crash that was ever found.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use fuzz::{TARGETS, corpus, run};

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn kept_inputs_still_pass() {
    for (name, _) in TARGETS {
        let inputs = corpus::read(&corpus::packed(folder(), name)).unwrap();
        assert!(!inputs.is_empty(), "{name} has no corpus: cargo xtask fuzz --target {name} makes one");
        inputs.iter().for_each(|input| run(name, input));
        println!("{name}: {} inputs", inputs.len());
    }
}

/// `regressions/TARGET/WHAT-IT-SHOWED`.
#[test]
fn crashes_that_were_found_stay_mended() {
    for (name, _) in TARGETS {
        let Ok(folder) = fs::read_dir(folder().join("regressions").join(name)) else { continue };
        for input in folder.flatten() {
            println!("{name}: {}", input.file_name().display());
            run(name, &fs::read(input.path()).unwrap());
        }
    }
}

#[test]
fn each_target_has_its_program() {
    let programs = fs::read_dir(folder().join("fuzz_targets")).unwrap().flatten();
    let programs: BTreeSet<String> =
        programs.map(|entry| entry.file_name().to_str().unwrap().trim_end_matches(".rs").to_owned()).collect();
    assert_eq!(programs, TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect());
}

#[test]
fn a_packed_corpus_holds_what_was_put_in() {
    let folder = std::env::temp_dir().join(format!("outboard-corpus-{}", std::process::id()));
    let path = folder.join("packed.bin");
    let inputs = vec![vec![], vec![1], vec![2, 3]];
    corpus::write(&path, [inputs.clone(), inputs.clone()].concat()).unwrap();
    assert_eq!(corpus::read(&path).unwrap(), inputs);
    fs::write(&path, [9, 0, 0, 0, 1]).unwrap();
    assert!(corpus::read(&path).is_err());
    fs::remove_dir_all(folder).unwrap();
}
