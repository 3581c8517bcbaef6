//! Running mean and spread of numbers that come one at a time, or from several places at once.

/// Count, mean and spread of some finite numbers, in one pass (Welford; merging by Chan et al.), so that large means do not
/// swallow small spreads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    count: u64,
    mean: f64,
    /// The sum of squared distances to the mean.
    squares: f64,
}

impl Moments {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut moments = Self::default();
        values.into_iter().for_each(|value| moments.push(value));
        moments
    }

    pub fn push(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
    }

    /// Both together.
    pub fn merge(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        let (mine, theirs) = (self.count as f64, other.count as f64);
        let apart = other.mean - self.mean;
        self.count += other.count;
        self.mean += apart * theirs / (mine + theirs);
        self.squares += other.squares + apart * apart * mine * theirs / (mine + theirs);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// `None` of nothing.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then_some(self.mean)
    }

    /// Of the population; `None` of nothing.
    pub fn variance(&self) -> Option<f64> {
        (self.count > 0).then(|| (self.squares / self.count as f64).max(0.0))
    }

    /// Of the population; `None` of nothing.
    pub fn std(&self) -> Option<f64> {
        self.variance().map(f64::sqrt)
    }
}

/// How two numbers of the same things go together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct JointMoments {
    pub x: Moments,
    pub y: Moments,
    /// The sum of products of distances to both means.
    products: f64,
}

impl JointMoments {
    pub fn push(&mut self, x: f64, y: f64) {
        let before = x - self.x.mean;
        self.x.push(x);
        self.y.push(y);
        self.products += before * (y - self.y.mean);
    }

    pub fn merge(&mut self, other: &Self) {
        if other.x.count > 0 {
            let (mine, theirs) = (self.x.count as f64, other.x.count as f64);
            let (dx, dy) = (other.x.mean - self.x.mean, other.y.mean - self.y.mean);
            self.products += other.products + dx * dy * mine * theirs / (mine + theirs);
        }
        self.x.merge(&other.x);
        self.y.merge(&other.y);
    }

    /// Pearson's correlation; `None` where one side is constant.
    pub fn correlation(&self) -> Option<f64> {
        let scale = (self.x.squares * self.y.squares).sqrt();
        (scale > 0.0 && scale.is_finite()).then(|| (self.products / scale).clamp(-1.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_moments_of_a_worked_example() {
        // By hand: mean 5, squares 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, of 8.
        let moments = Moments::of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!((moments.count(), moments.mean(), moments.variance(), moments.std()), (8, Some(5.0), Some(4.0), Some(2.0)));
        assert_eq!((Moments::default().mean(), Moments::default().std()), (None, None));
        // A large mean does not swallow a small spread.
        let far = Moments::of([1e9 + 1.0, 1e9 + 2.0, 1e9 + 3.0]);
        assert!((far.variance().expect("three") - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn a_straight_line_correlates_perfectly_and_a_constant_not_at_all() {
        let joint = |points: &[(f64, f64)]| {
            let mut joint = JointMoments::default();
            points.iter().for_each(|&(x, y)| joint.push(x, y));
            joint.correlation()
        };
        assert_eq!(joint(&[(1.0, 3.0), (2.0, 5.0), (3.0, 7.0)]), Some(1.0));
        assert_eq!(joint(&[(1.0, 1.0), (2.0, 0.0)]), Some(-1.0));
        assert_eq!(joint(&[(1.0, 1.0), (2.0, 1.0)]), None);
        assert_eq!(joint(&[]), None);
    }

    proptest! {
        #[test]
        fn parts_together_are_the_whole(values in prop::collection::vec((-1e4f64..1e4, -1e4f64..1e4), 1..40), cut in 0usize..40) {
            let cut = cut.min(values.len());
            let joint = |points: &[(f64, f64)]| {
                let mut joint = JointMoments::default();
                points.iter().for_each(|&(x, y)| joint.push(x, y));
                joint
            };
            let whole = joint(&values);
            let mut parts = joint(&values[..cut]);
            parts.merge(&joint(&values[cut..]));
            prop_assert_eq!(parts.x.count(), whole.x.count());
            let near = |a: Option<f64>, b: Option<f64>, slack: f64| match (a, b) {
                (Some(a), Some(b)) => (a - b).abs() <= slack,
                (a, b) => a == b,
            };
            prop_assert!(near(parts.x.mean(), whole.x.mean(), 1e-8));
            prop_assert!(near(parts.y.variance(), whole.y.variance(), 1e-4));
            // Against two passes over all values.
            let count = values.len() as f64;
            let mean = |side: fn(&(f64, f64)) -> f64| values.iter().map(side).sum::<f64>() / count;
            let (mx, my) = (mean(|point| point.0), mean(|point| point.1));
            let naive = values.iter().map(|(x, _)| (x - mx).powi(2)).sum::<f64>() / count;
            prop_assert!(near(whole.x.variance(), Some(naive), 1e-4));
            let products: f64 = values.iter().map(|(x, y)| (x - mx) * (y - my)).sum();
            let scale = (naive * values.iter().map(|(_, y)| (y - my).powi(2)).sum::<f64>() / count).sqrt() * count;
            if scale > 1e-3 {
                prop_assert!(near(whole.correlation(), Some(products / scale), 1e-6));
                prop_assert!(near(parts.correlation(), whole.correlation(), 1e-6));
            }
            prop_assert!(whole.correlation().is_none_or(|r| (-1.0..=1.0).contains(&r)));
        }
    }
}
