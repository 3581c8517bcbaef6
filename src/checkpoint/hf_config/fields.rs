//! A configuration read field by field: what is wrong is collected, and reading goes on with a harmless value.

use serde_json::{Map, Value};

use super::MAX_VOCAB;
use crate::checkpoint::Activation;

pub struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    pub problems: Vec<String>,
}

impl Fields<'_> {
    pub fn problem(&mut self, problem: String) {
        // Some fields are read for more than one thing.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// A field that is present and not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    pub fn count(&mut self, name: &str, most: usize) -> usize {
        match self.get(name).cloned() {
            Some(value) => self.checked_count(name, &value, most),
            None => {
                self.problem(format!("{name}: expected a number from 1 to {most}, found none"));
                1
            }
        }
    }

    pub fn count_or(&mut self, name: &str, most: usize, default: usize) -> usize {
        match self.get(name).cloned() {
            Some(value) => self.checked_count(name, &value, most),
            None => default,
        }
    }

    /// The first of several names that is there.
    pub fn count_of(&mut self, names: [&str; 2], most: usize, default: usize) -> usize {
        let name = names.into_iter().find(|name| self.get(name).is_some()).unwrap_or(names[0]);
        self.count_or(name, most, default)
    }

    /// A number that is absent where the field is absent, null, or not positive (-1 and 0 are how files say so).
    pub fn optional_count(&mut self, name: &str, most: usize) -> Option<usize> {
        if self.get(name)?.as_i64().is_some_and(|count| count < 1) { None } else { Some(self.count(name, most)) }
    }

    fn checked_count(&mut self, name: &str, value: &Value, most: usize) -> usize {
        match value.as_u64().and_then(|count| usize::try_from(count).ok()).filter(|count| (1..=most).contains(count)) {
            Some(count) => count,
            None => {
                self.problem(format!("{name}: expected a number from 1 to {most}, found {value}"));
                1
            }
        }
    }

    pub fn number(&mut self, name: &str) -> Option<f64> {
        let value = self.get(name)?.clone();
        let number = value.as_f64();
        if number.is_none() {
            self.problem(format!("{name}: expected a number, found {value}"));
        }
        number
    }

    pub fn positive(&mut self, name: &str) -> f64 {
        match self.number(name) {
            Some(number) if number.is_finite() && number > 0.0 => number,
            Some(number) => {
                self.problem(format!("{name}: expected a positive number, found {number}"));
                1.0
            }
            None => {
                self.problem(format!("{name}: expected a positive number, found none"));
                1.0
            }
        }
    }

    pub fn positive_or(&mut self, name: &str, default: f64) -> f64 {
        if self.get(name).is_some() { self.positive(name) } else { default }
    }

    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.get(name).cloned() {
            None => default,
            Some(Value::Bool(flag)) => flag,
            Some(other) => {
                self.problem(format!("{name}: expected true or false, found {other}"));
                default
            }
        }
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        let text = self.optional_text(name);
        if text.is_none() && self.get(name).is_none() {
            self.problem(format!("{name}: expected a name, found none"));
        }
        text
    }

    pub fn optional_text(&mut self, name: &str) -> Option<String> {
        match self.get(name).cloned()? {
            Value::String(text) => Some(text),
            other => {
                self.problem(format!("{name}: expected a name, found {other}"));
                None
            }
        }
    }

    pub fn only(&mut self, name: &str, supported: &str) {
        if let Some(found) = self.optional_text(name)
            && found != supported
        {
            self.problem(format!("{name}: expected {supported:?}, found {found:?}"));
        }
    }

    pub fn activation(&mut self, name: &str, default: Activation) -> Activation {
        let Some(found) = self.optional_text(name) else {
            return default;
        };
        Activation::from_name(&found).unwrap_or_else(|| {
            self.problem(format!("{name}: expected one of silu, gelu, gelu_new, gelu_pytorch_tanh, relu, tanh, found {found:?}"));
            default
        })
    }

    /// A token id, which may lie above the vocabulary (old GPT-2 files do that for tokens that never occur).
    pub fn id(&mut self, name: &str) -> Option<u32> {
        let value = self.get(name)?.clone();
        // Some files mark the absence of a pad token by -1.
        if value.as_i64() == Some(-1) {
            return None;
        }
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        if id.is_none() {
            self.problem(format!("{name}: expected a token id, found {value}"));
        }
        id
    }

    pub fn ids(&mut self, name: &str) -> Vec<u32> {
        match self.get(name).cloned() {
            Some(Value::Array(items)) => {
                let ids: Vec<u32> = items.iter().filter_map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
                if ids.len() != items.len() {
                    self.problem(format!("{name}: expected token ids, found {}", Value::Array(items)));
                }
                ids
            }
            _ => self.id(name).into_iter().collect(),
        }
    }

    /// A token id; where the file says nothing of it, the default of the family's class.
    pub fn id_or(&mut self, name: &str, default: Option<u32>) -> Option<u32> {
        if self.map.contains_key(name) { self.id(name) } else { default }
    }

    /// A list of small numbers; empty where there is none.
    pub fn numbers(&mut self, name: &str) -> Vec<usize> {
        let Some(value) = self.get(name).cloned() else { return Vec::new() };
        let numbers = value.as_array().and_then(|items| items.iter().map(|item| item.as_u64()?.try_into().ok()).collect());
        numbers.unwrap_or_else(|| {
            self.problem(format!("{name}: expected a list of numbers, found {value}"));
            Vec::new()
        })
    }

    /// Names, as a list or as one text with bars between them, in lower case.
    pub fn kinds(&mut self, name: &str) -> Vec<String> {
        let kind = |text: &str| text.trim().to_lowercase();
        let value = match self.get(name).cloned() {
            None => return Vec::new(),
            Some(Value::String(text)) => return text.split('|').map(kind).collect(),
            Some(value) => value,
        };
        let kinds = value.as_array().and_then(|items| items.iter().map(|item| item.as_str().map(kind)).collect());
        kinds.unwrap_or_else(|| {
            self.problem(format!("{name}: expected names, found {value}"));
            Vec::new()
        })
    }

    /// A list of positive numbers of this length.
    pub fn positives(&mut self, name: &str, length: usize) -> Vec<f64> {
        let value = self.get(name).cloned().unwrap_or(Value::Null);
        let numbers = value.as_array().map(|items| items.iter().filter_map(Value::as_f64).filter(|x| x.is_finite() && *x > 0.0).collect());
        match numbers {
            Some(numbers) if Vec::len(&numbers) == length => numbers,
            _ => {
                let found = value.as_array().map_or_else(|| value.to_string(), |items| format!("a list of {}", items.len()));
                self.problem(format!("{name}: expected a list of {length} positive numbers, found {found}"));
                vec![1.0; length]
            }
        }
    }

    /// A switch that must stand as the forward pass has it.
    pub fn must_be(&mut self, name: &str, expected: bool, why: &str) {
        if self.flag(name, expected) != expected {
            self.problem(format!("{name}: expected {expected}, found {}: {why}", !expected));
        }
    }

    /// Whether each layer slides, from `layer_types`.
    pub fn layer_types(&mut self, layers: usize) -> Option<Vec<bool>> {
        let Value::Array(items) = self.get("layer_types")?.clone() else {
            self.problem("layer_types: expected a list".to_owned());
            return None;
        };
        if items.len() != layers {
            self.problem(format!("layer_types: expected one entry for each of the {layers} layers, found {}", items.len()));
        }
        let mut sliding = Vec::with_capacity(layers);
        for item in items.iter().take(layers) {
            match item.as_str() {
                Some("full_attention") => sliding.push(false),
                Some("sliding_attention") => sliding.push(true),
                _ => self.problem(format!("layer_types: expected full_attention or sliding_attention, found {item}")),
            }
        }
        sliding.resize(layers, false);
        Some(sliding)
    }

    pub fn labels(&mut self) -> Option<usize> {
        if self.get("num_labels").is_some() {
            return Some(self.count("num_labels", MAX_VOCAB));
        }
        match self.get("id2label") {
            Some(Value::Object(labels)) => Some(labels.len()),
            _ => None,
        }
    }
}
