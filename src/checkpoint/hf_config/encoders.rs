//! The families that attend both ways and read their first token, or the mean of all.

use super::decoders::{equal_heads, layers, projected};
use super::fields::Fields;
use super::rope::{RopeDefaults, ropes_by_layer_type};
use super::{MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, blank};
use crate::checkpoint::{
    Activation, Architecture, Convolution, Disentangled, LayerKind, Naming, Norm, Pooling, Positions, ProjectionPlace, Residual,
};

/// BERT, and what follows it closely: learned positions, norms behind each part.
fn post_norm(fields: &mut Fields, model_type: String, naming: Naming, names: [&str; 4]) -> Architecture {
    let [width, inner, heads_name, layers_name] = names;
    let (hidden_size, heads) = (fields.count(width, MAX_WIDTH), fields.count(heads_name, MAX_WIDTH));
    let head_dim = equal_heads(fields, heads_name, hidden_size, heads);
    let layer_count = fields.count(layers_name, MAX_LAYERS);
    fields.must_be("is_decoder", false, "an encoder that attends backwards only is not supported");
    fields.must_be("add_cross_attention", false, "a reward model attends to itself only");
    Architecture {
        hidden_size,
        embedding_norm: true,
        intermediate_size: fields.count(inner, MAX_WIDTH),
        heads,
        kv_heads: heads,
        head_dim,
        layers: layers(layer_count, |_| LayerKind { window: None, rope: None, experts: false }),
        norm: Norm::Layer { eps: fields.positive_or("layer_norm_eps", 1e-12) },
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        residual: Residual::PostNorm,
        attention_scale: (head_dim as f64).powf(-0.5),
        pooling: Pooling::Cls,
        ..blank(fields, model_type, naming)
    }
}

const BERT_NAMES: [&str; 4] = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"];

/// BERT, RoBERTa, XLM-RoBERTa and ELECTRA.
pub fn bert(fields: &mut Fields, model_type: String) -> Architecture {
    fields.only("position_embedding_type", "absolute");
    let roberta = matches!(model_type.as_str(), "roberta" | "xlm-roberta");
    let electra = model_type == "electra";
    let base = post_norm(fields, model_type, Naming::Bert, BERT_NAMES);
    let pad = fields.id_or("pad_token_id", Some(u32::from(roberta)));
    // RoBERTa counts positions from behind the pad token's row, and only tokens that are not pads.
    let skips = if roberta { pad.or(Some(1)) } else { None };
    let rows = fields.count_or("max_position_embeddings", MAX_POSITIONS, 512);
    let first = skips.map_or(0, |pad| pad as usize + 1);
    if first >= rows {
        fields.problem(format!("max_position_embeddings: expected more than the {first} rows up to the pad token's, found {rows}"));
    }
    let embedding_size = if electra { fields.count_or("embedding_size", MAX_WIDTH, 128) } else { base.hidden_size };
    Architecture {
        embedding_projection: projected(embedding_size, base.hidden_size, ProjectionPlace::AfterNorm),
        positions: Some(Positions { rows, first, skips }),
        token_types: fields.count_or("type_vocab_size", MAX_VOCAB, 2),
        activation: fields.activation("hidden_act", Activation::Gelu),
        max_positions: rows.saturating_sub(first),
        pad_token_id: pad,
        ..base
    }
}

pub fn distilbert(fields: &mut Fields, model_type: String) -> Architecture {
    let base = post_norm(fields, model_type, Naming::DistilBert, ["dim", "hidden_dim", "n_heads", "n_layers"]);
    let rows = fields.count_or("max_position_embeddings", MAX_POSITIONS, 512);
    Architecture {
        positions: Some(Positions { rows, first: 0, skips: None }),
        norm: Norm::Layer { eps: 1e-12 },
        activation: fields.activation("activation", Activation::Gelu),
        max_positions: rows,
        pad_token_id: fields.id_or("pad_token_id", Some(0)),
        ..base
    }
}

/// More distances than any DeBERTa tells apart.
const MAX_DISTANCES: usize = 1 << 14;

/// DeBERTa v2 and v3: BERT whose attention knows distances.
pub fn deberta(fields: &mut Fields, model_type: String) -> Architecture {
    let base = post_norm(fields, model_type, Naming::Deberta, BERT_NAMES);
    let positions = fields.count_or("max_position_embeddings", MAX_POSITIONS, 512);
    let hidden_size = base.hidden_size;
    for (name, expected) in [("attention_head_size", base.head_dim), ("pooler_hidden_size", hidden_size)] {
        let found = fields.count_or(name, MAX_WIDTH, expected);
        if found != expected {
            fields.problem(format!("{name}: expected {expected}, found {found}"));
        }
    }
    let embedding_size = fields.count_or("embedding_size", MAX_WIDTH, hidden_size);
    let biased = fields.flag("position_biased_input", true);
    let kinds = fields.kinds("pos_att_type");
    let [content_to_position, position_to_content] = ["c2p", "p2c"].map(|kind| kinds.iter().any(|found| found == kind));
    let disentangled = fields.flag("relative_attention", false).then(|| {
        let most = fields.optional_count("max_relative_positions", MAX_DISTANCES).unwrap_or(positions.min(MAX_DISTANCES));
        let buckets = fields.optional_count("position_buckets", MAX_DISTANCES);
        if buckets.is_some_and(|buckets| buckets < 4 || most <= buckets / 2 + 1) {
            fields.problem(format!("position_buckets: expected 4 or more, and at most twice max_relative_positions ({most})"));
        }
        Disentangled {
            span: buckets.unwrap_or(most),
            buckets_to: buckets.map(|_| most),
            content_to_position,
            position_to_content,
            shared_projections: fields.flag("share_att_key", false),
            norm: fields.kinds("norm_rel_ebd").iter().any(|kind| kind == "layer_norm"),
        }
    });
    // The attention is scaled for every kind of product that is added up, whether or not it is.
    let products = 1 + usize::from(content_to_position) + usize::from(position_to_content);
    Architecture {
        embedding_projection: projected(embedding_size, hidden_size, ProjectionPlace::BeforeNorm),
        positions: biased.then_some(Positions { rows: positions, first: 0, skips: None }),
        token_types: fields.optional_count("type_vocab_size", MAX_VOCAB).unwrap_or(0),
        norm: Norm::Layer { eps: fields.positive_or("layer_norm_eps", 1e-7) },
        attention_scale: ((base.head_dim * products) as f64).powf(-0.5),
        disentangled,
        convolution: convolution(fields),
        activation: fields.activation("hidden_act", Activation::Gelu),
        max_positions: positions,
        pad_token_id: fields.id_or("pad_token_id", Some(0)),
        ..base
    }
}

/// Tokens that a convolution sees, which are 3 in the models there are.
const MAX_KERNEL: usize = 64;

fn convolution(fields: &mut Fields) -> Option<Convolution> {
    let kernel = fields.number("conv_kernel_size").filter(|size| *size > 0.0)?;
    // An even one shortens the sequence, and transformers fails on it.
    if !(kernel < MAX_KERNEL as f64 && kernel % 2.0 == 1.0) {
        fields.problem(format!("conv_kernel_size: expected 0 or an odd number below {MAX_KERNEL}, found {kernel}"));
    }
    let groups = fields.count_or("conv_groups", MAX_WIDTH, 1);
    if groups != 1 {
        fields.problem(format!("conv_groups: expected 1, found {groups}"));
    }
    Some(Convolution { kernel: (kernel as usize).min(MAX_KERNEL), activation: fields.activation("conv_act", Activation::Tanh) })
}

/// ModernBERT: rotary positions, norms before each part, and windows on most layers.
pub fn modernbert(fields: &mut Fields, model_type: String) -> Architecture {
    const POSITIONS: usize = 8192;
    let (hidden_size, heads) = (fields.count("hidden_size", MAX_WIDTH), fields.count("num_attention_heads", MAX_WIDTH));
    let head_dim = equal_heads(fields, "num_attention_heads", hidden_size, heads);
    let layer_count = fields.count("num_hidden_layers", MAX_LAYERS);
    let global = RopeDefaults { theta_names: &["global_rope_theta", "rope_theta"], theta: 160_000.0, ..RopeDefaults::of(POSITIONS) };
    // Local layers turn as the global ones do where the file has null for them.
    let local_names: &[&str] = if fields.is_null("local_rope_theta") { global.theta_names } else { &["local_rope_theta"] };
    let local = RopeDefaults { theta_names: local_names, ..RopeDefaults::of(POSITIONS) };
    let ropes = ropes_by_layer_type(fields, head_dim, [&global, &local], [true, true]);
    let every = fields.count_or("global_attn_every_n_layers", MAX_LAYERS, 3);
    let slides = fields.layer_types(layer_count);
    let slides = slides.unwrap_or_else(|| (0..layer_count).map(|layer| !layer.is_multiple_of(every)).collect());
    // Half of it on either side, inclusive.
    let window = fields.count_or("local_attention", MAX_POSITIONS, 128) / 2 + 1;
    let bias = fields.flag("attention_bias", false);
    let pooling = match fields.optional_text("classifier_pooling").as_deref() {
        None | Some("cls") => Pooling::Cls,
        Some("mean") => Pooling::Mean,
        Some(other) => {
            fields.problem(format!("classifier_pooling: expected cls or mean, found {other:?}"));
            Pooling::Cls
        }
    };
    Architecture {
        hidden_size,
        embedding_norm: true,
        intermediate_size: fields.count("intermediate_size", MAX_WIDTH),
        heads,
        kv_heads: heads,
        head_dim,
        layers: layers(layer_count, |layer| LayerKind {
            window: slides[layer].then_some(window),
            rope: Some(usize::from(slides[layer])),
            experts: false,
        }),
        ropes,
        norm: Norm::Layer { eps: fields.positive_or("norm_eps", 1e-5) },
        norm_bias: fields.flag("norm_bias", false),
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: fields.flag("mlp_bias", false),
        gated: true,
        activation: fields.activation("hidden_activation", Activation::Gelu),
        final_norm: true,
        attention_scale: (head_dim as f64).powf(-0.5),
        max_positions: fields.count_or("max_position_embeddings", MAX_POSITIONS, POSITIONS),
        pooling,
        pad_token_id: fields.id_or("pad_token_id", Some(50283)),
        ..blank(fields, model_type, Naming::ModernBert)
    }
}
