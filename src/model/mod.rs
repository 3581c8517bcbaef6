//! Tokens to rewards: packing, the forward pass, and the head. The only layer that knows candle.

mod cost;
mod head;
mod kernels;
mod ops;
mod pack;
mod prefix_cache;
mod prefixes;
mod transformer;
mod trie;
mod weights;

use std::sync::Arc;

use candle_core::Device;

use crate::checkpoint::{Architecture, CHUNK_ELEMENTS, Layout, Manifest, Places, Readout, SourceError, TensorInfo, TensorSource};
pub use cost::shared_prefix;
use head::{Head, Verdict};
pub use pack::{MIN_SHARED, Node, Pack, PrefixKey};
use prefixes::{Memory, Prefixes};
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

    /// Bytes of keys and values that may be kept for later packs: those of beginnings of samples. None until this is called,
    /// which also forgets what was kept. Scores stay the same, to the bit.
    fn keep_prefixes(&self, bytes: usize) {
        let _ = bytes;
    }

    /// What computing the tokens at positions `from..to` of a sample takes, in tokens that attend to nothing.
    fn token_cost(&self, from: usize, to: usize) -> usize {
        to - from
    }
}

/// What the head says of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The outputs combined, and the steps reduced, as the read-out says; may be NaN, which the caller must turn into a
    /// failure of this sample.
    pub reward: f32,
    /// One value per output of the head, in float32, raw (no activation); empty where there are steps.
    pub values: Vec<f32>,
    /// One for each step of a process reward model, in order.
    pub steps: Vec<StepOutput>,
    /// Index of the token that was read, within the sample: the last one of several, 0 where the mean of all is.
    pub pooled_position: usize,
    /// Tokens of this sample that were there already: computed for it and another sample at once, or with an earlier pack.
    pub shared_tokens: usize,
    /// The first so many tokens of this sample were computed with an earlier pack.
    pub cached_tokens: usize,
}

/// What the head says at one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    /// Index of the step's token, within the sample.
    pub position: usize,
    /// The outputs combined.
    pub reward: f32,
    /// As [`Output::values`].
    pub outputs: Vec<f32>,
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
/// bytes done and bytes in all. `max_tokens` is the longest sample, at most [`Architecture::longest`].
pub fn load(
    source: &dyn TensorSource,
    architecture: &Architecture,
    layout: &Layout,
    readout: &Readout,
    max_tokens: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arc<dyn RewardModel>, LoadError> {
    let device = Device::Cpu;
    let mut loader = Loader::new(source, layout.used(), &device, progress);
    let transformer = Transformer::load(architecture, layout, &mut loader, &device)?;
    let head = Head::load(layout, readout, &mut loader)?;
    let limits = Limits {
        max_tokens: max_tokens.min(architecture.longest().unwrap_or(max_tokens)),
        outputs: layout.outputs(),
        parameters: loader.parameters,
        device_bytes: loader.device_bytes,
    };
    let prefixes = Prefixes::new(architecture);
    Ok(Arc::new(Model { transformer, head, limits, prefixes, architecture: architecture.clone() }))
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
    /// Absent for a model whose tokens depend on what comes after them.
    prefixes: Option<Prefixes>,
    architecture: Architecture,
}

impl RewardModel for Model {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let places: Vec<Option<Places>> =
            (0..pack.len()).map(|sample| self.head.readout().places(pack.encoding(sample).ids()).ok()).collect();
        let read = |sample: usize| places[sample].iter().flat_map(|places| places.read.iter().chain(&places.gate)).copied();
        let mut cache = self.prefixes.as_ref().and_then(Prefixes::open);
        let plan = cache.as_mut().map(|cache| {
            let first_read = |sample: usize| read(sample).min().unwrap_or(pack.encoding(sample).tokens() - 1);
            Memory::plan(cache, pack, |tokens| self.prefix_key(tokens), first_read)
        });
        let (memory, rest) = plan.unzip();
        let pack = rest.as_ref().unwrap_or(pack);
        let rows: Vec<u32> =
            (0..pack.len()).flat_map(|sample| read(sample).map(move |position| pack.row(sample, position) as u32)).collect();
        let hidden = self.transformer.hidden(pack, &rows, memory.as_ref());
        if let (Some(mut cache), Some(memory)) = (cache, memory) {
            memory.leave(&mut cache, hidden.is_ok());
        }
        let hidden = hidden.map_err(|error| ModelError(error.to_string()))?;
        let mut rest = hidden.as_slice();
        let outputs = places.iter().enumerate().map(|(sample, places)| {
            let cached_tokens = pack.absent_tokens(sample);
            let shared_tokens = pack.shared_tokens(sample).max(cached_tokens);
            // The text layer refuses a sample that lacks what is read; one that comes here all the same has no score.
            let Some(places) = places else {
                let (values, steps) = (Vec::new(), Vec::new());
                return Output { reward: f32::NAN, values, steps, pooled_position: 0, shared_tokens, cached_tokens };
            };
            let (own, others) = rest.split_at(places.read.len() + usize::from(places.gate.is_some()));
            rest = others;
            let Verdict { reward, outputs, steps } = self.head.forward(places, own);
            let pooled_position = if self.head.reads_the_mean() { 0 } else { places.read.last().copied().unwrap_or(0) };
            Output { reward, values: outputs, steps, pooled_position, shared_tokens, cached_tokens }
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

    fn keep_prefixes(&self, bytes: usize) {
        if let Some(prefixes) = &self.prefixes {
            prefixes.resize(bytes);
        }
    }

    fn token_cost(&self, from: usize, to: usize) -> usize {
        cost::token_cost(&self.architecture, from, to)
    }
}

#[cfg(test)]
mod invariance_tests;
#[cfg(test)]
mod parity_tests;
#[cfg(test)]
mod sharing_tests;
