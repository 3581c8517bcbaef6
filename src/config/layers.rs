//! Where values come from: each source becomes a layer of texts with their origin, and the nearer layer wins.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_norway::Value;

use super::settings::{FILE_VARIABLE, SETTINGS, find};

/// Who said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File(PathBuf),
    Variable(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "${name}"),
            Self::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// A value as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub text: String,
    pub origin: Origin,
}

/// One mistake: where it was made, and what it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct ConfigError {
    pub place: String,
    pub problem: String,
}

/// Values by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Layer(pub BTreeMap<&'static str, Given>);

impl Layer {
    pub(super) fn defaults() -> Self {
        let given = |text: &str| Given { text: text.to_owned(), origin: Origin::Default };
        Self(SETTINGS.iter().map(|setting| (setting.key, given(setting.default))).collect())
    }

    /// This layer under `nearer`, which wins.
    pub(super) fn under(mut self, nearer: Self) -> Self {
        self.0.extend(nearer.0);
        self
    }
}

/// A configuration file: its settings, and the recipe that stands in it.
#[derive(Clone, Debug, Default)]
pub(super) struct FileLayer {
    pub layer: Layer,
    /// The `model:` section as YAML.
    pub recipe: Option<String>,
}

pub(super) fn file(path: &Path, text: &str, errors: &mut Vec<ConfigError>) -> FileLayer {
    let mut read = FileLayer::default();
    let mut refuse = |place: &str, problem: String| {
        let place = if place.is_empty() { path.display().to_string() } else { format!("{}: {place}", path.display()) };
        errors.push(ConfigError { place, problem });
    };
    let sections = match serde_norway::from_str::<Value>(text) {
        Ok(Value::Mapping(sections)) => sections,
        Ok(Value::Null) => return read,
        Ok(_) => {
            refuse("", "expected a mapping of settings".to_owned());
            return read;
        }
        Err(error) => {
            refuse("", format!("expected YAML: {error}"));
            return read;
        }
    };
    // An explicit stack of (prefix, mapping): sections are one level deep, anything deeper is an unknown key.
    let mut pending = vec![(String::new(), sections)];
    while let Some((prefix, mapping)) = pending.pop() {
        for (key, value) in mapping {
            let Value::String(name) = key else {
                refuse(&prefix, "expected keys that are words".to_owned());
                continue;
            };
            let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            match value {
                value if key == "model" => match serde_norway::to_string(&value) {
                    Ok(recipe) => read.recipe = Some(recipe),
                    Err(error) => refuse(&key, error.to_string()),
                },
                Value::Mapping(inner) if prefix.is_empty() && is_section(&key) => pending.push((key, inner)),
                // What a recipe may say in several values, a setting holds as JSON, which is YAML too.
                Value::Mapping(_) if STRUCTURED.contains(&key.as_str()) => match serde_json::to_string(&value) {
                    Ok(text) => _ = read.layer.0.insert(key_of(&key), Given { text, origin: Origin::File(path.to_owned()) }),
                    Err(error) => refuse(&key, error.to_string()),
                },
                Value::Sequence(ref names) if LISTS.contains(&key.as_str()) => match names.iter().map(scalar).collect::<Option<Vec<_>>>() {
                    Some(names) => {
                        let text = format!("[{}]", names.join(", "));
                        read.layer.0.insert(key_of(&key), Given { text, origin: Origin::File(path.to_owned()) });
                    }
                    None => refuse(&key, "expected a list of words".to_owned()),
                },
                value => match (find(&key), scalar(&value)) {
                    (None, _) => refuse(&key, unknown(&key, SETTINGS.iter().map(|setting| setting.key.to_owned()))),
                    (Some(_), None) => refuse(&key, "expected a single value".to_owned()),
                    (Some(setting), Some(text)) => {
                        read.layer.0.insert(setting.key, Given { text, origin: Origin::File(path.to_owned()) });
                    }
                },
            }
        }
    }
    read
}

/// The variables that begin with `WARM_`; one that names no setting is a mistake.
pub(super) fn environment(variables: &[(String, String)], errors: &mut Vec<ConfigError>) -> Layer {
    let mut layer = Layer::default();
    for (name, text) in variables.iter().filter(|(name, _)| name.starts_with("WARM_") && name != FILE_VARIABLE) {
        match SETTINGS.iter().find(|setting| setting.variable() == *name) {
            Some(setting) => {
                layer.0.insert(setting.key, Given { text: text.clone(), origin: Origin::Variable(name.clone()) });
            }
            None => {
                let names = SETTINGS.iter().map(|setting| setting.variable());
                errors.push(ConfigError { place: format!("${name}"), problem: unknown(name, names) });
            }
        }
    }
    layer
}

/// Flags, as key and value.
pub(super) fn flags(flags: &[(String, String)], errors: &mut Vec<ConfigError>) -> Layer {
    let mut layer = Layer::default();
    for (key, text) in flags {
        match find(key) {
            Some(setting) => {
                layer.0.insert(setting.key, Given { text: text.clone(), origin: Origin::Flag(setting.flag()) });
            }
            None => errors.push(ConfigError { place: format!("--{key}"), problem: "no such setting".to_owned() }),
        }
    }
    layer
}

/// Settings that may hold more than one value.
const STRUCTURED: [&str; 2] = ["head", "pooling"];

/// Settings that may hold a list of words.
const LISTS: [&str; 1] = ["device"];

fn key_of(key: &str) -> &'static str {
    find(key).map_or("", |setting| setting.key)
}

fn is_section(name: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.key.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(true) => Some("true".to_owned()),
        // YAML 1.1 readers and people write `off`; as a word it stays a word, as a boolean it means the same.
        Value::Bool(false) => Some("off".to_owned()),
        _ => None,
    }
}

/// Says so, and names the nearest known name where one is near.
fn unknown(name: &str, known: impl Iterator<Item = String>) -> String {
    let nearest = known.map(|known| (distance(name, &known), known)).min();
    match nearest {
        Some((distance, known)) if distance <= 3 => format!("no such setting; did you mean `{known}`?"),
        _ => "no such setting".to_owned(),
    }
}

/// Edit distance, on short names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(256).enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = substituted.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
