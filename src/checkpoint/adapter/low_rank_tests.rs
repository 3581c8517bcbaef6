use proptest::prelude::*;

use super::*;
use crate::checkpoint::fixture::noise;

fn numbers(seed: u64, count: usize) -> Vec<f64> {
    noise(seed).take(count).map(f64::from).collect()
}

/// The formula, element by element.
fn reference(y: &mut [f64], begin: usize, left: &[f64], right: &[f64], [rank, columns]: [usize; 2], scale: f64) {
    for (index, y) in y.iter_mut().enumerate() {
        let (i, j) = ((begin + index) / columns, (begin + index) % columns);
        let sum = (0..rank).fold(0.0, |sum, k| sum + left[i * rank + k] * right[k * columns + j]);
        *y += scale * sum;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_block_has_the_bits_of_the_formula(
        rows in 1_usize..20, columns in 1_usize..40, rank in 1_usize..9, seed: u64, begin in 0.0..1.0_f64, end in 0.0..1.0_f64, transposed: bool,
    ) {
        let (left, right) = (numbers(seed, rows * rank), numbers(seed ^ 1, rank * columns));
        let whole = numbers(seed ^ 2, rows * columns);
        let place = |share: f64| (share * (rows * columns) as f64) as usize;
        let (begin, end) = (place(begin.min(end)), place(begin.max(end)));
        let mut expected = whole[begin..end].to_vec();
        reference(&mut expected, begin, &left, &right, [rank, columns], 1.7);
        let stored = if transposed {
            (0..columns * rank).map(|index| right[index % rank * columns + index / rank]).collect()
        } else {
            right
        };
        let panels = Panels::new(&Elements::F64(stored), rank, columns, transposed);
        let mut found = whole[begin..end].to_vec();
        panels.add(&mut found, begin % columns, &left[begin / columns * rank..], 1.7);
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&found), bits(&expected));
    }
}

#[test]
fn nothing_is_added_to_nothing() {
    let panels = Panels::new(&Elements::F32(Vec::new()), 3, 0, false);
    panels.add(&mut [], 0, &[], 1.0);
}
