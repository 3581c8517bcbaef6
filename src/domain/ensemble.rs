//! What the members say beside the merged model: pure statistics of the prediction ensemble (ENS).
//!
//! Sources: worst-case (WCO) and uncertainty-weighted (UWO) objectives of Coste et al. 2310.02743 (Eqs. 3 and 5, population
//! variance); WARM against ENS of Ramé et al. 2401.12187. Everything is computed in float64 and handed out as float64.

use super::Score;

/// The default weight of the variance in UWO (Coste et al. 2310.02743, §5.2).
pub const DEFAULT_UWO_LAMBDA: f64 = 0.5;

/// The members' rewards of one sample, beside the merged model's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EnsembleStats {
    pub mean: f64,
    pub median: f64,
    /// Worst-case objective (WCO).
    pub min: f64,
    pub max: f64,
    /// Population standard deviation.
    pub std: f64,
    /// Population variance.
    pub variance: f64,
    /// `mean - lambda * variance`.
    pub uwo: f64,
    /// `merged - mean`.
    pub gap: f64,
    /// The member with the lowest reward; the first of equals.
    pub argmin: usize,
}

impl EnsembleStats {
    /// The statistics of at least one member; `None` without members.
    pub fn new(merged: Score, members: &[Score], uwo_lambda: f64) -> Option<Self> {
        let values: Vec<f64> = members.iter().map(|score| f64::from(score.get())).collect();
        let count = values.len() as f64;
        let argmin = (0..values.len()).reduce(|best, i| if values[i] < values[best] { i } else { best })?;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        Some(Self {
            mean,
            median,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            std: variance.sqrt(),
            variance,
            uwo: mean - uwo_lambda * variance,
            gap: f64::from(merged.get()) - mean,
            argmin,
        })
    }
}

/// How the merged model and the ensemble rank the completions of one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupAgreement {
    /// The completion that the merged model puts first; the first of equals.
    pub best_by_merged: usize,
    /// The completion that the ensemble's mean puts first; the first of equals.
    pub best_by_mean: usize,
    /// Rank agreement (Kendall's tau-b) of merged and mean; `None` where it is undefined.
    pub kendall_tau: Option<f64>,
    /// Of each member with the merged model; `None` where it is undefined.
    pub member_kendall_tau: Vec<Option<f64>>,
    /// Per completion: how many members put it first.
    pub votes: Vec<usize>,
}

impl GroupAgreement {
    /// `merged[i]` and `members[m][i]` are the rewards of completion `i`. `None` without completions.
    pub fn new(merged: &[f64], members: &[Vec<f64>]) -> Option<Self> {
        let best_by_merged = argmax(merged)?;
        let mean: Vec<f64> =
            (0..merged.len()).map(|i| members.iter().map(|member| member[i]).sum::<f64>() / members.len() as f64).collect();
        let mut votes = vec![0; merged.len()];
        for member in members {
            if let Some(best) = argmax(member) {
                votes[best] += 1;
            }
        }
        Some(Self {
            best_by_merged,
            best_by_mean: argmax(&mean)?,
            kendall_tau: kendall_tau_b(merged, &mean),
            member_kendall_tau: members.iter().map(|member| kendall_tau_b(merged, member)).collect(),
            votes,
        })
    }
}

/// The unit of merged and member rewards in a comparison, each by its own statistics. Bradley-Terry rewards are free up to
/// a constant, so order statistics over raw members (minimum, UWO) say which member sits lowest, not which is in doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemberScale {
    #[default]
    Raw,
    /// Less the mean.
    Centered,
    /// Less the mean, divided by the standard deviation.
    Standardized,
}

impl MemberScale {
    /// One raw reward in this unit.
    pub fn apply(self, raw: f64, mean: f64, std: f64) -> f64 {
        match self {
            Self::Raw => raw,
            Self::Centered => raw - mean,
            Self::Standardized => (raw - mean) / std,
        }
    }
}

/// What merged model and ensemble say of one preference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairAgreement {
    /// The probability under Bradley-Terry that chosen wins, by the merged model.
    pub p_chosen_merged: f64,
    /// The same by the ensemble's mean.
    pub p_chosen_mean: f64,
    /// Members that put chosen above rejected.
    pub votes: usize,
    /// Whether merged model and mean prefer different answers.
    pub disagree: bool,
}

impl PairAgreement {
    /// `merged` and `mean` are the rewards of chosen and rejected; so is each of `members`.
    pub fn new(merged: [f64; 2], mean: [f64; 2], members: impl IntoIterator<Item = [f64; 2]>) -> Self {
        Self {
            p_chosen_merged: bradley_terry(merged[0], merged[1]),
            p_chosen_mean: bradley_terry(mean[0], mean[1]),
            votes: members.into_iter().filter(|[chosen, rejected]| chosen > rejected).count(),
            disagree: (merged[0] > merged[1]) != (mean[0] > mean[1]),
        }
    }
}

/// The probability under Bradley-Terry that the first of two rewards wins: `sigmoid(first - second)`.
fn bradley_terry(first: f64, second: f64) -> f64 {
    1.0 / (1.0 + (second - first).exp())
}

/// The index of the largest value; the first of equals.
fn argmax(values: &[f64]) -> Option<usize> {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best })
}

/// Kendall's tau-b: `(concordant - discordant) / sqrt((pairs - ties in a) * (pairs - ties in b))`. Undefined (`None`)
/// for fewer than two values and where one side is constant.
pub fn kendall_tau_b(a: &[f64], b: &[f64]) -> Option<f64> {
    let (mut score, mut untied_a, mut untied_b) = (0i64, 0i64, 0i64);
    for i in 0..a.len().min(b.len()) {
        for j in 0..i {
            let (da, db) = (direction(a[i], a[j]), direction(b[i], b[j]));
            score += da * db;
            untied_a += da.abs();
            untied_b += db.abs();
        }
    }
    // One square root of the product keeps the value within [-1, 1] and exactly 1 for equal rankings.
    let scale = (untied_a as f64 * untied_b as f64).sqrt();
    (scale > 0.0).then(|| score as f64 / scale)
}

fn direction(x: f64, y: f64) -> i64 {
    i64::from(x > y) - i64::from(x < y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scores(values: &[f32]) -> Vec<Score> {
        values.iter().map(|&value| Score::try_from(value).expect("finite")).collect()
    }

    #[test]
    fn the_statistics_of_a_worked_example() {
        let members = scores(&[1.0, 4.0, -2.0, 3.0]);
        let stats = EnsembleStats::new(scores(&[2.0])[0], &members, 0.5).expect("members");
        // By hand: sum 6, deviations -0.5, 2.5, -3.5, 1.5, squares 0.25 + 6.25 + 12.25 + 2.25 = 21.
        assert_eq!((stats.mean, stats.median, stats.min, stats.max), (1.5, 2.0, -2.0, 4.0));
        assert_eq!((stats.variance, stats.uwo, stats.gap, stats.argmin), (5.25, 1.5 - 2.625, 0.5, 2));
        assert_eq!(stats.std, 5.25f64.sqrt());
        assert_eq!(EnsembleStats::new(scores(&[2.0])[0], &[], 0.5), None);
    }

    #[test]
    fn ties_go_to_the_lowest_index() {
        let agreement = GroupAgreement::new(&[1.0, 1.0, 0.0], &[vec![0.0, 2.0, 2.0], vec![5.0, 5.0, 5.0]]).expect("completions");
        assert_eq!((agreement.best_by_merged, agreement.best_by_mean), (0, 1));
        assert_eq!(agreement.votes, [1, 1, 0]);
        assert_eq!(agreement.member_kendall_tau[1], None, "a constant ranking agrees with nothing");
    }

    #[test]
    fn kendall_of_a_worked_example_with_ties() {
        // Pairs of a: (1,2) tied; of b: none tied. Concordant 4, discordant 1 of 5 untied pairs; sqrt(5 * 6).
        let tau = kendall_tau_b(&[1.0, 1.0, 2.0, 3.0], &[1.0, 2.0, 4.0, 3.0]).expect("defined");
        assert!((tau - 3.0 / 30f64.sqrt()).abs() < 1e-15, "{tau}");
        assert_eq!(kendall_tau_b(&[1.0], &[2.0]), None);
    }

    #[test]
    fn bradley_terry_is_one_half_for_equals_and_never_nan() {
        assert_eq!(bradley_terry(3.0, 3.0), 0.5);
        assert_eq!(bradley_terry(1e30, -1e30), 1.0);
        assert_eq!(bradley_terry(-1e30, 1e30), 0.0);
    }

    #[test]
    fn a_scale_moves_each_model_by_its_own_statistics() {
        assert_eq!(MemberScale::Raw.apply(7.0, 3.0, 2.0), 7.0);
        assert_eq!(MemberScale::Centered.apply(7.0, 3.0, 2.0), 4.0);
        assert_eq!(MemberScale::Standardized.apply(7.0, 3.0, 2.0), 2.0);
    }

    #[test]
    fn a_pair_is_voted_on_by_every_member() {
        let pair = PairAgreement::new([1.0, 0.0], [-1.0, 0.0], [[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]]);
        assert_eq!((pair.votes, pair.disagree), (1, true), "a tie is no vote");
        assert!((pair.p_chosen_merged - 1.0 / (1.0 + (-1f64).exp())).abs() < 1e-15);
        assert!((pair.p_chosen_merged + pair.p_chosen_mean - 1.0).abs() < 1e-15);
    }

    proptest! {
        #[test]
        fn the_statistics_keep_their_order(values in prop::collection::vec(-1e6f32..1e6, 1..9), merged in -1e6f32..1e6) {
            let stats = EnsembleStats::new(scores(&[merged])[0], &scores(&values), 0.5).expect("members");
            let slack = 1e-6 * (1.0 + stats.max.abs().max(stats.min.abs()));
            prop_assert!(stats.min <= stats.median && stats.median <= stats.max);
            prop_assert!(stats.min <= stats.mean + slack && stats.mean <= stats.max + slack);
            prop_assert!(stats.uwo <= stats.mean);
            prop_assert_eq!(f64::from(values[stats.argmin]), stats.min);
        }

        #[test]
        fn kendall_is_symmetric_and_one_for_itself(values in prop::collection::vec((0u8..5, 0u8..5), 2..12)) {
            let (a, b): (Vec<f64>, Vec<f64>) = values.iter().map(|&(x, y)| (f64::from(x), f64::from(y))).unzip();
            prop_assert_eq!(kendall_tau_b(&a, &b), kendall_tau_b(&b, &a));
            if let Some(own) = kendall_tau_b(&a, &a) {
                prop_assert_eq!(own, 1.0);
            }
        }
    }
}
