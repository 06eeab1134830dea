//! The schema, the parser and the documents say the same.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::json::schema;
use super::page::page;
use super::*;
use crate::machine::file;

/// As much of JSON Schema as ours uses. A word it does not know is a mistake.
fn accepts(schema: &Value, value: &Value) -> bool {
    let all = |value: &Value, with: &dyn Fn(&Value) -> bool| value.as_array().unwrap().iter().all(with);
    let has = |name: &Value| value.get(name.as_str().unwrap()).is_some();
    let members = || value.as_object().into_iter().flatten();
    schema.as_object().unwrap().iter().all(|(word, with)| match word.as_str() {
        "$schema" | "title" | "description" | "default" | "then" | "else" => true,
        "type" => match with.as_str().unwrap() {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            other => panic!("{other}"),
        },
        "properties" => members().all(|(key, value)| with.get(key).is_none_or(|schema| accepts(schema, value))),
        "additionalProperties" => {
            let own = schema.get("properties");
            let mut others = members().filter(|(key, _)| own.is_none_or(|own| own.get(key).is_none()));
            if with.is_boolean() { others.next().is_none() } else { others.all(|(_, value)| accepts(with, value)) }
        }
        "items" => value.as_array().into_iter().flatten().all(|item| accepts(with, item)),
        "propertyNames" => members().all(|(key, _)| accepts(with, &Value::from(key.as_str()))),
        "required" => all(with, &has),
        "enum" => with.as_array().unwrap().contains(value),
        "pattern" => matches(with.as_str().unwrap(), value.as_str().unwrap_or_default()),
        "minLength" => value.as_str().is_some_and(|text| text.len() as u64 >= with.as_u64().unwrap()),
        "maxLength" => value.as_str().is_some_and(|text| text.len() as u64 <= with.as_u64().unwrap()),
        "minimum" => value.as_i64().is_some_and(|number| number >= with.as_i64().unwrap()),
        "maximum" => value.as_i64().is_some_and(|number| number <= with.as_i64().unwrap()),
        "allOf" => all(with, &|schema| accepts(schema, value)),
        "oneOf" => with.as_array().unwrap().iter().filter(|schema| accepts(schema, value)).count() == 1,
        "not" => !accepts(with, value),
        "dependentRequired" => with.as_object().unwrap().iter().all(|(key, needs)| value.get(key).is_none() || all(needs, &has)),
        "if" => accepts(&schema[if accepts(with, value) { "then" } else { "else" }], value),
        other => panic!("the test does not know {other}"),
    })
}

/// The two patterns of ours: characters in classes, each with a number of repetitions.
fn matches(pattern: &str, text: &str) -> bool {
    let name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if pattern.starts_with("^[A-Za-z0-9_-]") {
        return !text.is_empty() && text.len() <= 40 && !text.starts_with('.') && text.chars().all(name);
    }
    assert_eq!(pattern, "^[0-9]+[KMGTkmgt]$");
    let number = text.strip_suffix(|c| "KMGTkmgt".contains(c)).unwrap_or_default();
    !number.is_empty() && number.chars().all(|c| c.is_ascii_digit())
}

/// What both say of a text.
fn verdict(text: &str) -> (bool, bool) {
    let parsed = file::look(text, "m.toml", Path::new("/vm"));
    let json: Value = serde_json::to_value(toml::from_str::<toml::Table>(text).unwrap()).unwrap();
    (parsed.is_ok(), accepts(&schema(), &json))
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

#[test]
fn every_machine_file_in_the_documents_is_one() {
    let mut pages: Vec<PathBuf> = fs::read_dir(docs()).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.push(docs().join("../README.md"));
    let mut found = 0;
    for page in pages.iter().filter(|page| page.extension().is_some_and(|end| end == "md")) {
        let text = fs::read_to_string(page).unwrap();
        for example in text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            // Some pages show one table; a machine goes with it.
            let whole =
                if example.contains("[machine]") { example.to_owned() } else { format!("[machine]\nkernel = \"k\"\n{example}") };
            assert_eq!(verdict(&whole), (true, true), "{}:\n{example}", page.display());
            found += 1;
        }
    }
    assert!(found >= 2);
}

#[test]
fn the_schema_and_the_parser_agree_on_every_key() {
    let mut samples: Vec<String> =
        ["\"\"", "\"x\"", "\"512M\"", "\"12\"", "true", "0", "1", "64", "65", "300", "-1", "1.5", "[1]", "\".x\""]
            .map(str::to_owned)
            .to_vec();
    samples.push(format!("\"{}\"", "x".repeat(41)));
    samples.push("[]".to_owned());
    for link in
        ["path = \"b\", format = \"raw\"", "path = \"b\"", "path = \"\", format = \"raw\"", "path = \"b\", format = \"vmdk\""]
    {
        samples.push(format!("[{{ {link} }}]"));
    }
    let (mut good, mut bad) = (0, 0);
    for table in &TABLES {
        let choices = table.keys.iter().filter_map(|key| match key.kind {
            Kind::Choice(words) | Kind::ChoiceOrPath(words) => Some(words),
            _ => None,
        });
        let words: Vec<String> = choices.flatten().map(|word| format!("\"{word}\"")).collect();
        for key in table.keys {
            for value in samples.iter().chain(&words) {
                for more in ["", "path = \"p\"\n", "max-bytes = 5\n", "class = \"fs\"\n", "queues = 1\n", "limit-ops = 5\n"] {
                    if more.starts_with(&format!("{} =", key.name)) {
                        continue;
                    }
                    let machine =
                        "[machine]\nkernel = \"k\"\n".replace(if key.name == "kernel" { "kernel = \"k\"\n" } else { "!" }, "");
                    let required = if table.name == "device" && key.name != "socket" { "socket = \"s\"\n" } else { "" };
                    let heading = if table.named { table.heading("x") } else { String::new() };
                    let text = format!("{machine}{heading}\n{} = {value}\n{required}{more}", key.name);
                    let (parser, schema) = verdict(&text);
                    assert_eq!(parser, schema, "the parser says {parser}, the schema {schema}:\n{text}");
                    if parser { good += 1 } else { bad += 1 }
                }
            }
        }
    }
    assert!(good > 100 && bad > 100, "{good} {bad}");
}

#[test]
fn both_refuse_what_is_in_no_table() {
    for text in [
        "",
        "[machine]\n",
        "[machine]\nkernel = \"k\"\n[disks.a]\n",
        "[machine]\nkernel = \"k\"\n[disk.\"a b\"]\npath = \"p\"\n",
        "[machine]\nkernel = \"k\"\ncolour = 1\n",
    ] {
        assert_eq!(verdict(text), (false, false), "{text}");
    }
}

/// `OUTBOARD_UPDATE=1 cargo test -p outboard reference` writes it anew.
#[test]
fn the_reference_in_the_documents_is_that_of_the_schema() {
    const BEGIN: &str = "<!-- from here: outboard schema --markdown -->\n\n";
    const END: &str = "\n<!-- to here -->";
    let path = docs().join("machine-file.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (reference, after) = rest.split_once(END).unwrap();
    if std::env::var_os("OUTBOARD_UPDATE").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", page())).unwrap();
        return;
    }
    assert_eq!(reference, page(), "write it anew: OUTBOARD_UPDATE=1 cargo test -p outboard reference");
}
