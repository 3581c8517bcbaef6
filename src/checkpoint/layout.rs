//! Which tensors of a checkpoint the model reads, and where each of them stands in it. Strict: a tensor that is missing,
//! has another shape, or that nobody would read is a problem, never a guess.

mod backbone;
mod head;
mod names;

use std::collections::BTreeSet;

use super::architecture::Architecture;
use super::manifest::Manifest;
use super::names::rides_along;
pub(crate) use head::reads_steps;
pub use head::{Gating, HeadForm, HeadKeys, HeadStage, RowKeys};

/// How many problems of one kind are listed before the rest is counted.
const LISTED: usize = 20;

/// The place of every tensor in the model. Made only by [`Layout::new`], so every name is in the manifest with the right
/// shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub embedding: String,
    pub positions: Option<String>,
    pub token_types: Option<String>,
    /// From the width of the token table to that of the model.
    pub embedding_projection: Option<LinearKeys>,
    pub embedding_norm: Option<NormKeys>,
    pub relative: Option<RelativeKeys>,
    pub convolution: Option<ConvolutionKeys>,
    pub blocks: Vec<BlockKeys>,
    pub final_norm: Option<NormKeys>,
    /// From the width of the model to that of the head.
    pub output_projection: Option<LinearKeys>,
    /// From hidden states to outputs.
    pub head: HeadKeys,
    used: Vec<String>,
    unused: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NormKeys {
    pub weight: String,
    pub bias: Option<String>,
    /// What is stored is the difference of the weight from one.
    pub from_one: bool,
}

/// `y = x W^T + b` with `W: [outputs, inputs]`, as a view of what is stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinearKeys {
    pub weight: String,
    pub bias: Option<String>,
    pub inputs: usize,
    pub outputs: usize,
    /// Which rows of the stored matrix, and elements of the stored bias, these are.
    pub rows: Rows,
    /// The matrix is stored with inputs in rows, and this many columns.
    pub transposed: Option<usize>,
}

impl LinearKeys {
    /// A layer that is stored as it is.
    fn plain(weight: String, bias: Option<String>, inputs: usize, outputs: usize) -> Self {
        Self { weight, bias, inputs, outputs, rows: Rows::all(outputs), transposed: None }
    }
}

/// Rows of a stored matrix: runs of `run` rows, the first of them at `first`, and `stride` from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    pub first: usize,
    pub run: usize,
    pub stride: usize,
}

impl Rows {
    /// All of so many rows.
    pub fn all(outputs: usize) -> Self {
        Self { first: 0, run: outputs, stride: 0 }
    }
}

/// DeBERTa's embeddings of distances, and the norm on them.
#[derive(Clone, Debug, PartialEq)]
pub struct RelativeKeys {
    pub embeddings: String,
    pub norm: Option<NormKeys>,
}

/// DeBERTa's convolution, and the norm behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvolutionKeys {
    /// As a product: `[outputs, inputs, kernel]` is stored, so the inputs of one output are a window's columns, each with
    /// all of its tokens.
    pub linear: LinearKeys,
    pub norm: NormKeys,
}

/// One transformer layer.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockKeys {
    pub attention_norms: PartNorms,
    pub query: LinearKeys,
    pub key: LinearKeys,
    pub value: LinearKeys,
    pub query_norm: Option<NormKeys>,
    pub key_norm: Option<NormKeys>,
    /// Of the embeddings of distances, to keys and to queries, where they are not projected as contents are.
    pub position_projections: [Option<LinearKeys>; 2],
    pub output: LinearKeys,
    pub mlp_norms: PartNorms,
    pub mlp: MlpKeys,
}

/// The norms around one of the two parts of a layer; which of them are there tells pre-norm from post-norm families.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PartNorms {
    /// On the input of the part, beside the residual stream.
    pub before: Option<NormKeys>,
    /// On the output of the part, before it is added.
    pub behind: Option<NormKeys>,
    /// On the residual stream, after the part was added.
    pub after: Option<NormKeys>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum MlpKeys {
    Dense(DenseKeys),
    Experts { router: LinearKeys, experts: Vec<DenseKeys> },
}

#[derive(Clone, Debug, PartialEq)]
pub struct DenseKeys {
    pub gate: Option<LinearKeys>,
    pub up: LinearKeys,
    pub down: LinearKeys,
}

impl Layout {
    /// Finds the place of every tensor. The error lists each missing, mis-shaped or unknown tensor as a sentence.
    pub fn new(architecture: &Architecture, manifest: &Manifest) -> Result<Self, LayoutProblems> {
        let mut taker = Taker { manifest, used: BTreeSet::new(), spare: Vec::new(), headless: None, problems: Vec::new() };
        let mut layout = backbone::backbone(architecture, &mut taker);
        layout.head = head::find(architecture, &layout.embedding, &mut taker);
        let mut unknown = 0;
        for (name, info) in manifest.iter().filter(|(name, _)| !taker.used.contains(*name)) {
            if rides_along(name, info)
                || is_leftover(name)
                || taker.spare.iter().any(|head| name.strip_prefix(head.as_str()).is_some_and(|rest| rest.starts_with('.')))
            {
                layout.unused.push(name.to_owned());
                continue;
            }
            unknown += 1;
            if unknown <= LISTED {
                taker.problems.push(format!("tensor {name:?}: the model would not read it, so the score would not be the checkpoint's"));
            }
        }
        if unknown > LISTED {
            taker.problems.push(format!("and {} more tensors that the model would not read", unknown - LISTED));
        }
        if taker.headless.is_some() || !taker.problems.is_empty() {
            return Err(LayoutProblems { headless: taker.headless, others: taker.problems });
        }
        layout.used = taker.used.into_iter().collect();
        Ok(layout)
    }

    /// Names of the tensors that the model reads, sorted.
    pub fn used(&self) -> &[String] {
        &self.used
    }

    /// Names of the tensors that ride along unused, sorted.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Outputs of the reward head.
    pub fn outputs(&self) -> usize {
        self.head.outputs()
    }
}

/// Why tensors are not those of a model, as sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutProblems {
    /// That there is no reward head at all, apart from the others: whoever knows how it was lost has more to say.
    pub headless: Option<String>,
    pub others: Vec<String>,
}

impl LayoutProblems {
    pub fn into_sentences(self) -> impl Iterator<Item = String> {
        self.headless.into_iter().chain(self.others)
    }
}

/// Poolers of encoders whose classifier has a dense layer of its own, and positions of a DeBERTa that has none: left over
/// where no layer of the model has taken them.
fn is_leftover(name: &str) -> bool {
    let leftovers = ["pooler.dense.weight", "pooler.dense.bias", "embeddings.position_embeddings.weight"];
    leftovers.iter().any(|part| name.strip_suffix(part).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
}

/// Takes tensors out of a manifest by name and shape, and remembers what it took and what was wrong.
struct Taker<'a> {
    manifest: &'a Manifest,
    used: BTreeSet<String>,
    /// Heads that do not count; their tensors ride along.
    spare: Vec<String>,
    headless: Option<String>,
    problems: Vec<String>,
}

impl Taker<'_> {
    fn tensor(&mut self, name: String, shape: &[usize]) -> String {
        // A tensor that several layers are views of is looked at once.
        if !self.used.insert(name.clone()) {
            return name;
        }
        match self.manifest.get(&name) {
            None => self.problems.push(format!("tensor {name:?}: expected shape {shape:?}, found no such tensor")),
            Some(info) if !info.dtype.is_float() => {
                self.problems.push(format!("tensor {name:?}: expected floating-point numbers, found {}", info.dtype.safetensors_name()));
            }
            Some(info) if info.shape != shape => {
                self.problems.push(format!("tensor {name:?}: expected shape {shape:?}, found {:?}", info.shape))
            }
            Some(_) => {}
        }
        name
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize, bias: bool) -> LinearKeys {
        let weight = self.tensor(format!("{name}.weight"), &[outputs, inputs]);
        let bias = bias.then(|| self.tensor(format!("{name}.bias"), &[outputs]));
        LinearKeys::plain(weight, bias, inputs, outputs)
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
