//! The merged model: a checkpoint whose tensors are computed when they are read.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::angles::{Group, measure};
use super::average::{self, Rounded};
use super::choice::{Treatment, finished, turns};
use super::combine::{Combination, Step};
use super::content::BLOCK_ELEMENTS;
use super::listing::listed;
use super::recipe::Method;
use super::tracked::Tracked;
use super::weights_id::{Named, weights_id};
use super::{MergePlan, PlannedSource};
use crate::checkpoint::{Dtype, Elements, Manifest, SourceError, TensorSource, look_up};
use crate::domain::WeightsId;
use crate::lock::lock;

/// A plan's merge, or one of its members alone. Reading needs, for each thread of the current rayon pool, memory for one
/// block of sums (512 KiB) and one block of a member; the size and number of the members do not matter.
pub struct Merged {
    plan: Arc<MergePlan>,
    /// The member that stands alone.
    alone: Option<usize>,
    /// It is read without what its adapter adds.
    bare: bool,
    /// What is read for each tensor.
    sums: BTreeMap<String, Arc<Sum>>,
    groups: Vec<Group>,
    /// Buffers between reads; as many as were ever needed at once.
    scratch: Mutex<Vec<Scratch>>,
}

/// How a tensor is made from sources, which are known by their places: members in order, then init.
#[derive(Debug, PartialEq)]
enum Sum {
    /// Each source with its coefficient, in the order in which they are summed.
    Of(Vec<(usize, f64)>),
    /// Bytes of the first, and all others must have the same.
    Same(Vec<usize>),
}

#[derive(Default)]
struct Scratch {
    sum: Vec<f64>,
    member: Elements,
}

impl Merged {
    /// Finds all coefficients. Those of SLERP follow from angles, so it reads all members and init once; other recipes
    /// read nothing yet.
    pub fn new(plan: Arc<MergePlan>) -> Result<Self, SourceError> {
        for nested in plan.sources().filter_map(|source| source.nested.as_ref()) {
            nested.prepare()?;
        }
        let recipe = plan.recipe();
        let groups = match recipe.method() {
            Method::Slerp { t, .. } if turns(recipe) => measure(&plan, t)?,
            _ => Vec::new(),
        };
        let sum = |combination: &Combination| Arc::new(Sum::Of(combination.parts()));
        let mut sums = BTreeMap::new();
        for group in &groups {
            let sum = sum(&finished(recipe, group.combination.clone()));
            sums.extend(group.tensors.iter().map(|name| (name.clone(), Arc::clone(&sum))));
        }
        let mut shared: BTreeMap<Treatment, Arc<Sum>> = BTreeMap::new();
        for (name, &treatment) in &plan.treatments {
            if sums.contains_key(name) {
                continue;
            }
            let is_float = plan.manifest().get(name).is_some_and(|info| info.dtype.is_float());
            let made = match treatment {
                Treatment::Equal => Arc::new(Sum::Same(treatment.sources(recipe))),
                // One source's integers, by a rule.
                _ if !is_float => Arc::new(Sum::Same(treatment.sources(recipe))),
                _ => Arc::clone(shared.entry(treatment).or_insert_with(|| sum(&treatment.combination(recipe)))),
            };
            sums.insert(name.clone(), made);
        }
        Ok(Self { plan, alone: None, bare: false, sums, groups, scratch: Mutex::default() })
    }

    /// A merge of one: the member `index` of the plan, which must have it.
    pub(super) fn alone(plan: Arc<MergePlan>, index: usize) -> Result<Self, SourceError> {
        if let Some(member) = plan.members().get(index) {
            if let Some(tensor) = member.lacks().first() {
                let problem = "the member does not have it, because a rule takes another's; it cannot stand alone".to_owned();
                return Err(SourceError::Read { file: member.path().display().to_string(), tensor: tensor.clone(), problem });
            }
            if let Some(nested) = &member.source().nested {
                nested.prepare()?;
            }
        }
        let (averaged, copied) = (Arc::new(Sum::Of(vec![(index, 1.0)])), Arc::new(Sum::Same(vec![index])));
        let sum = |is_float: bool| if is_float { &averaged } else { &copied };
        let sums = plan.manifest().iter().map(|(name, info)| (name.to_owned(), Arc::clone(sum(info.dtype.is_float()))));
        let sums = sums.collect();
        Ok(Self { plan, alone: Some(index), bare: false, sums, groups: Vec::new(), scratch: Mutex::default() })
    }

    /// The same without what an adapter adds to its base: see [`MergePlan::member_bare`].
    pub(super) fn bare(self) -> Self {
        Self { bare: true, ..self }
    }

    pub fn plan(&self) -> &Arc<MergePlan> {
        &self.plan
    }

    /// What SLERP found, group by group; empty for other methods.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// What is worth knowing and was not known before weights were read.
    pub fn notes(&self) -> Vec<String> {
        let straight = |why: Step| {
            let groups = self.groups.iter().filter(|group| group.steps.contains(&why));
            groups.map(|group| if group.name.is_empty() { "the whole model" } else { group.name.as_str() }).collect::<Vec<_>>()
        };
        let reasons = [
            (Step::NoDirection, "a task vector is shorter than 1e-12"),
            (Step::OneLine, "the task vectors lie on one line (the sine of their angle is below 1e-6)"),
        ];
        let told = reasons.into_iter().map(|(why, reason)| (straight(why), reason)).filter(|(groups, _)| !groups.is_empty());
        told.map(|(groups, reason)| {
            let of = self.groups.len();
            format!("slerp is linear in {} of {of} groups, because {reason}: {}", groups.len(), listed(groups.iter().copied()))
        })
        .collect()
    }

    /// The content hash of every member in order: [`PlannedSource::content_hash`].
    pub fn member_hashes(&self) -> Result<Vec<[u8; 32]>, SourceError> {
        match self.alone {
            Some(index) => self.plan.members().get(index).into_iter().map(|member| self.hash_alone(member.source())).collect(),
            None => self.plan.members().iter().map(|member| member.source().content_hash()).collect(),
        }
    }

    /// The content hash of init, if it is read.
    pub fn init_hash(&self) -> Result<Option<[u8; 32]>, SourceError> {
        let init = self.plan.init().filter(|init| self.alone.is_none() && !init.reads().is_empty());
        init.map(PlannedSource::content_hash).transpose()
    }

    fn hash_alone(&self, member: &PlannedSource) -> Result<[u8; 32], SourceError> {
        member.weights.content_hash(self.sums.keys())
    }

    /// Names these weights: BLAKE3 over method, coefficients, rules, output dtype, and the content hash of every source in
    /// order. The names and places of members, and how they are sharded, do not matter, because the weights do not depend
    /// on them.
    pub fn weights_id(&self) -> Result<WeightsId, SourceError> {
        match self.alone {
            None => Ok(self.plan.weights_id(&self.member_hashes()?, self.init_hash()?)),
            Some(_) => {
                let recipe = self.plan.recipe();
                let members: Vec<(f64, [u8; 32])> = self.member_hashes()?.into_iter().map(|hash| (1.0, hash)).collect();
                let named = Named { kind: recipe.kind(), method: Method::Linear, liti: None, rules: &[], dtype: recipe.dtype() };
                Ok(weights_id(&named, &members, None))
            }
        }
    }

    /// Averages the elements that begin at `begin` and lie within one block.
    fn read_block(&self, name: &str, parts: &[(usize, f64)], begin: usize, into: Rounded<'_>) -> Result<(), SourceError> {
        let mut scratch = lock(&self.scratch).pop().unwrap_or_default();
        let outcome = self.average(name, parts, begin, into, &mut scratch);
        lock(&self.scratch).push(scratch);
        outcome
    }

    fn average(
        &self,
        name: &str,
        parts: &[(usize, f64)],
        begin: usize,
        into: Rounded<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), SourceError> {
        let (count, dtype) = match &into {
            Rounded::F32(values) => (values.len(), Dtype::F32),
            Rounded::F16(values) => (values.len(), Dtype::F16),
            Rounded::Bf16(values) => (values.len(), Dtype::Bf16),
        };
        scratch.sum.resize(count, 0.0);
        if parts.is_empty() {
            scratch.sum.fill(0.0);
        }
        for (place, &(index, coefficient)) in parts.iter().enumerate() {
            if let Some(source) = self.plan.source(index) {
                let read = if self.bare { Tracked::read_bare } else { Tracked::read };
                read(&source.weights, name, begin..begin + count, &mut scratch.member)?;
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
        parts: &[(usize, f64)],
        begin: usize,
        into: &mut [T],
        rounded: impl Fn(&mut [T]) -> Rounded<'_> + Sync,
    ) -> Result<(), SourceError> {
        // Blocks lie at fixed places of the tensor, so that a range that begins between two has a short one in front.
        let head = into.len().min(begin.next_multiple_of(BLOCK_ELEMENTS) - begin);
        let (head, rest) = into.split_at_mut(head);
        let rest_begin = begin + head.len();
        if !head.is_empty() {
            self.read_block(name, parts, begin, rounded(head))?;
        }
        let block =
            |(index, block): (usize, &mut [T])| self.read_block(name, parts, rest_begin + index * BLOCK_ELEMENTS, rounded(block)).err();
        match rest.par_chunks_mut(BLOCK_ELEMENTS).enumerate().find_map_first(block) {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Takes the first source's elements, which all others must have, too.
    fn read_same(&self, name: &str, sources: &[usize], range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let mut sources = sources.iter().filter_map(|&index| self.plan.source(index));
        let missing = || SourceError::NoSuchTensor { tensor: name.to_owned(), problem: "nobody has it".to_owned() };
        let first = sources.next().ok_or_else(missing)?;
        first.weights.read(name, range.clone(), into)?;
        let mut other = Elements::default();
        for source in sources {
            source.weights.read(name, range.clone(), &mut other)?;
            let size = (into.bytes().len() / range.len().max(1)).max(1);
            if let Some(byte) = into.bytes().iter().zip(other.bytes()).position(|(a, b)| a != b) {
                let (element, file) = (range.start + byte / size, first.weights.place());
                let problem = format!(
                    "element {element} is not that of {file}; such a tensor is not averaged and must be the same in all members, \
                     or a rule must say whose is taken"
                );
                return Err(SourceError::Read { file: source.weights.place().to_owned(), tensor: name.to_owned(), problem });
            }
        }
        Ok(())
    }
}

impl TensorSource for Merged {
    fn manifest(&self) -> &Manifest {
        self.plan.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let info = look_up(self.manifest(), name, &range)?;
        let wrong = |problem: String| SourceError::NoSuchTensor { tensor: name.to_owned(), problem };
        let parts = match self.sums.get(name).map(Arc::as_ref) {
            Some(Sum::Of(parts)) => parts,
            Some(Sum::Same(sources)) => return self.read_same(name, sources, range, into),
            None => return Err(wrong("there is no plan for it".to_owned())),
        };
        into.reset(info.dtype, range.len());
        match into {
            Elements::F32(values) => self.read_blocks(name, parts, range.start, values, |block| Rounded::F32(block)),
            Elements::F16(values) => self.read_blocks(name, parts, range.start, values, |block| Rounded::F16(block)),
            Elements::Bf16(values) => self.read_blocks(name, parts, range.start, values, |block| Rounded::Bf16(block)),
            _ => Err(wrong(format!("a merge to {} is not possible", info.dtype))),
        }
    }
}

impl fmt::Debug for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Merged").field("plan", &self.plan).field("alone", &self.alone).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "merged_tests.rs"]
mod tests;
