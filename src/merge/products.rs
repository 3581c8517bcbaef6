//! Dot products of task vectors over whole tensors.
//!
//! They are taken over fixed blocks of [`BLOCK_ELEMENTS`] elements, in float64, products and sums each rounded by itself,
//! and the blocks are summed in the order of names and indices. So the angles, and with them every bit of a merge, are the
//! same on every machine and any number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::average;
use super::combine::Gram;
use super::content::{BLOCK_ELEMENTS, block_range};
use super::plan::PlannedSource;
use crate::checkpoint::{Elements, SourceError, TensorInfo};

/// Blocks whose products are kept until they are summed.
const BATCH: usize = 1024;
/// Sums that run beside each other in a dot product, whatever vectors the machine has.
const LANES: usize = 16;

/// One block of a tensor, and the matrix that its products go to.
struct Block<'t> {
    gram: usize,
    tensor: &'t str,
    info: &'t TensorInfo,
    index: usize,
}

/// Adds the products of every block of some tensors to the matrix that stands beside each, in parallel. Of several errors
/// it is always the first block's that is told.
pub fn sum_products<'t>(
    tensors: impl Iterator<Item = (usize, &'t str, &'t TensorInfo)>,
    grams: &mut [Gram],
    products: impl Fn(&mut Buffers, &str, Range<usize>) -> Result<Vec<f64>, SourceError> + Sync,
) -> Result<(), SourceError> {
    let mut blocks = tensors.flat_map(|(gram, tensor, info)| {
        (0..info.elements().div_ceil(BLOCK_ELEMENTS)).map(move |index| Block { gram, tensor, info, index })
    });
    loop {
        let batch: Vec<Block<'_>> = blocks.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(());
        }
        let of_block = |buffers: &mut Buffers, block: &Block<'_>| products(buffers, block.tensor, block_range(block.info, block.index));
        let found: Vec<Result<Vec<f64>, SourceError>> = batch.par_iter().map_init(Buffers::default, of_block).collect();
        for (block, products) in batch.iter().zip(found) {
            let products = products?;
            if let Some(gram) = grams.get_mut(block.gram) {
                gram.add(&products);
                if !gram.is_finite() {
                    let problem = "the task vectors are too long to be measured".to_owned();
                    return Err(SourceError::NoSuchTensor { tensor: block.tensor.to_owned(), problem });
                }
            }
        }
    }
}

/// What one thread needs for the products of a block.
#[derive(Default)]
pub struct Buffers {
    elements: Elements,
    base: Elements,
    vectors: Vec<Vec<f64>>,
}

impl Buffers {
    /// The products of `φ_m − base`, in the order of [`Gram::pairs`].
    pub fn task_vectors(
        &mut self,
        tensor: &str,
        range: Range<usize>,
        members: &[&PlannedSource],
        base: &PlannedSource,
    ) -> Result<Vec<f64>, SourceError> {
        self.read(tensor, range, members, base)?;
        Ok(self.products(members.len()))
    }

    /// The same, with the base itself as the last vector.
    pub fn task_vectors_and_base(
        &mut self,
        tensor: &str,
        range: Range<usize>,
        members: &[&PlannedSource],
        base: &PlannedSource,
    ) -> Result<Vec<f64>, SourceError> {
        self.read(tensor, range.clone(), members, base)?;
        self.vectors.resize_with(members.len() + 1, Vec::new);
        if let Some(vector) = self.vectors.last_mut() {
            vector.resize(range.len(), 0.0);
            average::accumulate(vector, &self.base, 1.0, true);
        }
        Ok(self.products(members.len() + 1))
    }

    fn read(&mut self, tensor: &str, range: Range<usize>, members: &[&PlannedSource], base: &PlannedSource) -> Result<(), SourceError> {
        base.weights.read(tensor, range.clone(), &mut self.base)?;
        self.vectors.resize_with(members.len(), Vec::new);
        for (member, vector) in members.iter().zip(&mut self.vectors) {
            vector.resize(range.len(), 0.0);
            if std::ptr::eq(*member, base) {
                vector.fill(0.0);
                continue;
            }
            member.weights.read(tensor, range.clone(), &mut self.elements)?;
            average::accumulate(vector, &self.elements, 1.0, true);
            average::accumulate(vector, &self.base, -1.0, false);
        }
        Ok(())
    }

    fn products(&self, count: usize) -> Vec<f64> {
        let product = |(i, j): (usize, usize)| match (self.vectors.get(i), self.vectors.get(j)) {
            (Some(a), Some(b)) => dot(a, b),
            _ => 0.0,
        };
        Gram::pairs(count).map(product).collect()
    }
}

/// The dot product of two equally long vectors: element `i` goes to lane `i mod LANES`, and the lanes are summed in order.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
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
