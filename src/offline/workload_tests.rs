use proptest::prelude::*;
use serde_json::json;

use super::*;

fn architecture(causal: bool) -> Architecture {
    let config = if causal {
        json!({
            "model_type": "mistral", "hidden_size": 100, "intermediate_size": 200, "num_attention_heads": 10, "num_key_value_heads": 10,
            "head_dim": 10, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 100_000, "id2label": {"0": "LABEL_0"},
        })
    } else {
        json!({
            "model_type": "bert", "hidden_size": 100, "intermediate_size": 200, "num_attention_heads": 10, "num_hidden_layers": 3,
            "vocab_size": 50, "max_position_embeddings": 512, "id2label": {"0": "LABEL_0"},
        })
    };
    Architecture::parse(&config).expect("valid")
}

fn parse(text: &str) -> Result<Workload, String> {
    text.parse()
}

#[test]
fn a_workload_is_read_and_a_mistake_is_named_by_its_field() {
    let expected = Workload { prompts: 512, group: 16, prompt: 1000, completion: 2000 };
    assert_eq!(parse("prompts=512,group=16,prompt=1000,completion=2000"), Ok(expected));
    assert_eq!(parse("completion=2000, prompt=1000, group=16, prompts=512"), Ok(expected));
    for (text, words) in [
        ("prompts=512,group=16,prompt=1000", "lacks completion"),
        ("prompts=512", "lacks group, prompt, completion"),
        ("prompts=512,groups=16", "`groups` is no field"),
        ("prompts=512,group=0,prompt=1,completion=1", "group: expected a whole number from 1"),
        ("prompts=-1,group=1,prompt=1,completion=1", "prompts: expected a whole number"),
        ("prompts=1,group=1,prompt=1,completion=+2", "completion: expected a whole number"),
        ("prompts=1,prompts=2,group=1,prompt=1,completion=1", "prompts stands there twice"),
        ("prompts=1,group=1,prompt=1e3,completion=1", "prompt: expected a whole number from 0"),
        ("", "expected FIELD=NUMBER"),
    ] {
        assert!(parse(text).is_err_and(|problem| problem.contains(words)), "{text}: {:?}", parse(text));
    }
}

#[test]
fn the_step_of_the_readme_is_counted_by_hand() {
    let workload = parse("prompts=512,group=16,prompt=1000,completion=2000").expect("valid");
    let plan = StepPlan::new(workload, &architecture(true), Some(&Rate::Told(100_000.0)), Some(60.0));
    // 512 x 1000 + 8192 x 2000.
    assert_eq!((plan.samples, plan.tokens, plan.distinct_tokens), (8192, 24_576_000, 16_896_000));
    assert_eq!((plan.seconds, plan.cards, plan.needed_per_second), (Some(168.96), Some(3), Some(281_600.0)));
    let text = plan.to_string();
    assert!(text.ends_with("  169.0 s on one card, by 100000 distinct tokens a second, as told\n  within 60 s: 3 cards"), "{text}");
    let without = StepPlan::new(workload, &architecture(true), None, Some(60.0)).to_string();
    assert!(without.ends_with("within 60 s: 281600 distinct tokens a second"), "{without}");
}

#[test]
fn an_encoder_shares_nothing_and_samples_beyond_its_positions_are_named() {
    let workload = parse("prompts=2,group=4,prompt=500,completion=100").expect("valid");
    let plan = StepPlan::new(workload, &architecture(false), Some(&Rate::Told(480.0)), None);
    assert_eq!((plan.distinct_tokens, plan.seconds), (4800, Some(10.0)));
    assert!(plan.problems[0].contains("samples of 600 tokens are longer than the 512"), "{:?}", plan.problems);
}

#[test]
fn a_bench_report_is_a_rate_for_other_lengths_too() {
    let report = json!({"per_second": {"requests": 2.0}, "workload": {"group": 16, "prompt_tokens": 1000.0, "completion_tokens": 2000.0}});
    let rate = Rate::of_bench(&report, "bench.json").expect("a rate");
    let architecture = architecture(true);
    let workload = parse("prompts=512,group=16,prompt=1000,completion=2000").expect("valid");
    let plan = StepPlan::new(workload, &architecture, Some(&rate), Some(60.0));
    assert_eq!((plan.seconds, plan.cards), (Some(256.0), Some(5)));
    // Tokens behind more keys take longer.
    let longer = StepPlan::new(Workload { prompt: 10_000, ..workload }, &architecture, Some(&rate), None);
    let ratio = longer.distinct_tokens as f64 / plan.distinct_tokens as f64;
    assert!(longer.seconds.zip(plan.seconds).is_some_and(|(longer, plan)| longer > 1.2 * ratio * plan), "{longer:?}");
    for (report, place) in [
        (json!({"per_second": {"requests": 2.0}, "workload": null}), "b: workload: expected the groups"),
        (
            json!({"per_second": {"requests": 2.0}, "workload": {"group": 0, "prompt_tokens": 1, "completion_tokens": 1}}),
            "b: workload.group:",
        ),
        (json!({"per_second": {}, "workload": {"group": 1, "prompt_tokens": 1, "completion_tokens": 1}}), "b: per_second.requests:"),
        (json!([]), "b: workload:"),
    ] {
        assert!(Rate::of_bench(&report, "b").is_err_and(|problem| problem.starts_with(place)), "{report}");
    }
}

proptest! {
    #[test]
    fn any_text_is_a_workload_or_refused(text in ".{0,60}", fields in prop::collection::vec((0usize..4, any::<u64>()), 0..6)) {
        let _ = parse(&text);
        let text: Vec<_> = fields.iter().map(|(field, number)| format!("{}={number}", FIELDS[*field])).collect();
        let _ = parse(&text.join(","));
    }

    #[test]
    fn cards_are_just_enough_and_sharing_never_costs(prompts in 1..MOST, group in 1..MOST, prompt in 0..MOST, completion in 1..MOST, rate in 1e-3f64..1e9, within in 1e-3f64..1e6) {
        let workload = Workload { prompts, group, prompt, completion };
        prop_assert!(workload.distinct() <= workload.tokens());
        prop_assert_eq!(workload.distinct() == workload.tokens(), group == 1 || prompt == 0);
        let plan = StepPlan::new(workload, &architecture(true), Some(&Rate::Told(rate)), Some(within));
        let (seconds, cards) = (plan.seconds.expect("a rate"), plan.cards.expect("a time") as f64);
        // Beyond what a float counts in ones, a card more or less is no mistake.
        let slack = 1.0 + 1e-9;
        prop_assert!(seconds <= cards * within * slack || cards >= 1e19);
        prop_assert!(cards <= 1.0 || (cards - 1.0) * within <= seconds * slack);
    }
}
