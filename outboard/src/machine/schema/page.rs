//! The table as the reference in `docs/machine-file.md`.

use super::{Key, Kind, TABLES, Table, Without};

/// The reference, in Markdown. Sections follow the order of the table.
#[must_use]
pub fn page() -> String {
    TABLES.iter().map(section).collect::<Vec<_>>().join("\n")
}

fn section(table: &Table) -> String {
    let mut text = format!("## `{}`\n\n", table.heading("NAME"));
    if !table.about.is_empty() {
        text.push_str(&format!("{}\n\n", fill(table.about)));
    }
    text.push_str("| key | value | without it |\n|---|---|---|\n");
    text.extend(table.keys.iter().map(|key| row(table, key)));
    for paragraph in table.notes.split("\n\n").filter(|paragraph| !paragraph.is_empty()) {
        text.push_str(&format!("\n{}\n", fill(paragraph)));
    }
    text
}

fn row(table: &Table, key: &Key) -> String {
    let words = |words: &[&str]| words.iter().map(|word| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", ");
    let kind = match key.kind {
        Kind::Size => "number and unit `K`, `M`, `G` or `T`, such as `\"512M\"`".to_owned(),
        Kind::Choice(choices) => words(choices),
        Kind::ChoiceOrPath(choices) => format!("{}, or a path", words(choices)),
        Kind::Chain(_) => "a list of images such as `[{ path = \"base.img\", format = \"raw\" }]`".to_owned(),
        Kind::Name => "a name, see above".to_owned(),
        kind => kind.words(),
    };
    let without = match key.without {
        Without::Required => "required".to_owned(),
        Without::Default(text) => format!("`{text}`"),
        Without::Words(text) => text.to_owned(),
    };
    let rules: String = table.rules.iter().map(|rule| rule.words(key.name)).collect();
    format!("| `{}` | {kind}: {}{rules} | {without} |\n", key.name, key.about)
}

impl super::Rule {
    /// What it means for a key.
    fn words(&self, name: &str) -> String {
        match self {
            Self::Needs(key, other) if *key == name => format!("; only with `{other}`"),
            Self::OneOf(key, other) if *key == name => format!("; either this or `{other}`"),
            Self::Only { key, words, other } if *other == name => {
                let words: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
                format!("; required where `{key}` is {}, and only there", words.join(" or "))
            }
            _ => String::new(),
        }
    }
}

/// Breaks lines as the documents have them.
fn fill(text: &str) -> String {
    const WIDTH: usize = 125;
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        if lines.last().is_some_and(|line| !line.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH) {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join("\n")
}
