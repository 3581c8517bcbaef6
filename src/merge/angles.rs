//! The pass over all weights that SLERP needs before it can merge: the Gram matrix of task vectors of each group.
//!
//! The products are taken over fixed blocks of [`BLOCK_ELEMENTS`] elements, in float64, products and sums each rounded by
//! itself, and the blocks are summed in the order of names and indices. So the angles, and with them every bit of the
//! merge, are the same on every machine and any number of threads.

use rayon::prelude::*;

use super::MergePlan;
use super::average;
use super::combine::{Combination, Gram, Step, slerp};
use super::content::{BLOCK_ELEMENTS, block_range};
use super::plan::PlannedSource;
use crate::checkpoint::{Elements, SourceError, TensorInfo};

/// Blocks whose products are kept until they are summed.
const BATCH: usize = 1024;
/// Sums that run beside each other in a dot product, whatever vectors the machine has.
const LANES: usize = 16;

/// What SLERP found in one group of tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// `model.layers.3.` for a layer, else the tensor's name; empty for the whole model.
    pub name: String,
    pub tensors: Vec<String>,
    /// The products of the members' task vectors.
    pub gram: Gram,
    /// How each member after the first was joined to those before it.
    pub steps: Vec<Step>,
    /// The outcome, before LITI.
    pub combination: Combination,
}

/// One block of one tensor of a group.
struct Block<'p> {
    group: usize,
    tensor: &'p str,
    info: &'p TensorInfo,
    index: usize,
}

/// Reads all members and init once.
pub fn measure(plan: &MergePlan, t: f64) -> Result<Vec<Group>, SourceError> {
    let groups = plan.groups();
    let (members, Some(init)) = (plan.members.iter().map(|member| &member.source).collect::<Vec<_>>(), &plan.init) else {
        // A recipe with SLERP has an init.
        return Ok(Vec::new());
    };
    let blocks = groups.values().enumerate().flat_map(|(group, tensors)| tensors.iter().map(move |tensor| (group, *tensor)));
    let blocks = blocks.filter_map(|(group, tensor)| Some((group, tensor, plan.manifest.get(tensor)?)));
    let mut blocks = blocks.flat_map(|(group, tensor, info)| {
        (0..info.elements().div_ceil(BLOCK_ELEMENTS)).map(move |index| Block { group, tensor, info, index })
    });
    let mut grams = vec![Gram::zero(members.len()); groups.len()];
    loop {
        let batch: Vec<Block<'_>> = blocks.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        let products: Vec<Result<Vec<f64>, SourceError>> =
            batch.par_iter().map_init(Scratch::default, |scratch, block| scratch.products(block, &members, init)).collect();
        // In order, so that sums are always the same and of several errors it is always the first that is told.
        for (block, products) in batch.iter().zip(products) {
            let products = products?;
            if let Some(gram) = grams.get_mut(block.group) {
                gram.add(&products);
                if !gram.is_finite() {
                    let problem = "the task vectors are too long to be measured".to_owned();
                    return Err(SourceError::Read { file: init.path().display().to_string(), tensor: block.tensor.to_owned(), problem });
                }
            }
        }
    }
    let group = |((name, tensors), gram): ((&str, Vec<&str>), Gram)| {
        let (coefficients, steps) = slerp(&gram, t);
        // Along lines there is no arc, and init falls out.
        let straight = steps.iter().all(|step| !matches!(step, Step::Arc(_)));
        let combination = if straight { Combination::of_members(&coefficients) } else { Combination::of_task_vectors(&coefficients) };
        Group { name: name.to_owned(), tensors: tensors.into_iter().map(str::to_owned).collect(), gram, steps, combination }
    };
    Ok(groups.into_iter().zip(grams).map(group).collect())
}

#[derive(Default)]
struct Scratch {
    elements: Elements,
    init: Elements,
    task_vectors: Vec<Vec<f64>>,
}

impl Scratch {
    fn products(&mut self, block: &Block<'_>, members: &[&PlannedSource], init: &PlannedSource) -> Result<Vec<f64>, SourceError> {
        let range = block_range(block.info, block.index);
        init.weights.read(block.tensor, range.clone(), &mut self.init)?;
        self.task_vectors.resize_with(members.len(), Vec::new);
        for (member, task_vector) in members.iter().zip(&mut self.task_vectors) {
            member.weights.read(block.tensor, range.clone(), &mut self.elements)?;
            task_vector.resize(range.len(), 0.0);
            average::accumulate(task_vector, &self.elements, 1.0, true);
            average::accumulate(task_vector, &self.init, -1.0, false);
        }
        let product = |(i, j): (usize, usize)| match (self.task_vectors.get(i), self.task_vectors.get(j)) {
            (Some(a), Some(b)) => dot(a, b),
            _ => 0.0,
        };
        Ok(Gram::pairs(members.len()).map(product).collect())
    }
}

/// The dot product of two equally long vectors: element `i` goes to lane `i mod LANES`, and the lanes are summed in order.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [0.0; LANES];
            let (a, b) = (a.chunks(LANES), b.chunks(LANES));
            for (a, b) in a.zip(b) {
                if let (Ok(a), Ok(b)) = (<&[f64; LANES]>::try_from(a), <&[f64; LANES]>::try_from(b)) {
                    for lane in 0..LANES {
                        lanes[lane] += a[lane] * b[lane];
                    }
                } else {
                    lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += a * b);
                }
            }
            lanes.iter().fold(0.0, |sum, lane| sum + lane)
        },
    )
}

#[cfg(test)]
#[path = "angles_tests.rs"]
mod tests;
