//! Merged weights of every family that the conformance set has, whether this program can run it or not, against float64
//! references. What cannot run is merged as a policy is: by its tensors alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::methods_tests::{Numbers, assert_near, slerped};
use super::*;
use crate::checkpoint::{Elements, Folder, TensorSource};

/// Folders with members 0 to 2 and init.
fn families() -> Vec<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance");
    let wider = std::env::var_os("WARM_CONFORMANCE").map(PathBuf::from);
    if wider.is_none() {
        println!("WARM_CONFORMANCE is not set: only the committed families are checked");
    }
    let mut families = Vec::new();
    for root in [Some(committed), wider].into_iter().flatten() {
        for generation in ["transformers-4", "transformers-5"] {
            let entries = std::fs::read_dir(root.join(generation)).expect("a folder of families");
            families.extend(entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.join("init/config.json").exists()));
        }
    }
    families.sort();
    families
}

fn numbers(folder: &Path) -> Numbers {
    let weights = Folder::open(folder, None).expect("a checkpoint").weights;
    let mut numbers = Numbers::new();
    for (name, info) in weights.manifest().iter().filter(|(_, info)| info.dtype.is_float()) {
        let mut elements = Elements::default();
        weights.read(name, 0..info.elements(), &mut elements).expect("readable");
        let wide = match elements {
            Elements::F32(values) => values.iter().map(|&x| x.into()).collect(),
            Elements::F16(values) => values.iter().map(|&x| x.into()).collect(),
            Elements::Bf16(values) => values.iter().map(|&x| x.into()).collect(),
            other => panic!("{name}: {other:?}"),
        };
        numbers.insert(name.to_owned(), wide);
    }
    numbers
}

/// The generator of the goldens has this rule: up to the first number between dots.
fn group(name: &str) -> String {
    let mut before = String::new();
    for segment in name.split_inclusive('.') {
        before += segment;
        if segment.ends_with('.') && segment.len() > 1 && segment[..segment.len() - 1].chars().all(|c| c.is_ascii_digit()) {
            return before;
        }
    }
    name.to_owned()
}

#[test]
fn merged_weights_of_every_family_are_those_of_float64_references() {
    let mut checked = BTreeMap::new();
    for family in families() {
        let [a, b, c, init] = ["member-0", "member-1", "member-2", "init"].map(|name| numbers(&family.join(name)));
        let members = [&a, &b, &c];
        let merged = |text: &str| {
            let recipe = Recipe::from_yaml(&format!("kind: policy\ninit: init\n{text}"), &family).expect("a recipe");
            let plan = MergePlan::open(&recipe).unwrap_or_else(|error| panic!("{}: {error}", family.display()));
            let merged = Merged::new(Arc::new(plan)).expect("coefficients");
            let floats = merged.manifest().iter().filter(|(_, info)| info.dtype.is_float()).count();
            assert_eq!(floats, init.len(), "{}", family.display());
            merged
        };
        let each = |formula: &dyn Fn(&str, usize) -> f64| -> Numbers {
            init.iter().map(|(name, values)| (name.clone(), (0..values.len()).map(|i| formula(name, i)).collect())).collect()
        };
        let mean = |name: &str, i: usize| members.iter().map(|member| member[name][i]).sum::<f64>() / 3.0;
        let by_layer = slerped(&a, &b, &init, 0.5, group);
        let three = "members: [member-0, member-1, member-2]";
        let two = "members: [member-0, member-1]";
        for (recipe, expected) in [
            (three.to_owned(), each(&mean)),
            (format!("{three}\nliti: {{eta: 0.5}}"), each(&|name, i| init[name][i] + 0.5 * (mean(name, i) - init[name][i]))),
            (format!("{two}\nmethod: slerp"), by_layer.clone()),
            (format!("{two}\nslerp: {{granularity: tensor}}"), slerped(&a, &b, &init, 0.5, str::to_owned)),
            (format!("{three}\nmethod: slerp"), slerped(&by_layer, &c, &init, 1.0 / 3.0, group)),
        ] {
            assert_near(&merged(&recipe), &expected);
            *checked.entry(family.clone()).or_insert(0) += 1;
        }
    }
    println!("{} families, {} merges", checked.len(), checked.values().sum::<i32>());
    assert!(checked.len() >= 2, "{checked:?}");
}

/// The three iterations of `examples/warp`, one inside of the other.
#[test]
fn the_iterations_of_the_example_are_those_of_the_paper() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = |name: &str| numbers(&root.join("demo/family").join(name));
    let step = |a: &Numbers, b: &Numbers, init: &Numbers, t: f64| slerped(a, b, init, t, group);
    let written = |model: Numbers, init: &Numbers, eta: f64| -> Numbers {
        let part = |(name, values): (String, Vec<f64>)| {
            let values = values.iter().zip(&init[&name]).map(|(merged, init)| f64::from((init + eta * (merged - init)) as f32));
            let values = values.collect();
            (name, values)
        };
        model.into_iter().map(part).collect()
    };
    let [init, a, b, c, d, e] = ["init", "rm-0", "rm-1", "rm-2", "rm-3", "rm-4"].map(model);
    let first = written(step(&a, &b, &init, 0.5), &init, 0.3);
    let second = written(step(&c, &d, &first, 0.5), &first, 0.3);
    let third = step(&step(&e, &a, &second, 0.5), &c, &second, 1.0 / 3.0);
    let recipe = Recipe::from_file(&root.join("examples/warp/iteration-3.yaml")).expect("a recipe");
    let merged = Merged::new(Arc::new(MergePlan::open(&recipe).expect("a plan"))).expect("coefficients");
    assert_eq!(merged.manifest().len(), third.len());
    for (name, expected) in &third {
        let mut found = Elements::default();
        merged.read(name, 0..expected.len(), &mut found).expect("readable");
        let Elements::F32(found) = found else { panic!("{found:?}") };
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6 * (expected.abs() + 0.1), "{name}: {found} {expected}");
        }
    }
    let anchor = Recipe::from_file(&root.join("examples/warp/anchor.yaml")).expect("a recipe");
    assert_eq!(anchor.members().iter().map(|member| member.coefficient).collect::<Vec<_>>(), [0.99, 0.01]);
    assert!(MergePlan::open(&anchor).is_ok());
}
