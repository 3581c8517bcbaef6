//! The merged model: a checkpoint whose tensors are computed when they are read.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::MergePlan;
use super::average::{self, Rounded};
use super::content::BLOCK_ELEMENTS;
use crate::checkpoint::{Dtype, Elements, Manifest, SourceError, TensorSource, look_up};
use crate::domain::WeightsId;

/// The weighted mean of a plan's members, or one of them alone. Reading needs, for each thread of the current rayon pool,
/// memory for one block of sums (512 KiB) and one block of a member; the size and number of the members do not matter.
pub struct Merged {
    plan: Arc<MergePlan>,
    /// Members (by their place in the plan) and coefficients, in the order in which they are summed.
    parts: Vec<(usize, f64)>,
    /// Buffers between reads; as many as were ever needed at once.
    scratch: Mutex<Vec<Scratch>>,
}

#[derive(Default)]
struct Scratch {
    sum: Vec<f64>,
    member: Elements,
}

impl Merged {
    pub fn new(plan: Arc<MergePlan>) -> Self {
        let parts = plan.members().iter().map(|member| member.coefficient()).enumerate().collect();
        Self { plan, parts, scratch: Mutex::default() }
    }

    /// A merge of one: the member `index` of the plan, which must have it.
    pub(super) fn alone(plan: Arc<MergePlan>, index: usize) -> Self {
        Self { plan, parts: vec![(index, 1.0)], scratch: Mutex::default() }
    }

    pub fn plan(&self) -> &Arc<MergePlan> {
        &self.plan
    }

    /// The content hash of every member that takes part, in order: BLAKE3 over name, dtype, shape and bytes of each tensor
    /// that the model reads, in name order. Blocks that were read already are not read again.
    pub fn member_hashes(&self) -> Result<Vec<[u8; 32]>, SourceError> {
        let members = self.parts.iter().filter_map(|&(index, _)| self.plan.members().get(index));
        members.map(|member| member.weights.content_hash()).collect()
    }

    /// Names these weights: BLAKE3 over method, output dtype, and coefficient and content hash of every member in order.
    /// The names and places of members, and how they are sharded, do not matter, because the weights do not depend on them.
    pub fn weights_id(&self) -> Result<WeightsId, SourceError> {
        let mut hasher = blake3::Hasher::new_derive_key("warm weights id 1");
        super::content::hash_text(&mut hasher, self.plan.recipe().method().name());
        super::content::hash_text(&mut hasher, self.plan.recipe().dtype().safetensors_name());
        hasher.update(&(self.parts.len() as u64).to_le_bytes());
        for (&(_, coefficient), hash) in self.parts.iter().zip(self.member_hashes()?) {
            hasher.update(&coefficient.to_bits().to_le_bytes()).update(&hash);
        }
        Ok(WeightsId(*hasher.finalize().as_bytes()))
    }

    /// Averages the elements that begin at `begin` and lie within one block.
    fn read_block(&self, name: &str, begin: usize, into: Rounded<'_>) -> Result<(), SourceError> {
        let lock = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = lock().pop().unwrap_or_default();
        let outcome = self.average(name, begin, into, &mut scratch);
        lock().push(scratch);
        outcome
    }

    fn average(&self, name: &str, begin: usize, into: Rounded<'_>, scratch: &mut Scratch) -> Result<(), SourceError> {
        let (count, dtype) = match &into {
            Rounded::F32(values) => (values.len(), Dtype::F32),
            Rounded::F16(values) => (values.len(), Dtype::F16),
            Rounded::Bf16(values) => (values.len(), Dtype::Bf16),
        };
        scratch.sum.resize(count, 0.0);
        for (place, &(index, coefficient)) in self.parts.iter().enumerate() {
            if let Some(member) = self.plan.members().get(index) {
                member.weights.read(name, begin..begin + count, &mut scratch.member)?;
                average::accumulate(&mut scratch.sum, &scratch.member, coefficient, place == 0);
            }
        }
        average::round(&scratch.sum, into).map_err(|index| SourceError::Overflow {
            tensor: name.to_owned(),
            index: begin + index,
            value: scratch.sum.get(index).copied().unwrap_or_default(),
            dtype,
        })
    }

    /// Averages all blocks of a range, in parallel. Of several errors it is always the first block's that is told.
    fn read_blocks<T: Send>(
        &self,
        name: &str,
        begin: usize,
        into: &mut [T],
        rounded: impl Fn(&mut [T]) -> Rounded<'_> + Sync,
    ) -> Result<(), SourceError> {
        // Blocks lie at fixed places of the tensor, so that a range that begins between two has a short one in front.
        let head = into.len().min(begin.next_multiple_of(BLOCK_ELEMENTS) - begin);
        let (head, rest) = into.split_at_mut(head);
        let rest_begin = begin + head.len();
        if !head.is_empty() {
            self.read_block(name, begin, rounded(head))?;
        }
        let block = |(index, block): (usize, &mut [T])| self.read_block(name, rest_begin + index * BLOCK_ELEMENTS, rounded(block)).err();
        match rest.par_chunks_mut(BLOCK_ELEMENTS).enumerate().find_map_first(block) {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }
}

impl TensorSource for Merged {
    fn manifest(&self) -> &Manifest {
        self.plan.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let info = look_up(self.manifest(), name, &range)?;
        into.reset(info.dtype, range.len());
        match into {
            Elements::F32(values) => self.read_blocks(name, range.start, values, |block| Rounded::F32(block)),
            Elements::F16(values) => self.read_blocks(name, range.start, values, |block| Rounded::F16(block)),
            Elements::Bf16(values) => self.read_blocks(name, range.start, values, |block| Rounded::Bf16(block)),
            _ => Err(SourceError::NoSuchTensor { tensor: name.to_owned(), problem: format!("a merge to {} is not possible", info.dtype) }),
        }
    }
}

impl fmt::Debug for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Merged").field("plan", &self.plan).field("parts", &self.parts).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "merged_tests.rs"]
mod tests;
