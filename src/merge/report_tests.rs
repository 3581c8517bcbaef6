use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::checkpoint::fixture::{self, Size, Tensors};
use crate::checkpoint::{Elements, TensorSource};
use crate::merge::{Merged, Recipe};

/// Layers of several blocks, some of them short.
const WIDE: Size = Size { hidden: 264, intermediate: 256, layers: 2, vocab: 101 };
const HEAD: &str = "score.weight";

fn numbers(tensor: &fixture::Tensor) -> Vec<f32> {
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// `init` and fine-tunings of it, which have moved by noise of this size.
fn family(dir: &Path, members: &[(&str, f32)]) -> Vec<Tensors> {
    let init = fixture::llama(WIDE, "F32", 0);
    let write = |name: &str, tensors: &Tensors| fixture::write(&dir.join(name), &fixture::config(WIDE), tensors, 1).unwrap();
    write("init", &init);
    let mut all = vec![init.clone()];
    for (seed, (name, size)) in members.iter().enumerate() {
        let mut noise = fixture::noise(seed as u64 + 100);
        let moved = |tensor: &fixture::Tensor| {
            let moved: Vec<f32> = numbers(tensor).into_iter().zip(noise.by_ref()).map(|(x, noise)| x + size * noise).collect();
            fixture::tensor("F32", &tensor.shape, moved.into_iter())
        };
        let mut moved = moved;
        let tensors: Tensors = init.iter().map(|(name, tensor)| (name.clone(), moved(tensor))).collect();
        write(name, &tensors);
        all.push(tensors);
    }
    all
}

fn plan(dir: &Path, recipe: &str) -> Arc<MergePlan> {
    Arc::new(MergePlan::open(&Recipe::from_yaml(recipe, dir).unwrap()).unwrap())
}

fn report(dir: &Path, recipe: &str) -> Report {
    Report::new(&plan(dir, recipe), &mut |_, _| {}).unwrap()
}

/// The named tensors one behind the other, in float64.
fn vector(tensors: &Tensors, names: &[&str]) -> Vec<f64> {
    names.iter().flat_map(|name| numbers(&tensors[*name])).map(f64::from).collect()
}

fn minus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn near(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1e-3), "{what}: found {found}, expected {expected}");
}

/// Compares a section to vectors that were made the long way.
fn check(section: &Section, tasks: &[Vec<f64>], weights: &[Vec<f64>], merge: &[f64], what: &str) {
    for (i, (task, weight)) in tasks.iter().zip(weights).enumerate() {
        near(section.norms[i], norm(task), what);
        near(section.weight_norms[i], norm(weight), what);
        near(section.distances[i], norm(&minus(weight, merge)), what);
        for (j, (other_task, other_weight)) in tasks.iter().zip(weights).enumerate() {
            near(section.cosines[i][j].unwrap(), dot(task, other_task) / (norm(task) * norm(other_task)), what);
            near(section.norm_ratios[i][j].unwrap(), norm(task) / norm(other_task), what);
            near(section.weight_cosines[i][j].unwrap(), dot(weight, other_weight) / (norm(weight) * norm(other_weight)), what);
        }
    }
}

#[test]
fn numbers_are_those_of_the_vectors_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let all = family(dir.path(), &[("a", 0.1), ("b", 0.2), ("c", 0.1)]);
    let members = "members: [{path: a, coefficient: 2}, b, c]";
    let coefficients = [0.5, 0.25, 0.25];
    for (recipe, eta) in [
        (members.to_owned(), None),
        (format!("{members}\ninit: init"), None),
        (format!("{members}\ninit: init\nliti: {{eta: 0.3}}"), Some(0.3)),
    ] {
        let with_init = recipe.contains("init");
        let report = report(dir.path(), &recipe);
        assert_eq!(report.around, if with_init { Around::Init } else { Around::Merge });
        let names: Vec<&str> = all[0].keys().map(String::as_str).collect();
        let sections = report.layers.iter().map(|layer| (layer, layer.name.clone())).chain([(&report.overall, String::new())]);
        let mut seen = 0;
        for (section, prefix) in sections {
            let names: Vec<&str> = names.iter().copied().filter(|name| name.starts_with(&prefix)).collect();
            assert_eq!(section.tensors, names.len(), "{prefix}");
            seen += 1;
            let init = vector(&all[0], &names);
            let weights: Vec<Vec<f64>> = all[1..].iter().map(|tensors| vector(tensors, &names)).collect();
            let mut merge: Vec<f64> =
                (0..init.len()).map(|at| weights.iter().zip(coefficients).map(|(weight, c)| c * weight[at]).sum()).collect();
            if let Some(eta) = eta {
                merge = merge.iter().zip(&init).map(|(merge, init)| init + eta * (merge - init)).collect();
            }
            let from = if with_init { &init } else { &merge };
            let tasks: Vec<Vec<f64>> = weights.iter().map(|weight| minus(weight, from)).collect();
            check(section, &tasks, &weights, &merge, &format!("{recipe} {prefix}"));
            if with_init {
                let found = section.init_cosines.as_ref().unwrap();
                let expected = dot(&weights[1], &init) / (norm(&weights[1]) * norm(&init));
                near(found[1].unwrap(), expected, "cosine to init");
            }
        }
        // Two layers, the embedding, the last norm, the head; and everything.
        assert_eq!(seen, 6);
        assert_eq!(report.head.as_ref().unwrap().parameters, 264);
        assert_eq!(report.body.parameters + 264, report.overall.parameters);
    }
}

#[test]
fn distances_are_those_to_what_is_really_merged() {
    let dir = tempfile::tempdir().unwrap();
    let all = family(dir.path(), &[("a", 0.1), ("b", 0.2), ("c", 0.1)]);
    let recipes = [
        "method: slerp",
        "slerp: {granularity: tensor}",
        "slerp: {granularity: global}\nliti: {eta: 0.5}",
        "ema: {mu: 0.3}",
        "rules: [{match: 'model.layers.0.*', from: b}, {match: score.*, init: true}]",
        "members: [a, {path: b, coefficient: -0.5}, c]\nnormalize: false",
    ];
    for more in recipes {
        let members = if more.contains("members") { "" } else { "members: [a, b, c]\n" };
        let plan = plan(dir.path(), &format!("{members}init: init\n{more}"));
        let merged = Merged::new(plan.clone()).unwrap();
        let report = Report::new(&plan, &mut |_, _| {}).unwrap();
        let mut squares = [0.0; 3];
        for (name, info) in merged.manifest().iter() {
            let mut into = Elements::default();
            merged.read(name, 0..info.elements(), &mut into).unwrap();
            let Elements::F32(found) = into else { panic!("float32") };
            for (square, member) in squares.iter_mut().zip(&all[1..]) {
                let member = numbers(&member[name]);
                *square += member.iter().zip(&found).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
            }
        }
        for (found, square) in report.overall.distances.iter().zip(squares) {
            // The merge was rounded to float32.
            assert!((found - square.sqrt()).abs() <= 1e-5 * square.sqrt(), "{more}: found {found}, expected {}", square.sqrt());
        }
    }
}

#[test]
fn threads_change_no_number() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), &[("a", 0.1), ("b", 0.2)]);
    let plan = plan(dir.path(), "members: [a, b]\ninit: init");
    let reports = [1, 2, 5].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Report::new(&plan, &mut |_, _| {}).unwrap())
    });
    assert!(reports[0] == reports[1] && reports[1] == reports[2]);
}

fn standing(report: &Report, about: &str) -> Option<Standing> {
    report.verdict.iter().find(|finding| finding.about == about).map(|finding| finding.standing)
}

#[test]
fn a_family_that_was_tuned_from_one_model_is_found_good() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), &[("a", 0.03), ("b", 0.03), ("c", 0.031)]);
    for recipe in ["members: [a, b, c]\ninit: init", "members: [a, b, c]"] {
        let report = report(dir.path(), recipe);
        for about in ["shared_init", "head", "angles", "norm_ratios", "far_off"] {
            assert_eq!(standing(&report, about), Some(Standing::Good), "{about}: {report}");
        }
        assert_eq!(standing(&report, "duplicates"), None);
    }
    let words = report(dir.path(), "members: [a, b, c]\ninit: init").to_string();
    for part in [
        "task vectors from init",
        "nearly at right angles",
        "a shared initialisation is plausible",
        "no member is far off",
        "model.layers.1.",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
}

#[test]
fn each_premise_that_does_not_hold_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let all = family(dir.path(), &[("a", 0.03), ("b", 0.03), ("c", 0.03), ("far", 0.4)]);
    let write = |name: &str, tensors: &Tensors| fixture::write(&dir.path().join(name), &fixture::config(WIDE), tensors, 1).unwrap();
    write("stranger", &fixture::llama(WIDE, "F32", 77));
    let mut other_head = all[1].clone();
    other_head.insert(HEAD.to_owned(), fixture::tensor("F32", &[1, 264], fixture::noise(5).take(264)));
    write("head", &other_head);
    let cases = [
        ("members: [a, b, stranger]\ninit: init", "shared_init", Standing::Bad, "stranger"),
        ("members: [a, stranger]", "shared_init", Standing::Bad, "not plausible"),
        ("members: [a, b, far]", "shared_init", Standing::Doubtful, "far"),
        ("members: [a, head]", "head", Standing::Bad, "head initialisations differ"),
        ("members: [a, b, c, far]\ninit: init", "far_off", Standing::Bad, "far is far off"),
        ("members: [a, far]\ninit: init", "norm_ratios", Standing::Doubtful, "times the shortest"),
        ("members: [a, far]\ninit: init", "far_off", Standing::Bad, "far is far off"),
        ("members: [a, {path: a, name: again}, b]\ninit: init", "duplicates", Standing::Doubtful, "a and again"),
        ("members: [a, {path: a, name: again}]\ninit: init", "angles", Standing::Doubtful, "closer to each other"),
    ];
    for (recipe, about, expected, words) in cases {
        let report = report(dir.path(), recipe);
        assert_eq!(standing(&report, about), Some(expected), "{recipe}: {report}");
        let found = report.verdict.iter().find(|finding| finding.about == about).unwrap();
        assert!(found.words.contains(words), "{recipe}: {}", found.words);
    }
}

#[test]
fn one_member_and_an_init_without_head_have_their_report_too() {
    let dir = tempfile::tempdir().unwrap();
    let all = family(dir.path(), &[("a", 0.03), ("b", 0.03)]);
    let alone = report(dir.path(), "members: [a]");
    assert_eq!((alone.overall.norms.as_slice(), alone.overall.distances.as_slice()), (&[0.0][..], &[0.0][..]));
    assert_eq!(alone.verdict, []);
    let mut headless = all[0].clone();
    headless.remove(HEAD);
    fixture::write(&dir.path().join("policy"), &fixture::config(WIDE), &headless, 1).unwrap();
    let report = report(dir.path(), "members: [a, b]\ninit: policy");
    let head = report.head.unwrap();
    assert_eq!((report.overall.around, report.body.around, head.around), (Around::Init, Around::Init, Around::Merge));
    assert!(head.init_cosines.is_none() && head.weight_cosines[0][1].unwrap() > 0.99);
    assert_eq!(report.overall.norms, report.body.norms, "what init lacks has no task vector");
}

#[test]
fn a_member_that_changes_or_vanishes_is_told() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), &[("a", 0.03), ("b", 0.03)]);
    let plan = plan(dir.path(), "members: [a, b]");
    let file = dir.path().join("b/model.safetensors");
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(100).unwrap();
    let error = Report::new(&plan, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.starts_with(&file.display().to_string()), "{error}");
}

#[test]
fn as_json_every_number_has_a_name() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), &[("a", 0.03), ("b", 0.03)]);
    let json = serde_json::to_value(report(dir.path(), "members: [a, b]\ninit: init")).unwrap();
    let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["method", "dtype", "around", "members", "overall", "body", "head", "layers", "duplicates", "verdict"]);
    let section = json["layers"][0].as_object().unwrap();
    let keys: Vec<&str> = section.keys().map(String::as_str).collect();
    let expected = [
        "name",
        "tensors",
        "parameters",
        "around",
        "weight_norms",
        "norms",
        "cosines",
        "norm_ratios",
        "weight_cosines",
        "init_cosines",
        "distances",
    ];
    assert_eq!(keys, expected);
    assert_eq!(
        (&json["around"], &json["verdict"][0]["about"], &json["verdict"][0]["standing"]),
        (&"init".into(), &"shared_init".into(), &"good".into())
    );
    assert_eq!(json["members"][0]["dtypes"][0], "F32");
}
