//! The choice of experts for every token.

/// The rows that chose one expert, in order, and the weight of each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    pub rows: Vec<u32>,
    pub weights: Vec<f32>,
}

/// For every expert the rows that chose it. `logits` has `experts` columns. A row takes the `per_token` experts of the
/// largest softmax, among equals the one of the lower number; `normalised` makes its weights sum to one.
pub fn route(logits: &[f32], experts: usize, per_token: usize, normalised: bool) -> Vec<Routed> {
    let mut routed = vec![Routed::default(); experts];
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for (row, logits) in logits.chunks_exact(experts.max(1)).enumerate() {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |expert: usize| libm::expf(logits[expert] - top);
        let total: f32 = (0..experts).map(weight).sum();
        order.clear();
        order.extend(0..experts);
        // A stable sort keeps equals in the order of their numbers. NaN sorts as it may: the row's output is NaN anyway.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let chosen = &mut order[..per_token.min(experts)];
        let kept: f32 = if normalised { chosen.iter().map(|expert| weight(*expert) / total).sum() } else { 1.0 };
        for expert in chosen.iter() {
            routed[*expert].rows.push(row as u32);
            routed[*expert].weights.push(weight(*expert) / total / kept);
        }
    }
    routed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_takes_its_largest_and_weights_sum_to_one_where_asked() {
        let logits = [0.0, 2.0, 1.0, 3.0, 3.0, 3.0];
        let plain = route(&logits, 3, 2, false);
        assert_eq!(plain.iter().map(|expert| expert.rows.clone()).collect::<Vec<_>>(), [vec![1], vec![0, 1], vec![0]]);
        let sums = |routed: &[Routed], row: u32| -> f32 {
            let weight = |expert: &Routed| expert.rows.iter().position(|found| *found == row).map_or(0.0, |at| expert.weights[at]);
            routed.iter().map(weight).sum()
        };
        assert!((sums(&plain, 1) - 2.0 / 3.0).abs() < 1e-6);
        let normalised = route(&logits, 3, 2, true);
        assert!((sums(&normalised, 0) - 1.0).abs() < 1e-6);
        let ratio = normalised[1].weights[0] / normalised[2].weights[0];
        assert!((ratio - 1f32.exp()).abs() < 1e-5, "{ratio}");
    }
}
