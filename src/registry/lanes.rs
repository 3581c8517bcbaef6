//! Models that run over the same packs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::domain::MemberName;
use crate::lock::lock;
use crate::model::RewardModel;

/// Models that run over the same packs, and the number by which the queue tells them from others.
#[derive(Clone)]
pub(super) struct Lane {
    pub number: u64,
    pub models: Arc<[Arc<dyn RewardModel>]>,
}

impl Lane {
    /// A lane that no other submission of this process shares by accident.
    pub fn new(models: impl IntoIterator<Item = Arc<dyn RewardModel>>) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self { number: LAST.fetch_add(1, Ordering::Relaxed), models: models.into_iter().collect() }
    }
}

/// How many selections are remembered.
const REMEMBERED: usize = 64;

/// The lanes of the selections of members that were asked for: who asks for the same ones shares their packs, and what is known
/// of how long these take.
#[derive(Default)]
pub(super) struct Selections(Mutex<Vec<(Vec<MemberName>, Lane)>>);

impl Selections {
    /// The lane of these members, in this order; `models` is asked for its models where it is not known. Of too many, those that
    /// nobody has asked for the longest are forgotten.
    pub fn lane<M>(&self, members: &[MemberName], models: impl FnOnce() -> M) -> Lane
    where
        M: IntoIterator<Item = Arc<dyn RewardModel>>,
    {
        let mut known = lock(&self.0);
        if let Some(place) = known.iter().position(|(names, _)| names == members) {
            known[place..].rotate_left(1);
        } else {
            if known.len() == REMEMBERED {
                known.remove(0);
            }
            known.push((members.to_vec(), Lane::new(models())));
        }
        known[known.len() - 1].1.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_has_one_lane_for_as_long_as_it_is_remembered() {
        let selections = Selections::default();
        let name = |number: usize| MemberName::try_from(format!("m{number}")).expect("a name");
        let number = |members: &[usize]| {
            let names: Vec<_> = members.iter().map(|member| name(*member)).collect();
            selections.lane(&names, Vec::new).number
        };
        let (one, other, turned) = (number(&[0, 1]), number(&[1]), number(&[1, 0]));
        assert!(one != other && other != turned && one != turned, "answers are in the order of the members");
        assert_eq!([number(&[1, 0]), number(&[0, 1]), number(&[1])], [turned, one, other]);
        for member in 10..10 + REMEMBERED {
            number(&[member]);
            assert_eq!(number(&[0, 1]), one, "it is asked for again and again");
        }
        assert_ne!(number(&[1]), other, "it was forgotten");
        assert_eq!(lock(&selections.0).len(), REMEMBERED);
    }
}
