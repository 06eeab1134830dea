//! OpenMetrics text: what Prometheus and its relatives read.
//!
//! Every name begins with `outboard_`. Samples of one name stand together, whichever process they come from, so families are
//! gathered first and written at the end.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use virtio::metrics::page::Shown;
use virtio::metrics::{BOUNDS, Kind, Label};

use super::Sample;

/// What an HTTP client is told it gets.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug)]
struct Family {
    help: String,
    kind: Kind,
    samples: String,
}

/// Families by name, in the order of the alphabet.
#[derive(Debug, Default)]
struct Families(BTreeMap<String, Family>);

impl Families {
    /// Adds a sample. The first to name a family says what it is; who says otherwise later is left out.
    fn add(&mut self, name: &str, help: &str, kind: Kind, labels: &str, value: impl Display) {
        let new = || Family { help: help.to_owned(), kind, samples: String::new() };
        let family = self.0.entry(name.to_owned()).or_insert_with(new);
        if family.kind != kind {
            return;
        }
        let total = if kind == Kind::Counter { "_total" } else { "" };
        let _a_string_takes_all = writeln!(family.samples, "outboard_{name}{total}{{{labels}}} {value}");
    }

    /// Adds times: how many were at most how long, all of them, and their sum.
    fn times(&mut self, labels: &str, shown: &Shown) {
        let new = || Family { help: shown.help.clone(), kind: Kind::Histogram, samples: String::new() };
        let family = self.0.entry(shown.name.clone()).or_insert_with(new);
        let [steps @ .., sum] = shown.values.as_slice() else { return };
        if family.kind != Kind::Histogram {
            return;
        }
        let bounds = BOUNDS.iter().map(|micros| seconds(*micros)).chain(["+Inf".to_owned()]);
        let (name, mut count) = (&shown.name, 0_u64);
        for (bound, step) in bounds.zip(steps) {
            count = count.saturating_add(*step);
            let _a_string_takes_all = writeln!(family.samples, "outboard_{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
        }
        let _a_string_takes_all = writeln!(family.samples, "outboard_{name}_count{{{labels}}} {count}");
        let _a_string_takes_all = writeln!(family.samples, "outboard_{name}_sum{{{labels}}} {}", seconds(*sum));
    }

    fn write(&self) -> String {
        let mut text = String::new();
        for (name, family) in &self.0 {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            text.push_str(&format!("# TYPE outboard_{name} {kind}\n"));
            for unit in ["seconds", "bytes"].into_iter().filter(|unit| name.ends_with(&format!("_{unit}"))) {
                text.push_str(&format!("# UNIT outboard_{name} {unit}\n"));
            }
            text.push_str(&format!("# HELP outboard_{name} {}.\n{}", family.help, family.samples));
        }
        text.push_str("# EOF\n");
        text
    }
}

fn seconds(micros: u64) -> String {
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}

/// A machine in text. Its name and those of its devices have no character that would have to be escaped.
#[must_use]
pub fn write(machine: &str, running: bool, samples: &[Sample]) -> String {
    let mut families = Families::default();
    let labels = format!("machine=\"{machine}\"");
    families.add("machine_running", "Whether the guest runs", Kind::Gauge, &labels, u8::from(running));
    let devices: Vec<&str> =
        samples.iter().filter(|one| one.process.class.is_some()).map(|one| one.process.role.as_str()).collect();
    for sample in samples {
        let process = &sample.process;
        let mut labels = format!("{labels},process=\"{}\"", process.role);
        if process.class.is_some() {
            labels.push_str(&format!(",device=\"{}\"", process.role));
            let connected = u8::from(process.state == "connected");
            families.add("device_connected", "Whether the device's process serves the guest", Kind::Gauge, &labels, connected);
        }
        of_process(&mut families, &labels, sample);
        for shown in &sample.shown {
            of_counter(&mut families, &labels, shown, &devices);
        }
    }
    families.write()
}

fn of_process(families: &mut Families, labels: &str, sample: &Sample) {
    let restarts = sample.process.restarts;
    families.add("process_restarts", "How often it was started, or connected, again", Kind::Counter, labels, restarts);
    if let Some(started) = sample.process.started {
        families.add("process_start_time_seconds", "When it was started, since 1970", Kind::Gauge, labels, started);
    }
    let Some(usage) = &sample.usage else { return };
    families.add("process_cpu_seconds", "Processor time", Kind::Counter, labels, usage.cpu_seconds);
    let help = "Memory it has, touched guest memory included";
    families.add("process_resident_bytes", help, Kind::Gauge, labels, usage.resident_bytes);
    families.add("process_private_bytes", "Memory that nobody else has", Kind::Gauge, labels, usage.private_bytes);
    families.add("process_threads", "Its threads", Kind::Gauge, labels, usage.threads);
}

fn of_counter(families: &mut Families, labels: &str, shown: &Shown, devices: &[&str]) {
    if shown.kind == Kind::Histogram {
        return families.times(labels, shown);
    }
    for (index, value) in shown.values.iter().enumerate() {
        let more = match shown.label {
            Label::None => String::new(),
            Label::Queue => format!(",queue=\"{index}\""),
            Label::Device => match devices.get(index) {
                Some(device) => format!(",device=\"{device}\""),
                None => continue,
            },
        };
        // A device process has its device among its labels already.
        if shown.label == Label::Device && labels.contains(",device=") {
            continue;
        }
        families.add(&shown.name, &shown.help, shown.kind, &format!("{labels}{more}"), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::Report;
    use crate::metrics::usage::Usage;

    fn sample(role: &str, class: Option<&str>, shown: Vec<Shown>) -> Sample {
        let mut process = Report::example().processes.remove(0);
        process.role = role.to_owned();
        process.class = class.map(str::to_owned);
        let usage = Usage { cpu_seconds: 1.5, resident_bytes: 4096, private_bytes: 1024, threads: 2 };
        Sample { process, usage: Some(usage), shown }
    }

    fn shown(name: &str, kind: Kind, label: Label, values: &[u64]) -> Shown {
        Shown { name: name.to_owned(), help: "Help".to_owned(), kind, label, values: values.to_vec() }
    }

    #[test]
    fn samples_of_one_name_stand_together_and_are_labelled() {
        let kicks = || vec![shown("queue_kicks", Kind::Counter, Label::Queue, &[3, 4])];
        let rings = vec![shown("vmm_rings", Kind::Gauge, Label::Device, &[1, 2, 9])];
        let samples = [sample("vmm", None, rings), sample("root", Some("blk"), kicks()), sample("data", Some("blk"), kicks())];
        let text = write("web", true, &samples);
        let expected = "# TYPE outboard_queue_kicks counter\n\
                        # HELP outboard_queue_kicks Help.\n\
                        outboard_queue_kicks_total{machine=\"web\",process=\"root\",device=\"root\",queue=\"0\"} 3\n\
                        outboard_queue_kicks_total{machine=\"web\",process=\"root\",device=\"root\",queue=\"1\"} 4\n\
                        outboard_queue_kicks_total{machine=\"web\",process=\"data\",device=\"data\",queue=\"0\"} 3\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("outboard_vmm_rings{machine=\"web\",process=\"vmm\",device=\"data\"} 2\n"), "{text}");
        assert!(!text.contains("} 9\n"), "a device that is not there has no rings: {text}");
        assert!(text.contains("# UNIT outboard_process_cpu_seconds seconds\n"), "{text}");
        assert!(text.ends_with("\n# EOF\n"));
    }

    #[test]
    fn a_process_cannot_turn_another_ones_counter_into_something_else() {
        let one = |kind| vec![shown("queue_kicks", kind, Label::None, &[1])];
        let samples = [sample("a", Some("blk"), one(Kind::Counter)), sample("b", Some("blk"), one(Kind::Gauge))];
        let text = write("web", true, &samples);
        assert_eq!(text.matches("# TYPE outboard_queue_kicks ").count(), 1, "{text}");
        assert!(!text.contains("outboard_queue_kicks{"), "{text}");
    }
}
