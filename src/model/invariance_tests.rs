//! The score of a sample has the same bits whatever shares its pack, on any number of threads: for one model of every code
//! path, on random packs. And the rule that makes it so, pinned to the version of crate gemm.

use std::path::Path;
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::device::OnHost;
use super::pack::MIN_ROWS;
use super::*;
use crate::merge::{MergePlan, Merged, Recipe};
use crate::text::Encoding;

/// A family of the committed fixtures for every code path of the forward pass.
pub const PATHS: [&str; 16] = [
    "llama",
    "llama-dynamic",
    "mistral-window",
    "gemma2-small",
    "gemma3-pattern",
    "phi3-partial",
    "neox-parallel",
    "opt-post-norm",
    "olmo2",
    "qwen3-moe",
    "mixtral",
    "bert",
    "roberta-small",
    "deberta-v3-small",
    "deberta-v2-conv",
    "modernbert-mean",
];

static MODELS: LazyLock<Vec<Arc<dyn RewardModel>>> = LazyLock::new(models);

/// The same with room for some of what they have computed.
static CACHED: LazyLock<Vec<Arc<dyn RewardModel>>> = LazyLock::new(|| {
    let models = models();
    models.iter().for_each(|model| model.keep_prefixes(1 << 20));
    models
});

/// In operations of candle, with fixed shapes: what a card does. Of few rows, because only their being fixed counts.
static FIXED: LazyLock<Vec<Arc<dyn RewardModel>>> = LazyLock::new(|| models_on(&fixed()));

/// With the rows of mixtures in tiles.
static GROUPED: LazyLock<Vec<Arc<dyn RewardModel>>> = LazyLock::new(|| models_on(&Backend { grouped: Some(&OnHost), ..fixed() }));

fn fixed() -> Backend {
    Backend { fixed_rows: Some(64), ..Backend::plain_on_cpu(DType::F32) }
}

fn models() -> Vec<Arc<dyn RewardModel>> {
    models_on(&Backend::cpu())
}

fn models_on(backend: &Backend) -> Vec<Arc<dyn RewardModel>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance/transformers-5");
    let load = |name: &&str| -> Arc<dyn RewardModel> {
        let plan = Arc::new(MergePlan::open(&Recipe::uniform(&[root.join(name).join("member-0")]).expect("recipe")).expect("opens"));
        let (merged, reward) = (Merged::new(Arc::clone(&plan)).expect("coefficients"), plan.reward().expect("a reward model"));
        let readout = Readout::unnamed(reward.architecture, reward.layout);
        let (architecture, layout) = (reward.architecture, reward.layout);
        let what = What { source: &merged, apart: None, architecture, layout, readout: &readout, max_tokens: usize::MAX };
        Arc::new(load_with(backend, &what, &mut |_, _| {}).expect("loads"))
    };
    PATHS.iter().map(load).collect()
}

fn bits(model: &dyn RewardModel, samples: &[Arc<Encoding>]) -> Vec<Vec<u32>> {
    let outputs = model.forward(&Pack::forest(samples, |tokens| model.prefix_key(tokens))).expect("forward");
    outputs.iter().map(|output| output.values.iter().map(|value| value.to_bits()).collect()).collect()
}

/// Samples of which some begin alike.
fn packs() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let run = |most| prop::collection::vec(6u32..64, 1..most);
    (run(90), prop::collection::vec((0usize..90, run(80)), 1..7)).prop_map(|(prompt, completions)| {
        completions.into_iter().map(|(cut, own)| [&prompt[..cut.min(prompt.len())], &own].concat()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_score_has_the_same_bits_alone_and_in_company_on_any_number_of_threads(path in 0..PATHS.len(), pack in packs(), threads in 1usize..5) {
        let model = &*MODELS[path];
        let samples: Vec<_> = pack.into_iter().map(|ids| Arc::new(Encoding::for_test(ids))).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let together = pool.install(|| bits(model, &samples));
        for (sample, together) in samples.iter().zip(together) {
            let alone = bits(model, std::slice::from_ref(sample));
            prop_assert_eq!(&alone[0], &together, "{} over {} tokens", PATHS[path], sample.tokens());
        }
    }

    #[test]
    fn in_fixed_shapes_the_plain_path_gives_the_same_bits_alone_and_in_company(path in 0..PATHS.len(), pack in packs(), threads in 1usize..5, grouped in any::<bool>()) {
        let model = &*if grouped { &GROUPED } else { &FIXED }[path];
        let samples: Vec<_> = pack.into_iter().map(|ids| Arc::new(Encoding::for_test(ids))).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let (together, kernels) = pool.install(|| (bits(model, &samples), bits(&*MODELS[path], &samples)));
        for ((sample, together), kernels) in samples.iter().zip(together).zip(kernels) {
            let alone = bits(model, std::slice::from_ref(sample));
            prop_assert_eq!(&alone[0], &together, "{} over {} tokens", PATHS[path], sample.tokens());
            for (plain, kernels) in together.iter().zip(kernels).map(|(a, b)| (f32::from_bits(*a), f32::from_bits(b))) {
                prop_assert!((plain - kernels).abs() <= 1e-4 * kernels.abs().max(1.0), "{}: {plain} against {kernels}", PATHS[path]);
            }
        }
    }

    #[test]
    fn a_score_has_the_same_bits_whatever_was_scored_before_it(path in 0..PATHS.len(), pack in packs(), threads in 1usize..5) {
        let samples: Vec<_> = pack.into_iter().map(|ids| Arc::new(Encoding::for_test(ids))).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        // One by one, then all at once.
        for sample in samples.chunks(1).chain([&samples[..]]) {
            let (cached, fresh) = pool.install(|| (bits(&*CACHED[path], sample), bits(&*MODELS[path], sample)));
            prop_assert_eq!(cached, fresh, "{}", PATHS[path]);
        }
    }
}

#[test]
fn without_fixed_shapes_the_plain_path_does_depend_on_company() {
    // Else nothing would have been shown above, and fixed shapes would cost for nothing.
    let plain = models_on(&Backend::plain_on_cpu(DType::F32));
    let samples: Vec<_> = (3..40usize)
        .map(|tokens| Arc::new(Encoding::for_test((0..tokens).map(|place| (6 + (place * 7 + tokens) % 50) as u32).collect())))
        .collect();
    let differs = |model: &dyn RewardModel| {
        let together = bits(model, &samples);
        samples.iter().zip(together).any(|(sample, together)| bits(model, std::slice::from_ref(sample))[0] != together)
    };
    assert!(plain.iter().any(|model| differs(model.as_ref())) && !FIXED.iter().any(|model| differs(model.as_ref())));
}

/// `[rows, inputs]` times the transposed `[outputs, inputs]`, as the forward pass has it.
fn product(rows: usize, inputs: usize, outputs: usize) -> Vec<Vec<u32>> {
    let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8;
    let tensor = |rows: usize, columns: usize| Tensor::from_vec((0..rows * columns).map(value).collect(), (rows, columns), &Device::Cpu);
    let x = tensor(rows, inputs).expect("x");
    let weight = tensor(outputs, inputs).and_then(|weight| weight.t()).expect("weight");
    let y: Vec<Vec<f32>> = x.matmul(&weight).and_then(|y| y.to_vec2()).expect("a product");
    y.into_iter().map(|row| row.into_iter().map(f32::to_bits).collect()).collect()
}

#[test]
fn a_row_of_a_product_depends_on_no_other_row_within_the_rule_of_this_gemm() {
    // Depths on both sides of gemm's blocks of 512, outputs from the fewest that a layer is padded to.
    for (inputs, outputs) in [(16, 80), (64, 96), (512, 80), (513, 160), (768, 80), (1100, 640)] {
        let whole = product(150, inputs, outputs);
        for rows in [MIN_ROWS, 5, 7, 16, 33, 64, 65, 96, 149] {
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                let part = pool.install(|| product(rows, inputs, outputs));
                assert!(part == whole[..rows], "{rows} rows, {inputs} inputs, {outputs} outputs, {threads} threads");
            }
        }
    }
}

#[test]
fn outside_of_the_rule_this_gemm_does_depend_on_the_number_of_rows() {
    // Were this to fail with a new version of the crate, the rule could be looser: one row, and few outputs.
    let differs = |rows: usize, inputs, outputs| product(rows, inputs, outputs) != product(150, inputs, outputs)[..rows];
    assert!(differs(1, 768, 80));
    assert!(differs(16, 768, 64));
}
