//! In what one checkpoint differs from another, told apart by what the difference touches.

use serde_json::Value;

use crate::checkpoint::{Architecture, CheckpointError, RECORD_KEY, TextFacts};

/// Fields of an architecture that say how text becomes ids. Whether the embedding has as many rows is seen in its shape.
const TEXT_FIELDS: [&str; 4] = ["vocab_size", "pad_token_id", "bos_token_id", "eos_token_ids"];

/// Keys of a configuration that change no number of the model's output, or that a merge decides itself.
const NEUTRAL_KEYS: [&str; 15] = [
    RECORD_KEY,
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "id2label",
    "label2id",
    "mean",
    "std",
    "initializer_range",
    "attention_dropout",
    "hidden_dropout_prob",
    "_attn_implementation_autoset",
];

/// What a checkpoint says of itself beside its weights.
pub struct Facts {
    pub config: Value,
    pub architecture: Result<Architecture, CheckpointError>,
    pub text: Result<TextFacts, CheckpointError>,
}

/// Differences as sentences.
#[derive(Debug, Default, PartialEq)]
pub struct Differences {
    /// In what the weights mean: they cannot be mixed.
    pub model: Vec<String>,
    /// In how text becomes tokens: those who score it must agree, those who only lend weights need not.
    pub text: Vec<String>,
    /// That rows of the two embeddings belong to different tokens: these cannot be mixed.
    pub rows: Option<String>,
}

impl Facts {
    pub fn differences(&self, other: &Self) -> Differences {
        let model = match (&self.architecture, &other.architecture) {
            (Ok(ours), Ok(theirs)) => ours.differences(theirs),
            _ => config_differences(&self.config, &other.config),
        };
        let concerns_text = |sentence: &String| sentence.split_once(':').is_some_and(|(field, _)| TEXT_FIELDS.contains(&field));
        let (mut text, model): (Vec<String>, Vec<String>) = model.into_iter().partition(concerns_text);
        let mut rows = None;
        if let (Ok(ours), Ok(theirs)) = (&self.text, &other.text) {
            let differences = ours.differences(theirs);
            rows = if differences.is_empty() { None } else { ours.conflict(theirs) };
            text.extend(differences);
        }
        Differences { model, text, rows }
    }
}

/// What two configurations of an unknown family state differently. What only one of them states is left to the shapes of
/// the tensors: versions of transformers differ in which defaults they write.
fn config_differences(ours: &Value, theirs: &Value) -> Vec<String> {
    let (Value::Object(ours), Value::Object(theirs)) = (ours, theirs) else { return Vec::new() };
    let stated = |(key, ours): (&String, &Value)| {
        let theirs = theirs.get(key)?;
        let text = |value: &Value| value.to_string().chars().take(200).collect::<String>();
        let differ = ours != theirs && !ours.is_null() && !theirs.is_null() && !NEUTRAL_KEYS.contains(&key.as_str());
        differ.then(|| format!("{}: expected {}, found {}", plain(key), text(ours), text(theirs)))
    };
    ours.iter().filter_map(stated).collect()
}

/// The name that [`TEXT_FIELDS`] has for a key.
fn plain(key: &str) -> &str {
    if key == "eos_token_id" { "eos_token_ids" } else { key }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_unknown_family_is_compared_by_what_both_state() {
        let base = json!({"model_type": "mamba", "hidden_size": 8, "eos_token_id": 2, "rope_theta": 1e4, "use_cache": true});
        let facts = |more: Value| {
            let mut config = base.clone();
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let unknown = || CheckpointError::new("config.json", "unknown");
            Facts { config, architecture: Err(unknown()), text: Err(unknown()) }
        };
        let first = facts(json!({}));
        assert_eq!(first.differences(&facts(json!({"new_key": 7, "use_cache": false, "rope_theta": null}))), Differences::default());
        let found = first.differences(&facts(json!({"hidden_size": 16, "eos_token_id": [2, 3]})));
        assert_eq!(found.model, ["hidden_size: expected 8, found 16"]);
        assert_eq!(found.text, ["eos_token_ids: expected 2, found [2,3]"]);
    }
}
