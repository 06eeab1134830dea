//! Ways out of the VMM, tried from its control thread and from a processor's, as `suite::escapes` does with device processes.

use suite::escape::{Outside, filters_end_whoever_tries, has_all_layers, layers_answer_as_they_should};
use suite::tracer::can_trace;
use suite::{Scratch, program};

use super::machine::images;

fn machine() -> Vec<String> {
    let kernel = images().join("vmlinux").to_str().unwrap().to_owned();
    let words = ["--kernel", &kernel, "--memory", "128M", "--serial", "none"];
    words.map(str::to_owned).to_vec()
}

#[test]
fn whoever_has_taken_the_vmm_over_gets_nowhere() {
    let scratch = Scratch::new();
    let outside = Outside::new(scratch.path("outside.sock"));
    if can_trace() {
        filters_end_whoever_tries(&program("outboard-vmm"), &machine(), 1, &outside);
    }
}

#[test]
fn each_layer_around_the_vmm_stops_something_that_the_others_do_not() {
    let scratch = Scratch::new();
    let outside = Outside::new(scratch.path("outside.sock"));
    if can_trace() && has_all_layers() {
        layers_answer_as_they_should(&program("outboard-vmm"), &machine(), 1, &outside);
    }
}
