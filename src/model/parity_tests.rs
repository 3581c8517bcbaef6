//! Scores against the golden ones of Hugging Face transformers, from the golden token ids.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;
use crate::merge::{MergePlan, Merged, Recipe};
use crate::text::Encoding;

/// The families that are served so far.
const SERVED: [&str; 13] = [
    "llama",
    "llama-pad-is-eos",
    "mistral",
    "qwen2",
    "qwen2-pad-is-eos",
    "qwen3",
    "qwen3-bf16-sharded",
    "llama-fp16",
    "bert",
    "llama-mlp-head",
    "qwen2-reward-model",
    "mistral-value-head",
    "llama-five-outputs",
];

fn families() -> Vec<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance");
    let wider = std::env::var_os("WARM_CONFORMANCE").map(PathBuf::from);
    if wider.is_none() {
        println!("WARM_CONFORMANCE is not set: only the committed families are checked");
    }
    let folder = |root: &Path, name: &str| ["transformers-4", "transformers-5"].map(|generation| root.join(generation).join(name));
    SERVED
        .iter()
        .flat_map(|name| [Some(&committed), wider.as_ref()].into_iter().flatten().flat_map(move |root| folder(root, name)))
        .filter(|folder| folder.join("golden.json").exists())
        .collect()
}

fn numbers(value: &Value, name: &str) -> Option<Vec<u32>> {
    let list = value.get(name)?.as_array()?;
    Some(list.iter().map(|id| id.as_u64().expect("an id") as u32).collect())
}

fn loaded(recipe: &Recipe) -> Arc<dyn RewardModel> {
    let plan = Arc::new(MergePlan::open(recipe).expect("mergeable"));
    let merged = Merged::new(Arc::clone(&plan));
    load(&merged, plan.architecture(), plan.layout(), &Readout::unnamed(plan.architecture(), plan.layout()), usize::MAX, &mut |_, _| {})
        .expect("loads")
}

/// Every output of the head, sample by sample.
fn scores(model: &dyn RewardModel, encodings: &[Arc<Encoding>]) -> Vec<Vec<f32>> {
    model.forward(&Pack::new(encodings)).expect("forward").into_iter().map(|output| output.values).collect()
}

/// A golden score: one number, or one for each output.
fn golden_scores(value: &Value) -> Vec<f64> {
    let list = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    list.iter().map(|score| score.as_f64().expect("a score")).collect()
}

#[test]
fn every_member_and_the_merge_score_as_transformers_does_alone_and_packed() {
    let mut cases = 0;
    let mut largest = 0f64;
    for family in families() {
        let golden: Value = serde_json::from_slice(&std::fs::read(family.join("golden.json")).expect("readable")).expect("JSON");
        // Goldens of 16-bit families must come from the files in float32; tests/fixtures/conformance/regolden.py says why.
        if golden["dtype"] != "float32" && golden.get("scores_by").is_none() {
            println!("{}: skipped, its scores were taken with rounded rotary frequencies", family.display());
            continue;
        }
        let list = golden["cases"].as_array().expect("cases");
        let encodings: Vec<_> = list
            .iter()
            .map(|case| Arc::new(Encoding::for_test(numbers(case, "input_ids").expect("ids")).with_types(numbers(case, "token_type_ids"))))
            .collect();
        let members: Vec<PathBuf> = (0..3).map(|member| family.join(format!("member-{member}"))).collect();
        let mut recipes: Vec<(String, Recipe)> = members
            .iter()
            .enumerate()
            .map(|(i, path)| (format!("member-{i}"), Recipe::uniform(std::slice::from_ref(path)).expect("recipe")))
            .collect();
        recipes.push(("warm".to_owned(), Recipe::uniform(&members).expect("recipe")));
        for (name, recipe) in recipes {
            let model = loaded(&recipe);
            let packed = scores(&*model, &encodings);
            for ((case, encoding), packed) in list.iter().zip(&encodings).zip(packed) {
                let expected = golden_scores(&case["scores"][&name]);
                assert_eq!(packed.len(), expected.len(), "{} {name}", family.display());
                for (packed, expected) in packed.iter().zip(&expected) {
                    let deviation = (f64::from(*packed) - expected).abs() / expected.abs().max(1.0);
                    assert!(deviation < 1e-4, "{} {name}: {packed} against {expected}", family.display());
                    largest = largest.max(deviation);
                }
                let alone = &scores(&*model, std::slice::from_ref(encoding))[0];
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(alone), bits(&packed), "{} {name}: alone {alone:?}, packed {packed:?}", family.display());
                cases += 1;
            }
        }
    }
    println!("{cases} scores, largest deviation {largest:.2e}");
    assert!(cases >= 500, "{cases}");
}
