//! The text of a machine file, held against the schema: tables of checked values, or all that is wrong with it.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;
use crate::machine::nearest::nearest;
use crate::machine::schema::{Key, Kind, Rule, TABLES, Table, Without};
use crate::machine::{check, size};

/// A table of the file, every value as the schema wants it.
#[derive(Debug)]
pub(super) struct Values {
    /// Which of the schema's tables it is.
    pub(super) kind: &'static str,
    /// Its own name.
    pub(super) name: String,
    /// Where it begins.
    pub(super) line: usize,
    at: usize,
    values: BTreeMap<&'static str, (usize, Value)>,
}

#[derive(Debug)]
enum Value {
    Text(String),
    Number(u32),
    Bool(bool),
    Chain(Vec<(String, String)>),
}

impl Values {
    pub(super) fn text(&self, key: &str) -> Option<String> {
        match self.values.get(key)? {
            (_, Value::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    pub(super) fn number(&self, key: &str) -> Option<u32> {
        match self.values.get(key)? {
            (_, Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Images: where each is, and its format.
    pub(super) fn chain(&self, key: &str) -> Vec<(String, String)> {
        match self.values.get(key) {
            Some((_, Value::Chain(links))) => links.clone(),
            _ => Vec::new(),
        }
    }

    pub(super) fn yes(&self, key: &str) -> bool {
        matches!(self.values.get(key), Some((_, Value::Bool(true))))
    }

    pub(super) fn is(&self, key: &str, word: &str) -> bool {
        matches!(self.values.get(key), Some((_, Value::Text(text))) if text == word)
    }

    /// Where its keys stand.
    pub(super) fn lines(&self) -> impl Iterator<Item = (String, usize)> {
        self.values.iter().map(|(key, (line, _))| ((*key).to_owned(), *line))
    }
}

/// All tables in the order of the file, or all that is wrong, in that order, too.
pub(super) fn read(text: &str) -> Result<Vec<Values>, Vec<Problem>> {
    let mut reader = Reader { text, problems: Vec::new() };
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let at = error.span().unwrap_or_default();
        let first = error.message().lines().next().unwrap_or_default();
        reader.problem(&at, format!("{}{}", capital(first), reader.section(&at)));
    }
    // What is left of text that is no TOML would only bring mistakes that are none.
    let mut tables = if reader.problems.is_empty() { reader.tables(root.get_ref()) } else { Vec::new() };
    tables.sort_by_key(|table| table.at);
    reader.problems.sort();
    reader.problems.dedup();
    if reader.problems.is_empty() { Ok(tables) } else { Err(reader.problems) }
}

struct Reader<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn line(&self, at: &Range<usize>) -> usize {
        self.text.bytes().take(at.start).filter(|byte| *byte == b'\n').count() + 1
    }

    fn problem(&mut self, at: &Range<usize>, says: String) {
        let line = self.line(at);
        self.problems.push(Problem { line, says });
    }

    /// " in [disk.root]": the table that a place belongs to.
    fn section(&self, at: &Range<usize>) -> String {
        let lines = self.text.lines().take(self.line(at)).map(str::trim);
        let heading = lines.filter(|line| line.starts_with('[')).last();
        let name = heading.and_then(|heading| heading.trim_start_matches('[').split(']').next());
        name.map_or_else(String::new, |name| format!(" in [{}]", name.trim()))
    }

    fn tables(&mut self, root: &DeTable<'_>) -> Vec<Values> {
        let mut tables = Vec::new();
        for (name, value) in root {
            let Some(table) = TABLES.iter().find(|table| table.name == name.get_ref()) else {
                let known: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
                self.problem(&name.span(), format!("Unknown table `{}`{}", name.get_ref(), meant(name.get_ref(), &known)));
                continue;
            };
            let inner = value.get_ref().as_table();
            let Some(inner) = inner else {
                self.problem(&name.span(), format!("`{}` is a table: write {}", table.name, table.heading("NAME")));
                continue;
            };
            if table.named {
                tables.extend(inner.iter().filter_map(|(name, value)| self.named(table, name, value)));
            } else {
                tables.push(self.table(table, table.name, &value.span(), inner));
            }
        }
        if !root.keys().any(|name| name.get_ref() == "machine") {
            self.problems.push(Problem { line: 0, says: "The machine file needs a table [machine]".to_owned() });
        }
        tables
    }

    fn named(
        &mut self,
        table: &'static Table,
        name: &Spanned<std::borrow::Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
    ) -> Option<Values> {
        let Some(inner) = value.get_ref().as_table() else {
            let says = format!("`{}` is in no {}: write {} above it", name.get_ref(), table.name, table.heading("NAME"));
            self.problem(&name.span(), says);
            return None;
        };
        if let Err(error) = check::name(name.get_ref(), "device") {
            self.problem(&name.span(), error.to_string());
        }
        Some(self.table(table, name.get_ref(), &value.span(), inner))
    }

    fn table(&mut self, table: &'static Table, name: &str, at: &Range<usize>, inner: &DeTable<'_>) -> Values {
        let heading = table.heading(name);
        let mut values = BTreeMap::new();
        for (key, value) in inner {
            let Some(known) = table.key(key.get_ref()) else {
                let names: Vec<&str> = table.keys.iter().map(|key| key.name).collect();
                self.problem(
                    &key.span(),
                    format!("Unknown key `{}` in {heading}{}", key.get_ref(), meant(key.get_ref(), &names)),
                );
                continue;
            };
            match checked(known, value.get_ref(), &heading) {
                Ok(value_read) => drop(values.insert(known.name, (self.line(&key.span()), value_read))),
                Err(says) => self.problem(&value.span(), says),
            }
        }
        let has = |name: &str| inner.keys().any(|key| key.get_ref() == name);
        for key in table.keys.iter().filter(|key| key.without == Without::Required && !has(key.name)) {
            self.problem(at, format!("{heading} needs `{}`", key.name));
        }
        let values = Values { kind: table.name, name: name.to_owned(), line: self.line(at), at: at.start, values };
        for rule in table.rules {
            if let Some(says) = broken(rule, &values, has) {
                self.problem(at, format!("{heading} {says}"));
            }
        }
        values
    }
}

/// A value as the schema wants it, or what is wrong with it.
fn checked(key: &Key, value: &DeValue<'_>, heading: &str) -> Result<Value, String> {
    let wrong = || format!("`{}` in {heading} must be {}, not {}", key.name, key.kind.words(), shown(value));
    match (key.kind, value) {
        (Kind::Bool, DeValue::Boolean(yes)) => Ok(Value::Bool(*yes)),
        (Kind::Number(least, most), DeValue::Integer(number)) => {
            let number = u32::from_str_radix(number.as_str(), number.radix()).ok();
            number.filter(|number| (least..=most).contains(number)).map(Value::Number).ok_or_else(wrong)
        }
        (Kind::Chain(formats), DeValue::Array(links)) => {
            let links = links.iter().map(|link| self::link(link.get_ref(), formats));
            links.collect::<Option<_>>().map(Value::Chain).ok_or_else(|| {
                let formats = Kind::Choice(formats).words();
                format!(
                    "Each image of `{}` in {heading} must have a `path` and a `format`, which is {formats}, and nothing else",
                    key.name
                )
            })
        }
        (kind, DeValue::String(text)) => {
            word(kind, text, heading).map(|()| Value::Text(text.clone().into_owned())).map_err(|says| says.unwrap_or_else(wrong))
        }
        _ => Err(wrong()),
    }
}

/// One image of a chain.
fn link(value: &DeValue<'_>, formats: &[&str]) -> Option<(String, String)> {
    let table = value.as_table().filter(|table| table.len() == 2)?;
    let text = |key: &str| table.get(key).and_then(|value| value.get_ref().as_str());
    let path = text("path").filter(|path| word(Kind::Path, path, "").is_ok())?;
    let format = text("format").filter(|format| formats.contains(format))?;
    Some((path.to_owned(), format.to_owned()))
}

/// Whether a text is what this kind wants. The error is a sentence where there is a better one than the usual.
fn word(kind: Kind, text: &str, heading: &str) -> Result<(), Option<String>> {
    let usual = |good: bool| if good { Ok(()) } else { Err(None) };
    match kind {
        Kind::Path | Kind::ChoiceOrPath(_) => usual(!text.is_empty() && !text.contains('\0')),
        Kind::Text(most) => {
            usual(most.is_none_or(|most| text.len() <= usize::try_from(most).unwrap_or(usize::MAX)) && !text.contains('\0'))
        }
        Kind::Name => check::name(text, "machine").map_err(|error| Some(error.to_string())),
        Kind::Size => size::parse(text).map(drop).map_err(|error| Some(error.to_string())),
        Kind::Choice(words) if words.contains(&text) => Ok(()),
        Kind::Choice(words) => Err(Some(format!("Unknown value `{text}` in {heading}{}", meant(text, words)))),
        Kind::Bool | Kind::Number(..) | Kind::Chain(_) => Err(None),
    }
}

/// What is wrong, if a rule does not hold.
fn broken(rule: &Rule, values: &Values, has: impl Fn(&str) -> bool) -> Option<String> {
    match rule {
        Rule::Needs(key, other) => (has(key) && !has(other)).then(|| format!("has `{key}` and no `{other}` to go with it")),
        Rule::OneOf(one, other) => (has(one) == has(other)).then(|| format!("needs either `{one}` or `{other}`")),
        Rule::Only { key, words, other } => {
            let is = words.iter().any(|word| values.is(key, word));
            // A value that is wrong was told of already, and says nothing about its neighbour.
            let known = is || !has(key) || values.text(key).is_some();
            match (is, has(other)) {
                (true, false) => Some(format!("needs a `{other}`")),
                (false, true) if known => Some(format!("has a `{other}`, but its {key} is no {}", words.join(" and no "))),
                _ => None,
            }
        }
    }
}

fn shown(value: &DeValue<'_>) -> String {
    /// Of a value that is quoted back.
    const MOST: usize = 40;
    let text = match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(yes) => yes.to_string(),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    };
    if text.chars().count() > MOST { text.chars().take(MOST).chain("...".chars()).collect() } else { text }
}

/// "; did you mean ...": what a word that is not known was probably to be.
fn meant(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(near) => format!("; did you mean `{near}`?"),
        None => format!("; known are {}", known.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")),
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
