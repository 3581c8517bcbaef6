//! A low-rank product, added to a block of a wide matrix: `y_ij += s · Σ_k left_ik · right_kj`, in float64.
//!
//! The sum runs over `k` in order from zero, and every product and sum is rounded by itself, so an element has the same
//! bits whatever block it is computed in, and on every machine, whatever vectors that has.

use pulp::{Simd, WithSimd};

use super::super::Elements;

/// Columns that are computed together, in one to eight vectors.
const PANEL: usize = 8;
/// Rows that are computed together: with AVX2 twelve sums, two vectors of the panel and one number fill the sixteen
/// registers; with AVX-512 the sums of six rows hide the latency of an addition.
const ROWS: usize = 6;

/// The right-hand matrix `[rank, columns]`, in panels of eight columns: a panel holds its rows one after the other, so that
/// the innermost loop reads memory in order. Columns beyond the last are zero.
#[derive(Debug)]
pub struct Panels {
    rank: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Panels {
    /// From a matrix that is stored as `[rank, columns]`, or as `[columns, rank]` if it is `transposed`.
    pub fn new(stored: &Elements, rank: usize, columns: usize, transposed: bool) -> Self {
        let mut wide = vec![0.0; stored.len()];
        stored.widen(0..stored.len(), &mut wide);
        let mut values = vec![0.0; columns.div_ceil(PANEL) * rank * PANEL];
        let mut put = |k: usize, column: usize, value: f64| {
            if let Some(place) = values.get_mut((column / PANEL * rank + k) * PANEL + column % PANEL) {
                *place = value;
            }
        };
        if transposed {
            for (column, row) in wide.chunks_exact(rank.max(1)).enumerate() {
                row.iter().enumerate().for_each(|(k, &value)| put(k, column, value));
            }
        } else {
            for (k, row) in wide.chunks_exact(columns.max(1)).enumerate() {
                row.iter().enumerate().for_each(|(column, &value)| put(k, column, value));
            }
        }
        Self { rank, columns, values }
    }

    /// Bytes of such panels.
    pub fn bytes(rank: usize, columns: usize) -> u64 {
        (columns.next_multiple_of(PANEL) * rank * size_of::<f64>()) as u64
    }

    /// Adds to elements of a `[_, columns]` matrix: `block` begins at column `begin` of some row and goes on row by row.
    /// `left` holds `rank` numbers for each of the rows that it touches.
    pub fn add(&self, block: &mut [f64], begin: usize, left: &[f64], scale: f64) {
        if self.columns > 0 && self.rank > 0 {
            pulp::Arch::new().dispatch(Add { panels: self, rows: self.rows(block, begin), left, scale });
        }
    }

    /// The touched rows of a block, each with the column at which it begins.
    fn rows<'b>(&self, block: &'b mut [f64], begin: usize) -> Vec<Row<'b>> {
        let (head, rest) = block.split_at_mut(block.len().min(self.columns.saturating_sub(begin)));
        let rest = rest.chunks_mut(self.columns).map(|part| Row { begin: 0, part });
        [Row { begin, part: head }].into_iter().chain(rest).filter(|row| !row.part.is_empty()).collect()
    }
}

struct Row<'b> {
    begin: usize,
    part: &'b mut [f64],
}

impl Row<'_> {
    /// The eight elements that begin at `column`, if all of them are here.
    #[inline(always)]
    fn panel(&mut self, column: usize) -> Option<&mut [f64]> {
        let first = column.checked_sub(self.begin)?;
        self.part.get_mut(first..first + PANEL)
    }

    /// As many of the eight elements that begin at `column` as are here, with their places among the eight.
    fn rest_of_panel(&mut self, column: usize) -> impl Iterator<Item = (usize, &mut f64)> {
        let begin = self.begin;
        let first = column.saturating_sub(begin).min(self.part.len());
        let last = (column + PANEL).saturating_sub(begin).min(self.part.len());
        let place = begin.saturating_sub(column);
        self.part[first..last].iter_mut().enumerate().map(move |(index, y)| (place + index, y))
    }
}

struct Add<'a> {
    panels: &'a Panels,
    rows: Vec<Row<'a>>,
    left: &'a [f64],
    scale: f64,
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match PANEL * size_of::<f64>() / size_of::<S::f64s>() {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            4 => self.run::<S, 4>(simd),
            _ => self.run::<S, PANEL>(simd),
        }
    }
}

impl Add<'_> {
    /// With `N` vectors a panel.
    #[inline(always)]
    fn run<S: Simd, const N: usize>(mut self, simd: S) {
        let Self { panels, left, scale, .. } = self;
        for (rows, left) in self.rows.chunks_mut(ROWS).zip(left.chunks(ROWS * panels.rank)) {
            // A tile of more rows than there are costs less than one more tile.
            match rows.len() {
                0..=2 => add_tile::<S, N, 2>(simd, panels, rows, left, scale),
                3 | 4 => add_tile::<S, N, 4>(simd, panels, rows, left, scale),
                _ => add_tile::<S, N, ROWS>(simd, panels, rows, left, scale),
            }
        }
    }
}

/// At most `R` rows.
#[inline(always)]
fn add_tile<S: Simd, const N: usize, const R: usize>(simd: S, panels: &Panels, rows: &mut [Row], left: &[f64], scale: f64) {
    // The rows' numbers side by side for each k, as the innermost loop takes them.
    let mut tile = vec![[0.0; R]; panels.rank];
    for (r, row) in left.chunks_exact(panels.rank).enumerate().take(R) {
        tile.iter_mut().zip(row).for_each(|(tile, &number)| tile[r] = number);
    }
    let size = panels.rank * PANEL;
    let begin = rows.iter().map(|row| row.begin).min().unwrap_or_default() / PANEL;
    let end = rows.iter().map(|row| row.begin + row.part.len()).max().unwrap_or_default().div_ceil(PANEL);
    let scale = simd.splat_f64s(scale);
    for (panel, right) in panels.values.chunks_exact(size).enumerate().take(end).skip(begin) {
        let mut sums = [[simd.splat_f64s(0.0); N]; R];
        for (left, right) in tile.iter().zip(S::as_simd_f64s(right).0.as_chunks::<N>().0) {
            for (sums, &left) in sums.iter_mut().zip(left) {
                let left = simd.splat_f64s(left);
                for (sum, &right) in sums.iter_mut().zip(right) {
                    *sum = simd.add_f64s(*sum, simd.mul_f64s(left, right));
                }
            }
        }
        for (row, sums) in rows.iter_mut().zip(&sums) {
            let terms = sums.map(|sum| simd.mul_f64s(scale, sum));
            if let Some(whole) = row.panel(panel * PANEL) {
                let (y, _) = S::as_mut_simd_f64s(whole);
                y.iter_mut().zip(terms).for_each(|(y, term)| *y = simd.add_f64s(*y, term));
            } else {
                let mut apart = [0.0; PANEL];
                S::as_mut_simd_f64s(&mut apart).0.iter_mut().zip(terms).for_each(|(into, term)| *into = term);
                row.rest_of_panel(panel * PANEL).for_each(|(place, y)| *y += apart[place]);
            }
        }
    }
}

#[cfg(test)]
#[path = "low_rank_tests.rs"]
mod tests;
