//! One name for every tensor, whatever class the checkpoint was saved from: `LlamaModel` writes `layers.0. ...` where
//! `LlamaForSequenceClassification` writes `model.layers.0. ...`, and training wrappers put names of their own in front.
//! Names become those of the family's sequence classifier when a folder is opened, so that whoever compares, merges or
//! writes tensors knows one name for each.

use std::collections::BTreeMap;

use super::TensorInfo;

/// How a family's sequence classifier names its backbone. How its layers are called inside, only whoever runs it knows.
#[derive(Clone, Copy, Debug)]
struct Backbone {
    /// In front of all of its names.
    prefix: &'static str,
    /// The segments that may follow.
    own: &'static [&'static str],
    /// The table of tokens.
    tokens: &'static str,
}

const LLAMA: Backbone = Backbone { prefix: "model.", own: &["embed_tokens", "layers", "norm", "rotary_emb"], tokens: "embed_tokens" };
const INTERN_LM2: Backbone = Backbone { prefix: "model.", own: &["tok_embeddings", "layers", "norm"], tokens: "tok_embeddings" };
const GPT2: Backbone = Backbone { prefix: "transformer.", own: &["wte", "wpe", "h", "ln_f"], tokens: "wte" };
const GPT_NEOX: Backbone =
    Backbone { prefix: "gpt_neox.", own: &["embed_in", "layers", "final_layer_norm", "rotary_emb"], tokens: "embed_in" };
const OPT: Backbone = Backbone {
    prefix: "model.decoder.",
    own: &["embed_tokens", "embed_positions", "layers", "final_layer_norm", "project_in", "project_out"],
    tokens: "embed_tokens",
};
const BERT: Backbone = Backbone { prefix: "bert.", own: &["embeddings", "encoder", "pooler"], tokens: "embeddings.word_embeddings" };
const ELECTRA: Backbone = Backbone { prefix: "electra.", own: &["embeddings", "embeddings_project", "encoder"], ..BERT };
const ROBERTA: Backbone = Backbone { prefix: "roberta.", ..BERT };
const DISTILBERT: Backbone = Backbone { prefix: "distilbert.", own: &["embeddings", "transformer"], ..BERT };
const DEBERTA: Backbone = Backbone { prefix: "deberta.", own: &["embeddings", "encoder"], ..BERT };
const MODERNBERT: Backbone =
    Backbone { prefix: "model.", own: &["embeddings", "layers", "final_norm"], tokens: "embeddings.tok_embeddings" };

/// What classes and training wrappers put in front of a backbone's names.
const IN_FRONT: [&str; 13] = [
    "module",
    "_orig_mod",
    "base_model",
    "backbone",
    "model",
    "decoder",
    "transformer",
    "gpt_neox",
    "bert",
    "electra",
    "roberta",
    "distilbert",
    "deberta",
];

/// What training wrappers put in front of all names, or between two segments, and no model has.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// The names of one family.
#[derive(Clone, Copy, Debug)]
pub struct BackboneNames(Option<Backbone>);

impl BackboneNames {
    /// Of a family that is not listed, names stay as they are.
    pub fn of(model_type: &str) -> Self {
        Self(match model_type {
            "llama" | "mistral" | "mixtral" | "qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe" | "gemma" | "gemma2" | "gemma3_text"
            | "phi3" | "granite" | "olmo2" | "olmo3" | "smollm3" => Some(LLAMA),
            "internlm2" => Some(INTERN_LM2),
            "gpt2" => Some(GPT2),
            "gpt_neox" => Some(GPT_NEOX),
            "opt" => Some(OPT),
            "bert" => Some(BERT),
            "electra" => Some(ELECTRA),
            "roberta" | "xlm-roberta" | "camembert" => Some(ROBERTA),
            "distilbert" => Some(DISTILBERT),
            "deberta-v2" => Some(DEBERTA),
            "modernbert" => Some(MODERNBERT),
            _ => None,
        })
    }

    /// The one name of a tensor.
    pub fn canonical(self, stored: &str) -> String {
        let name = normalised(stored);
        let Some(Backbone { prefix, own, .. }) = self.0 else { return name };
        let mut rest = name.as_str();
        loop {
            let (segment, after) = rest.split_once('.').unwrap_or((rest, ""));
            if own.contains(&segment) {
                return format!("{prefix}{rest}");
            }
            if after.is_empty() || !IN_FRONT.contains(&segment) {
                return name;
            }
            rest = after;
        }
    }

    /// Whether this canonical name is one of the backbone's, and not of a head.
    pub fn is_backbone(self, canonical: &str) -> bool {
        let Some(Backbone { prefix, own, .. }) = self.0 else { return false };
        let Some(rest) = canonical.strip_prefix(prefix) else { return false };
        own.contains(&rest.split('.').next().unwrap_or_default())
    }

    /// The prefix of the backbone's canonical names.
    pub fn prefix(self) -> &'static str {
        self.0.map_or("", |backbone| backbone.prefix)
    }

    /// The table of tokens, behind the prefix.
    pub fn tokens(self) -> &'static str {
        self.0.map_or("", |backbone| backbone.tokens)
    }

    /// The weight of the table of tokens.
    pub fn embedding(self) -> Option<String> {
        self.0.map(|backbone| format!("{}{}.weight", backbone.prefix, backbone.tokens))
    }

    /// Whether the family is listed, so that its backbone can be told from a head.
    pub fn is_known(self) -> bool {
        self.0.is_some()
    }

    /// The canonical names of stored ones, where they differ. Two tensors of one name are a mistake.
    pub fn renamed<'n>(self, stored: impl IntoIterator<Item = &'n str>) -> Result<BTreeMap<&'n str, String>, String> {
        let mut taken: BTreeMap<String, &str> = BTreeMap::new();
        let mut renamed = BTreeMap::new();
        for name in stored {
            let canonical = self.canonical(name);
            if let Some(other) = taken.insert(canonical.clone(), name) {
                return Err(format!("tensors {other:?} and {name:?} are both the backbone's {canonical:?}, expected it once"));
            }
            if canonical != name {
                renamed.insert(name, canonical);
            }
        }
        Ok(renamed)
    }
}

/// Without the segments of wrappers, and with the names that transformers gives the norms of the first BERTs.
fn normalised(stored: &str) -> String {
    let mut name = stored.to_owned();
    if stored.split('.').any(|segment| WRAPPERS.contains(&segment)) {
        name = stored.split('.').filter(|segment| !WRAPPERS.contains(segment)).collect::<Vec<_>>().join(".");
    }
    if let Some(rest) = name.strip_prefix("module.") {
        name = rest.to_owned();
    }
    for (old, new) in [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")] {
        if let Some(before) = name.strip_suffix(old) {
            name = format!("{before}{new}");
        }
    }
    name
}

/// Tensors that checkpoints carry although no sequence classifier reads them, by an explicit list: heads of language
/// models, and buffers that are computed from the configuration.
pub fn rides_along(canonical: &str, info: &TensorInfo) -> bool {
    is_language_head(canonical) || is_recomputed(canonical, info)
}

/// Linear layers that decoders predict tokens with.
pub const LANGUAGE_HEADS: [&str; 3] = ["lm_head", "embed_out", "output"];

/// The heads that language models predict tokens with, and RoBERTa's pooler, which its sequence classifier does not have.
fn is_language_head(name: &str) -> bool {
    const MODULES: [&str; 9] = [
        "lm_head",
        "cls.predictions",
        "cls.seq_relationship",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        "lm_predictions",
        "mask_predictions",
        "roberta.pooler",
    ];
    let within = |module: &&str| name.strip_prefix(*module).is_some_and(|rest| rest.starts_with('.'));
    let linear = |module: &str| name.strip_prefix(module).is_some_and(|rest| rest == ".weight" || rest == ".bias");
    MODULES.iter().any(within) || linear("decoder") || LANGUAGE_HEADS.into_iter().any(linear)
}

/// Buffers that every program computes from the configuration, and that older versions of transformers have stored:
/// rotary frequencies and tables, positions and segments, and the causal mask of GPT-2, GPT-Neo and GPT-NeoX with the value it
/// masks with.
pub fn is_recomputed(name: &str, info: &TensorInfo) -> bool {
    let segments: Vec<&str> = name.rsplit('.').take(2).collect();
    match segments.as_slice() {
        ["inv_freq" | "original_inv_freq" | "position_ids", ..] => true,
        ["token_type_ids", "embeddings"] | ["cos_cached" | "sin_cached", "rotary_emb"] => true,
        ["masked_bias", "attn" | "attention"] => info.elements() == 1,
        ["bias", "attn" | "attention"] => matches!(info.shape.as_slice(), &[1, 1, rows, columns] if rows == columns),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;
    use crate::checkpoint::hf_config::FAMILIES;

    #[test]
    fn a_backbone_has_one_name_whatever_stands_in_front_of_it() {
        let cases = [
            (
                "llama",
                "model.layers.0.self_attn.q_proj.weight",
                &[
                    "layers.0.self_attn.q_proj.weight",
                    "backbone.layers.0.self_attn.q_proj.weight",
                    "module._orig_mod.model.layers.0.self_attn.q_proj.weight",
                    "base_model.model.model.layers.0.self_attn.q_proj.weight",
                ][..],
            ),
            ("qwen3", "model.norm.weight", &["norm.weight", "transformer.norm.weight"]),
            ("gpt2", "transformer.h.1.attn.c_attn.weight", &["h.1.attn.c_attn.weight", "model.transformer.h.1.attn.c_attn.weight"]),
            ("gpt_neox", "gpt_neox.embed_in.weight", &["embed_in.weight"]),
            ("opt", "model.decoder.layers.0.fc1.weight", &["decoder.layers.0.fc1.weight", "layers.0.fc1.weight"]),
            ("bert", "bert.embeddings.LayerNorm.weight", &["embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.gamma"]),
            ("bert", "bert.embeddings.LayerNorm.bias", &["embeddings.LayerNorm.beta"]),
            ("distilbert", "distilbert.transformer.layer.0.ffn.lin1.weight", &["transformer.layer.0.ffn.lin1.weight"]),
            ("modernbert", "model.final_norm.weight", &["final_norm.weight"]),
        ];
        for (family, canonical, stored) in cases {
            let names = BackboneNames::of(family);
            for stored in stored.iter().chain([&canonical]) {
                assert_eq!(names.canonical(stored), canonical, "{family}: {stored}");
            }
            assert!(names.is_backbone(canonical) && canonical.starts_with(names.prefix()));
        }
    }

    #[test]
    fn every_family_that_is_served_is_listed() {
        for family in FAMILIES.map(|(family, _)| family) {
            assert!(BackboneNames::of(family).is_known(), "{family}");
        }
    }

    #[test]
    fn a_head_keeps_its_name() {
        let heads = [
            ("llama", "score.weight"),
            ("llama", "v_head.summary.weight"),
            ("llama", "lm_head.weight"),
            ("llama", "score.layers.0.weight"),
            ("roberta", "classifier.dense.weight"),
            ("modernbert", "head.norm.weight"),
            ("unheard-of", "layers.0.weight"),
        ];
        for (family, name) in heads {
            let names = BackboneNames::of(family);
            assert_eq!(names.canonical(name), name);
            assert!(!names.is_backbone(name), "{family}: {name}");
        }
        assert_eq!(BackboneNames::of("llama").canonical("module.score.weight"), "score.weight");
    }

    #[test]
    fn two_tensors_of_one_name_are_a_mistake() {
        let problem = BackboneNames::of("llama").renamed(["model.norm.weight", "norm.weight"]).unwrap_err();
        assert_eq!(
            problem,
            "tensors \"model.norm.weight\" and \"norm.weight\" are both the backbone's \"model.norm.weight\", expected it once"
        );
        let renamed = BackboneNames::of("llama").renamed(["norm.weight", "score.weight"]).unwrap();
        assert_eq!(renamed, BTreeMap::from([("norm.weight", "model.norm.weight".to_owned())]));
    }

    #[test]
    fn what_rides_along_is_listed_and_nothing_like_it_is_taken_for_it() {
        let info = |shape: &[usize]| TensorInfo { dtype: Dtype::F32, shape: shape.to_vec() };
        let along: [(&str, &[usize]); 14] = [
            ("lm_head.weight", &[10, 8]),
            ("lm_head.dense.bias", &[8]),
            ("embed_out.weight", &[10, 8]),
            ("cls.predictions.decoder.weight", &[10, 8]),
            ("model.rotary_emb.inv_freq", &[4]),
            ("model.layers.3.self_attn.rotary_emb.inv_freq", &[4]),
            ("model.layers.3.self_attn.rotary_emb.cos_cached", &[1, 1, 9, 4]),
            ("transformer.h.11.attn.bias", &[1, 1, 9, 9]),
            ("transformer.h.11.attn.masked_bias", &[]),
            ("gpt_neox.layers.0.attention.bias", &[1, 1, 9, 9]),
            ("gpt_neox.layers.0.attention.masked_bias", &[1]),
            ("bert.embeddings.position_ids", &[1, 9]),
            ("roberta.embeddings.token_type_ids", &[1, 9]),
            ("roberta.pooler.dense.weight", &[8, 8]),
        ];
        for (name, shape) in along {
            assert!(rides_along(name, &info(shape)), "{name}");
        }
        let read: [(&str, &[usize]); 9] = [
            ("score.weight", &[1, 8]),
            ("classifier.bias", &[1]),
            ("transformer.h.0.attn.c_attn.bias", &[24]),
            ("transformer.h.0.attn.bias", &[8]),
            ("gpt_neox.layers.0.attention.dense.bias", &[8]),
            ("gpt_neox.layers.0.attention.masked_bias", &[8]),
            ("bert.pooler.dense.bias", &[8]),
            ("lm_headed.weight", &[1, 8]),
            ("model.decoder.embed_tokens.weight", &[10, 8]),
        ];
        for (name, shape) in read {
            assert!(!rides_along(name, &info(shape)), "{name}");
        }
    }
}
