//! Tokens to rewards: packing, the forward pass, and the head. The only layer that knows candle.

mod head;
mod kernels;
mod ops;
mod pack;
mod transformer;
mod trie;
mod weights;

use std::sync::Arc;

use candle_core::Device;

use crate::checkpoint::{Architecture, CHUNK_ELEMENTS, Layout, Manifest, SourceError, TensorInfo, TensorSource};
use head::Head;
pub use pack::{MIN_SHARED, Node, Pack, PrefixKey};
use transformer::Transformer;
use weights::Loader;

/// A loaded reward model on one device. Immutable, so it may be shared by any number of jobs; `forward` is called by the
/// device worker alone, inside the worker's own rayon pool.
pub trait RewardModel: Send + Sync {
    /// Scores every sample of a pack, in order.
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError>;

    /// What the queue may put into one pack.
    fn limits(&self) -> Limits;

    /// What decides, beside the tokens before it, how a token of a sample of so many tokens is computed. Samples of the
    /// same key may be packed so that a common beginning is computed once; `None`: this sample shares nothing.
    fn prefix_key(&self, tokens: usize) -> Option<PrefixKey> {
        let _ = tokens;
        None
    }
}

/// What the head says of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// One value per output of the head, in float32, raw (no activation); may be NaN, which the caller must turn into a
    /// failure of this sample.
    pub values: Vec<f32>,
    /// Index of the token that was pooled, within the sample.
    pub pooled_position: usize,
    /// Tokens of this sample that were computed for it and another sample at once.
    pub shared_tokens: usize,
}

/// Bounds of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest sample, in tokens.
    pub max_tokens: usize,
    /// Outputs of the head.
    pub outputs: usize,
    /// Parameters of the loaded model.
    pub parameters: u64,
    /// Bytes the weights take on the device.
    pub device_bytes: u64,
}

/// A forward pass that failed as a whole.
#[derive(Clone, Debug, thiserror::Error)]
#[error("forward failed: {0}")]
pub struct ModelError(pub String);

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("tensor {tensor:?}: {problem}")]
    Tensor { tensor: String, problem: String },
    #[error("device: {0}")]
    Device(#[from] candle_core::Error),
}

/// Loads a reward model onto the CPU, where it computes in float32 whatever its weights are stored in. `progress` gets
/// bytes done and bytes in all. `max_tokens` is the longest sample, at most [`Architecture::max_positions`].
pub fn load(
    source: &dyn TensorSource,
    architecture: &Architecture,
    layout: &Layout,
    max_tokens: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arc<dyn RewardModel>, LoadError> {
    let device = Device::Cpu;
    let mut loader = Loader::new(source, layout.used(), &device, progress);
    let transformer = Transformer::load(architecture, layout, &mut loader, &device)?;
    let head = Head::load(layout, &mut loader)?;
    let limits = Limits {
        max_tokens: max_tokens.min(architecture.max_positions),
        outputs: layout.outputs(),
        parameters: loader.parameters,
        device_bytes: loader.device_bytes,
    };
    Ok(Arc::new(Model { transformer, head, limits, architecture: architecture.clone() }))
}

/// Bytes of a model of these tensors on the CPU, but for the few rows that narrow matrices are padded with.
pub fn device_bytes(manifest: &Manifest) -> u64 {
    manifest.iter().map(|(_, info)| (info.elements() * size_of::<f32>()) as u64).sum()
}

/// Bytes that [`load`] needs beside the model, at most: a chunk of one tensor. The model's own memory is filled in place.
pub fn load_buffer_bytes(manifest: &Manifest) -> u64 {
    let chunk = |info: &TensorInfo| (info.elements().min(CHUNK_ELEMENTS) * info.dtype.size()) as u64;
    manifest.iter().map(|(_, info)| chunk(info)).max().unwrap_or_default()
}

struct Model {
    transformer: Transformer,
    head: Head,
    limits: Limits,
    architecture: Architecture,
}

impl RewardModel for Model {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let pooled: Vec<usize> = (0..pack.len())
            .map(|sample| self.architecture.pooling.position(pack.encoding(sample).ids(), self.architecture.pad_token_id))
            .collect();
        let rows: Vec<u32> = pooled.iter().enumerate().map(|(sample, position)| pack.row(sample, *position) as u32).collect();
        let hidden = self.transformer.hidden(pack, &rows).map_err(|error| ModelError(error.to_string()))?;
        let outputs = hidden.iter().zip(pooled).enumerate().map(|(sample, (hidden, pooled_position))| Output {
            values: self.head.forward(hidden),
            pooled_position,
            shared_tokens: pack.shared_tokens(sample),
        });
        Ok(outputs.collect())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn prefix_key(&self, tokens: usize) -> Option<PrefixKey> {
        // The tokens of an encoder see what comes after them.
        self.architecture.causal.then(|| self.architecture.ropes.iter().map(|rope| rope.variant(tokens)).collect())
    }
}

#[cfg(test)]
mod parity_tests;
#[cfg(test)]
mod sharing_tests;
