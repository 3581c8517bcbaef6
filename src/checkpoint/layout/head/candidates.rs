//! The heads that a checkpoint's tensors allow, and which of them counts.

use crate::checkpoint::{Activation, HeadConfig, Manifest};

/// Names under which a linear layer, or linear layers with ReLU between them, are a reward head.
const PLAIN: [&str; 9] =
    ["score", "classifier", "v_head.summary", "v_head", "value_head", "regression_head", "reward_head", "score_head", "out_proj"];

/// A head that the tensors allow.
pub(super) struct Candidate {
    /// What its tensors begin with.
    pub name: String,
    pub kind: Kind,
}

pub(super) enum Kind {
    Linear,
    /// `NAME.0`, `NAME.2`, ...: the linear layers of a sequence whose other parts have no tensors.
    Sequence(Vec<usize>),
    /// A dense layer with an activation, and perhaps a norm, before the outputs.
    Dense {
        dense: String,
        activation: Activation,
        norm: Option<String>,
        outputs: String,
        /// Whether the class always has this bias, so that its absence is a loss.
        dense_bias: bool,
    },
    Gated,
}

/// Every head that the tensors allow.
pub(super) fn candidates(manifest: &Manifest, config: &HeadConfig, model_type: &str) -> Vec<Candidate> {
    let has = |name: &str| manifest.get(name).is_some();
    let mut found = Vec::new();
    let dense = |dense: String, activation: Activation, norm: Option<String>, outputs: &str, dense_bias: bool| Candidate {
        name: outputs.to_owned(),
        kind: Kind::Dense { dense, activation, norm, outputs: outputs.to_owned(), dense_bias },
    };
    let prefixes = config.prefix.as_deref().into_iter().chain(PLAIN.into_iter().filter(|name| config.prefix.as_deref() != Some(name)));
    for name in prefixes {
        if has(&format!("{name}.weight")) {
            found.push(if name == "classifier" {
                // What stands before it tells the family's form.
                let own = |default| config.activation.unwrap_or(default);
                if has("pre_classifier.weight") {
                    dense("pre_classifier".to_owned(), Activation::Relu, None, name, true)
                } else if has("head.dense.weight") {
                    let norm = has("head.norm.weight").then(|| "head.norm".to_owned());
                    dense("head.dense".to_owned(), own(Activation::Gelu), norm, name, false)
                } else if let Some(pooler) = pooler_of(manifest) {
                    let default = if model_type.starts_with("deberta") { Activation::Gelu } else { Activation::Tanh };
                    dense(pooler.to_owned(), own(default), None, name, true)
                } else {
                    Candidate { name: name.to_owned(), kind: Kind::Linear }
                }
            } else {
                Candidate { name: name.to_owned(), kind: Kind::Linear }
            });
        } else if name == "classifier" && has("classifier.out_proj.weight") {
            let activation = if model_type == "electra" { Activation::Gelu } else { Activation::Tanh };
            found.push(Candidate {
                name: name.to_owned(),
                kind: Kind::Dense {
                    dense: "classifier.dense".to_owned(),
                    activation,
                    norm: None,
                    outputs: "classifier.out_proj".to_owned(),
                    dense_bias: true,
                },
            });
        } else {
            let layers = sequence_layers(manifest, name);
            if !layers.is_empty() {
                found.push(Candidate { name: name.to_owned(), kind: Kind::Sequence(layers) });
            }
        }
    }
    if has("regression_layer.weight") && has("reward_transform_matrix") {
        found.push(Candidate { name: "regression_layer".to_owned(), kind: Kind::Gated });
    }
    found
}

/// BERT's pooler, with or without the prefix of its body.
pub(super) fn pooler_of(manifest: &Manifest) -> Option<&str> {
    let stem = |name: &'_ str| -> Option<usize> {
        let stem = name.strip_suffix(".weight")?;
        (stem == "pooler.dense" || stem.ends_with(".pooler.dense")).then_some(stem.len())
    };
    manifest.names().find_map(|name| Some(&name[..stem(name)?]))
}

/// The numbers `n` of `NAME.n.weight`, where they are those of linear layers with something between each two.
fn sequence_layers(manifest: &Manifest, name: &str) -> Vec<usize> {
    let number = |tensor: &str| tensor.strip_prefix(name)?.strip_prefix('.')?.strip_suffix(".weight")?.parse::<usize>().ok();
    let mut layers: Vec<usize> = manifest.names().filter_map(number).collect();
    layers.sort_unstable();
    let apart = layers.first() == Some(&0) && layers.windows(2).all(|pair| pair[1] - pair[0] >= 2);
    if apart { layers } else { Vec::new() }
}

/// The index of the head that counts; `None` where there is none to choose from.
pub(super) fn choose(found: &[Candidate], config: &HeadConfig) -> Result<Option<usize>, String> {
    let names = || found.iter().map(|candidate| candidate.name.as_str()).collect::<Vec<_>>().join(", ");
    let named = |name: &str| found.iter().position(|candidate| candidate.name == name);
    if let Some(name) = &config.choice.name {
        let index = named(name).ok_or_else(|| format!("head.name: {name:?} is no head of this checkpoint, which has: {}", names()));
        return index.map(Some);
    }
    if let Some(index) = config.prefix.as_deref().and_then(named) {
        return Ok(Some(index));
    }
    match found.len() {
        0 => Ok(None),
        1 => Ok(Some(0)),
        _ => Err(format!(
            "the checkpoint has more than one reward head ({}); say which one counts with `head: {{name: ...}}` in the recipe",
            names()
        )),
    }
}
