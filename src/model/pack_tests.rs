use super::*;
use proptest::prelude::*;

fn encodings(samples: &[Vec<u32>]) -> Vec<Arc<Encoding>> {
    samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect()
}

fn forest(samples: &[Vec<u32>]) -> Pack {
    Pack::forest(&encodings(samples), |_| Some(Vec::new()))
}

/// Samples that begin alike: prompts of a few tokens' alphabet, some of them continued by others.
fn groups() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let run = || prop::collection::vec(0u32..2, 1..70);
    (prop::collection::vec(run(), 1..4), prop::collection::vec((any::<prop::sample::Index>(), 0usize..80, run(), any::<bool>()), 1..12))
        .prop_map(|(prompts, completions)| {
            let mut samples: Vec<Vec<u32>> = Vec::new();
            for (which, cut, run, again) in completions {
                let known: Vec<&Vec<u32>> = prompts.iter().chain(samples.iter().filter(|_| again)).collect();
                let prompt = known[which.index(known.len())];
                samples.push(if cut == 0 { prompt.clone() } else { [&prompt[..cut.min(prompt.len())], &run[..]].concat() });
            }
            samples
        })
}

/// Every token of every sample has a row with its id and position, on the sample's own path.
fn check(pack: &Pack, samples: &[Vec<u32>]) -> Result<(), TestCaseError> {
    for (sample, ids) in samples.iter().enumerate() {
        let path: Vec<usize> = pack.path(pack.samples[sample].leaf).into_iter().flatten().collect();
        prop_assert_eq!(path.len(), ids.len());
        for (position, id) in ids.iter().enumerate() {
            let row = pack.row(sample, position);
            prop_assert_eq!((pack.ids()[row], pack.positions()[row] as usize, row), (*id, position, path[position]));
        }
    }
    Ok(())
}

#[test]
fn a_very_short_pack_is_lifted_to_the_fewest_rows_that_nobody_reads() {
    let pack = Pack::new(&encodings(&[vec![7]]));
    assert_eq!(pack.ids(), [7, 0, 0, 0]);
    assert_eq!(pack.nodes(), [Node { rows: 0..1, parent: None, start: 0 }]);
    assert_eq!(pack.computed_tokens(), 1);
}

#[test]
fn a_group_is_its_prompt_once_and_its_completions() {
    let prompt: Vec<u32> = (0..40).collect();
    let with = |completion: &[u32]| [&prompt[..], completion].concat();
    let pack = forest(&[with(&[1, 2]), with(&[3]), with(&[1, 2]), with(&[])]);
    let node = |rows, parent, start| Node { rows, parent, start };
    assert_eq!(pack.nodes(), [node(0..40, None, 0), node(40..42, Some(0), 40), node(42..43, Some(0), 40)]);
    // Equal samples are one, and the sample that is the prompt alone ends where the others go on.
    assert_eq!([0, 1, 2, 3].map(|sample| pack.shared_tokens(sample)), [42, 40, 42, 40]);
    assert_eq!(pack.computed_tokens(), 43);
    assert_eq!((pack.row(2, 41), pack.row(1, 40), pack.row(3, 39)), (41, 42, 39));
}

#[test]
fn groups_that_begin_alike_share_that_too() {
    let system: Vec<u32> = (0..MIN_SHARED as u32).collect();
    let sample = |prompt: u32, completion: u32| [&system[..], &[prompt; 20], &[completion; 3]].concat();
    let pack = forest(&[sample(50, 60), sample(50, 61), sample(51, 60), sample(51, 61)]);
    let shape: Vec<_> = pack.nodes().iter().map(|node| (node.start, node.rows.len(), node.parent)).collect();
    let system = MIN_SHARED;
    let prompt = system + 20;
    let expected = [
        (0, system, None),
        (system, 20, Some(0)),
        (prompt, 3, Some(1)),
        (prompt, 3, Some(1)),
        (system, 20, Some(0)),
        (prompt, 3, Some(4)),
        (prompt, 3, Some(4)),
    ];
    assert_eq!(shape, expected);
}

#[test]
fn a_short_beginning_in_common_is_not_worth_a_run() {
    let sample = |shared: usize, own: u32| [vec![9; shared], vec![own; 30]].concat();
    assert_eq!(forest(&[sample(MIN_SHARED - 1, 1), sample(MIN_SHARED - 1, 2)]).nodes().len(), 2);
    assert_eq!(forest(&[sample(MIN_SHARED, 1), sample(MIN_SHARED, 2)]).nodes().len(), 3);
}

#[test]
fn samples_share_only_under_the_same_key_and_never_without_one_or_with_segments() {
    let long = vec![1u32; 100];
    let samples = encodings(&[long.clone(), long.clone(), long[..60].to_vec(), long[..60].to_vec()]);
    let by_length = |tokens: usize| Some(vec![usize::from(tokens > 80)]);
    assert_eq!(Pack::forest(&samples, by_length).computed_tokens(), 160);
    assert_eq!(Pack::forest(&samples, |tokens| by_length(tokens).filter(|_| tokens > 80)).computed_tokens(), 220);
    assert_eq!(Pack::new(&samples).computed_tokens(), 320);
    let typed = Arc::new(Encoding::for_test(long.clone()).with_types(Some(vec![0; 100])));
    assert_eq!(Pack::forest(&[typed.clone(), typed], |_| Some(Vec::new())).computed_tokens(), 200);
}

proptest! {
    #[test]
    fn without_sharing_every_token_has_a_row_of_its_own(samples in groups()) {
        let pack = Pack::new(&encodings(&samples));
        check(&pack, &samples)?;
        let tokens: usize = samples.iter().map(Vec::len).sum();
        prop_assert_eq!(pack.ids().len(), tokens.max(MIN_ROWS));
        prop_assert_eq!(pack.computed_tokens(), tokens);
        prop_assert!((0..samples.len()).all(|sample| pack.shared_tokens(sample) == 0));
    }

    #[test]
    fn a_forest_leads_every_sample_over_its_own_tokens(samples in groups()) {
        let pack = forest(&samples);
        check(&pack, &samples)?;
        prop_assert_eq!(pack.ids().len(), pack.computed_tokens().max(MIN_ROWS));
        for (index, node) in pack.nodes().iter().enumerate() {
            prop_assert!(!node.rows.is_empty() && node.parent.is_none_or(|parent| parent < index));
            prop_assert!(node.parent.is_none_or(|parent| pack.nodes()[parent].start + pack.nodes()[parent].rows.len() == node.start));
        }
    }

    #[test]
    fn what_is_left_of_a_pack_is_all_that_was_not_there(samples in groups(), cuts in prop::collection::vec(0usize..100, 12)) {
        let pack = forest(&samples);
        // Every node lacks some tokens if its parent lacks all, and no sample its last.
        let mut there = vec![0; pack.nodes().len()];
        for (index, node) in pack.nodes().iter().enumerate() {
            let last = pack.samples.iter().any(|slot| slot.leaf == index);
            let most = node.rows.len() - usize::from(last);
            if node.parent.is_none_or(|parent| there[parent] == pack.nodes()[parent].rows.len()) {
                there[index] = cuts[index % cuts.len()].min(most);
            }
        }
        let rest = pack.without(&there);
        prop_assert_eq!(rest.computed_tokens() + there.iter().sum::<usize>(), pack.computed_tokens());
        prop_assert_eq!(pack.computed_without(|sample| rest.absent_tokens(sample)), rest.computed_tokens());
        prop_assert_eq!(rest.ids().len(), rest.computed_tokens().max(MIN_ROWS));
        for (sample, ids) in samples.iter().enumerate() {
            let absent = rest.absent_tokens(sample);
            let path: Vec<usize> = rest.path(rest.leaf(sample)).into_iter().flatten().collect();
            prop_assert_eq!(path.len() + absent, ids.len());
            for position in absent..ids.len() {
                let row = rest.row(sample, position);
                prop_assert_eq!((rest.ids()[row], rest.positions()[row] as usize, row), (ids[position], position, path[position - absent]));
            }
        }
    }

    #[test]
    fn whatever_is_worth_sharing_is_computed_once(samples in groups()) {
        let pack = forest(&samples);
        let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        for (a, first) in samples.iter().enumerate() {
            let others = || samples.iter().enumerate().filter(|(b, _)| *b != a);
            let longest = others().map(|(_, other)| common(first, other)).max().unwrap_or(0);
            // Sharing may end up to one shortest run early, but a twin is always found.
            let twin = others().any(|(_, other)| other == first);
            let shared = pack.shared_tokens(a);
            prop_assert!(shared <= longest && (twin || shared + MIN_SHARED > longest), "{shared} of {longest}");
            prop_assert!(!twin || shared == first.len());
            for (b, second) in others() {
                let same = (0..common(first, second)).filter(|&position| pack.row(a, position) == pack.row(b, position)).count();
                prop_assert!(same + MIN_SHARED > common(first, second) && (same == first.len() || first != second));
            }
        }
    }
}
