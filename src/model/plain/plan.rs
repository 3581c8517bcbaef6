//! Which queries meet which keys in one product. Pure.
//!
//! A task is a run of queries of one node and the keys that they see, gathered along its path. Tasks of like size make a
//! batch, lifted to the largest of them by copies of their own first query and first key, so that no sample's numbers
//! reach another's: a masked key adds exactly nothing only where it is finite.

use std::ops::Range;

use crate::model::pack::Pack;

/// Queries of one task, at most.
const QUERIES: usize = 512;
/// Elements of a batch's scores, at most, where one task alone does not have more: a quarter of a gigabyte in float32.
const ELEMENTS: usize = 1 << 26;
/// The fewest that a size is lifted to.
const SMALLEST: usize = 16;

/// Some queries of one node, and the keys that at least one of them sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub node: usize,
    /// Rows of the pack.
    pub queries: Range<usize>,
    /// Position of the first query.
    pub position: usize,
    /// Positions.
    pub keys: Range<usize>,
}

/// What a query at one position sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    pub causal: bool,
    /// Only keys that are less than this many positions away.
    pub window: Option<usize>,
}

/// All tasks of a pack, in the order of its nodes.
pub fn tasks(pack: &Pack, heads: usize, sight: Sight) -> Vec<Task> {
    let mut tasks = Vec::new();
    for (node, run) in pack.nodes().iter().enumerate() {
        let total = run.start + run.rows.len();
        let step = (ELEMENTS / (heads * total).max(1)).clamp(SMALLEST, QUERIES);
        for first in (0..run.rows.len()).step_by(step) {
            let queries = run.rows.start + first..run.rows.end.min(run.rows.start + first + step);
            let (position, last) = (run.start + first, run.start + first + queries.len() - 1);
            let window = sight.window.unwrap_or(total);
            let end = if sight.causal { last + 1 } else { total.min(last.saturating_add(window)) };
            tasks.push(Task { node, queries, position, keys: (position + 1).saturating_sub(window)..end });
        }
    }
    tasks
}

/// Tasks that are computed in one product, and the size that all of them are lifted to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub tasks: Vec<Task>,
    pub queries: usize,
    pub keys: usize,
}

/// Every task in one batch.
pub fn batches(mut tasks: Vec<Task>, heads: usize) -> Vec<Batch> {
    // A stable sort: within a size the order of the nodes stays.
    tasks.sort_by_key(size);
    let mut batches: Vec<Batch> = Vec::new();
    for task in tasks {
        let (queries, keys) = (task.queries.len(), task.keys.len());
        if let Some(batch) = batches.last_mut()
            && batch.tasks.first().map(size) == Some(size(&task))
            && (batch.tasks.len() + 1) * heads * batch.queries.max(queries) * batch.keys.max(keys) <= ELEMENTS
        {
            (batch.queries, batch.keys) = (batch.queries.max(queries), batch.keys.max(keys));
            batch.tasks.push(task);
            continue;
        }
        batches.push(Batch { tasks: vec![task], queries, keys });
    }
    batches
}

fn size(task: &Task) -> (usize, usize) {
    (class(task.keys.len()), class(task.queries.len()))
}

/// Four sizes for every doubling.
fn class(count: usize) -> usize {
    let step = (count.max(1).next_power_of_two() / 8).max(SMALLEST);
    count.next_multiple_of(step)
}

/// The rows of the pack at these positions of a node's path.
pub fn rows_at(pack: &Pack, node: usize, positions: Range<usize>) -> Vec<u32> {
    let mut rows = Vec::with_capacity(positions.len());
    let mut start = 0;
    for run in pack.path(node) {
        let (from, to) = (positions.start.max(start), positions.end.min(start + run.len()));
        rows.extend((from..to.max(from)).map(|position| (run.start + position - start) as u32));
        start += run.len();
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::text::Encoding;

    fn forest(samples: &[Vec<u32>]) -> Pack {
        let encodings: Vec<_> = samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect();
        Pack::forest(&encodings, |_| Some(Vec::new()))
    }

    fn samples() -> impl Strategy<Value = Vec<Vec<u32>>> {
        let run = |most| prop::collection::vec(0u32..5, 1..most);
        (run(60), prop::collection::vec((0usize..60, run(1200)), 1..8)).prop_map(|(prompt, completions)| {
            completions.into_iter().map(|(cut, own)| [&prompt[..cut.min(prompt.len())], &own].concat()).collect()
        })
    }

    proptest! {
        #[test]
        fn every_query_is_in_one_task_with_all_keys_that_it_sees(samples in samples(), window in prop::option::of(1usize..700), causal in any::<bool>()) {
            let pack = forest(&samples);
            let sight = Sight { causal, window };
            let tasks = tasks(&pack, 4, sight);
            let mut queries: Vec<usize> = tasks.iter().flat_map(|task| task.queries.clone()).collect();
            queries.sort_unstable();
            prop_assert_eq!(queries, (0..pack.computed_tokens()).collect::<Vec<_>>());
            let window = window.unwrap_or(usize::MAX);
            for task in &tasks {
                let node = &pack.nodes()[task.node];
                for (query, position) in task.queries.clone().zip(task.position..) {
                    prop_assert_eq!(pack.positions()[query] as usize, position);
                    let sees = |key: &usize| if causal { *key <= position && position - key < window } else { position.abs_diff(*key) < window };
                    let seen = (0..node.start + node.rows.len()).filter(sees);
                    prop_assert!(seen.into_iter().all(|key| task.keys.contains(&key)));
                }
                let rows = rows_at(&pack, task.node, task.keys.clone());
                prop_assert_eq!(rows.len(), task.keys.len());
                for (row, position) in rows.iter().zip(task.keys.clone()) {
                    prop_assert_eq!(pack.positions()[*row as usize] as usize, position);
                }
            }
        }

        #[test]
        fn batches_hold_every_task_once_and_little_more_than_they_need(samples in samples(), heads in 1usize..40) {
            let tasks = tasks(&forest(&samples), heads, Sight { causal: true, window: None });
            let count = tasks.len();
            let batches = batches(tasks.clone(), heads);
            prop_assert_eq!(batches.iter().map(|batch| batch.tasks.len()).sum::<usize>(), count);
            for batch in batches {
                for task in &batch.tasks {
                    let (queries, keys) = (task.queries.len(), task.keys.len());
                    prop_assert!(queries <= batch.queries && keys <= batch.keys);
                    // A quarter more, but for the smallest.
                    let most = |count: usize| count + (count / 4).max(SMALLEST - 1);
                    prop_assert!(batch.queries <= most(queries) && batch.keys <= most(keys), "{queries} x {keys} in {batch:?}");
                }
                let elements = batch.tasks.len() * heads * batch.queries * batch.keys;
                prop_assert!(batch.tasks.len() == 1 || elements <= ELEMENTS);
            }
        }
    }

    #[test]
    fn a_shared_prompt_is_gathered_for_every_completion() {
        let prompt: Vec<u32> = (0..20).collect();
        let pack = forest(&[[&prompt[..], &[30, 31]].concat(), [&prompt[..], &[40]].concat()]);
        let tasks = tasks(&pack, 1, Sight { causal: true, window: None });
        let keys: Vec<_> = tasks.iter().map(|task| rows_at(&pack, task.node, task.keys.clone())).collect();
        let prompt: Vec<u32> = (0..20).collect();
        assert_eq!(keys, [prompt.clone(), [&prompt[..], &[20, 21]].concat(), [&prompt[..], &[22]].concat()]);
        assert_eq!(tasks.iter().map(|task| task.position).collect::<Vec<_>>(), [0, 20, 20]);
    }
}
