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
    /// From a narrower token table to `hidden_size`.
    pub embedding_projection: Option<EmbeddingProjection>,
    /// Factor on the rows of the token table.
    pub embedding_scale: Option<f64>,
    /// A norm on the embedding. In pre-norm families it stands in for the attention norm of the first layer.
    pub embedding_norm: bool,
    /// Learned positions; `None` where positions are rotary or relative.
    pub positions: Option<Positions>,
    /// Rows of the segment table; 0 where there is none.
    pub token_types: usize,
    pub intermediate_size: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// One entry a layer, from the embedding upwards.
    pub layers: Vec<LayerKind>,
    /// The rotary embeddings that layers refer to by index; empty where positions are learned.
    pub ropes: Vec<Rope>,
    /// DeBERTa's relative positions.
    pub disentangled: Option<Disentangled>,
    /// DeBERTa v2's convolution beside the first layer.
    pub convolution: Option<Convolution>,
    pub norm: Norm,
    /// Layer norms have a bias.
    pub norm_bias: bool,
    /// Norms multiply by `1 + weight`.
    pub norm_from_one: bool,
    /// Root-mean-square norms on queries and keys.
    pub qk_norm: Option<QkNorm>,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
    pub gated: bool,
    pub activation: Activation,
    /// The mixture that stands in for the MLP in the layers that say so.
    pub experts: Option<Experts>,
    /// Where the norms stand around the residual stream.
    pub residual: Residual,
    /// A norm behind the last layer.
    pub final_norm: bool,
    /// Columns of what the head reads, where a projection leads to fewer than `hidden_size`.
    pub output_projection: Option<usize>,
    /// Factor on the products of queries and keys, usually `head_dim^-0.5`.
    pub attention_scale: f64,
    /// Products beyond this are bent back: `cap * tanh(product / cap)`.
    pub attention_softcap: Option<f64>,
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
    /// As Llama, with `block_sparse_moe`.
    Mixtral,
    /// As Llama, with `qkv_proj` and `gate_up_proj`.
    Phi3,
    /// `layers.0.attention.wqkv.weight`, `layers.0.feed_forward.w1.weight`.
    InternLm2,
    /// `layers.0.attention.query_key_value.weight`.
    GptNeox,
    /// `h.0.attn.c_attn.weight`, stored with inputs in rows.
    Gpt2,
    /// `decoder.layers.0.fc1.weight`.
    Opt,
    /// `encoder.layer.0.attention.self.query.weight`.
    Bert,
    /// `transformer.layer.0.attention.q_lin.weight`.
    DistilBert,
    /// `encoder.layer.0.attention.self.query_proj.weight`.
    Deberta,
    /// `layers.0.attn.Wqkv.weight`.
    ModernBert,
}

/// The projection from the width of the token table to the width of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct EmbeddingProjection {
    /// Columns of the token table.
    pub from: usize,
    pub place: ProjectionPlace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ProjectionPlace {
    /// Before positions and segments are added.
    BeforePositions,
    BeforeNorm,
    AfterNorm,
}

/// A table of learned positions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Positions {
    pub rows: usize,
    /// The row of a sequence's first token.
    pub first: usize,
    /// Tokens of this id take the row of that number and do not count as positions.
    pub skips: Option<u32>,
}

/// What tells one layer from another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerKind {
    /// A query sees only keys that are less than this many positions away; `None`: all of them.
    pub window: Option<usize>,
    /// Index into [`Architecture::ropes`].
    pub rope: Option<usize>,
    /// The MLP is a mixture of experts.
    pub experts: bool,
}

/// One rotary position embedding (RoFormer, 2104.09864).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rope {
    pub theta: f64,
    /// Leading dimensions of a head that are rotated.
    pub dims: usize,
    pub scaling: RopeScaling,
    /// Factor on the rotated dimensions of queries and keys.
    pub attention_factor: f64,
}

/// How inverse frequencies are changed for longer contexts (transformers, `modeling_rope_utils.py`).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// The base grows with the length of a sequence that is longer than the original context.
    Dynamic {
        factor: f64,
        original_positions: usize,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
    /// YaRN (2309.00071).
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_positions: f64,
        /// The blended range is widened to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (2402.13753): a divisor for every frequency, of two sets by the length of the sequence.
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original_positions: usize,
    },
}

impl Rope {
    /// Which of its tables rotates a sequence of so many tokens; it never falls as the sequence grows.
    pub fn variant(&self, tokens: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { original_positions, .. } if tokens > *original_positions => tokens,
            RopeScaling::LongRope { original_positions, .. } if tokens > *original_positions => 1,
            _ => 0,
        }
    }
}

/// Disentangled attention (DeBERTa, 2006.03654): beside their contents, queries and keys meet embeddings of their distance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disentangled {
    /// Distances are told apart up to here; the table has twice as many rows.
    pub span: usize,
    /// Distances beyond half the span share logarithmic buckets that end here; `None`: every distance is its own.
    pub buckets_to: Option<usize>,
    /// Queries meet the embeddings of distances.
    pub content_to_position: bool,
    /// Keys meet the embeddings of distances.
    pub position_to_content: bool,
    /// The projections of queries and keys also project the embeddings; else they have projections of their own.
    pub shared_projections: bool,
    /// A norm on the embeddings.
    pub norm: bool,
}

/// What is added to the first layer's outcome: the activated convolution of the embeddings along the sequence, which is
/// zero beyond its ends; a norm follows (transformers `DebertaV2Encoder.conv`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Convolution {
    /// Tokens that one output sees, half of the others on either side: odd.
    pub kernel: usize,
    pub activation: Activation,
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

/// Over what a norm on queries and keys runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum QkNorm {
    /// Over every head by itself.
    Head,
    /// Over all heads at once.
    Whole,
}

/// A mixture of experts: every token goes through the few MLPs that a router gives the largest weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Experts {
    pub count: usize,
    pub per_token: usize,
    pub intermediate_size: usize,
    /// The weights of the chosen experts are made to sum to one.
    pub normalised: bool,
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
            "gelu" | "gelu_python" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate" => Self::GeluTanh,
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
    /// `x + f(norm(x))`.
    PreNorm,
    /// `norm(x + f(x))`.
    PostNorm,
    /// `x + norm(f(x))`.
    OutputNorm,
    /// `x + norm(f(norm(x)))`.
    Sandwich,
    /// `x + attention(norm(x)) + mlp(norm(x))`.
    Parallel,
}

impl Architecture {
    /// Columns of the token table.
    pub fn embedding_size(&self) -> usize {
        self.embedding_projection.map_or(self.hidden_size, |projection| projection.from)
    }

    /// Columns of what the head reads.
    pub fn output_size(&self) -> usize {
        self.output_projection.unwrap_or(self.hidden_size)
    }

    /// The longest sequence that the model can be asked for: a table of learned positions ends, rotary and relative ones
    /// go on beyond [`Self::max_positions`] as transformers lets them.
    pub fn longest(&self) -> Option<usize> {
        self.positions.is_some().then_some(self.max_positions)
    }

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
