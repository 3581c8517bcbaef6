//! What a sample costs a pack, and what of that other samples of the pack have paid for already. Pure.
//!
//! Only the trie of a pack knows what is shared; this is what the queue takes it for. Hashes of a sample's beginnings stand
//! for its tokens. Wherever a pack has the same hash, at least so much is shared as is taken for shared here, so a pack never
//! costs more than it was taken for, unless two hashes of 64 bits are equal by chance: their key is another in every process.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::Arc;

use crate::model::{MIN_SHARED, PrefixKey, RewardModel, common_prefix};
use crate::text::Encoding;

/// Tokens between two marks.
const BLOCK: usize = MIN_SHARED;

/// A place up to which a sample may be there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Of the lane, of all tokens before this place, and of what else decides how they are computed.
    pub hash: u64,
    /// Tokens of the sample that are computed already where another sample of the pack has this mark, at least.
    pub tokens: usize,
    /// What they cost, in tokens.
    pub cost: usize,
}

/// What one sample asks of the queue and of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    pub tokens: usize,
    /// What it costs a pack, in tokens, if nothing of it is shared.
    pub cost: usize,
    /// In order; whoever has one of them has all before it as well. None in a sample that shares nothing.
    pub marks: Arc<[Mark]>,
}

/// What is left of a sample to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rest {
    pub tokens: usize,
    pub cost: usize,
    /// It has more in common with the pack than apart.
    pub akin: bool,
}

impl Load {
    /// A sample that shares nothing and costs its tokens.
    pub fn plain(tokens: usize) -> Self {
        Self { tokens, cost: tokens, marks: Arc::default() }
    }

    /// What it adds to a pack whose samples have these marks.
    pub(super) fn rest(&self, there: &HashSet<u64>) -> Rest {
        let shared = self.marks.partition_point(|mark| there.contains(&mark.hash));
        let (tokens, cost) = shared.checked_sub(1).map_or((0, 0), |last| (self.marks[last].tokens, self.marks[last].cost));
        Rest { tokens: self.tokens - tokens, cost: self.cost.saturating_sub(cost), akin: 2 * cost >= self.cost && cost > 0 }
    }

    /// The first mark that it has in common with all that it is akin to.
    pub(super) fn kin(&self) -> Option<u64> {
        self.marks.iter().find(|mark| 2 * mark.cost >= self.cost && mark.cost > 0).map(|mark| mark.hash)
    }
}

/// The loads of samples in a lane whose first model is this one.
pub(super) fn loads(model: &dyn RewardModel, lane: u64, samples: &[Arc<Encoding>], hashes: &RandomState) -> Vec<Load> {
    let longest = samples.iter().map(|sample| sample.tokens()).max().unwrap_or(0);
    // Sharing may end a little early: a cut must leave enough to pay for it.
    let there: Vec<usize> = (1..=longest / BLOCK).map(|blocks| blocks * BLOCK - (MIN_SHARED - 1)).collect();
    let costs: Vec<usize> = there.iter().map(|tokens| model.token_cost(0, *tokens)).collect();
    let mut loads: Vec<Load> = Vec::with_capacity(samples.len());
    let mut before: Option<(PrefixKey, &Encoding)> = None;
    for sample in samples {
        let (tokens, cost) = (sample.tokens(), model.token_cost(0, sample.tokens()));
        // The tokens of encoders see what comes after them.
        let Some(key) = model.prefix_key(tokens).filter(|_| sample.type_ids().is_none()) else {
            before = None;
            loads.push(Load { tokens, cost, marks: Arc::default() });
            continue;
        };
        // A group's prompt is hashed once.
        let known = before.filter(|(other, _)| *other == key).map_or(0, |(_, other)| common_prefix(other.ids(), sample.ids()) / BLOCK);
        let mut marks = Vec::with_capacity(tokens / BLOCK + 1);
        marks.extend(loads.last().into_iter().flat_map(|load| &load.marks[..known]));
        let mut hash = marks.last().map_or_else(|| hashes.hash_one((lane, &key)), |mark: &Mark| mark.hash);
        let blocks = sample.ids().chunks_exact(BLOCK);
        let rest = blocks.remainder();
        for (block, (&tokens, &cost)) in blocks.zip(there.iter().zip(&costs)).skip(known) {
            hash = follow(hashes, hash, block, false);
            marks.push(Mark { hash, tokens, cost });
        }
        // The same sample again costs nothing.
        marks.push(Mark { hash: follow(hashes, hash, rest, true), tokens, cost });
        loads.push(Load { tokens, cost, marks: marks.into() });
        before = Some((key, sample));
    }
    loads
}

fn follow(hashes: &RandomState, hash: u64, ids: &[u32], last: bool) -> u64 {
    let mut hasher = hashes.build_hasher();
    hasher.write_u64(hash);
    u32::hash_slice(ids, &mut hasher);
    hasher.write_u8(u8::from(last));
    hasher.finish()
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
