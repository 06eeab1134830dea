//! The table as JSON Schema (draft 2020-12), for editors and programs.

use serde_json::{Map, Value, json};

use super::{Key, Kind, Rule, TABLES, Table, Without};

/// Names of machines and devices, as `check::name` has them.
const NAME: &str = "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}$";
/// Sizes, as `size::parse` has them.
const SIZE: &str = "^[0-9]+[KMGTkmgt]$";

/// The schema.
#[must_use]
pub fn schema() -> Value {
    let properties: Map<String, Value> = TABLES.iter().map(|table| (table.name.to_owned(), property(table))).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Outboard machine file",
        "type": "object",
        "properties": properties,
        "required": ["machine"],
        "additionalProperties": false,
    })
}

fn property(table: &Table) -> Value {
    if !table.named {
        return object(table);
    }
    json!({"type": "object", "propertyNames": {"pattern": NAME}, "additionalProperties": object(table)})
}

fn object(table: &Table) -> Value {
    let keys: Map<String, Value> = table.keys.iter().map(|key| (key.name.to_owned(), value(key))).collect();
    let required: Vec<&str> = table.keys.iter().filter(|key| key.without == Without::Required).map(|key| key.name).collect();
    let mut object = json!({"type": "object", "properties": keys, "required": required, "additionalProperties": false});
    let rules: Vec<Value> = table.rules.iter().map(rule).collect();
    if !rules.is_empty() {
        object["allOf"] = rules.into();
    }
    object
}

fn value(key: &Key) -> Value {
    let mut value = match key.kind {
        Kind::Path | Kind::ChoiceOrPath(_) => json!({"type": "string", "minLength": 1}),
        Kind::Text(None) => json!({"type": "string"}),
        Kind::Text(Some(most)) => json!({"type": "string", "maxLength": most}),
        Kind::Name => json!({"type": "string", "pattern": NAME}),
        Kind::Size => json!({"type": "string", "pattern": SIZE}),
        Kind::Bool => json!({"type": "boolean"}),
        Kind::Number(least, most) => json!({"type": "integer", "minimum": least, "maximum": most}),
        Kind::Chain(formats) => json!({"type": "array", "items": {
            "type": "object",
            "properties": {"path": {"type": "string", "minLength": 1}, "format": {"type": "string", "enum": formats}},
            "required": ["path", "format"],
            "additionalProperties": false,
        }}),
        Kind::Choice(words) => json!({"type": "string", "enum": words}),
    };
    value["description"] = key.about.into();
    if let Without::Default(text) = key.without {
        // As it would be written in TOML, which for these is JSON, too.
        value["default"] = serde_json::from_str(text).unwrap_or_default();
    }
    value
}

fn rule(rule: &Rule) -> Value {
    match rule {
        Rule::Needs(key, other) => json!({"dependentRequired": {*key: [other]}}),
        Rule::OneOf(one, other) => json!({"oneOf": [{"required": [one]}, {"required": [other]}]}),
        Rule::Only { key, words, other } => json!({
            "if": {"properties": {*key: {"enum": words}}, "required": [key]},
            "then": {"required": [other]},
            "else": {"not": {"required": [other]}},
        }),
    }
}
