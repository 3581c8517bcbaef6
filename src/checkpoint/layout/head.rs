//! Which tensors are the reward head: from the pooled hidden state to the outputs.

use super::{LISTED, LinearKeys, Taker};
use crate::checkpoint::{Activation, Architecture, Naming};

/// One linear layer of the head, with the activation that follows it.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadStage {
    pub linear: LinearKeys,
    pub activation: Option<Activation>,
}

/// The head of a checkpoint. What is missing or mis-shaped becomes a problem of the taker.
pub(super) fn find(architecture: &Architecture, taker: &mut Taker) -> Vec<HeadStage> {
    let hidden = architecture.hidden_size;
    match architecture.naming {
        Naming::Llama => vec![HeadStage { linear: taker.head("score", hidden), activation: None }],
        Naming::Bert => {
            let prefix = if taker.manifest.get("bert.embeddings.word_embeddings.weight").is_some() { "bert." } else { "" };
            let pooler = taker.linear(&format!("{prefix}pooler.dense"), hidden, hidden, true);
            let mut classifier = taker.head("classifier", hidden);
            classifier.bias = Some(taker.tensor("classifier.bias".to_owned(), &[classifier.outputs]));
            vec![HeadStage { linear: pooler, activation: Some(Activation::Tanh) }, HeadStage { linear: classifier, activation: None }]
        }
    }
}

impl Taker<'_> {
    /// The reward head: as many outputs as its tensor has rows. Without it there is no score, and never a random one.
    fn head(&mut self, name: &str, hidden: usize) -> LinearKeys {
        let weight = format!("{name}.weight");
        let outputs = match self.manifest.get(&weight).map(|info| info.shape.as_slice()) {
            Some(&[rows, columns]) if rows >= 1 && columns == hidden => rows,
            Some(shape) => {
                self.problems.push(format!("reward head {weight:?}: expected shape [outputs, {hidden}], found {shape:?}"));
                0
            }
            None => {
                let found: Vec<_> = self.manifest.names().filter(|name| looks_like_head(name)).take(LISTED).collect();
                let hint = if found.is_empty() {
                    String::new()
                } else {
                    format!("; tensors that look like a head of another kind: {}", found.join(", "))
                };
                self.problems.push(format!("reward head {weight:?}: expected shape [outputs, {hidden}], found no such tensor (a missing head is never initialised at random){hint}"));
                0
            }
        };
        self.used.insert(weight.clone());
        LinearKeys { weight, bias: None, inputs: hidden, outputs }
    }
}

fn looks_like_head(name: &str) -> bool {
    ["score", "classifier", "v_head", "value_head", "regression", "reward", "lm_head"].iter().any(|part| name.starts_with(part))
}
