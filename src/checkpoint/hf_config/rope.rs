//! Rotary embeddings: `rope_parameters` (transformers 5: one set, or one for each type of layer), or `rope_theta` with
//! `rope_scaling` (transformers 4).

use serde_json::{Map, Value};

use super::fields::Fields;
use crate::checkpoint::{Rope, RopeScaling};

/// What a family's class says of its rotary embedding where the file does not.
pub struct RopeDefaults {
    /// Names of the base outside of `rope_parameters`, and the base where none of them stands there.
    pub theta_names: &'static [&'static str],
    pub theta: f64,
    /// The rotated share of a head, and the names of it outside of `rope_parameters`; no names: always the whole head.
    pub partial_names: &'static [&'static str],
    pub partial: f64,
    pub max_positions: usize,
    /// The length before it was scaled, where the class has one of its own.
    pub original: Option<f64>,
}

impl RopeDefaults {
    pub const fn of(max_positions: usize) -> Self {
        Self { theta_names: &["rope_theta"], theta: 10_000.0, partial_names: &[], partial: 1.0, max_positions, original: None }
    }
}

/// The one rotary embedding of a model.
pub fn rope(fields: &mut Fields, head_dim: usize, defaults: &RopeDefaults) -> Rope {
    let (place, scaling) = parameters(fields);
    for kind in [FULL, SLIDING] {
        if scaling.contains_key(kind) {
            fields.problem(format!("{place}: expected one set for all layers, found one for {kind}"));
        }
    }
    one(fields, place, &scaling, head_dim, defaults)
}

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The two rotary embeddings of a model whose sliding layers have their own: full attention first. `scaled` says which of
/// them the flat `rope_scaling` of transformers 4 holds for.
pub fn ropes_by_layer_type(fields: &mut Fields, head_dim: usize, defaults: [&RopeDefaults; 2], scaled: [bool; 2]) -> Vec<Rope> {
    let (place, sets) = parameters(fields);
    let nested = sets.contains_key(FULL) || sets.contains_key(SLIDING);
    if place == "rope_parameters" && !nested && !sets.is_empty() {
        fields.problem(format!("{place}: expected a set for {FULL} and one for {SLIDING}, found {:?}", sets.keys().collect::<Vec<_>>()));
    }
    let kinds = [FULL, SLIDING].into_iter().zip(defaults).zip(scaled);
    kinds
        .map(|((kind, defaults), scaled)| match sets.get(kind) {
            Some(Value::Object(set)) => one(fields, &format!("{place}.{kind}"), set, head_dim, defaults),
            Some(other) if !other.is_null() => {
                fields.problem(format!("{place}.{kind}: expected an object, found {other}"));
                one(fields, place, &Map::new(), head_dim, defaults)
            }
            _ if scaled && !nested => one(fields, place, &sets, head_dim, defaults),
            _ => one(fields, place, &Map::new(), head_dim, defaults),
        })
        .collect()
}

/// The object that holds the parameters, and its name.
fn parameters(fields: &Fields) -> (&'static str, Map<String, Value>) {
    let found = ["rope_parameters", "rope_scaling"].into_iter().find_map(|name| match fields.map.get(name) {
        Some(Value::Object(map)) => Some((name, map.clone())),
        _ => None,
    });
    found.unwrap_or(("rope_parameters", Map::new()))
}

fn one(fields: &mut Fields, place: &str, set: &Map<String, Value>, head_dim: usize, defaults: &RopeDefaults) -> Rope {
    let mut inner = Fields { map: set, problems: Vec::new() };
    let theta = inner.number("rope_theta").or_else(|| defaults.theta_names.iter().find_map(|name| fields.number(name)));
    let theta = theta.unwrap_or(defaults.theta);
    if !(theta.is_finite() && theta > 0.0) {
        inner.problem(format!("rope_theta: expected a positive number, found {theta}"));
    }
    let partial = inner.number("partial_rotary_factor");
    let partial = partial.or_else(|| defaults.partial_names.iter().find_map(|name| fields.number(name)));
    let dims = rotated(&mut inner, head_dim, partial, defaults);
    let max_positions = fields.number("max_position_embeddings").unwrap_or(defaults.max_positions as f64);
    let original = fields.number("original_max_position_embeddings").or_else(|| inner.number("original_max_position_embeddings"));
    let original = original.or(defaults.original).unwrap_or(max_positions);
    if !(original.is_finite() && (1.0..1e12).contains(&original) && max_positions.is_finite()) {
        inner.problem(format!("original_max_position_embeddings: expected a positive number, found {original}"));
    }
    let kind = inner.optional_text("rope_type").or_else(|| inner.optional_text("type")).unwrap_or_else(|| "default".to_owned());
    let mut attention_factor = 1.0;
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: inner.positive("factor") },
        "dynamic" => {
            if dims <= 2 {
                inner.problem(format!("rope_type: dynamic expects more than 2 rotated dimensions, found {dims}"));
            }
            RopeScaling::Dynamic { factor: inner.positive("factor"), original_positions: max_positions as usize }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: inner.positive("factor"),
            low_freq_factor: inner.positive("low_freq_factor"),
            high_freq_factor: inner.positive("high_freq_factor"),
            original_positions: original,
        },
        // Early Phi-3 files call LongRoPE "su" or "yarn"; nothing else has two lists of factors.
        "longrope" | "su" | "yarn" if kind != "yarn" || inner.get("short_factor").is_some() => {
            let factor = inner.positive_or("factor", max_positions / original);
            attention_factor = inner.positive_or("attention_factor", longrope_attention(factor, original));
            RopeScaling::LongRope {
                short: inner.positives("short_factor", dims / 2),
                long: inner.positives("long_factor", dims / 2),
                original_positions: original as usize,
            }
        }
        "yarn" => {
            let factor = inner.positive_or("factor", max_positions / original);
            let scales = (inner.number("mscale"), inner.number("mscale_all_dim"));
            attention_factor = inner.positive_or("attention_factor", yarn_attention(factor, scales));
            RopeScaling::Yarn {
                factor,
                beta_fast: inner.positive_or("beta_fast", 32.0),
                beta_slow: inner.positive_or("beta_slow", 1.0),
                original_positions: original,
                truncate: inner.flag("truncate", true),
            }
        }
        other => {
            inner.problem(format!("rope_type: expected one of default, linear, dynamic, llama3, yarn, longrope, found {other:?}"));
            RopeScaling::None
        }
    };
    fields.problems.extend(inner.problems.into_iter().map(|problem| format!("{place}.{problem}")));
    Rope { theta, dims, scaling, attention_factor }
}

/// The rotated dimensions of a head: the share of it, cut to a whole number as Python's `int` does.
fn rotated(inner: &mut Fields, head_dim: usize, partial: Option<f64>, defaults: &RopeDefaults) -> usize {
    let partial = match partial {
        Some(partial) if defaults.partial_names.is_empty() && partial != 1.0 => {
            inner.problem(format!("partial_rotary_factor: expected 1 for this family, found {partial}"));
            1.0
        }
        Some(partial) => partial,
        None => defaults.partial,
    };
    let dims = (head_dim as f64 * partial) as usize;
    if !(partial > 0.0 && partial <= 1.0 && dims > 0 && dims.is_multiple_of(2)) {
        inner.problem(format!(
            "partial_rotary_factor: expected a share of head_dim ({head_dim}) that is an even number of dimensions, found {partial}"
        ));
        return 2;
    }
    dims
}

/// `get_mscale` of transformers' `_compute_yarn_parameters`.
fn yarn_attention(factor: f64, scales: (Option<f64>, Option<f64>)) -> f64 {
    let of = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match scales {
        (Some(one), Some(all)) if one != 0.0 && all != 0.0 => of(one) / of(all),
        _ => of(1.0),
    }
}

fn longrope_attention(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}
