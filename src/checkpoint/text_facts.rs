//! What a checkpoint says about text: tokenizer, special tokens, chat templates. Facts that can be compared and hashed;
//! what they do to a text is the business of [`crate::text`].

mod canonical;
mod vocabulary;

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
    sync::Arc,
};

use serde_json::{Map, Value};

use super::CheckpointError;
use canonical::Parts;

/// The largest `tokenizer.json` that is read; the largest in use are below 40 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// The largest `tokenizer_config.json` or `special_tokens_map.json`.
const MAX_CONFIG_BYTES: u64 = 32 << 20;
/// The largest chat template.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// More named templates than any model has.
const MAX_TEMPLATES: usize = 64;

/// The special tokens that have a name of their own, as transformers knows them.
const NAMED_TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The tokenizer classes of transformers 4 that build their post-processor anew from `add_bos_token` and
/// `add_eos_token`, with what each takes `add_bos_token` to be where only the other is set.
const REBUILDING_CLASSES: [(&str, bool); 5] = [
    ("LlamaTokenizer", true),
    ("CodeLlamaTokenizer", true),
    ("GemmaTokenizer", true),
    ("CohereTokenizer", true),
    ("GPTNeoXTokenizer", false),
];

/// The text facts of one checkpoint folder. Cheap to clone.
#[derive(Clone)]
pub struct TextFacts(Arc<Inner>);

struct Inner {
    tokenizer: Vec<u8>,
    tokenizer_config: Value,
    templates: BTreeMap<String, String>,
    special_tokens: BTreeMap<String, String>,
    post_processor: Value,
    parts: Parts,
    hash: [u8; 32],
}

impl fmt::Debug for TextFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextFacts")
            .field("tokenizer_bytes", &self.0.tokenizer.len())
            .field("templates", &self.0.templates.keys())
            .field("special_tokens", &self.0.special_tokens)
            .finish_non_exhaustive()
    }
}

impl TextFacts {
    /// Reads `tokenizer.json` and, where they exist, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `chat_template.jinja` and `additional_chat_templates/*.jinja`.
    ///
    /// Errors name the file: absent, larger than any real one, not JSON, or of a shape that no tokenizer has.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join("tokenizer.json");
        let tokenizer = read_capped(&path, MAX_TOKENIZER_BYTES)?.ok_or_else(|| {
            let hint = "is missing; a checkpoint needs it to score text: load the tokenizer with transformers' AutoTokenizer and call save_pretrained";
            CheckpointError::new(path.display(), hint)
        })?;
        let json = parse_object(&path, &tokenizer)?;
        if !json.get("model").is_some_and(Value::is_object) {
            return Err(CheckpointError::new(path.display(), "expected an object `model`, found none"));
        }
        let config = read_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let map = read_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let templates = read_templates(dir, &config)?;
        Ok(Self::from_parts(tokenizer, &json, config, &map, templates))
    }

    fn from_parts(
        tokenizer: Vec<u8>,
        json: &Map<String, Value>,
        config: Map<String, Value>,
        map: &Map<String, Value>,
        templates: BTreeMap<String, String>,
    ) -> Self {
        let special_tokens = special_tokens(&config, map);
        let post_processor = match rebuilt_post_processor(json, &config, &special_tokens) {
            Some(rebuilt) => rebuilt,
            None => json.get("post_processor").cloned().unwrap_or(Value::Null),
        };
        let parts = Parts::new(json, &post_processor, &config, &templates, &special_tokens);
        let hash = parts.hash();
        Self(Arc::new(Inner { tokenizer, tokenizer_config: Value::Object(config), templates, special_tokens, post_processor, parts, hash }))
    }

    /// `tokenizer.json`, byte for byte: parsing it twice would round the scores of a unigram vocabulary twice.
    pub fn tokenizer_bytes(&self) -> &[u8] {
        &self.0.tokenizer
    }

    /// `tokenizer_config.json`; an empty object if there is none.
    pub fn tokenizer_config(&self) -> &Value {
        &self.0.tokenizer_config
    }

    /// The post-processor in force: the tokenizer's own, or the one that `add_bos_token` and `add_eos_token` ask for in
    /// the tokenizer classes that heed them. Null if there is none.
    pub fn post_processor(&self) -> &Value {
        &self.0.post_processor
    }

    /// Whether `model_input_names` lists `token_type_ids`.
    pub fn uses_type_ids(&self) -> bool {
        self.0.tokenizer_config.as_object().is_some_and(uses_type_ids)
    }

    /// Chat templates by name; the one that is used unless another is asked for is `default`.
    pub fn templates(&self) -> &BTreeMap<String, String> {
        &self.0.templates
    }

    /// Special tokens by name, such as `bos_token` → `<s>`.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.0.special_tokens
    }

    /// BLAKE3 over everything here that decides which tokens a text becomes. Two files that encode alike hash alike: the
    /// order of keys, the format's version, truncation, padding, the decoder and a post-processor that adds nothing do
    /// not count.
    pub fn hash(&self) -> [u8; 32] {
        self.0.hash
    }

    /// One sentence for each part that differs; none where both checkpoints make the same tokens of every text, which is
    /// what averaging their weights needs.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        if self.hash() == other.hash() { Vec::new() } else { self.0.parts.differences(&other.0.parts) }
    }

    /// A sentence if a token has one id here and another there, so that equal rows of two embeddings mean different tokens.
    pub fn conflict(&self, other: &Self) -> Option<String> {
        let parsed = |facts: &Self| serde_json::from_slice::<Map<String, Value>>(facts.tokenizer_bytes()).ok();
        let (count, example) = vocabulary::conflict(&parsed(self)?, &parsed(other)?)?;
        Some(format!("{count} tokens have other ids: {example}"))
    }
}

/// The whole file, or `None` where there is none.
fn read_capped(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    let problem = |error: std::io::Error| CheckpointError::new(path.display(), format!("cannot be read: {error}"));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(problem(error)),
    };
    let mut bytes = Vec::new();
    // One byte more than allowed is enough to know; the file may also grow while it is read.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(problem)?;
    if bytes.len() as u64 > limit {
        return Err(CheckpointError::new(path.display(), format!("expected at most {limit} bytes, found more")));
    }
    Ok(Some(bytes))
}

fn parse_object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>, CheckpointError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(CheckpointError::new(path.display(), "expected a JSON object")),
        Err(error) => Err(CheckpointError::new(path.display(), format!("is not valid JSON: {error}"))),
    }
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, CheckpointError> {
    read_capped(path, MAX_CONFIG_BYTES)?.map(|bytes| parse_object(path, &bytes)).transpose()
}

fn read_template(path: &Path) -> Result<Option<String>, CheckpointError> {
    let Some(bytes) = read_capped(path, MAX_TEMPLATE_BYTES)? else { return Ok(None) };
    // Python reads text files with universal newlines.
    let text = String::from_utf8(bytes).map_err(|error| CheckpointError::new(path.display(), format!("is not UTF-8: {error}")))?;
    Ok(Some(text.replace("\r\n", "\n").replace('\r', "\n")))
}

/// Template files replace whatever `tokenizer_config.json` holds, as in transformers.
fn read_templates(dir: &Path, config: &Map<String, Value>) -> Result<BTreeMap<String, String>, CheckpointError> {
    let mut templates = BTreeMap::new();
    if let Some(text) = read_template(&dir.join("chat_template.jinja"))? {
        templates.insert("default".to_owned(), text);
    }
    let more = dir.join("additional_chat_templates");
    let problem = |error: std::io::Error| CheckpointError::new(more.display(), format!("cannot be read: {error}"));
    match std::fs::read_dir(&more) {
        Ok(entries) => {
            for entry in entries {
                let path = entry.map_err(problem)?.path();
                let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jinja")) else { continue };
                if templates.len() >= MAX_TEMPLATES {
                    return Err(CheckpointError::new(more.display(), format!("expected at most {MAX_TEMPLATES} templates, found more")));
                }
                if let Some(text) = read_template(&path)? {
                    templates.insert(name.to_owned(), text);
                }
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(problem(error)),
    }
    if templates.is_empty() {
        let refused = |what: &str| CheckpointError::new(dir.join("tokenizer_config.json").display(), format!("chat_template: {what}"));
        templates = config_templates(config.get("chat_template")).map_err(refused)?;
    }
    Ok(templates)
}

/// `chat_template` is a string, or a list of `{name, template}`, or (as some tools write it) an object of both.
fn config_templates(value: Option<&Value>) -> Result<BTreeMap<String, String>, &'static str> {
    let shape = "expected a string or a list of {name, template}";
    let named = |item: &Value| -> Option<(String, String)> {
        Some((item.get("name")?.as_str()?.to_owned(), item.get("template")?.as_str()?.to_owned()))
    };
    let templates: BTreeMap<_, _> = match value {
        None | Some(Value::Null) => BTreeMap::new(),
        Some(Value::String(text)) => BTreeMap::from([("default".to_owned(), text.clone())]),
        Some(Value::Array(list)) => list.iter().map(named).collect::<Option<_>>().ok_or(shape)?,
        Some(Value::Object(object)) => {
            object.iter().map(|(name, text)| Some((name.clone(), text.as_str()?.to_owned()))).collect::<Option<_>>().ok_or(shape)?
        }
        Some(_) => return Err(shape),
    };
    if templates.len() > MAX_TEMPLATES || templates.values().any(|text| text.len() as u64 > MAX_TEMPLATE_BYTES) {
        return Err("more or larger templates than any model has");
    }
    Ok(templates)
}

/// Special tokens by name. As in transformers, `special_tokens_map.json` counts (and wins) only where
/// `tokenizer_config.json` has no `added_tokens_decoder`.
fn special_tokens(config: &Map<String, Value>, map: &Map<String, Value>) -> BTreeMap<String, String> {
    let mut sources = vec![config];
    if !config.contains_key("added_tokens_decoder") {
        sources.push(map);
    }
    let mut tokens = BTreeMap::new();
    for source in sources {
        // A model's own named tokens (`image_token`) end in `_token` too; flags such as `add_bos_token` are no strings.
        let own = source.iter().filter(|(name, _)| name.ends_with("_token"));
        let extra = source.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
        for (name, value) in own.chain(extra) {
            match value.as_str().or_else(|| value.get("content")?.as_str()) {
                Some(content) => _ = tokens.insert(name.clone(), content.to_owned()),
                None if value.is_null() && NAMED_TOKENS.contains(&name.as_str()) => _ = tokens.remove(name),
                None => {}
            }
        }
    }
    tokens
}

/// Whether the model reads segment numbers: only where `model_input_names` lists them.
fn uses_type_ids(config: &Map<String, Value>) -> bool {
    let names = config.get("model_input_names").and_then(Value::as_array);
    names.is_some_and(|names| names.iter().any(|name| name == "token_type_ids"))
}

/// The id of a token in `tokenizer.json`: among the added tokens, else in the model's vocabulary.
fn token_id(tokenizer: &Map<String, Value>, token: &str) -> Option<u64> {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let mut found = added.filter(|entry| entry.get("content").and_then(Value::as_str) == Some(token));
    if let Some(entry) = found.next() {
        return entry.get("id")?.as_u64();
    }
    match tokenizer.get("model")?.get("vocab")? {
        Value::Object(vocabulary) => vocabulary.get(token)?.as_u64(),
        Value::Array(pieces) => pieces.iter().position(|piece| piece.get(0).and_then(Value::as_str) == Some(token)).map(|i| i as u64),
        _ => None,
    }
}

/// The template that `add_bos_token` and `add_eos_token` stand for, where one of them is set and the tokenizer class is
/// one that heeds them: the fast Llama, Code Llama, Gemma, Cohere and GPT-NeoX tokenizers of transformers 4, in which it
/// replaces the post-processor of `tokenizer.json`. Every other class of transformers 4, and every class of
/// transformers 5 (which writes neither flag), takes `tokenizer.json` at its word.
fn rebuilt_post_processor(
    tokenizer: &Map<String, Value>,
    config: &Map<String, Value>,
    special: &BTreeMap<String, String>,
) -> Option<Value> {
    let class = config.get("tokenizer_class")?.as_str()?;
    let class = class.strip_suffix("Fast").unwrap_or(class);
    let (_, bos_default) = REBUILDING_CLASSES.into_iter().find(|(name, _)| *name == class)?;
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    let (bos, eos) = (flag("add_bos_token"), flag("add_eos_token"));
    if bos.is_none() && eos.is_none() {
        return None;
    }
    let token = |wanted: bool, name: &str| -> Option<(String, u64)> {
        let content = special.get(name).filter(|_| wanted)?;
        Some((content.clone(), token_id(tokenizer, content)?))
    };
    let bos = token(bos.unwrap_or(bos_default), "bos_token");
    let eos = token(eos.unwrap_or(false), "eos_token");
    let segment = |sequence: &str, type_id: u32| -> Vec<Value> {
        let special = |(content, _): &(String, u64)| serde_json::json!({"SpecialToken": {"id": content, "type_id": type_id}});
        let body = serde_json::json!({"Sequence": {"id": sequence, "type_id": type_id}});
        bos.iter().map(special).chain([body]).chain(eos.iter().map(special)).collect()
    };
    let tokens: Map<String, Value> = bos
        .iter()
        .chain(&eos)
        .map(|(content, id)| (content.clone(), serde_json::json!({"id": content, "ids": [id], "tokens": [content]})))
        .collect();
    let pair = [segment("A", 0), segment("B", 1)].concat();
    Some(serde_json::json!({
        "type": "TemplateProcessing",
        "single": segment("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    }))
}

#[cfg(test)]
mod tests;
