//! Which tensors of a checkpoint the model reads, and where each of them stands in it. Strict: a tensor that is missing,
//! has another shape, or that nobody would read is a problem, never a guess.

mod head;

use std::collections::BTreeSet;

use super::architecture::{Architecture, Naming, Norm, Residual};
use super::manifest::Manifest;
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
    pub embedding_norm: Option<NormKeys>,
    pub blocks: Vec<BlockKeys>,
    pub final_norm: Option<NormKeys>,
    /// From hidden states to outputs.
    pub head: HeadKeys,
    used: Vec<String>,
    unused: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NormKeys {
    pub weight: String,
    pub bias: Option<String>,
}

/// `y = x W^T + b` with `W: [outputs, inputs]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearKeys {
    pub weight: String,
    pub bias: Option<String>,
    pub inputs: usize,
    pub outputs: usize,
}

/// One transformer layer. The norms are optional, so that their places tell pre-norm from post-norm families.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockKeys {
    /// On the input of the attention, beside the residual stream.
    pub attention_in: Option<NormKeys>,
    pub query: LinearKeys,
    pub key: LinearKeys,
    pub value: LinearKeys,
    pub query_norm: Option<NormKeys>,
    pub key_norm: Option<NormKeys>,
    pub output: LinearKeys,
    /// On the residual stream, after the attention was added.
    pub attention_post: Option<NormKeys>,
    /// On the input of the MLP, beside the residual stream.
    pub mlp_in: Option<NormKeys>,
    pub gate: Option<LinearKeys>,
    pub up: LinearKeys,
    pub down: LinearKeys,
    /// On the residual stream, after the MLP was added.
    pub mlp_post: Option<NormKeys>,
}

impl Layout {
    /// Finds the place of every tensor. The error lists each missing, mis-shaped or unknown tensor as a sentence.
    pub fn new(architecture: &Architecture, manifest: &Manifest) -> Result<Self, Vec<String>> {
        let mut taker = Taker { manifest, used: BTreeSet::new(), spare: Vec::new(), problems: Vec::new() };
        let mut layout = match architecture.naming {
            Naming::Llama => llama(architecture, &mut taker),
            Naming::Bert => bert(architecture, &mut taker),
        };
        layout.head = head::find(architecture, &layout.embedding, &mut taker);
        let mut unknown = 0;
        for name in manifest.names().filter(|name| !taker.used.contains(*name)) {
            if rides_along(name)
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
        if !taker.problems.is_empty() {
            return Err(taker.problems);
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

/// Tensors that checkpoints carry although no reward model reads them: the language-model head, and buffers that are
/// computed from the configuration.
fn rides_along(name: &str) -> bool {
    let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
    head::is_language_head(name) || last == "inv_freq" || last == "position_ids"
}

fn llama(architecture: &Architecture, taker: &mut Taker) -> Layout {
    let prefix = if taker.manifest.get("model.embed_tokens.weight").is_some() { "model." } else { "" };
    let hidden = architecture.hidden_size;
    let (query_width, kv_width) = (architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim);
    let embedding = taker.tensor(format!("{prefix}embed_tokens.weight"), &[architecture.vocab_size, hidden]);
    let blocks = (0..architecture.layers.len())
        .map(|layer| {
            let attention = format!("{prefix}layers.{layer}.self_attn");
            let mlp = format!("{prefix}layers.{layer}.mlp");
            let head_norm = |taker: &mut Taker, name: &str| {
                architecture.qk_norm.then(|| taker.norm(Norm::Rms { eps: 0.0 }, &format!("{attention}.{name}"), architecture.head_dim))
            };
            BlockKeys {
                attention_in: Some(taker.norm(architecture.norm, &format!("{prefix}layers.{layer}.input_layernorm"), hidden)),
                query: taker.linear(&format!("{attention}.q_proj"), hidden, query_width, architecture.qkv_bias),
                key: taker.linear(&format!("{attention}.k_proj"), hidden, kv_width, architecture.qkv_bias),
                value: taker.linear(&format!("{attention}.v_proj"), hidden, kv_width, architecture.qkv_bias),
                query_norm: head_norm(taker, "q_norm"),
                key_norm: head_norm(taker, "k_norm"),
                output: taker.linear(&format!("{attention}.o_proj"), query_width, hidden, architecture.output_bias),
                attention_post: None,
                mlp_in: Some(taker.norm(architecture.norm, &format!("{prefix}layers.{layer}.post_attention_layernorm"), hidden)),
                gate: architecture
                    .gated
                    .then(|| taker.linear(&format!("{mlp}.gate_proj"), hidden, architecture.intermediate_size, architecture.mlp_bias)),
                up: taker.linear(&format!("{mlp}.up_proj"), hidden, architecture.intermediate_size, architecture.mlp_bias),
                down: taker.linear(&format!("{mlp}.down_proj"), architecture.intermediate_size, hidden, architecture.mlp_bias),
                mlp_post: None,
            }
        })
        .collect();
    let final_norm = Some(taker.norm(architecture.norm, &format!("{prefix}norm"), hidden));
    Layout {
        embedding,
        positions: None,
        token_types: None,
        embedding_norm: None,
        blocks,
        final_norm,
        head: HeadKeys::default(),
        used: Vec::new(),
        unused: Vec::new(),
    }
}

fn bert(architecture: &Architecture, taker: &mut Taker) -> Layout {
    let prefix = if taker.manifest.get("bert.embeddings.word_embeddings.weight").is_some() { "bert." } else { "" };
    let hidden = architecture.hidden_size;
    let embeddings = format!("{prefix}embeddings");
    let embedding = taker.tensor(format!("{embeddings}.word_embeddings.weight"), &[architecture.vocab_size, hidden]);
    let positions =
        architecture.learned_positions.map(|rows| taker.tensor(format!("{embeddings}.position_embeddings.weight"), &[rows, hidden]));
    let token_types = Some(taker.tensor(format!("{embeddings}.token_type_embeddings.weight"), &[architecture.token_types, hidden]));
    let embedding_norm =
        (architecture.residual == Residual::PostNorm).then(|| taker.norm(architecture.norm, &format!("{embeddings}.LayerNorm"), hidden));
    let blocks = (0..architecture.layers.len())
        .map(|layer| {
            let layer = format!("{prefix}encoder.layer.{layer}");
            let own = format!("{layer}.attention.self");
            BlockKeys {
                attention_in: None,
                query: taker.linear(&format!("{own}.query"), hidden, hidden, architecture.qkv_bias),
                key: taker.linear(&format!("{own}.key"), hidden, hidden, architecture.qkv_bias),
                value: taker.linear(&format!("{own}.value"), hidden, hidden, architecture.qkv_bias),
                query_norm: None,
                key_norm: None,
                output: taker.linear(&format!("{layer}.attention.output.dense"), hidden, hidden, architecture.output_bias),
                attention_post: Some(taker.norm(architecture.norm, &format!("{layer}.attention.output.LayerNorm"), hidden)),
                mlp_in: None,
                gate: None,
                up: taker.linear(&format!("{layer}.intermediate.dense"), hidden, architecture.intermediate_size, architecture.mlp_bias),
                down: taker.linear(&format!("{layer}.output.dense"), architecture.intermediate_size, hidden, architecture.mlp_bias),
                mlp_post: Some(taker.norm(architecture.norm, &format!("{layer}.output.LayerNorm"), hidden)),
            }
        })
        .collect();
    Layout {
        embedding,
        positions,
        token_types,
        embedding_norm,
        blocks,
        final_norm: None,
        head: HeadKeys::default(),
        used: Vec::new(),
        unused: Vec::new(),
    }
}

/// Takes tensors out of a manifest by name and shape, and remembers what it took and what was wrong.
struct Taker<'a> {
    manifest: &'a Manifest,
    used: BTreeSet<String>,
    /// Heads that do not count; their tensors ride along.
    spare: Vec<String>,
    problems: Vec<String>,
}

impl Taker<'_> {
    fn tensor(&mut self, name: String, shape: &[usize]) -> String {
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
        self.used.insert(name.clone());
        name
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize, bias: bool) -> LinearKeys {
        LinearKeys {
            weight: self.tensor(format!("{name}.weight"), &[outputs, inputs]),
            bias: bias.then(|| self.tensor(format!("{name}.bias"), &[outputs])),
            inputs,
            outputs,
        }
    }

    fn norm(&mut self, kind: Norm, name: &str, width: usize) -> NormKeys {
        let weight = self.tensor(format!("{name}.weight"), &[width]);
        let bias = matches!(kind, Norm::Layer { .. }).then(|| self.tensor(format!("{name}.bias"), &[width]));
        NormKeys { weight, bias }
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
