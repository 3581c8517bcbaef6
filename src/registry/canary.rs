//! The last question before a swap: does the candidate answer, and not too far from the live model? Pure: the answers of
//! both are handed in.
//!
//! Bradley-Terry rewards are free up to a constant, so no value can be right or wrong by itself. What can be held to a
//! bound is the order of the answers (rank correlation), how far their mean moves in units of the live model's own spread
//! (a trainer's baseline and value function feel that), and which answers of known preferences win (accuracy).

use std::fmt;

use serde::Deserialize;

use crate::domain::{Conversation, Moments, Sample, kendall_tau_b};

/// What a candidate is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Probes {
    samples: Vec<Sample>,
    /// Indices of two samples, the first of which should have the higher reward.
    preferences: Vec<(usize, usize)>,
}

/// The most probes: every swap waits for their answers.
pub const MAX_PROBES: usize = 4096;

impl Probes {
    /// At least two samples, at most [`MAX_PROBES`], and preferences among them.
    pub fn new(samples: Vec<Sample>, preferences: Vec<(usize, usize)>) -> Result<Self, String> {
        if !(2..=MAX_PROBES).contains(&samples.len()) {
            return Err(format!("expected 2 to {MAX_PROBES} samples, found {}", samples.len()));
        }
        match preferences.iter().find(|(better, worse)| samples.len() <= *better.max(worse)) {
            Some(pair) => Err(format!("preference {pair:?} names a sample beyond the last")),
            None => Ok(Self { samples, preferences }),
        }
    }

    /// A few short conversations and texts, good answers and bad ones. They carry no preferences: what a good answer is, is
    /// for the operator's own file to say.
    pub fn bundled() -> Self {
        #[derive(Deserialize)]
        struct Line {
            prompt: String,
            answers: Vec<String>,
        }
        let lines: Vec<Line> = include_str!("probes.jsonl").lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let conversations = lines.iter().flat_map(|line| {
            line.answers.iter().map(|answer| Sample::Conversation(Conversation::user(line.prompt.clone()).answered(answer.clone())))
        });
        // A model without a chat template reads only these.
        let texts = lines.iter().flat_map(|line| line.answers.iter().take(2)).map(|answer| Sample::Text(answer.clone()));
        Self { samples: conversations.chain(texts).collect(), preferences: Vec::new() }
    }

    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    pub fn preferences(&self) -> &[(usize, usize)] {
        &self.preferences
    }
}

/// How far a candidate may be from the live model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CanaryBounds {
    /// Kendall's tau-b of candidate and live over the probes, at least.
    pub min_rank_correlation: f64,
    /// How far the mean may move, in standard deviations of the live answers.
    pub max_mean_shift: f64,
    /// How much of the live model's accuracy on the preferences may be lost.
    pub max_accuracy_drop: f64,
    /// Accuracy on the preferences, at least, whatever the live model's is.
    pub min_accuracy: f64,
}

impl Default for CanaryBounds {
    fn default() -> Self {
        Self { min_rank_correlation: 0.5, max_mean_shift: 2.0, max_accuracy_drop: 0.1, min_accuracy: 0.0 }
    }
}

/// One model's answers: `None` where it cannot read a probe (too long, or no template for it), else its raw reward, which
/// may be NaN or infinite.
pub type Answers = Vec<Option<f32>>;

/// What was found. Absent figures are undefined: nothing is live to compare with, or one side is constant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Probes that were answered.
    pub answered: usize,
    /// Population standard deviation of the candidate's answers.
    pub spread: Option<f64>,
    pub rank_correlation: Option<f64>,
    pub mean_shift: Option<f64>,
    pub accuracy: Option<f64>,
    pub live_accuracy: Option<f64>,
}

impl Figures {
    /// Every figure with its name in metrics.
    pub fn named(&self) -> [(&'static str, Option<f64>); 6] {
        [
            ("answered", Some(self.answered as f64)),
            ("spread", self.spread),
            ("rank_correlation", self.rank_correlation),
            ("mean_shift", self.mean_shift),
            ("accuracy", self.accuracy),
            ("live_accuracy", self.live_accuracy),
        ]
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} probes answered", self.answered)?;
        for (name, value) in self.named().into_iter().skip(1) {
            if let Some(value) = value {
                write!(f, ", {} {value:.4}", name.replace('_', " "))?;
            }
        }
        Ok(())
    }
}

/// A candidate that is not good enough, with the figures.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the canary refuses it: {} ({figures})", .problems.join("; "))]
pub struct CanaryError {
    pub problems: Vec<String>,
    pub figures: Figures,
}

/// Holds the candidate's answers against the bounds and, where there is one, the live model's answers to the same probes.
pub fn examine(
    candidate: &[Option<f32>],
    live: Option<&[Option<f32>]>,
    preferences: &[(usize, usize)],
    bounds: &CanaryBounds,
) -> Result<Figures, CanaryError> {
    let mut problems = Vec::new();
    let answers: Vec<f64> = candidate.iter().flatten().map(|&reward| f64::from(reward)).collect();
    let mut figures = Figures { answered: answers.len(), ..Figures::default() };
    if answers.is_empty() {
        problems.push("it can read none of the probes".to_owned());
    }
    let non_finite = answers.iter().filter(|reward| !reward.is_finite()).count();
    if non_finite > 0 {
        problems.push(format!("{non_finite} of {} answers are not finite", answers.len()));
        return Err(CanaryError { problems, figures });
    }
    let moments = Moments::of(answers.iter().copied());
    figures.spread = moments.std();
    if let (Some(mean), Some(std)) = (moments.mean(), moments.std())
        && answers.len() > 1
        && std <= 1e-7 * (1.0 + mean.abs())
    {
        problems.push(format!("it gives every probe the same reward, {mean}"));
    }
    figures.accuracy = accuracy(candidate, preferences);
    if let Some(accuracy) = figures.accuracy.filter(|accuracy| *accuracy < bounds.min_accuracy) {
        problems.push(format!("accuracy on the preferences is {accuracy:.4}, expected at least {}", bounds.min_accuracy));
    }
    if let Some(live) = live {
        beside(candidate, live, preferences, bounds, &mut figures, &mut problems);
    }
    if problems.is_empty() { Ok(figures) } else { Err(CanaryError { problems, figures }) }
}

fn beside(
    candidate: &[Option<f32>],
    live: &[Option<f32>],
    preferences: &[(usize, usize)],
    bounds: &CanaryBounds,
    figures: &mut Figures,
    problems: &mut Vec<String>,
) {
    let lost = candidate.iter().zip(live).filter(|(candidate, live)| candidate.is_none() && live.is_some()).count();
    if lost > 0 {
        problems.push(format!("it cannot read {lost} probes that the live model reads"));
    }
    let finite = |reward: &Option<f32>| reward.map(f64::from).filter(|reward| reward.is_finite());
    let both: (Vec<f64>, Vec<f64>) =
        candidate.iter().zip(live).filter_map(|(candidate, live)| Some((finite(candidate)?, finite(live)?))).unzip();
    let (new, old) = (Moments::of(both.0.iter().copied()), Moments::of(both.1.iter().copied()));
    if let (Some(new), Some(old), Some(std)) = (new.mean(), old.mean(), old.std().filter(|std| *std > 0.0)) {
        figures.mean_shift = Some((new - old).abs() / std);
    }
    figures.rank_correlation = kendall_tau_b(&both.0, &both.1);
    figures.live_accuracy = accuracy(live, preferences);
    if let Some(tau) = figures.rank_correlation.filter(|tau| *tau < bounds.min_rank_correlation) {
        problems.push(format!("rank correlation with the live model is {tau:.4}, expected at least {}", bounds.min_rank_correlation));
    }
    if let Some(shift) = figures.mean_shift.filter(|shift| *shift > bounds.max_mean_shift) {
        let most = bounds.max_mean_shift;
        problems.push(format!("the mean moves by {shift:.4} standard deviations of the live model, expected at most {most}"));
    }
    if let (Some(new), Some(old)) = (figures.accuracy, figures.live_accuracy)
        && old - new > bounds.max_accuracy_drop
    {
        let most = bounds.max_accuracy_drop;
        problems.push(format!("accuracy on the preferences falls from {old:.4} to {new:.4}, expected a loss of at most {most}"));
    }
}

/// The share of preferences in which the better answer has the higher reward; a tie counts half. `None` without any whose
/// two answers have one.
fn accuracy(answers: &[Option<f32>], preferences: &[(usize, usize)]) -> Option<f64> {
    let reward = |index: usize| answers.get(index).copied().flatten();
    let (won, count) = preferences
        .iter()
        .filter_map(|&(better, worse)| reward(better)?.partial_cmp(&reward(worse)?))
        .fold((0.0, 0.0), |(won, count), order| (won + f64::from(order as i8 + 1) / 2.0, count + 1.0));
    (count > 0.0).then(|| won / count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some(values: &[f32]) -> Answers {
        values.iter().copied().map(Some).collect()
    }

    fn problem(result: Result<Figures, CanaryError>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn the_bundled_probes_are_all_there() {
        let probes = Probes::bundled();
        assert_eq!((probes.samples().len(), probes.preferences().len()), (14 * 3 + 14 * 2, 0));
        assert_eq!(include_str!("probes.jsonl").lines().count(), 14);
        assert!(Probes::new(vec![Sample::Text("a".into())], vec![]).is_err());
        assert!(Probes::new(vec![Sample::Text("a".into()); 2], vec![(0, 2)]).is_err());
    }

    #[test]
    fn a_candidate_must_answer_with_finite_numbers_that_differ() {
        let bounds = CanaryBounds::default();
        assert!(problem(examine(&[None, None], None, &[], &bounds)).contains("none of the probes"));
        assert!(problem(examine(&some(&[1.0, f32::NAN]), None, &[], &bounds)).contains("1 of 2 answers are not finite"));
        assert!(problem(examine(&some(&[1.0, f32::INFINITY]), None, &[], &bounds)).contains("not finite"));
        assert!(problem(examine(&some(&[0.5; 4]), None, &[], &bounds)).contains("the same reward"));
        let figures = examine(&some(&[0.0, 2.0]), None, &[], &bounds).expect("fine");
        assert_eq!(figures, Figures { answered: 2, spread: Some(1.0), ..Figures::default() });
    }

    #[test]
    fn a_candidate_that_ranks_otherwise_is_refused_with_the_figure() {
        let live = some(&[1.0, 2.0, 3.0, 4.0]);
        let bounds = CanaryBounds { max_mean_shift: 100.0, ..CanaryBounds::default() };
        let words = problem(examine(&some(&[4.0, 3.0, 2.0, 1.0]), Some(&live), &[], &bounds));
        assert!(words.contains("rank correlation with the live model is -1.0000, expected at least 0.5"), "{words}");
        // One swapped pair of six: (5 - 1) / 6.
        let figures = examine(&some(&[2.0, 1.0, 3.0, 4.0]), Some(&live), &[], &bounds).expect("near enough");
        assert_eq!(figures.rank_correlation, Some(4.0 / 6.0));
    }

    #[test]
    fn a_mean_that_moves_is_measured_by_the_live_spread() {
        // Live: mean 2, standard deviation 1.
        let live = some(&[1.0, 3.0]);
        let bounds = CanaryBounds::default();
        assert_eq!(examine(&some(&[3.0, 5.0]), Some(&live), &[], &bounds).expect("at the bound").mean_shift, Some(2.0));
        let words = problem(examine(&some(&[3.5, 5.5]), Some(&live), &[], &bounds));
        assert!(words.contains("moves by 2.5000 standard deviations"), "{words}");
    }

    #[test]
    fn preferences_that_are_lost_refuse_the_candidate() {
        let preferences = [(0, 1), (2, 3)];
        let live = some(&[2.0, 1.0, 4.0, 3.0]);
        let bounds = CanaryBounds { min_rank_correlation: -1.0, ..CanaryBounds::default() };
        let words = problem(examine(&some(&[1.0, 2.0, 4.0, 3.0]), Some(&live), &preferences, &bounds));
        assert!(words.contains("falls from 1.0000 to 0.5000"), "{words}");
        let strict = CanaryBounds { min_accuracy: 0.75, ..bounds };
        assert!(problem(examine(&some(&[1.0, 2.0, 4.0, 3.0]), None, &preferences, &strict)).contains("expected at least 0.75"));
        // A tie is half a preference.
        let figures = examine(&some(&[2.0, 2.0, 4.0, 3.0]), None, &preferences, &strict).expect("three quarters");
        assert_eq!(figures.accuracy, Some(0.75));
    }

    #[test]
    fn a_probe_that_only_the_live_model_reads_is_a_problem_and_the_other_way_round_is_none() {
        let bounds = CanaryBounds::default();
        let (less, more) = (vec![Some(1.0), Some(2.0), None], some(&[1.0, 2.0, 3.0]));
        assert!(problem(examine(&less, Some(&more), &[], &bounds)).contains("cannot read 1 probes"));
        assert!(examine(&more, Some(&less), &[], &bounds).is_ok());
    }

    proptest! {
        #[test]
        fn a_model_always_passes_beside_itself(values in prop::collection::vec(-1e3f32..1e3, 2..30)) {
            let answers = some(&values);
            let result = examine(&answers, Some(&answers), &[(0, 1)], &CanaryBounds::default());
            match result {
                Ok(figures) => {
                    prop_assert_eq!(figures.mean_shift, Some(0.0));
                    prop_assert!(figures.rank_correlation.is_none_or(|tau| tau == 1.0));
                    prop_assert_eq!(figures.accuracy, figures.live_accuracy);
                }
                Err(error) => prop_assert!(error.problems[0].contains("the same reward"), "{}", error),
            }
        }

        #[test]
        fn shift_and_scale_of_the_candidate_leave_its_ranks(values in prop::collection::vec(-100i16..100, 2..30), shift in -4i16..4, scale in 1i16..4) {
            let live: Answers = values.iter().map(|&value| Some(f32::from(value))).collect();
            let candidate: Answers = values.iter().map(|&value| Some(f32::from(value) * f32::from(scale) + f32::from(shift))).collect();
            let loose = CanaryBounds { max_mean_shift: f64::INFINITY, ..CanaryBounds::default() };
            if let Ok(figures) = examine(&candidate, Some(&live), &[], &loose) {
                prop_assert!(figures.rank_correlation.is_none_or(|tau| tau == 1.0));
            }
        }

        #[test]
        fn no_answers_make_it_panic(
            candidate in prop::collection::vec(prop::option::of(any::<f32>()), 0..8),
            live in prop::option::of(prop::collection::vec(prop::option::of(any::<f32>()), 0..8)),
            preferences in prop::collection::vec((0usize..9, 0usize..9), 0..5),
        ) {
            let result = examine(&candidate, live.as_deref(), &preferences, &CanaryBounds::default());
            let finite = candidate.iter().flatten().all(|reward| reward.is_finite());
            prop_assert!(finite || result.is_err());
        }
    }
}
