//! Dot products of task vectors over whole tensors.
//!
//! They are taken over fixed blocks of [`BLOCK_ELEMENTS`] elements, in float64, products and sums each rounded by itself,
//! and the blocks are summed in the order of names and indices. So the angles, and with them every bit of a merge, are the
//! same on every machine and any number of threads.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::average;
use super::combine::Gram;
use super::content::{BLOCK_ELEMENTS, block_range};
use super::planned::PlannedSource;
use crate::checkpoint::{Elements, SourceError, TensorInfo};
use crate::lock::lock;

/// Blocks whose products are kept until they are summed.
const BATCH: usize = 1024;
/// Sums that run beside each other in a dot product, whatever vectors the machine has.
const LANES: usize = 16;
/// Elements of all vectors that are multiplied while they are in a core's cache.
const STRIP: usize = 1024;

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
    let pool: Mutex<Vec<Buffers>> = Mutex::default();
    loop {
        let batch: Vec<Block<'_>> = blocks.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(());
        }
        let of_block = |block: &Block<'_>| {
            // Rayon's own way of keeping a value for each thread makes one for every few blocks.
            let mut buffers = lock(&pool).pop().unwrap_or_default();
            let products = products(&mut buffers, block.tensor, block_range(block.info, block.index));
            lock(&pool).push(buffers);
            products
        };
        let found: Vec<Result<Vec<f64>, SourceError>> = batch.par_iter().map(of_block).collect();
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

/// Which vectors are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Vectors {
    /// `φ_m − base` of every member.
    Tasks,
    /// The same, and the base itself as the last one.
    TasksAndBase,
}

/// What one thread needs for the products of a block.
#[derive(Default)]
pub struct Buffers {
    members: Vec<Elements>,
    base: Elements,
    /// A strip of every vector.
    strips: Vec<Vec<f64>>,
    lanes: Vec<Lanes>,
}

impl Buffers {
    /// The products of all pairs of vectors, in the order of [`Gram::pairs`].
    pub fn products(
        &mut self,
        vectors: Vectors,
        tensor: &str,
        range: Range<usize>,
        members: &[&PlannedSource],
        base: &PlannedSource,
    ) -> Result<Vec<f64>, SourceError> {
        base.weights.glance(tensor, range.clone(), &mut self.base)?;
        self.members.resize_with(members.len(), Elements::default);
        for (member, elements) in members.iter().zip(&mut self.members) {
            if !std::ptr::eq(*member, base) {
                member.weights.glance(tensor, range.clone(), elements)?;
            }
        }
        let vectors = members.len() + usize::from(vectors == Vectors::TasksAndBase);
        // The last one is the base, whether it is one of the vectors or not.
        self.strips.resize_with(members.len() + 1, Vec::new);
        self.lanes.clear();
        self.lanes.resize(vectors * (vectors + 1) / 2, Lanes::default());
        for begin in (0..range.len()).step_by(STRIP) {
            let count = STRIP.min(range.len() - begin);
            self.strips.iter_mut().for_each(|strip| strip.resize(count, 0.0));
            let Some((base_strip, strips)) = self.strips.split_last_mut() else { continue };
            average::widen(base_strip, &self.base, begin);
            for ((member, elements), strip) in members.iter().zip(&self.members).zip(strips) {
                if std::ptr::eq(*member, base) {
                    strip.fill(0.0);
                } else {
                    average::subtract(strip, elements, begin, base_strip);
                }
            }
            for (lanes, (i, j)) in self.lanes.iter_mut().zip(Gram::pairs(vectors)) {
                if let (Some(a), Some(b)) = (self.strips.get(i), self.strips.get(j)) {
                    lanes.add(a, b);
                }
            }
        }
        Ok(self.lanes.iter().map(Lanes::sum).collect())
    }
}

/// The sums of a dot product: element `i` goes to lane `i mod LANES`, and the lanes are summed in order.
#[derive(Clone, Copy, Default)]
struct Lanes([f64; LANES]);

impl Lanes {
    /// Goes on with the next elements of two vectors. What was added before must be a multiple of [`LANES`] elements.
    fn add(&mut self, a: &[f64], b: &[f64]) {
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        self.0 = pulp::Arch::new().dispatch(AddProducts { before: self.0, a, b });
        self.0.iter_mut().zip(a_rest.iter().zip(b_rest)).for_each(|(sum, (a, b))| *sum += a * b);
    }

    fn sum(&self) -> f64 {
        self.0.iter().fold(0.0, |sum, lane| sum + lane)
    }
}

/// Adds products to every lane. A value in place of a closure, which the compiler would leave outside of the function that
/// may use the machine's vectors.
struct AddProducts<'a> {
    before: [f64; LANES],
    a: &'a [[f64; LANES]],
    b: &'a [[f64; LANES]],
}

impl pulp::NullaryFnOnce for AddProducts<'_> {
    type Output = [f64; LANES];

    #[inline(always)]
    fn call(self) -> [f64; LANES] {
        let mut sums = self.before;
        for (a, b) in self.a.iter().zip(self.b) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum += a * b;
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn strips_and_vectors_change_no_bit_of_a_product(pairs in proptest::collection::vec((-1e3..1e3, -1e3..1e3), 0..3000)) {
            let (a, b): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let mut lanes = [0.0; LANES];
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                lanes[i % LANES] += a * b;
            }
            let expected: f64 = lanes.iter().fold(0.0, |sum, lane| sum + lane);
            for strip in [LANES, 64, STRIP, 4096] {
                let mut found = Lanes::default();
                a.chunks(strip).zip(b.chunks(strip)).for_each(|(a, b)| found.add(a, b));
                prop_assert_eq!(found.sum().to_bits(), expected.to_bits());
            }
        }
    }
}
