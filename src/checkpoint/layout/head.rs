//! Which tensors are the reward head: from hidden states to outputs. Heads are found by their tensors; the configuration
//! says what tensors cannot (activations, conventions), and where both leave a choice, the operator makes it.

mod candidates;

use super::{LISTED, LinearKeys, NormKeys, Taker};
use crate::checkpoint::head_config::{At, HeadConfig};
use crate::checkpoint::names::LANGUAGE_HEADS;
use crate::checkpoint::{Activation, Architecture, Manifest, Norm, Pooling};
use candidates::{Candidate, Kind, candidates, choose, pooler_of};

/// One linear layer of the head, with the activation and the norm that follow it.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadStage {
    pub linear: LinearKeys,
    pub activation: Option<Activation>,
    pub norm: Option<(Norm, NormKeys)>,
}

impl HeadStage {
    fn linear(linear: LinearKeys) -> Self {
        Self { linear, activation: None, norm: None }
    }
}

/// The head of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadKeys {
    /// For people: what its tensors are named after, and of which form it is.
    pub name: String,
    pub form: HeadForm,
    /// Which hidden state it reads, where it does not read at every step.
    pub pooling: Option<Pooling>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum HeadForm {
    /// Linear layers, one after the other; the last one's outputs are raw logits.
    Stages(Vec<HeadStage>),
    /// ArmoRM: objectives by a linear layer, weighted by a network that reads the end of the prompt.
    Gated(Gating),
    /// Rows of the language-model head; which ones, the tokenizer says.
    Rows(RowKeys),
}

impl Default for HeadForm {
    fn default() -> Self {
        Self::Stages(Vec::new())
    }
}

/// `reward = sum_k gate_k(prompt) * (objectives(answer) transform)_k`, with
/// `gate(x) = softmax(network(x) / temperature) * scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gating {
    pub objectives: LinearKeys,
    /// `[objectives, objectives]`, a constant that is not trained.
    pub transform: String,
    pub network: Vec<HeadStage>,
    /// One number.
    pub scale: String,
}

/// The language-model head, of which only named rows are read.
#[derive(Clone, Debug, PartialEq)]
pub struct RowKeys {
    pub weight: String,
    pub bias: Option<String>,
    pub vocab: usize,
    pub hidden: usize,
    /// One for the rows that speak for, and one for those that speak against, where there are some.
    pub outputs: usize,
}

impl HeadKeys {
    /// Outputs of the head.
    pub fn outputs(&self) -> usize {
        match &self.form {
            HeadForm::Stages(stages) => stages.last().map_or(0, |stage| stage.linear.outputs),
            HeadForm::Gated(gating) => gating.objectives.outputs,
            HeadForm::Rows(rows) => rows.outputs,
        }
    }

    /// Names of its tensors.
    pub fn tensors(&self) -> Vec<&str> {
        fn linear(keys: &LinearKeys) -> impl Iterator<Item = &str> {
            std::iter::once(keys.weight.as_str()).chain(keys.bias.as_deref())
        }
        fn stages(stages: &[HeadStage]) -> impl Iterator<Item = &str> {
            stages.iter().flat_map(|stage| {
                let norm = stage.norm.iter().flat_map(|(_, keys)| std::iter::once(keys.weight.as_str()).chain(keys.bias.as_deref()));
                linear(&stage.linear).chain(norm)
            })
        }
        match &self.form {
            HeadForm::Stages(own) => stages(own).collect(),
            HeadForm::Gated(gating) => {
                let constants = [gating.transform.as_str(), gating.scale.as_str()];
                linear(&gating.objectives).chain(stages(&gating.network)).chain(constants).collect()
            }
            HeadForm::Rows(rows) => std::iter::once(rows.weight.as_str()).chain(rows.bias.as_deref()).collect(),
        }
    }
}

/// The head of a checkpoint. What is missing, mis-shaped or left open becomes a problem of the taker.
pub(super) fn find(architecture: &Architecture, embedding: &str, taker: &mut Taker) -> HeadKeys {
    let (config, hidden) = (&architecture.head, architecture.output_size());
    let found = candidates(taker.manifest, config, &architecture.model_type);
    if let Some(tokens) = &config.choice.tokens {
        taker.spare.extend(found.into_iter().map(|candidate| candidate.name));
        return rows(architecture, embedding, 1 + usize::from(!tokens.minus.is_empty()), taker);
    }
    let chosen = match choose(&found, config) {
        Ok(Some(index)) => index,
        Ok(None) => {
            taker.headless = Some(missing(taker.manifest, hidden));
            return HeadKeys::default();
        }
        Err(problem) => {
            taker.problems.push(problem);
            return HeadKeys::default();
        }
    };
    taker.spare.extend(found.iter().enumerate().filter(|(index, _)| *index != chosen).map(|(_, other)| other.name.clone()));
    let Candidate { name, kind } = &found[chosen];
    // RoBERTa's classes carry BERT's pooler along and do not read it.
    let reads = |pooler: &str| matches!(kind, Kind::Dense { dense, .. } if dense == pooler);
    taker.spare.extend(pooler_of(taker.manifest).filter(|pooler| !reads(pooler)).map(str::to_owned));
    let pooling = pooling(architecture, name, kind, taker);
    let always_biased = config.says_every_token() && matches!(kind, Kind::Linear);
    let (name, form) = match kind {
        Kind::Linear => {
            let linear = taker.outputs(name, hidden, always_biased);
            (format!("{name} (linear)"), HeadForm::Stages(vec![HeadStage::linear(linear)]))
        }
        Kind::Sequence(layers) => {
            let names: Vec<String> = layers.iter().map(|layer| format!("{name}.{layer}")).collect();
            (format!("{name} ({} layers with relu)", layers.len()), HeadForm::Stages(taker.sequence(&names, hidden)))
        }
        Kind::Dense { dense, activation, norm, outputs, dense_bias } => {
            let bias = *dense_bias || taker.has(&format!("{dense}.bias"));
            let linear = taker.linear(dense, hidden, hidden, bias);
            let norm = norm.as_ref().map(|norm| {
                let keys = NormKeys {
                    weight: taker.tensor(format!("{norm}.weight"), &[hidden]),
                    bias: taker.has(&format!("{norm}.bias")).then(|| taker.tensor(format!("{norm}.bias"), &[hidden])),
                    from_one: false,
                };
                (Norm::Layer { eps: config.norm_eps }, keys)
            });
            let first = HeadStage { linear, activation: Some(*activation), norm };
            let last = HeadStage::linear(taker.outputs(outputs, hidden, true));
            (format!("{outputs} behind {dense} ({})", activation.name()), HeadForm::Stages(vec![first, last]))
        }
        Kind::Gated => ("regression_layer with gating".to_owned(), HeadForm::Gated(gating(hidden, taker))),
    };
    let keys = HeadKeys { name, form, pooling };
    if let Some(labels) = architecture.labels.filter(|labels| *labels != keys.outputs())
        && keys.outputs() != 0
        && (keys.name.starts_with("score") || keys.name.starts_with("classifier"))
    {
        let outputs = keys.outputs();
        taker.problems.push(format!("the configuration states {labels} outputs (num_labels or id2label), the reward head has {outputs}"));
    }
    if config.says_every_token() && config.choice.at.is_none() {
        taker.problems.push(format!(
            "architectures: {} gives a score at every token, and nothing says which tokens end a step; set `head: {{at: each \"<step>\"}}` in \
             the recipe (with `reduce: last|min|product|mean`), or `at: last` to read it once",
            config.class.as_deref().unwrap_or_default()
        ));
    }
    keys
}

/// Which token a head reads: as the operator says, else as the code does that it comes from.
fn pooling(architecture: &Architecture, name: &str, kind: &Kind, taker: &mut Taker) -> Option<Pooling> {
    let config = &architecture.head;
    if config.choice.pooling.is_some() {
        return config.choice.pooling;
    }
    if matches!(kind, Kind::Gated) {
        return Some(Pooling::FirstPadMinusOne);
    }
    let class = config.class.as_deref().unwrap_or_default();
    if config.prefix.is_some() || class == "RewardModel" {
        // OpenRLHF reads the last token. Its documentation advises a name under which transformers loads the same file, and
        // that reads the last one that is not the pad token: another one where sequences end with it.
        let pad_ends = architecture.pad_token_id.is_some_and(|pad| architecture.eos_token_ids.contains(&pad));
        if class.ends_with("ForSequenceClassification") && pad_ends {
            taker.problems.push(format!(
                "pooling: value_head_prefix is OpenRLHF's, which reads the last token; architectures says {class}, which reads the last one that is \
                 not the pad token; the pad token ends sequences here, so they differ: set `pooling: last_token` or `pooling: last_non_pad`"
            ));
        }
        return Some(Pooling::LastToken);
    }
    let reads_last = ["v_head", "value_head", "regression_head", "reward_head", "score_head", "out_proj"];
    if reads_last.iter().any(|known| name.starts_with(known)) {
        return Some(Pooling::LastToken);
    }
    Some(if config.says_first_pad() { Pooling::FirstPadMinusOne } else { architecture.pooling })
}

fn gating(hidden: usize, taker: &mut Taker) -> Gating {
    let objectives = taker.outputs("regression_layer", hidden, false);
    let count = objectives.outputs;
    let transform = taker.tensor("reward_transform_matrix".to_owned(), &[count, count]);
    let layers =
        (0..).take_while(|layer| taker.has(&format!("gating.layers.{layer}.weight"))).map(|layer| format!("gating.layers.{layer}"));
    let layers: Vec<String> = layers.collect();
    if layers.is_empty() {
        taker.problems.push("gating: expected tensors gating.layers.0.weight and on, found none".to_owned());
    }
    let network = taker.sequence(&layers, hidden);
    if let Some(last) = network.last().filter(|last| last.linear.outputs != count) {
        let found = last.linear.outputs;
        taker.problems.push(format!("gating: expected one weight for each of the {count} objectives, found {found}"));
    }
    let scale = taker.tensor("gating.logit_scale".to_owned(), &[1]);
    Gating { objectives, transform, network, scale }
}

/// The language-model head, tied to the embedding or not.
fn rows(architecture: &Architecture, embedding: &str, outputs: usize, taker: &mut Taker) -> HeadKeys {
    let (vocab, hidden) = (architecture.vocab_size, architecture.output_size());
    let own = LANGUAGE_HEADS.into_iter().find(|name| taker.has(&format!("{name}.weight")));
    let pooling = architecture.head.choice.pooling.or(Some(Pooling::LastToken));
    let (name, weight, bias) = match own {
        Some(name) => {
            let bias = taker.has(&format!("{name}.bias")).then(|| taker.tensor(format!("{name}.bias"), &[vocab]));
            (name.to_owned(), taker.tensor(format!("{name}.weight"), &[vocab, hidden]), bias)
        }
        None if is_tied(architecture) => ("the tied embedding".to_owned(), embedding.to_owned(), None),
        None => {
            taker.problems.push(
                "head.tokens: needs the language-model head, and the checkpoint has neither one nor `tie_word_embeddings: true`".to_owned(),
            );
            return HeadKeys::default();
        }
    };
    HeadKeys { name: format!("rows of {name}"), form: HeadForm::Rows(RowKeys { weight, bias, vocab, hidden, outputs }), pooling }
}

/// Whether the embedding is the language-model head too: as the configuration says, else as its class does by default.
fn is_tied(architecture: &Architecture) -> bool {
    let family = architecture.model_type.as_str();
    architecture.head.tied.unwrap_or(family.starts_with("gemma") || matches!(family, "gpt2" | "opt"))
}

/// Words for a checkpoint without a head.
fn missing(manifest: &Manifest, hidden: usize) -> String {
    let found: Vec<_> = manifest.names().filter(|name| looks_like_head(name)).take(LISTED).collect();
    let hint = if LANGUAGE_HEADS.iter().any(|name| manifest.get(&format!("{name}.weight")).is_some()) {
        "; it has a language-model head: a judge that writes its verdict is not served, one whose verdict is a single token is read with \
         `head: {tokens: {plus: [...], minus: [...]}}` in the recipe"
            .to_owned()
    } else if found.is_empty() {
        String::new()
    } else {
        format!("; tensors that look like a head of another kind: {}", found.join(", "))
    };
    format!(
        "reward head \"score.weight\": expected shape [outputs, {hidden}], found no such tensor (a missing head is never initialised at random){hint}"
    )
}

impl Taker<'_> {
    fn has(&self, name: &str) -> bool {
        self.manifest.get(name).is_some()
    }

    /// A last layer: as many outputs as its tensor has rows. Without `biased`, it has a bias if there is a tensor for it.
    fn outputs(&mut self, name: &str, inputs: usize, biased: bool) -> LinearKeys {
        let outputs = self.rows_of(name, inputs);
        let bias = (biased || self.has(&format!("{name}.bias"))).then(|| self.tensor(format!("{name}.bias"), &[outputs]));
        LinearKeys::plain(format!("{name}.weight"), bias, inputs, outputs)
    }

    /// Linear layers with ReLU between them.
    fn sequence(&mut self, names: &[String], hidden: usize) -> Vec<HeadStage> {
        let mut inputs = hidden;
        let mut stages = Vec::with_capacity(names.len());
        for (index, name) in names.iter().enumerate() {
            let linear = self.outputs(name, inputs, false);
            inputs = linear.outputs;
            let activation = (index + 1 < names.len()).then_some(Activation::Relu);
            stages.push(HeadStage { linear, activation, norm: None });
        }
        stages
    }

    fn rows_of(&mut self, name: &str, inputs: usize) -> usize {
        let weight = format!("{name}.weight");
        let wrong = match self.manifest.get(&weight).map(|info| info.shape.as_slice()) {
            Some(&[rows, columns]) if rows >= 1 && columns == inputs => {
                self.used.insert(weight);
                return rows;
            }
            Some(shape) => format!("shape [outputs, {inputs}], found {shape:?}"),
            None => format!("shape [outputs, {inputs}], found no such tensor"),
        };
        self.problems.push(format!("reward head {weight:?}: expected {wrong}"));
        self.used.insert(weight);
        0
    }
}

/// Whether a reading at every step is asked for.
pub(crate) fn reads_steps(config: &HeadConfig) -> bool {
    matches!(config.choice.at, Some(At::Each(_)))
}

fn looks_like_head(name: &str) -> bool {
    ["score", "classifier", "v_head", "value_head", "regression", "reward"].iter().any(|part| name.starts_with(part))
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
