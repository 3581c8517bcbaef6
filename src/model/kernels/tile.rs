//! What attention does with a tile of a few rows: two dense products, and one step of a running softmax.
//!
//! The products hold their sums in vector registers, [`ROWS`] rows by two vectors, so that a step along the depth is two
//! loads and twice [`ROWS`] fused multiply-adds. Every sum is one chain of them along the depth, whatever the width of a
//! vector is.

use pulp::Simd;

use super::math::{LANES, exp, fold};

/// Rows of a tile: with two vectors each, the sums of a product fill the sixteen registers of AVX2 and keep the units of
/// AVX-512 busy.
pub const ROWS: usize = 6;
/// The widths of products are multiples of two of the widest vectors.
pub const WIDTH: usize = 32;
/// Below every score that a model can produce, and finite, so that differences with it are numbers.
pub const LOWEST: f32 = -1e30;

/// A matrix of which some rows are read: `stride` numbers apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// `c += a b`: `a` is `[ROWS, depth]`, `b` is `[depth, c.stride]`, `c` is `[ROWS, stride]` with a stride that is a multiple
/// of [`WIDTH`].
#[inline(always)]
pub fn multiply_add<S: Simd>(simd: S, a: Rows, b: Rows, depth: usize, c: &mut [f32], stride: usize) {
    let lanes = S::F32_LANES;
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &a.values[row * a.stride..][..depth]);
    let (vectors, _) = S::as_simd_f32s(b.values);
    for column in (0..stride).step_by(2 * lanes) {
        let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let held = &c[row * stride + column..][..2 * lanes];
            *sums = [load(simd, &held[..lanes]), load(simd, &held[lanes..])];
        }
        // All that is walked along the depth is zipped, so that no index is checked at every step.
        let [a0, a1, a2, a3, a4, a5] = rows;
        let along = vectors[column / lanes..].chunks(b.stride / lanes);
        for ((((((b, a0), a1), a2), a3), a4), a5) in along.zip(a0).zip(a1).zip(a2).zip(a3).zip(a4).zip(a5) {
            let &[low, high, ..] = b else { unreachable!("a row of whole pairs of vectors") };
            for (a, sums) in [a0, a1, a2, a3, a4, a5].into_iter().zip(&mut sums) {
                let a = simd.splat_f32s(*a);
                *sums = [simd.mul_add_f32s(a, low, sums[0]), simd.mul_add_f32s(a, high, sums[1])];
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let (low, high) = c[row * stride + column..][..2 * lanes].split_at_mut(lanes);
            simd.partial_store_f32s(low, sums[0]);
            simd.partial_store_f32s(high, sums[1]);
        }
    }
}

/// One whole vector.
#[inline(always)]
fn load<S: Simd>(simd: S, values: &[f32]) -> S::f32s {
    match S::as_simd_f32s(values).0.first() {
        Some(vector) => *vector,
        None => simd.splat_f32s(0.0),
    }
}

/// The running softmax of one row: the largest score so far, and the sum of the weights relative to it.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    pub top: f32,
    pub sum: f32,
}

impl Running {
    pub const EMPTY: Self = Self { top: LOWEST, sum: 0.0 };

    /// Turns a block of scores into weights relative to the largest score so far, and gives the factor by which what was
    /// gathered before shrinks. A score of minus infinity is a masked key: its weight is exactly 0, and a block of nothing
    /// else leaves every bit as it was (Milakov and Gimelshein, 1805.02867).
    #[inline(always)]
    pub fn absorb<const BLOCK: usize>(&mut self, scores: &mut [f32; BLOCK]) -> f32 {
        let (chunks, _) = scores.as_chunks_mut::<LANES>();
        let mut tops = [self.top; LANES];
        for chunk in chunks.iter() {
            for i in 0..LANES {
                tops[i] = if chunk[i] > tops[i] { chunk[i] } else { tops[i] };
            }
        }
        let top = tops.iter().fold(LOWEST, |top, other| if *other > top { *other } else { top });
        let shrink = exp(self.top - top);
        let mut sums = [0.0f32; LANES];
        for chunk in chunks.iter_mut() {
            for i in 0..LANES {
                let weight = exp(chunk[i] - top);
                chunk[i] = if chunk[i] == f32::NEG_INFINITY { 0.0 } else { weight };
                sums[i] += chunk[i];
            }
        }
        self.top = top;
        self.sum = self.sum.mul_add(shrink, fold(sums));
        shrink
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Product<'a>(&'a [f32], &'a [f32], usize, &'a mut [f32], usize);

    impl pulp::WithSimd for Product<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(a, b, depth, c, stride) = self;
            multiply_add(simd, Rows { values: a, stride: depth }, Rows { values: b, stride }, depth, c, stride);
        }
    }

    proptest! {
        #[test]
        fn a_product_is_one_chain_of_fused_additions_for_every_element(depth in 1usize..40, wide in 1usize..4, seed in any::<u32>()) {
            let stride = wide * WIDTH;
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8;
            let a: Vec<f32> = (0..ROWS * depth).map(value).collect();
            let b: Vec<f32> = (0..depth * stride).map(|i| value(i + 10_000)).collect();
            let held: Vec<f32> = (0..ROWS * stride).map(|i| value(i + 50_000)).collect();
            let mut c = held.clone();
            pulp::Arch::new().dispatch(Product(&a, &b, depth, &mut c, stride));
            for row in 0..ROWS {
                for column in 0..stride {
                    let expected = (0..depth).fold(held[row * stride + column], |sum, k| a[row * depth + k].mul_add(b[k * stride + column], sum));
                    prop_assert_eq!(c[row * stride + column].to_bits(), expected.to_bits());
                }
            }
        }

        #[test]
        fn a_softmax_in_blocks_is_the_softmax_of_the_whole(scores in prop::collection::vec(prop::option::of(-30f32..30.0), 1..200)) {
            let mut running = Running::EMPTY;
            let mut gathered = 0.0f32;
            let mut exact = (0.0f64, 0.0f64);
            for (index, score) in scores.iter().enumerate() {
                if let Some(score) = score {
                    exact.0 += f64::from(*score).exp();
                    exact.1 += f64::from(*score).exp() * index as f64;
                }
            }
            for (number, block) in scores.chunks(64).enumerate() {
                let mut weights = [f32::NEG_INFINITY; 64];
                for (weight, score) in weights.iter_mut().zip(block) {
                    *weight = score.unwrap_or(f32::NEG_INFINITY);
                }
                gathered *= running.absorb(&mut weights);
                gathered += weights.iter().enumerate().map(|(i, weight)| weight * (number * 64 + i) as f32).sum::<f32>();
            }
            if exact.0 > 0.0 {
                let expected = exact.1 / exact.0;
                prop_assert!((f64::from(gathered / running.sum) - expected).abs() < 1e-3 * (1.0 + expected), "{} {expected}", gathered / running.sum);
            } else {
                prop_assert_eq!(running.sum, 0.0);
            }
        }

        #[test]
        fn a_block_of_masked_keys_changes_no_bit(top in -50f32..50.0, sum in 0f32..100.0) {
            let mut running = Running { top, sum };
            let mut weights = [f32::NEG_INFINITY; 64];
            let shrink = running.absorb(&mut weights);
            prop_assert_eq!((shrink, running.top.to_bits(), running.sum.to_bits()), (1.0, top.to_bits(), sum.to_bits()));
            prop_assert_eq!(weights, [0.0; 64]);
        }
    }
}
