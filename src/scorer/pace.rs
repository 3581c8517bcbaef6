//! How long packs take on a device, and so how long what comes now will wait. Pure.

use std::time::Duration;

/// Nothing is foretold to callers from fewer packs than this.
const EVIDENCE: u32 = 4;
/// How much the last pack of a size counts against those before it: one that took a thousand times too long, as the first
/// one may, is forgotten after a dozen more of its size.
const LATEST: f64 = 0.25;
/// And after so many of any other size: what a size took may be what keeps packs from having it.
const FORGET: u32 = 32;
/// No wait is foretold for more than so many times the largest pack that was seen: where launches take the time, a larger
/// one takes no longer, and somebody has to be let in to show that.
const BEYOND: f64 = 8.0;
/// The part of a caller's patience that may go into waiting: the rest is for its own packs, and for what a mean does not tell.
const WAITING: f64 = 0.6;
/// No time is told that is longer.
const LONGEST: Duration = Duration::from_secs(3600);
/// Callers that were refused together come back over the time that they were told, less and more this share of it.
const JITTER: f64 = 0.25;
/// Lanes whose packs are remembered, at most.
const MAX_LANES: usize = 64;

/// Packs of about one size: means of the logarithms of what they held, and of the seconds that they took.
#[derive(Clone, Copy, Debug)]
struct Size {
    amount: f64,
    seconds: f64,
    /// The number of the last of them.
    pack: u32,
}

/// What packs of each size took of late, one size for every power of two.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    sizes: Vec<Option<Size>>,
    packs: u32,
}

impl Pace {
    /// A pack of so much, in whatever unit is asked for later, took so long.
    pub fn observe(&mut self, amount: usize, took: Duration) {
        let Some(size) = amount.checked_ilog2().map(|power| power as usize).filter(|_| !took.is_zero()) else { return };
        if self.sizes.len() <= size {
            self.sizes.resize(size + 1, None);
        }
        self.packs = self.packs.saturating_add(1);
        let new = Size { amount: (amount as f64).ln(), seconds: took.as_secs_f64().ln(), pack: self.packs };
        let mean = |old: f64, new: f64| old + LATEST * (new - old);
        let old = self.sizes[size].unwrap_or(new);
        self.sizes[size] = Some(Size { amount: mean(old.amount, new.amount), seconds: mean(old.seconds, new.seconds), ..new });
        let packs = self.packs;
        self.sizes.iter_mut().for_each(|size| _ = size.take_if(|size| packs - size.pack > FORGET));
    }

    /// How long a pack of so much is likely to take; `None` before the first. Beyond the smallest and the largest that were seen
    /// it is taken to go as fast as these.
    pub fn duration(&self, amount: usize) -> Option<Duration> {
        let wanted = (amount.max(1) as f64).ln();
        let mut below: Option<Size> = None;
        let mut above: Option<Size> = None;
        for size in self.sizes.iter().flatten() {
            if size.amount <= wanted {
                below = Some(*size);
            } else {
                above = above.or(Some(*size));
            }
        }
        let seconds = match (below, above) {
            (None, None) => return None,
            (None, Some(known)) | (Some(known), None) => known.seconds + wanted - known.amount,
            (Some(below), Some(above)) => {
                let part = (wanted - below.amount) / (above.amount - below.amount);
                below.seconds + part * (above.seconds - below.seconds)
            }
        };
        Some(Duration::try_from_secs_f64(seconds.exp()).unwrap_or(LONGEST).min(LONGEST))
    }

    /// How long so many devices take to score so much; `None` while too little was seen to say.
    pub fn wait(&self, amount: usize, devices: usize) -> Option<Duration> {
        if self.packs < EVIDENCE {
            return None;
        }
        if amount == 0 {
            return Some(Duration::ZERO);
        }
        let largest = self.sizes.iter().flatten().last()?.amount.exp();
        self.duration(amount.div_ceil(devices.max(1)).min((BEYOND * largest) as usize))
    }
}

/// What is known of one lane.
#[derive(Clone, Debug)]
struct LanePace {
    lane: u64,
    pace: Pace,
    /// How much of what packs were drawn at they did cost of late: the rest was there from packs before.
    part: f64,
}

/// The pace of every lane: another model takes another time.
#[derive(Clone, Debug, Default)]
pub struct Paces {
    /// That of the last pack stands last.
    lanes: Vec<LanePace>,
}

impl Paces {
    /// A pack that was drawn at a cost, and had another one, took so long.
    pub fn observe(&mut self, lane: u64, drawn: usize, cost: usize, took: Duration) {
        let part = cost as f64 / drawn.max(1) as f64;
        let known = self.lanes.iter().position(|known| known.lane == lane).map(|place| self.lanes.remove(place));
        let mut known = known.unwrap_or(LanePace { lane, pace: Pace::default(), part });
        known.pace.observe(cost, took);
        known.part += LATEST * (part - known.part);
        if self.lanes.len() >= MAX_LANES {
            self.lanes.remove(0);
        }
        self.lanes.push(known);
    }

    /// How long a pack of this lane that is drawn at this cost is likely to take; `None` before the first.
    pub fn duration(&self, lane: u64, drawn: usize) -> Option<Duration> {
        let known = self.lanes.iter().find(|known| known.lane == lane)?;
        known.pace.duration((drawn as f64 * known.part).round() as usize)
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

    fn ran(pace: &mut Pace, amount: usize, seconds: f64) {
        pace.observe(amount, Duration::from_secs_f64(seconds));
    }

    fn near(found: Option<Duration>, expected: f64) {
        let found = found.expect("enough was seen").as_secs_f64();
        assert!((found / expected - 1.0).abs() < 0.05, "{found}, expected {expected}");
    }

    #[test]
    fn the_wait_is_what_is_ahead_at_the_pace_of_late() {
        let mut pace = Pace::default();
        (0..4).for_each(|_| ran(&mut pace, 1000, 1.0));
        near(pace.wait(5000, 1), 5.0);
        near(pace.wait(5000, 4), 1.25);
        assert_eq!(pace.wait(0, 1), Some(Duration::ZERO));
        // A device that has become ten times slower is known as such after a while.
        (0..16).for_each(|_| ran(&mut pace, 1000, 10.0));
        near(pace.wait(5000, 1), 50.0);
    }

    #[test]
    fn a_pack_takes_what_packs_of_its_size_took_and_beyond_these_in_proportion() {
        let mut pace = Pace::default();
        assert_eq!(pace.duration(10), None);
        // Up to a thousand tokens it is the launches that take the time.
        for (amount, seconds) in [(16, 0.01), (1024, 0.01), (4096, 0.04)] {
            ran(&mut pace, amount, seconds);
        }
        for (amount, seconds) in [(4, 0.0025), (16, 0.01), (200, 0.01), (2048, 0.02), (4096, 0.04), (16_384, 0.16)] {
            near(pace.duration(amount), seconds);
        }
    }

    #[test]
    fn nothing_is_foretold_from_too_little() {
        let mut pace = Pace::default();
        for _ in 0..EVIDENCE {
            assert_eq!(pace.wait(1, 1), None);
            ran(&mut pace, 50, 2.0);
        }
        near(pace.wait(50, 1), 2.0);
        // What took no time, or held nothing, says nothing.
        pace.observe(0, Duration::from_secs(9));
        pace.observe(50, Duration::ZERO);
        near(pace.wait(50, 1), 2.0);
    }

    #[test]
    fn one_pack_that_took_far_too_long_is_soon_forgotten() {
        let mut pace = Pace::default();
        ran(&mut pace, 64, 20.0);
        (0..12).for_each(|_| ran(&mut pace, 64, 0.02));
        assert!(pace.duration(64) < Some(Duration::from_millis(30)), "{:?}", pace.duration(64));
    }

    #[test]
    fn a_size_that_no_pack_has_any_more_is_forgotten() {
        let mut pace = Pace::default();
        ran(&mut pace, 600, 20.0);
        // Who goes by that makes smaller packs, for ever.
        (0..FORGET).for_each(|_| ran(&mut pace, 300, 0.3));
        near(pace.duration(600), 20.0);
        ran(&mut pace, 300, 0.3);
        near(pace.duration(600), 0.6);
        near(pace.wait(600, 1), 0.6);
    }

    #[test]
    fn a_device_with_little_to_do_does_not_look_slow() {
        let mut pace = Pace::default();
        // It is the launches that take the time.
        (0..20).for_each(|_| ran(&mut pace, 16, 0.01));
        near(pace.wait(100_000, 1), 0.08);
        (0..4).for_each(|_| ran(&mut pace, 4096, 0.01));
        near(pace.wait(30_000, 1), 0.073);
    }

    #[test]
    fn what_was_there_already_costs_the_next_packs_nothing_either() {
        let mut paces = Paces::default();
        // Nine tenths of a pack are there, and a second computes what is left.
        (0..20).for_each(|_| paces.observe(1, 1000, 100, Duration::from_secs(1)));
        near(paces.duration(1, 1000), 1.0);
        // Then nothing is.
        (0..20).for_each(|_| paces.observe(1, 100, 100, Duration::from_secs(1)));
        near(paces.duration(1, 100), 1.0);
    }

    #[test]
    fn lanes_have_a_pace_of_their_own_and_those_of_long_ago_are_forgotten() {
        let mut paces = Paces::default();
        paces.observe(7, 100, 100, Duration::from_secs(1));
        paces.observe(8, 100, 100, Duration::from_secs(3));
        near(paces.duration(7, 100), 1.0);
        near(paces.duration(8, 100), 3.0);
        assert_eq!(paces.duration(9, 100), None);
        (100..100 + MAX_LANES as u64 - 1).for_each(|lane| paces.observe(lane, 1, 1, Duration::from_secs(1)));
        assert_eq!((paces.duration(7, 1), paces.lanes.len()), (None, MAX_LANES));
        near(paces.duration(8, 100), 3.0);
    }

    proptest! {
        #[test]
        fn a_larger_pack_takes_no_less_time_where_all_were_seen_at_one_rate(seen in prop::collection::vec(1usize..1 << 20, 1..40), amounts in prop::collection::vec(0usize..1 << 22, 2..9), rate in 1.0f64..1e6) {
            let mut pace = Pace::default();
            seen.iter().for_each(|amount| pace.observe(*amount, Duration::from_secs_f64(*amount as f64 / rate + 1e-3)));
            let mut amounts = amounts;
            amounts.sort_unstable();
            let times: Vec<Duration> = amounts.iter().filter_map(|amount| pace.duration(*amount)).collect();
            prop_assert_eq!(times.len(), amounts.len());
            prop_assert!(times.windows(2).all(|pair| pair[0] <= pair[1] + Duration::from_micros(1)), "{:?}", times);
        }

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
