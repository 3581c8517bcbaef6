//! Tokens to rewards: packing, the forward pass, and the head. The only layer that knows candle.

mod apart;
mod cost;
mod device;
mod head;
mod kernels;
mod memory;
mod ops;
mod pack;
mod placing;
mod plain;
mod prefix_cache;
mod prefixes;
mod reading;
mod ready;
mod replicas;
mod stands_for;
mod transformer;
mod trie;
mod weights;

use std::sync::Arc;

use crate::checkpoint::{Architecture, CHUNK_ELEMENTS, Dtype, Layout, Manifest, Places, Readout, SourceError, TensorInfo, TensorSource};
pub use apart::{Apart, ApartBytes, Origins, SharedBase, apart_bytes};
pub use cost::token_cost;
pub use device::{
    Arithmetic, Card, DeviceChoice, DeviceError, Devices, FlashCheck, Inventory, Place, Support, card, flash_checks, has_room, inventory,
    run_when_idle, settle,
};
use device::{Backend, Fault};
use head::{Head, Verdict, positions, rows};
pub use memory::{Load, Way, activation_bytes, fitting_pack, least_activation_bytes};
use ops::Ops;
pub use pack::{MIN_SHARED, Node, Pack, PrefixKey};
pub use prefixes::PrefixBytes;
use prefixes::{Memory, Prefixes};
use ready::Kind;
pub use replicas::{load_on, load_on_one, most_on_one};
pub use stands_for::StandsFor;
use transformer::Transformer;
pub use trie::common_prefix;
use weights::Loader;

/// A loaded reward model on one device. Immutable, so it may be shared by any number of jobs; `forward` is called by the
/// device worker inside the worker's own rayon pool, and before there are jobs by whoever loads the model, in the pool for that.
pub trait RewardModel: Send + Sync {
    /// Scores every sample of a pack, in order.
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError>;

    /// The same on one of the devices that hold the model, counted from 0: each device's worker has a number of its own.
    fn forward_on(&self, device: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let _ = device;
        self.forward(pack)
    }

    /// Makes ready on one of the devices what a forward over this pack needs there beside the weights, and leaves it with the
    /// pack. Called while the device computes, by another thread; no score depends on it.
    fn prepare(&self, device: usize, pack: &Pack) {
        let _ = (device, pack);
    }

    /// Where it runs, for people: one name a device.
    fn runs_on(&self) -> Vec<String> {
        vec![Place::Cpu.to_string()]
    }

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

    /// What is kept of them now, and may be by the last [`RewardModel::keep_prefixes`].
    fn prefix_bytes(&self) -> PrefixBytes {
        PrefixBytes::default()
    }

    /// What computing the tokens at positions `from..to` of a sample takes, in tokens that attend to nothing.
    fn token_cost(&self, from: usize, to: usize) -> usize {
        to - from
    }

    /// Bytes that a forward over so many tokens takes of a device at once beside the weights, at most, by plan; `None` where
    /// nobody has one.
    fn activation_bytes(&self, tokens: usize) -> Option<u64> {
        let _ = tokens;
        None
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
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error("forward failed: {0}")]
    Failed(String),
    /// A smaller pack may fit.
    #[error("the device is out of memory: {0}")]
    OutOfMemory(String),
    /// Nothing will run on this device until the process starts anew.
    #[error("the device is lost: {0}")]
    DeviceLost(String),
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        let words = error.to_string();
        match Fault::of(&words) {
            Fault::OutOfMemory => Self::OutOfMemory(words),
            Fault::Lost => Self::DeviceLost(words),
            Fault::Other => Self::Failed(words),
        }
    }
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("tensor {tensor:?}: {problem}")]
    Tensor { tensor: String, problem: String },
    #[error("device: {0}")]
    Device(#[from] candle_core::Error),
    #[error(transparent)]
    Place(#[from] DeviceError),
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
    let what = What { source, apart: None, architecture, layout, readout, max_tokens };
    load_on(&Devices::open(&[Place::Cpu])?, Dtype::F32, &what, progress)
}

/// What is to be loaded, and how much of a sample it may be given.
#[derive(Clone, Copy)]
pub struct What<'a> {
    pub source: &'a dyn TensorSource,
    /// Where it is one of several models on one base.
    pub apart: Option<Apart<'a>>,
    pub architecture: &'a Architecture,
    pub layout: &'a Layout,
    pub readout: &'a Readout,
    /// The longest sample, at most [`Architecture::longest`].
    pub max_tokens: usize,
}

fn load_with(backend: &Backend, what: &What<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Model, LoadError> {
    let &What { source, apart, architecture, layout, readout, max_tokens } = what;
    let mut loader = Loader::new(source, apart, layout.used(), backend, progress);
    let transformer = Transformer::load(architecture, layout, &mut loader)?;
    let head = Head::load(layout, readout, &mut loader)?;
    loader.settle()?;
    let limits = Limits {
        max_tokens: max_tokens.min(architecture.longest().unwrap_or(max_tokens)),
        outputs: layout.outputs(),
        parameters: loader.parameters,
        device_bytes: loader.device_bytes,
    };
    let (head, prefixes) = (Arc::new(head), Prefixes::of(backend, architecture));
    // Each thread has a stream of its own on a card: what this one has placed is there for others only once it has settled.
    backend.driver.settle(backend.place)?;
    Ok(Model { transformer, head, limits, prefixes, architecture: architecture.clone(), kind: Kind::of(backend, architecture, readout) })
}

/// Bytes of a model of these tensors on the CPU, but for the few rows that narrow matrices are padded with.
pub fn device_bytes(manifest: &Manifest) -> u64 {
    manifest.iter().map(|(_, info)| (info.elements() * size_of::<f32>()) as u64).sum()
}

/// The same of [`load_on`], on each device. Workers on one CPU share their weights.
pub fn device_bytes_on(places: &[Place], weights: Dtype, manifest: &Manifest) -> u64 {
    if places.contains(&Place::Cpu) {
        return device_bytes(manifest);
    }
    // Matrices are stored in what they are multiplied in, and little else has many elements.
    let size = |info: &TensorInfo| if info.shape.len() > 1 { weights.size() } else { size_of::<f32>() };
    manifest.iter().map(|(_, info)| (info.elements() * size(info)) as u64).sum()
}

/// What a load needs on a card beside the model for a moment: a block of a tensor, or the whole of one that is turned round.
pub fn placing_bytes(places: &[Place], weights: Dtype, layout: &Layout) -> u64 {
    if places.contains(&Place::Cpu) {
        return 0;
    }
    let parts = apart::products(layout).into_iter().flat_map(|parts| weights::joined(&parts));
    let turned = parts.filter(|part| part.transposed.is_some());
    let block = turned.map(|part| part.outputs * part.inputs).max().unwrap_or(0).max(CHUNK_ELEMENTS);
    (block * weights.size()) as u64
}

/// Whether a model of this architecture keeps beginnings of samples on these devices, if it is given bytes for them.
pub fn keeps_prefixes(places: &[Place], architecture: &Architecture) -> bool {
    places.contains(&Place::Cpu) && Prefixes::new(architecture).is_some()
}

/// Bytes that [`load`] needs beside the model, at most: a chunk of one tensor. The model's own memory is filled in place.
pub fn load_buffer_bytes(manifest: &Manifest) -> u64 {
    let chunk = |info: &TensorInfo| (info.elements().min(CHUNK_ELEMENTS) * info.dtype.size()) as u64;
    manifest.iter().map(|(_, info)| chunk(info)).max().unwrap_or_default()
}

struct Model {
    transformer: Transformer,
    /// On the host, wherever the rest is.
    head: Arc<Head>,
    limits: Limits,
    /// Absent where our kernels do not compute, and for a model whose tokens depend on what comes after them.
    prefixes: Option<Prefixes>,
    architecture: Architecture,
    kind: Kind,
}

impl Model {
    /// The same on another device.
    fn on(&self, backend: &Backend, base: Option<&SharedBase>) -> Result<Self, LoadError> {
        let (transformer, head) = (self.transformer.on(backend, base)?, Arc::clone(&self.head));
        let (architecture, prefixes) = (self.architecture.clone(), Prefixes::of(backend, &self.architecture));
        backend.driver.settle(backend.place)?;
        let kind = Kind::of(backend, &architecture, head.readout());
        Ok(Self { transformer, head, limits: self.limits, prefixes, architecture, kind })
    }
}

impl Model {
    /// A forward that failed for no known reason may have failed because nothing runs there any more.
    fn told(&self, error: ModelError) -> ModelError {
        let backend = self.transformer.backend();
        match error {
            ModelError::Failed(words) if !backend.driver.answers(&backend.device) => ModelError::DeviceLost(words),
            error => error,
        }
    }

    /// What the head reads of every sample; nothing of one that lacks it.
    fn places(&self, pack: &Pack) -> Vec<Option<Places>> {
        (0..pack.len()).map(|sample| self.head.readout().places(pack.encoding(sample).ids()).ok()).collect()
    }

    fn scored(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let ready = pack.ready().get(self.kind);
        let places = self.places(pack);
        let read = |sample: usize| positions(&places, sample);
        let mut cache = self.prefixes.as_ref().and_then(Prefixes::open);
        let plan = cache.as_mut().map(|cache| {
            let first_read = |sample: usize| read(sample).min().unwrap_or(pack.encoding(sample).tokens() - 1);
            Memory::plan(cache, pack, |tokens| self.prefix_key(tokens), first_read)
        });
        let (memory, rest) = plan.unzip();
        let pack = rest.as_ref().unwrap_or(pack);
        let rows = rows(pack, &places);
        let hidden = self.transformer.hidden(pack, &rows, memory.as_ref(), ready);
        if let (Some(mut cache), Some(memory), Some(prefixes)) = (cache, memory, &self.prefixes) {
            memory.leave(&mut cache, hidden.is_ok());
            prefixes.count(&cache);
        }
        let hidden = hidden?;
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
}

impl RewardModel for Model {
    fn prepare(&self, _: usize, pack: &Pack) {
        // The host's memory is the device's where our kernels compute, and which tokens are there is known only when their turn
        // comes.
        if self.transformer.backend().ops == Ops::Kernels || pack.ready().has(self.kind) {
            return;
        }
        match self.transformer.prepare(pack, &rows(pack, &self.places(pack))) {
            Ok(ready) => pack.ready().put(self.kind, ready),
            // The forward tries it once more, and tells.
            Err(problem) => tracing::debug!(%problem, "a pack was not made ready"),
        }
    }

    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        // What the pack has ready is freed elsewhere, in an order of its own: nothing may still read it, however this ends.
        let _done = self.transformer.backend().at_the_end();
        self.scored(pack).map_err(|error| {
            if matches!(error, ModelError::OutOfMemory(_)) {
                // Parts of the pack get what they need anew.
                pack.ready().forget(self.kind);
            }
            self.told(error)
        })
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn runs_on(&self) -> Vec<String> {
        vec![self.transformer.backend().describe()]
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

    fn prefix_bytes(&self) -> PrefixBytes {
        self.prefixes.as_ref().map(Prefixes::bytes).unwrap_or_default()
    }

    fn token_cost(&self, from: usize, to: usize) -> usize {
        cost::token_cost(&self.architecture, from, to)
    }

    fn activation_bytes(&self, tokens: usize) -> Option<u64> {
        let (backend, load) = (self.transformer.backend(), Load::of(tokens, self.limits.max_tokens));
        let (way, arithmetic) = (backend.way(), backend.arithmetic());
        Some(activation_bytes(&self.architecture, way, arithmetic.dtype, arithmetic.batch_invariant, load))
    }
}

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod invariance_tests;
#[cfg(test)]
mod parity_tests;
#[cfg(test)]
mod sharing_tests;
