//! `config.json`, as transformers 4 and 5 write it, to an [`Architecture`]. Pure; every number is checked, and every
//! mistake is reported at once. Defaults are those of the transformers class of the family.

use serde_json::{Map, Value};

use super::architecture::{Activation, Architecture, LayerKind, Naming, Norm, Residual, Rope, RopeScaling};
use super::head_config::{HeadConfig, out_of_scope};
use super::pooling::Pooling;

// Bounds that no real model reaches; they keep a lying file from costing memory before its tensors are looked at.
const MAX_LAYERS: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 26;

/// The families that can be served, for messages.
const FAMILIES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "bert"];

impl Architecture {
    /// Reads a configuration. The error lists every mistake as a sentence that names the field, what was expected and
    /// what was found.
    pub fn parse(config: &Value) -> Result<Self, Vec<String>> {
        let Value::Object(map) = config else {
            return Err(vec!["expected a JSON object".to_owned()]);
        };
        if let Some(reason) = out_of_scope(map) {
            return Err(vec![reason]);
        }
        let mut fields = Fields { map, problems: Vec::new() };
        let model_type = fields.text("model_type").unwrap_or_default();
        let mut architecture = match model_type.as_str() {
            "llama" | "mistral" | "qwen2" | "qwen3" => decoder(&mut fields, model_type),
            "bert" => bert(&mut fields, model_type),
            other => {
                return Err(vec![format!("model_type: expected one of {}, found {other:?}", FAMILIES.join(", "))]);
            }
        };
        architecture.head = HeadConfig::parse(map, &mut fields.problems);
        if fields.problems.is_empty() { Ok(architecture) } else { Err(fields.problems) }
    }
}

/// Llama, Mistral, Qwen2 and Qwen3 (`LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config`).
fn decoder(fields: &mut Fields, model_type: String) -> Architecture {
    let family = model_type.as_str();
    let hidden_size = fields.count("hidden_size", MAX_WIDTH);
    let heads = fields.count("num_attention_heads", MAX_WIDTH);
    let default_kv = match family {
        "mistral" => 8,
        "qwen2" | "qwen3" => 32,
        _ => heads,
    };
    let kv_heads = fields.count_or("num_key_value_heads", MAX_WIDTH, default_kv);
    let default_dim = if family == "qwen3" { 128 } else { hidden_size / heads.max(1) };
    let head_dim = fields.count_or("head_dim", 1 << 12, default_dim);
    if kv_heads > 0 && !heads.is_multiple_of(kv_heads) {
        fields.problem(format!("num_key_value_heads: expected a divisor of num_attention_heads ({heads}), found {kv_heads}"));
    }
    if !head_dim.is_multiple_of(2) {
        fields.problem(format!("head_dim: expected an even number for rotary positions, found {head_dim}"));
    }
    let default_positions = match family {
        "llama" => 2048,
        "mistral" => 4096 * 32,
        _ => 32768,
    };
    let layer_count = fields.count("num_hidden_layers", MAX_LAYERS);
    let windows = windows(fields, family, layer_count);
    let rope = rope(fields, head_dim);
    let attention_bias = fields.flag("attention_bias", false);
    Architecture {
        naming: Naming::Llama,
        causal: true,
        vocab_size: fields.count("vocab_size", MAX_VOCAB),
        hidden_size,
        intermediate_size: fields.count("intermediate_size", MAX_WIDTH),
        heads,
        kv_heads,
        head_dim,
        layers: windows.into_iter().map(|window| LayerKind { window, rope: Some(0) }).collect(),
        ropes: vec![rope],
        norm: Norm::Rms { eps: fields.positive_or("rms_norm_eps", 1e-6) },
        qk_norm: family == "qwen3",
        qkv_bias: family == "qwen2" || (family != "mistral" && attention_bias),
        output_bias: matches!(family, "llama" | "qwen3") && attention_bias,
        mlp_bias: family == "llama" && fields.flag("mlp_bias", false),
        gated: true,
        activation: fields.activation("hidden_act", Activation::Silu),
        residual: Residual::PreNorm,
        attention_scale: (head_dim as f64).powf(-0.5),
        learned_positions: None,
        token_types: 0,
        max_positions: fields.count_or("max_position_embeddings", MAX_POSITIONS, default_positions),
        pooling: Pooling::LastNonPad,
        pad_token_id: fields.id("pad_token_id"),
        bos_token_id: fields.id("bos_token_id"),
        eos_token_ids: fields.ids("eos_token_id"),
        labels: fields.labels(),
        head: HeadConfig::default(),
        model_type,
    }
}

/// BERT (`BertConfig`, absolute positions).
fn bert(fields: &mut Fields, model_type: String) -> Architecture {
    let hidden_size = fields.count("hidden_size", MAX_WIDTH);
    let heads = fields.count("num_attention_heads", MAX_WIDTH);
    if heads > 0 && !hidden_size.is_multiple_of(heads) {
        fields.problem(format!("num_attention_heads: expected a divisor of hidden_size ({hidden_size}), found {heads}"));
    }
    let head_dim = hidden_size / heads.max(1);
    fields.only("position_embedding_type", "absolute");
    if fields.flag("is_decoder", false) {
        fields.problem("is_decoder: expected false, found true: a BERT that attends backwards only is not supported".to_owned());
    }
    let positions = fields.count_or("max_position_embeddings", MAX_POSITIONS, 512);
    let layer_count = fields.count("num_hidden_layers", MAX_LAYERS);
    Architecture {
        naming: Naming::Bert,
        causal: false,
        vocab_size: fields.count("vocab_size", MAX_VOCAB),
        hidden_size,
        intermediate_size: fields.count("intermediate_size", MAX_WIDTH),
        heads,
        kv_heads: heads,
        head_dim,
        layers: vec![LayerKind { window: None, rope: None }; layer_count],
        ropes: Vec::new(),
        norm: Norm::Layer { eps: fields.positive_or("layer_norm_eps", 1e-12) },
        qk_norm: false,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        gated: false,
        activation: fields.activation("hidden_act", Activation::Gelu),
        residual: Residual::PostNorm,
        attention_scale: (head_dim as f64).powf(-0.5),
        learned_positions: Some(positions),
        token_types: fields.count_or("type_vocab_size", MAX_VOCAB, 2),
        max_positions: positions,
        pooling: Pooling::Cls,
        pad_token_id: fields.id("pad_token_id").or(Some(0)),
        bos_token_id: fields.id("bos_token_id"),
        eos_token_ids: fields.ids("eos_token_id"),
        labels: fields.labels(),
        head: HeadConfig::default(),
        model_type,
    }
}

/// The window of every layer: from `layer_types` where the file has them, else by the family's own rule.
fn windows(fields: &mut Fields, family: &str, layers: usize) -> Vec<Option<usize>> {
    let enabled = match family {
        "mistral" => true,
        "qwen2" | "qwen3" => fields.flag("use_sliding_window", false),
        _ => false,
    };
    let size =
        if enabled && !fields.is_null("sliding_window") { Some(fields.count_or("sliding_window", MAX_POSITIONS, 4096)) } else { None };
    // MistralConfig has no layer types: every layer slides.
    if family == "mistral" || size.is_none() {
        return vec![size; layers];
    }
    if let Some(types) = fields.layer_types(layers) {
        return types.iter().map(|sliding| if *sliding { size } else { None }).collect();
    }
    let first = fields.count_or("max_window_layers", MAX_LAYERS, 28);
    (0..layers).map(|layer| if layer >= first { size } else { None }).collect()
}

/// `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4).
fn rope(fields: &mut Fields, head_dim: usize) -> Rope {
    let empty = Map::new();
    let (place, scaling) = match ["rope_parameters", "rope_scaling"].iter().find_map(|name| match fields.map.get(*name) {
        Some(Value::Object(map)) => Some((*name, map)),
        _ => None,
    }) {
        Some(found) => found,
        None => ("rope_parameters", &empty),
    };
    let mut inner = Fields { map: scaling, problems: Vec::new() };
    let theta = match (inner.number("rope_theta"), fields.number("rope_theta")) {
        (Some(theta), _) | (None, Some(theta)) => theta,
        (None, None) => 10_000.0,
    };
    if !(theta.is_finite() && theta > 0.0) {
        inner.problem(format!("rope_theta: expected a positive number, found {theta}"));
    }
    let kind = inner.optional_text("rope_type").or_else(|| inner.optional_text("type")).unwrap_or_else(|| "default".to_owned());
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: inner.positive("factor") },
        "llama3" => RopeScaling::Llama3 {
            factor: inner.positive("factor"),
            low_freq_factor: inner.positive("low_freq_factor"),
            high_freq_factor: inner.positive("high_freq_factor"),
            original_positions: inner.positive("original_max_position_embeddings"),
        },
        other => {
            inner.problem(format!("rope_type: expected one of default, linear, llama3, found {other:?}"));
            RopeScaling::None
        }
    };
    let partial = inner.number("partial_rotary_factor").or_else(|| fields.number("partial_rotary_factor"));
    if let Some(partial) = partial.filter(|partial| *partial != 1.0) {
        inner.problem(format!("partial_rotary_factor: expected 1 for this family, found {partial}"));
    }
    let problems = std::mem::take(&mut inner.problems);
    fields.problems.extend(problems.into_iter().map(|problem| format!("{place}.{problem}")));
    Rope { theta, dims: head_dim, scaling }
}

/// A JSON object that is read field by field; what is wrong is collected, and reading goes on with a harmless value.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl Fields<'_> {
    fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// A field that is present and not null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    fn count(&mut self, name: &str, most: usize) -> usize {
        match self.get(name).cloned() {
            Some(value) => self.checked_count(name, &value, most),
            None => {
                self.problem(format!("{name}: expected a number from 1 to {most}, found none"));
                1
            }
        }
    }

    fn count_or(&mut self, name: &str, most: usize, default: usize) -> usize {
        match self.get(name).cloned() {
            Some(value) => self.checked_count(name, &value, most),
            None => default,
        }
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

    fn number(&mut self, name: &str) -> Option<f64> {
        let value = self.get(name)?.clone();
        let number = value.as_f64();
        if number.is_none() {
            self.problem(format!("{name}: expected a number, found {value}"));
        }
        number
    }

    fn positive(&mut self, name: &str) -> f64 {
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

    fn positive_or(&mut self, name: &str, default: f64) -> f64 {
        if self.get(name).is_some() { self.positive(name) } else { default }
    }

    fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.get(name).cloned() {
            None => default,
            Some(Value::Bool(flag)) => flag,
            Some(other) => {
                self.problem(format!("{name}: expected true or false, found {other}"));
                default
            }
        }
    }

    fn text(&mut self, name: &str) -> Option<String> {
        let text = self.optional_text(name);
        if text.is_none() && self.get(name).is_none() {
            self.problem(format!("{name}: expected a name, found none"));
        }
        text
    }

    fn optional_text(&mut self, name: &str) -> Option<String> {
        match self.get(name).cloned()? {
            Value::String(text) => Some(text),
            other => {
                self.problem(format!("{name}: expected a name, found {other}"));
                None
            }
        }
    }

    fn only(&mut self, name: &str, supported: &str) {
        if let Some(found) = self.optional_text(name)
            && found != supported
        {
            self.problem(format!("{name}: expected {supported:?}, found {found:?}"));
        }
    }

    fn activation(&mut self, name: &str, default: Activation) -> Activation {
        let Some(found) = self.optional_text(name) else {
            return default;
        };
        Activation::from_name(&found).unwrap_or_else(|| {
            self.problem(format!("{name}: expected one of silu, gelu, gelu_new, gelu_pytorch_tanh, relu, tanh, found {found:?}"));
            default
        })
    }

    /// A token id, which may lie above the vocabulary (old GPT-2 files do that for tokens that never occur).
    fn id(&mut self, name: &str) -> Option<u32> {
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

    fn ids(&mut self, name: &str) -> Vec<u32> {
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

    /// Whether each layer slides, from `layer_types`.
    fn layer_types(&mut self, layers: usize) -> Option<Vec<bool>> {
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
        Some(sliding)
    }

    fn labels(&mut self) -> Option<usize> {
        if self.get("num_labels").is_some() {
            return Some(self.count("num_labels", MAX_VOCAB));
        }
        match self.get("id2label") {
            Some(Value::Object(labels)) => Some(labels.len()),
            _ => None,
        }
    }
}

#[cfg(test)]
#[path = "hf_config_tests.rs"]
mod tests;
