//! The choice of experts for every token.

use rayon::prelude::*;

use super::math::exp;
use super::{Vectorised, vectorised};

/// Rows of one task.
const ROWS: usize = 256;

/// How rows choose.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// How many there are to choose from.
    pub experts: usize,
    /// How many a row takes, at most as many as there are.
    pub per_token: usize,
    /// Whether the weights of those that a row takes sum to one.
    pub normalised: bool,
}

impl Choice {
    /// How many experts a row takes.
    pub fn chosen(&self) -> usize {
        self.per_token.min(self.experts)
    }
}

/// The rows that chose one expert, in order, and the weight of each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    pub rows: Vec<u32>,
    pub weights: Vec<f32>,
}

/// For every expert the rows that chose it. `logits` has a column for each. A row takes the experts of the largest softmax,
/// among equals the one of the lower number.
pub fn route(logits: &[f32], choice: Choice) -> Vec<Routed> {
    let (width, chosen) = (choice.experts.max(1), choice.chosen());
    let mut routed = vec![Routed::default(); choice.experts];
    if chosen == 0 {
        return routed;
    }
    let mut taken = vec![(0, 0.0); logits.len() / width * chosen];
    let tasks = taken.par_chunks_mut(ROWS * chosen).zip(logits.par_chunks(ROWS * width));
    tasks.for_each(|(taken, logits)| vectorised(Choose { choice, logits, taken }));
    for (row, taken) in taken.chunks_exact(chosen).enumerate() {
        for (expert, weight) in taken {
            routed[*expert].rows.push(row as u32);
            routed[*expert].weights.push(*weight);
        }
    }
    routed
}

/// Some rows: their logits, and the experts that each takes with its weights of them.
struct Choose<'a> {
    choice: Choice,
    logits: &'a [f32],
    taken: &'a mut [(usize, f32)],
}

impl Vectorised for Choose<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { choice, logits, taken } = self;
        let mut weights = vec![0.0f32; choice.experts];
        for (logits, taken) in logits.chunks_exact(choice.experts).zip(taken.chunks_exact_mut(choice.chosen())) {
            let top = logits.iter().fold(f32::NEG_INFINITY, |top, logit| if *logit > top { *logit } else { top });
            for (weight, logit) in weights.iter_mut().zip(logits) {
                *weight = exp(logit - top);
            }
            largest(logits, taken);
            // A number that is none makes all weights of its row none, as it does in transformers.
            let total: f32 = weights.iter().sum();
            let kept: f32 = taken.iter().map(|(expert, _)| weights[*expert] / total).sum();
            let kept = if choice.normalised { kept } else { 1.0 };
            for (expert, weight) in taken {
                *weight = weights[*expert] / total / kept;
            }
        }
    }
}

/// Finds the largest of some numbers, in any order: `found` gets where they are. Of equals the first is taken. A NaN is larger or
/// smaller than all numbers, by its sign: what comes of it is a NaN anyway.
#[inline(always)]
fn largest(numbers: &[f32], found: &mut [(usize, f32)]) {
    let mut held = 0;
    for (index, number) in numbers.iter().enumerate() {
        // In falling order; one more goes in front of those that it is larger than.
        let place = found[..held].iter().rposition(|(_, other)| number.total_cmp(other).is_le()).map_or(0, |before| before + 1);
        if place == found.len() {
            continue;
        }
        held = found.len().min(held + 1);
        found[place..held].rotate_right(1);
        found[place] = (index, *number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Choice = Choice { experts: 3, per_token: 2, normalised: false };

    #[test]
    fn every_row_takes_its_largest_and_weights_sum_to_one_where_asked() {
        let logits = [0.0, 2.0, 1.0, 3.0, 3.0, 3.0];
        let plain = route(&logits, PLAIN);
        assert_eq!(plain.iter().map(|expert| expert.rows.clone()).collect::<Vec<_>>(), [vec![1], vec![0, 1], vec![0]]);
        let sums = |routed: &[Routed], row: u32| -> f32 {
            let weight = |expert: &Routed| expert.rows.iter().position(|found| *found == row).map_or(0.0, |at| expert.weights[at]);
            routed.iter().map(weight).sum()
        };
        assert!((sums(&plain, 1) - 2.0 / 3.0).abs() < 1e-6);
        let normalised = route(&logits, Choice { normalised: true, ..PLAIN });
        assert!((sums(&normalised, 0) - 1.0).abs() < 1e-6);
        let ratio = normalised[1].weights[0] / normalised[2].weights[0];
        assert!((ratio - 1f32.exp()).abs() < 1e-5, "{ratio}");
    }

    proptest! {
        #[test]
        fn rows_choose_as_a_stable_sort_would(
            // Coarse numbers, so that many are equal; some are no numbers.
            rows in prop::collection::vec(prop::collection::vec(prop_oneof![20 => (-8i32..8).prop_map(|x| x as f32 / 2.0), 1 => Just(f32::NAN)], 7), 0..600),
            per_token in 0usize..9, normalised in any::<bool>()
        ) {
            let choice = Choice { experts: 7, per_token, normalised };
            let routed = route(&rows.concat(), choice);
            prop_assert_eq!(routed.len(), 7);
            for (row, logits) in rows.iter().enumerate() {
                let mut order: Vec<usize> = (0..7).collect();
                order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
                let chosen = &order[..per_token.min(7)];
                let share = |expert: usize| (0..7).map(|other| f64::from(logits[other] - logits[expert]).exp()).sum::<f64>().recip();
                let kept: f64 = if normalised { chosen.iter().map(|expert| share(*expert)).sum() } else { 1.0 };
                for (expert, routed) in routed.iter().enumerate() {
                    let found = routed.rows.iter().position(|found| *found as usize == row);
                    prop_assert_eq!(found.is_some(), chosen.contains(&expert));
                    let Some(found) = found else { continue };
                    let (weight, expected) = (f64::from(routed.weights[found]), share(expert) / kept);
                    prop_assert!(expected.is_nan() && weight.is_nan() || (weight - expected).abs() < 1e-6, "{} and {}", weight, expected);
                }
            }
        }
    }
}
