use serde_json::{Value, json};

use super::*;
use crate::clock::Clock;
use crate::registry::testing::{FakeModel, engine_on, generation};
use crate::scorer::{ScorerMetrics, ScorerOptions, spawn};

/// Scores `2 * sum(id * (position + 1))`, one token per byte; `rm-0` half of it.
fn engine() -> Scorer {
    let options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _) = spawn(options, Clock::system(), ScorerMetrics::unregistered()).expect("a thread");
    let engine = engine_on(scorer, Clock::system());
    engine.registry().install(generation(1, FakeModel::new(2.0), &[("rm-0", FakeModel::new(1.0))]));
    Scorer::Engine(engine)
}

async fn against(cases: Value, scorer: Option<&str>, key: &str) -> Verified {
    let golden = Golden::parse(json!({"cases": cases}).to_string().as_bytes()).expect("a golden");
    let options = VerifyOptions { scorer: scorer.map(str::to_owned), key: key.to_owned(), tolerance: 1e-4 };
    verify(&golden, &engine(), &options).await.expect("scored")
}

/// Three inputs with the scores that the fake gives them.
fn right() -> Value {
    json!([
        {"text": "a", "input_ids": [97], "pooled_position": 0, "scores": {"warm": 194.0, "rm-0": 97.0}},
        {"input_ids": [1, 2], "pooled_position": 1, "scores": {"warm": 10.0, "rm-0": 5.0}},
        {"text": "b", "input_ids": [98], "pooled_position": 0, "scores": {"warm": 196.0, "rm-0": 98.0}},
        {"messages": [{"role": "user", "content": "x"}], "failure": "no template"},
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_scores_as_the_reference_passes_and_so_do_its_members() {
    for (scorer, key) in [(None, "warm"), (Some("rm-0"), "rm-0")] {
        let verified = against(right(), scorer, key).await;
        assert!(verified.passed(), "{verified:?}");
        assert_eq!((verified.ids, verified.positions, verified.within), ((3, 3), (3, 3), 4));
        assert_eq!(verified.rank_agreement, Some(1.0));
    }
    let swapped = against(right(), None, "rm-0").await;
    assert!(!swapped.passed() && swapped.within == 1, "{swapped:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_difference_fails_and_is_told() {
    for (pointer, wrong, words) in [
        ("/0/input_ids", json!([98]), "token 0: expected 98, found 97"),
        ("/0/input_ids", json!([97, 98]), "token 1: expected 98, found the end"),
        ("/1/pooled_position", json!(0), "the head reads token 1, expected 0"),
        ("/2/scores/warm", json!(196.03), "a deviation of 1.53e-4"),
        ("/2/scores/warm", json!([196.0, 1.0]), "expected 2 outputs, found 0"),
        ("/3/messages", json!([]), ""),
    ] {
        let mut cases = right();
        *cases.pointer_mut(pointer).expect("there") = wrong;
        if words.is_empty() {
            assert!(Golden::parse(cases.to_string().as_bytes()).is_err(), "{pointer}");
            continue;
        }
        let verified = against(cases, None, "warm").await;
        assert!(!verified.passed(), "{pointer}");
        assert!(verified.differences[0].contains(words), "{:?}", verified.differences);
        assert!(Table(std::slice::from_ref(&verified)).to_string().contains(words));
    }
    let refused_only_there = json!([{"text": "a", "failure": "no"}]);
    assert!(!against(refused_only_there, None, "warm").await.passed());
    let refused_only_here = json!([{"messages": [{"role": "user", "content": "x"}], "scores": {"warm": 1.0}}]);
    assert!(!against(refused_only_here, None, "warm").await.passed());
}

#[test]
fn the_right_scores_of_a_file_are_found_by_name() {
    let golden = |names: &[&str]| {
        let scores: serde_json::Map<String, Value> = names.iter().map(|name| ((*name).to_owned(), json!(1.0))).collect();
        Golden::parse(json!([{"text": "a", "scores": scores}]).to_string().as_bytes()).expect("a golden")
    };
    let folders = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let family = golden(&["member-0", "member-1", "warm"]);
    assert_eq!(key_of(&family, None, &folders(&["member-1"])).as_deref(), Ok("member-1"));
    assert_eq!(key_of(&family, None, &folders(&["member-0", "member-1"])).as_deref(), Ok("warm"));
    assert_eq!(key_of(&family, Some("member-0"), &[]).as_deref(), Ok("member-0"));
    assert!(key_of(&family, Some("init"), &[]).expect_err("none").contains("member-0, member-1, warm"));
    assert_eq!(key_of(&golden(&["model"]), None, &folders(&["x"])).as_deref(), Ok("model"));
    assert!(key_of(&golden(&["a", "b"]), None, &folders(&["x"])).expect_err("which?").contains("--key"));
}

/// An engine with the model of a recipe.
fn loaded(recipe: &std::path::Path) -> Scorer {
    use crate::domain::GenerationId;
    use crate::merge::Recipe;
    use crate::registry::{LoadSpec, load_generation};
    let options = ScorerOptions { threads: 2, ..ScorerOptions::default() };
    let (scorer, _) = spawn(options, Clock::system(), ScorerMetrics::unregistered()).expect("a thread");
    let engine = engine_on(scorer, Clock::system());
    let spec = LoadSpec::new(Recipe::from_file(recipe).expect("a recipe"));
    let generation = load_generation(&spec, GenerationId(1), &Clock::system(), &mut |_| {});
    engine.registry().install(generation.unwrap_or_else(|error| panic!("{}: {error}", recipe.display())));
    Scorer::Engine(engine)
}

/// `tests/fixtures/heads/make.py` writes the fixtures: one folder for each head and each way to read one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_head_scores_as_its_reference_alone_and_in_company() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/heads");
    let mut families = 0;
    let mut largest = 0f64;
    for entry in std::fs::read_dir(root).expect("the fixtures") {
        let folder = entry.expect("an entry").path();
        if !folder.is_dir() {
            continue;
        }
        families += 1;
        let name = folder.display();
        let bytes = std::fs::read(folder.join("golden.json")).expect("a golden");
        let golden = Golden::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let scorer = loaded(&folder.join("recipe.yaml"));
        let options = VerifyOptions { scorer: None, key: UNNAMED.to_owned(), tolerance: 1e-5 };
        let together = verify(&golden, &scorer, &options).await.expect("scored");
        assert!(together.passed(), "{name}\n{}", Table(std::slice::from_ref(&together)));
        assert_eq!(together.ids.1, golden.cases.len(), "{name}: every case has its tokens");
        largest = largest.max(together.largest_deviation);
        // Steps against the reference, and every score bit for bit whatever is beside it.
        let Scorer::Engine(engine) = &scorer else { panic!("an engine") };
        let ask = async |samples: Vec<Sample>| {
            let reply = engine.score(samples, CallOptions::default(), Permit::unlimited()).await.expect("scored");
            reply.outcomes.into_iter().map(|outcome| outcome.expect("a score")).collect::<Vec<_>>()
        };
        let all = ask(golden.cases.iter().map(|case| case.sample.clone()).collect()).await;
        let raw: Value = serde_json::from_slice(&bytes).expect("JSON");
        for (index, (case, scored)) in golden.cases.iter().zip(&all).enumerate() {
            let alone = ask(vec![case.sample.clone()]).await;
            assert_eq!(alone[0], *scored, "{name} case {index}: alone and in company");
            let steps = raw["cases"][index]["steps"].as_array().map_or(&[][..], Vec::as_slice);
            assert_eq!(steps.len(), scored.steps.len(), "{name} case {index}");
            for (expected, found) in steps.iter().zip(&scored.steps) {
                assert_eq!(expected["position"], json!(found.position));
                let near = |expected: &Value, found: f32| (expected.as_f64().expect("a number") - f64::from(found)).abs() < 1e-5;
                assert!(near(&expected["reward"], found.reward.get()), "{name} case {index}: {expected} {found:?}");
                assert!(std::iter::zip(expected["outputs"].as_array().expect("a list"), &found.outputs).all(|(e, f)| near(e, *f)));
            }
        }
    }
    println!("{families} heads, largest deviation {largest:.2e}");
    assert!(families >= 15, "{families}");
}
