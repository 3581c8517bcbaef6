//! What a model is, as data: one decoder and one encoder are driven by it, so that a family is a value and not a file.

use serde::Serialize;

use super::head_config::HeadConfig;
use super::pooling::Pooling;

/// What `config.json` says of a model, every number checked. Made only by [`Architecture::parse`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Architecture {
    /// `model_type` of the configuration, such as `qwen3`.
    pub model_type: String,
    /// How the family names its tensors.
    pub naming: Naming,
    /// Decoders attend backwards only; encoders both ways.
    pub causal: bool,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// One entry a layer, from the embedding upwards.
    pub layers: Vec<LayerKind>,
    /// The rotary tables that layers refer to by index; empty where positions are learned.
    pub ropes: Vec<Rope>,
    pub norm: Norm,
    /// Root-mean-square norms on every query and key head.
    pub qk_norm: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
    pub gated: bool,
    pub activation: Activation,
    /// Where the norms stand around the residual stream.
    pub residual: Residual,
    /// Factor on the products of queries and keys, usually `head_dim^-0.5`.
    pub attention_scale: f64,
    /// Rows of the learned position table; `None` where positions are rotary.
    pub learned_positions: Option<usize>,
    /// Rows of the segment table; 0 where there is none.
    pub token_types: usize,
    /// The longest sequence the model is made for.
    pub max_positions: usize,
    /// The family's own way; the head may have another.
    pub pooling: Pooling,
    pub pad_token_id: Option<u32>,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    /// Outputs of the head as the configuration states them; the head's own rows decide.
    pub labels: Option<usize>,
    pub head: HeadConfig,
}

/// How a family names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Naming {
    /// `layers.0.self_attn.q_proj.weight`: Llama and the many that follow it.
    Llama,
    /// `encoder.layer.0.attention.self.query.weight`.
    Bert,
}

/// What tells one layer from another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerKind {
    /// A query sees the keys at most `window - 1` positions before it; `None`: all of them.
    pub window: Option<usize>,
    /// Index into [`Architecture::ropes`].
    pub rope: Option<usize>,
}

/// One rotary position embedding (RoFormer, 2104.09864).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rope {
    pub theta: f64,
    /// Leading dimensions of a head that are rotated.
    pub dims: usize,
    pub scaling: RopeScaling,
}

/// How inverse frequencies are changed for longer contexts (transformers, `modeling_rope_utils.py`).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum RopeScaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_positions: f64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms { eps: f64 },
    /// `(x - mean) / sqrt(var + eps) * weight + bias`.
    Layer { eps: f64 },
}

impl Norm {
    pub fn eps(self) -> f64 {
        match self {
            Self::Rms { eps } | Self::Layer { eps } => eps,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    /// With the hyperbolic tangent.
    GeluTanh,
    Relu,
    Tanh,
}

impl Activation {
    /// An activation by the name that transformers gives it.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Relu => "relu",
            Self::Tanh => "tanh",
        }
    }
}

/// Where the norms stand around the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Residual {
    /// `x + f(norm(x))`, and a last norm before the head.
    PreNorm,
    /// `norm(x + f(x))`, and a norm on the embedding.
    PostNorm,
}

impl Architecture {
    /// Sentences that name each difference which forbids averaging; empty for mergeable architectures.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let (ours, theirs) = (fields(self), fields(other));
        ours.iter()
            .filter(|(name, _)| name.as_str() != "labels")
            .filter_map(|(name, ours)| {
                let theirs = theirs.get(name)?;
                (ours != theirs).then(|| format!("{name}: expected {}, found {}", shortened(ours), shortened(theirs)))
            })
            .collect()
    }
}

// The fields as serde names them, so that a new one is compared without being listed here again.
fn fields(architecture: &Architecture) -> serde_json::Map<String, serde_json::Value> {
    match serde_json::to_value(architecture) {
        Ok(serde_json::Value::Object(fields)) => fields,
        // A struct of plain data always serialises to an object.
        _ => serde_json::Map::new(),
    }
}

fn shortened(value: &serde_json::Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(200) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}
