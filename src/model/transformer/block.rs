//! One transformer layer: attention and an MLP, and the norms around them.

use candle_core::{Result, Tensor};

use super::super::LoadError;
use super::super::kernels::attention::Shape;
use super::super::kernels::distances::{Distances, Projected};
use super::super::kernels::rope::{HeadTransform, Rotation};
use super::super::ops::{self, Heads};
use super::super::pack::Pack;
use super::super::prefixes::Memory;
use super::super::weights::{Linear, Loader, NormWeights, narrowed};
use super::experts::Mixture;
use crate::checkpoint::{Architecture, BlockKeys, DenseKeys, MlpKeys, PartNorms};

#[derive(Debug)]
pub struct Block {
    pub attention_norms: Norms,
    /// `[queries | keys | values]` in one product.
    qkv: Linear,
    qk_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub projected: Option<Projected>,
    pub output: Linear,
    pub mlp_norms: Norms,
    mlp: Mlp,
}

/// The norms around one part of a layer; see [`PartNorms`].
#[derive(Debug)]
pub struct Norms {
    before: Option<NormWeights>,
    behind: Option<NormWeights>,
    after: Option<NormWeights>,
}

#[derive(Debug)]
enum Mlp {
    Dense(Dense),
    Mixture(Mixture),
}

#[derive(Debug)]
pub struct Dense {
    /// `[gate | up]` in one product, or `up` alone.
    up: Linear,
    down: Linear,
}

/// What the attention of one layer needs to know beside its weights.
pub struct Context<'a> {
    pub architecture: &'a Architecture,
    pub pack: &'a Pack,
    pub window: Option<usize>,
    pub rotation: Option<&'a Rotation>,
    pub distances: Option<Distances<'a>>,
    /// What was computed with earlier packs, and the number of this layer in it.
    pub memory: Option<(&'a Memory, usize)>,
}

impl Block {
    pub fn load(
        architecture: &Architecture,
        keys: &BlockKeys,
        relative: Option<&Tensor>,
        loader: &mut Loader,
    ) -> std::result::Result<Self, LoadError> {
        let qk_norms = match (&keys.query_norm, &keys.key_norm) {
            (Some(query), Some(key)) => Some((loader.norm_weight(query)?, loader.norm_weight(key)?)),
            _ => None,
        };
        let qkv = loader.fused(&[&keys.query, &keys.key, &keys.value])?;
        Ok(Self {
            attention_norms: Norms::load(&keys.attention_norms, loader)?,
            projected: relative.map(|relative| projected(architecture, keys, &qkv, relative, loader)).transpose()?,
            qkv,
            qk_norms,
            output: loader.fused(&[&keys.output])?,
            mlp_norms: Norms::load(&keys.mlp_norms, loader)?,
            mlp: match &keys.mlp {
                MlpKeys::Dense(keys) => Mlp::Dense(Dense::load(keys, loader)?),
                MlpKeys::Experts { router, experts } => Mlp::Mixture(Mixture::load(architecture, router, experts, loader)?),
            },
        })
    }

    /// Attention, before its output layer.
    pub fn attend(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        let &Context { architecture, pack, window, rotation, distances, memory } = context;
        let qkv = self.qkv.forward_biased(&self.attention_norms.before(architecture, x)?)?;
        let (heads, kv_heads, head_dim) = (architecture.heads, architecture.kv_heads, architecture.head_dim);
        let norms = self.qk_norms.as_ref().map(|(query, key)| (&query[..], &key[..], architecture.norm.eps()));
        if norms.is_some() || rotation.is_some() {
            let transform = HeadTransform { query_heads: heads, key_heads: kv_heads, head_dim, norms, rotation };
            ops::transform_heads(&qkv, Heads { transform, positions: pack.positions() })?;
        }
        let (scale, softcap) = (architecture.attention_scale as f32, architecture.attention_softcap.map(|cap| cap as f32));
        let shape = Shape { heads, kv_heads, head_dim, scale, softcap, causal: architecture.causal, window };
        ops::attend(&qkv, &shape, distances, pack, memory)
    }

    /// The whole MLP; its columns may be more than the stream's.
    pub fn mlp(&self, architecture: &Architecture, x: &Tensor) -> Result<Tensor> {
        let x = self.mlp_norms.before(architecture, x)?;
        match &self.mlp {
            Mlp::Dense(dense) => dense.forward(architecture, architecture.intermediate_size, &x),
            Mlp::Mixture(mixture) => mixture.forward(architecture, &x),
        }
    }
}

impl Norms {
    fn load(keys: &PartNorms, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            before: loader.optional_norm(keys.before.as_ref())?,
            behind: loader.optional_norm(keys.behind.as_ref())?,
            after: loader.optional_norm(keys.after.as_ref())?,
        })
    }

    /// What the part reads of the stream.
    fn before(&self, architecture: &Architecture, x: &Tensor) -> Result<Tensor> {
        self.before.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.apply(architecture.norm, x))
    }

    /// The stream with what the part gave.
    pub fn add(&self, architecture: &Architecture, x: Tensor, y: Tensor) -> Result<Tensor> {
        match &self.behind {
            Some(norm) => ops::add(&x, &norm.apply(architecture.norm, &y)?)?,
            None => ops::add(&x, &y)?,
        }
        self.after.as_ref().map_or(Ok(x.clone()), |norm| norm.apply(architecture.norm, &x))
    }
}

impl Dense {
    pub fn load(keys: &DenseKeys, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        let up: Vec<_> = keys.gate.iter().chain([&keys.up]).collect();
        Ok(Self { up: loader.fused(&up)?, down: loader.fused(&[&keys.down])? })
    }

    /// `width` is that of the activation in between.
    pub fn forward(&self, architecture: &Architecture, width: usize, x: &Tensor) -> Result<Tensor> {
        let up = self.up.forward_biased(x)?;
        let inner = if architecture.gated {
            ops::gate(architecture.activation, &up, width)?
        } else {
            ops::activate(architecture.activation, &up)?;
            narrowed(&up, width)?
        };
        self.down.forward_biased(&inner)
    }
}

/// The embeddings of distances as this layer's queries and keys meet them.
fn projected(
    architecture: &Architecture,
    keys: &BlockKeys,
    qkv: &Linear,
    relative: &Tensor,
    loader: &mut Loader,
) -> std::result::Result<Projected, LoadError> {
    let (heads, head_dim) = (architecture.heads, architecture.head_dim);
    let width = heads * head_dim;
    let disentangled = architecture.disentangled.as_ref();
    // Projected as contents are, unless the layer has projections of its own: to keys, then to queries.
    let wanted = [
        (disentangled.is_some_and(|kinds| kinds.content_to_position), width),
        (disentangled.is_some_and(|kinds| kinds.position_to_content), 0),
    ];
    let mut sides = [None, None];
    for ((side, own), (wanted, column)) in sides.iter_mut().zip(&keys.position_projections).zip(wanted) {
        if !wanted {
            continue;
        }
        let values = match own {
            Some(own) => loader.fused(&[own])?.forward_biased(relative)?.narrow(1, 0, width)?,
            None => qkv.forward_biased(relative)?.narrow(1, column, width)?,
        };
        *side = Some(values.contiguous()?.flatten_all()?.to_vec1::<f32>()?);
    }
    let [as_keys, as_queries] = sides;
    let embeddings = relative.dim(0)?;
    Ok(Projected::new(heads, head_dim, embeddings, as_keys.as_deref(), as_queries.as_deref()))
}
