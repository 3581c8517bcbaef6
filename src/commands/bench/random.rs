//! Numbers that look random and are the same on every machine, so that two runs send the same requests.

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// One of many independent streams of a seed, named by two numbers.
    pub(super) fn new(seed: u64, stream: (u64, u64)) -> Self {
        let mut state = Self(seed);
        // Each name goes through the mixer, so that neighbours have nothing in common.
        for name in [stream.0, stream.1] {
            state.0 = state.next() ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        state
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which must not be 0.
    pub(super) fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u32
    }

    /// Above 0 and at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Exponentially distributed, with mean 1: the pauses of a Poisson process.
    pub(super) fn pause(&mut self) -> f64 {
        -self.unit().ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_stay_below_their_bound_and_use_its_whole_width(seed in any::<u64>(), bound in 1u32..100_000) {
            let mut random = Random::new(seed, (1, 2));
            let drawn: Vec<u32> = (0..2000).map(|_| random.below(bound)).collect();
            prop_assert!(drawn.iter().all(|&number| number < bound));
            // Each half is hit about half the time: 2000 draws leave 0.4 to 0.6 less than once in 10^18 runs.
            let low = drawn.iter().filter(|&&number| f64::from(number) < f64::from(bound) / 2.0).count();
            prop_assert!(bound < 100 || (800..=1200).contains(&low), "{low}");
        }

        #[test]
        fn streams_of_one_seed_differ(seed in any::<u64>(), a in (0u64..50, 0u64..50), b in (0u64..50, 0u64..50)) {
            let numbers = |stream| { let mut random = Random::new(seed, stream); [random.next(), random.next()] };
            prop_assert_eq!(numbers(a) == numbers(b), a == b);
        }
    }
}
