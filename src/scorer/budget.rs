//! What becomes of a pack that the device has no room for: it is run in parts, and the packs after it are smaller. Pure.

use std::ops::Range;

/// However often a device had no room, a pack is given this part of what the settings allow.
const SMALLEST_PART: usize = 64;
/// Packs that fit in a row before a lowered budget is tried higher again: what took the memory may have gone.
const PATIENCE: usize = 512;

/// What the packs of one device may cost, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    most: usize,
    now: usize,
    fitted: usize,
}

impl Budget {
    /// As the settings have it.
    pub fn new(most: usize) -> Self {
        Self { most, now: most, fitted: 0 }
    }

    pub fn tokens(&self) -> usize {
        self.now
    }

    /// Takes up what the settings, or a measurement, have it now; what was learned of less room is forgotten with a change.
    pub fn allow(&mut self, most: usize) {
        if most != self.most {
            *self = Self::new(most);
        }
    }

    /// A pack fitted as a whole.
    pub fn fits(&mut self) {
        self.fitted += 1;
        if self.fitted >= PATIENCE {
            (self.fitted, self.now) = (0, self.most.min(self.now + self.now.div_ceil(4)));
        }
    }

    /// Of a pack of `whole` tokens, parts of `part` at most did fit. Says whether the budget is lower for it.
    pub fn lower(&mut self, part: usize, whole: usize) -> bool {
        let before = self.now;
        let share = self.now.saturating_mul(part) / whole.max(1);
        self.now = share.clamp(self.most.div_ceil(SMALLEST_PART), before);
        self.fitted = 0;
        self.now < before
    }
}

/// Why a part gave nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss<E, F> {
    /// Its halves may give something.
    Halve(E),
    /// Its halves would give nothing either.
    Keep(E),
    /// Nor would anything else.
    End(F),
}

/// Runs items of these sizes at once, or, where `attempt` says so, by halves. `attempt` gives an outcome for every item of a
/// range. Gives, in order, `Err` for the items of a part that was not halved any further.
pub fn in_parts<T, E: Clone, F>(
    sizes: &[usize],
    mut attempt: impl FnMut(Range<usize>) -> Result<Vec<T>, Miss<E, F>>,
) -> Result<Vec<Result<T, E>>, F> {
    let mut parts = Vec::with_capacity(sizes.len());
    // The ranges that are still to be run, the next one last.
    let mut waiting: Vec<Range<usize>> = std::iter::once(0..sizes.len()).collect();
    while let Some(range) = waiting.pop() {
        match attempt(range.clone()) {
            Ok(outcomes) => parts.extend(outcomes.into_iter().map(Ok)),
            Err(Miss::End(end)) => return Err(end),
            Err(Miss::Halve(_)) if range.len() > 1 => {
                let cut = range.start + half(&sizes[range.clone()]);
                waiting.push(cut..range.end);
                waiting.push(range.start..cut);
            }
            Err(Miss::Halve(miss) | Miss::Keep(miss)) => parts.extend(range.map(|_| Err(miss.clone()))),
        }
    }
    Ok(parts)
}

/// How many of at least two items make about half of the whole; neither half is empty.
fn half(sizes: &[usize]) -> usize {
    let whole: usize = sizes.iter().sum();
    let mut sum = 0;
    let reached = sizes.iter().position(|size| {
        sum += size;
        2 * sum >= whole
    });
    (reached.unwrap_or(0) + 1).clamp(1, sizes.len() - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A device with room for so many.
    fn device(room: usize, sizes: &[usize]) -> impl FnMut(Range<usize>) -> Result<Vec<usize>, Miss<&'static str, ()>> {
        move |range| if sizes[range.clone()].iter().sum::<usize>() <= room { Ok(range.collect()) } else { Err(Miss::Halve("no room")) }
    }

    proptest! {
        #[test]
        fn whatever_fits_alone_is_run_once_and_in_order(sizes in prop::collection::vec(1usize..100, 1..30), room in 1usize..400) {
            let parts = in_parts(&sizes, device(room, &sizes)).expect("nothing is fatal");
            let expected: Vec<_> = sizes.iter().enumerate().map(|(i, size)| if *size <= room { Ok(i) } else { Err("no room") }).collect();
            prop_assert_eq!(parts, expected);
        }

        #[test]
        fn a_budget_stays_within_its_bounds_and_falls_to_what_fits(most in 1usize..100_000, steps in prop::collection::vec((1usize..100, 1usize..100), 0..20)) {
            let mut budget = Budget::new(most);
            for (part, more) in steps {
                let before = budget.tokens();
                let lower = budget.lower(part, part + more);
                prop_assert!(budget.tokens() <= before && budget.tokens() >= most.div_ceil(SMALLEST_PART));
                prop_assert_eq!(lower, budget.tokens() < before);
            }
        }
    }

    #[test]
    fn a_device_with_half_the_room_gets_packs_of_half_the_size_until_it_proves_to_have_more() {
        let mut budget = Budget::new(8192);
        assert!(budget.lower(4000, 8000));
        assert_eq!(budget.tokens(), 4096);
        for _ in 0..PATIENCE {
            assert_eq!(budget.tokens(), 4096);
            budget.fits();
        }
        assert_eq!(budget.tokens(), 5120);
        (0..10 * PATIENCE).for_each(|_| budget.fits());
        assert_eq!(budget.tokens(), 8192);
    }

    #[test]
    fn a_budget_begins_anew_only_when_another_is_allowed() {
        let mut budget = Budget::new(8192);
        assert!(budget.lower(1, 2));
        budget.allow(8192);
        assert_eq!(budget.tokens(), 4096);
        budget.allow(2048);
        assert_eq!(budget.tokens(), 2048);
    }

    #[test]
    fn a_part_that_is_kept_whole_costs_its_items_and_no_other() {
        let parts = in_parts(&[1, 1, 1, 1], |range| match range.len() {
            4 => Err(Miss::Halve("broken")),
            _ if range.start == 0 => Err::<_, Miss<_, ()>>(Miss::Keep("broken")),
            _ => Ok(range.collect()),
        });
        assert_eq!(parts, Ok(vec![Err("broken"), Err("broken"), Ok(2), Ok(3)]));
    }

    #[test]
    fn what_nothing_helps_against_ends_the_run() {
        let mut attempts = 0;
        let run = in_parts(&[1, 1, 1, 1], |range| {
            attempts += 1;
            if range.len() > 2 { Err(Miss::Halve(())) } else { Err::<Vec<()>, _>(Miss::End("lost")) }
        });
        assert_eq!((run, attempts), (Err("lost"), 2));
    }
}
