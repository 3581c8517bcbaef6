//! What two tokenizers must share to make the same tokens of every text, as one hash for each part.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Keys of a model that mean the same absent, null and false.
const OFF_BY_DEFAULT: [&str; 6] = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"];

type Hash = [u8; 32];

/// The parts that are compared, each with the name it has in a sentence.
pub(super) struct Parts {
    named: Vec<(&'static str, Hash)>,
    templates: BTreeMap<String, Hash>,
    special_tokens: BTreeMap<String, String>,
}

impl Parts {
    /// `post_processor` is the one in force, which may not be the tokenizer's own.
    pub(super) fn new(
        tokenizer: &Map<String, Value>,
        post_processor: &Value,
        config: &Map<String, Value>,
        templates: &BTreeMap<String, String>,
        special_tokens: &BTreeMap<String, String>,
    ) -> Self {
        let model = tokenizer.get("model").and_then(Value::as_object);
        let part = |name: &str| value_hash(tokenizer.get(name).unwrap_or(&Value::Null));
        let merges = model.and_then(|model| model.get("merges")).map_or(Value::Null, canonical_merges);
        let vocabulary = model.and_then(|model| model.get("vocab")).unwrap_or(&Value::Null);
        let type_ids = super::uses_type_ids(config);
        let named = vec![
            ("vocabulary", value_hash(vocabulary)),
            ("merges", value_hash(&merges)),
            ("tokenizer model settings", value_hash(&model_settings(model))),
            ("added tokens", value_hash(&added_tokens(tokenizer.get("added_tokens"), config))),
            ("normaliser", part("normalizer")),
            ("pre-tokeniser", part("pre_tokenizer")),
            ("post-processor", value_hash(&canonical_post_processor(post_processor))),
            ("use of token type ids", value_hash(&Value::Bool(type_ids))),
        ];
        let templates = templates.iter().map(|(name, text)| (name.clone(), *blake3::hash(text.as_bytes()).as_bytes())).collect();
        Self { named, templates, special_tokens: special_tokens.clone() }
    }

    pub(super) fn hash(&self) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"warm text facts 1");
        for (_, hash) in &self.named {
            hasher.update(hash);
        }
        hasher.update(&(self.templates.len() as u64).to_le_bytes());
        for (name, hash) in &self.templates {
            update_text(&mut hasher, name);
            hasher.update(hash);
        }
        for (name, token) in &self.special_tokens {
            update_text(&mut hasher, name);
            update_text(&mut hasher, token);
        }
        *hasher.finalize().as_bytes()
    }

    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let named = self
            .named
            .iter()
            .zip(&other.named)
            .filter(|(a, b)| a.1 != b.1)
            .map(|((name, _), _)| format!("the tokenizers differ in {name}"));
        let names = |a: &BTreeMap<String, Hash>, b: &BTreeMap<String, Hash>| {
            a.keys().chain(b.keys()).cloned().collect::<std::collections::BTreeSet<_>>()
        };
        let templates = names(&self.templates, &other.templates).into_iter().filter_map(|name| {
            match (self.templates.get(&name), other.templates.get(&name)) {
                (Some(a), Some(b)) if a == b => None,
                (Some(_), Some(_)) => Some(format!("the chat template `{name}` differs")),
                (Some(_), None) => Some(format!("only the first has a chat template `{name}`")),
                _ => Some(format!("only the second has a chat template `{name}`")),
            }
        });
        let tokens: std::collections::BTreeSet<_> = self.special_tokens.keys().chain(other.special_tokens.keys()).collect();
        let shown = |token: Option<&String>| token.map_or("none".to_owned(), |token| format!("{token:?}"));
        let tokens = tokens.into_iter().filter_map(|name| {
            let (a, b) = (self.special_tokens.get(name), other.special_tokens.get(name));
            (a != b).then(|| format!("the special token `{name}` differs: {} and {}", shown(a), shown(b)))
        });
        named.chain(templates).chain(tokens).collect()
    }
}

fn update_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

/// A hash that does not depend on the order of an object's keys.
fn value_hash(value: &Value) -> Hash {
    let mut hasher = blake3::Hasher::new();
    update_value(&mut hasher, value);
    *hasher.finalize().as_bytes()
}

/// The recursion is bounded by the JSON parser's own limit of 128 levels.
fn update_value(hasher: &mut blake3::Hasher, value: &Value) {
    let mut tag = |kind: u8, len: usize| {
        let mut head = [kind; 9];
        head[1..].copy_from_slice(&(len as u64).to_le_bytes());
        hasher.update(&head);
    };
    match value {
        Value::Null => tag(0, 0),
        Value::Bool(flag) => tag(1, usize::from(*flag)),
        Value::Number(number) => {
            tag(2, 0);
            update_text(hasher, &number.to_string());
        }
        Value::String(text) => {
            tag(3, 0);
            update_text(hasher, text);
        }
        Value::Array(items) => {
            tag(4, items.len());
            items.iter().for_each(|item| update_value(hasher, item));
        }
        Value::Object(object) => {
            tag(5, object.len());
            let mut entries: Vec<_> = object.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            for (key, item) in entries {
                update_text(hasher, key);
                update_value(hasher, item);
            }
        }
    }
}

/// Merges are pairs, or (as older files write them) strings with a blank between two halves.
fn canonical_merges(merges: &Value) -> Value {
    let Value::Array(list) = merges else { return merges.clone() };
    let pair = |merge: &Value| match merge.as_str().and_then(|text| text.split_once(' ')) {
        Some((left, right)) => Value::from(vec![left, right]),
        None => merge.clone(),
    };
    list.iter().map(pair).collect()
}

fn model_settings(model: Option<&Map<String, Value>>) -> Value {
    let kept = |(key, value): &(&String, &Value)| {
        let off = matches!(value, Value::Null | Value::Bool(false)) && (OFF_BY_DEFAULT.contains(&key.as_str()) || *key == "ignore_merges");
        !off && !matches!(key.as_str(), "vocab" | "merges" | "type")
    };
    model.into_iter().flatten().filter(kept).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Added tokens by id, with what `added_tokens_decoder` of the configuration changes in them.
fn added_tokens(tokens: Option<&Value>, config: &Map<String, Value>) -> Value {
    let mut by_id = BTreeMap::new();
    let listed = tokens.and_then(Value::as_array).into_iter().flatten();
    for token in listed {
        if let (Some(id), Some(object)) = (token.get("id").and_then(Value::as_u64), token.as_object()) {
            by_id.insert(id, plain_token(object));
        }
    }
    let changed = config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
    for (id, token) in changed {
        if let (Ok(id), Some(object)) = (id.parse::<u64>(), token.as_object()) {
            by_id.insert(id, plain_token(object));
        }
    }
    by_id.into_iter().map(|(id, token)| (id.to_string(), token)).collect()
}

fn plain_token(token: &Map<String, Value>) -> Value {
    token.iter().filter(|(key, _)| !matches!(key.as_str(), "id" | "__type")).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Null for a post-processor that adds no token and changes no type id: transformers 4 writes null where 5 writes a
/// template of `$A` alone, and byte-level ones only move offsets.
fn canonical_post_processor(processor: &Value) -> Value {
    let bare = |name: &str, type_id: u32| serde_json::json!({"Sequence": {"id": name, "type_id": type_id}});
    match processor.get("type").and_then(Value::as_str) {
        Some("ByteLevel") => Value::Null,
        Some("TemplateProcessing")
            if processor.get("single") == Some(&Value::from(vec![bare("A", 0)]))
                && processor.get("pair") == Some(&Value::from(vec![bare("A", 0), bare("B", 1)])) =>
        {
            Value::Null
        }
        Some("Sequence") => {
            let list = processor.get("processors").and_then(Value::as_array).into_iter().flatten();
            let mut kept: Vec<_> = list.map(canonical_post_processor).filter(|item| !item.is_null()).collect();
            match kept.len() {
                0 => Value::Null,
                1 => kept.swap_remove(0),
                _ => Value::Array(kept),
            }
        }
        _ => processor.clone(),
    }
}
