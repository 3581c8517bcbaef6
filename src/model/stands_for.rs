//! A model behind another: what is not said anew is what that one says.

use super::{Limits, ModelError, Output, Pack, PrefixBytes, PrefixKey, RewardModel};

/// A model that stands for another, and differs from it in what is said here.
pub trait StandsFor: Send + Sync {
    fn model(&self) -> &dyn RewardModel;

    /// What [`RewardModel::forward_on`] gives.
    fn forwarded(&self, device: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.model().forward_on(device, pack)
    }

    /// What [`RewardModel::prepare`] does.
    fn prepared(&self, device: usize, pack: &Pack) {
        self.model().prepare(device, pack);
    }

    /// What [`RewardModel::limits`] says.
    fn limited(&self) -> Limits {
        self.model().limits()
    }
}

impl<M: StandsFor> RewardModel for M {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.forwarded(0, pack)
    }

    fn forward_on(&self, device: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.forwarded(device, pack)
    }

    fn prepare(&self, device: usize, pack: &Pack) {
        self.prepared(device, pack);
    }

    fn runs_on(&self) -> Vec<String> {
        self.model().runs_on()
    }

    fn limits(&self) -> Limits {
        self.limited()
    }

    fn prefix_key(&self, tokens: usize) -> Option<PrefixKey> {
        self.model().prefix_key(tokens)
    }

    fn keep_prefixes(&self, bytes: usize) {
        self.model().keep_prefixes(bytes);
    }

    fn prefix_bytes(&self) -> PrefixBytes {
        self.model().prefix_bytes()
    }

    fn token_cost(&self, from: usize, to: usize) -> usize {
        self.model().token_cost(from, to)
    }

    fn activation_bytes(&self, tokens: usize) -> Option<u64> {
        self.model().activation_bytes(tokens)
    }
}
