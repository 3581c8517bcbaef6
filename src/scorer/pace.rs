//! How fast tokens are scored, and so how long what comes now will wait. Pure.

use std::time::Duration;

/// Seconds of work after which what was seen counts for a third.
const MEMORY: f64 = 10.0;
/// Nothing is foretold from less work than this, in seconds.
const EVIDENCE: f64 = 0.5;
/// The part of a caller's patience that may go into waiting: the rest is for its own packs, and for what a mean does not tell.
const WAITING: f64 = 0.75;
/// No wait is told that is longer.
const LONGEST: Duration = Duration::from_secs(3600);
/// Callers that were refused together come back over the time that they were told, less and more this share of it.
const JITTER: f64 = 0.25;

/// Tokens scored per second of forwards on one device that has enough to do: a mean in which the past fades. What a small
/// pack takes tells nothing of a full one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// What was seen in all.
    seen: (u64, f64),
    /// Whether there has been enough to fill a pack since then.
    full: bool,
    tokens: f64,
    seconds: f64,
}

impl Pace {
    /// So many tokens have been scored up to now, in so many seconds of forwards. `full` says whether there is enough to fill
    /// a pack now.
    pub fn observe(&mut self, tokens: u64, seconds: f64, full: bool) {
        let passed = seconds - self.seen.1;
        if passed <= 0.0 {
            self.full &= full;
            return;
        }
        if self.full && full {
            let fade = (-passed / MEMORY).exp();
            self.tokens = self.tokens * fade + tokens.saturating_sub(self.seen.0) as f64;
            self.seconds = self.seconds * fade + passed;
        }
        (self.seen, self.full) = ((tokens, seconds), full);
    }

    /// How long so many devices take to score so many tokens; `None` while too little was seen to say.
    pub fn wait(&self, tokens: u64, devices: usize) -> Option<Duration> {
        let seconds = tokens as f64 * self.seconds / self.tokens / devices.max(1) as f64;
        let known = self.seconds >= EVIDENCE && self.tokens > 0.0;
        known.then(|| Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST))
    }
}

/// Whether somebody who waits so long is likely to be answered in time.
pub fn in_time(wait: Duration, patience: Duration) -> bool {
    wait <= patience.mul_f64(WAITING)
}

/// A time around `wait`, another one for every `number`: those who were refused together do not come back together.
pub fn spread(wait: Duration, number: u64) -> Duration {
    // The fractional parts of multiples of the golden ratio lie evenly.
    let place = (number as f64 * 0.618_033_988_749_895).fract();
    wait.min(LONGEST).mul_f64(1.0 - JITTER + 2.0 * JITTER * place)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_wait_is_what_is_ahead_at_the_pace_of_late() {
        let near = |found: Option<Duration>, expected: f64| {
            let found = found.expect("enough was seen").as_secs_f64();
            assert!((found / expected - 1.0).abs() < 0.05, "{found}, expected {expected}");
        };
        let (mut pace, mut tokens, mut seconds) = (Pace::default(), 0, 0.0);
        let mut work = |pace: &mut Pace, rate: u64| {
            for _ in 0..400 {
                (tokens, seconds) = (tokens + rate / 10, seconds + 0.1);
                pace.observe(tokens, seconds, true);
            }
        };
        work(&mut pace, 1000);
        near(pace.wait(5000, 1), 5.0);
        near(pace.wait(5000, 4), 1.25);
        // A device that has become ten times slower is known as such after a while.
        work(&mut pace, 100);
        near(pace.wait(5000, 1), 43.0);
        work(&mut pace, 100);
        near(pace.wait(5000, 1), 50.0);
    }

    #[test]
    fn nothing_is_foretold_from_too_little() {
        assert_eq!(Pace::default().wait(1, 1), None);
        let mut pace = Pace::default();
        pace.observe(1000, 100.0, true);
        pace.observe(1010, 100.4, true);
        assert_eq!(pace.wait(1, 1), None);
        pace.observe(1025, 101.0, true);
        assert_eq!(pace.wait(50, 1).map(|wait| wait.as_secs()), Some(2));
        // Work that has scored nothing has no pace.
        let mut failing = Pace::default();
        failing.observe(0, 5.0, true);
        failing.observe(0, 10.0, true);
        assert_eq!(failing.wait(1, 1), None);
    }

    #[test]
    fn a_device_with_little_to_do_does_not_look_slow() {
        let mut pace = Pace::default();
        pace.observe(0, 1.0, true);
        pace.observe(1000, 2.0, true);
        // A few tokens at a time, now and then.
        for i in 0..1000u32 {
            pace.observe(1000 + u64::from(i), 2.0 + f64::from(i), false);
        }
        assert_eq!(pace.wait(1000, 1).map(|wait| wait.as_secs()), Some(1));
    }

    proptest! {
        #[test]
        fn times_to_come_back_lie_around_the_wait_and_apart(milliseconds in 1u64..100_000, first in 0u64..1_000_000) {
            let wait = Duration::from_millis(milliseconds);
            let times: Vec<Duration> = (first..first + 100).map(|number| spread(wait, number)).collect();
            let (least, most) = (wait.mul_f64(0.75), wait.mul_f64(1.25));
            prop_assert!(times.iter().all(|time| (least..=most).contains(time)));
            // Every tenth of the span has some.
            for tenth in 0..10 {
                let from = wait.mul_f64(0.75 + 0.05 * f64::from(tenth));
                let to = wait.mul_f64(0.75 + 0.05 * f64::from(tenth + 1));
                prop_assert!(times.iter().any(|time| (from..=to).contains(time)), "{tenth}");
            }
        }
    }
}
