//! What came back, counted. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Three digits of every time between a microsecond and a day.
#[derive(Clone, Debug)]
pub(super) struct Times(Histogram<u64>);

/// A distribution of times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Summary {
    pub count: u64,
    pub p50: Duration,
    pub p90: Duration,
    pub p99: Duration,
    pub p999: Duration,
    pub max: Duration,
    pub mean: Duration,
}

impl Times {
    pub(super) fn new() -> Self {
        match Histogram::new_with_bounds(1, 86_400_000_000, 3) {
            Ok(histogram) => Self(histogram),
            Err(error) => unreachable!("constant bounds: {error}"),
        }
    }

    /// Longer than a day counts as a day.
    pub(super) fn record(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    pub(super) fn summary(&self) -> Summary {
        if self.0.is_empty() {
            return Summary::default();
        }
        let at = |quantile| Duration::from_micros(self.0.value_at_quantile(quantile));
        Summary {
            count: self.0.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: Duration::from_micros(self.0.max()),
            mean: Duration::from_secs_f64(self.0.mean() / 1e6),
        }
    }
}

/// What the server says of where the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct ServerTiming {
    pub queue: Duration,
    pub tokenize: Duration,
    pub forward: Duration,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    Scored {
        /// In order; none where that sample failed.
        rewards: Vec<Option<f32>>,
        tokens: u64,
        timing: ServerTiming,
    },
    /// By gRPC's name of the code, or `NO_ANSWER` where the server gave none.
    Refused(&'static str),
}

/// A request that ended; times are since the start.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    pub number: u64,
    /// When it should have been sent.
    pub due: Duration,
    pub sent: Duration,
    pub done: Duration,
    pub outcome: Outcome,
}

/// All answers of a run.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// Requests due before this time warm the server up and are not counted.
    from: Duration,
    /// An answer that takes longer is not a good one.
    objective: Option<Duration>,
    pub scored: Times,
    pub refused: Times,
    /// From when requests were sent to when they were refused: what saying no takes.
    pub refusal: Times,
    /// From when requests were due to when they were sent: what the generator itself is behind.
    pub lag: Times,
    pub queue: Times,
    pub tokenize: Times,
    pub forward: Times,
    pub warmed_up: u64,
    pub answers: u64,
    /// Scored whole, and within the objective.
    pub good: u64,
    pub codes: BTreeMap<&'static str, u64>,
    pub samples: u64,
    pub failures: u64,
    pub tokens: u64,
    pub good_samples: u64,
    checksum: u64,
    last: Duration,
}

impl Tally {
    pub(super) fn new(from: Duration, objective: Option<Duration>) -> Self {
        Self {
            from,
            objective,
            scored: Times::new(),
            refused: Times::new(),
            refusal: Times::new(),
            lag: Times::new(),
            queue: Times::new(),
            tokenize: Times::new(),
            forward: Times::new(),
            warmed_up: 0,
            answers: 0,
            good: 0,
            codes: BTreeMap::new(),
            samples: 0,
            failures: 0,
            tokens: 0,
            good_samples: 0,
            checksum: 0,
            last: from,
        }
    }

    pub(super) fn record(&mut self, answer: &Answer) {
        if answer.due < self.from {
            self.warmed_up += 1;
            return;
        }
        self.answers += 1;
        self.last = self.last.max(answer.done);
        self.lag.record(answer.sent.saturating_sub(answer.due));
        // From when it was due, not from when it was sent: a stalled server also delays what could not be sent meanwhile.
        let latency = answer.done.saturating_sub(answer.due);
        match &answer.outcome {
            Outcome::Refused(code) => {
                *self.codes.entry(code).or_default() += 1;
                self.refused.record(latency);
                self.refusal.record(answer.done.saturating_sub(answer.sent));
            }
            Outcome::Scored { rewards, tokens, timing } => {
                let failures = rewards.iter().filter(|reward| reward.is_none()).count() as u64;
                self.scored.record(latency);
                self.samples += rewards.len() as u64 - failures;
                self.failures += failures;
                self.tokens += tokens;
                if failures == 0 && self.objective.is_none_or(|objective| latency <= objective) {
                    self.good += 1;
                    self.good_samples += rewards.len() as u64;
                }
                self.queue.record(timing.queue);
                self.tokenize.record(timing.tokenize);
                self.forward.record(timing.forward);
                self.checksum = self.checksum.wrapping_add(checksum(answer.number, rewards));
            }
        }
    }

    /// From the end of the warm-up to the last answer.
    pub(super) fn span(&self) -> Duration {
        self.last.saturating_sub(self.from)
    }

    /// The same for the same rewards of the same requests, in whatever order they came.
    pub(super) fn checksum(&self) -> u64 {
        self.checksum
    }
}

/// FNV-1a over a request's number and the bits of its rewards.
fn checksum(number: u64, rewards: &[Option<f32>]) -> u64 {
    let bytes = |hash: u64, bytes: &[u8]| bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let start = bytes(0xcbf2_9ce4_8422_2325, &number.to_le_bytes());
    rewards.iter().fold(start, |hash, reward| bytes(hash, &reward.map_or(u32::MAX, f32::to_bits).to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn answer(number: u64, due: u64, sent: u64, done: u64, outcome: Outcome) -> Answer {
        Answer { number, due: ms(due), sent: ms(sent), done: ms(done), outcome }
    }

    fn scored(rewards: &[Option<f32>]) -> Outcome {
        Outcome::Scored { rewards: rewards.to_vec(), tokens: 10, timing: ServerTiming::default() }
    }

    #[test]
    fn what_was_due_before_the_warm_up_ended_is_not_counted() {
        let mut tally = Tally::new(ms(100), None);
        tally.record(&answer(0, 99, 99, 500, scored(&[Some(1.0)])));
        tally.record(&answer(1, 100, 100, 300, scored(&[Some(1.0)])));
        assert_eq!((tally.warmed_up, tally.answers, tally.samples, tally.span()), (1, 1, 1, ms(200)));
    }

    #[test]
    fn latency_counts_from_when_a_request_was_due() {
        let mut tally = Tally::new(ms(0), None);
        tally.record(&answer(0, 10, 900, 1000, scored(&[Some(1.0)])));
        tally.record(&answer(1, 20, 200, 500, Outcome::Refused("RESOURCE_EXHAUSTED")));
        let near = |found: Duration, expected: u64| found.abs_diff(ms(expected)) <= ms(1);
        assert!(near(tally.scored.summary().p50, 990), "{:?}", tally.scored.summary());
        assert!(near(tally.lag.summary().max, 890));
        assert!(near(tally.refused.summary().p50, 480) && near(tally.refusal.summary().p50, 300));
    }

    #[test]
    fn good_answers_are_whole_and_within_the_objective() {
        let mut tally = Tally::new(ms(0), Some(ms(50)));
        tally.record(&answer(0, 0, 0, 50, scored(&[Some(1.0), Some(2.0)])));
        tally.record(&answer(1, 0, 0, 51, scored(&[Some(1.0)])));
        tally.record(&answer(2, 0, 0, 1, scored(&[Some(1.0), None])));
        tally.record(&answer(3, 0, 0, 1, Outcome::Refused("RESOURCE_EXHAUSTED")));
        tally.record(&answer(4, 0, 0, 2, Outcome::Refused("RESOURCE_EXHAUSTED")));
        assert_eq!((tally.good, tally.good_samples, tally.samples, tally.failures, tally.tokens), (1, 2, 4, 1, 30));
        assert_eq!(tally.codes.into_iter().collect::<Vec<_>>(), [("RESOURCE_EXHAUSTED", 2)]);
        assert_eq!((tally.scored.summary().count, tally.refused.summary().count), (3, 2));
    }

    proptest! {
        #[test]
        fn quantiles_are_those_of_the_sorted_times_to_three_digits(mut times in prop::collection::vec(1u64..10_000_000, 1..300)) {
            let mut histogram = Times::new();
            for time in &times {
                histogram.record(Duration::from_micros(*time));
            }
            times.sort_unstable();
            let exact = |quantile: f64| times[((quantile * times.len() as f64).ceil() as usize).clamp(1, times.len()) - 1] as f64;
            let found = histogram.summary();
            for (found, quantile) in [(found.p50, 0.5), (found.p90, 0.9), (found.p99, 0.99), (found.p999, 0.999), (found.max, 1.0)] {
                let (found, exact) = (found.as_micros() as f64, exact(quantile));
                prop_assert!((found - exact).abs() <= 1.0 + exact / 500.0, "{quantile}: {found} against {exact}");
            }
            prop_assert_eq!(found.count, times.len() as u64);
        }

        #[test]
        fn the_checksum_knows_bits_and_numbers_but_not_the_order_of_answers(
            rewards in prop::collection::vec(prop::option::of(-9f32..9.0), 2..20), swap in any::<prop::sample::Index>(),
        ) {
            let sum = |order: &[usize], rewards: &[Option<f32>]| {
                let mut tally = Tally::new(ms(0), None);
                for &i in order {
                    tally.record(&answer(i as u64, 0, 0, 1, scored(&rewards[i..=i])));
                }
                tally.checksum()
            };
            let forwards: Vec<usize> = (0..rewards.len()).collect();
            let backwards: Vec<usize> = (0..rewards.len()).rev().collect();
            let whole = sum(&forwards, &rewards);
            prop_assert_eq!(whole, sum(&backwards, &rewards));
            let mut other = rewards.clone();
            let place = swap.index(other.len());
            other[place] = other[place].map_or(Some(0.0), |reward| Some(reward.next_up()));
            prop_assert_ne!(whole, sum(&forwards, &other));
        }
    }

    #[test]
    fn nothing_recorded_is_all_zero() {
        assert_eq!(Times::new().summary(), Summary::default());
    }
}
