//! Products with the narrow factors of an adapter, row by row: `[rows, depth]` times `[depth, columns]`.
//!
//! A matrix product of crate gemm this narrow would take orders of additions that depend on the number of rows. Here every
//! number is one chain of fused multiply-adds along the depth, whatever rows stand beside it, so a score depends on no
//! company, and no factor is padded to more than a few vectors.

use pulp::Simd;
use rayon::prelude::*;

/// Rows of a tile: with two vectors each, the sums of a product fill the sixteen registers of AVX2 and keep the units of
/// AVX-512 busy.
const ROWS: usize = 6;
/// The widths of factors are multiples of two of the widest vectors.
const WIDTH: usize = 32;

/// Steps along the depth that are taken for all rows of a task before the next ones: so much of the factor stays in a
/// core's cache.
const PANEL: usize = 512;
/// Columns of an outcome that are computed before they are added to where they belong.
const BLOCK: usize = 8 * WIDTH;
/// Rows of one task, at least: fewer do not make up for loading the factor.
const TASK: usize = 4 * ROWS;

/// Columns of a factor with its padding.
pub fn padded(columns: usize) -> usize {
    columns.next_multiple_of(WIDTH)
}

/// A matrix of which some rows are read: `stride` numbers apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// A factor: `[depth, width]` with a width that [`padded`] gave.
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    pub values: &'a [f32],
    pub width: usize,
}

impl Factor<'_> {
    fn depth(&self) -> usize {
        self.values.len() / self.width.max(1)
    }
}

/// `x F` of so many rows, which are as wide as the factor with its padding.
pub fn project(x: Rows, count: usize, factor: Factor) -> Vec<f32> {
    let mut output = vec![0.0; count * factor.width];
    if factor.width > 0 {
        let step = rows_of_a_task(count);
        let tasks = output.par_chunks_mut(step * factor.width).enumerate();
        tasks.for_each(|(task, output)| pulp::Arch::new().dispatch(Project { x: from(x, task * step), factor, output }));
    }
    output
}

/// `y += x F` on the columns of `y` from `first` on, `columns` of them; the rows of `y` are `stride` apart.
pub fn add(x: Rows, factor: Factor, y: &mut [f32], stride: usize, first: usize, columns: usize) {
    let Some(count) = y.len().checked_div(stride) else { return };
    let step = rows_of_a_task(count);
    let tasks = y.par_chunks_mut(step * stride).enumerate();
    tasks.for_each(|(task, y)| pulp::Arch::new().dispatch(Add { x: from(x, task * step), factor, y, stride, first, columns }));
}

/// Several tasks a thread, so that a thread that was interrupted does not hold up the rest.
fn rows_of_a_task(count: usize) -> usize {
    count.div_ceil(4 * rayon::current_num_threads().max(1)).next_multiple_of(ROWS).max(TASK)
}

fn from(x: Rows, row: usize) -> Rows {
    Rows { values: &x.values[row * x.stride..], stride: x.stride }
}

struct Project<'a> {
    x: Rows<'a>,
    factor: Factor<'a>,
    output: &'a mut [f32],
}

impl pulp::WithSimd for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, factor, output } = self;
        let depth = factor.depth();
        for begin in (0..depth).step_by(PANEL) {
            let steps = PANEL.min(depth - begin);
            let panel = Rows { values: &factor.values[begin * factor.width..], stride: factor.width };
            for (tile, sums) in output.chunks_mut(ROWS * factor.width).enumerate() {
                let rows = Rows { values: &x.values[tile * ROWS * x.stride + begin..], stride: x.stride };
                if sums.len() == ROWS * factor.width {
                    multiply_add(simd, rows, panel, steps, sums, factor.width);
                    continue;
                }
                // The last rows among rows of zeros: a tile is whole.
                let mut some = vec![0.0; ROWS * factor.width];
                some[..sums.len()].copy_from_slice(sums);
                let (padded, stride) = whole_tile(rows, sums.len() / factor.width, steps);
                multiply_add(simd, Rows { values: &padded, stride }, panel, steps, &mut some, factor.width);
                sums.copy_from_slice(&some[..sums.len()]);
            }
        }
    }
}

struct Add<'a> {
    x: Rows<'a>,
    factor: Factor<'a>,
    y: &'a mut [f32],
    stride: usize,
    first: usize,
    columns: usize,
}

impl pulp::WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, factor, y, stride, first, columns } = self;
        let depth = factor.depth();
        let mut sums = vec![0.0; ROWS * BLOCK];
        for begin in (0..columns).step_by(BLOCK) {
            let (real, width) = (BLOCK.min(columns - begin), BLOCK.min(factor.width - begin));
            let block = Rows { values: &factor.values[begin..], stride: factor.width };
            for (tile, y) in y.chunks_mut(ROWS * stride).enumerate() {
                let rows = Rows { values: &x.values[tile * ROWS * x.stride..], stride: x.stride };
                let sums = &mut sums[..ROWS * width];
                sums.fill(0.0);
                let count = y.len() / stride;
                if count == ROWS {
                    multiply_add(simd, rows, block, depth, sums, width);
                } else {
                    let (padded, stride) = whole_tile(rows, count, depth);
                    multiply_add(simd, Rows { values: &padded, stride }, block, depth, sums, width);
                }
                for (y, sums) in y.chunks_exact_mut(stride).zip(sums.chunks_exact(width)) {
                    for (y, sum) in y[first + begin..][..real].iter_mut().zip(sums) {
                        *y += sum;
                    }
                }
            }
        }
    }
}

/// The first `depth` numbers of some rows, and rows of zeros behind them.
fn whole_tile(rows: Rows, count: usize, depth: usize) -> (Vec<f32>, usize) {
    let mut padded = vec![0.0; ROWS * depth];
    for (row, padded) in padded.chunks_exact_mut(depth.max(1)).enumerate().take(count) {
        padded.copy_from_slice(&rows.values[row * rows.stride..][..depth]);
    }
    (padded, depth)
}

/// `c += a b`: `a` is `[ROWS, depth]`, `b` is `[depth, stride]` of rows that may be wider, and `c` is `[ROWS, stride]` with a
/// stride that is a multiple of [`WIDTH`].
#[inline(always)]
fn multiply_add<S: Simd>(simd: S, a: Rows, b: Rows, depth: usize, c: &mut [f32], stride: usize) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(i: usize, seed: u32) -> f32 {
        ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8
    }

    /// `[depth, padded(columns)]` of a matrix without padding.
    fn factor(depth: usize, columns: usize, seed: u32) -> Vec<f32> {
        let width = padded(columns);
        (0..depth * width).map(|i| if i % width < columns { value(i, seed) } else { 0.0 }).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn every_number_is_one_chain_over_the_depth_whatever_rows_stand_beside_it(
            rows in 1usize..60, depth in prop_oneof![1usize..40, 500usize..1100], columns in 1usize..300, wider in 0usize..5, threads in 1usize..4, seed in any::<u32>()
        ) {
            let stride = depth + wider;
            let x: Vec<f32> = (0..rows * stride).map(|i| value(i, seed ^ 7)).collect();
            let (values, width) = (factor(depth, columns, seed), padded(columns));
            let factor = Factor { values: &values, width };
            let chain = |row: usize, column: usize| {
                (0..depth).fold(0f32, |sum, k| x[row * stride + k].mul_add(values[k * width + column], sum))
            };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let projected = pool.install(|| project(Rows { values: &x, stride }, rows, factor));
            let (outer, first) = (columns + 9, 4);
            let before: Vec<f32> = (0..rows * outer).map(|i| value(i, seed ^ 99)).collect();
            let mut after = before.clone();
            pool.install(|| add(Rows { values: &x, stride }, factor, &mut after, outer, first, columns));
            for row in 0..rows {
                for column in 0..width {
                    let expected = if column < columns { chain(row, column) } else { 0.0 };
                    prop_assert_eq!(projected[row * width + column].to_bits(), expected.to_bits());
                }
                for column in 0..outer {
                    let inside = (first..first + columns).contains(&column);
                    let more = if inside { chain(row, column - first) } else { 0.0 };
                    prop_assert_eq!(after[row * outer + column].to_bits(), (before[row * outer + column] + more).to_bits());
                }
            }
        }
    }
}
