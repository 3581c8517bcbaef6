//! When requests are due. Pure: times are durations since the start.

use std::time::Duration;

use super::random::Random;

/// The times of a Poisson process: what many independent callers look like together. Never ends.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    random: Random,
    rate: f64,
    last: f64,
}

impl Arrivals {
    /// So many a second on average.
    pub(super) fn poisson(rate: f64, seed: u64) -> Self {
        Self { random: Random::new(seed, (u64::MAX, 0)), rate, last: 0.0 }
    }

    pub(super) fn next(&mut self) -> Duration {
        self.last += self.random.pause() / self.rate;
        // A century is as good as never, and a duration holds it.
        Duration::from_secs_f64(self.last.min(3e9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arrivals_never_go_back_and_keep_their_rate(seed in any::<u64>(), rate in 0.01f64..10_000.0) {
            let mut arrivals = Arrivals::poisson(rate, seed);
            let times: Vec<f64> = (0..4000).map(|_| arrivals.next().as_secs_f64()).collect();
            prop_assert!(times.windows(2).all(|pair| pair[0] <= pair[1]));
            // 4000 pauses: their mean is within 10 % in all but one of 10^9 runs.
            let mean = times[3999] / 4000.0;
            prop_assert!((mean * rate - 1.0).abs() < 0.1, "{mean} at {rate}");
            // Exponential pauses: e^-1 of them are longer than the mean, e^-2 longer than twice it.
            let longer = |by: f64| times.windows(2).filter(|pair| (pair[1] - pair[0]) * rate > by).count() as f64 / 3999.0;
            prop_assert!((longer(1.0) - (-1f64).exp()).abs() < 0.05 && (longer(2.0) - (-2f64).exp()).abs() < 0.05);
        }

        #[test]
        fn the_same_seed_gives_the_same_times(seed in any::<u64>()) {
            let times = || { let mut arrivals = Arrivals::poisson(7.0, seed); [arrivals.next(), arrivals.next(), arrivals.next()] };
            prop_assert_eq!(times(), times());
        }
    }
}
