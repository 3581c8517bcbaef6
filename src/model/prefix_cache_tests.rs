use proptest::prelude::*;

use super::*;
use crate::text::Encoding;

/// Stands for the keys and values of a block: all tokens up to its end, which they depend on.
type Path = Vec<u32>;

/// Runs one pack; gives how many tokens of each sample were there.
fn run(cache: &mut PrefixCache<Path>, samples: &[Vec<u32>], read: impl Fn(usize) -> usize) -> Vec<usize> {
    let encodings: Vec<_> = samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect();
    let key = |_| Some(Vec::new());
    let pack = Pack::forest(&encodings, key);
    let plan = cache.plan(&pack, key, read);
    let rest = pack.without(&plan.there);
    let there: Vec<usize> = (0..samples.len()).map(|sample| rest.absent_tokens(sample)).collect();
    for (sample, ids) in samples.iter().enumerate() {
        let mut root = rest.leaf(sample);
        while let Some(parent) = rest.nodes()[root].parent {
            root = parent;
        }
        let past = &plan.past[root];
        assert_eq!(past.len(), there[sample].div_ceil(BLOCK));
        for (index, block) in past.iter().enumerate() {
            let most = there[sample].min((index + 1) * BLOCK);
            assert_eq!(block[..most], ids[..most], "what is used was made of the sample's own tokens");
        }
    }
    for wanted in plan.wanted {
        let path = |sample| std::iter::successors(Some(pack.leaf(sample)), |node| pack.nodes()[*node].parent);
        let sample = (0..samples.len()).find(|&sample| path(sample).any(|node| node == wanted.node));
        let ids = &samples[sample.expect("a node belongs to a sample")];
        cache.fill(wanted, Some(ids[..(wanted.block + 1) * BLOCK].to_vec()));
    }
    assert!(cache.len() <= cache.capacity());
    there
}

fn to_the_last(samples: &[Vec<u32>]) -> impl Fn(usize) -> usize {
    |sample| samples[sample].len() - 1
}

fn alone(cache: &mut PrefixCache<Path>, sample: &[u32]) -> usize {
    run(cache, &[sample.to_vec()], |_| sample.len() - 1)[0]
}

/// A sample of a prompt of 100 tokens and a completion of 150.
fn sibling(prompt: u32, completion: u32) -> Vec<u32> {
    [vec![prompt; 100], vec![1000 + completion; 150]].concat()
}

#[test]
fn a_sibling_that_comes_later_takes_the_prompt_to_its_very_end() {
    let mut cache = PrefixCache::new(100);
    assert_eq!([1, 2, 3].map(|completion| alone(&mut cache, &sibling(7, completion))), [0, 100, 100]);
    assert_eq!(alone(&mut cache, &sibling(8, 1)), 0);
}

#[test]
fn the_token_that_is_read_is_computed_even_where_all_is_there() {
    let mut cache = PrefixCache::new(100);
    let sample = vec![5; 3 * BLOCK];
    assert_eq!([0, 1].map(|_| alone(&mut cache, &sample)), [0, 3 * BLOCK - 1]);
    // A step that stands earlier needs its own token and all behind it.
    assert_eq!(run(&mut cache, &[sample], |_| 70), [70]);
}

#[test]
fn a_group_that_comes_at_once_takes_what_one_of_them_left() {
    let mut cache = PrefixCache::new(100);
    alone(&mut cache, &sibling(7, 1));
    let group = [sibling(7, 2), sibling(8, 1), sibling(7, 3), sibling(8, 2)];
    assert_eq!(run(&mut cache, &group, to_the_last(&group)), [100, 0, 100, 0]);
}

#[test]
fn a_run_of_which_all_is_there_leads_to_those_of_which_too_little_is() {
    let mut cache = PrefixCache::new(100);
    let prompt = vec![7; BLOCK + 11];
    let sample = |own: &[u32]| [&prompt[..], own, &[9; 150]].concat();
    alone(&mut cache, &sample(&[1, 2, 3]));
    // 11 + 2 tokens of the second block agree: less than is worth a part of it, but the group's prompt is there.
    let group = [sample(&[1, 2, 4]), sample(&[5])];
    assert_eq!(run(&mut cache, &group, to_the_last(&group)), [BLOCK + 11; 2]);
}

#[test]
fn samples_of_another_key_take_nothing() {
    let mut cache: PrefixCache<Path> = PrefixCache::new(100);
    let encoding = Arc::new(Encoding::for_test(sibling(7, 1)));
    let mut there = |key: Option<PrefixKey>| {
        let pack = Pack::new(std::slice::from_ref(&encoding));
        let plan = cache.plan(&pack, |_| key.clone(), |_| 249);
        for wanted in plan.wanted {
            cache.fill(wanted, Some(Vec::new()));
        }
        plan.there[0]
    };
    let keys = [Some(vec![0]), Some(vec![1]), None, Some(vec![0]), Some(vec![1])];
    assert_eq!(keys.map(&mut there), [0, 0, 0, 3 * BLOCK, 3 * BLOCK]);
}

#[test]
fn what_could_not_be_kept_is_neither_found_nor_counted() {
    let mut cache: PrefixCache<Path> = PrefixCache::new(100);
    let encoding = Arc::new(Encoding::for_test(vec![5; 4 * BLOCK]));
    let pack = Pack::new(&[encoding]);
    let mut plan = cache.plan(&pack, |_| Some(Vec::new()), |_| 4 * BLOCK - 1);
    assert_eq!(plan.wanted.len(), 4);
    // The last one is filled although what it stands on was not.
    cache.fill(plan.wanted[0], Some(Vec::new()));
    cache.fill(plan.wanted[1], None);
    for wanted in plan.wanted.split_off(2) {
        cache.fill(wanted, Some(Vec::new()));
    }
    assert_eq!(cache.len(), 1);
    assert_eq!(cache.plan(&pack, |_| Some(Vec::new()), |_| 4 * BLOCK - 1).there, [BLOCK]);
}

#[test]
fn prompts_that_are_used_again_outlive_a_stream_of_completions_that_are_not() {
    let mut cache = PrefixCache::new(12);
    alone(&mut cache, &sibling(7, 1));
    assert_eq!(alone(&mut cache, &sibling(7, 2)), 100);
    for stranger in 0..50 {
        assert_eq!(alone(&mut cache, &sibling(100 + stranger, 0)), 0);
    }
    assert_eq!(alone(&mut cache, &sibling(7, 3)), 100);
}

#[test]
fn a_new_prompt_finds_room_between_two_siblings_where_all_others_are_used_again() {
    let mut cache = PrefixCache::new(12);
    for prompt in 0..20 {
        for completion in 0..3 {
            assert_eq!(alone(&mut cache, &sibling(prompt, completion)), if completion == 0 { 0 } else { 100 });
        }
    }
}

#[test]
fn a_pack_larger_than_the_cache_leaves_its_beginnings() {
    let mut cache = PrefixCache::new(3);
    let group: Vec<_> = (0..5).map(|completion| sibling(7, completion)).collect();
    run(&mut cache, &group, to_the_last(&group));
    assert_eq!(alone(&mut cache, &sibling(7, 9)), 100);
    assert_eq!(alone(&mut PrefixCache::new(0), &sibling(7, 9)), 0);
}

/// Packs of samples that begin alike, of few tokens.
fn packs() -> impl Strategy<Value = Vec<Vec<Vec<u32>>>> {
    let run = |most| prop::collection::vec(0u32..2, 1..most);
    let sample = (any::<prop::sample::Index>(), 0usize..300, run(200));
    (prop::collection::vec(run(300), 1..4), prop::collection::vec(prop::collection::vec(sample, 1..5), 1..12)).prop_map(
        |(prompts, packs)| {
            let sample = |(which, cut, own): (prop::sample::Index, usize, Vec<u32>)| {
                let prompt = &prompts[which.index(prompts.len())];
                [&prompt[..cut.max(prompt.len() / 2).min(prompt.len())], &own].concat()
            };
            packs.into_iter().map(|pack| pack.into_iter().map(sample).collect()).collect()
        },
    )
}

proptest! {
    #[test]
    fn whatever_is_used_belongs_to_the_sample_and_the_bound_holds(packs in packs(), capacity in 0usize..30, early in any::<prop::sample::Index>()) {
        let mut cache = PrefixCache::new(capacity);
        for pack in packs {
            let read = |sample: usize| early.index(pack[sample].len());
            let there = run(&mut cache, &pack, read);
            for (sample, there) in there.into_iter().enumerate() {
                prop_assert!(there <= read(sample));
            }
        }
    }

    #[test]
    fn with_room_for_all_nothing_that_a_block_holds_is_computed_again(packs in packs()) {
        let mut cache = PrefixCache::new(usize::MAX);
        let mut seen: Vec<Vec<u32>> = Vec::new();
        for pack in packs {
            let there = run(&mut cache, &pack, to_the_last(&pack));
            for (sample, there) in pack.iter().zip(there) {
                // Whole blocks of earlier samples, less what a run of the forest or the least worth a part may lack.
                let held = seen.iter().map(|other| common_prefix(&other[..other.len() / BLOCK * BLOCK], &sample[..sample.len() - 1]));
                // A token that is read of one sample in the pack is computed for all that run through it.
                let read = pack.iter().filter(|mate| sample.starts_with(mate)).map(|mate| mate.len() - 1).min();
                let most = held.max().unwrap_or(0);
                let least = most.min(read.unwrap_or(usize::MAX));
                prop_assert!(there <= most && there + MIN_SHARED > least, "{there} of {most}");
            }
            seen.extend(pack);
        }
    }

    #[test]
    fn the_books_of_the_cache_agree_with_one_another(packs in packs(), capacity in 1usize..20) {
        let mut cache = PrefixCache::new(capacity);
        for pack in packs {
            run(&mut cache, &pack, to_the_last(&pack));
            prop_assert_eq!(cache.by_key.len(), cache.entries.len());
            let mut ends: [BTreeSet<(u64, u64)>; 2] = Default::default();
            let mut counts = [0; 2];
            for (id, entry) in &cache.entries {
                counts[usize::from(entry.again)] += 1;
                let followers = cache.entries.values().filter(|other| other.key.0 == Place::After(*id)).count();
                prop_assert_eq!(followers, entry.followers);
                if followers == 0 {
                    ends[usize::from(entry.again)].insert((entry.used, *id));
                }
            }
            prop_assert_eq!((&ends, counts), (&cache.ends, cache.counts));
        }
    }
}
