//! The one body of all families, decoders and encoders alike: told apart by the architecture's data and by which places
//! of the layout are taken.

mod block;
mod convolution;
mod embedding;
mod experts;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::LoadError;
use super::apart::{Destination, SharedBase};
use super::device::Backend;
use super::kernels::distances::{self, Distances};
use super::kernels::rope::{Rotation, Tables};
use super::ops::Ops;
use super::pack::{MIN_ROWS, Pack};
use super::plain::PackPlan;
use super::prefixes::Memory;
use super::weights::{Linear, Loader, NormWeights};
use crate::checkpoint::{Architecture, Layout, Residual};
use block::{Block, Context, LayerDistances};
use convolution::Convolution;
use embedding::{Embedding, Rows};

/// Rows that go through the part of a layer behind its attention together, at most: enough for products at full speed. Packs
/// of tests are small; theirs are cut as well.
pub const ROW_BLOCK: usize = if cfg!(test) { 32 } else { 1024 };
const _: () = assert!(ROW_BLOCK >= 2 * MIN_ROWS);

/// Embedding, blocks and last norm: tokens to hidden states.
#[derive(Debug)]
pub struct Transformer {
    architecture: Architecture,
    backend: Backend,
    embedding: Embedding,
    convolution: Option<Convolution>,
    blocks: Vec<Block>,
    final_norm: Option<NormWeights>,
    output_projection: Option<Linear>,
    ropes: Vec<Tables>,
}

/// What a forward needs on the device beside the weights.
pub struct Ready {
    embedded: Rows,
    /// What the convolution sees, where there is one.
    windows: Option<Tensor>,
    /// Rows behind the last attention.
    read: Tensor,
    /// Absent where our kernels compute.
    plan: Option<PackPlan>,
}

impl Transformer {
    pub fn load(architecture: &Architecture, layout: &Layout, loader: &mut Loader) -> std::result::Result<Self, LoadError> {
        let embedding = Embedding::load(architecture, layout, loader)?;
        let relative = embedding::relative(architecture, layout, loader)?;
        let mut blocks = Vec::with_capacity(layout.blocks.len());
        for keys in &layout.blocks {
            blocks.push(Block::load(architecture, keys, relative.as_ref(), loader)?);
        }
        // Said and used are the same: experts may have more than weights.
        let mut backend = loader.backend().clone();
        backend.grouped = backend.grouped.filter(|_| blocks.iter().any(Block::groups_rows));
        Ok(Self {
            embedding,
            convolution: Convolution::load(architecture, layout, loader)?,
            blocks,
            final_norm: loader.optional_norm(layout.final_norm.as_ref())?,
            output_projection: layout.output_projection.as_ref().map(|keys| loader.fused(&[keys])).transpose()?,
            ropes: architecture.ropes.iter().map(Tables::new).collect(),
            architecture: architecture.clone(),
            backend,
        })
    }

    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The same on another device of the same kind; what it shares with others there, too.
    pub fn on(&self, backend: &Backend, base: Option<&SharedBase>) -> Result<Self> {
        let to = Destination { device: &backend.device, base };
        Ok(Self {
            embedding: self.embedding.on(to)?,
            convolution: self.convolution.as_ref().map(|convolution| convolution.on(to)).transpose()?,
            blocks: self.blocks.iter().map(|block| block.on(to)).collect::<Result<_>>()?,
            final_norm: self.final_norm.as_ref().map(|norm| norm.on(to)).transpose()?,
            output_projection: self.output_projection.as_ref().map(|projection| projection.on(to)).transpose()?,
            ropes: self.architecture.ropes.iter().map(Tables::new).collect(),
            architecture: self.architecture.clone(),
            backend: Backend { grouped: backend.grouped.filter(|_| self.backend.grouped.is_some()), ..backend.clone() },
        })
    }

    /// What a forward over this pack needs on the device beside the weights, there for any thread.
    pub fn prepare(&self, pack: &Pack, rows: &[u32]) -> Result<Ready> {
        let rotations: Vec<Rotation> = self.ropes.iter().map(|tables| tables.rotation(pack)).collect();
        let ready = self.ready(pack, rows, &rotations, self.embeddings(pack).as_deref())?;
        // Each thread has a stream of its own on a card.
        self.backend.device.synchronize()?;
        Ok(ready)
    }

    fn ready(&self, pack: &Pack, rows: &[u32], rotations: &[Rotation], embeddings: Option<&[u16]>) -> Result<Ready> {
        let device = &self.backend.device;
        // Behind the last attention only the rows that are read are worth computing; at least so many that a product
        // of them takes its usual path.
        let mut read = rows.to_vec();
        read.resize(rows.len().max(MIN_ROWS), 0);
        let plan = match self.backend.ops {
            Ops::Kernels => None,
            Ops::Plain => Some(PackPlan::new(&self.architecture, pack, rotations, embeddings, &self.backend)?),
        };
        let embedded = self.embedding.rows(&self.architecture, pack, device)?;
        let windows = self.convolution.as_ref().map(|convolution| convolution.windows(pack, device)).transpose()?;
        Ok(Ready { embedded, windows, read: Tensor::new(read, device)?, plan })
    }

    /// The embedding of every distance in a pack, in a model of disentangled attention.
    fn embeddings(&self, pack: &Pack) -> Option<Vec<u16>> {
        self.architecture.disentangled.as_ref().map(|disentangled| distances::embeddings(disentangled, pack.longest()))
    }

    /// The hidden states of the given rows of the pack, after the last norm: `[rows.len(), width]` on the host, in float32.
    /// `memory` has what the pack lacks of its samples, `ready` what was prepared for the same pack and rows.
    pub fn hidden(&self, pack: &Pack, rows: &[u32], memory: Option<&Memory>, ready: Option<Arc<Ready>>) -> Result<Vec<Vec<f32>>> {
        let architecture = &self.architecture;
        let rotations: Vec<Rotation> = self.ropes.iter().map(|tables| tables.rotation(pack)).collect();
        let embeddings = self.embeddings(pack);
        let ready = match ready {
            Some(ready) => ready,
            None => Arc::new(self.ready(pack, rows, &rotations, embeddings.as_deref())?),
        };
        let Ready { embedded, windows, read, plan } = &*ready;
        let mut x = self.embedding.embed(architecture, embedded)?;
        let mut convolved = match (&self.convolution, windows) {
            (Some(convolution), Some(windows)) => Some(convolution.of(&x, windows)?),
            _ => None,
        };
        for (layer, block) in self.blocks.iter().enumerate() {
            let kind = &architecture.layers[layer];
            let distances = match (&block.distances, embeddings.as_deref()) {
                (Some(LayerDistances::Kernels(projected)), Some(embeddings)) => {
                    Some(Distances { projected, embeddings, longest: pack.longest() })
                }
                _ => None,
            };
            let rotation = kind.rope.map(|rope| (rope, &rotations[rope]));
            let memory = memory.map(|memory| (memory, layer));
            let context = Context { architecture, pack, window: kind.window, rotation, distances, memory, plan: plan.as_ref() };
            let mut attended = block.attend(&x, &context)?;
            if layer + 1 == self.blocks.len() {
                attended = attended.index_select(read, 0)?;
                x = x.index_select(read, 0)?;
                convolved = convolved.map(|convolved| convolved.index_select(read, 0)).transpose()?;
            }
            let convolved = convolved.take();
            x = match self.row_blocks(block, x.dim(0)?) {
                1 => self.behind_attention(block, x, &attended, convolved.as_ref())?,
                blocks => self.in_row_blocks(blocks, block, x, &attended, convolved.as_ref())?,
            };
        }
        if let Some(norm) = &self.final_norm {
            x = norm.apply(architecture.norm, &x)?;
        }
        if let Some(projection) = &self.output_projection {
            x = projection.forward_narrow(&x)?;
        }
        let hidden = x.narrow(0, 0, rows.len())?.to_dtype(DType::F32)?;
        hidden.to_vec2()
    }

    /// What stands behind a layer's attention goes row by row: the output layer, the MLP, the norms around them, and what joins
    /// the stream there. `attended` and `convolved` have the rows of `x`.
    fn behind_attention(&self, block: &Block, x: Tensor, attended: &Tensor, convolved: Option<&Tensor>) -> Result<Tensor> {
        let architecture = &self.architecture;
        // Beside each other both parts read the stream as it was before either was added.
        let beside = if architecture.residual == Residual::Parallel { Some(block.mlp(architecture, &x)?) } else { None };
        let x = block.attention_norms.add(architecture, x, block.output.forward_biased(attended)?)?;
        let inner = match beside {
            Some(inner) => inner,
            None => block.mlp(architecture, &x)?,
        };
        let x = block.mlp_norms.add(architecture, x, inner)?;
        match (&self.convolution, convolved) {
            (Some(convolution), Some(convolved)) => convolution.join(architecture, x, convolved),
            _ => Ok(x),
        }
    }

    /// The same for so many runs of rows, one after another: what they need in between stays in the processor's caches, and is
    /// not asked of the system and cleared for every layer anew. Every row is what it is in the whole.
    fn in_row_blocks(&self, blocks: usize, block: &Block, mut x: Tensor, attended: &Tensor, convolved: Option<&Tensor>) -> Result<Tensor> {
        let rows = x.dim(0)?;
        for index in 0..blocks {
            let (first, end) = (index * rows / blocks, (index + 1) * rows / blocks);
            let of = |tensor: &Tensor| tensor.narrow(0, first, end - first);
            let convolved = convolved.map(of).transpose()?;
            let part = self.behind_attention(block, of(&x)?.force_contiguous()?, &of(attended)?, convolved.as_ref())?;
            x = self.backend.ops.overwrite(x, first, &part)?;
        }
        Ok(x)
    }

    /// Into how many runs of rows a pack is cut behind the attention of a layer: on the CPU, where experts do not choose rows of
    /// their own. A run never has fewer rows than a product needs to be the same in any company.
    fn row_blocks(&self, block: &Block, rows: usize) -> usize {
        if self.backend.ops == Ops::Kernels && !block.chooses_rows() { rows.div_ceil(ROW_BLOCK) } else { 1 }
    }
}
