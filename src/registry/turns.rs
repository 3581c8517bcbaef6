//! Whose work comes next, where tenants take turns. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// What waits, by tenant. Each gives one thing in its turn; within a tenant what came first goes first.
#[derive(Debug)]
pub(super) struct Turns<T> {
    waiting: HashMap<Arc<str>, VecDeque<T>>,
    /// Tenants that have something waiting.
    order: VecDeque<Arc<str>>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { waiting: HashMap::new(), order: VecDeque::new() }
    }
}

impl<T> Turns<T> {
    pub fn push(&mut self, tenant: &Arc<str>, thing: T) {
        let waiting = self.waiting.entry(tenant.clone()).or_default();
        if waiting.is_empty() {
            self.order.push_back(tenant.clone());
        }
        waiting.push_back(thing);
    }

    pub fn next(&mut self) -> Option<T> {
        let tenant = self.order.pop_front()?;
        let waiting = self.waiting.get_mut(&tenant)?;
        let thing = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&tenant);
        } else {
            self.order.push_back(tenant);
        }
        thing
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn everything_comes_once_in_its_tenants_order_and_nobody_waits_for_two_of_another(
            steps in prop::collection::vec(prop::option::weighted(0.7, 0usize..4), 1..200),
        ) {
            let names: Vec<Arc<str>> = (0..4).map(|i| Arc::from(format!("t{i}"))).collect();
            let mut turns = Turns::<(usize, usize)>::default();
            let (mut waiting, mut pushed) = (vec![VecDeque::<usize>::new(); 4], 0);
            // Turns of each other tenant since somebody who waits had one.
            let mut since = [[0usize; 4]; 4];
            let end = std::iter::repeat_n(None, steps.len());
            for step in steps.into_iter().chain(end) {
                let Some(who) = step else {
                    let expected = waiting.iter().any(|waiting| !waiting.is_empty());
                    let Some((who, thing)) = turns.next() else { prop_assert!(!expected); continue };
                    prop_assert_eq!(waiting[who].pop_front(), Some(thing));
                    since[who] = [0; 4];
                    for other in (0..4).filter(|&other| other != who && !waiting[other].is_empty()) {
                        since[other][who] += 1;
                        prop_assert!(since[other][who] <= 1, "{other} waits for {who} twice");
                    }
                    continue;
                };
                if waiting[who].is_empty() {
                    since[who] = [0; 4];
                }
                pushed += 1;
                waiting[who].push_back(pushed);
                turns.push(&names[who], (who, pushed));
            }
            prop_assert!(turns.waiting.is_empty() && turns.order.is_empty());
        }
    }
}
