use super::*;
use crate::clock::Clock;
use crate::registry::testing::{FakeModel, engine_on, generation};
use crate::scorer::{ScorerMetrics, ScorerOptions, spawn};

fn engine(members: bool) -> Scorer {
    let options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _) = spawn(options, Clock::system(), ScorerMetrics::unregistered()).expect("a thread");
    let engine = engine_on(scorer, Clock::system());
    let models = [("rm-0", FakeModel::new(1.0)), ("rm-1", FakeModel::new(3.0))];
    engine.registry().install(generation(1, FakeModel::new(2.0), if members { &models } else { &[] }));
    Scorer::Engine(engine)
}

async fn run(input: &str, scorer: &Scorer, options: ScoreOptions) -> (Vec<Value>, Result<Summary, OfflineError>) {
    let mut output = Vec::new();
    let result = score_lines(input.as_bytes(), &mut output, scorer, options).await;
    let text = String::from_utf8(output).expect("UTF-8");
    (text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect(), result)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_come_out_in_order_with_their_ids_and_groups_as_lists() {
    let input = "{\"id\":\"a\",\"text\":\"a\"}\n\n{\"input_ids\":[1,2]}\n\
        {\"id\":3,\"prompt\":\"a\",\"completions\":[\"\",\"b\"],\"raw\":true}\n{\"text\":\"\"}";
    let (lines, summary) = run(input, &engine(false), ScoreOptions::default()).await;
    assert_eq!(
        lines[..3],
        [
            json!({"id": "a", "reward": 194.0, "tokens": 1, "truncated": false}),
            json!({"reward": 10.0, "tokens": 2, "truncated": false}),
            json!({"id": 3, "scores": [
                {"reward": 194.0, "tokens": 1, "truncated": false},
                {"reward": 586.0, "tokens": 2, "truncated": false},
            ]}),
        ]
    );
    assert_eq!(lines[3]["failure"]["kind"], "empty");
    assert_eq!(summary.expect("done"), Summary { lines: 4, scored: 4, failed: 1, tokens: 6 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_stand_beside_the_merged_model_by_name() {
    let (lines, _) = run("{\"text\":\"a\"}", &engine(true), ScoreOptions { members: true, ..Default::default() }).await;
    assert_eq!(lines[0]["members"], json!({"rm-0": 97.0, "rm-1": 291.0}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_line_is_named_and_what_stands_before_it_is_written() {
    let (lines, result) = run("{\"text\":\"a\"}\n\n{\"txt\":1}\n{\"text\":\"b\"}\n", &engine(false), ScoreOptions::default()).await;
    assert_eq!(lines.len(), 1);
    assert!(result.expect_err("bad line").to_string().starts_with("line 3: "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_chunks_keep_their_order() {
    let input: String = (1..=2000).map(|i| format!("{{\"input_ids\":[{i}]}}\n")).collect();
    let (lines, _) = run(&input, &engine(false), ScoreOptions::default()).await;
    assert!(lines.iter().enumerate().all(|(i, line)| line["reward"] == json!(2.0 * (i + 1) as f64)), "in order");
    assert_eq!(lines.len(), 2000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncation_is_done_only_where_it_is_asked_for() {
    let long = format!("{{\"text\":\"{}\"}}", "x".repeat(70));
    let (refused, _) = run(&long, &engine(false), ScoreOptions::default()).await;
    assert_eq!(refused[0]["failure"]["kind"], "too_long");
    let (cut, _) = run(&long, &engine(false), ScoreOptions { truncation: Truncation::Left, members: false }).await;
    assert_eq!(cut[0]["tokens"], 64);
}

#[test]
fn numbers_have_no_digits_beyond_float32() {
    assert_eq!(number(0.1).to_string(), "0.1");
    assert_eq!(number(-3.402_823_5e38).as_f64().map(|value| value as f32), Some(f32::MIN));
}
