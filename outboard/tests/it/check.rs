//! `outboard check` and `outboard schema`: what a machine file can say, without a machine.

use serde_json::Value;

use crate::machine::Machine;

#[test]
fn a_file_that_makes_sense_is_told_so_and_nothing_is_started() {
    let machine = Machine::new().file("cpus = 2\n[disk.root]\npath = \"disk.img\"\n[rng.entropy]\n");
    let outcome = machine.run(&["check", "web.toml"]);
    assert_eq!(outcome.stdout, "web.toml: `web` makes sense: 2 processors, 64M, 2 devices\n");
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), ""));
    assert!(!machine.dir.join("run/outboard").exists());
}

#[test]
fn all_mistakes_are_told_at_once_with_their_lines() {
    let machine = Machine::new().file("cpus = 0\n[disk.root]\nfromat = \"raw\"\n");
    let outcome = machine.run(&["check", "web.toml"]);
    let expected = "web.toml:4: `cpus` in [machine] must be a number from 1 to 64, not 0\n\
                    web.toml:5: [disk.root] needs `path`\n\
                    web.toml:6: Unknown key `fromat` in [disk.root]; did you mean `format`?\n";
    assert_eq!((outcome.status, outcome.stdout.as_str(), outcome.stderr.as_str()), (Some(2), "", expected));
}

#[test]
fn what_the_file_names_is_looked_at_too() {
    let machine = Machine::new().file("[disk.root]\npath = \"none.img\"\n[rng.root]\n[console.a]\n[console.b]\n");
    std::fs::remove_file(machine.dir.join("kernel")).unwrap();
    let outcome = machine.run(&["check", "web.toml"]);
    let says = outcome.stderr.replace(&machine.dir.display().to_string(), "DIR");
    let expected = "web.toml:2: Cannot open the kernel DIR/kernel: No such file or directory (os error 2)\n\
                    web.toml:6: Two devices are called `root`: each needs a name of its own\n\
                    web.toml:8: Only one console can have the terminal\n";
    assert!(says.contains("Cannot open the image DIR/none.img of the disk `root`: No such file"), "{says}");
    let others: String = says.lines().filter(|line| !line.contains("none.img")).map(|line| format!("{line}\n")).collect();
    assert_eq!((outcome.status, others.as_str()), (Some(2), expected));
}

#[test]
fn a_file_that_cannot_be_read_is_a_failure() {
    let outcome = Machine::new().run(&["check", "none.toml"]);
    let expected = "outboard: Cannot read the machine file none.toml: No such file or directory (os error 2)\n";
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(1), expected));
}

#[test]
fn the_schema_is_printed_for_programs_and_for_people() {
    let machine = Machine::new();
    let schema: Value = serde_json::from_str(&machine.run(&["schema"]).stdout).unwrap();
    assert_eq!(schema["properties"]["machine"]["properties"]["cpus"]["maximum"], 64);
    let page = machine.run(&["schema", "--markdown"]).stdout;
    assert!(page.starts_with("## `[machine]`\n") && page.contains("| `readonly` | true or false"), "{page}");
}
