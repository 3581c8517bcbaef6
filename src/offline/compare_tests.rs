use super::*;
use crate::clock::Clock;
use crate::registry::testing::{FakeModel, engine_on, generation};
use crate::scorer::{ScorerMetrics, ScorerOptions, spawn};

/// WARM has factor 2, the members 1 and -1.
fn engine() -> Scorer {
    let options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _) = spawn(options, Clock::system(), ScorerMetrics::unregistered()).expect("a thread");
    let engine = engine_on(scorer, Clock::system());
    engine.registry().install(generation(1, FakeModel::new(2.0), &[("rm-0", FakeModel::new(1.0)), ("rm-1", FakeModel::new(-1.0))]));
    Scorer::Engine(engine)
}

async fn run(input: &str, options: CompareLines) -> (Vec<Value>, Compared) {
    let mut output = Vec::new();
    let compared = compare_lines(input.as_bytes(), &mut output, &engine(), options).await.expect("compared");
    let text = String::from_utf8(output).expect("UTF-8");
    (text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect(), compared)
}

const INPUT: &str = "{\"id\":\"x\",\"input_ids\":[3]}\n{\"prompt\":\"a\",\"completions\":[\"\",\"b\"],\"raw\":true}\n\
    {\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"\",\"raw\":true}\n{\"text\":\"\"}\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_has_the_statistics_of_its_shape() {
    let (lines, _) = run(INPUT, CompareLines::default()).await;
    let expected = json!({
        "id": "x", "reward": 6.0, "tokens": 1, "truncated": false, "members": {"rm-0": 3.0, "rm-1": -3.0},
        "mean": 0.0, "median": 0.0, "min": -3.0, "max": 3.0, "std": 3.0, "variance": 9.0, "uwo": -4.5, "gap": 6.0, "argmin": "rm-1",
    });
    assert_eq!(lines[0], expected);
    // 97, and 97 + 2 * 98: WARM and rm-0 prefer the second, rm-1 the first, and the mean is 0 for both.
    let group = &lines[1];
    assert_eq!((&group["best_by_merged"], &group["best_by_mean"], &group["votes"]), (&json!(1), &json!(0), &json!([1, 1])));
    assert_eq!((&group["kendall_tau"], &group["member_kendall_tau"]), (&json!(null), &json!({"rm-0": 1.0, "rm-1": -1.0})));
    assert_eq!(group["scores"][1]["reward"], json!(586.0));
    let pair = &lines[2];
    assert_eq!((&pair["votes"], &pair["p_chosen_mean"], &pair["disagree"]), (&json!(1), &json!(0.5), &json!(true)));
    assert_eq!(pair["chosen"]["reward"], json!(586.0));
    assert_eq!(lines[3]["failure"]["kind"], "empty");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_shows_the_largest_gaps_and_the_sum_of_all() {
    let (_, compared) = run(INPUT, CompareLines { top: 3, ..CompareLines::default() }).await;
    let table = compared.to_string();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("line") && lines[0].contains("gap"), "{table}");
    assert!(lines[1].starts_with("2[1] ") && lines[1].contains("+586.000") && lines[1].contains("rm-1"), "{table}");
    assert!(lines[2].starts_with("3 chosen"), "{table}");
    assert!(table.contains("5 samples, 1 failures; WARM - ENS"), "{table}");
    assert!(table.contains("1 groups: WARM and ENS put the same completion first in 0"), "{table}");
    assert!(table.contains("1 preferences, accuracy: WARM 1.0000, ENS 0.5000, rm-0 1.0000, rm-1 0.0000"), "{table}");
    assert_eq!(lines.iter().filter(|line| line.contains('+')).count(), 4, "three rows and the sum: {table}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scale_without_statistics_is_refused_and_some_members_are_enough() {
    let mut options = CompareLines::default();
    options.compare.scale = MemberScale::Standardized;
    let error = compare_lines("{\"text\":\"a\"}\n".as_bytes(), Vec::new(), &engine(), options).await.expect_err("no statistics");
    assert!(error.to_string().contains("warm calibrate"), "{error}");
    let mut options = CompareLines::default();
    options.compare.members = vec!["rm-1".to_owned()];
    let (lines, _) = run("{\"input_ids\":[3]}\n", options).await;
    assert_eq!(lines[0]["members"], json!({"rm-1": -3.0}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_measured_is_every_sample_that_has_a_score() {
    let measured = measure_lines(INPUT.as_bytes(), &engine(), Truncation::Refuse).await.expect("measured");
    assert_eq!((measured.merged.count(), measured.failed), (5, 1));
    // 6, 194, 586, 586, 194 by the merged model; by hand.
    assert!((measured.merged.mean().expect("five") - 1566.0 / 5.0).abs() < 1e-9);
    let members: Vec<_> = measured.members.iter().map(|(name, moments)| (name.as_str(), moments.mean().expect("five"))).collect();
    assert_eq!(members.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["rm-0", "rm-1"]);
    assert!((members[0].1 - 783.0 / 5.0).abs() < 1e-9 && (members[1].1 + 783.0 / 5.0).abs() < 1e-9);
}
