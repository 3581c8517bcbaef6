//! The one body of all families, decoders and encoders alike: told apart by the architecture's data and by which places
//! of the layout are taken.

mod block;
mod convolution;
mod embedding;
mod experts;

use candle_core::{DType, Device, Result, Tensor};

use super::LoadError;
use super::kernels::distances::{self, Distances};
use super::kernels::rope::{Rotation, Tables};
use super::pack::{MIN_ROWS, Pack};
use super::prefixes::Memory;
use super::weights::{Linear, Loader, NormWeights};
use crate::checkpoint::{Architecture, Layout, Residual};
use block::{Block, Context};
use convolution::Convolution;
use embedding::Embedding;

/// Embedding, blocks and last norm: tokens to hidden states.
#[derive(Debug)]
pub struct Transformer {
    architecture: Architecture,
    device: Device,
    embedding: Embedding,
    convolution: Option<Convolution>,
    blocks: Vec<Block>,
    final_norm: Option<NormWeights>,
    output_projection: Option<Linear>,
    ropes: Vec<Tables>,
}

impl Transformer {
    pub fn load(
        architecture: &Architecture,
        layout: &Layout,
        loader: &mut Loader,
        device: &Device,
    ) -> std::result::Result<Self, LoadError> {
        let embedding = Embedding::load(architecture, layout, loader)?;
        let relative = embedding::relative(architecture, layout, loader)?;
        let mut blocks = Vec::with_capacity(layout.blocks.len());
        for keys in &layout.blocks {
            blocks.push(Block::load(architecture, keys, relative.as_ref(), loader)?);
        }
        Ok(Self {
            embedding,
            convolution: Convolution::load(architecture, layout, loader)?,
            blocks,
            final_norm: loader.optional_norm(layout.final_norm.as_ref())?,
            output_projection: layout.output_projection.as_ref().map(|keys| loader.fused(&[keys])).transpose()?,
            ropes: architecture.ropes.iter().map(Tables::new).collect(),
            architecture: architecture.clone(),
            device: device.clone(),
        })
    }

    /// The hidden states of the given rows of the pack, after the last norm: `[rows.len(), width]` on the host, in float32.
    /// `memory` has what the pack lacks of its samples.
    pub fn hidden(&self, pack: &Pack, rows: &[u32], memory: Option<&Memory>) -> Result<Vec<Vec<f32>>> {
        let architecture = &self.architecture;
        let mut x = self.embedding.embed(architecture, pack, &self.device)?;
        // Behind the last attention only the rows that are read are worth computing; at least so many that a product
        // of them takes its usual path.
        let mut read = rows.to_vec();
        read.resize(rows.len().max(MIN_ROWS), 0);
        let read = Tensor::new(read, &self.device)?;
        let rotations: Vec<Rotation> = self.ropes.iter().map(|tables| tables.rotation(pack)).collect();
        let mut convolved = self.convolution.as_ref().map(|convolution| convolution.of(&x, pack)).transpose()?;
        let embeddings = architecture.disentangled.as_ref().map(|disentangled| distances::embeddings(disentangled, pack.longest()));
        for (layer, block) in self.blocks.iter().enumerate() {
            let kind = &architecture.layers[layer];
            let projected = block.projected.as_ref().zip(embeddings.as_deref());
            let distances = projected.map(|(projected, embeddings)| Distances { projected, embeddings, longest: pack.longest() });
            let rotation = kind.rope.map(|rope| &rotations[rope]);
            let memory = memory.map(|memory| (memory, layer));
            let context = Context { architecture, pack, window: kind.window, rotation, distances, memory };
            let mut attended = block.attend(&x, &context)?;
            if layer + 1 == self.blocks.len() {
                attended = attended.index_select(&read, 0)?;
                x = x.index_select(&read, 0)?;
                convolved = convolved.map(|convolved| convolved.index_select(&read, 0)).transpose()?;
            }
            // Beside each other both parts read the stream as it was before either was added.
            let beside = if architecture.residual == Residual::Parallel { Some(block.mlp(architecture, &x)?) } else { None };
            x = block.attention_norms.add(architecture, x, block.output.forward_biased(&attended)?)?;
            let inner = match beside {
                Some(inner) => inner,
                None => block.mlp(architecture, &x)?,
            };
            x = block.mlp_norms.add(architecture, x, inner)?;
            if let Some((convolution, convolved)) = self.convolution.as_ref().zip(convolved.take()) {
                x = convolution.join(architecture, x, convolved)?;
            }
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
}
