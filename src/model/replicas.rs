//! One model on several devices: each holds the whole of it, and has a worker that scores there.

use std::panic::resume_unwind;

use super::device::Backend;
use super::{Limits, LoadError, Model, ModelError, Output, Pack, PrefixBytes, PrefixKey, RewardModel, SharedBase};

/// At least one model, all the same but for where they are.
pub struct Replicas {
    first: Model,
    others: Vec<Model>,
}

/// The same model on every one of these, copied by a thread each.
pub fn copies(model: &Model, backends: &[Backend], base: Option<&SharedBase>) -> Result<Vec<Model>, LoadError> {
    std::thread::scope(|scope| {
        let copying: Vec<_> = backends.iter().map(|backend| scope.spawn(move || model.on(backend, base))).collect();
        copying.into_iter().map(|copy| copy.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

impl Replicas {
    pub fn new(first: Model, others: Vec<Model>) -> Self {
        Self { first, others }
    }

    fn on(&self, device: usize) -> Option<&Model> {
        device.checked_sub(1).map_or(Some(&self.first), |other| self.others.get(other))
    }

    fn each(&self) -> impl Iterator<Item = &Model> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

impl RewardModel for Replicas {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.first.forward(pack)
    }

    fn forward_on(&self, device: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let none = || ModelError::Failed(format!("there is no device number {device}"));
        self.on(device).ok_or_else(none)?.forward(pack)
    }

    fn prepare(&self, device: usize, pack: &Pack) {
        if let Some(model) = self.on(device) {
            model.prepare(device, pack);
        }
    }

    fn runs_on(&self) -> Vec<String> {
        self.each().flat_map(RewardModel::runs_on).collect()
    }

    fn limits(&self) -> Limits {
        // What is said of bytes is said of one device: each must have room for all of them.
        self.first.limits()
    }

    fn prefix_key(&self, tokens: usize) -> Option<PrefixKey> {
        self.first.prefix_key(tokens)
    }

    fn keep_prefixes(&self, bytes: usize) {
        // Each keeps what its own packs leave.
        let each = bytes / (1 + self.others.len());
        self.each().for_each(|model| model.keep_prefixes(each));
    }

    fn prefix_bytes(&self) -> PrefixBytes {
        self.each().map(RewardModel::prefix_bytes).sum()
    }

    fn token_cost(&self, from: usize, to: usize) -> usize {
        self.first.token_cost(from, to)
    }

    fn activation_bytes(&self, tokens: usize) -> Option<u64> {
        self.first.activation_bytes(tokens)
    }
}
