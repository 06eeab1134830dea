//! Ways out, tried from inside each confined process, with the confinement it has for users. The matrix of what answers what is
//! in `docs/sandbox.md`.

use std::path::PathBuf;

use suite::escape::{Outside, filters_end_whoever_tries, has_all_layers, layers_answer_as_they_should, table};
use suite::tracer::can_trace;
use suite::{Scratch, program, root};

/// A program and the arguments it serves with.
fn server(name: &str, scratch: &Scratch) -> (PathBuf, Vec<String>) {
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let socket = text(scratch.path(&format!("{name}.sock")));
    let image = text(scratch.image("disk.img", 1 << 20));
    let log = text(scratch.path("console.log"));
    let own: &[&str] = match name {
        "outboard-blk" => &["--format", "raw", "--blk-file", &image],
        "outboard-console" => &["--file", &log],
        "outboard-virtiofsd" => {
            let words = ["--owner-map", "me", "--socket-path", &socket, "--shared-dir", &share(scratch)].map(str::to_owned);
            return (program(name), words.to_vec());
        }
        "outboard-evil-server" => return (program(name), vec!["--shared-dir".to_owned(), share(scratch)]),
        _ => &[],
    };
    let args = ["--socket-path", &socket].into_iter().chain(own.iter().copied());
    (program(name), args.map(str::to_owned).collect())
}

/// A directory to be served, which is not the one that the attempts are about.
fn share(scratch: &Scratch) -> String {
    let share = scratch.path("share");
    std::fs::create_dir_all(&share).unwrap();
    share.to_str().unwrap().to_owned()
}

fn ends_whoever_tries(name: &str) {
    let scratch = Scratch::new();
    let (program, args) = server(name, &scratch);
    if can_trace() {
        filters_end_whoever_tries(&program, &args, 1, &Outside::new(scratch.path("outside.sock")));
    }
}

#[test]
fn whoever_has_taken_the_disk_over_gets_nowhere() {
    ends_whoever_tries("outboard-blk");
}

#[test]
fn whoever_has_taken_the_entropy_source_over_gets_nowhere() {
    ends_whoever_tries("outboard-rng");
}

#[test]
fn whoever_has_taken_the_console_over_gets_nowhere() {
    ends_whoever_tries("outboard-console");
}

/// It may open files, beneath its share and with another call than those that are tried.
#[test]
fn whoever_has_taken_a_file_server_over_gets_nowhere() {
    ends_whoever_tries("outboard-evil-server");
}

#[test]
fn whoever_has_taken_the_server_of_a_directory_over_gets_nowhere() {
    ends_whoever_tries("outboard-virtiofsd");
}

/// With one layer left out at a time, this is also the proof that the test would notice.
#[test]
fn each_layer_stops_something_that_the_others_do_not() {
    let scratch = Scratch::new();
    let outside = Outside::new(scratch.path("outside.sock"));
    for name in ["outboard-rng", "outboard-blk", "outboard-console", "outboard-evil-server"] {
        let (program, args) = server(name, &scratch);
        if can_trace() && has_all_layers() {
            layers_answer_as_they_should(&program, &args, 1, &outside);
        }
    }
}

#[test]
fn the_matrix_in_the_documents_is_this_one() {
    let page = std::fs::read_to_string(root().join("docs/sandbox.md")).unwrap();
    assert!(page.contains(&table()), "docs/sandbox.md should contain:\n{}", table());
}
