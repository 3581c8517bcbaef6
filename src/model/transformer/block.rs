//! One transformer layer: attention and an MLP, and the norms around them.

use candle_core::{DType, Result, Tensor};

use super::super::LoadError;
use super::super::apart::Destination;
use super::super::kernels::attention::Shape;
use super::super::kernels::distances::{Distances, Projected};
use super::super::kernels::rope::{HeadTransform, Rotation};
use super::super::ops::{self, Heads, Ops};
use super::super::pack::Pack;
use super::super::plain::{self, PackPlan};
use super::super::prefixes::Memory;
use super::super::weights::{Linear, Loader, NormWeights, narrowed};
use super::experts::Mixture;
use crate::checkpoint::{Architecture, BlockKeys, DenseKeys, MlpKeys, PartNorms};

#[derive(Debug)]
pub struct Block {
    pub attention_norms: Norms,
    /// `[queries | keys | values]` in one product.
    qkv: Linear,
    qk_norms: Option<QkNorms>,
    pub distances: Option<LayerDistances>,
    pub output: Linear,
    pub mlp_norms: Norms,
    mlp: Mlp,
}

/// The weights of the norms on queries and keys, for either side of the seam.
#[derive(Debug)]
enum QkNorms {
    Kernels(Vec<f32>, Vec<f32>),
    Plain(Tensor, Tensor),
}

/// The embeddings of distances as one layer meets them, for either side of the seam.
#[derive(Debug)]
pub enum LayerDistances {
    Kernels(Projected),
    Plain(plain::Embedded),
}

/// The norms around one part of a layer; see [`PartNorms`].
#[derive(Debug)]
pub struct Norms {
    before: Option<NormWeights>,
    behind: Option<NormWeights>,
    after: Option<NormWeights>,
    ops: Ops,
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
    ops: Ops,
}

/// What the attention of one layer needs to know beside its weights.
pub struct Context<'a> {
    pub architecture: &'a Architecture,
    pub pack: &'a Pack,
    pub window: Option<usize>,
    /// Index of the rotary embedding, and how it rotates this pack.
    pub rotation: Option<(usize, &'a Rotation)>,
    pub distances: Option<Distances<'a>>,
    /// What was computed with earlier packs, and the number of this layer in it; for the kernels alone.
    pub memory: Option<(&'a Memory, usize)>,
    /// What stands on the device for this pack; absent where the kernels compute.
    pub plan: Option<&'a PackPlan>,
}

impl Block {
    pub fn load(
        architecture: &Architecture,
        keys: &BlockKeys,
        relative: Option<&Tensor>,
        loader: &mut Loader,
    ) -> std::result::Result<Self, LoadError> {
        let qk_norms = match (&keys.query_norm, &keys.key_norm) {
            (Some(query), Some(key)) => Some(QkNorms::load(loader.norm_weight(query)?, loader.norm_weight(key)?, loader)?),
            _ => None,
        };
        let qkv = loader.fused(&[&keys.query, &keys.key, &keys.value])?;
        Ok(Self {
            attention_norms: Norms::load(&keys.attention_norms, loader)?,
            distances: relative.map(|relative| distances(architecture, keys, &qkv, relative, loader)).transpose()?,
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

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        Ok(Self {
            attention_norms: self.attention_norms.on(to)?,
            qkv: self.qkv.on(to)?,
            qk_norms: self.qk_norms.as_ref().map(|norms| norms.on(to)).transpose()?,
            distances: self.distances.as_ref().map(|distances| distances.on(to)).transpose()?,
            output: self.output.on(to)?,
            mlp_norms: self.mlp_norms.on(to)?,
            mlp: match &self.mlp {
                Mlp::Dense(dense) => Mlp::Dense(dense.on(to)?),
                Mlp::Mixture(mixture) => Mlp::Mixture(mixture.on(to)?),
            },
        })
    }

    /// Attention, before its output layer.
    pub fn attend(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        let &Context { architecture, pack, window, rotation, distances, memory, plan } = context;
        let qkv = self.qkv.forward_biased(&self.attention_norms.before(architecture, x)?)?;
        let (heads, kv_heads, head_dim) = (architecture.heads, architecture.kv_heads, architecture.head_dim);
        let (scale, softcap) = (architecture.attention_scale as f32, architecture.attention_softcap.map(|cap| cap as f32));
        let shape = Shape { heads, kv_heads, head_dim, scale, softcap, causal: architecture.causal, window };
        let eps = architecture.norm.eps();
        if let Some(plan) = plan {
            let norms = match &self.qk_norms {
                Some(QkNorms::Plain(query, key)) => Some((query, key, eps)),
                _ => None,
            };
            let distances = match &self.distances {
                Some(LayerDistances::Plain(embedded)) => Some(embedded),
                _ => None,
            };
            return plan.attend(&qkv, &shape, &plain::Heads { norms, rope: rotation.map(|(rope, _)| rope), distances });
        }
        let norms = match &self.qk_norms {
            Some(QkNorms::Kernels(query, key)) => Some((&query[..], &key[..], eps)),
            _ => None,
        };
        if norms.is_some() || rotation.is_some() {
            let rotation = rotation.map(|(_, rotation)| rotation);
            let transform = HeadTransform { query_heads: heads, key_heads: kv_heads, head_dim, norms, rotation };
            ops::transform_heads(&qkv, Heads { transform, positions: pack.positions() })?;
        }
        ops::attend(&qkv, &shape, distances, pack, memory)
    }

    /// Whether its MLP gathers rows by what they hold.
    pub fn chooses_rows(&self) -> bool {
        matches!(self.mlp, Mlp::Mixture(_))
    }

    /// Whether its MLP groups them on the device.
    pub fn groups_rows(&self) -> bool {
        matches!(&self.mlp, Mlp::Mixture(mixture) if mixture.groups_rows())
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
            ops: loader.backend().ops,
        })
    }

    fn on(&self, to: Destination) -> Result<Self> {
        let on = |norm: &Option<NormWeights>| norm.as_ref().map(|norm| norm.on(to)).transpose();
        Ok(Self { before: on(&self.before)?, behind: on(&self.behind)?, after: on(&self.after)?, ops: self.ops })
    }

    /// What the part reads of the stream.
    fn before(&self, architecture: &Architecture, x: &Tensor) -> Result<Tensor> {
        self.before.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.apply(architecture.norm, x))
    }

    /// The stream with what the part gave.
    pub fn add(&self, architecture: &Architecture, x: Tensor, y: Tensor) -> Result<Tensor> {
        let x = match &self.behind {
            Some(norm) => self.ops.add(x, &norm.apply(architecture.norm, &y)?)?,
            None => self.ops.add(x, &y)?,
        };
        self.after.as_ref().map_or(Ok(x.clone()), |norm| norm.apply(architecture.norm, &x))
    }
}

impl Dense {
    pub fn load(keys: &DenseKeys, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        let up: Vec<_> = keys.gate.iter().chain([&keys.up]).collect();
        Ok(Self { up: loader.fused(&up)?, down: loader.fused(&[&keys.down])?, ops: loader.backend().ops })
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        Ok(Self { up: self.up.on(to)?, down: self.down.on(to)?, ops: self.ops })
    }

    /// `width` is that of the activation in between.
    pub fn forward(&self, architecture: &Architecture, width: usize, x: &Tensor) -> Result<Tensor> {
        let inner = Self::activated(architecture, self.ops, width, self.up.forward_biased(x)?)?;
        self.down.forward_biased(&inner)
    }

    /// What stands between the two products, of which `up` is the first.
    pub fn activated(architecture: &Architecture, ops: Ops, width: usize, up: Tensor) -> Result<Tensor> {
        if architecture.gated {
            ops.gate(architecture.activation, &up, width)
        } else {
            narrowed(&ops.activate(architecture.activation, up)?, width)
        }
    }

    /// Both weights, if they are all that there is to them.
    pub fn weights(&self) -> Option<[&Tensor; 2]> {
        Some([self.up.bare()?, self.down.bare()?])
    }
}

impl QkNorms {
    fn load(query: Vec<f32>, key: Vec<f32>, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        if loader.backend().ops == Ops::Kernels {
            return Ok(Self::Kernels(query, key));
        }
        let mut place = |weight: Vec<f32>| {
            let width = weight.len();
            loader.place(weight, &[width], DType::F32)
        };
        Ok(Self::Plain(place(query)?, place(key)?))
    }

    fn on(&self, to: Destination) -> Result<Self> {
        Ok(match self {
            Self::Kernels(query, key) => Self::Kernels(query.clone(), key.clone()),
            Self::Plain(query, key) => Self::Plain(to.copy(query)?, to.copy(key)?),
        })
    }
}

impl LayerDistances {
    fn on(&self, to: Destination) -> Result<Self> {
        Ok(match self {
            Self::Kernels(projected) => Self::Kernels(projected.clone()),
            Self::Plain(embedded) => Self::Plain(embedded.on(to)?),
        })
    }
}

/// The embeddings of distances as this layer's queries and keys meet them.
fn distances(
    architecture: &Architecture,
    keys: &BlockKeys,
    qkv: &Linear,
    relative: &Tensor,
    loader: &mut Loader,
) -> std::result::Result<LayerDistances, LoadError> {
    let (heads, head_dim) = (architecture.heads, architecture.head_dim);
    let width = heads * head_dim;
    let disentangled = architecture.disentangled.as_ref();
    // Projected as contents are, unless the layer has projections of its own: to keys, then to queries.
    let wanted = [
        (disentangled.is_some_and(|kinds| kinds.content_to_position), width),
        (disentangled.is_some_and(|kinds| kinds.position_to_content), 0),
    ];
    let [keys, queries] = &keys.position_projections;
    let own = [(keys, wanted[0]), (queries, wanted[1])].map(|(own, (wanted, _))| own.as_ref().filter(|_| wanted));
    let [keys, queries] = own.map(|own| own.map(|own| loader.fused(&[own])).transpose());
    let own = [keys?, queries?];
    loader.settle()?;
    let side = |own: &Option<Linear>, (wanted, column): (bool, usize)| {
        let projected = || match own {
            Some(own) => own.forward_biased(relative)?.narrow(1, 0, width),
            None => qkv.forward_biased(relative)?.narrow(1, column, width),
        };
        wanted.then(projected).transpose()
    };
    let (as_keys, as_queries) = (side(&own[0], wanted[0])?, side(&own[1], wanted[1])?);
    if loader.backend().ops == Ops::Plain {
        return Ok(LayerDistances::Plain(plain::Embedded::new(heads, as_keys.as_ref(), as_queries.as_ref())?));
    }
    let host = |side: Option<Tensor>| side.map(|values| values.contiguous()?.flatten_all()?.to_vec1::<f32>()).transpose();
    let (as_keys, as_queries) = (host(as_keys)?, host(as_queries)?);
    let embeddings = relative.dim(0)?;
    Ok(LayerDistances::Kernels(Projected::new(heads, head_dim, embeddings, as_keys.as_deref(), as_queries.as_deref())))
}
