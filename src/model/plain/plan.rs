//! Which queries meet which keys in one product. Pure.
//!
//! A task is a run of queries of one node and the keys that they see, gathered along its path. Tasks of like size make a
//! batch, lifted to the largest of them by copies of their own first query and first key, so that no sample's numbers
//! reach another's: a masked key adds exactly nothing only where it is finite.
//!
//! Where shapes are fixed, a query's place in its product, and the size of that product, follow from the query's position
//! and the length of its sample alone, whatever the pack holds and however the sample was cut into nodes.

use std::ops::Range;

use crate::model::pack::Pack;

/// Queries of one task, at most.
const QUERIES: usize = 512;
/// Elements of a batch's scores, and of its gathered keys, at most, where one task alone does not have more: a quarter of a
/// gigabyte in float32.
pub const ELEMENTS: usize = 1 << 26;
/// The fewest that a size is lifted to.
const SMALLEST: usize = 16;
/// Positions whose queries are in one task where shapes are fixed.
const FIXED_QUERIES: usize = 64;
/// Tasks of a product where shapes are fixed, unless its scores would be too many elements.
const FIXED_TASKS: usize = 8;

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
    /// The place of the first query in the product.
    pub slot: usize,
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
            tasks.push(Task { node, queries, position, keys: (position + 1).saturating_sub(window)..end, slot: 0 });
        }
    }
    tasks
}

/// What of a model decides how much a task takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    pub heads: usize,
    /// Columns of the keys: those of all their heads.
    pub keys: usize,
}

impl Width {
    /// Elements that so many queries and keys of one task take.
    fn elements(self, queries: usize, keys: usize) -> usize {
        keys * (self.heads * queries).max(self.keys).max(1)
    }
}

/// Tasks that are computed in one product, and the size that all of them are lifted to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub tasks: Vec<Task>,
    /// As many as the product is made for: behind the last task the first one stands again.
    pub count: usize,
    pub queries: usize,
    pub keys: usize,
}

/// Every task in one batch, in shapes that are fixed.
pub fn fixed_batches(pack: &Pack, width: Width, sight: Sight) -> Vec<Batch> {
    let mut tasks: Vec<(usize, Task)> = Vec::new();
    for (node, run) in pack.nodes().iter().enumerate() {
        let total = run.start + run.rows.len();
        let window = sight.window.unwrap_or(usize::MAX);
        let mut position = run.start;
        while position < total {
            let first = position - position % FIXED_QUERIES;
            let next = total.min(first + FIXED_QUERIES);
            let row = run.rows.start + position - run.start;
            // What the queries of all these positions see, be they here or in another node.
            let start = (first + 1).saturating_sub(window);
            let end = if sight.causal { first + FIXED_QUERIES } else { total.min((first + FIXED_QUERIES - 1).saturating_add(window)) };
            let task = Task { node, queries: row..row + next - position, position, keys: start..end.min(total), slot: position - first };
            tasks.push((class(end - start), task));
            position = next;
        }
    }
    tasks.sort_by_key(|(keys, _)| *keys);
    let mut batches: Vec<Batch> = Vec::new();
    for (keys, task) in tasks {
        match batches.last_mut() {
            Some(batch) if batch.keys == keys && batch.tasks.len() < batch.count => batch.tasks.push(task),
            _ => {
                let count = (ELEMENTS / width.elements(FIXED_QUERIES, keys).max(1)).clamp(1, FIXED_TASKS);
                batches.push(Batch { tasks: vec![task], count, queries: FIXED_QUERIES, keys });
            }
        }
    }
    batches
}

/// Every task in one batch.
pub fn batches(mut tasks: Vec<Task>, width: Width) -> Vec<Batch> {
    // A stable sort: within a size the order of the nodes stays.
    tasks.sort_by_key(size);
    let mut batches: Vec<Batch> = Vec::new();
    for task in tasks {
        let (queries, keys) = (task.queries.len(), task.keys.len());
        if let Some(batch) = batches.last_mut()
            && batch.tasks.first().map(size) == Some(size(&task))
            && (batch.tasks.len() + 1) * width.elements(batch.queries.max(queries), batch.keys.max(keys)) <= ELEMENTS
        {
            (batch.queries, batch.keys) = (batch.queries.max(queries), batch.keys.max(keys));
            batch.tasks.push(task);
            batch.count += 1;
            continue;
        }
        batches.push(Batch { tasks: vec![task], count: 1, queries, keys });
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
        fn the_shape_that_a_query_meets_follows_from_its_sample_alone(samples in samples(), window in prop::option::of(1usize..700), causal in any::<bool>(), heads in 1usize..40) {
            let (sight, width) = (Sight { causal, window }, Width { heads, keys: 128 });
            // For every row of a pack: the size of its product, its place in it, and the first key.
            let places = |pack: &Pack| {
                let mut places = vec![None; pack.computed_tokens()];
                for batch in fixed_batches(pack, width, sight) {
                    assert!(batch.tasks.len() <= batch.count && batch.tasks.iter().all(|task| task.keys.len() <= batch.keys));
                    for task in &batch.tasks {
                        for (place, row) in task.queries.clone().enumerate() {
                            let known = places[row].replace((batch.count, batch.queries, batch.keys, task.slot + place, task.keys.start));
                            assert!(known.is_none() && task.slot + place < batch.queries);
                            let position = task.position + place;
                            let total = pack.nodes()[task.node].start + pack.nodes()[task.node].rows.len();
                            let sees = |key: &usize| if causal { *key <= position } else { true } && position.abs_diff(*key) < window.unwrap_or(usize::MAX);
                            assert!((0..total).filter(sees).all(|key| task.keys.contains(&key)));
                        }
                    }
                }
                places
            };
            // Only decoders share what they begin with.
            let encodings: Vec<_> = samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect();
            let pack = Pack::forest(&encodings, |_| causal.then(Vec::new));
            let together = places(&pack);
            prop_assert!(together.iter().all(Option::is_some));
            for (sample, encoding) in encodings.iter().enumerate() {
                let alone = places(&Pack::new(std::slice::from_ref(encoding)));
                for (position, place) in alone.iter().take(encoding.tokens()).enumerate() {
                    prop_assert_eq!(*place, together[pack.row(sample, position)], "position {}", position);
                }
            }
        }

        #[test]
        fn batches_hold_every_task_once_and_little_more_than_they_need(samples in samples(), heads in 1usize..40, keys in 1usize..4000) {
            let tasks = tasks(&forest(&samples), heads, Sight { causal: true, window: None });
            let count = tasks.len();
            let batches = batches(tasks.clone(), Width { heads, keys });
            prop_assert_eq!(batches.iter().map(|batch| batch.tasks.len()).sum::<usize>(), count);
            for batch in batches {
                prop_assert_eq!(batch.count, batch.tasks.len());
                for task in &batch.tasks {
                    let (queries, keys) = (task.queries.len(), task.keys.len());
                    prop_assert!(queries <= batch.queries && keys <= batch.keys);
                    // A quarter more, but for the smallest.
                    let most = |count: usize| count + (count / 4).max(SMALLEST - 1);
                    prop_assert!(batch.queries <= most(queries) && batch.keys <= most(keys), "{queries} x {keys} in {batch:?}");
                }
                let (scores, gathered) = (heads * batch.queries * batch.keys, keys * batch.keys);
                prop_assert!(batch.tasks.len() == 1 || batch.tasks.len() * scores.max(gathered) <= ELEMENTS);
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
