use proptest::prelude::*;

use super::*;
use crate::client::{group_to_wire, sample_to_wire};
use crate::wire::{completion, prompt_group, sample::Input};

fn text(text: &str) -> wire::Sample {
    wire::Sample { input: Some(Input::Text(text.into())) }
}

fn message(role: &str, extra_json: &str) -> wire::Message {
    wire::Message { role: role.into(), content: "hi".into(), extra_json: extra_json.into() }
}

fn conversation(messages: Vec<wire::Message>) -> wire::Sample {
    wire::Sample { input: Some(Input::Conversation(wire::Conversation { messages, ..Default::default() })) }
}

fn completions(texts: &[&str]) -> Vec<wire::Completion> {
    texts.iter().map(|text| wire::Completion { kind: Some(completion::Kind::Text((*text).into())) }).collect()
}

fn text_group(prompt: &str, answers: &[&str]) -> wire::PromptGroup {
    wire::PromptGroup { prompt: Some(prompt_group::Prompt::Text(prompt.into())), completions: completions(answers) }
}

fn violations(request: wire::ScoreRequest) -> Vec<(String, String)> {
    let found = parse_score(request, ConvertLimits::default()).expect_err("violations");
    found.listed().iter().map(|violation| (violation.field.clone(), violation.problem.clone())).collect()
}

fn fields(request: wire::ScoreRequest) -> Vec<String> {
    violations(request).into_iter().map(|(field, _)| field).collect()
}

#[test]
fn an_empty_request_has_nothing_to_score() {
    assert_eq!(fields(wire::ScoreRequest::default()), ["samples"]);
}

#[test]
fn every_violation_is_named_at_once_by_its_path() {
    let request = wire::ScoreRequest {
        request_id: "x".repeat(300),
        samples: vec![
            text("fine"),
            wire::Sample { input: None },
            conversation(vec![]),
            conversation(vec![message("user", ""), message("", ""), message("user", "{"), message("user", "[1]")]),
            conversation(vec![message("user", r#"{"role":"x"}"#)]),
        ],
        groups: vec![
            text_group("p", &[]),
            wire::PromptGroup { prompt: None, completions: completions(&["a"]) },
            wire::PromptGroup { prompt: Some(prompt_group::Prompt::Text("p".into())), completions: vec![wire::Completion { kind: None }] },
        ],
        options: Some(wire::ScoreOptions {
            truncation: 7,
            scale: -1,
            fingerprint: "abc".into(),
            scorer: "a b".into(),
            ..Default::default()
        }),
    };
    assert_eq!(
        fields(request),
        [
            "request_id",
            "samples[1]",
            "samples[2].conversation.messages",
            "samples[3].conversation.messages[1].role",
            "samples[3].conversation.messages[2].extra_json",
            "samples[3].conversation.messages[3].extra_json",
            "samples[4].conversation.messages[0].extra_json",
            "groups[0].completions",
            "groups[1]",
            "groups[2].completions[0]",
            "options.truncation",
            "options.scale",
            "options.fingerprint",
            "options.scorer",
        ]
    );
}

#[test]
fn an_unknown_enum_number_is_refused_by_name() {
    let options = Some(wire::ScoreOptions { truncation: 9, ..Default::default() });
    let found = violations(wire::ScoreRequest { samples: vec![text("x")], options, ..Default::default() });
    assert_eq!(found, [("options.truncation".to_owned(), "9 is not a value of Truncation".to_owned())]);
}

#[test]
fn violations_beyond_sixteen_are_counted_not_listed() {
    let samples = (0..40).map(|_| wire::Sample { input: None }).collect();
    let found = parse_score(wire::ScoreRequest { samples, ..Default::default() }, ConvertLimits::default()).expect_err("40 violations");
    assert_eq!((found.listed().len(), found.more()), (16, 24));
    assert!(found.to_string().ends_with("(and 39 more)"), "{found}");
}

#[test]
fn long_problems_stay_within_four_kilobytes() {
    let samples = (0..16).map(|_| conversation(vec![message(&"é".repeat(5000), &format!("\"{}", "x".repeat(3000)))])).collect();
    let found = parse_score(wire::ScoreRequest { samples, ..Default::default() }, ConvertLimits::default()).expect_err("violations");
    let bytes: usize = found.listed().iter().map(|violation| violation.field.len() + violation.problem.len()).sum();
    assert!(bytes <= 4096, "{bytes}");
}

#[test]
fn json_that_is_too_deep_or_too_large_is_refused() {
    let deep = format!(r#"{{"a":{}1{}}}"#, "[".repeat(40), "]".repeat(40));
    let bottomless = format!(r#"{{"a":{}"#, "[".repeat(100_000));
    let large = format!(r#"{{"a":"{}"}}"#, "x".repeat(MAX_JSON_BYTES));
    for extra in [deep, bottomless, large] {
        let request = wire::ScoreRequest { samples: vec![conversation(vec![message("user", &extra)])], ..Default::default() };
        assert_eq!(fields(request), ["samples[0].conversation.messages[0].extra_json"]);
    }
}

#[test]
fn tools_are_a_list_and_template_args_an_object() {
    let of = |tools: &str, args: &str| {
        let conversation =
            wire::Conversation { messages: vec![message("user", "")], tools_json: tools.into(), template_args_json: args.into() };
        let samples = vec![wire::Sample { input: Some(Input::Conversation(conversation)) }];
        parse_score(wire::ScoreRequest { samples, ..Default::default() }, ConvertLimits::default())
    };
    assert!(of(r#"[{"name":"f"}]"#, r#"{"enable_thinking":false}"#).is_ok());
    assert!(of("{}", "").is_err());
    assert!(of("", "[]").is_err());
}

#[test]
fn groups_are_expanded_and_answers_folded_back_in_order() {
    let request = wire::ScoreRequest {
        samples: vec![text("s0"), text("s1")],
        groups: vec![text_group("p", &["a", "b"]), text_group("q", &["c"])],
        ..Default::default()
    };
    let batch = parse_score(request, ConvertLimits::default()).expect("valid").batch;
    let texts: Vec<_> = batch
        .samples
        .iter()
        .map(|sample| match sample {
            Sample::Text(text) => text.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(texts, ["s0", "s1", "pa", "pb", "qc"]);
    let folded = batch.shape.fold(texts.clone());
    assert_eq!(folded.singles, ["s0", "s1"]);
    assert_eq!(folded.groups, [vec!["pa", "pb"], vec!["qc"]]);
}

#[test]
fn a_small_message_that_expands_without_bound_is_refused() {
    let limits = ConvertLimits { max_samples: 100, max_expanded_bytes: 5_000 };
    let answers: Vec<&str> = std::iter::repeat_n("a", 60).collect();
    let long = wire::ScoreRequest { groups: vec![text_group(&"p".repeat(100), &answers)], ..Default::default() };
    assert_eq!(parse_score(long, limits).expect_err("6,000 bytes").listed()[0].field, "groups[0]");
    let many = wire::ScoreRequest { samples: (0..101).map(|_| text("x")).collect(), ..Default::default() };
    assert_eq!(parse_score(many, limits).expect_err("101 samples").listed()[0].field, "samples[100]");
}

#[test]
fn a_comparison_refuses_what_only_a_score_may_ask() {
    let request = wire::CompareRequest {
        samples: vec![text("x")],
        options: Some(wire::ScoreOptions { scale: 1, scorer: "rm-0".into(), ..Default::default() }),
        members: vec!["rm-0".into(), "no/slash".into()],
        uwo_lambda: Some(f32::NAN),
        member_scale: 5,
        pairs: vec![wire::PreferencePair::default()],
        ..Default::default()
    };
    let found = parse_compare(request, ConvertLimits::default()).expect_err("violations");
    let fields: Vec<_> = found.listed().iter().map(|violation| violation.field.as_str()).collect();
    let expected = [
        "pairs[0].prompt.messages",
        "pairs[0].chosen",
        "pairs[0].rejected",
        "options.scale",
        "options.scorer",
        "members[1]",
        "uwo_lambda",
        "member_scale",
    ];
    assert_eq!(fields, expected);
}

#[test]
fn pairs_come_last_and_fold_into_chosen_and_rejected() {
    let prompt = wire::Conversation { messages: vec![message("user", "")], ..Default::default() };
    let [chosen, rejected] = ["good", "bad"].map(|text| wire::Completion { kind: Some(completion::Kind::Text(text.into())) });
    let pair = wire::PreferencePair { prompt: Some(prompt), chosen: Some(chosen), rejected: Some(rejected) };
    let request = wire::CompareRequest { samples: vec![text("x")], pairs: vec![pair], ..Default::default() };
    let batch = parse_compare(request, ConvertLimits::default()).expect("valid").batch;
    assert_eq!(batch.samples.len(), 3);
    let folded = batch.shape.fold(vec![0, 1, 2]);
    assert_eq!((folded.singles, folded.pairs), (vec![0], vec![(1, 2)]));
}

#[test]
fn what_stands_beside_a_prompt_counts_for_every_completion() {
    let tools_json = format!("[\"{}\"]", "x".repeat(1_000_000));
    let prompt = wire::Conversation { messages: vec![message("user", "")], tools_json, ..Default::default() };
    let group = |count| wire::PromptGroup {
        prompt: Some(prompt_group::Prompt::Conversation(prompt.clone())),
        completions: completions(&vec!["a"; count]),
    };
    // A message of 1.4 MB that would become 65 GB.
    let found = violations(wire::ScoreRequest { groups: vec![group(65_000)], ..Default::default() });
    assert_eq!(found[0].0, "groups[0]");
    assert!(found[0].1.contains("with every completion beside its prompt"), "{}", found[0].1);
    let few = wire::ScoreRequest { groups: vec![group(64)], ..Default::default() };
    assert_eq!(parse_score(few, ConvertLimits::default()).expect("valid").batch.samples.len(), 64);
}

#[test]
fn nothing_is_expanded_that_could_never_be_let_in() {
    let limits = ConvertLimits::new(1000, 1 << 30, 100);
    let group = |bytes: usize| wire::ScoreRequest { groups: vec![text_group(&"x".repeat(bytes), &["a"; 10])], ..Default::default() };
    assert!(parse_score(group(300), limits).is_ok());
    assert!(parse_score(group(400), limits).is_err());
}

fn any_turn() -> impl Strategy<Value = Turn> {
    let extra = prop_oneof![Just("{}"), Just(r#"{"name":"f","tool_calls":[{"id":1}]}"#)];
    ("[a-z]{1,64}", ".{0,20}", extra)
        .prop_map(|(role, content, extra)| Turn::new(role, content, serde_json::from_str(extra).expect("object")).expect("valid turn"))
}

fn any_conversation() -> impl Strategy<Value = Conversation> {
    let tools = prop_oneof![Just(None), Just(Some(serde_json::json!([{ "name": "f" }])))];
    (prop::collection::vec(any_turn(), 1..4), tools)
        .prop_map(|(turns, tools)| Conversation::new(turns, tools, Map::new()).expect("valid conversation"))
}

fn any_sample() -> impl Strategy<Value = Sample> {
    prop_oneof![
        any_conversation().prop_map(Sample::Conversation),
        ".{0,20}".prop_map(Sample::Text),
        (".{0,9}", ".{0,9}").prop_map(|(first, second)| Sample::Pair { first, second }),
        prop::collection::vec(any::<u32>(), 0..9).prop_map(Sample::Tokens),
    ]
}

fn any_group() -> impl Strategy<Value = PromptGroup> {
    let completion = prop_oneof![".{0,20}".prop_map(Completion::Text), prop::collection::vec(any_turn(), 1..3).prop_map(Completion::Turns)];
    (any_conversation(), prop::collection::vec(completion, 1..5))
        .prop_map(|(prompt, completions)| PromptGroup::new(Prompt::Conversation(prompt), completions).expect("valid group"))
}

proptest! {
    #[test]
    fn what_the_client_spells_is_read_back_the_same(
        samples in prop::collection::vec(any_sample(), 0..5),
        groups in prop::collection::vec(any_group(), 1..4),
    ) {
        let request = wire::ScoreRequest {
            samples: samples.iter().map(sample_to_wire).collect(),
            groups: groups.iter().map(group_to_wire).collect(),
            ..Default::default()
        };
        let parsed = parse_score(request, ConvertLimits::default()).expect("valid");
        let expected: Vec<Sample> = samples.iter().cloned().chain(groups.iter().flat_map(PromptGroup::samples)).collect();
        prop_assert_eq!(parsed.batch.samples, expected);
        prop_assert_eq!(parsed.batch.shape.groups, groups.iter().map(|group| group.completions().len()).collect::<Vec<_>>());
    }

    #[test]
    fn hostile_json_never_panics(extra in ".{0,200}", tools in "[\\[\\]{}\",:0-9a-z]{0,60}") {
        let conversation = wire::Conversation {
            messages: vec![message("user", &extra)], tools_json: tools, template_args_json: extra.clone(),
        };
        let samples = vec![wire::Sample { input: Some(Input::Conversation(conversation)) }];
        let _ = parse_score(wire::ScoreRequest { samples, ..Default::default() }, ConvertLimits::default());
    }
}
