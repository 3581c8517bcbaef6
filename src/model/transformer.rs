//! The one body of all families, decoders and encoders alike: told apart by the architecture's data and by which places
//! of the layout are taken.

use candle_core::{DType, Device, Result, Tensor};

use super::LoadError;
use super::kernels::attention::Shape;
use super::kernels::rope::{HeadTransform, Table, Tables};
use super::ops::{self, Heads};
use super::pack::{MIN_ROWS, Pack};
use super::weights::{Linear, Loader, NormWeights};
use crate::checkpoint::{Architecture, BlockKeys, Layout};

/// Embedding, blocks and last norm: tokens to hidden states.
#[derive(Debug)]
pub struct Transformer {
    architecture: Architecture,
    device: Device,
    embedding: Tensor,
    positions: Option<Tensor>,
    token_types: Option<Tensor>,
    embedding_norm: Option<NormWeights>,
    blocks: Vec<Block>,
    final_norm: Option<NormWeights>,
    ropes: Vec<Tables>,
}

#[derive(Debug)]
struct Block {
    attention_in: Option<NormWeights>,
    /// `[queries | keys | values]` in one product.
    qkv: Linear,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    output: Linear,
    attention_post: Option<NormWeights>,
    mlp_in: Option<NormWeights>,
    /// `[gate | up]` in one product, or `up` alone.
    up: Linear,
    down: Linear,
    mlp_post: Option<NormWeights>,
}

impl Transformer {
    pub fn load(
        architecture: &Architecture,
        layout: &Layout,
        loader: &mut Loader,
        device: &Device,
    ) -> std::result::Result<Self, LoadError> {
        let optional = |loader: &mut Loader, name: Option<&String>| name.map(|name| loader.tensor(name)).transpose();
        Ok(Self {
            embedding: loader.tensor(&layout.embedding)?,
            positions: optional(loader, layout.positions.as_ref())?,
            token_types: optional(loader, layout.token_types.as_ref())?,
            embedding_norm: loader.optional_norm(layout.embedding_norm.as_ref())?,
            blocks: layout.blocks.iter().map(|keys| Block::load(keys, loader)).collect::<std::result::Result<_, _>>()?,
            final_norm: loader.optional_norm(layout.final_norm.as_ref())?,
            ropes: architecture.ropes.iter().map(Tables::new).collect(),
            architecture: architecture.clone(),
            device: device.clone(),
        })
    }

    /// The hidden states of the given rows of the pack, after the last norm: `[rows.len(), hidden]` on the host, in
    /// float32.
    pub fn hidden(&self, pack: &Pack, rows: &[u32]) -> Result<Vec<Vec<f32>>> {
        let mut x = self.embed(pack)?;
        // Behind the last attention only the rows that are read are worth computing; at least so many that a product
        // of them takes its usual path.
        let mut read = rows.to_vec();
        read.resize(rows.len().max(MIN_ROWS), 0);
        let read = Tensor::new(read, &self.device)?;
        let tables: Vec<_> = self.ropes.iter().map(|tables| tables.at_least(pack.longest())).collect();
        for (layer, block) in self.blocks.iter().enumerate() {
            let kind = &self.architecture.layers[layer];
            let last = layer + 1 == self.blocks.len();
            let attended = self.attend(block, &x, kind.window, kind.rope.map(|rope| &*tables[rope]), pack)?;
            let attended = if last { attended.index_select(&read, 0)? } else { attended };
            x = if last { x.index_select(&read, 0)? } else { x };
            x = self.add_and_norm(x, &block.output, &attended, block.attention_post.as_ref())?;
            let inner = self.mlp(block, &x)?;
            x = self.add_and_norm(x, &block.down, &inner, block.mlp_post.as_ref())?;
        }
        if let Some(norm) = &self.final_norm {
            x = self.norm(norm, &x)?;
        }
        let hidden = x.narrow(0, 0, rows.len())?.to_dtype(DType::F32)?;
        hidden.to_vec2()
    }

    fn embed(&self, pack: &Pack) -> Result<Tensor> {
        let rows = |table: &Tensor, ids: &[u32]| table.index_select(&Tensor::new(ids, &self.device)?, 0);
        let mut x = rows(&self.embedding, pack.ids())?;
        for (table, ids) in [(&self.token_types, pack.type_ids()), (&self.positions, pack.positions())] {
            if let Some(table) = table {
                ops::add(&x, &rows(table, ids)?)?;
            }
        }
        if let Some(norm) = &self.embedding_norm {
            x = self.norm(norm, &x)?;
        }
        Ok(x)
    }

    /// Attention of one block, before its output layer.
    fn attend(&self, block: &Block, x: &Tensor, window: Option<usize>, table: Option<&Table>, pack: &Pack) -> Result<Tensor> {
        let normed = block.attention_in.as_ref().map(|norm| self.norm(norm, x)).transpose()?;
        let qkv = block.qkv.forward(normed.as_ref().unwrap_or(x))?;
        if let Some(bias) = &block.qkv.bias {
            ops::add_bias(&qkv, bias)?;
        }
        let architecture = &self.architecture;
        let (heads, kv_heads, head_dim) = (architecture.heads, architecture.kv_heads, architecture.head_dim);
        let norms = block.head_norms.as_ref().map(|(query, key)| (&query[..], &key[..], architecture.norm.eps()));
        if norms.is_some() || table.is_some() {
            let transform = HeadTransform { query_heads: heads, key_heads: kv_heads, head_dim, norms, table };
            ops::transform_heads(&qkv, Heads { transform, positions: pack.positions() })?;
        }
        let shape = Shape { heads, kv_heads, head_dim, scale: architecture.attention_scale as f32, causal: architecture.causal, window };
        ops::attend(&qkv, &shape, pack)
    }

    /// The inner activation of the MLP, before its last layer.
    fn mlp(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let normed = block.mlp_in.as_ref().map(|norm| self.norm(norm, x)).transpose()?;
        let up = block.up.forward(normed.as_ref().unwrap_or(x))?;
        if let Some(bias) = &block.up.bias {
            ops::add_bias(&up, bias)?;
        }
        if self.architecture.gated {
            return ops::gate(self.architecture.activation, &up, self.architecture.intermediate_size);
        }
        ops::activate(self.architecture.activation, &up)?;
        narrowed(&up, block.up.outputs)
    }

    /// `x + linear(inner)`, and the norm that stands on the residual stream where there is one.
    fn add_and_norm(&self, x: Tensor, linear: &Linear, inner: &Tensor, post: Option<&NormWeights>) -> Result<Tensor> {
        let y = linear.forward(inner)?;
        if let Some(bias) = &linear.bias {
            ops::add_bias(&y, bias)?;
        }
        ops::add(&x, &y)?;
        post.map_or(Ok(x.clone()), |norm| self.norm(norm, &x))
    }

    fn norm(&self, norm: &NormWeights, x: &Tensor) -> Result<Tensor> {
        ops::normalise(self.architecture.norm, x, &norm.weight, norm.bias.as_ref())
    }
}

/// Without the zero columns that a narrow product was padded with.
fn narrowed(x: &Tensor, width: usize) -> Result<Tensor> {
    if x.dim(1)? == width { Ok(x.clone()) } else { x.narrow(1, 0, width)?.contiguous() }
}

impl Block {
    fn load(keys: &BlockKeys, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        let head_norms = match (&keys.query_norm, &keys.key_norm) {
            (Some(query), Some(key)) => Some((loader.host(&query.weight)?, loader.host(&key.weight)?)),
            _ => None,
        };
        let up: Vec<_> = keys.gate.iter().chain([&keys.up]).collect();
        Ok(Self {
            attention_in: loader.optional_norm(keys.attention_in.as_ref())?,
            qkv: loader.fused(&[&keys.query, &keys.key, &keys.value])?,
            head_norms,
            output: loader.fused(&[&keys.output])?,
            attention_post: loader.optional_norm(keys.attention_post.as_ref())?,
            mlp_in: loader.optional_norm(keys.mlp_in.as_ref())?,
            up: loader.fused(&up)?,
            down: loader.fused(&[&keys.down])?,
            mlp_post: loader.optional_norm(keys.mlp_post.as_ref())?,
        })
    }
}
