//! Where a head reads in a sequence, and what becomes of what it says there: pure, once the tokenizer has told the ids.

use serde::Serialize;

use super::head_config::{At, Link, Reduce, TokenName, Weights};
use super::{Architecture, HeadForm, Layout, Pooling};

/// More tokens than any read-out names; a bound on what a recipe can make us store.
const MAX_NAMED: usize = 64;

/// The reading of one model: every choice made, every name an id. A part of the fingerprint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Readout {
    pub pooling: Pooling,
    /// The pad token that pooling skips.
    pub pad: Option<u32>,
    /// The token of [`Pooling::Token`].
    pub token: Option<u32>,
    /// The token that ends a step; `None` where there is one score and not one for each step.
    pub step: Option<u32>,
    /// What a gating network looks for; empty without one.
    pub gate: Vec<u32>,
    /// Rows of the language-model head that speak for and against; empty where the head is another.
    pub plus: Vec<u32>,
    pub minus: Vec<u32>,
    /// Of the outputs in the reward; empty: the first output is the reward.
    pub weights: Vec<f64>,
    pub link: Link,
    pub reduce: Reduce,
    /// The cap on logits of the language-model head.
    pub softcap: Option<f64>,
    /// The temperature of a gating network.
    pub temperature: f64,
}

/// The tokens of one sequence that a head reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Ascending: one, all (the mean), or the steps.
    pub read: Vec<usize>,
    /// Where a gating network reads.
    pub gate: Option<usize>,
}

/// What turns names into ids.
pub trait Names {
    /// The one token of this name; the error says why it is none.
    fn token(&self, name: &TokenName) -> Result<u32, String>;

    /// The tokens of a text, without any added around it.
    fn tokens(&self, text: &str) -> Result<Vec<u32>, String>;
}

/// Where ArmoRM's gating network reads in a conversation of Llama 3.
const GATE_LLAMA_3: &str = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";

impl Readout {
    /// Settles how a head reads. `outputs` names the head's outputs, if they have names. The error lists every mistake.
    pub fn resolve(architecture: &Architecture, layout: &Layout, outputs: &[String], names: &dyn Names) -> Result<Self, Vec<String>> {
        let (config, mut problems) = (&architecture.head, Vec::new());
        let choice = &config.choice;
        let pooling = layout.head.pooling.unwrap_or(architecture.pooling);
        let mut token = |field: &str, name: &TokenName| {
            let id = names.token(name).and_then(|id| {
                let rows = architecture.vocab_size;
                if (id as usize) < rows { Ok(id) } else { Err(format!("is token {id}, and the model has {rows} rows")) }
            });
            id.map_err(|problem| problems.push(format!("{field}: {} {problem}", said(name)))).ok()
        };
        let step = match &choice.at {
            Some(At::Each(name)) => token("head.at", name),
            Some(At::Last) | None => None,
        };
        let pooled = match (&choice.pooling_token, pooling) {
            (Some(name), Pooling::Token) => token("pooling", name),
            _ => None,
        };
        let mut all = |field: &str, list: &[TokenName]| -> Vec<u32> { list.iter().filter_map(|name| token(field, name)).collect() };
        let (plus, minus) = match &choice.tokens {
            Some(rows) => (all("head.tokens.plus", &rows.plus), all("head.tokens.minus", &rows.minus)),
            None => (Vec::new(), Vec::new()),
        };
        if pooling == Pooling::Token && choice.pooling_token.is_none() {
            problems.push("pooling: token needs the token that is read: `pooling: {token: \"<name>\"}`".to_owned());
        }
        if plus.len() + minus.len() > MAX_NAMED {
            problems.push(format!("head.tokens: expected at most {MAX_NAMED} tokens, found {}", plus.len() + minus.len()));
        }
        if let Some(shared) = plus.iter().find(|id| minus.contains(id)) {
            problems.push(format!("head.tokens: token {shared} speaks both for and against"));
        }
        let gate = match (&layout.head.form, &choice.gate_at) {
            (HeadForm::Gated(_), text) => {
                let text = text.as_deref().unwrap_or(GATE_LLAMA_3);
                let known = choice.gate_at.is_some() || architecture.model_type == "llama";
                match names.tokens(text).map_err(|problem| format!("{text:?}: {problem}")) {
                    Ok(ids) if known && !ids.is_empty() => ids,
                    Err(problem) if known => {
                        problems.push(format!("head.gate_at: {problem}"));
                        Vec::new()
                    }
                    _ => {
                        problems.push(
                            "head.gate_at: expected the text before the answer, where the gating network reads; found none".to_owned(),
                        );
                        Vec::new()
                    }
                }
            }
            (_, Some(_)) => {
                problems.push("head.gate_at: the head has no gating network".to_owned());
                Vec::new()
            }
            (_, None) => Vec::new(),
        };
        let count = layout.outputs();
        let by_default = default_weights(layout, step.is_some() || config.says_every_token(), count);
        let weights = match &choice.weights {
            None => by_default.clone(),
            Some(_) if matches!(layout.head.form, HeadForm::Gated(_)) => {
                problems.push("head.weights: the gating network weights the outputs of this head".to_owned());
                Vec::new()
            }
            Some(weights) => given_weights(weights, count, outputs).unwrap_or_else(|problem| {
                problems.push(format!("head.weights: {problem}"));
                Vec::new()
            }),
        };
        if let Some(reduce) = choice.reduce.filter(|_| choice.at.as_ref().is_none_or(|at| *at == At::Last)) {
            problems.push(format!("head.reduce: {} needs steps to reduce: `at: each \"<step>\"`", reduce.name()));
        }
        // Minima and products are of probabilities; what is compared or learnt from as a reward is a logit.
        let two = by_default.len() == 2;
        let link = choice.link.unwrap_or(if step.is_some() && two { Link::Probability } else { Link::Logit });
        if link == Link::Probability && matches!(layout.head.form, HeadForm::Rows(_)) && count < 2 {
            problems.push("head.as: a probability needs tokens that speak against: `tokens: {plus: [...], minus: [...]}`".to_owned());
        }
        if step.is_some() && matches!(layout.head.form, HeadForm::Gated(_)) {
            problems.push("head.at: a head with a gating network reads once".to_owned());
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(Self {
            pooling,
            pad: architecture.pad_token_id,
            token: pooled,
            step,
            gate,
            plus,
            minus,
            weights,
            link,
            reduce: choice.reduce.unwrap_or_default(),
            softcap: config.softcap.filter(|_| matches!(layout.head.form, HeadForm::Rows(_))),
            temperature: config.gate_temperature,
        })
    }

    /// The reading of a head that names no token. For tests and benches, which have no tokenizer.
    ///
    /// # Panics
    /// If the head names one.
    pub fn unnamed(architecture: &Architecture, layout: &Layout) -> Self {
        struct Nobody;
        impl Names for Nobody {
            fn token(&self, _: &TokenName) -> Result<u32, String> {
                Err("is named, and there is no tokenizer".to_owned())
            }

            fn tokens(&self, _: &str) -> Result<Vec<u32>, String> {
                Err("there is no tokenizer".to_owned())
            }
        }
        Self::resolve(architecture, layout, &[], &Nobody).unwrap_or_else(|problems| panic!("{}", problems.join("; ")))
    }

    /// The tokens that are read of a non-empty sequence; the error says what it lacks.
    pub fn places(&self, ids: &[u32]) -> Result<Places, String> {
        let read = match self.step {
            Some(step) => ids.iter().enumerate().filter(|(_, id)| **id == step).map(|(position, _)| position).collect(),
            None if self.pooling == Pooling::Mean => (0..ids.len()).collect(),
            None => self.pooling.position(ids, self.pad, self.token).into_iter().collect::<Vec<_>>(),
        };
        if read.is_empty() {
            let (what, id) =
                if self.step.is_some() { ("no step: the token", self.step) } else { ("nothing to read: the token", self.token) };
            return Err(format!("there is {what} {} does not occur", id.unwrap_or_default()));
        }
        let gate = match self.gate.len() {
            0 => None,
            length => {
                let found = ids.windows(length).rposition(|window| window == self.gate);
                Some(found.ok_or("the text before the answer, where the gating network reads, does not occur")?)
            }
        };
        Ok(Places { read, gate })
    }

    /// A short sequence that holds every token that is looked for; empty where none is.
    pub fn probe(&self) -> Vec<u32> {
        self.gate.iter().copied().chain(self.token).chain(self.step).collect()
    }

    /// The score of one place, of the head's outputs there.
    pub fn combine(&self, outputs: &[f32]) -> f64 {
        let logit = match self.weights.as_slice() {
            [] => outputs.first().copied().map_or(f64::NAN, f64::from),
            weights => weights.iter().zip(outputs).map(|(weight, output)| weight * f64::from(*output)).sum(),
        };
        self.link.apply(logit)
    }

    /// Whether cutting the right end of a sequence may cut what is read.
    pub fn reads_the_end(&self) -> bool {
        self.step.is_some() || self.pooling.reads_the_end()
    }
}

fn said(name: &TokenName) -> String {
    match name {
        TokenName::Id(id) => id.to_string(),
        TokenName::Text(text) => format!("{text:?}"),
    }
}

/// Two rows speak for and against; two labels of a step are wrong and right. Everything else: the first output.
fn default_weights(layout: &Layout, steps: bool, count: usize) -> Vec<f64> {
    match (&layout.head.form, count) {
        (HeadForm::Rows(_), 2) => vec![1.0, -1.0],
        (HeadForm::Stages(_), 2) if steps => vec![-1.0, 1.0],
        _ => Vec::new(),
    }
}

fn given_weights(weights: &Weights, count: usize, outputs: &[String]) -> Result<Vec<f64>, String> {
    match weights {
        Weights::List(list) if list.len() == count => Ok(list.clone()),
        Weights::List(list) => Err(format!("expected one for each of the {count} outputs, found {}", list.len())),
        Weights::Named(named) => {
            let mut list = vec![0.0; count];
            for (name, weight) in named {
                let index = outputs.iter().position(|output| output == name);
                let index = index.ok_or_else(|| format!("the head has no output {name:?}, only {}", outputs.join(", ")))?;
                list[index] = *weight;
            }
            Ok(list)
        }
    }
}

#[cfg(test)]
#[path = "readout_tests.rs"]
mod tests;
