//! The fields of a recipe, read one by one; what is wrong is collected, and reading goes on.

use std::path::{Path, PathBuf};

use serde_norway::{Mapping, Value};

use crate::checkpoint::remote;

pub(super) fn check_keys(mapping: &Mapping, place: &str, known: &[&str], problems: &mut Vec<String>) {
    for key in mapping.keys() {
        match key.as_str() {
            Some(key) if known.contains(&key) => {}
            Some(key) => problems.push(format!("{}: unknown key, expected one of {}", at(place, key), known.join(", "))),
            None => problems.push(format!("{}: a key is {}, expected one of {}", at(place, "?"), kind(key), known.join(", "))),
        }
    }
}

/// The settings of a method under its name.
pub(super) fn section<'v>(recipe: &'v Mapping, name: &str, known: &[&str], problems: &mut Vec<String>) -> Option<&'v Mapping> {
    match recipe.get(name)? {
        Value::Mapping(section) => {
            check_keys(section, name, known, problems);
            Some(section)
        }
        other => {
            problems.push(format!("{name}: expected {{{}}}, found {}", known.join(", "), kind(other)));
            None
        }
    }
}

pub(super) fn choice<T: Copy>(mapping: &Mapping, place: &str, key: &str, choices: &[(&str, T)], problems: &mut Vec<String>) -> Option<T> {
    let found = text(mapping, place, key, problems)?;
    let chosen = choices.iter().find(|(name, _)| *name == found).map(|(_, choice)| *choice);
    if chosen.is_none() {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        problems.push(format!("{}: {found:?} is unknown, expected one of {}", at(place, key), names.join(", ")));
    }
    chosen
}

pub(super) fn number(mapping: &Mapping, place: &str, key: &str, problems: &mut Vec<String>) -> Option<f64> {
    let value = mapping.get(key)?;
    let number = value.as_f64().filter(|number| number.is_finite());
    if number.is_none() {
        problems.push(format!("{}: expected a finite number, found {}", at(place, key), kind(value)));
    }
    number
}

pub(super) fn required(mapping: &Mapping, place: &str, key: &str, problems: &mut Vec<String>) -> Option<f64> {
    if !mapping.contains_key(key) {
        problems.push(format!("{}: missing, expected a number", at(place, key)));
    }
    number(mapping, place, key, problems)
}

pub(super) fn flag(mapping: &Mapping, place: &str, key: &str, problems: &mut Vec<String>) -> Option<bool> {
    let value = mapping.get(key)?;
    let flag = value.as_bool();
    if flag.is_none() {
        problems.push(format!("{}: expected true or false, found {}", at(place, key), kind(value)));
    }
    flag
}

pub(super) fn text(mapping: &Mapping, place: &str, key: &str, problems: &mut Vec<String>) -> Option<String> {
    match mapping.get(key)? {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        other => {
            problems.push(format!("{}: expected text, found {}", at(place, key), kind(other)));
            None
        }
    }
}

pub(super) fn path(mapping: &Mapping, place: &str, key: &str, base: &Path, problems: &mut Vec<String>) -> Option<PathBuf> {
    text(mapping, place, key, problems).map(|path| remote::join(base, &path))
}

fn at(place: &str, key: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") }
}

pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) if value.is_empty() => "empty text".to_owned(),
        Value::String(value) => format!("{:?}", value.chars().take(60).collect::<String>()),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Tagged(_) => "a tagged value".to_owned(),
    }
}
