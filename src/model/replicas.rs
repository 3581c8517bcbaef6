//! One model on several devices: each holds the whole of it, and has a worker that scores there.

use super::{Limits, Model, ModelError, Output, Pack, PrefixBytes, PrefixKey, RewardModel};

/// At least one model, all the same but for where they are.
pub struct Replicas {
    first: Model,
    others: Vec<Model>,
}

impl Replicas {
    pub fn new(first: Model, others: Vec<Model>) -> Self {
        Self { first, others }
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
        let model = device.checked_sub(1).map_or(Some(&self.first), |other| self.others.get(other));
        let none = || ModelError::Failed(format!("there is no device number {device}"));
        model.ok_or_else(none)?.forward(pack)
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
