//! The rows of `cargo xtask bench`, and the two ways to show them.
//!
//! A row has what both sides were measured to do in turns, in the same run. The ratio of their medians is what counts; the
//! spread says how far to believe it.

use serde_json::json;

/// What was measured on one side: of ten values, one is below `low` and one above `high`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Spread {
    /// Of no values there is none.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let at = |part: usize| values.get((last * part + 5) / 10).copied();
        // Of an even number, the middle of the two in the middle: one of them would favour a side.
        let median = f64::midpoint(*values.get(last / 2)?, *values.get(last.div_ceil(2))?);
        Some(Self { low: at(1)?, median, high: at(9)? })
    }

    /// Something that does not vary.
    pub(crate) fn fixed(value: f64) -> Self {
        Self { low: value, median: value, high: value }
    }
}

/// What the project wants to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// Ours over theirs, at most.
    Ratio(f64),
    /// Ours over theirs, at least.
    AtLeast(f64),
    /// The median of ours, at most, in the row's unit.
    Median(f64),
    /// Ours, in the best of cases, at most.
    Best(f64),
}

impl Target {
    fn text(self) -> String {
        match self {
            Self::Ratio(limit) => format!("ratio <= {limit}"),
            Self::AtLeast(limit) => format!("ratio >= {limit}"),
            Self::Median(limit) => format!("<= {limit}"),
            Self::Best(limit) => format!("best <= {limit}"),
        }
    }
}

/// One comparison.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) ours: Option<Spread>,
    pub(crate) theirs: Option<Spread>,
    /// Who they are, with the version.
    pub(crate) peer: String,
    pub(crate) targets: Vec<Target>,
    /// What a reader has to know, such as why there is no number.
    pub(crate) note: Option<String>,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, peer: impl Into<String>) -> Self {
        Self { what: what.into(), unit, ours: None, theirs: None, peer: peer.into(), targets: Vec::new(), note: None }
    }

    pub(crate) fn of(mut self, ours: Vec<f64>, theirs: Vec<f64>) -> Self {
        (self.ours, self.theirs) = (Spread::of(ours), Spread::of(theirs));
        self
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.targets.push(target);
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    /// Of fewer rounds than were wanted.
    pub(crate) fn cut(mut self, rounds: Option<u32>) -> Self {
        if let Some(rounds) = rounds {
            let note = self.note.take().map(|note| format!("; {note}")).unwrap_or_default();
            self.note = Some(format!("its time was over after {rounds} rounds{note}"));
        }
        self
    }

    fn ratio(&self) -> Option<f64> {
        Some(self.ours?.median / self.theirs?.median)
    }

    fn reached(&self, target: Target) -> Option<bool> {
        match target {
            Target::Ratio(limit) => self.ratio().map(|ratio| ratio <= limit),
            Target::AtLeast(limit) => self.ratio().map(|ratio| ratio >= limit),
            Target::Median(limit) => self.ours.map(|ours| ours.median <= limit),
            Target::Best(limit) => self.ours.map(|ours| ours.low <= limit),
        }
    }

    fn verdicts(&self) -> Vec<String> {
        let verdict = |target: &Target| {
            let word = match self.reached(*target) {
                Some(true) => "reached",
                Some(false) => "MISSED",
                None => "not measured",
            };
            format!("{} {word}", target.text())
        };
        self.targets.iter().map(verdict).collect()
    }

    fn json(&self, group: &str) -> serde_json::Value {
        let spread = |side: Option<Spread>| side.map(|s| json!({"p10": s.low, "median": s.median, "p90": s.high}));
        let target = |target: &Target| json!({"target": target.text(), "reached": self.reached(*target)});
        json!({"group": group, "what": self.what, "unit": self.unit, "ours": spread(self.ours), "theirs": spread(self.theirs),
            "peer": self.peer, "ratio": self.ratio(), "note": self.note,
            "targets": self.targets.iter().map(target).collect::<Vec<_>>()})
    }
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn range(side: Option<Spread>) -> String {
    match side {
        Some(s) if s.low < s.high => format!("{}..{}", number(s.low), number(s.high)),
        _ => String::new(),
    }
}

/// For people, 80 columns wide.
pub(crate) fn show(groups: &[(&str, Vec<Row>)]) {
    let median = |side: Option<Spread>| side.map_or_else(|| "-".to_owned(), |s| number(s.median));
    for (group, rows) in groups {
        println!("\n{:<34} {:>12} {:>14} {:>16}", group.to_uppercase(), "ours", "peer", "ours/peer");
        for row in rows {
            let what = format!("{}, {}", row.what, row.unit);
            let ratio = row.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            let (ours, theirs) = (median(row.ours), median(row.theirs));
            if what.len() > 34 {
                println!("{what}\n{:34} {ours:>12} {theirs:>14} {ratio:>16}", "");
            } else {
                println!("{what:<34} {ours:>12} {theirs:>14} {ratio:>16}");
            }
            let (ours, theirs) = (range(row.ours), range(row.theirs));
            if !(ours.is_empty() && theirs.is_empty()) {
                println!("  {:<28} {ours:>16} {theirs:>14}", "p10..p90");
            }
            println!("  peer: {}", row.peer);
            row.verdicts().iter().for_each(|verdict| println!("  target: {verdict}"));
            if let Some(note) = &row.note {
                println!("  note: {note}");
            }
        }
    }
}

/// For machines: one object.
pub(crate) fn json(host: &serde_json::Value, groups: &[(&str, Vec<Row>)]) -> serde_json::Value {
    let rows: Vec<_> = groups.iter().flat_map(|(group, rows)| rows.iter().map(move |row| row.json(group))).collect();
    json!({"host": host, "rows": rows})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_the_values_there_are() {
        assert!(Spread::of(Vec::new()).is_none());
        assert!(Spread::of(vec![1.0, 2.0]).unwrap().median == 1.5);
        let one = Spread::of(vec![3.0]).unwrap();
        assert!((one.low, one.median, one.high) == (3.0, 3.0, 3.0));
        let many = Spread::of((0..=10).rev().map(f64::from).collect()).unwrap();
        assert!((many.low, many.median, many.high) == (1.0, 5.0, 9.0));
    }

    #[test]
    fn a_target_needs_both_sides() {
        let row = Row::new("x", "ms", "QEMU").target(Target::Ratio(0.5));
        assert_eq!(row.verdicts(), ["ratio <= 0.5 not measured"]);
        assert_eq!(row.of(vec![1.0], vec![2.0]).verdicts(), ["ratio <= 0.5 reached"]);
    }
}
