//! Opening the folder of an adapter: its configuration, its tensors, the base it stands on, and the configuration of the model that
//! both are together.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::super::folder::{Folder, parse_architecture, read_object};
use super::super::reader::Weights;
use super::super::{Architecture, CheckpointError, Manifest, TensorSource, TextFacts};
use super::config::AdapterConfig;
use super::parts::{Origin, Parts, Sides};
use super::{Adapter, CONFIG, Place, WEIGHTS};
use crate::checkpoint::names::BackboneNames;

/// More outputs than any head has; a bound on the labels that are written down for them.
const MAX_LABELS: usize = 1 << 16;

/// Heads by the names of transformers' sequence classifiers: the rows of the first that is there are the model's outputs.
const HEADS: [&str; 3] = ["score.weight", "classifier.weight", "classifier.out_proj.weight"];

/// Opens an adapter on `base`, or on what its configuration names.
pub fn open(dir: &Path, base: Option<&Path>) -> Result<Folder, CheckpointError> {
    let config_path = dir.join(CONFIG);
    let in_config = |problem: String| CheckpointError::new(config_path.display(), problem);
    let config = AdapterConfig::parse(&read_object(&config_path)?).map_err(|problems| in_config(problems.join("; ")))?;
    let base = match base {
        Some(base) => base.to_owned(),
        None => base_folder(dir, config.base.as_deref()).map_err(in_config)?,
    };
    let stored = Arc::new(open_weights(dir)?);
    let (folder, weights) = Folder::open_full(&base, "the base of an adapter")?;
    let sides = Sides {
        config: &config,
        model_type: text(&folder.config, "model_type"),
        tied: is_tied_language_model(&folder.config),
        base: weights.manifest(),
        base_place: &base.display().to_string(),
        adapter: stored.manifest(),
    };
    let parts = Parts::new(&sides).map_err(|problems| CheckpointError::new(dir.join(WEIGHTS).display(), problems.join("; ")))?;
    let config = adapted_config(&folder.config, &parts);
    let architecture = parse_architecture(&base, &config);
    // The tokenizer that training ended with, if it was saved with the adapter; else the base's.
    let own_text = dir.join("tokenizer.json").exists();
    let text = if own_text { TextFacts::open(dir) } else { folder.text };
    let mut notes = parts.notes.clone();
    notes.extend(unknown_pad(&architecture, &text));
    let lost_head = parts.headless.then(|| {
        format!(
            "the adapter was saved without its reward head, and its base {} has none, so there is nothing to score with; train and save it \
             with modules_to_save: [\"score\"] (a missing head is never initialised at random)",
            base.display()
        )
    });
    let text_folder = if own_text { dir } else { &base };
    let place = Place {
        adapter: dir.to_owned(),
        text: text_folder.to_owned(),
        base: std::fs::canonicalize(&base).unwrap_or_else(|_| base.clone()),
    };
    let adapter = Adapter::new(weights, stored, Arc::new(parts), Arc::new(place));
    Ok(Folder { config, weights: Arc::new(adapter), architecture, text, notes, lost_head })
}

/// The folder of the base that an adapter's own configuration names; `None` for what is no adapter, or names no folder.
pub fn named_base(dir: &Path) -> Option<PathBuf> {
    let config = read_object(&dir.join(CONFIG)).ok()?;
    base_folder(dir, config.get("base_model_name_or_path").and_then(Value::as_str)).ok()
}

/// The folder that `base_model_name_or_path` names. Relative paths are relative to the adapter's folder, and nothing is
/// downloaded that no recipe names.
fn base_folder(dir: &Path, named: Option<&str>) -> Result<PathBuf, String> {
    let give = "give its base in the recipe ({path: ..., base: ...}; a folder, or hf:org/name@revision)";
    let Some(named) = named.filter(|named| !named.is_empty()) else {
        return Err(format!("base_model_name_or_path: expected the folder of a checkpoint, found none; {give}"));
    };
    let path = dir.join(named);
    if path.is_dir() {
        return Ok(path);
    }
    let segments: Vec<&str> = named.split('/').collect();
    let plain = |segment: &&str| !segment.is_empty() && !segment.starts_with('.') && !segment.contains('\\');
    if segments.len() <= 2 && segments.iter().all(plain) {
        return Err(format!("base_model_name_or_path: {named:?} is a model of a hub, and only what a recipe names is fetched; {give}"));
    }
    Err(format!("base_model_name_or_path: there is no folder {:?}; {give}", path.display().to_string()))
}

fn open_weights(dir: &Path) -> Result<Weights, CheckpointError> {
    let path = dir.join(WEIGHTS);
    if path.exists() {
        return Weights::open_file(path);
    }
    let pickled = dir.join("adapter_model.bin");
    let problem = if pickled.exists() {
        "holds pickled weights (adapter_model.bin), which are never loaded because loading a pickle runs code; convert them once in Python: \
         PeftModel.from_pretrained(base, folder).save_pretrained(new_folder, safe_serialization=True)"
            .to_owned()
    } else {
        format!("has no weights of the adapter: expected {WEIGHTS}")
    };
    Err(CheckpointError::new(dir.display(), problem))
}

fn text<'v>(config: &'v Value, name: &str) -> &'v str {
    config.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn is_tied_language_model(config: &Value) -> bool {
    let classes = config.get("architectures").and_then(Value::as_array).into_iter().flatten();
    let language_model = classes.filter_map(Value::as_str).any(|class| class.ends_with("ForCausalLM") || class.ends_with("LMHeadModel"));
    // Transformers ties where the file does not say otherwise only in some families; a language model without a head of its own is tied.
    language_model && config.get("tie_word_embeddings").and_then(Value::as_bool) != Some(false)
}

/// The base's configuration with what the adapter makes of it: a sequence classifier with as many outputs as its head has rows,
/// and as many tokens as its embedding has.
///
/// `pad_token_id` stays what it is in the base, also where it is absent and the tokenizer has a pad token: training may have set it
/// on the model in memory, but nothing of that is on disk, and transformers, given these folders and one sequence, reads
/// its last token.
fn adapted_config(base: &Value, parts: &Parts) -> Value {
    let mut config = base.clone();
    let Some(fields) = config.as_object_mut() else { return config };
    let rows = |manifest: &Manifest, name: &str| manifest.get(name).and_then(|info| info.shape.first().copied());
    let of_adapter = |name: &&str| parts.parts.get(*name).is_some_and(|part| matches!(part.origin, Origin::Adapter(_)));
    let names = BackboneNames::of(fields.get("model_type").and_then(Value::as_str).unwrap_or_default());
    if let Some(embedding) = names.embedding().filter(|name| of_adapter(&name.as_str()))
        && let Some(tokens) = rows(&parts.manifest, &embedding)
    {
        fields.insert("vocab_size".to_owned(), tokens.into());
    }
    if let Some(outputs) = HEADS.iter().find(|name| of_adapter(name)).and_then(|name| rows(&parts.manifest, name)) {
        set_labels(fields, outputs);
        if let Some(class) = fields.get("architectures").and_then(|classes| classes.get(0)).and_then(Value::as_str).map(classifier_of) {
            fields.insert("architectures".to_owned(), vec![class].into());
        }
    }
    if parts.manifest.get("lm_head.weight").is_some() && fields.contains_key("tie_word_embeddings") {
        fields.insert("tie_word_embeddings".to_owned(), false.into());
    }
    config
}

fn set_labels(fields: &mut Map<String, Value>, outputs: usize) {
    let stated = fields.get("id2label").and_then(Value::as_object).map(Map::len);
    fields.remove("num_labels");
    if stated == Some(outputs) || outputs > MAX_LABELS {
        return;
    }
    let label = |output: usize| format!("LABEL_{output}");
    let id2label: Map<String, Value> = (0..outputs).map(|output| (output.to_string(), label(output).into())).collect();
    let label2id: Map<String, Value> = (0..outputs).map(|output| (label(output), output.into())).collect();
    fields.insert("id2label".to_owned(), id2label.into());
    fields.insert("label2id".to_owned(), label2id.into());
}

/// The sequence classifier of the family that a class belongs to: `LlamaForCausalLM`, `LlamaModel` and `GPT2LMHeadModel` to
/// `LlamaForSequenceClassification` and so on. Other reward models keep their class.
fn classifier_of(class: &str) -> String {
    let family = ["ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForTokenClassification", "LMHeadModel", "Model"];
    match family.iter().find_map(|end| class.strip_suffix(end)).filter(|family| !family.is_empty() && !family.ends_with("Reward")) {
        Some(family) => format!("{family}ForSequenceClassification"),
        None => class.to_owned(),
    }
}

/// A pad token that the tokenizer knows and the configuration does not.
fn unknown_pad(architecture: &Result<Architecture, CheckpointError>, text: &Result<TextFacts, CheckpointError>) -> Option<String> {
    let (Ok(architecture), Ok(text)) = (architecture, text) else { return None };
    let pad = text.special_tokens().get("pad_token").filter(|_| architecture.causal && architecture.pad_token_id.is_none())?;
    Some(format!(
        "the tokenizer pads with {pad:?}, but config.json of the adapter's base has no pad_token_id; the reward is read at the last token, \
         as transformers reads that of one sequence"
    ))
}
