//! Matrices that are stored the other way round.

use super::{RowKernel, for_rows};

/// Numbers of one line of the processor's cache.
const SIDE: usize = 16;

/// `[rows, columns]` to `[columns, rows]`.
pub fn turned(matrix: &[f32], columns: usize) -> Vec<f32> {
    let mut into = vec![0.0; matrix.len()];
    let rows = matrix.len() / columns.max(1);
    for_rows(&mut into, rows, &Turned { matrix, rows, columns });
    into
}

struct Turned<'a> {
    matrix: &'a [f32],
    rows: usize,
    columns: usize,
}

impl RowKernel for Turned<'_> {
    /// By squares of whole cache lines on both sides: lines that stand a power of two apart drive each other out before they
    /// are full.
    #[inline(always)]
    fn rows(&self, first: usize, into: &mut [f32]) {
        let Self { matrix, rows, columns } = *self;
        for (column, into) in (first..).step_by(SIDE).zip(into.chunks_mut(SIDE * rows)) {
            let width = into.len() / rows;
            for row in (0..rows).step_by(SIDE) {
                let (height, mut square) = (SIDE.min(rows - row), [[0.0; SIDE]; SIDE]);
                for (line, square) in matrix[row * columns..].chunks(columns).zip(&mut square[..height]) {
                    square[..width].copy_from_slice(&line[column..column + width]);
                }
                for (i, into) in into.chunks_exact_mut(rows).enumerate() {
                    for (into, square) in into[row..row + height].iter_mut().zip(&square) {
                        *into = square[i];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_number_stands_where_its_row_and_column_have_changed_places(rows in 0usize..70, columns in 0usize..70, tall in 1usize..20) {
            // Also more than one thread's share.
            let rows = rows * tall;
            let matrix: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let found = turned(&matrix, columns);
            prop_assert_eq!(found.len(), matrix.len());
            for (i, number) in found.into_iter().enumerate() {
                prop_assert_eq!(number, matrix[i % rows * columns + i / rows]);
            }
        }
    }
}
