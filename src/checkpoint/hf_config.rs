//! `config.json`, as transformers 4 and 5 write it, to an [`Architecture`]. Pure; every number is checked, and every
//! mistake is reported at once. Defaults are those of the transformers class of the family.

mod decoders;
mod encoders;
mod fields;
mod rope;

use serde_json::Value;

use super::architecture::{Activation, Architecture, Naming, Norm, Residual};
use super::head_config::{HeadConfig, out_of_scope};
use super::pooling::Pooling;
use fields::Fields;

// Bounds that no real model reaches; they keep a lying file from costing memory before its tensors are looked at.
const MAX_LAYERS: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 26;

/// The families that can be served, each with the class that its configuration is read as.
type Read = fn(&mut Fields, String) -> Architecture;
pub(super) const FAMILIES: [(&str, Read); 22] = [
    ("llama", decoders::llama),
    ("mistral", decoders::mistral),
    ("mixtral", decoders::mistral),
    ("qwen2", decoders::qwen),
    ("qwen3", decoders::qwen),
    ("qwen3_moe", decoders::qwen),
    ("gemma", decoders::gemma),
    ("gemma2", decoders::gemma),
    ("gemma3_text", decoders::gemma),
    ("phi3", decoders::phi3),
    ("olmo2", decoders::olmo2),
    ("internlm2", decoders::internlm2),
    ("gpt_neox", decoders::gpt_neox),
    ("gpt2", decoders::gpt2),
    ("opt", decoders::opt),
    ("bert", encoders::bert),
    ("roberta", encoders::bert),
    ("xlm-roberta", encoders::bert),
    ("electra", encoders::bert),
    ("distilbert", encoders::distilbert),
    ("deberta-v2", encoders::deberta),
    ("modernbert", encoders::modernbert),
];

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
        let Some((_, read)) = FAMILIES.iter().find(|(family, _)| *family == model_type) else {
            let families = FAMILIES.map(|(family, _)| family).join(", ");
            return Err(vec![format!("model_type: expected one of {families}, found {model_type:?}")]);
        };
        let mut architecture = read(&mut fields, model_type);
        architecture.head = HeadConfig::parse(map, &mut fields.problems);
        if fields.problems.is_empty() { Ok(architecture) } else { Err(fields.problems) }
    }
}

/// What all families have in one way, and nothing of what only some have.
fn blank(fields: &mut Fields, model_type: String, naming: Naming) -> Architecture {
    Architecture {
        model_type,
        naming,
        causal: false,
        vocab_size: fields.count("vocab_size", MAX_VOCAB),
        hidden_size: 1,
        embedding_projection: None,
        embedding_scale: None,
        embedding_norm: false,
        positions: None,
        token_types: 0,
        intermediate_size: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        layers: Vec::new(),
        ropes: Vec::new(),
        disentangled: None,
        convolution: None,
        norm: Norm::Rms { eps: 1e-6 },
        norm_bias: true,
        norm_from_one: false,
        qk_norm: None,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        gated: false,
        activation: Activation::Silu,
        experts: None,
        residual: Residual::PreNorm,
        final_norm: false,
        output_projection: None,
        attention_scale: 1.0,
        attention_softcap: None,
        max_positions: 1,
        pooling: Pooling::LastNonPad,
        pad_token_id: fields.id("pad_token_id"),
        bos_token_id: fields.id("bos_token_id"),
        eos_token_ids: fields.ids("eos_token_id"),
        labels: fields.labels(),
        head: HeadConfig::default(),
    }
}

#[cfg(test)]
#[path = "hf_config_tests.rs"]
mod tests;
