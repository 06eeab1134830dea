//! Completions and manual pages.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::machine::Machine;

/// The commands that `--help` lists.
fn commands(machine: &Machine) -> Vec<String> {
    let help = machine.run(&["--help"]).stdout;
    let list = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let names = list.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next().map(str::to_owned));
    names.filter(|name| !name.is_empty() && name != "help").collect()
}

/// The long options that a command's `--help` lists.
fn options(machine: &Machine, command: &str) -> Vec<String> {
    let help = machine.run(&[command, "--help"]).stdout;
    let words = help.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 2);
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let listed: Vec<&str> = lines.flat_map(|line| line.split(['.', ' ', ','])).filter(|word| word.starts_with("--")).collect();
    words.filter(|word| listed.contains(word)).map(str::to_owned).collect()
}

#[test]
fn every_shell_completes_every_command() {
    let machine = Machine::new();
    let commands = commands(&machine);
    assert!(commands.len() >= 12, "{commands:?}");
    for shell in ["bash", "elvish", "fish", "zsh"] {
        let outcome = machine.run(&["completions", shell]);
        assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), ""));
        for command in &commands {
            assert!(outcome.stdout.contains(command.as_str()), "{shell} does not know {command}");
        }
        assert!(!outcome.stdout.contains("janitor"), "{shell} knows what nobody types");
    }
}

#[test]
fn bash_understands_its_completions() {
    let machine = Machine::new();
    let script = machine.run(&["completions", "bash"]).stdout;
    let question = "\nCOMP_WORDS=(outboard logs --f); COMP_CWORD=2; _outboard outboard --f logs; echo \"${COMPREPLY[@]}\"\n";
    let mut bash = Command::new("bash").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    bash.stdin.take().unwrap().write_all(format!("{script}{question}").as_bytes()).unwrap();
    let answer = bash.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), "--follow");
}

#[test]
fn there_is_a_page_for_every_command_and_every_program() {
    let machine = Machine::new();
    assert!(machine.run(&["man"]).stdout.contains(".TH outboard 1 "));
    assert_eq!(machine.run(&["man", "--dir", "pages/man"]).status, Some(0));
    let page = |name: &str| fs::read_to_string(machine.dir.join("pages/man").join(name)).unwrap().replace("\\-", "-");
    for command in commands(&machine) {
        let text = page(&format!("outboard-{command}.1"));
        for option in options(&machine, &command) {
            assert!(text.contains(&option), "the page of {command} does not know {option}");
        }
    }
    for program in ["vmm", "blk", "rng", "console"] {
        assert_eq!(page(&format!("outboard-{program}.8")), format!(".TH outboard-{program} 8\n"));
    }
    assert!(!machine.dir.join("pages/man/outboard-janitor.1").exists());
}
