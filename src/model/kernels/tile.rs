//! What attention does with a tile of queries and a block of keys: their products, one step of a running softmax, and the
//! weighted sum of the values.
//!
//! The queries of a tile stand beside each other, one in each lane of [`ROWS`]: scores are `[keys, ROWS]`, so the softmax
//! runs down the keys with no step across lanes, and nothing that a query gets depends on what stands in another lane. Both
//! products hold their sums in vector registers, and a step along the depth is one chunk of each side; every sum is one
//! chain of fused multiply-adds along the depth, whatever the width of a vector is.

use std::ops::Range;

use pulp::Simd;

use super::math::exp;

/// Queries of a tile: two of the widest vectors.
pub const ROWS: usize = 32;
/// Values are in panels of so many columns: two of the widest vectors.
pub const WIDTH: usize = 32;
/// Keys are in panels of so many: with two vectors of queries each, their sums keep the units of AVX-512 busy, and those of
/// half a panel fit in the sixteen registers of AVX2.
pub const PANEL: usize = 8;
/// Below every score that a model can produce, and finite, so that differences with it are numbers.
const LOWEST: f32 = -1e30;

/// Puts a row into one lane of a tile, `[depth, ROWS]`.
#[inline(always)]
pub fn fill_lane(tile: &mut [f32], lane: usize, row: &[f32]) {
    let (tile, _) = tile.as_chunks_mut::<ROWS>();
    for (lanes, number) in tile.iter_mut().zip(row) {
        lanes[lane] = *number;
    }
}

/// Products of keys and queries: `keys` is `[panels, depth, PANEL]`, `queries` is `[depth, ROWS]`, and `into`
/// `[panels * PANEL, ROWS]` of which the columns of the first `count` queries are written, and maybe others.
#[inline(always)]
pub fn products<S: Simd>(simd: S, keys: &[f32], queries: &[f32], count: usize, into: &mut [f32]) {
    let lanes = S::F32_LANES;
    match lanes {
        16 if count <= lanes => products_of::<S, PANEL, 1>(simd, keys, queries, count, into),
        16 => products_of::<S, PANEL, 2>(simd, keys, queries, count, into),
        _ => products_of::<S, { PANEL / 2 }, 2>(simd, keys, queries, count, into),
    }
}

/// [`products`], of which the sums of `K` keys with `V` vectors of queries are held at a time.
#[inline(always)]
fn products_of<S: Simd, const K: usize, const V: usize>(simd: S, keys: &[f32], queries: &[f32], count: usize, into: &mut [f32]) {
    let (queries, _) = S::as_simd_f32s(queries);
    let vectors = ROWS / S::F32_LANES;
    let depth = queries.len() / vectors;
    let wanted = count.div_ceil(S::F32_LANES).next_multiple_of(V);
    for (keys, into) in keys.chunks_exact(depth * PANEL).zip(into.chunks_exact_mut(PANEL * ROWS)) {
        let (keys, _) = keys.as_chunks::<PANEL>();
        let (into, _) = S::as_mut_simd_f32s(into);
        for first in (0..PANEL).step_by(K) {
            for column in (0..wanted).step_by(V) {
                let mut sums = [[simd.splat_f32s(0.0); V]; K];
                for (queries, keys) in queries[column..].chunks(vectors).zip(keys) {
                    let Some(queries) = queries.first_chunk::<V>() else { unreachable!("a row of whole vectors") };
                    let Some(keys) = keys[first..].first_chunk::<K>() else { unreachable!("a panel of whole chunks") };
                    for (sums, key) in sums.iter_mut().zip(keys) {
                        let key = simd.splat_f32s(*key);
                        for (sum, query) in sums.iter_mut().zip(queries) {
                            *sum = simd.mul_add_f32s(key, *query, *sum);
                        }
                    }
                }
                for (sums, into) in sums.iter().zip(into[first * vectors..].chunks_exact_mut(vectors)) {
                    into[column..column + V].copy_from_slice(sums);
                }
            }
        }
    }
}

/// What some queries give some keys of a block.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    /// `[height, ROWS]`: of all keys of the block.
    pub all: &'a [[f32; ROWS]],
    /// Those that count.
    pub keys: Range<usize>,
    /// By which factors the queries' sums so far shrink.
    pub shrink: &'a [f32; ROWS],
    /// Of how many queries there is more than padding.
    pub count: usize,
}

/// `held = held * shrink + weights values` for some keys and the first queries, and maybe others: `values` is
/// `[columns / WIDTH, height, WIDTH]`, and `held` is `[columns / WIDTH, ROWS, WIDTH]`.
#[inline(always)]
pub fn gather<S: Simd>(simd: S, weights: Weights<'_>, values: &[f32], held: &mut [f32]) {
    if S::F32_LANES == 16 {
        gather_of::<S, PANEL>(simd, weights, values, held);
    } else {
        gather_of::<S, { PANEL / 2 }>(simd, weights, values, held);
    }
}

/// [`gather`], of which the sums of `R` queries with two vectors of values are held at a time.
#[inline(always)]
fn gather_of<S: Simd, const R: usize>(simd: S, weights: Weights<'_>, values: &[f32], held: &mut [f32]) {
    let (Weights { all, keys, shrink, count }, vectors) = (weights, WIDTH / S::F32_LANES);
    for (values, held) in values.chunks_exact(all.len() * WIDTH).zip(held.chunks_exact_mut(ROWS * WIDTH)) {
        let ((values, _), (held, _)) = (S::as_simd_f32s(values), S::as_mut_simd_f32s(held));
        let (values, weights) = (&values[keys.start * vectors..], &all[keys.clone()]);
        for column in (0..vectors).step_by(2) {
            for first in (0..count).step_by(R) {
                let held = &mut held[first * vectors..];
                let mut sums = [[simd.splat_f32s(0.0); 2]; R];
                for ((sums, held), shrink) in sums.iter_mut().zip(held.chunks_exact(vectors)).zip(&shrink[first..first + R]) {
                    let shrink = simd.splat_f32s(*shrink);
                    *sums = [simd.mul_f32s(shrink, held[column]), simd.mul_f32s(shrink, held[column + 1])];
                }
                for (values, weights) in values[column..].chunks(vectors).zip(weights) {
                    let &[low, high, ..] = values else { unreachable!("a row of whole pairs of vectors") };
                    let Some(weights) = weights[first..].first_chunk::<R>() else { unreachable!("a tile of whole chunks") };
                    for (sums, weight) in sums.iter_mut().zip(weights) {
                        let weight = simd.splat_f32s(*weight);
                        *sums = [simd.mul_add_f32s(weight, low, sums[0]), simd.mul_add_f32s(weight, high, sums[1])];
                    }
                }
                for (sums, held) in sums.iter().zip(held.chunks_exact_mut(vectors)) {
                    held[column..column + 2].copy_from_slice(sums);
                }
            }
        }
    }
}

/// The running softmax of a tile: every query's largest score so far, and the sum of its weights relative to that.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    pub tops: [f32; ROWS],
    pub sums: [f32; ROWS],
}

impl Running {
    pub const EMPTY: Self = Self { tops: [LOWEST; ROWS], sums: [0.0; ROWS] };

    /// Turns the scores of some keys into weights relative to the largest score so far, and gives the factors by which what
    /// was gathered before shrinks. A score of minus infinity is a masked key: its weight is exactly 0, and keys that are
    /// all masked leave every bit as it was (Milakov and Gimelshein, 1805.02867).
    #[inline(always)]
    pub fn absorb(&mut self, scores: &mut [[f32; ROWS]]) -> [f32; ROWS] {
        let mut tops = self.tops;
        for scores in scores.iter() {
            for i in 0..ROWS {
                tops[i] = if scores[i] > tops[i] { scores[i] } else { tops[i] };
            }
        }
        let mut shrink = [0.0f32; ROWS];
        for i in 0..ROWS {
            shrink[i] = exp(self.tops[i] - tops[i]);
        }
        let mut sums = [0.0f32; ROWS];
        for scores in scores.iter_mut() {
            for i in 0..ROWS {
                let weight = exp(scores[i] - tops[i]);
                scores[i] = if scores[i] == f32::NEG_INFINITY { 0.0 } else { weight };
                sums[i] += scores[i];
            }
        }
        for i in 0..ROWS {
            self.sums[i] = self.sums[i].mul_add(shrink[i], sums[i]);
        }
        self.tops = tops;
        shrink
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Products<'a>(&'a [f32], &'a [f32], usize, &'a mut [f32]);

    impl pulp::WithSimd for Products<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            products(simd, self.0, self.1, self.2, self.3);
        }
    }

    struct Gather<'a>(Weights<'a>, &'a [f32], &'a mut [f32]);

    impl pulp::WithSimd for Gather<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            gather(simd, self.0, self.1, self.2);
        }
    }

    /// Vectors of this machine, and of any other.
    #[derive(Clone, Copy, Debug)]
    enum Width {
        Own,
        One,
        Four,
        Eight,
        Sixteen,
    }

    impl Width {
        const ALL: [Self; 5] = [Self::Own, Self::One, Self::Four, Self::Eight, Self::Sixteen];

        fn run(self, work: impl pulp::WithSimd<Output = ()>) {
            match self {
                Self::Own => pulp::Arch::new().dispatch(work),
                Self::One => work.with_simd(pulp::Scalar),
                Self::Four => work.with_simd(pulp::Scalar128b),
                Self::Eight => work.with_simd(pulp::Scalar256b),
                Self::Sixteen => work.with_simd(pulp::Scalar512b),
            }
        }
    }

    /// Numbers on both sides of zero.
    fn value(i: usize, seed: u32) -> f32 {
        ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8
    }

    fn values(count: usize, seed: u32) -> Vec<f32> {
        (0..count).map(|i| value(i, seed)).collect()
    }

    proptest! {
        #[test]
        fn every_score_is_one_chain_of_fused_additions_along_the_depth(depth in 1usize..40, panels in 1usize..4, count in 1usize..=ROWS, seed in any::<u32>()) {
            let (keys, queries) = (values(panels * depth * PANEL, seed), values(depth * ROWS, seed ^ 77));
            for width in Width::ALL {
                let mut scores = vec![f32::NAN; panels * PANEL * ROWS];
                width.run(Products(&keys, &queries, count, &mut scores));
                for key in 0..panels * PANEL {
                    for query in 0..count {
                        let at = |d: usize| keys[(key / PANEL * depth + d) * PANEL + key % PANEL];
                        let expected = (0..depth).fold(0f32, |sum, d| at(d).mul_add(queries[d * ROWS + query], sum));
                        prop_assert_eq!(scores[key * ROWS + query].to_bits(), expected.to_bits(), "{:?}", width);
                    }
                }
            }
        }

        #[test]
        fn what_is_gathered_is_one_chain_of_fused_additions_along_the_keys(
            first in 0usize..9, keys in 0usize..20, more in 0usize..5, panels in 1usize..4, count in 1usize..=ROWS, seed in any::<u32>()
        ) {
            let height = first + keys + more + 1;
            let weights: Vec<[f32; ROWS]> = (0..height).map(|key| std::array::from_fn(|i| value(key * ROWS + i, seed))).collect();
            let shrink: [f32; ROWS] = std::array::from_fn(|i| value(i, seed ^ 5));
            let (values, held) = (values(panels * height * WIDTH, seed ^ 9), values(panels * ROWS * WIDTH, seed ^ 13));
            for width in Width::ALL {
                let mut found = held.clone();
                let given = Weights { all: &weights, keys: first..first + keys, shrink: &shrink, count };
                width.run(Gather(given, &values, &mut found));
                for (panel, row) in (0..panels).flat_map(|panel| (0..count).map(move |row| (panel, row))) {
                    for column in 0..WIDTH {
                        let place = (panel * ROWS + row) * WIDTH + column;
                        let at = |key: usize| values[(panel * height + key) * WIDTH + column];
                        let begin = shrink[row] * held[place];
                        let expected = (first..first + keys).fold(begin, |sum, key| weights[key][row].mul_add(at(key), sum));
                        prop_assert_eq!(found[place].to_bits(), expected.to_bits(), "{:?}", width);
                    }
                }
            }
        }

        #[test]
        fn a_softmax_in_blocks_is_the_softmax_of_the_whole(
            scores in prop::collection::vec(prop::option::of(-30f32..30.0), 1..200), lane in 0..ROWS, block in 1usize..80
        ) {
            let mut running = Running::EMPTY;
            let mut gathered = 0.0f32;
            let mut exact = (0.0f64, 0.0f64);
            for (index, score) in scores.iter().enumerate() {
                if let Some(score) = score {
                    exact.0 += f64::from(*score).exp();
                    exact.1 += f64::from(*score).exp() * index as f64;
                }
            }
            for (number, scores) in scores.chunks(block).enumerate() {
                // Other lanes have scores that would outweigh everything.
                let mut weights = vec![[80.0; ROWS]; scores.len()];
                for (weights, score) in weights.iter_mut().zip(scores) {
                    weights[lane] = score.unwrap_or(f32::NEG_INFINITY);
                }
                gathered *= running.absorb(&mut weights)[lane];
                gathered += weights.iter().enumerate().map(|(i, weights)| weights[lane] * (number * block + i) as f32).sum::<f32>();
            }
            if exact.0 > 0.0 {
                let (expected, found) = (exact.1 / exact.0, f64::from(gathered / running.sums[lane]));
                prop_assert!((found - expected).abs() < 1e-3 * (1.0 + expected), "{found} {expected}");
            } else {
                prop_assert_eq!(running.sums[lane], 0.0);
            }
        }

        #[test]
        fn masked_keys_change_no_bit(top in -50f32..50.0, sum in 0f32..100.0, keys in 0usize..9) {
            let mut running = Running { tops: [top; ROWS], sums: [sum; ROWS] };
            let mut weights = vec![[f32::NEG_INFINITY; ROWS]; keys];
            let shrink = running.absorb(&mut weights);
            prop_assert_eq!((shrink, running.tops.map(f32::to_bits)), ([1.0; ROWS], [top.to_bits(); ROWS]));
            prop_assert_eq!(running.sums.map(f32::to_bits), [sum.to_bits(); ROWS]);
            prop_assert!(weights.iter().flatten().all(|weight| weight.to_bits() == 0));
        }
    }
}
