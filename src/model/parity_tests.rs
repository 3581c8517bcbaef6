//! Scores against the golden ones of Hugging Face transformers, from the golden token ids.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::attention::cpu_flash::varlen::flash_attn_varlen_cpu;
use serde_json::Value;

use super::kernels::attention::Shape;
use super::*;
use crate::checkpoint::RopeScaling;
use crate::merge::{MergePlan, Merged, PlannedMember, Recipe};
use crate::text::Encoding;

/// The merges of WARP (2406.16768) that the goldens have where there is an initialisation.
const METHODS: [(&str, &str); 4] = [
    ("slerp_layer", "init: init\nmembers: [member-0, member-1]\nmethod: slerp"),
    ("slerp_tensor", "init: init\nmembers: [member-0, member-1]\nslerp: {granularity: tensor}"),
    ("slerp_m3", "init: init\nmembers: [member-0, member-1, member-2]\nmethod: slerp"),
    ("liti_0.5", "init: init\nmembers: [member-0, member-1, member-2]\nliti: {eta: 0.5}"),
];

/// Every family folder (`ROOT/transformers-*/NAME` with a `golden.json`) of the committed fixtures, and of the folder that
/// `WARM_CONFORMANCE` names.
fn families() -> Vec<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance");
    let wider = std::env::var_os("WARM_CONFORMANCE").map(PathBuf::from);
    if wider.is_none() {
        println!("WARM_CONFORMANCE is not set: only the committed families are checked");
    }
    let children = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("entry").path()).filter(|path| path.is_dir()).collect();
        paths.sort();
        paths
    };
    let named = |path: &PathBuf, prefix: &str| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let roots = [Some(committed), wider].into_iter().flatten();
    let generations = roots.flat_map(|root| children(&root)).filter(|path| named(path, "transformers-"));
    generations.flat_map(|generation| children(&generation)).filter(|family| family.join("golden.json").exists()).collect()
}

fn numbers(value: &Value, name: &str) -> Option<Vec<u32>> {
    let list = value.get(name)?.as_array()?;
    Some(list.iter().map(|id| id.as_u64().expect("an id") as u32).collect())
}

/// What computes.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Kernels,
    /// Operations of candle, as on any other device, here on the CPU.
    Plain,
    /// The same, with an attention of sequences end to end in place of the flash kernels.
    Flash,
    /// With the rows of mixtures in tiles, in place of what groups them on a card.
    Grouped,
}

impl Side {
    fn backend(self) -> Backend {
        match self {
            Self::Kernels => Backend::cpu(),
            Self::Plain => Backend::plain_on_cpu(DType::F32),
            Self::Flash => Backend { flash: Some(oracle), ..Backend::plain_on_cpu(DType::F32) },
            Self::Grouped => Backend { grouped: Some(&device::OnHost), ..Backend::plain_on_cpu(DType::F32) },
        }
    }
}

/// In place of the flash kernels: candle's own loop over rows, which knows lengths and not beginnings.
pub fn oracle(
    shape: &Shape,
    [queries, keys, values]: [&Tensor; 3],
    starts: &[Tensor; 2],
    longest: [usize; 2],
) -> candle_core::Result<Tensor> {
    let lengths = |starts: &Tensor| {
        let starts = starts.to_vec1::<u32>()?;
        Tensor::new(starts.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>(), &Device::Cpu)
    };
    let (query_lengths, key_lengths) = (lengths(&starts[0])?, lengths(&starts[1])?);
    assert!(shape.softcap.is_none());
    let beside = shape.window.map(|window| window - 1);
    // It takes no window on one side alone; causality is said besides.
    let ahead = beside.map(|beside| if shape.causal { 0 } else { beside });
    let (causal, scale, [most_queries, most_keys]) = (shape.causal, shape.scale, longest);
    let (queries, keys, values) = (&queries.contiguous()?, &keys.contiguous()?, &values.contiguous()?);
    flash_attn_varlen_cpu(queries, keys, values, None, &query_lengths, &key_lengths, most_queries, most_keys, scale, causal, beside, ahead)
}

fn loaded(plan: &Arc<MergePlan>, side: Side) -> Arc<dyn RewardModel> {
    let merged = Merged::new(Arc::clone(plan)).expect("coefficients");
    let reward = plan.reward().expect("a reward model");
    let readout = Readout::unnamed(reward.architecture, reward.layout);
    let (architecture, layout) = (reward.architecture, reward.layout);
    let what = What { source: &merged, apart: None, architecture, layout, readout: &readout, max_tokens: usize::MAX };
    Arc::new(load_with(&side.backend(), &what, &mut |_, _| {}).expect("loads"))
}

/// Every member of a plan as an adapter on the base that stands there once.
fn loaded_apart(plan: &Arc<MergePlan>, side: Side) -> Vec<Arc<dyn RewardModel>> {
    plan.common_base().expect("adapters on one base");
    let reward = plan.reward().expect("a reward model");
    let (architecture, layout) = (reward.architecture, reward.layout);
    let readout = Readout::unnamed(architecture, layout);
    let base = SharedBase::default();
    let load = |(index, member): (usize, &PlannedMember)| {
        let merged = plan.member_source(index).expect("alone").expect("a member");
        let bare = plan.member_bare(index).expect("bare").expect("a member");
        let apart = Some(Apart { base: &base, bare: &bare, origins: Origins { adapter: member.source().adapter() } });
        let what = What { source: &merged, apart, architecture, layout, readout: &readout, max_tokens: usize::MAX };
        Arc::new(load_with(&side.backend(), &what, &mut |_, _| {}).expect("loads")) as Arc<dyn RewardModel>
    };
    plan.members().iter().enumerate().map(load).collect()
}

fn scores(model: &dyn RewardModel, pack: &Pack) -> Vec<Vec<f32>> {
    model.forward(pack).expect("forward").into_iter().map(|output| output.values).collect()
}

/// One golden score for each output.
fn expected(score: &Value) -> Vec<f64> {
    match score {
        Value::Array(outputs) => outputs.iter().map(|output| output.as_f64().expect("a number")).collect(),
        one => vec![one.as_f64().expect("a number")],
    }
}

/// The length that the rotary table in the reference was made for. With dynamic scaling, transformers keeps the table of the
/// longest text so far, until one below the original length comes: a score then depends on what was scored before, also in
/// the member before. Our reference is a text by itself, so cases that met another text's table do not count.
#[derive(Default)]
struct HeldTable(usize);

impl HeldTable {
    /// Whether the next text meets the table of its own length.
    fn is_own(&mut self, architecture: &Architecture, length: usize) -> bool {
        let original = architecture.ropes.iter().find_map(|rope| match rope.scaling {
            RopeScaling::Dynamic { original_positions, .. } => Some(original_positions),
            _ => None,
        });
        let Some(original) = original else { return true };
        self.0 = if length < original { original } else { self.0.max(original).max(length) };
        length < original || self.0 == length
    }
}

/// Checks every member of a family, and their average where the golden has it: how many scores, and the largest deviation.
fn check(family: &Path, golden: &Value, side: Side) -> Result<(usize, f64), String> {
    let list = golden["cases"].as_array().expect("cases");
    let encodings: Vec<_> = list
        .iter()
        .map(|case| Arc::new(Encoding::for_test(numbers(case, "input_ids").expect("ids")).with_types(numbers(case, "token_type_ids"))))
        .collect();
    let folder = |member: usize| family.join(format!("member-{member}"));
    let members: Vec<PathBuf> = (0..).map(folder).take_while(|path| path.exists()).collect();
    let recipe = |members: &[PathBuf]| Recipe::uniform(members).expect("recipe");
    let mut recipes: Vec<(String, Recipe)> =
        members.iter().enumerate().map(|(i, path)| (format!("member-{i}"), recipe(std::slice::from_ref(path)))).collect();
    if list[0]["scores"].get("warm").is_some() {
        recipes.push(("warm".to_owned(), recipe(&members)));
    }
    if family.join("init").exists() {
        let with_init = METHODS.iter().filter(|(name, _)| list[0]["scores"].get(name).is_some());
        recipes.extend(with_init.map(|(name, yaml)| ((*name).to_owned(), Recipe::from_yaml(yaml, family).expect("recipe"))));
    }
    let (mut cases, mut largest, mut held) = (0, 0f64, HeldTable::default());
    let adapted = members.iter().all(|member| member.join("adapter_config.json").exists());
    let apart = if adapted {
        loaded_apart(&Arc::new(MergePlan::open(&recipe(&members)).map_err(|error| error.to_string())?), side)
    } else {
        Vec::new()
    };
    for (name, recipe) in recipes {
        let plan = Arc::new(MergePlan::open(&recipe).map_err(|error| error.to_string())?);
        let alone = golden.get("scores_by").is_some();
        let architecture = plan.reward().expect("a reward model").architecture;
        if side == Side::Flash && (architecture.attention_softcap.is_some() || architecture.disentangled.is_some()) {
            return Ok((0, 0.0));
        }
        if side == Side::Grouped && architecture.experts.is_none() {
            return Ok((0, 0.0));
        }
        let own: Vec<_> = encodings.iter().map(|encoding| alone || held.is_own(architecture, encoding.tokens())).collect();
        let mut models = vec![loaded(&plan, side)];
        // Beside the others on their base it scores as it does merged.
        models.extend(name.strip_prefix("member-").and_then(|index| apart.get(index.parse::<usize>().ok()?)).cloned());
        for model in models {
            let packed = match side {
                Side::Kernels => scores(&*model, &Pack::new(&encodings)),
                // Its sums depend on the company, so alone is no other test; what is shared is.
                Side::Plain | Side::Flash | Side::Grouped => scores(&*model, &Pack::forest(&encodings, |tokens| model.prefix_key(tokens))),
            };
            for (((case, encoding), packed), own) in list.iter().zip(&encodings).zip(packed).zip(&own) {
                if !own {
                    continue;
                }
                let expected = expected(&case["scores"][&name]);
                assert_eq!(packed.len(), expected.len(), "{} {name}: outputs", family.display());
                for (packed, expected) in packed.iter().zip(&expected) {
                    let deviation = (f64::from(*packed) - expected).abs() / expected.abs().max(1.0);
                    assert!(deviation < 1e-4, "{} {name}: {packed} against {expected} over {} tokens", family.display(), encoding.tokens());
                    largest = largest.max(deviation);
                }
                cases += 1;
                if side == Side::Kernels {
                    let alone = &scores(&*model, &Pack::new(std::slice::from_ref(encoding)))[0];
                    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(alone), bits(&packed), "{} {name}: alone {alone:?}, packed {packed:?}", family.display());
                }
            }
        }
    }
    Ok((cases, largest))
}

#[test]
fn every_member_and_the_merge_score_as_transformers_does_alone_and_packed() {
    check_all(Side::Kernels);
}

#[test]
fn the_plain_path_scores_as_transformers_does_with_what_is_shared_computed_once() {
    check_all(Side::Plain);
}

#[test]
fn sequences_end_to_end_score_as_transformers_does_too() {
    check_all(Side::Flash);
}

#[test]
fn mixtures_in_tiles_score_as_transformers_does_too() {
    check_all(Side::Grouped);
}

fn check_all(side: Side) {
    let mut cases = 0;
    let mut largest = 0f64;
    for family in families() {
        let golden: Value = serde_json::from_slice(&std::fs::read(family.join("golden.json")).expect("readable")).expect("JSON");
        // Goldens of 16-bit families must come from the files in float32; tests/fixtures/conformance/regolden.py says why.
        if golden["dtype"] != "float32" && golden.get("scores_by").is_none() {
            println!("{}: skipped, its scores were taken with rounded rotary frequencies", family.display());
            continue;
        }
        match check(&family, &golden, side) {
            Ok((count, deviation)) => {
                println!("{:60} {count:4} scores, largest deviation {deviation:.1e}", family.display());
                cases += count;
                largest = largest.max(deviation);
            }
            Err(problem) => panic!("{}: {problem}", family.display()),
        }
    }
    println!("{cases} scores, largest deviation {largest:.2e}");
    let least = if side == Side::Grouped { 20 } else { 500 };
    assert!(cases >= least, "{cases}");
}

#[test]
fn in_sixteen_bits_every_kind_of_model_stays_near_its_float32() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance/transformers-5");
    let mut deviations = Vec::new();
    for name in super::invariance_tests::PATHS {
        let golden: Value = serde_json::from_slice(&std::fs::read(root.join(name).join("golden.json")).expect("readable")).expect("JSON");
        let case = |case: &Value| Arc::new(Encoding::for_test(numbers(case, "input_ids").expect("ids")));
        let encodings: Vec<_> = golden["cases"].as_array().expect("cases").iter().take(6).map(case).collect();
        let recipe = Recipe::uniform(&[root.join(name).join("member-0")]).expect("recipe");
        let plan = Arc::new(MergePlan::open(&recipe).expect("opens"));
        let run = |weights: DType| {
            let (merged, reward) = (Merged::new(Arc::clone(&plan)).expect("coefficients"), plan.reward().expect("a reward model"));
            let (architecture, layout) = (reward.architecture, reward.layout);
            let readout = Readout::unnamed(architecture, layout);
            let what = What { source: &merged, apart: None, architecture, layout, readout: &readout, max_tokens: usize::MAX };
            let model = load_with(&Backend::plain_on_cpu(weights), &what, &mut |_, _| {}).expect("loads");
            (scores(&model, &Pack::forest(&encodings, |tokens| model.prefix_key(tokens))), model.limits().device_bytes)
        };
        let (exact, whole) = run(DType::F32);
        for weights in [DType::BF16, DType::F16] {
            let (rounded, bytes) = run(weights);
            // Norms stay in float32, matrices take half.
            assert!(bytes < whole * 6 / 10, "{name} {weights:?}: {bytes} of {whole}");
            for (rounded, exact) in rounded.iter().flatten().zip(exact.iter().flatten()) {
                let deviation = (rounded - exact).abs() / exact.abs().max(1.0);
                assert!(deviation < 0.1, "{name} {weights:?}: {rounded} against {exact}");
                deviations.push(deviation);
            }
        }
    }
    deviations.sort_by(f32::total_cmp);
    let median = deviations[deviations.len() / 2];
    println!("{} scores, median deviation {median:.1e}, largest {:.1e}", deviations.len(), deviations[deviations.len() - 1]);
    assert!(median < 5e-3, "{median}");
}
