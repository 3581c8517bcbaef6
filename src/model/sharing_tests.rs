//! Sharing changes no bit: the same samples alone, packed apart, packed as a forest, and behind what earlier packs left.

use std::ops::Range;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Dtype, Elements, Manifest, TensorInfo};
use crate::text::Encoding;

const VOCAB: usize = 12;
const HIDDEN: usize = 48;
const INNER: usize = 96;

/// Weights that are drawn when they are read, by their name; the embedding of [`BROKEN`] is no number.
struct Random(Manifest);

const BROKEN: u32 = VOCAB as u32;

impl TensorSource for Random {
    fn manifest(&self) -> &Manifest {
        &self.0
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let seed = name.bytes().fold(7u32, |state, byte| state.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let value = |i: usize| {
            let mixed = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
            let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85eb_ca6b);
            (mixed >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let broken = |i: usize| name.contains("embed") && i / HIDDEN == BROKEN as usize;
        let draw = |i| match name {
            _ if broken(i) => f32::NAN,
            _ if name.contains("norm") => 1.0 + 0.1 * value(i),
            _ => 0.4 * value(i),
        };
        *into = Elements::F32(range.map(draw).collect());
        Ok(())
    }
}

/// A decoder of two layers: 3 query heads to every key head, and whatever else `more` says.
fn model(family: &str, more: Value) -> Arc<dyn RewardModel> {
    loaded(family, more, |what| load_on(&Devices::open(&[Place::Cpu]).expect("opens"), Dtype::F32, what, &mut |_, _| {}).expect("loads"))
}

pub fn loaded<T>(family: &str, more: Value, load: impl Fn(&What) -> T) -> T {
    let mut config = json!({
        "model_type": family, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 8, "num_hidden_layers": 2, "vocab_size": VOCAB + 1, "max_position_embeddings": 512, "id2label": {"0": "LABEL_0"},
    });
    config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let architecture = Architecture::parse(&config).expect("a valid configuration");
    let dim = architecture.head_dim;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB + 1, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("score.weight".to_owned(), vec![1, HIDDEN]),
    ];
    for layer in 0..2 {
        let mut shapes = vec![
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![6 * dim, HIDDEN]),
            ("self_attn.k_proj", vec![2 * dim, HIDDEN]),
            ("self_attn.v_proj", vec![2 * dim, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, 6 * dim]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ];
        if family == "qwen3" {
            shapes.extend([("self_attn.q_norm", vec![dim]), ("self_attn.k_norm", vec![dim])]);
        }
        tensors.extend(shapes.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    let manifest: Manifest = tensors.into_iter().map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect();
    let layout = Layout::new(&architecture, &manifest).expect("complete");
    let (source, readout) = (Random(manifest), Readout::unnamed(&architecture, &layout));
    load(&What { source: &source, apart: None, architecture: &architecture, layout: &layout, readout: &readout, max_tokens: usize::MAX })
}

fn bits(model: &dyn RewardModel, pack: &Pack) -> Vec<u32> {
    model.forward(pack).expect("forward").iter().map(|output| output.values[0].to_bits()).collect()
}

/// Completions of a few prompts, which themselves begin alike; some samples twice.
fn groups() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let run = |most| prop::collection::vec(0u32..VOCAB as u32, 1..most);
    let completions = prop::collection::vec((any::<prop::sample::Index>(), run(40)), 1..9);
    (run(90), prop::collection::vec((0usize..90, run(100)), 1..4), completions, any::<bool>()).prop_map(
        |(base, prompts, completions, twice)| {
            let prompts: Vec<Vec<u32>> = prompts.iter().map(|(cut, run)| [&base[..(*cut).min(base.len())], run].concat()).collect();
            let mut samples: Vec<_> =
                completions.iter().map(|(which, run)| [&prompts[which.index(prompts.len())][..], run].concat()).collect();
            if twice {
                samples.push(samples[0].clone());
                samples.push(prompts[0].clone());
            }
            samples
        },
    )
}

fn check(model: &dyn RewardModel, samples: &[Vec<u32>], threads: usize) -> Result<(), TestCaseError> {
    let encodings: Vec<_> = samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let shared = Pack::forest(&encodings, |tokens| model.prefix_key(tokens));
    let shared = pool.install(|| bits(model, &shared));
    prop_assert_eq!(&shared, &bits(model, &Pack::new(&encodings)));
    for (encoding, shared) in encodings.iter().zip(&shared) {
        prop_assert_eq!(&[*shared][..], &bits(model, &Pack::new(std::slice::from_ref(encoding))));
    }
    Ok(())
}

/// Samples that arrive in packs, one after another, at a model of heads of so many columns that keeps at most so many blocks of
/// 64 tokens.
fn check_arrivals(
    model: &dyn RewardModel,
    dim: usize,
    samples: &[Vec<u32>],
    sizes: &[usize],
    blocks: usize,
) -> Result<usize, TestCaseError> {
    let encodings: Vec<_> = samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect();
    let expected = bits(model, &Pack::new(&encodings));
    // 2 layers of 2 heads, values of whole vectors, and the books.
    model.keep_prefixes(blocks * (2 * 2 * 64 * (dim + dim.next_multiple_of(32)) * 4 + 1024));
    let (mut at, mut sizes, mut cached) = (0, sizes.iter().cycle(), 0);
    while at < encodings.len() {
        let end = encodings.len().min(at + sizes.next().copied().unwrap_or(1));
        let pack = Pack::forest(&encodings[at..end], |tokens| model.prefix_key(tokens));
        let outputs = model.forward(&pack).expect("forward");
        let found: Vec<u32> = outputs.iter().map(|output| output.values[0].to_bits()).collect();
        prop_assert_eq!(&found, &expected[at..end]);
        cached += outputs.iter().map(|output| output.cached_tokens).sum::<usize>();
        prop_assert!(outputs.iter().all(|output| output.shared_tokens >= output.cached_tokens));
        at = end;
    }
    model.keep_prefixes(0);
    Ok(cached)
}

/// Arrivals over time of groups whose samples come more than once.
fn arrivals() -> impl Strategy<Value = Vec<Vec<u32>>> {
    (groups(), prop::collection::vec(any::<prop::sample::Index>(), 1..12))
        .prop_map(|(samples, order)| order.into_iter().map(|which| samples[which.index(samples.len())].clone()).collect())
}

/// Columns of a head: values that fill a part of one panel, or two of them and a part of a third.
fn dims() -> impl Strategy<Value = usize> {
    prop_oneof![Just(8), Just(72)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn scores_have_the_same_bits_behind_what_earlier_packs_left(samples in arrivals(), sizes in prop::collection::vec(1usize..4, 1..5), blocks in 0usize..12, dim in dims()) {
        check_arrivals(&*model("qwen3", json!({"head_dim": dim})), dim, &samples, &sizes, blocks)?;
    }

    #[test]
    fn also_where_queries_see_a_window_or_rotations_depend_on_the_length(
        samples in arrivals(), sizes in prop::collection::vec(1usize..4, 1..5), blocks in 0usize..12, window in 1usize..90, original in 16usize..200,
    ) {
        check_arrivals(&*model("mistral", json!({"sliding_window": window})), 8, &samples, &sizes, blocks)?;
        let dynamic = json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": original});
        check_arrivals(&*model("llama", dynamic), 8, &samples, &sizes, blocks)?;
    }

    #[test]
    fn scores_have_the_same_bits_with_and_without_sharing(samples in groups(), threads in 1usize..4, dim in dims()) {
        check(&*model("qwen3", json!({"head_dim": dim})), &samples, threads)?;
    }

    #[test]
    fn also_where_queries_see_no_further_than_a_window(samples in groups(), threads in 1usize..4, window in 1usize..90) {
        check(&*model("mistral", json!({"sliding_window": window})), &samples, threads)?;
    }
}

#[test]
fn a_group_shares_its_prompt_in_a_real_forward() {
    let model = model("qwen3", json!({}));
    let sample = |last: u32| Arc::new(Encoding::for_test([&[3; 50][..], &[last; 5]].concat()));
    let pack = Pack::forest(&[sample(1), sample(2)], |tokens| model.prefix_key(tokens));
    assert_eq!(pack.computed_tokens(), 60);
    let outputs = model.forward(&pack).expect("forward");
    assert!(outputs.iter().all(|output| output.shared_tokens == 50 && output.pooled_position == 54));
    assert_ne!(outputs[0].values, outputs[1].values);
}

#[test]
fn siblings_that_arrive_one_by_one_find_their_prompt_and_a_new_bound_forgets_it() {
    let model = model("qwen3", json!({}));
    let samples: Vec<_> = (1..6).map(|last: u32| [&[3; 100][..], &[last; 60]].concat()).collect();
    assert_eq!(check_arrivals(&*model, 8, &samples, &[1], 20).expect("equal"), 400);
    assert_eq!(check_arrivals(&*model, 8, &samples, &[1], 0).expect("equal"), 0);
    assert_eq!(check_arrivals(&*model, 8, &samples, &[2], 2).expect("equal"), 300);
}

#[test]
fn what_is_no_number_stays_with_its_sample() {
    let model = model("qwen3", json!({}));
    let sample = |last: u32| [&[3; 100][..], &[last; 60]].concat();
    // Of the first sample the second could have had 100 tokens, but the blocks with them see what is no number.
    assert_eq!(check_arrivals(&*model, 8, &[sample(BROKEN), sample(1), sample(2)], &[1], 20).expect("equal"), 64 + 100);
    let encodings = [BROKEN, 1].map(|last| Arc::new(Encoding::for_test(sample(last))));
    let alone = encodings.each_ref().map(|encoding| bits(&*model, &Pack::new(std::slice::from_ref(encoding)))[0]);
    assert!(f32::from_bits(alone[0]).is_nan() && f32::from_bits(alone[1]).is_finite());
    let forest = Pack::forest(&encodings, |tokens| model.prefix_key(tokens));
    assert_eq!((bits(&*model, &forest)[1], forest.shared_tokens(1)), (alone[1], 100), "and with a sibling in one pack");
}

#[test]
fn every_device_keeps_what_its_own_packs_leave_and_a_share_of_the_bytes() {
    let several = loaded("llama", json!({}), |what| {
        load_on(&Devices::open(&[Place::Cpu; 3]).expect("opens"), Dtype::F32, what, &mut |_, _| {}).expect("loads")
    });
    let pack = Pack::new(&[Arc::new(Encoding::for_test([3; 150].to_vec()))]);
    let cached = |device: usize| several.forward_on(device, &pack).expect("forward")[0].cached_tokens;
    several.keep_prefixes(3 << 20);
    assert_eq!([1, 1, 0, 0, 2].map(cached), [0, 128, 0, 128, 0]);
    // Two blocks of two layers each on the first two, none yet on the third; 64 tokens stand in the books of each.
    let numbers = 2 * kernels::keys::Form::new(6, 2, 8).size();
    let block = (4 * numbers + 2 * 4 * 64 + 512) as u64;
    let kept = several.prefix_bytes();
    assert_eq!(kept.held, 6 * block);
    assert!(kept.bound <= 3 << 20 && kept.bound > (3 << 20) - 3 * block, "{kept:?}");
    // Enough for a block of one of them is nothing for three.
    several.keep_prefixes(2 * (2 * 2 * 64 * (8 + 32) * 4 + 1024));
    assert_eq!(several.prefix_bytes().held, 0, "a new bound forgets");
    assert_eq!([0, 0].map(cached), [0, 0]);
}

#[test]
fn operations_of_candle_take_nothing_from_earlier_packs() {
    let plain =
        loaded("llama", json!({}), |what| load_with(&Backend::plain_on_cpu(candle_core::DType::F32), what, &mut |_, _| {}).expect("loads"));
    let pack = Pack::new(&[Arc::new(Encoding::for_test([3; 150].to_vec()))]);
    plain.keep_prefixes(1 << 20);
    let outputs = || plain.forward(&pack).expect("forward").remove(0);
    let (first, second) = (outputs(), outputs());
    assert_eq!((second.cached_tokens, second.reward.to_bits()), (0, first.reward.to_bits()));
}
