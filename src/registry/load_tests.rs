use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::super::{CalibrationChoice, MeasuredMembers};
use super::*;
use crate::checkpoint::Dtype;
use crate::checkpoint::fixture::{self, TINY, Tensors};
use crate::domain::Truncation;
use crate::domain::{MemberName, Sample};
use crate::merge::{CacheOptions, Recipe};
use crate::model::Pack;
use crate::model::{Arithmetic, DeviceChoice};
use crate::text::Encoding;

fn member(dir: &Path, name: &str, change: impl FnOnce(&mut Tensors), seed: u64) -> PathBuf {
    let mut tensors = fixture::llama(TINY, "F32", seed);
    change(&mut tensors);
    let path = dir.join(name);
    fixture::write(&path, &fixture::config(TINY), &tensors, 1).expect("a temporary folder");
    path
}

fn load(spec: &LoadSpec) -> Result<(Generation, Vec<Progress>), LoadError> {
    let mut told = Vec::new();
    let generation = load_generation(spec, GenerationId(1), &Clock::manual(), &mut |progress| told.push(progress))?;
    Ok((generation, told))
}

/// The rewards of one text by every model of a lane.
fn rewards(generation: &Generation, lane: &super::super::lanes::Lane) -> Vec<f32> {
    let encoding = generation.text.encode(&Sample::Text("abcde".to_owned()), Truncation::Refuse).expect("short");
    let pack = Pack::new(&[Arc::new(encoding)]);
    lane.models.iter().map(|model| model.forward(&pack).expect("scored")[0].values[0]).collect()
}

#[test]
fn a_recipe_becomes_a_generation_that_says_what_it_is() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths = [member(dir.path(), "rm-0", |_| {}, 1), member(dir.path(), "rm-1", |_| {}, 2)];
    let spec = LoadSpec { ensemble: Ensemble::Resident, ..LoadSpec::uniform(&paths).expect("two folders") };
    let (generation, told) = load(&spec).expect("loads");
    assert_eq!(generation.resident().map(|name| name.as_str()).collect::<Vec<_>>(), ["rm-0", "rm-1"]);
    assert_eq!(generation.limits().max_tokens, 64);
    assert_eq!((generation.info.method.as_str(), generation.info.dtype.as_str()), ("linear", "float32"));
    assert_eq!((generation.info.text.pooling.as_str(), generation.info.text.pad_token_id), ("last_non_pad", Some(2)));
    assert_eq!(generation.info.loaded, SystemTime::UNIX_EPOCH, "the clock that was handed in");
    assert_eq!(generation.device_bytes(), 3 * generation.limits().device_bytes);
    let mut stages: Vec<&str> = told.iter().map(|progress| progress.stage.as_str()).collect();
    stages.dedup();
    assert_eq!(stages, ["plan", "merge", "member rm-0", "member rm-1", "warm-up"]);
    assert!(told.iter().all(|progress| progress.done <= progress.total));
    // Each member beside the merge scores as it does alone.
    let all = rewards(&generation, &generation.ensemble);
    for (path, reward) in paths.iter().zip(&all[1..]) {
        let (alone, _) = load(&LoadSpec::uniform(std::slice::from_ref(path)).expect("one folder")).expect("loads");
        assert_eq!(rewards(&alone, &alone.merged), [*reward]);
        assert!(!alone.members_loaded() && alone.fingerprint != generation.fingerprint);
    }
    assert_ne!(all[1], all[2]);
    // The ensemble does not reach a score of the merged model, so both have one name.
    let (without, _) = load(&LoadSpec { ensemble: Ensemble::Off, ..spec.clone() }).expect("loads");
    assert_eq!(without.fingerprint, generation.fingerprint);
    let (shorter, _) = load(&LoadSpec { max_tokens: Some(32), ..spec }).expect("loads");
    assert_eq!(shorter.limits().max_tokens, 32);
    assert_ne!(shorter.fingerprint, generation.fingerprint);
}

#[test]
fn a_limit_that_nothing_can_hold_is_refused_by_its_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let spec = LoadSpec::uniform(&[member(dir.path(), "rm", |_| {}, 1)]).expect("one folder");
    for (max_tokens, max_pack_tokens) in [(Some(0), 64), (Some(64), 63)] {
        let error = load(&LoadSpec { max_tokens, max_pack_tokens, ..spec.clone() }).expect_err("refused");
        assert!(matches!(error, LoadError::Options { field: "max_tokens", .. }), "{error}");
    }
    let (small, _) = load(&LoadSpec { max_pack_tokens: 10, ..spec }).expect("loads");
    assert_eq!(small.limits().max_tokens, 10, "no sample may exceed a pack");
}

#[test]
fn rotary_positions_go_on_where_learned_ones_end() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let rotary = LoadSpec::uniform(&[member(dir.path(), "rm", |_| {}, 1)]).expect("one folder");
    let (longer, _) = load(&LoadSpec { max_tokens: Some(70), ..rotary }).expect("loads");
    assert_eq!(longer.limits().max_tokens, 70);
    let note = "max_tokens is 70; the model's config says that it is made for 64 positions";
    assert!(longer.info.notes.iter().any(|found| found == note), "{:?}", longer.info.notes);
    let encoding = longer.text.encode(&Sample::Text("abcde".repeat(20)), Truncation::Left).expect("fits");
    assert_eq!(encoding.tokens(), 70);
    let outputs = longer.merged.models[0].forward(&Pack::new(&[Arc::new(encoding)])).expect("scored");
    assert!(outputs[0].reward.is_finite());
    let gpt2 = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance/transformers-5/gpt2-small/member-0");
    let learned = LoadSpec::uniform(&[gpt2]).expect("one folder");
    let error = load(&LoadSpec { max_tokens: Some(257), ..learned }).expect_err("refused").to_string();
    assert_eq!(error, "max_tokens: expected at most 256, as many as the model has positions for, found 257");
}

#[test]
fn a_policy_is_not_served_and_a_language_model_does_not_score_beside_a_merge() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    member(dir.path(), "rm", |_| {}, 1);
    member(dir.path(), "lm", |tensors| _ = tensors.remove("score.weight"), 2);
    let spec = |text: &str| LoadSpec::new(Recipe::from_yaml(text, dir.path()).expect("a recipe"));
    let error = load(&spec("kind: policy\nmembers: [rm]")).expect_err("refused").to_string();
    let expected = "the recipe merges a policy (kind: policy), which can be planned, reported on and written, but has no reward to serve";
    assert_eq!(error, expected);
    let lends = spec("members: [rm, lm]\nrules: [{match: 'score.*', from: rm}]");
    assert!(load(&lends).is_ok());
    let error = load(&LoadSpec { ensemble: Ensemble::Resident, ..lends }).expect_err("refused").to_string();
    let expected =
        "ensemble: expected off, found resident: member lm has no score.weight, which a rule takes elsewhere, so it cannot score alone";
    assert_eq!(error, expected);
}

#[test]
fn what_a_turn_finds_is_noted() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, seed) in [("rm-0", 1), ("rm-1", 1), ("init", 2)] {
        member(dir.path(), name, |_| {}, seed);
    }
    let recipe = Recipe::from_yaml("members: [rm-0, rm-1]\ninit: init\nmethod: slerp", dir.path()).expect("a recipe");
    let (generation, _) = load(&LoadSpec::new(recipe)).expect("loads");
    assert_eq!(generation.info.method, "slerp");
    assert!(generation.info.notes.iter().any(|note| note.starts_with("slerp is linear in 5 of 5 groups")), "{:?}", generation.info.notes);
}

#[test]
fn what_cannot_be_loaded_names_its_cause() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let nan = member(
        dir.path(),
        "nan",
        |tensors| {
            tensors
                .insert("score.weight".to_owned(), fixture::tensor("F32", &[1, TINY.hidden], std::iter::repeat_n(f32::NAN, TINY.hidden)));
        },
        1,
    );
    let error = load(&LoadSpec::uniform(&[nan]).expect("one folder")).expect_err("NaN");
    let words = format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
    assert!(words.contains("the merged model") && words.contains("score.weight"), "{words}");
    let headless = member(dir.path(), "headless", |tensors| drop(tensors.remove("score.weight")), 1);
    let error = load(&LoadSpec::uniform(&[headless]).expect("one folder")).expect_err("no head");
    assert!(matches!(error, LoadError::Merge(_)), "{error}");
    assert!(load(&LoadSpec::uniform(&[dir.path().join("nowhere")]).expect("one folder")).is_err());
}

#[test]
fn a_model_that_does_not_answer_with_finite_scores_never_goes_live() {
    use super::super::testing::{FakeModel, NAN};
    let model = FakeModel::new(1.0);
    let probe = |id: u32| [Arc::new(Encoding::for_test(vec![1])), Arc::new(Encoding::for_test(vec![id]))];
    assert!(warm_up("it", model.as_ref(), &probe(2)).is_ok());
    let error = warm_up("it", model.as_ref(), &probe(NAN)).expect_err("NaN");
    assert_eq!(error.to_string(), "it does not answer: probe 1: the model's output is NaN, not a finite number");
    let infinite = FakeModel::new(f32::INFINITY);
    assert!(warm_up("it", infinite.as_ref(), &probe(2)).is_err());
    assert_eq!(model.forwards.load(Ordering::Relaxed), 2);
}

/// A folder whose config has more fields.
fn configured(dir: &Path, name: &str, more: serde_json::Value, change: impl FnOnce(&mut Tensors), seed: u64) -> PathBuf {
    let path = member(dir, name, change, seed);
    let mut config = fixture::config(TINY);
    config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    std::fs::write(path.join("config.json"), config.to_string()).expect("writable");
    path
}

fn recipe(text: &str) -> LoadSpec {
    LoadSpec::new(Recipe::from_yaml(text, Path::new("")).expect("a recipe"))
}

#[test]
fn where_a_head_reads_is_the_recipes_to_say_and_names_another_model() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = member(dir.path(), "rm", |_| {}, 1);
    let of = |pooling: &str| load(&recipe(&format!("members: [{}]\n{pooling}", path.display()))).expect("loads").0;
    let generations = ["", "pooling: last_token", "pooling: cls", "pooling: mean", "pooling: {token: e}"].map(of);
    let poolings = ["last_non_pad", "last_token", "cls", "mean", "token 8"];
    for (generation, pooling) in generations.iter().zip(poolings) {
        assert_eq!(generation.info.text.pooling, pooling);
        assert!(generation.info.head.contains(pooling), "{}", generation.info.head);
    }
    let names: std::collections::BTreeSet<String> = generations.iter().map(|generation| generation.fingerprint.to_string()).collect();
    assert_eq!(names.len(), 5, "each reading is a model of its own");
    assert!(generations.iter().all(|generation| generation.weights_id == generations[0].weights_id));
    // What is looked for and not there costs that sample alone.
    let missing = generations[4].text.encode(&Sample::Text("abc".to_owned()), Truncation::Refuse).expect_err("no e");
    assert_eq!(missing.kind, crate::domain::FailureKind::NothingToRead);
    let recipe_again = generations[4].info.recipe.clone();
    assert_eq!(load(&recipe(&recipe_again)).expect("resolved").0.fingerprint, generations[4].fingerprint);
}

#[test]
fn members_that_read_at_other_places_are_not_averaged() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let openrlhf = serde_json::json!({"architectures": ["RewardModel"], "value_head_prefix": "score"});
    let paths = [member(dir.path(), "a", |_| {}, 1), configured(dir.path(), "b", openrlhf, |_| {}, 2)];
    let error = load(&LoadSpec::uniform(&paths).expect("two folders")).expect_err("other poolings").to_string();
    assert!(error.contains("pooling: expected last_non_pad, found last_token"), "{error}");
    let yaml = format!("members: [{}, {}]\npooling: last_token", paths[0].display(), paths[1].display());
    assert!(load(&recipe(&yaml)).is_ok(), "unless the recipe says how");
}

#[test]
fn a_configs_own_mean_and_std_are_told_and_used_only_by_choice_and_alone() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = |mean: f64| serde_json::json!({"value_head_prefix": "score", "architectures": ["RewardModel"], "mean": mean, "std": 2.0});
    let paths = [configured(dir.path(), "a", config(0.25), |_| {}, 1), configured(dir.path(), "b", config(0.75), |_| {}, 2)];
    let both = LoadSpec::uniform(&paths).expect("two folders");
    let (raw, _) = load(&both).expect("loads");
    let told = |mean: &str| raw.info.notes.iter().any(|note| note.contains(mean) && note.contains("neither averaged nor used"));
    assert!(told("mean 0.25") && told("mean 0.75"), "{:?}", raw.info.notes);
    assert_eq!(raw.calibration, None);
    let chosen = |spec: LoadSpec| load(&LoadSpec { calibration: CalibrationChoice::FromConfig, ..spec });
    let error = chosen(both).expect_err("two members").to_string();
    assert!(error.contains("those of one member"), "{error}");
    let alone = LoadSpec::uniform(&paths[..1]).expect("one folder");
    let (plain, _) = load(&alone).expect("loads");
    let (calibrated, _) = chosen(alone).expect("one member");
    let calibration = calibrated.calibration.as_ref().expect("chosen");
    assert_eq!((calibration.mean(), calibration.std()), (0.25, 2.0));
    assert_ne!(calibrated.fingerprint, plain.fingerprint);
    let without = LoadSpec::uniform(&[member(dir.path(), "c", |_| {}, 3)]).expect("one folder");
    assert!(chosen(without).expect_err("none").to_string().contains("holds no mean and std"));
}

#[test]
fn what_is_easily_meant_otherwise_is_said() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let old = serde_json::json!({"transformers_version": "4.41.2", "pad_token_id": 1});
    let (generation, _) = load(&LoadSpec::uniform(&[configured(dir.path(), "old", old, |_| {}, 1)]).expect("one")).expect("loads");
    assert!(generation.info.notes.iter().any(|note| note.contains("first_pad_minus_one")), "{:?}", generation.info.notes);
    let several = |tensors: &mut Tensors| {
        let score = fixture::tensor("F32", &[2, TINY.hidden], fixture::noise(9).take(2 * TINY.hidden));
        tensors.insert("score.weight".to_owned(), score);
    };
    let labels = serde_json::json!({"id2label": {"0": "helpful", "1": "safe"}});
    let path = configured(dir.path(), "two", labels, several, 1);
    let (generation, _) = load(&LoadSpec::uniform(std::slice::from_ref(&path)).expect("one")).expect("loads");
    assert_eq!(generation.info.output_names, ["helpful", "safe"]);
    assert!(generation.info.notes.iter().any(|note| note.contains("the reward is the first of them")), "{:?}", generation.info.notes);
    let weighted = format!("members: [{}]\nhead: {{weights: {{safe: 2}}}}", path.display());
    let (weighted, _) = load(&recipe(&weighted)).expect("loads");
    assert!(
        weighted.info.notes.is_empty() && weighted.info.head.contains("weighted 0, 2"),
        "{:?} {}",
        weighted.info.notes,
        weighted.info.head
    );
}

#[test]
fn a_constant_of_a_head_is_never_averaged() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let gated = |transform: f32| {
        move |tensors: &mut Tensors| {
            tensors.remove("score.weight");
            let mut put = |name: &str, shape: &[usize], seed| {
                let count = shape.iter().product();
                tensors.insert(name.to_owned(), fixture::tensor("F32", shape, fixture::noise(seed).take(count)));
            };
            put("regression_layer.weight", &[2, TINY.hidden], 11);
            put("gating.layers.0.weight", &[2, TINY.hidden], 12);
            put("gating.logit_scale", &[1], 13);
            let values = [1.0, 0.0, transform, 1.0];
            tensors.insert("reward_transform_matrix".to_owned(), fixture::tensor("F32", &[2, 2], values.into_iter()));
        }
    };
    let null = || serde_json::json!({"id2label": null});
    let paths = [
        configured(dir.path(), "a", null(), gated(0.0), 1),
        configured(dir.path(), "b", null(), gated(0.0), 2),
        configured(dir.path(), "c", null(), gated(0.5), 3),
    ];
    let of = |paths: &[PathBuf]| {
        let members: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        load(&recipe(&format!("members: [{}]\nhead: {{gate_at: ab}}", members.join(", "))))
    };
    assert!(of(&paths[..2]).is_ok());
    let error = of(&paths).expect_err("another constant");
    let words = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    let place = paths[2].display().to_string();
    assert!(words.starts_with(&place) && words.contains("reward_transform_matrix") && words.contains("not averaged"), "{words}");
}

#[test]
fn a_merge_that_was_kept_loads_as_the_same_generation_and_a_broken_one_is_made_again() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths = [member(dir.path(), "rm-0", |_| {}, 1), member(dir.path(), "rm-1", |_| {}, 2)];
    let cache = CacheOptions { dir: dir.path().join("cache"), max_bytes: 1 << 30 };
    let plain = LoadSpec::uniform(&paths).expect("two folders");
    let spec = LoadSpec { cache: Some(cache.clone()), ..plain.clone() };
    // A minute ahead of the files, which so count as settled.
    let clock = Clock::manual();
    let minute = std::time::Duration::from_secs(60);
    clock.advance(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970") + minute);
    let load = |spec: &LoadSpec| load_generation(spec, GenerationId(1), &clock, &mut |_| {}).expect("loads");
    let expected = load(&plain);
    let same = |found: &Generation| {
        assert_eq!((found.fingerprint, found.weights_id), (expected.fingerprint, expected.weights_id));
        assert_eq!(rewards(found, &found.merged), rewards(&expected, &expected.merged));
        assert_eq!(found.info.members, expected.info.members);
    };
    same(&load(&spec));
    let entry = cache.dir.join("weights").join(expected.weights_id.to_string());
    let used = || std::fs::metadata(entry.join("entry.json")).expect("an entry").modified().expect("a time");
    let kept = used();
    clock.advance(minute);
    same(&load(&spec));
    assert_eq!(used(), kept + minute, "it was found and used");
    for (at, value) in [(0, 0x7f_u8), (1, 0xff)] {
        // A changed number, and a NaN that the reader itself refuses.
        let file = entry.join("model.safetensors");
        let mut bytes = std::fs::read(&file).expect("weights");
        let last = bytes.len() - 1;
        bytes[last] = value;
        bytes[last - at] = value;
        std::fs::write(&file, &bytes).expect("written");
        same(&load(&spec));
        assert_ne!(std::fs::read(&file).expect("weights"), bytes, "it was made again");
    }
    // Nothing of this may fail a load.
    std::fs::remove_dir_all(&cache.dir).expect("removed");
    std::fs::write(&cache.dir, b"no folder").expect("written");
    same(&load(&spec));
}

#[test]
fn spread_members_score_as_resident_ones_whichever_worker_asks_and_at_the_same_time() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths: Vec<_> = (0..3).map(|seed| member(dir.path(), &format!("rm-{seed}"), |_| {}, seed + 1)).collect();
    let device = DeviceChoice::Places(vec![Place::Cpu; 2]);
    let spec = LoadSpec { ensemble: Ensemble::Resident, device, ..LoadSpec::uniform(&paths).expect("three folders") };
    let (resident, _) = load(&spec).expect("loads");
    let spread = Prepared::open(&LoadSpec { ensemble: Ensemble::Spread, ..spec }, &Clock::manual(), &mut |_| {}).expect("a plan");
    let planned = spread.device_bytes();
    let spread = spread.load(GenerationId(1), &mut |_| {}).expect("loads");
    assert_eq!((spread.fingerprint, spread.info.ensemble.as_str()), (resident.fingerprint, "spread"));
    assert_ne!(spread.equipment(), resident.equipment());
    // Both workers are on one processor, which holds all of them.
    assert!(planned <= spread.device_bytes() && spread.device_bytes() == resident.device_bytes());
    let expected = rewards(&resident, &resident.ensemble);
    let encoding = spread.text.encode(&Sample::Text("abcde".to_owned()), Truncation::Refuse).expect("short");
    let pack = Pack::new(&[Arc::new(encoding)]);
    std::thread::scope(|scope| {
        for device in [0, 1] {
            let (models, pack, expected) = (&spread.ensemble.models, &pack, &expected);
            scope.spawn(move || {
                let found = models.iter().map(|model| model.forward_on(device, pack).expect("scored")[0].values[0]);
                assert_eq!(found.collect::<Vec<_>>(), *expected, "device {device}");
            });
        }
    });
}

#[test]
fn the_name_is_known_before_the_weights_are_loaded_and_streamed_members_are_the_resident_ones() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths = [member(dir.path(), "rm-0", |_| {}, 1), member(dir.path(), "rm-1", |_| {}, 2)];
    let spec = LoadSpec { ensemble: Ensemble::Resident, prefix_cache_bytes: 1 << 20, ..LoadSpec::uniform(&paths).expect("two folders") };
    let prepared = Prepared::open(&spec, &Clock::manual(), &mut |_| {}).expect("a plan");
    let name = prepared.fingerprint(&mut |_| {}).expect("a name");
    let resident = prepared.load(GenerationId(1), &mut |_| {}).expect("loads");
    assert_eq!(resident.fingerprint, name);
    assert_eq!(resident.equipment(), prepared.equipment().expect("read already"));
    // Of beginnings nothing is kept before it goes live, and then as much as was planned.
    assert_eq!((prepared.prefix_bytes(), resident.prefix_bytes().bound), (1 << 20, 0));
    // The plan is right about memory, but for the padding of narrow products.
    let (planned, found) = (prepared.device_bytes(), resident.device_bytes());
    assert!(planned <= found, "{planned} {found}");

    let streaming = LoadSpec { ensemble: Ensemble::Streamed, ..spec };
    let (streamed, _) = load(&streaming).expect("loads");
    assert_eq!(streamed.fingerprint, name);
    assert_ne!(streamed.equipment(), resident.equipment());
    assert!(!streamed.members_loaded() && streamed.members_streamed());
    assert_eq!(streamed.device_bytes(), streamed.limits().device_bytes, "no member stands there");
    assert!(streamed.info.notes.iter().any(|note| note.contains("streamed")), "{:?}", streamed.info.notes);
    let stream = streamed.streamed.as_ref().expect("streams");
    let expected = rewards(&resident, &resident.ensemble);
    for index in 0..2 {
        let lane = super::super::lanes::Lane::new([stream.load(index).expect("loads")]);
        assert_eq!(rewards(&streamed, &lane), [expected[index + 1]]);
    }
    assert!(stream.load(2).is_err());
    // A member whose file has changed since is not the one that was merged.
    member(dir.path(), "rm-1", |_| {}, 3);
    let error = stream.load(1).err().expect("changed");
    assert!(error.contains("changed"), "{error}");
}

#[test]
fn statistics_of_other_weights_are_not_used() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths = [member(dir.path(), "rm-0", |_| {}, 1), member(dir.path(), "rm-1", |_| {}, 2)];
    let plain = LoadSpec::uniform(&paths).expect("two folders");
    let (bare, _) = load(&plain).expect("loads");
    let calibration = Calibration::new(1.0, 2.0, 9, "x").expect("valid");
    let name = |name: &str| MemberName::try_from(name.to_owned()).expect("plain");
    let measured = |weights_id: String, hash: String| MeasuredMembers {
        weights_id: Some(weights_id),
        members: vec![(name("rm-0"), Some(hash), calibration.clone()), (name("rm-1"), None, calibration.clone())],
    };
    let with = |members| LoadSpec { calibration: CalibrationChoice::Given(calibration.clone()), members, ..plain.clone() };
    let hash = bare.info.members[0].content_hash.clone();
    let (right, _) = load(&with(measured(bare.weights_id.to_string(), hash))).expect("loads");
    assert_eq!((right.calibration.as_ref(), right.member_calibrations.len()), (Some(&calibration), 2));
    assert_ne!(right.fingerprint, bare.fingerprint);
    let (wrong, _) = load(&with(measured("00".repeat(32), "00".repeat(32)))).expect("loads");
    assert_eq!((wrong.calibration.as_ref(), wrong.member_calibrations.len()), (None, 1));
    assert_eq!(wrong.fingerprint, bare.fingerprint, "as without a calibration");
    let notes = wrong.info.notes.join("; ");
    assert!(notes.contains("the calibration was measured on other weights") && notes.contains("member rm-0"), "{notes}");
}

#[test]
fn a_model_on_several_devices_answers_on_each_as_it_does_on_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths = [member(dir.path(), "rm-0", |_| {}, 1), member(dir.path(), "rm-1", |_| {}, 2)];
    let mut spec = LoadSpec::uniform(&paths).expect("two folders");
    let (one, _) = load(&spec).expect("loads");
    spec.device = "[cpu, cpu, cpu]".parse().expect("devices");
    let (several, _) = load(&spec).expect("loads");
    assert_eq!(several.info.devices, ["cpu"; 3]);
    assert_eq!(one.fingerprint, several.fingerprint);
    let sample = Sample::Text("abcde".to_owned());
    let encoding = Arc::new(one.text.encode(&sample, Truncation::Refuse).expect("fits"));
    let pack = Pack::new(&[encoding]);
    let reward = |generation: &Generation, device: usize| generation.merged.models[0].forward_on(device, &pack).expect("forward")[0].reward;
    for device in 0..3 {
        assert_eq!(reward(&several, device).to_bits(), reward(&one, 0).to_bits());
    }
    let nowhere = several.merged.models[0].forward_on(3, &pack).expect_err("there are three").to_string();
    assert!(nowhere.contains("no device number 3"), "{nowhere}");
}

#[test]
fn what_a_score_is_computed_in_is_part_of_the_fingerprint_where_it_matters() {
    let (cpu, cuda) = ([Place::Cpu], [Place::Cuda(0)]);
    let alike = |dtype: Dtype| arithmetic(dtype.into(), &cpu) == arithmetic(dtype.into(), &cuda);
    assert!(alike(Dtype::F32) && !alike(Dtype::Bf16));
    // Fixed shapes are other bits on a card, and nothing new on the CPU.
    let changes = |places: &[Place]| {
        let fixed = Arithmetic { dtype: Dtype::F32, batch_invariant: true };
        arithmetic(fixed, places) != arithmetic(Dtype::F32.into(), places)
    };
    assert!(changes(&cuda) && !changes(&cpu));
}

#[test]
fn a_device_that_is_not_there_is_named_before_anything_is_loaded() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut spec = LoadSpec::uniform(&[member(dir.path(), "rm-0", |_| {}, 1)]).expect("one folder");
    spec.device = "cuda:999".parse().expect("a device");
    let refused = load(&spec).map(|_| ()).expect_err("no such card").to_string();
    assert!(refused.starts_with("device cuda:999: "), "{refused}");
}

/// A base without a head, and adapters on it.
fn family(dir: &Path, adapters: &[(&str, usize, &str)]) -> Vec<PathBuf> {
    let mut config = fixture::config(TINY);
    config["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
    fixture::write(&dir.join("base"), &config, &fixture::language_model(TINY, "F32", 1), 1).expect("written");
    fixture::write(&dir.join("other-base"), &config, &fixture::language_model(TINY, "F32", 2), 1).expect("written");
    let adapter = |(name, rank, base): &(&str, usize, &str)| {
        let config = serde_json::json!({
            "peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["score"], "task_type": "SEQ_CLS", "bias": "none",
        });
        let tensors = fixture::lora(TINY, "F32", *rank, &["self_attn.q_proj", "mlp.down_proj"], name.len() as u64 * 31 + *rank as u64);
        let path = dir.join(name);
        fixture::write_lora(&path, &config, &tensors).expect("written");
        path
    };
    adapters.iter().map(adapter).collect()
}

#[test]
fn members_on_one_base_score_as_resident_ones_and_take_the_base_once() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let paths = family(dir.path(), &[("rm-0", 2, "../base"), ("rm-1", 3, "../base"), ("rm-2", 1, "../base/../base")]);
    let resident =
        LoadSpec { ensemble: Ensemble::Resident, prefix_cache_bytes: 1 << 20, ..LoadSpec::uniform(&paths).expect("three folders") };
    let apart = LoadSpec { ensemble: Ensemble::Adapters, ..resident.clone() };
    let (resident, _) = load(&resident).expect("loads");
    let prepared = Prepared::open(&apart, &Clock::manual(), &mut |_| {}).expect("a plan");
    let generation = prepared.load(GenerationId(1), &mut |_| {}).expect("loads");
    let (expected, found) = (rewards(&resident, &resident.ensemble), rewards(&generation, &generation.ensemble));
    assert_eq!(found[0].to_bits(), expected[0].to_bits(), "the merged model is the same");
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0), "{found} against {expected}");
    }
    // What is scored again comes from what each model kept for itself.
    assert_eq!(rewards(&generation, &generation.ensemble), found);
    assert!(found[1] != found[2] && found[2] != found[3], "{found:?}");
    assert_eq!(generation.resident().count(), 3);
    assert_eq!((generation.fingerprint, generation.info.ensemble.as_str()), (resident.fingerprint, "adapters"));
    assert_ne!(generation.equipment(), resident.equipment());
    assert!(generation.info.notes.iter().any(|note| note.contains("adapters on ") && note.contains("base")), "{:?}", generation.info.notes);
    // The plan knows its bytes but for what narrow products of the merged model are padded with, and for its head.
    let planned = super::super::members_on_one_base(prepared.plan(), &[Place::Cpu], Dtype::F32).expect("adapters").total();
    assert_eq!(generation.device_bytes() - generation.limits().device_bytes, planned);
    assert!(generation.device_bytes() < resident.device_bytes());
}

#[test]
fn the_base_itself_may_be_a_member_beside_its_adapters() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let base = member(dir.path(), "base", |_| {}, 7);
    let config = serde_json::json!({
        "peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "modules_to_save": ["score"], "task_type": "SEQ_CLS",
    });
    fixture::write_lora(&dir.path().join("rm-1"), &config, &fixture::lora(TINY, "F32", 2, &["self_attn.q_proj"], 3)).expect("written");
    let spec = LoadSpec { ensemble: Ensemble::Adapters, ..LoadSpec::uniform(&[base, dir.path().join("rm-1")]).expect("two folders") };
    let (generation, _) = load(&spec).expect("loads");
    let (resident, _) = load(&LoadSpec { ensemble: Ensemble::Resident, ..spec }).expect("loads");
    let (found, expected) = (rewards(&generation, &generation.ensemble), rewards(&resident, &resident.ensemble));
    assert_eq!(found[1].to_bits(), expected[1].to_bits(), "nothing is added to it");
    assert!((found[2] - expected[2]).abs() < 1e-4, "{found:?} against {expected:?}");
}

#[test]
fn members_that_are_no_adapters_on_one_base_are_named_before_anything_is_read() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let whole = member(dir.path(), "whole", |_| {}, 1);
    let adapters = family(dir.path(), &[("rm-0", 2, "../base"), ("rm-1", 2, "../base"), ("rm-2", 2, "../other-base")]);
    let refused = |members: &[PathBuf]| {
        let spec = LoadSpec { ensemble: Ensemble::Adapters, ..LoadSpec::uniform(members).expect("folders") };
        let error = load(&spec).map(|_| ()).expect_err("refused").to_string();
        error.replace(&*std::fs::canonicalize(dir.path()).expect("there").to_string_lossy(), "")
    };
    let with = |members: &[&PathBuf]| members.iter().map(|path| (*path).clone()).collect::<Vec<_>>();
    let other = refused(&adapters);
    assert!(other.starts_with("ensemble: adapters: expected every member to be a LoRA adapter on one base"), "{other}");
    assert!(other.contains("rm-0 stands on /base, but rm-2 stands on /other-base; resident holds any members"), "{other}");
    let mixed = refused(&with(&[&whole, &adapters[0], &adapters[1]]));
    assert!(mixed.contains("rm-0 stands on /base, but whole is not an adapter on it; "), "{mixed}");
    let second = member(dir.path(), "second", |_| {}, 2);
    assert!(refused(&with(&[&whole, &second])).contains("found that no member is a LoRA adapter; "));
    // The merge of one is that one, whatever it is.
    let alone = LoadSpec { ensemble: Ensemble::Adapters, ..LoadSpec::uniform(&[whole]).expect("one folder") };
    assert_eq!(load(&alone).expect("loads").0.resident().count(), 1);
}
