//! Merges of whole checkpoints by every method, against float64 references that know nothing of how they are made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::checkpoint::fixture::{self, Size, TINY, Tensors};
use crate::checkpoint::{Elements, SourceError, TensorSource};

/// Large enough that a tensor has several blocks, the last of them short.
const WIDE: Size = Size { hidden: 264, intermediate: 512, layers: 1, vocab: 501 };

pub type Numbers = BTreeMap<String, Vec<f64>>;

fn numbers(tensors: &Tensors) -> Numbers {
    let wide = |tensor: &fixture::Tensor| match tensor.dtype {
        "F32" => tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        "BF16" => tensor.bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        "F16" => tensor.bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        other => panic!("{other}"),
    };
    tensors.iter().map(|(name, tensor)| (name.clone(), wide(tensor))).collect()
}

struct Folders {
    dir: tempfile::TempDir,
}

impl Folders {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// Members `m0`, `m1`, ... and `init`.
    fn family(size: Size, dtypes: &[&'static str]) -> (Self, Vec<Numbers>, Numbers) {
        let folders = Self::new();
        let members = dtypes.iter().zip(1..).map(|(&dtype, seed)| {
            let tensors = fixture::llama(size, dtype, seed);
            folders.write(&format!("m{}", seed - 1), size, &tensors);
            numbers(&tensors)
        });
        let members = members.collect();
        let init = fixture::llama(size, "F32", 99);
        folders.write("init", size, &init);
        (folders, members, numbers(&init))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, size: Size, tensors: &Tensors) {
        let _ = std::fs::remove_dir_all(self.path(name));
        fixture::write(&self.path(name), &fixture::config(size), tensors, 2).unwrap();
    }

    fn plan(&self, recipe: &str) -> Arc<MergePlan> {
        Arc::new(MergePlan::open(&Recipe::from_yaml(recipe, self.dir.path()).unwrap()).unwrap_or_else(|error| panic!("{error}")))
    }

    fn merged(&self, recipe: &str) -> Merged {
        Merged::new(self.plan(recipe)).unwrap()
    }
}

fn read(merged: &Merged) -> BTreeMap<String, Elements> {
    let read = |(name, info): (&str, &crate::checkpoint::TensorInfo)| {
        let mut into = Elements::default();
        merged.read(name, 0..info.elements(), &mut into).unwrap();
        (name.to_owned(), into)
    };
    merged.manifest().iter().map(read).collect()
}

fn f32s(elements: &Elements) -> &[f32] {
    let Elements::F32(values) = elements else { panic!("{elements:?}") };
    values
}

/// Every element is the reference rounded once.
fn assert_is(merged: &Merged, expected: impl Fn(&str, usize) -> f64) {
    for (name, found) in read(merged) {
        for (index, found) in f32s(&found).iter().enumerate() {
            let expected = expected(&name, index) as f32;
            assert_eq!(found.to_bits(), expected.to_bits(), "{name} {index}: {found} {expected}");
        }
    }
}

/// Every element is the reference rounded once, but for the last digits of the reference itself.
pub fn assert_near(merged: &Merged, expected: &Numbers) {
    for (name, found) in read(merged) {
        for (found, expected) in f32s(&found).iter().zip(&expected[&name]) {
            let step = f64::from(f32::EPSILON) / 2.0 * expected.abs();
            assert!((f64::from(*found) - expected).abs() <= 1.001 * step + 1e-14, "{name}: {found} {expected}");
        }
    }
}

/// SLERP as WARP writes it, on the vectors themselves (§3.2); along the line where there is no arc.
fn slerp(a: &[f64], b: &[f64], init: &[f64], t: f64) -> Vec<f64> {
    let task = |x: &[f64]| x.iter().zip(init).map(|(x, init)| x - init).collect::<Vec<f64>>();
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (x, y) = (task(a), task(b));
    let angle = (x.iter().zip(&y).map(|(x, y)| x * y).sum::<f64>() / (norm(&x) * norm(&y))).clamp(-1.0, 1.0).acos();
    // On one line, as a tensor of one number always is, there is no arc.
    let straight = norm(&x) < 1e-12 || norm(&y) < 1e-12 || angle.sin() < 1e-6;
    let (keep, add) = if straight { (1.0 - t, t) } else { (((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()) };
    x.iter().zip(&y).zip(init).map(|((x, y), init)| init + keep * x + add * y).collect()
}

/// The same for whole models, group by group.
pub fn slerped(a: &Numbers, b: &Numbers, init: &Numbers, t: f64, group: impl Fn(&str) -> String) -> Numbers {
    let mut groups: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for name in init.keys() {
        groups.entry(group(name)).or_default().push(name);
    }
    let mut merged = Numbers::new();
    for names in groups.values() {
        let joined = |model: &Numbers| names.iter().flat_map(|name| model[*name].clone()).collect::<Vec<_>>();
        let mut turned = slerp(&joined(a), &joined(b), &joined(init), t).into_iter();
        for name in names {
            merged.insert((*name).clone(), turned.by_ref().take(init[*name].len()).collect());
        }
    }
    merged
}

fn layer(name: &str) -> String {
    match name.split_once("layers.") {
        Some((_, rest)) => format!("layer {}", rest.split('.').next().unwrap()),
        None => name.to_owned(),
    }
}

#[test]
fn slerp_turns_task_vectors_group_by_group() {
    let size = Size { layers: 2, ..WIDE };
    let (folders, members, init) = Folders::family(size, &["F32", "BF16", "F16"]);
    let two = |more: &str| folders.merged(&format!("members: [m0, m1]\ninit: init\n{more}"));
    let expected = |t, group: fn(&str) -> String| slerped(&members[0], &members[1], &init, t, group);
    assert_near(&two("method: slerp"), &expected(0.5, layer));
    assert_near(&two("slerp: {t: 0.2}"), &expected(0.2, layer));
    assert_near(&two("slerp: {granularity: tensor, t: 0.7}"), &expected(0.7, str::to_owned));
    assert_near(&two("slerp: {granularity: global}"), &expected(0.5, |_| String::new()));
    let third = slerped(&expected(0.5, layer), &members[2], &init, 1.0 / 3.0, layer);
    assert_near(&folders.merged("members: [m0, m1, m2]\ninit: init\nmethod: slerp"), &third);
    let half_way = third.iter().map(|(name, values)| {
        let half_way = values.iter().zip(&init[name]).map(|(merged, init)| init + 0.3 * (merged - init)).collect();
        (name.clone(), half_way)
    });
    assert_near(&folders.merged("members: [m0, m1, m2]\ninit: init\nmethod: slerp\nliti: {eta: 0.3}"), &half_way.collect());
}

#[test]
fn linear_ema_and_liti_are_their_formulas_rounded_once() {
    let (folders, m, init) = Folders::family(WIDE, &["F32", "BF16", "F16"]);
    let members = "members: [m0, m1, m2]\ninit: init\n";
    let third = 1.0 / 3.0;
    assert_is(&folders.merged(members), |n, i| m[0][n][i] * third + m[1][n][i] * third + m[2][n][i] * third);
    let given = "members: [{path: m0, coefficient: 2}, {path: m1, coefficient: -0.5}, m2]\nnormalize: false";
    assert_is(&folders.merged(given), |n, i| m[0][n][i] * 2.0 + m[1][n][i] * -0.5 + m[2][n][i]);
    let ema = |n: &str, i: usize| m[0][n][i] * 0.5625 + m[1][n][i] * 0.1875 + m[2][n][i] * 0.25;
    assert_is(&folders.merged(&format!("{members}ema: {{mu: 0.25}}")), ema);
    let halved = 0.5 * third;
    let liti = |n: &str, i: usize| m[0][n][i] * halved + m[1][n][i] * halved + m[2][n][i] * halved + init[n][i] * 0.5;
    assert_is(&folders.merged(&format!("{members}liti: {{eta: 0.5}}")), liti);
    assert_is(&folders.merged(&format!("{members}liti: {{eta: 0}}")), |n, i| init[n][i]);
    let beyond = |n: &str, i: usize| m[0][n][i] * 2.0 - init[n][i];
    assert_is(&folders.merged("members: [m0]\ninit: init\nliti: {eta: 2}"), beyond);
}

#[test]
fn rules_decide_over_method_and_liti() {
    let (folders, m, init) = Folders::family(WIDE, &["F32", "F32"]);
    let rules =
        "rules: [{match: 'score.*', from: m1}, {match: '*.embed_tokens.*', coefficients: {m0: 3, m1: 1}}, {match: '*norm*', init: true}]";
    let merged = folders.merged(&format!("members: [m0, m1]\ninit: init\nliti: {{eta: 0.5}}\n{rules}"));
    assert_is(&merged, |n, i| match n {
        "score.weight" => m[1][n][i],
        "model.embed_tokens.weight" => m[0][n][i] * 0.75 + m[1][n][i] * 0.25,
        _ if n.contains("norm") => init[n][i],
        _ => m[0][n][i] * 0.25 + m[1][n][i] * 0.25 + init[n][i] * 0.5,
    });
}

/// DogeRM (2407.01470): `(1-λ) θ_RM + λ θ_SFT` for the body, the reward model's own head.
#[test]
fn a_body_averaged_with_a_language_model_keeps_the_reward_head() {
    let folders = Folders::new();
    let (reward_model, language_model) = (fixture::llama(WIDE, "BF16", 1), fixture::language_model(WIDE, "F32", 2));
    folders.write("rm", WIDE, &reward_model);
    folders.write("sft", WIDE, &language_model);
    let recipe = "members: [{path: rm, coefficient: 0.75}, {path: sft, coefficient: 0.25}]\nrules: [{match: 'score.*', from: rm}]";
    let merged = folders.merged(recipe);
    assert_eq!(merged.manifest().len(), reward_model.len());
    let (rm, sft) = (numbers(&reward_model), numbers(&language_model));
    assert_is(&merged, |n, i| if n == "score.weight" { rm[n][i] } else { rm[n][i] * 0.75 + sft[n][i] * 0.25 });
    let alone = merged.plan().member_source(1).unwrap_err().to_string();
    let expected = "tensor \"score.weight\": the member does not have it, because a rule takes another's; it cannot stand alone";
    assert_eq!(alone, format!("{}: {expected}", folders.path("sft").display()));
    assert!(merged.plan().member_source(0).unwrap().is_some());
}

#[test]
fn one_member_is_that_member_bit_for_bit_whatever_the_method() {
    let folders = Folders::new();
    for (dtype, name) in [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")] {
        let mut tensors = fixture::llama(TINY, dtype, 9);
        let odd = [-0.0, 3e-8, 1.0, -1.0].into_iter().cycle().take(8);
        tensors.insert("model.norm.weight".to_owned(), fixture::tensor(dtype, &[8], odd));
        folders.write("m", TINY, &tensors);
        folders.write("init", TINY, &fixture::llama(TINY, "F32", 10));
        for method in ["method: linear", "method: slerp", "ema: {mu: 0.3}", "liti: {eta: 1}", "rules: [{match: '*', from: m}]"] {
            let merged = folders.merged(&format!("members: [m]\ninit: init\ndtype: {name}\n{method}"));
            for (tensor, found) in read(&merged) {
                found.with_little_endian(|bytes| assert_eq!(bytes, tensors[&tensor].bytes, "{method} {tensor}"));
            }
        }
    }
}

#[test]
fn equal_members_give_that_member_whatever_the_method() {
    let folders = Folders::new();
    let tensors = fixture::llama(TINY, "F32", 9);
    for name in ["a", "b", "c"] {
        folders.write(name, TINY, &tensors);
    }
    folders.write("init", TINY, &fixture::llama(TINY, "F32", 10));
    for method in ["method: linear", "method: slerp", "slerp: {granularity: tensor}", "slerp: {granularity: global}", "ema: {mu: 0.3}"] {
        let merged = folders.merged(&format!("members: [a, b, c]\ninit: init\n{method}"));
        for (tensor, found) in read(&merged) {
            found.with_little_endian(|bytes| assert_eq!(bytes, tensors[&tensor].bytes, "{method} {tensor}"));
        }
        let straight: Vec<_> = merged.groups().iter().flat_map(|group| group.steps.iter().copied()).collect();
        assert!(straight.iter().all(|step| *step == Step::OneLine), "{straight:?}");
    }
}

#[test]
fn where_slerp_is_linear_the_notes_say_so() {
    let (folders, m, init) = Folders::family(TINY, &["F32", "F32"]);
    let mut first = fixture::llama(TINY, "F32", 1);
    first.insert("model.norm.weight".to_owned(), fixture::llama(TINY, "F32", 99)["model.norm.weight"].clone());
    folders.write("m0", TINY, &first);
    let merged = folders.merged("members: [m0, m1]\ninit: init\nslerp: {t: 0.25}");
    let expected = "slerp is linear in 1 of 5 groups, because a task vector is shorter than 1e-12: model.norm.weight";
    assert_eq!(merged.notes(), [expected]);
    let mut into = Elements::default();
    merged.read("model.norm.weight", 0..8, &mut into).unwrap();
    let norm = |i: usize| init["model.norm.weight"][i] * 0.75 + m[1]["model.norm.weight"][i] * 0.25;
    assert_eq!(f32s(&into), (0..8).map(|i| norm(i) as f32).collect::<Vec<_>>());
    let whole = folders.merged("members: [m1, {path: m1, name: again}]\ninit: init\nslerp: {granularity: global}");
    assert!(whole.notes()[0].ends_with("lie on one line (the sine of their angle is below 1e-6): the whole model"), "{:?}", whole.notes());
    assert_eq!(folders.merged("members: [m0, m1]").notes(), [""; 0]);
}

#[test]
fn threads_and_chunks_change_no_bit_of_a_slerp() {
    let (folders, _, _) = Folders::family(WIDE, &["BF16", "F32", "BF16"]);
    let recipe = "members: [m0, m1, m2]\ninit: init\nmethod: slerp\nliti: {eta: 0.3}\ndtype: bfloat16";
    let in_pool = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let merged = folders.merged(recipe);
            (read(&merged), merged.weights_id().unwrap())
        })
    };
    let one = in_pool(1);
    assert_eq!(in_pool(2), one);
    assert_eq!(in_pool(5), one);
    let merged = folders.merged(recipe);
    let (name, mut into, mut bytes) = ("model.embed_tokens.weight", Elements::default(), Vec::new());
    let elements = merged.manifest().get(name).unwrap().elements();
    for begin in (0..elements).step_by(70_001) {
        merged.read(name, begin..elements.min(begin + 70_001), &mut into).unwrap();
        bytes.extend_from_slice(into.bytes());
    }
    assert_eq!(bytes, one.0[name].bytes());
}

#[test]
fn the_id_names_method_coefficients_rules_and_every_source_that_is_read() {
    let (folders, _, _) = Folders::family(TINY, &["F32", "F32"]);
    folders.write("other", TINY, &fixture::llama(TINY, "F32", 55));
    let id = |text: &str| folders.merged(text).weights_id().unwrap();
    let same = |a: &str, b: &str| assert_eq!(id(a), id(b), "{a} | {b}");
    same("members: [m0, m1]", "members: [{path: m0, name: x}, {path: m1, name: y}]\ninit: init");
    same("members: [m0, m1]\ninit: init", "members: [m0, m1]\ninit: other");
    same("members: [m0, m1]\ninit: init\nliti: {eta: 1}", "members: [m0, m1]\ninit: other");
    same(
        "members: [m0, m1]\nrules: [{match: 'score.*', from: m1}]",
        "members: [m0, {path: m1, name: z}]\nrules: [{match: 'score.*', from: z}]",
    );
    let sources = "members: [m0, m1]\ninit: init\n";
    let different = [
        "members: [m0, m1]".to_owned(),
        "members: [m0, m1]\nkind: policy".to_owned(),
        "members: [{path: m0, coefficient: 0.5}, {path: m1, coefficient: 0.5}]\nnormalize: false\ndtype: float16".to_owned(),
        format!("{sources}method: slerp"),
        "members: [m0, m1]\ninit: other\nmethod: slerp".to_owned(),
        "members: [m1, m0]\ninit: init\nmethod: slerp".to_owned(),
        format!("{sources}slerp: {{t: 0.4}}"),
        format!("{sources}slerp: {{granularity: tensor}}"),
        format!("{sources}method: slerp\nliti: {{eta: 0.3}}"),
        format!("{sources}liti: {{eta: 0.3}}"),
        format!("{sources}ema: {{mu: 0.5}}"),
        format!("{sources}ema: {{mu: 0.25}}"),
        format!("{sources}rules: [{{match: 'score.*', from: m0}}]"),
        format!("{sources}rules: [{{match: 'score.*', from: m1}}]"),
        format!("{sources}rules: [{{match: 'score.*', init: true}}]"),
        format!("{sources}rules: [{{match: 'scor*', from: m0}}]"),
        format!("{sources}rules: [{{match: 'score.*', coefficients: {{m0: 3, m1: 1}}}}]"),
        format!("{sources}rules: [{{match: 'score.*', coefficients: {{m0: 4, m1: 1}}}}]"),
    ];
    let ids: Vec<_> = different.iter().map(|text| id(text)).collect();
    for (index, one) in ids.iter().enumerate() {
        if let Some(other) = ids.iter().skip(index + 1).position(|other| other == one) {
            panic!("{:?} and {:?}", different[index], different[index + 1 + other]);
        }
    }
    let merged = folders.merged(&different[3]);
    assert_eq!(merged.plan().weights_id(&merged.member_hashes().unwrap(), merged.init_hash().unwrap()), ids[3]);
}

#[test]
fn a_recipe_as_a_member_is_what_it_would_have_written() {
    let (folders, _, _) = Folders::family(TINY, &["F32", "F32", "F32"]);
    std::fs::create_dir(folders.path("recipes")).unwrap();
    let inner = "members: [../m0, ../m1]\ninit: ../init\nmethod: slerp\nliti: {eta: 0.3}\ndtype: bfloat16";
    std::fs::write(folders.path("recipes/first.yaml"), inner).unwrap();
    let made = read(&folders.merged(&inner.replace("../", "")));
    let mut tensors = fixture::llama(TINY, "BF16", 1);
    for (name, elements) in &made {
        tensors.get_mut(name).unwrap().bytes = elements.bytes().to_vec();
    }
    folders.write("written", TINY, &tensors);
    let second = |first: &str| format!("members: [m2, m0]\ninit: {first}\nmethod: slerp");
    for (recipe, written) in [
        (second("recipes/first.yaml"), second("written")),
        ("members: [m2, recipes/first.yaml]".to_owned(), "members: [m2, written]".to_owned()),
    ] {
        let (recipe, written) = (folders.merged(&recipe), folders.merged(&written));
        assert_eq!(read(&recipe), read(&written));
        assert_eq!(recipe.weights_id().unwrap(), written.weights_id().unwrap());
    }
    let plan = folders.plan("members: [m2, recipes/first.yaml]");
    assert_eq!(plan.members()[1].name().as_str(), "first");
    assert_eq!(plan.members()[1].source().plan().unwrap().recipe().liti(), Some(0.3));
    let alone = plan.member_source(1).unwrap().unwrap();
    let widened = folders.merged("members: [written]");
    assert_eq!((read(&alone), alone.weights_id().unwrap()), (read(&widened), widened.weights_id().unwrap()));
}

#[test]
fn recipes_that_cannot_be_opened_say_which_and_why() {
    let (folders, _, _) = Folders::family(TINY, &["F32"]);
    let problems = |recipe: &str| MergePlan::open(&Recipe::from_yaml(recipe, folders.dir.path()).unwrap()).unwrap_err().problems;
    let write = |name: &str, text: &str| std::fs::write(folders.path(name), text).unwrap();
    write("loop.yaml", "members: [m0, back.yaml]");
    write("back.yaml", "members: [loop.yaml]");
    let place = |name: &str| folders.path(name).canonicalize().unwrap().display().to_string();
    let found = problems("members: [m0, loop.yaml]");
    let way = format!("{} -> {} -> {0}", place("loop.yaml"), place("back.yaml"));
    assert!(found.len() == 1 && found[0].ends_with(&format!("the recipe leads back to itself: {way}")), "{found:?}");
    write("bad.yaml", "member: []");
    let found = problems("members: [m0]\ninit: bad.yaml");
    assert!(found[0].starts_with(&format!("init: {}: member: unknown key", folders.path("bad.yaml").display())), "{found:?}");
    let found = problems("members: [m0, none.yaml]");
    assert!(found[0].starts_with("member \"none\": ") && found[0].contains("cannot be read"), "{found:?}");
    write("hollow.yaml", "members: [nowhere]");
    let found = problems("members: [m0, hollow.yaml]");
    assert!(found[0].starts_with("member \"hollow\": ") && found[0].contains("there is no such folder"), "{found:?}");
    let many: Vec<_> = (0..40).map(|i| format!("{{path: m0, name: n{i}}}")).collect();
    write("wide.yaml", &format!("members: [{}]", many.join(", ")));
    let wide: Vec<_> = (0..40).map(|i| format!("{{path: wide.yaml, name: n{i}}}")).collect();
    let found = problems(&format!("members: [{}]", wide.join(", ")));
    assert!(found.iter().any(|problem| problem.contains("leads to more than 1024 checkpoints and recipes")), "{found:?}");
    let found = problems("members: [{path: m0, base: init}]");
    assert!(found[0].contains("is no LoRA adapter, so it stands on no base"), "{found:?}");
}

fn with_integers(folders: &Folders, name: &str, integers: &[i64]) {
    let mut tensors = fixture::llama(TINY, "F32", 1);
    let bytes = integers.iter().flat_map(|x| x.to_le_bytes()).collect();
    tensors.insert("steps".to_owned(), fixture::Tensor { dtype: "I64", shape: vec![integers.len()], bytes });
    folders.write(name, TINY, &tensors);
}

#[test]
fn integers_are_taken_if_all_members_agree_and_refused_if_they_do_not() {
    let folders = Folders::new();
    with_integers(&folders, "a", &[1, 2, 3]);
    with_integers(&folders, "b", &[1, 2, 3]);
    with_integers(&folders, "c", &[1, 2, 4]);
    let steps = |recipe: &str| {
        let mut into = Elements::default();
        folders.merged(&format!("kind: policy\n{recipe}")).read("steps", 1..3, &mut into).map(|()| into)
    };
    assert_eq!(steps("members: [a, b]"), Ok(Elements::I64(vec![2, 3])));
    let error = steps("members: [a, b, c]").unwrap_err().to_string();
    let expected = format!(
        "{}: tensor \"steps\": element 2 is not that of {}; such a tensor is not averaged and must be the same in all members, or a rule \
         must say whose is taken",
        folders.path("c").display(),
        folders.path("a").display()
    );
    assert_eq!(error, expected);
    assert_eq!(steps("members: [a, b, c]\nrules: [{match: steps, from: c}]"), Ok(Elements::I64(vec![2, 4])));
    // A range of several blocks is hashed as it is read, so that what was compared is what the id names.
    let id = |recipe: &str| folders.merged(&format!("kind: policy\n{recipe}")).weights_id().unwrap();
    assert_eq!(id("members: [a]"), id("members: [b]"));
    assert_ne!(id("members: [a]"), id("members: [c]"));
}

#[test]
fn a_file_that_changes_shrinks_or_vanishes_between_the_two_reads_is_told() {
    let (folders, _, _) = Folders::family(TINY, &["F32", "F32"]);
    let recipe = "members: [m0, m1]\ninit: init\nmethod: slerp";
    let file = |name: &str| folders.path(name).join("model-00001-of-00002.safetensors");
    let score = |merged: &Merged| merged.read("model.embed_tokens.weight", 0..192, &mut Elements::default()).unwrap_err().to_string();

    let merged = folders.merged(recipe);
    let mut bytes = std::fs::read(file("init")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header] ^= 1;
    std::fs::write(file("init"), &bytes).unwrap();
    let expected =
        "tensor \"model.embed_tokens.weight\": elements 0..192 have changed since they were first read; the file was changed while in use";
    assert_eq!(score(&merged), format!("{}: {expected}", folders.path("init").display()));

    let merged = folders.merged(recipe);
    std::fs::OpenOptions::new().write(true).open(file("m1")).unwrap().set_len(100).unwrap();
    let error = score(&merged);
    assert!(
        error.starts_with(&format!("{}: tensor \"model.embed_tokens.weight\": the file has 100 bytes", file("m1").display())),
        "{error}"
    );
    let error = Merged::new(merged.plan().clone()).unwrap_err();
    assert!(matches!(&error, SourceError::Read { tensor, .. } if tensor == "model.embed_tokens.weight"), "{error}");

    // A file that is only unlinked stays open, and whole.
    let (folders, _, _) = Folders::family(TINY, &["F32", "F32"]);
    let plan = folders.plan(recipe);
    for name in ["m0", "m1", "init"] {
        std::fs::remove_dir_all(folders.path(name)).unwrap();
    }
    assert_eq!(read(&Merged::new(plan).unwrap()).len(), 21);
}

#[test]
fn a_turn_that_the_output_cannot_hold_is_an_error() {
    let (folders, _, _) = Folders::family(TINY, &["F32", "F32"]);
    let mut large = fixture::llama(TINY, "F32", 1);
    large.insert("score.weight".to_owned(), fixture::tensor("F32", &[1, 8], std::iter::repeat_n(1e5, 8)));
    folders.write("m0", TINY, &large);
    let merged = folders.merged("members: [m0, m1]\ninit: init\nmethod: slerp\ndtype: float16");
    let error = merged.read("score.weight", 0..8, &mut Elements::default()).unwrap_err().to_string();
    assert!(
        error.starts_with("tensor \"score.weight\": element 0 merges to ")
            && error.ends_with("which F16 cannot hold; choose a wider dtype"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_order_of_members_matters_to_linear_only_by_rounding(order in Just(vec![0, 1, 2, 3]).prop_shuffle()) {
        static FAMILY: std::sync::LazyLock<(Folders, BTreeMap<String, Elements>)> = std::sync::LazyLock::new(|| {
            let (folders, _, _) = Folders::family(TINY, &["F32", "BF16", "F16", "F32"]);
            let merged = read(&folders.merged("members: [{path: m0, coefficient: 2}, m1, m2, m3]"));
            (folders, merged)
        });
        let (folders, expected) = &*FAMILY;
        let member = |i: &usize| if *i == 0 { "{path: m0, coefficient: 2}".to_owned() } else { format!("m{i}") };
        let members: Vec<_> = order.iter().map(member).collect();
        let found = read(&folders.merged(&format!("members: [{}]", members.join(", "))));
        for (name, found) in &found {
            for (a, b) in f32s(found).iter().zip(f32s(&expected[name])) {
                prop_assert!((a - b).abs() <= f32::EPSILON * a.abs().max(b.abs()), "{} {} {}", name, a, b);
            }
        }
    }
}

#[test]
fn a_recipe_is_known_by_its_ending() {
    assert!(recipe::is_recipe(Path::new("a/b.yaml")) && recipe::is_recipe(Path::new("b.yml")) && recipe::is_recipe(Path::new("b.json")));
    assert!(!recipe::is_recipe(Path::new("yaml")) && !recipe::is_recipe(Path::new("v1.5")));
}
