//! Counts by size, in buckets that are the same everywhere, so that two times can be laid side by side.

/// Upper bounds of rewards, log-symmetric around 0: raw rewards have no unit, so both small and large ones must resolve.
pub const REWARD_BOUNDS: [f64; 21] =
    [-100.0, -50.0, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];

/// Upper bounds of lengths in tokens: half an octave from a short answer to a long one.
pub const LENGTH_BOUNDS: [f64; 20] = [
    16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0, 1536.0, 2048.0, 3072.0, 4096.0, 6144.0, 8192.0, 16384.0,
    32768.0, 131_072.0,
];

/// How many values lie at or below each bound and above the one before; the last ones lie above every bound. Nothing is
/// allocated before the first value, since most slots of most tenants stay empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(Vec<u64>);

impl Counts {
    /// Counts a value. The bounds are those of all values before.
    pub fn push(&mut self, value: f64, bounds: &[f64]) {
        if self.0.is_empty() {
            self.0 = vec![0; bounds.len() + 1];
        }
        let place = bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.0.get_mut(place) {
            *count += 1;
        }
    }

    /// Both together.
    pub fn merge(&mut self, other: &Self) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
        } else {
            self.0.iter_mut().zip(&other.0).for_each(|(mine, theirs)| *mine += theirs);
        }
    }

    /// One count for each bound, and one for what lies above the last; all are there, also before the first value.
    pub fn each(&self, bounds: &[f64]) -> Vec<u64> {
        if self.0.is_empty() { vec![0; bounds.len() + 1] } else { self.0.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_on_a_bound_lies_below_it_as_prometheus_has_it() {
        let mut counts = Counts::default();
        assert_eq!(counts.each(&[1.0, 2.0]), [0, 0, 0]);
        [0.5, 1.0, 1.5, 2.0, 2.5, f64::INFINITY].into_iter().for_each(|value| counts.push(value, &[1.0, 2.0]));
        assert_eq!(counts.each(&[1.0, 2.0]), [2, 2, 2]);
    }

    proptest! {
        #[test]
        fn counts_of_parts_are_counts_of_the_whole(values in prop::collection::vec(-200f64..200.0, 0..60), cut in 0usize..60) {
            let count = |values: &[f64]| {
                let mut counts = Counts::default();
                values.iter().for_each(|value| counts.push(*value, &REWARD_BOUNDS));
                counts
            };
            let (first, second) = values.split_at(cut.min(values.len()));
            let mut both = count(first);
            both.merge(&count(second));
            prop_assert_eq!(&both, &count(&values));
            let each = both.each(&REWARD_BOUNDS);
            prop_assert_eq!(each.iter().sum::<u64>(), values.len() as u64);
            for (i, count) in each.iter().enumerate() {
                let above = |value: f64| i == 0 || value > REWARD_BOUNDS[i - 1];
                let below = |value: f64| REWARD_BOUNDS.get(i).is_none_or(|bound| value <= *bound);
                prop_assert_eq!(*count, values.iter().filter(|value| above(**value) && below(**value)).count() as u64);
            }
        }
    }
}
