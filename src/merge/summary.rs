//! What a plan would do to which tensors, and with how much memory.

use std::collections::BTreeMap;

use serde::Serialize;

use super::MergePlan;
use super::choice::{Treatment, group_of, turns};
use super::content::BLOCK_ELEMENTS;
use super::plan::{Described, Taken};
use super::recipe::{Granularity, Method};
use super::shards;
use super::write::buffer_bytes;

/// Tensors that come about in one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GroupPlan {
    /// `model.layers.3.` for a layer, else the name of the tensor; empty for the whole model.
    pub name: String,
    /// The method with its numbers; the rule; or `equal` for what is taken only where all members agree.
    pub method: String,
    pub tensors: usize,
    pub parameters: u64,
}

impl MergePlan {
    /// All tensors, in the groups that SLERP turns as one (other methods: by layer), those of a rule apart.
    pub fn group_plans(&self) -> Vec<GroupPlan> {
        let granularity = match self.recipe().method() {
            Method::Slerp { granularity, .. } => granularity,
            Method::Linear | Method::Ema { .. } => Granularity::Layer,
        };
        let mut groups: BTreeMap<(&str, Treatment), (usize, u64)> = BTreeMap::new();
        for (name, treatment) in self.treatments() {
            // What is not turned belongs to no whole.
            let granularity = if treatment == Treatment::Method { granularity } else { Granularity::Layer };
            let (tensors, parameters) = groups.entry((group_of(name, granularity), treatment)).or_default();
            *tensors += 1;
            *parameters += self.manifest().get(name).map_or(0, |info| info.elements() as u64);
        }
        let plan = |((name, treatment), (tensors, parameters)): ((&str, Treatment), (usize, u64))| {
            let method = match treatment {
                Treatment::Method => Described(self.recipe()).to_string().trim_end_matches(',').to_owned(),
                Treatment::Equal => "equal".to_owned(),
                Treatment::Rule(index) => match self.recipe().rules().get(index) {
                    Some(rule) => format!("rule {}: {}", rule.pattern, Taken(self.recipe(), rule)),
                    None => "rule".to_owned(),
                },
            };
            GroupPlan { name: name.to_owned(), method, tensors, parameters }
        };
        groups.into_iter().map(plan).collect()
    }

    /// How often weights are read: SLERP reads them for their angles first.
    pub fn passes(&self) -> u64 {
        1 + u64::from(turns(self.recipe()))
    }

    /// Files of weights that a merge to disk makes.
    pub fn files(&self, max_shard_bytes: u64) -> usize {
        shards::split(self.manifest(), max_shard_bytes).len()
    }

    /// Bytes of buffers for reading the merge with so many threads, at most.
    pub fn read_buffer_bytes(&self, threads: usize) -> u64 {
        // One block of sums, and one of a member, as wide as elements come; SLERP's first pass keeps all task vectors of
        // a block, and a member and init besides.
        let blocks = if turns(self.recipe()) { self.members().len() + 2 } else { 2 };
        let adapters: u64 = self.sources().map(|source| source.weights.buffer_bytes(threads)).sum();
        (threads * blocks * BLOCK_ELEMENTS * size_of::<f64>()) as u64 + adapters
    }

    /// Bytes of buffers for a merge to disk, at most.
    pub fn write_buffer_bytes(&self, threads: usize) -> u64 {
        self.read_buffer_bytes(threads) + buffer_bytes(self.manifest())
    }
}
