//! What the tensors of an adapter's file are, by their names. Pure.
//!
//! PEFT writes `base_model.model.MODULE.lora_A.weight` and the like; modules that are stored as a whole keep their names, as
//! in `base_model.model.score.weight`. A raw state dict also holds the adapter's name (`lora_A.default.weight`,
//! `score.modules_to_save.default.weight`) and the modules as they were before (`score.original_module.weight`).

use std::collections::{BTreeMap, BTreeSet};

/// What PEFT puts in front of the names of the model.
const PREFIX: &str = "base_model.model.";
/// The adapter's name where nobody gave it another.
const DEFAULT: &str = "default";

/// The tensors of one adapter's file.
#[derive(Debug, Default, PartialEq)]
pub struct Keys {
    /// By the name of the module.
    pub factors: BTreeMap<String, Factors>,
    /// Tensors in place of the base's, by the name that the model has for them; the values are names in the file.
    pub whole: BTreeMap<String, String>,
}

/// Names in the file of the two factors of a module.
#[derive(Debug, Default, PartialEq)]
pub struct Factors {
    pub a: Option<String>,
    pub b: Option<String>,
    /// The bias of the second factor.
    pub bias: Option<String>,
    /// Factors of an embedding, which are stored the other way round.
    pub embedding: bool,
}

/// What one name says.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    A,
    B,
    Bias,
    EmbeddingA,
    EmbeddingB,
    /// In place of the base's tensor.
    Whole,
    /// Likewise, but a plain name says it better.
    WholeAgain,
    /// As it was before training.
    Original,
}

impl Keys {
    /// The error lists every tensor whose meaning is not known.
    pub fn new(stored: &[&str]) -> Result<Self, Vec<String>> {
        let adapters: BTreeSet<&str> = stored.iter().filter_map(|name| adapter_name(name)).collect();
        if adapters.len() > 1 {
            return Err(vec![format!("expected the tensors of one adapter, found those of {adapters:?}")]);
        }
        let adapter = adapters.first().copied().unwrap_or(DEFAULT);
        let (mut keys, mut again, mut problems) = (Self::default(), BTreeMap::new(), Vec::new());
        for name in stored {
            match role(name, adapter) {
                Err(problem) => problems.push(format!("tensor {name:?}: {problem}")),
                Ok((_, Role::Original)) => {}
                Ok((tensor, Role::WholeAgain)) => _ = again.insert(tensor, (*name).to_owned()),
                Ok((owner, role)) => {
                    if let Some(other) = keys.put(owner, role, name) {
                        problems.push(format!("tensor {name:?} is the same as {other:?}, expected it once"));
                    }
                }
            }
        }
        for (tensor, name) in again {
            keys.whole.entry(tensor).or_insert(name);
        }
        if problems.is_empty() { Ok(keys) } else { Err(problems) }
    }

    /// The name that had this place before, if one had.
    fn put(&mut self, owner: String, role: Role, name: &str) -> Option<String> {
        if role == Role::Whole {
            return self.whole.insert(owner, name.to_owned());
        }
        let factors = self.factors.entry(owner).or_default();
        let place = match role {
            Role::A | Role::EmbeddingA => &mut factors.a,
            Role::B | Role::EmbeddingB => &mut factors.b,
            _ => &mut factors.bias,
        };
        factors.embedding |= matches!(role, Role::EmbeddingA | Role::EmbeddingB);
        place.replace(name.to_owned())
    }
}

/// The adapter's name, where a factor's name holds it.
fn adapter_name(stored: &str) -> Option<&str> {
    let (_, rest) = stored.split_once(".lora_")?;
    let segments: Vec<&str> = rest.split('.').collect();
    match segments.as_slice() {
        ["A" | "B", adapter, "weight" | "bias"] | ["embedding_A" | "embedding_B", adapter] => Some(adapter),
        _ => None,
    }
}

/// The module of a factor, or the tensor that is stored as a whole.
fn role(stored: &str, adapter: &str) -> Result<(String, Role), String> {
    let name = stored.strip_prefix(PREFIX).unwrap_or(stored);
    let segments: Vec<&str> = name.split('.').collect();
    let is_marker = |segment: &&str| segment.starts_with("lora_") || ["base_layer", "modules_to_save", "original_module"].contains(segment);
    let Some(at) = segments.iter().position(is_marker) else { return Ok((name.to_owned(), Role::Whole)) };
    let (module, rest) = (segments[..at].join("."), &segments[at + 1..]);
    let without_adapter = match rest {
        [first, others @ ..] if *first == adapter => others,
        all => all,
    };
    let tensor = |parameter: &[&str]| format!("{module}.{}", parameter.join("."));
    match (segments[at], rest, without_adapter) {
        ("lora_A", _, ["weight"]) => Ok((module, Role::A)),
        ("lora_B", _, ["weight"]) => Ok((module, Role::B)),
        ("lora_B", _, ["bias"]) => Ok((module, Role::Bias)),
        ("lora_embedding_A", _, []) => Ok((module, Role::EmbeddingA)),
        ("lora_embedding_B", _, []) => Ok((module, Role::EmbeddingB)),
        ("lora_magnitude_vector", ..) => Err("a magnitude of DoRA, which is not supported".to_owned()),
        ("base_layer", parameter @ [_, ..], _) => Ok((tensor(parameter), Role::Whole)),
        ("modules_to_save", _, parameter @ [_, ..]) => Ok((tensor(parameter), Role::WholeAgain)),
        ("original_module", ..) => Ok((tensor(rest), Role::Original)),
        _ => Err("expected lora_A.weight, lora_B.weight, lora_B.bias, lora_embedding_A or lora_embedding_B, found a part of an adapter that is not known".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(a: &str, b: &str) -> Factors {
        Factors { a: Some(a.to_owned()), b: Some(b.to_owned()), ..Factors::default() }
    }

    #[test]
    fn factors_are_found_with_and_without_the_adapters_name() {
        let plain = ["base_model.model.model.layers.0.q_proj.lora_A.weight", "base_model.model.model.layers.0.q_proj.lora_B.weight"];
        let named =
            ["base_model.model.model.layers.0.q_proj.lora_A.mine.weight", "base_model.model.model.layers.0.q_proj.lora_B.mine.weight"];
        let bare = ["model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"];
        for [a, b] in [plain, named, bare] {
            let keys = Keys::new(&[a, b]).unwrap();
            assert_eq!(keys.factors, BTreeMap::from([("model.layers.0.q_proj".to_owned(), factors(a, b))]));
        }
        let embedding =
            ["base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.model.embed_tokens.lora_embedding_B.default"];
        let keys = Keys::new(&embedding).unwrap();
        let expected = Factors { embedding: true, ..factors(embedding[0], embedding[1]) };
        assert_eq!(keys.factors["model.embed_tokens"], expected);
        let bias = Keys::new(&["x.q.lora_B.bias"]).unwrap();
        assert_eq!(bias.factors["x.q"].bias.as_deref(), Some("x.q.lora_B.bias"));
    }

    #[test]
    fn modules_that_are_stored_as_a_whole_are_found_under_every_name_of_theirs() {
        let whole = |names: &[&'static str]| Keys::new(names).unwrap().whole;
        for name in [
            "base_model.model.score.weight",
            "base_model.model.score.modules_to_save.weight",
            "base_model.model.score.modules_to_save.default.weight",
            "score.weight",
        ] {
            assert_eq!(whole(&[name]), BTreeMap::from([("score.weight".to_owned(), name.to_owned())]));
        }
        // Inside of a module, and with an adapter's own name.
        let named = ["x.lora_A.mine.weight", "x.lora_B.mine.weight", "base_model.model.classifier.modules_to_save.mine.dense.bias"];
        assert!(whole(&named).contains_key("classifier.dense.bias"));
        assert!(whole(&["base_model.model.q.base_layer.bias"]).contains_key("q.bias"));
        // What stood there before training is no part of the adapter, and a plain name counts more than a copy.
        let twice = [
            "base_model.model.classifier.bias",
            "base_model.model.classifier.modules_to_save.bias",
            "base_model.model.classifier.original_module.bias",
        ];
        assert_eq!(whole(&twice), BTreeMap::from([("classifier.bias".to_owned(), twice[0].to_owned())]));
        assert!(whole(&twice[2..]).is_empty());
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let problems = Keys::new(&["q.lora_magnitude_vector", "q.lora_A.weight", "q.lora_E", "v.lora_A.bias"]).unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert_eq!(problems[0], "tensor \"q.lora_magnitude_vector\": a magnitude of DoRA, which is not supported");
        assert!(problems[1].starts_with("tensor \"q.lora_E\": expected lora_A.weight, "), "{problems:?}");
        let two = Keys::new(&["q.lora_A.one.weight", "q.lora_A.two.weight"]).unwrap_err();
        assert_eq!(two, ["expected the tensors of one adapter, found those of {\"one\", \"two\"}"]);
        let again = Keys::new(&["q.lora_A.weight", "q.lora_A.one.weight"]).unwrap_err();
        assert_eq!(again, ["tensor \"q.lora_A.one.weight\" is the same as \"q.lora_A.weight\", expected it once"]);
    }
}
