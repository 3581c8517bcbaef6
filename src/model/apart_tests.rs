use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::checkpoint::fixture::{self, Size, Tensors};
use crate::checkpoint::{Architecture, Dtype, Elements, Folder, Layout, Manifest, Readout, SourceError};
use crate::model::device::{Backend, Place};
use crate::model::{Model, Pack, RewardModel, What, load_with};
use crate::text::Encoding;

/// A checkpoint without what its adapter adds.
struct Bare(Arc<dyn TensorSource>);

impl TensorSource for Bare {
    fn manifest(&self) -> &Manifest {
        self.0.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.0.adapter().expect("an adapter").read_bare(name, range, into)
    }
}

/// An adapter that can be loaded whole or apart.
struct Member {
    folder: Folder,
    architecture: Architecture,
    layout: Layout,
}

impl Member {
    fn open(path: &Path) -> Self {
        let folder = Folder::open(path, None).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let architecture = folder.architecture.clone().expect("a known family");
        let layout = Layout::new(&architecture, folder.weights.manifest()).expect("complete");
        Self { folder, architecture, layout }
    }

    fn load(&self, backend: &Backend, base: Option<&SharedBase>) -> Model {
        let (architecture, layout, readout) = (&self.architecture, &self.layout, Readout::unnamed(&self.architecture, &self.layout));
        let bare = Bare(Arc::clone(&self.folder.weights));
        let apart = base.map(|base| Apart { base, bare: &bare, origins: self.origins() });
        let source = &*self.folder.weights;
        let what = What { source, apart, architecture, layout, readout: &readout, max_tokens: usize::MAX };
        load_with(backend, &what, &mut |_, _| {}).expect("loads")
    }

    fn origins(&self) -> Origins<'_> {
        Origins { adapter: self.folder.weights.adapter() }
    }
}

fn backends() -> [Backend; 2] {
    [Backend::cpu(), Backend::plain_on_cpu(DType::F32)]
}

fn rewards(model: &dyn RewardModel, samples: &[Arc<Encoding>]) -> Vec<f32> {
    let pack = Pack::forest(samples, |tokens| model.prefix_key(tokens));
    model.forward(&pack).expect("forward").iter().flat_map(|output| output.values.clone()).collect()
}

fn encodings(samples: &[Vec<u32>]) -> Vec<Arc<Encoding>> {
    samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect()
}

/// Samples that begin alike, of ids below 20.
fn samples() -> Vec<Arc<Encoding>> {
    let prompt: Vec<u32> = (0..9).map(|i| 3 + i * 5 % 17).collect();
    encodings(&[prompt.clone(), [&prompt[..], &[4, 9, 11]].concat(), [&prompt[..5], &[19, 3]].concat(), vec![7], vec![8, 8, 10]])
}

fn near(found: &[f32], expected: &[f32]) -> bool {
    found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0))
}

/// What a member scores alone and in company, with what was computed before and without: always the same bits.
fn has_one_score(model: &Model, samples: &[Arc<Encoding>]) {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let together = bits(rewards(model, samples));
    let alone: Vec<u32> = samples.chunks(1).flat_map(|sample| bits(rewards(model, sample))).collect();
    assert_eq!(alone, together);
    model.keep_prefixes(1 << 20);
    for _ in 0..2 {
        assert_eq!(bits(rewards(model, samples)), together);
    }
    model.keep_prefixes(0);
}

/// Every kind of adapter that PEFT saves, in order.
fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.join("merged.safetensors").exists() && !case.ends_with("unsaved-biases"));
    assert!(cases.len() >= 19, "{cases:?}");
    cases.sort();
    cases
}

#[test]
fn kinds_of_adapters_stand_on_one_base_beside_each_other_in_any_order() {
    let samples = samples();
    let mut of_base: std::collections::BTreeMap<PathBuf, Vec<(PathBuf, Member)>> = std::collections::BTreeMap::new();
    for case in cases() {
        let member = Member::open(&case);
        let base = member.origins().adapter.expect("an adapter").place().base.clone();
        of_base.entry(base).or_default().push((case, member));
    }
    for backend in backends() {
        for members in of_base.values_mut() {
            for _ in 0..2 {
                let base = SharedBase::default();
                for (case, member) in members.iter() {
                    let (found, merged) = (member.load(&backend, Some(&base)), member.load(&backend, None));
                    let (found, expected) = (rewards(&found, &samples), rewards(&merged, &samples));
                    assert!(near(&found, &expected), "{}: {found:?} against {expected:?}", case.display());
                }
                members.reverse();
            }
        }
    }
}

#[test]
fn every_kind_of_adapter_scores_apart_from_its_base_as_it_does_merged() {
    for case in cases() {
        let (member, samples) = (Member::open(&case), samples());
        for backend in backends() {
            let base = SharedBase::default();
            let (merged, first, again) =
                (member.load(&backend, None), member.load(&backend, Some(&base)), member.load(&backend, Some(&base)));
            let (expected, found) = (rewards(&merged, &samples), rewards(&first, &samples));
            assert!(near(&found, &expected), "{}: {found:?} against {expected:?}", case.display());
            assert_eq!(rewards(&again, &samples), found);
            assert_eq!(first.limits().parameters, merged.limits().parameters, "{}", case.display());
            // What is not the base's is little, and as the plan says.
            let (first, again, merged) = (first.limits().device_bytes, again.limits().device_bytes, merged.limits().device_bytes);
            let places = if backend.ops == super::super::ops::Ops::Kernels { [Place::Cpu] } else { [Place::Cuda(0)] };
            let adapters = [member.origins().adapter; 2];
            let planned = apart_bytes(&places, Dtype::F32, &member.layout, member.folder.weights.manifest(), adapters);
            assert_eq!(planned, ApartBytes { base: first - again, own: vec![again, again] }, "{}", case.display());
            assert!(again < first && first - again <= merged, "{}: {again} of {merged}", case.display());
        }
        has_one_score(&member.load(&Backend::cpu(), Some(&SharedBase::default())), &samples);
    }
}

const WIDE: Size = Size { hidden: 96, intermediate: 160, layers: 2, vocab: 24 };

/// A folder with a base and adapters on it.
struct Family(tempfile::TempDir, Size);

impl Family {
    fn new(seed: u64) -> Self {
        Self::with(seed, WIDE)
    }

    fn with(seed: u64, size: Size) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut tensors = fixture::language_model(size, "F32", seed);
        tensors.remove("score.weight");
        let mut config = fixture::config(size);
        config["architectures"] = json!(["LlamaForCausalLM"]);
        fixture::write(&dir.path().join("base"), &config, &tensors, 1).expect("written");
        Self(dir, size)
    }

    /// Adapters of this rank on some modules, after a change.
    fn adapter(&self, name: &str, rank: usize, modules: &[&str], saved: &[&str], change: impl FnOnce(&mut Tensors)) -> Member {
        let targets: Vec<&str> = modules.iter().filter_map(|module| module.rsplit('.').next()).collect();
        let saved = [&["score"], saved].concat();
        let config = json!({
            "peft_type": "LORA", "base_model_name_or_path": "../base", "r": rank, "lora_alpha": 3 * rank, "target_modules": targets,
            "modules_to_save": saved, "task_type": "SEQ_CLS", "bias": "none",
        });
        let mut tensors = fixture::lora(self.1, "F32", rank, modules, name.bytes().map(u64::from).sum());
        change(&mut tensors);
        let path = self.0.path().join(name);
        fixture::write_lora(&path, &config, &tensors).expect("written");
        Member::open(&path)
    }
}

const MODULES: [&str; 7] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

fn packs() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let run = |most| prop::collection::vec(3u32..24, 1..most);
    (run(30), prop::collection::vec((0usize..30, run(20)), 1..6)).prop_map(|(prompt, completions)| {
        completions.into_iter().map(|(cut, own)| [&prompt[..cut.min(prompt.len())], &own].concat()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn random_adapters_of_any_rank_score_as_merged_and_alike_in_any_company(
        rank in prop_oneof![1usize..9, Just(16), Just(33), Just(64)], chosen in 1u32..128, pack in packs(), threads in 1usize..4, seed in 0u64..1000
    ) {
        let modules: Vec<&str> = MODULES.into_iter().enumerate().filter(|(i, _)| chosen >> i & 1 == 1).map(|(_, module)| module).collect();
        let family = Family::new(seed);
        let (one, other) = (family.adapter("one", rank, &modules, &[], |_| {}), family.adapter("other", 3, &["mlp.up_proj"], &[], |_| {}));
        let samples = encodings(&pack);
        for backend in backends() {
            let base = SharedBase::default();
            let (first, second) = (other.load(&backend, Some(&base)), one.load(&backend, Some(&base)));
            for (member, apart) in [(&other, &first), (&one, &second)] {
                let (found, expected) = (rewards(apart, &samples), rewards(&member.load(&backend, None), &samples));
                prop_assert!(near(&found, &expected), "{:?} against {:?}", found, expected);
            }
            // Factors of a high rank are as many numbers as the matrices.
            prop_assert!(rank > 16 || second.limits().device_bytes < first.limits().device_bytes);
        }
        let (model, pool) = (one.load(&Backend::cpu(), Some(&SharedBase::default())), rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool"));
        pool.install(|| has_one_score(&model, &samples));
    }
}

#[test]
fn a_matrix_that_is_replaced_takes_its_product_out_of_the_base_and_nothing_else() {
    let family = Family::new(5);
    let key = |layer: usize| format!("base_model.model.model.layers.{layer}.self_attn.k_proj.weight");
    let replace = |tensors: &mut Tensors| {
        for layer in 0..2 {
            let values = fixture::noise(77 + layer as u64).take(WIDE.hidden * WIDE.hidden);
            tensors.insert(key(layer), fixture::tensor("F32", &[WIDE.hidden, WIDE.hidden], values));
        }
    };
    let modules = ["self_attn.q_proj", "mlp.down_proj"];
    let (plain, replaced) =
        (family.adapter("plain", 4, &modules, &[], |_| {}), family.adapter("replaced", 4, &modules, &["k_proj"], replace));
    for backend in backends() {
        let base = SharedBase::default();
        let (first, second) = (plain.load(&backend, Some(&base)), replaced.load(&backend, Some(&base)));
        for (member, apart) in [(&plain, &first), (&replaced, &second)] {
            let (found, expected) = (rewards(apart, &samples()), rewards(&member.load(&backend, None), &samples()));
            assert!(near(&found, &expected), "{found:?} against {expected:?}");
        }
        assert_ne!(rewards(&first, &samples()), rewards(&second, &samples()));
        // Queries, keys and values of both layers stand there once more, and the factors of the other product.
        let own = second.limits().device_bytes as usize;
        let qkv = 2 * 3 * WIDE.hidden * WIDE.hidden * 4;
        assert!((qkv..qkv + qkv / 4).contains(&own), "{own} of which {qkv} are replaced");
    }
}

#[test]
fn a_score_is_the_same_beside_more_rows_than_a_narrow_product_of_gemm_is_blocked_for() {
    // Deeper than gemm's blocks of 512, at most 64 outputs, and rows on both sides of 64: there its own product differs.
    let family = Family::with(3, Size { intermediate: 1100, ..WIDE });
    let member = family.adapter("one", 8, &["mlp.down_proj"], &[], |_| {});
    let samples: Vec<Vec<u32>> = (0..9).map(|i| (0..20).map(|j| 3 + (i * 7 + j * j + i * j) % 21).collect()).collect();
    has_one_score(&member.load(&Backend::cpu(), Some(&SharedBase::default())), &encodings(&samples));
}

#[test]
fn what_models_share_is_copied_to_another_device_once() {
    let (base, device) = (SharedBase::default(), Device::Cpu);
    let matrix =
        Tensor::arange(0f32, 12., &device).and_then(|values| values.reshape((3, 4))).and_then(|matrix| matrix.t()).expect("a view");
    let to = Destination { device: &device, base: Some(&base) };
    let copies = [(); 2].map(|()| to.copy(&matrix).expect("copied"));
    assert_eq!(copies[0].id(), copies[1].id());
    assert_eq!((copies[0].dims(), copies[0].stride()), (matrix.dims(), matrix.stride()));
    let alone = Destination { device: &device, base: None };
    assert_ne!(alone.copy(&matrix).expect("copied").id(), copies[0].id());
}

#[test]
fn on_several_devices_each_answers_as_the_first() {
    let family = Family::new(9);
    let member = family.adapter("one", 8, &MODULES, &[], |_| {});
    let (base, backend) = (SharedBase::default(), Backend::cpu());
    let model = member.load(&backend, Some(&base));
    let copy = model.on(&backend, Some(&base)).expect("copied");
    assert_eq!(rewards(&copy, &samples()), rewards(&model, &samples()));
}
