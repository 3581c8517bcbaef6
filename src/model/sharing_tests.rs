//! Sharing changes no bit: the same samples alone, packed apart, and packed as a forest.

use std::ops::Range;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Dtype, Elements, Manifest, TensorInfo};
use crate::text::Encoding;

const VOCAB: usize = 12;
const HIDDEN: usize = 48;
const INNER: usize = 96;

/// Weights that are drawn when they are read, by their name.
struct Random(Manifest);

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
        *into = Elements::F32(range.map(|i| if name.contains("norm") { 1.0 + 0.1 * value(i) } else { 0.4 * value(i) }).collect());
        Ok(())
    }
}

/// A decoder of two layers: 3 query heads to every key head, and whatever else `more` says.
fn model(family: &str, more: Value) -> Arc<dyn RewardModel> {
    let mut config = json!({
        "model_type": family, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 8, "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 512, "id2label": {"0": "LABEL_0"},
    });
    config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let architecture = Architecture::parse(&config).expect("a valid configuration");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("score.weight".to_owned(), vec![1, HIDDEN]),
    ];
    for layer in 0..2 {
        let mut shapes = vec![
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![48, HIDDEN]),
            ("self_attn.k_proj", vec![16, HIDDEN]),
            ("self_attn.v_proj", vec![16, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, 48]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ];
        if family == "qwen3" {
            shapes.extend([("self_attn.q_norm", vec![8]), ("self_attn.k_norm", vec![8])]);
        }
        tensors.extend(shapes.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    let manifest: Manifest = tensors.into_iter().map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect();
    let layout = Layout::new(&architecture, &manifest).expect("complete");
    load(&Random(manifest), &architecture, &layout, &Readout::unnamed(&architecture, &layout), usize::MAX, &mut |_, _| {}).expect("loads")
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn scores_have_the_same_bits_with_and_without_sharing(samples in groups(), threads in 1usize..4) {
        check(&*model("qwen3", json!({})), &samples, threads)?;
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
