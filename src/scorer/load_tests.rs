use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::model::{Limits, ModelError, Output, Pack};
use crate::scorer::{NewJob, PackLimits, Queue, QueueBounds};

/// Samples of the same thirties of tokens may share, and each token costs a fifth more for every ten before it.
struct Priced;

impl RewardModel for Priced {
    fn forward(&self, _: &Pack) -> Result<Vec<Output>, ModelError> {
        Err(ModelError::Failed("only priced".to_owned()))
    }

    fn limits(&self) -> Limits {
        Limits { max_tokens: 1 << 20, outputs: 1, parameters: 0, device_bytes: 0 }
    }

    fn prefix_key(&self, tokens: usize) -> Option<PrefixKey> {
        Some(vec![tokens / 300])
    }

    fn token_cost(&self, from: usize, to: usize) -> usize {
        to - from + (to * to - from * from) / 100
    }
}

fn encodings(samples: Vec<Vec<u32>>) -> Vec<Arc<Encoding>> {
    samples.into_iter().map(|ids| Arc::new(Encoding::for_test(ids))).collect()
}

fn group(prompt: u32, tokens: usize, completions: std::ops::Range<u32>, each: usize) -> Vec<Arc<Encoding>> {
    encodings(completions.map(|own| [vec![prompt; tokens], vec![1000 + own; each]].concat()).collect())
}

fn queue() -> Queue {
    Queue::new(QueueBounds { max_samples: 1 << 20, max_tokens: 1 << 30 }, Duration::from_secs(1))
}

fn job(tenant: usize, samples: Vec<Load>) -> NewJob {
    NewJob { lane: 0, tenant: tenant.to_string().into(), priority: 0, arrived: Instant::now(), deadline: None, samples }
}

#[test]
fn the_hashes_of_a_sample_are_the_same_whatever_stands_before_it() {
    let hashes = RandomState::new();
    let samples = [group(1, 40, 0..3, 9), group(1, 23, 7..9, 30), group(2, 40, 0..1, 9)].concat();
    let together = loads(&Priced, 0, &samples, &hashes);
    for (sample, load) in samples.iter().zip(&together) {
        assert_eq!(loads(&Priced, 0, std::slice::from_ref(sample), &hashes), std::slice::from_ref(load));
    }
    let other_lane = loads(&Priced, 1, &samples, &hashes);
    assert!(other_lane.iter().zip(&together).all(|(a, b)| a.marks.iter().zip(&*b.marks).all(|(a, b)| a.hash != b.hash)));
}

#[test]
fn samples_of_segments_and_of_other_keys_share_nothing() {
    let hashes = RandomState::new();
    let long = group(1, 200, 0..1, 99).into_iter().chain(group(1, 200, 0..1, 101)).collect::<Vec<_>>();
    let [first, second] = &loads(&Priced, 0, &long, &hashes)[..] else { panic!("two") };
    let there = first.marks.iter().map(|mark| mark.hash).collect();
    assert_eq!(second.rest(&there), Rest { tokens: 301, cost: 301 + 301 * 301 / 100, akin: false });
    let typed = Arc::new(Encoding::for_test(vec![1; 40]).with_types(Some(vec![0; 40])));
    assert!(loads(&Priced, 0, &[typed], &hashes)[0].marks.is_empty());
}

#[test]
fn a_group_is_one_pack_whether_it_comes_as_one_request_or_as_many() {
    // A long prompt costs nearly a pack by its attention, so the second sample alone is above the budget in cost.
    for (prompt, count, each) in [(4000, 4, 500), (512, 16, 128)] {
        let (hashes, now) = (RandomState::new(), Instant::now());
        let limits = PackLimits { max_tokens: 8192, max_samples: 1024, wait: Duration::ZERO };
        struct Model(usize);
        impl RewardModel for Model {
            fn forward(&self, _: &Pack) -> Result<Vec<Output>, ModelError> {
                Err(ModelError::Failed("only priced".to_owned()))
            }
            fn limits(&self) -> Limits {
                Limits { max_tokens: 8192, outputs: 1, parameters: 0, device_bytes: 0 }
            }
            fn prefix_key(&self, _: usize) -> Option<PrefixKey> {
                Some(Vec::new())
            }
            fn token_cost(&self, from: usize, to: usize) -> usize {
                to - from + (to * to - from * from) / self.0
            }
        }
        let samples = group(1, prompt, 0..count, each);
        let loads = loads(&Model(5100), 0, &samples, &hashes);
        let mut queue = queue();
        queue.push(job(0, loads.clone())).expect("room");
        let whole = queue.next_pack(now, limits);
        assert_eq!(whole.picks.len(), samples.len());
        assert!(whole.computed <= prompt + samples.len() * (each + 31), "{}", whole.computed);
        for (own, load) in loads.into_iter().enumerate() {
            queue.push(job(own, vec![load])).expect("room");
        }
        let singles = queue.next_pack(now, limits);
        assert_eq!((singles.picks.len(), singles.computed), (samples.len(), whole.computed));
    }
}

/// Samples that begin with a part of an earlier one each, cut anywhere.
fn tree() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), prop::collection::vec(0u32..2, 0..90)), 1..30)
        .prop_map(|steps| {
            let mut samples: Vec<Vec<u32>> = vec![Vec::new()];
            for (parent, cut, tail) in steps {
                let parent = &samples[parent.index(samples.len())];
                let sample = [&parent[..cut.index(parent.len() + 1)], &tail].concat();
                samples.push(sample);
            }
            samples.retain(|sample| !sample.is_empty());
            samples
        })
}

proptest! {
    #[test]
    fn a_pack_never_costs_more_than_it_was_taken_for_nor_much_less(
        samples in tree(), of in prop::collection::vec(0usize..4, 30), budget in 20usize..600, max_samples in 1usize..20,
    ) {
        let (hashes, now) = (RandomState::new(), Instant::now());
        let samples = encodings(samples);
        let mut queue = queue();
        let mut jobs = std::collections::HashMap::new();
        for (index, sample) in samples.chunks(2).enumerate() {
            let id = queue.push(job(of[index], loads(&Priced, 0, sample, &hashes))).expect("room");
            jobs.insert(id, sample);
        }
        while !queue.is_empty() {
            let draw = queue.next_pack(now, PackLimits { max_tokens: budget, max_samples, wait: Duration::ZERO });
            let picked: Vec<Arc<Encoding>> = draw.picks.iter().map(|pick| jobs[&pick.job][pick.sample].clone()).collect();
            let pack = Pack::forest(&picked, |tokens| Priced.prefix_key(tokens));
            let computed = pack.computed_tokens();
            prop_assert!(computed <= draw.computed && draw.computed <= computed + 2 * MIN_SHARED * picked.len(), "{computed} {draw:?}");
            let cost: usize = pack.nodes().iter().map(|node| Priced.token_cost(node.start, node.start + node.rows.len())).sum();
            prop_assert!(cost <= draw.cost, "{cost} {draw:?}");
            prop_assert!(picked.len() == 1 || computed <= budget && draw.cost <= 2 * budget.max(samples.iter().map(|sample| Priced.token_cost(0, sample.tokens())).max().unwrap_or(0)));
        }
    }
}
