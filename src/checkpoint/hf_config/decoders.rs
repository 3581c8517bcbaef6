//! The families that attend backwards only. Each of those with rotary positions is Llama, and what it has in another way.

use super::fields::Fields;
use super::rope::{RopeDefaults, rope, ropes_by_layer_type};
use super::{MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, blank};
use crate::checkpoint::{
    Activation, Architecture, EmbeddingProjection, Experts, LayerKind, Naming, Norm, Positions, ProjectionPlace, QkNorm, Residual, Rope,
    RopeScaling,
};

/// What the class of a family says where the file does not.
#[derive(Clone, Copy)]
struct Defaults {
    /// `None`: as many as there are query heads.
    kv_heads: Option<usize>,
    /// `None`: the width divided by the heads.
    head_dim: Option<usize>,
    max_positions: usize,
    theta: f64,
    eps: f64,
    pad: Option<u32>,
}

const LLAMA: Defaults = Defaults { kv_heads: None, head_dim: None, max_positions: 2048, theta: 10_000.0, eps: 1e-6, pad: None };

/// Llama: rotary positions, root-mean-square norms before each part, a gated MLP.
pub fn llama(fields: &mut Fields, model_type: String) -> Architecture {
    let bias = fields.flag("attention_bias", false);
    let mlp_bias = fields.flag("mlp_bias", false);
    Architecture { qkv_bias: bias, output_bias: bias, mlp_bias, ..rotary(fields, model_type, LLAMA) }
}

/// Mistral and Mixtral: every layer slides, if any does.
pub fn mistral(fields: &mut Fields, model_type: String) -> Architecture {
    let mixture = model_type == "mixtral";
    let (theta, eps) = if mixture { (1e6, 1e-5) } else { (1e4, 1e-6) };
    let base = rotary(fields, model_type, Defaults { kv_heads: Some(8), max_positions: 4096 * 32, theta, eps, ..LLAMA });
    // A file that says nothing of it means 4096 in Mistral and no window in Mixtral.
    let window = window(fields, (!mixture).then_some(4096));
    let layers = layers(base.layers.len(), |_| LayerKind { window, rope: Some(0), experts: mixture });
    let base = Architecture { layers, ..base };
    if !mixture {
        return base;
    }
    let experts = Experts {
        count: fields.count_or("num_local_experts", MAX_LAYERS, 8),
        per_token: fields.count_or("num_experts_per_tok", MAX_LAYERS, 2),
        intermediate_size: base.intermediate_size,
        normalised: true,
    };
    mixture_of(fields, Architecture { naming: Naming::Mixtral, ..base }, experts)
}

/// Qwen2, Qwen3 and Qwen3-MoE.
pub fn qwen(fields: &mut Fields, model_type: String) -> Architecture {
    let family = model_type.clone();
    let third = family != "qwen2";
    let kv_heads = if family == "qwen3_moe" { 4 } else { 32 };
    let head_dim = (family == "qwen3").then_some(128);
    let base = rotary(fields, model_type, Defaults { kv_heads: Some(kv_heads), head_dim, max_positions: 32768, ..LLAMA });
    let bias = fields.flag("attention_bias", false);
    let size = if fields.flag("use_sliding_window", false) { window(fields, Some(4096)) } else { None };
    let count = base.layers.len();
    let slides: Vec<bool> = if family == "qwen3_moe" {
        vec![true; count]
    } else {
        let first = fields.count_or("max_window_layers", MAX_LAYERS, 28);
        fields.layer_types(count).unwrap_or_else(|| (0..count).map(|layer| layer >= first).collect())
    };
    let layers = layers(count, |layer| LayerKind { window: size.filter(|_| slides[layer]), rope: Some(0), experts: false });
    let base =
        Architecture { layers, qk_norm: third.then_some(QkNorm::Head), qkv_bias: !third || bias, output_bias: third && bias, ..base };
    if family == "qwen3_moe" { qwen_mixture(fields, base) } else { base }
}

fn qwen_mixture(fields: &mut Fields, mut base: Architecture) -> Architecture {
    let step = fields.count_or("decoder_sparse_step", MAX_LAYERS, 1);
    let dense = fields.numbers("mlp_only_layers");
    for (layer, kind) in base.layers.iter_mut().enumerate() {
        kind.experts = !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
    }
    let experts = Experts {
        // transformers 5 writes the second name.
        count: fields.count_of(["num_experts", "num_local_experts"], MAX_LAYERS, 128),
        per_token: fields.count_or("num_experts_per_tok", MAX_LAYERS, 8),
        intermediate_size: fields.count_or("moe_intermediate_size", MAX_WIDTH, 768),
        normalised: fields.flag("norm_topk_prob", false),
    };
    mixture_of(fields, base, experts)
}

fn mixture_of(fields: &mut Fields, base: Architecture, experts: Experts) -> Architecture {
    if experts.per_token > experts.count {
        let (chosen, count) = (experts.per_token, experts.count);
        fields.problem(format!("num_experts_per_tok: expected at most the number of experts ({count}), found {chosen}"));
    }
    Architecture { experts: Some(experts), ..base }
}

/// Gemma, Gemma 2 and the text model of Gemma 3.
pub fn gemma(fields: &mut Fields, model_type: String) -> Architecture {
    let family = model_type.clone();
    let (first, third) = (family == "gemma", family == "gemma3_text");
    let defaults = Defaults {
        kv_heads: Some(if first { 16 } else { 4 }),
        head_dim: Some(256),
        max_positions: if third { 131_072 } else { 8192 },
        pad: Some(0),
        ..LLAMA
    };
    let base = if third {
        let full = RopeDefaults { theta: 1e6, ..RopeDefaults::of(defaults.max_positions) };
        let sliding = RopeDefaults { theta_names: &["rope_local_base_freq"], ..RopeDefaults::of(defaults.max_positions) };
        let ropes = |fields: &mut Fields, head_dim| ropes_by_layer_type(fields, head_dim, [&full, &sliding], [true, false]);
        rotary_with(fields, model_type, defaults, ropes)
    } else {
        rotary(fields, model_type, defaults)
    };
    fields.must_be("use_bidirectional_attention", false, "a Gemma that attends both ways is not supported");
    let bias = fields.flag("attention_bias", false);
    // "gelu" is a legacy value of Gemma's first files, which mean the form with the hyperbolic tangent.
    let activation = match fields.activation(if first { "hidden_act" } else { "hidden_activation" }, Activation::GeluTanh) {
        Activation::Gelu if first => Activation::GeluTanh,
        other => other,
    };
    let base = Architecture {
        embedding_scale: Some((base.hidden_size as f64).sqrt()),
        norm_from_one: true,
        qkv_bias: bias,
        output_bias: bias,
        activation,
        ..base
    };
    if first {
        return base;
    }
    let count = base.layers.len();
    let size = window(fields, Some(4096));
    // Gemma 3 files from before `layer_types` say after how many layers a full one comes.
    let every = if third { fields.count_or("sliding_window_pattern", MAX_LAYERS, 6) } else { 2 };
    let slides = fields.layer_types(count).unwrap_or_else(|| (0..count).map(|layer| !(layer + 1).is_multiple_of(every)).collect());
    let kind = |layer: usize| {
        let slides = slides[layer];
        LayerKind { window: size.filter(|_| slides), rope: Some(usize::from(third && slides)), experts: false }
    };
    let default_cap = if third { None } else { Some(50.0) };
    let cap = if fields.map.contains_key("attn_logit_softcapping") { None } else { default_cap };
    let softcap = if fields.get("attn_logit_softcapping").is_some() { Some(fields.positive("attn_logit_softcapping")) } else { cap };
    Architecture {
        layers: layers(count, kind),
        residual: Residual::Sandwich,
        qk_norm: third.then_some(QkNorm::Head),
        attention_scale: fields.positive_or("query_pre_attn_scalar", 256.0).powf(-0.5),
        attention_softcap: softcap,
        ..base
    }
}

/// Phi-3: fused projections, partly rotated heads.
pub fn phi3(fields: &mut Fields, model_type: String) -> Architecture {
    let defaults = Defaults { max_positions: 4096, eps: 1e-5, pad: Some(32000), ..LLAMA };
    let rope_defaults =
        RopeDefaults { partial_names: &["partial_rotary_factor"], original: Some(4096.0), ..RopeDefaults::of(defaults.max_positions) };
    let base = rotary_with(fields, model_type, defaults, |fields, head_dim| vec![rope(fields, head_dim, &rope_defaults)]);
    let window = window(fields, None);
    Architecture {
        naming: Naming::Phi3,
        layers: layers(base.layers.len(), |_| LayerKind { window, rope: Some(0), experts: false }),
        ..base
    }
}

/// OLMo 2: norms on what is added to the residual stream, and on queries and keys as a whole.
pub fn olmo2(fields: &mut Fields, model_type: String) -> Architecture {
    let bias = fields.flag("attention_bias", false);
    let base = rotary(fields, model_type, Defaults { eps: 1e-5, pad: Some(1), ..LLAMA });
    Architecture { residual: Residual::OutputNorm, qk_norm: Some(QkNorm::Whole), qkv_bias: bias, output_bias: bias, ..base }
}

/// InternLM2: Llama under other names, with queries, keys and values in one matrix.
pub fn internlm2(fields: &mut Fields, model_type: String) -> Architecture {
    let bias = fields.flag("bias", true);
    let base = rotary(fields, model_type, Defaults { pad: Some(0), ..LLAMA });
    Architecture { naming: Naming::InternLm2, qkv_bias: bias, output_bias: bias, ..base }
}

fn rotary(fields: &mut Fields, model_type: String, defaults: Defaults) -> Architecture {
    let rope_defaults = RopeDefaults { theta: defaults.theta, ..RopeDefaults::of(defaults.max_positions) };
    rotary_with(fields, model_type, defaults, |fields, head_dim| vec![rope(fields, head_dim, &rope_defaults)])
}

fn rotary_with(
    fields: &mut Fields,
    model_type: String,
    defaults: Defaults,
    ropes: impl FnOnce(&mut Fields, usize) -> Vec<Rope>,
) -> Architecture {
    let hidden_size = fields.count("hidden_size", MAX_WIDTH);
    let heads = fields.count("num_attention_heads", MAX_WIDTH);
    // Null is what the widths say, and absent is what the class says.
    let class = |name: &str, default: Option<usize>| default.filter(|_| !fields.is_null(name));
    let default_kv = class("num_key_value_heads", defaults.kv_heads).unwrap_or(heads);
    let default_dim = class("head_dim", defaults.head_dim).unwrap_or((hidden_size / heads).max(1));
    let kv_heads = fields.count_or("num_key_value_heads", MAX_WIDTH, default_kv);
    let head_dim = fields.count_or("head_dim", 1 << 12, default_dim);
    if !heads.is_multiple_of(kv_heads) {
        fields.problem(format!("num_key_value_heads: expected a divisor of num_attention_heads ({heads}), found {kv_heads}"));
    }
    let ropes = ropes(fields, head_dim);
    let positions = fields.count_or("max_position_embeddings", MAX_POSITIONS, defaults.max_positions);
    let layer_count = fields.count("num_hidden_layers", MAX_LAYERS);
    Architecture {
        causal: true,
        hidden_size,
        intermediate_size: fields.count("intermediate_size", MAX_WIDTH),
        heads,
        kv_heads,
        head_dim,
        layers: layers(layer_count, |_| LayerKind { window: None, rope: Some(0), experts: false }),
        max_positions: ropes.iter().map(|rope| reach(rope, positions)).min().unwrap_or(positions),
        ropes,
        norm: Norm::Rms { eps: fields.positive_or("rms_norm_eps", defaults.eps) },
        gated: true,
        activation: fields.activation("hidden_act", Activation::Silu),
        final_norm: true,
        attention_scale: (head_dim as f64).powf(-0.5),
        pad_token_id: fields.id_or("pad_token_id", defaults.pad),
        ..blank(fields, model_type, Naming::Llama)
    }
}

/// How far a rotary embedding reaches: files that scale it from outside state the original length.
fn reach(rope: &Rope, positions: usize) -> usize {
    let scaled = |factor: f64, original: f64| ((original * factor) as usize).min(MAX_POSITIONS).max(positions);
    match rope.scaling {
        RopeScaling::Dynamic { factor, original_positions } => scaled(factor, original_positions as f64),
        RopeScaling::Yarn { factor, original_positions, .. } => scaled(factor, original_positions),
        _ => positions,
    }
}

/// GPT-NeoX and Pythia: fused projections, partly rotated heads, and usually both parts beside each other.
pub fn gpt_neox(fields: &mut Fields, model_type: String) -> Architecture {
    let rope_defaults = RopeDefaults {
        theta_names: &["rope_theta", "rotary_emb_base"],
        partial_names: &["partial_rotary_factor", "rotary_pct"],
        partial: 0.25,
        ..RopeDefaults::of(2048)
    };
    let (hidden_size, heads) = (fields.count("hidden_size", MAX_WIDTH), fields.count("num_attention_heads", MAX_WIDTH));
    let head_dim = equal_heads(fields, "num_attention_heads", hidden_size, heads);
    let rope = rope(fields, head_dim, &rope_defaults);
    let positions = fields.count_or("max_position_embeddings", MAX_POSITIONS, 2048);
    let layer_count = fields.count("num_hidden_layers", MAX_LAYERS);
    let parallel = fields.flag("use_parallel_residual", true);
    let bias = fields.flag("attention_bias", true);
    Architecture {
        causal: true,
        hidden_size,
        intermediate_size: fields.count("intermediate_size", MAX_WIDTH),
        heads,
        kv_heads: heads,
        head_dim,
        layers: layers(layer_count, |_| LayerKind { window: None, rope: Some(0), experts: false }),
        max_positions: reach(&rope, positions),
        ropes: vec![rope],
        norm: Norm::Layer { eps: fields.positive_or("layer_norm_eps", 1e-5) },
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: true,
        activation: fields.activation("hidden_act", Activation::Gelu),
        residual: if parallel { Residual::Parallel } else { Residual::PreNorm },
        final_norm: true,
        attention_scale: (head_dim as f64).powf(-0.5),
        ..blank(fields, model_type, Naming::GptNeox)
    }
}

/// GPT-2, whose configuration has names of its own.
pub fn gpt2(fields: &mut Fields, model_type: String) -> Architecture {
    let (hidden_size, heads) = (fields.count("n_embd", MAX_WIDTH), fields.count("n_head", MAX_WIDTH));
    let head_dim = equal_heads(fields, "n_head", hidden_size, heads);
    let rows = fields.count_or("n_positions", MAX_POSITIONS, 1024);
    let layer_count = fields.count("n_layer", MAX_LAYERS);
    fields.must_be("scale_attn_by_inverse_layer_idx", false, "a scale for every layer is not supported");
    fields.must_be("add_cross_attention", false, "a reward model attends to itself only");
    let scaled = fields.flag("scale_attn_weights", true);
    Architecture {
        causal: true,
        hidden_size,
        positions: Some(Positions { rows, first: 0, skips: None }),
        intermediate_size: fields.count_or("n_inner", MAX_WIDTH, 4 * hidden_size),
        heads,
        kv_heads: heads,
        head_dim,
        layers: layers(layer_count, |_| LayerKind { window: None, rope: None, experts: false }),
        norm: Norm::Layer { eps: fields.positive_or("layer_norm_epsilon", 1e-5) },
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        activation: fields.activation("activation_function", Activation::GeluTanh),
        final_norm: true,
        attention_scale: if scaled { (head_dim as f64).powf(-0.5) } else { 1.0 },
        max_positions: rows,
        ..blank(fields, model_type, Naming::Gpt2)
    }
}

/// OPT: learned positions that start at row 2, and in its 350M form narrow embeddings and norms behind each part.
pub fn opt(fields: &mut Fields, model_type: String) -> Architecture {
    /// `OPTLearnedPositionalEmbedding.offset`.
    const FIRST: usize = 2;
    let (hidden_size, heads) = (fields.count("hidden_size", MAX_WIDTH), fields.count("num_attention_heads", MAX_WIDTH));
    let head_dim = equal_heads(fields, "num_attention_heads", hidden_size, heads);
    let positions = fields.count_or("max_position_embeddings", MAX_POSITIONS, 2048);
    let layer_count = fields.count("num_hidden_layers", MAX_LAYERS);
    let embedding_size = fields.count_or("word_embed_proj_dim", MAX_WIDTH, hidden_size);
    let before = fields.flag("do_layer_norm_before", true);
    let removed = fields.flag("_remove_final_layer_norm", false);
    let bias = fields.flag("enable_bias", true);
    fields.must_be("layer_norm_elementwise_affine", true, "norms without weights are not supported");
    Architecture {
        causal: true,
        hidden_size,
        embedding_projection: projected(embedding_size, hidden_size, ProjectionPlace::BeforePositions),
        output_projection: (embedding_size != hidden_size).then_some(embedding_size),
        positions: Some(Positions { rows: positions + FIRST, first: FIRST, skips: None }),
        intermediate_size: fields.count("ffn_dim", MAX_WIDTH),
        heads,
        kv_heads: heads,
        head_dim,
        layers: layers(layer_count, |_| LayerKind { window: None, rope: None, experts: false }),
        norm: Norm::Layer { eps: 1e-5 },
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: bias,
        activation: fields.activation("activation_function", Activation::Relu),
        residual: if before { Residual::PreNorm } else { Residual::PostNorm },
        final_norm: before && !removed,
        attention_scale: (head_dim as f64).powf(-0.5),
        max_positions: positions,
        pad_token_id: fields.id_or("pad_token_id", Some(1)),
        ..blank(fields, model_type, Naming::Opt)
    }
}

pub fn layers(count: usize, kind: impl Fn(usize) -> LayerKind) -> Vec<LayerKind> {
    (0..count).map(kind).collect()
}

/// The projection of a token table of another width than the model's.
pub fn projected(from: usize, hidden_size: usize, place: ProjectionPlace) -> Option<EmbeddingProjection> {
    (from != hidden_size).then_some(EmbeddingProjection { from, place })
}

/// The width of a head where the heads share the width of the model.
pub fn equal_heads(fields: &mut Fields, name: &str, hidden_size: usize, heads: usize) -> usize {
    if !hidden_size.is_multiple_of(heads) {
        fields.problem(format!("{name}: expected a divisor of the width ({hidden_size}), found {heads}"));
    }
    (hidden_size / heads).max(1)
}

/// `sliding_window`: null is no window, and absent is what the class says.
fn window(fields: &mut Fields, default: Option<usize>) -> Option<usize> {
    match default {
        _ if fields.is_null("sliding_window") => None,
        None if fields.get("sliding_window").is_none() => None,
        _ => Some(fields.count_or("sliding_window", MAX_POSITIONS, default.unwrap_or(1))),
    }
}
