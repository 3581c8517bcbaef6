//! What the watch counts, and over which time. Pure: the time comes in as an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::counts::{Counts, LENGTH_BOUNDS, REWARD_BOUNDS};
use crate::domain::{JointMoments, Moments, kendall_tau_b};

/// One scored sample, as the watch sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Raw.
    pub reward: f64,
    pub tokens: usize,
    pub truncated: bool,
}

/// What the members said of some samples of one prompt, or of a sample alone, beside the merged model. Rewards are centred:
/// each model's own mean is taken off, since Bradley-Terry rewards are free up to a constant.
#[derive(Clone, Debug, PartialEq)]
pub struct Shadowed {
    /// Per sample: the merged model, and every member.
    pub samples: Vec<(f64, Vec<f64>)>,
}

/// Sums over some time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Lengths in tokens, and raw rewards.
    pub lengths_and_rewards: JointMoments,
    pub rewards: Counts,
    pub lengths: Counts,
    pub truncated: u64,
    /// Samples whose model output was not finite.
    pub non_finite: u64,
    /// Spread of the members, of each sample.
    pub member_std: Moments,
    /// Distance of the merged model from the members' mean, of each sample.
    pub gap: Moments,
    /// Rank agreement (Kendall's tau-b) of merged model and mean, of each group in which it is defined.
    pub rank_agreement: Moments,
    /// Samples that the merged model puts above its mean and some member below its own, or the other way round.
    pub sign_disagreements: u64,
}

impl Traffic {
    pub fn push(&mut self, seen: Seen) {
        self.lengths_and_rewards.push(seen.tokens as f64, seen.reward);
        self.rewards.push(seen.reward, &REWARD_BOUNDS);
        self.lengths.push(seen.tokens as f64, &LENGTH_BOUNDS);
        self.truncated += u64::from(seen.truncated);
    }

    pub fn push_shadowed(&mut self, shadowed: &Shadowed) {
        for (merged, members) in &shadowed.samples {
            let moments = Moments::of(members.iter().copied());
            let (Some(mean), Some(std)) = (moments.mean(), moments.std()) else { continue };
            let worst = members.iter().copied().fold(f64::INFINITY, f64::min);
            self.member_std.push(std);
            self.gap.push((merged - mean).abs());
            self.sign_disagreements += u64::from((*merged > 0.0) != (worst > 0.0));
        }
        let (merged, mean): (Vec<f64>, Vec<f64>) =
            shadowed.samples.iter().filter_map(|(merged, members)| Some((*merged, Moments::of(members.iter().copied()).mean()?))).unzip();
        if let Some(tau) = kendall_tau_b(&merged, &mean) {
            self.rank_agreement.push(tau);
        }
    }

    /// Both together.
    pub fn merge(&mut self, other: &Self) {
        self.lengths_and_rewards.merge(&other.lengths_and_rewards);
        self.rewards.merge(&other.rewards);
        self.lengths.merge(&other.lengths);
        self.truncated += other.truncated;
        self.non_finite += other.non_finite;
        self.member_std.merge(&other.member_std);
        self.gap.merge(&other.gap);
        self.rank_agreement.merge(&other.rank_agreement);
        self.sign_disagreements += other.sign_disagreements;
    }

    pub fn samples(&self) -> u64 {
        self.lengths_and_rewards.x.count()
    }

    /// The figures that are shown; absent where they are undefined. `calibration` is the mean and the standard deviation of
    /// the reference set.
    pub fn figures(&self, calibration: Option<(f64, f64)>) -> [(&'static str, Option<f64>); FIGURES.len()] {
        let share = |part: u64, all: u64| (all > 0).then(|| part as f64 / all as f64);
        let (rewards, shadowed) = (&self.lengths_and_rewards.y, self.member_std.count());
        let values = [
            Some(self.samples() as f64),
            rewards.mean(),
            rewards.std(),
            rewards.mean().zip(calibration).map(|(found, (mean, std))| (found - mean) / std),
            rewards.std().zip(calibration).map(|(found, (_, std))| found / std),
            self.lengths_and_rewards.x.mean(),
            self.lengths_and_rewards.correlation(),
            share(self.non_finite, self.samples() + self.non_finite),
            share(self.truncated, self.samples()),
            Some(shadowed as f64),
            self.member_std.mean(),
            self.gap.mean(),
            self.rank_agreement.mean(),
            share(self.sign_disagreements, shadowed),
        ];
        std::array::from_fn(|i| (FIGURES[i].0, values[i]))
    }
}

/// Names and meanings of the figures, as they stand in `/watch` and in `warm_watch_*`.
pub const FIGURES: [(&str, &str); 14] = [
    ("samples", "Samples that were scored."),
    ("reward_mean", "Mean raw reward."),
    ("reward_std", "Standard deviation of raw rewards."),
    ("reward_shift", "Distance of the mean reward from the calibration's, in its standard deviations."),
    ("reward_spread", "Standard deviation of rewards, in units of the calibration's."),
    ("tokens_mean", "Mean length of samples in tokens."),
    ("reward_length_correlation", "Correlation of reward and length: a bias that all members share, so that averaging cannot remove it."),
    ("non_finite_ratio", "Share of samples whose model output was not finite."),
    ("truncated_ratio", "Share of samples that were cut."),
    ("shadow_samples", "Samples that the members scored, too."),
    ("member_std", "Mean spread of the members' rewards of one sample, each member's own mean taken off."),
    ("gap", "Mean distance of WARM from the mean of the members (ENS), each model's own mean taken off."),
    ("rank_agreement", "Mean Kendall tau of WARM and ENS within prompts."),
    ("sign_disagreement_ratio", "Share of samples that WARM and the worst case over members see on different sides of their means."),
];

/// How long a slot of a window is.
pub const SLOT: Duration = Duration::from_secs(10);
/// What counts as now.
pub const WINDOW: Duration = Duration::from_secs(600);
/// What a run is measured by: the beginning of itself.
pub const BASELINE: Duration = Duration::from_secs(3600);

const SLOTS: u64 = WINDOW.as_secs() / SLOT.as_secs();

/// The last minutes of a run, and its first hour.
#[derive(Clone, Debug, Default)]
pub struct Run {
    began: Option<Instant>,
    /// The number of each slot since the beginning, and its sums; the newest last.
    slots: VecDeque<(u64, Traffic)>,
    first_hour: Traffic,
}

impl Run {
    /// Changes the sums of now.
    pub fn add(&mut self, now: Instant, change: impl Fn(&mut Traffic)) {
        let began = *self.began.get_or_insert(now);
        let age = now.saturating_duration_since(began);
        if age < BASELINE {
            change(&mut self.first_hour);
        }
        let number = age.as_secs() / SLOT.as_secs();
        if self.slots.back().is_none_or(|(last, _)| *last < number) {
            self.slots.push_back((number, Traffic::default()));
        }
        // A clock that came from another thread may be a little behind; then the newest slot is near enough.
        if let Some((_, traffic)) = self.slots.back_mut() {
            change(traffic);
        }
        self.forget(number);
    }

    /// The last [`WINDOW`], to the slot.
    pub fn now(&self, now: Instant) -> Traffic {
        let mut sum = Traffic::default();
        let Some(began) = self.began else { return sum };
        let number = now.saturating_duration_since(began).as_secs() / SLOT.as_secs();
        for (_, traffic) in self.slots.iter().filter(|(slot, _)| slot + SLOTS > number) {
            sum.merge(traffic);
        }
        sum
    }

    /// The first hour, and whether it is over.
    pub fn first_hour(&self, now: Instant) -> (&Traffic, bool) {
        (&self.first_hour, self.began.is_some_and(|began| now.saturating_duration_since(began) >= BASELINE))
    }

    fn forget(&mut self, number: u64) {
        while self.slots.front().is_some_and(|(slot, _)| slot + SLOTS <= number) {
            self.slots.pop_front();
        }
    }
}

/// Lets a share of events through, evenly, the first one among them.
#[derive(Debug)]
pub struct Sampler {
    share: f64,
    seen: u64,
}

impl Sampler {
    pub fn new(share: f64) -> Self {
        Self { share: share.clamp(0.0, 1.0), seen: 0 }
    }

    pub fn next(&mut self) -> bool {
        let before = self.seen as f64;
        self.seen += 1;
        ((before + 1.0) * self.share).ceil() > (before * self.share).ceil()
    }
}

/// Tokens that may be spent, refilled by the second and never more than one second's worth.
#[derive(Debug)]
pub struct Budget {
    per_second: f64,
    left: f64,
    last: Option<Instant>,
}

impl Budget {
    pub fn new(per_second: f64) -> Self {
        Self { per_second, left: per_second, last: None }
    }

    /// Takes `tokens` if they are there. What is more than a second's worth is let through when the budget is full, and
    /// paid back afterwards, so that nothing is too large for ever.
    pub fn take(&mut self, tokens: f64, now: Instant) -> bool {
        let passed = self.last.map_or(0.0, |last| now.saturating_duration_since(last).as_secs_f64());
        self.last = Some(now);
        self.left = (self.left + passed * self.per_second).min(self.per_second);
        let may = self.left >= tokens.min(self.per_second);
        if may {
            self.left -= tokens;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use proptest::prelude::*;

    fn seen(reward: f64, tokens: usize) -> Seen {
        Seen { reward, tokens, truncated: tokens > 4 }
    }

    fn figure(traffic: &Traffic, name: &str) -> Option<f64> {
        traffic.figures(Some((1.0, 2.0))).into_iter().find(|(found, _)| *found == name).expect("a figure").1
    }

    #[test]
    fn the_figures_of_a_worked_example() {
        let mut traffic = Traffic::default();
        [(1.0, 2), (2.0, 4), (3.0, 6)].into_iter().for_each(|(reward, tokens)| traffic.push(seen(reward, tokens)));
        traffic.non_finite = 1;
        // Members 1 and -1 by turns around WARM's 2 and -1: means 0, spreads 1, gaps 2 and 1.
        traffic.push_shadowed(&Shadowed { samples: vec![(2.0, vec![1.0, -1.0]), (-1.0, vec![-1.0, 1.0])] });
        // WARM and mean rank alike, and nobody disagrees about the sign.
        traffic.push_shadowed(&Shadowed { samples: vec![(1.0, vec![2.0, 4.0]), (2.0, vec![3.0, 5.0])] });
        for (name, expected) in [
            ("samples", Some(3.0)),
            ("reward_mean", Some(2.0)),
            ("reward_std", Some((2.0f64 / 3.0).sqrt())),
            ("reward_shift", Some(0.5)),
            ("reward_spread", Some((2.0f64 / 3.0).sqrt() / 2.0)),
            ("tokens_mean", Some(4.0)),
            ("reward_length_correlation", Some(1.0)),
            ("non_finite_ratio", Some(0.25)),
            ("truncated_ratio", Some(1.0 / 3.0)),
            ("shadow_samples", Some(4.0)),
            ("member_std", Some(1.0)),
            ("gap", Some((2.0 + 1.0 + 2.0 + 2.0) / 4.0)),
            // The first group's means are equal, so it has no ranks.
            ("rank_agreement", Some(1.0)),
            ("sign_disagreement_ratio", Some(0.25)),
        ] {
            let found = figure(&traffic, name);
            let near = match (found, expected) {
                (Some(found), Some(expected)) => (found - expected).abs() < 1e-12,
                (found, expected) => found == expected,
            };
            assert!(near, "{name}: {found:?}, expected {expected:?}");
        }
        let nothing = Traffic::default();
        assert!(nothing.figures(Some((1.0, 2.0))).iter().all(|(_, value)| value.is_none_or(|value| value == 0.0)));
    }

    #[test]
    fn a_window_slides_and_the_first_hour_stays() {
        let start = Clock::manual().now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut run = Run::default();
        run.add(at(0), |traffic| traffic.push(seen(1.0, 1)));
        run.add(at(500), |traffic| traffic.push(seen(3.0, 1)));
        assert_eq!((run.now(at(500)).samples(), run.first_hour(at(500)).1), (2, false));
        assert_eq!(run.now(at(605)).samples(), 1, "the first one is more than ten minutes ago");
        assert_eq!(run.now(at(5000)).samples(), 0, "without traffic nothing is now");
        run.add(at(3599), |traffic| traffic.push(seen(5.0, 1)));
        run.add(at(3600), |traffic| traffic.push(seen(100.0, 1)));
        let (first, over) = run.first_hour(at(3600));
        assert_eq!((first.samples(), first.lengths_and_rewards.y.mean(), over), (3, Some(3.0), true));
    }

    #[test]
    fn a_budget_is_a_rate_and_nothing_is_too_large_for_ever() {
        let start = Clock::manual().now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut budget = Budget::new(100.0);
        assert!(budget.take(80.0, at(0)) && !budget.take(80.0, at(100)) && budget.take(80.0, at(600)));
        assert!(!budget.take(1000.0, at(700)) && budget.take(1000.0, at(2000)));
        assert!(!budget.take(1.0, at(3000)), "ten seconds' worth is paid back");
        assert!(budget.take(100.0, at(12_100)));
        assert!(!Budget::new(0.0).take(0.5, at(0)) || Budget::new(0.0).take(0.0, at(0)));
    }

    proptest! {
        #[test]
        fn a_window_is_the_sum_of_what_lies_in_it(steps in prop::collection::vec((0u64..90, -50i32..50, 1usize..9), 1..80)) {
            let start = Clock::manual().now();
            let (mut run, mut all, mut second) = (Run::default(), Vec::new(), 0);
            for (wait, reward, tokens) in steps {
                // The first sample begins the run.
                second += if all.is_empty() { 0 } else { wait };
                run.add(start + Duration::from_secs(second), |traffic| traffic.push(seen(f64::from(reward), tokens)));
                all.push((second, f64::from(reward)));
                let lies_in = |at: u64| at / 10 + 60 > second / 10;
                let inside: Vec<f64> = all.iter().filter(|(at, _)| lies_in(*at)).map(|(_, reward)| *reward).collect();
                let now = run.now(start + Duration::from_secs(second));
                prop_assert_eq!(now.samples(), inside.len() as u64);
                let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                prop_assert!((now.lengths_and_rewards.y.mean().expect("some") - mean).abs() < 1e-9);
                prop_assert!(run.slots.len() <= 60);
            }
            let first = all.iter().filter(|(at, _)| *at < 3600).count() as u64;
            prop_assert_eq!(run.first_hour(start).0.samples(), first);
        }

        #[test]
        fn figures_stay_in_their_ranges(
            rewards in prop::collection::vec((-1e3f64..1e3, 1usize..100), 0..30),
            groups in prop::collection::vec(prop::collection::vec((-9f64..9.0, prop::collection::vec(-9f64..9.0, 1..4)), 1..5), 0..6),
        ) {
            let mut traffic = Traffic::default();
            rewards.iter().for_each(|&(reward, tokens)| traffic.push(seen(reward, tokens)));
            groups.iter().for_each(|group| traffic.push_shadowed(&Shadowed { samples: group.clone() }));
            for (name, value) in traffic.figures(None) {
                let Some(value) = value else { continue };
                prop_assert!(value.is_finite(), "{name}");
                let bounds = match name {
                    "reward_length_correlation" | "rank_agreement" => -1.0..=1.0,
                    "non_finite_ratio" | "truncated_ratio" | "sign_disagreement_ratio" => 0.0..=1.0,
                    "reward_mean" => -1e3..=1e3,
                    _ => 0.0..=f64::MAX,
                };
                prop_assert!(bounds.contains(&value), "{name} {value}");
            }
            // An ensemble of one is the merged model's equal where it says the same.
            let mut alone = Traffic::default();
            groups.iter().for_each(|group| {
                alone.push_shadowed(&Shadowed { samples: group.iter().map(|(merged, _)| (*merged, vec![*merged])).collect() });
            });
            prop_assert!(figure(&alone, "gap").is_none_or(|gap| gap == 0.0) && alone.sign_disagreements == 0);
            prop_assert!(figure(&alone, "rank_agreement").is_none_or(|tau| (tau - 1.0).abs() < 1e-12));
        }

        #[test]
        fn a_sampler_lets_exactly_its_share_through(share in 0.0f64..=1.0, events in 1u32..2000) {
            let mut sampler = Sampler::new(share);
            let through = (0..events).filter(|_| sampler.next()).count();
            prop_assert_eq!(through as f64, (f64::from(events) * share).ceil());
        }

        #[test]
        fn a_budget_never_gives_more_than_its_rate(takes in prop::collection::vec((0u64..400, 1u32..80), 1..60)) {
            let start = Clock::manual().now();
            let (mut budget, mut now, mut given) = (Budget::new(100.0), start, 0.0);
            for (wait, tokens) in takes {
                now += Duration::from_millis(wait);
                if budget.take(f64::from(tokens), now) {
                    given += f64::from(tokens);
                }
                // One second's worth may be saved up.
                prop_assert!(given <= 100.0 * ((now - start).as_secs_f64() + 1.0) + 1e-6);
            }
        }
    }
}
