use serde_json::{Value, json};

use super::*;
use crate::checkpoint::fixture::{self, TINY};
use crate::checkpoint::{Dtype, HeadChoice, Manifest, TensorInfo};

/// Knows `+` 3, `-` 4, `<step>` 5, and `ab`, which is two tokens.
struct Words;

impl Names for Words {
    fn token(&self, name: &TokenName) -> Result<u32, String> {
        let text = match name {
            TokenName::Id(id) => return Ok(*id),
            TokenName::Text(text) => text.as_str(),
        };
        let known = [("+", 3), ("-", 4), ("<step>", 5)].into_iter().find(|(known, _)| *known == text);
        known.map(|(_, id)| id).ok_or_else(|| "is not one token".to_owned())
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }
}

/// The reading of a small Llama with this head and this choice.
fn readout(class: &str, head: &[(&str, Vec<usize>)], choice: Value) -> Result<Readout, Vec<String>> {
    let mut config = fixture::config(TINY);
    config["architectures"] = json!([class]);
    config["id2label"] = Value::Null;
    let tensors = fixture::llama(TINY, "F32", 1);
    let body = tensors.iter().filter(|(name, _)| *name != "score.weight").map(|(name, tensor)| (name.clone(), tensor.shape.clone()));
    let head = head.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone()));
    let manifest: Manifest = body.chain(head).map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect();
    let mut architecture = Architecture::parse(&config)?;
    architecture.head.choice = HeadChoice::parse(choice.get("head"), choice.get("pooling"))?;
    let layout = Layout::new(&architecture, &manifest).map_err(|problems| problems.into_sentences().collect::<Vec<_>>())?;
    let names: Vec<String> = (0..layout.outputs()).map(|i| format!("o{i}")).collect();
    Readout::resolve(&architecture, &layout, &names, &Words)
}

fn score(outputs: usize) -> Vec<(&'static str, Vec<usize>)> {
    vec![("score.weight", vec![outputs, TINY.hidden])]
}

fn language() -> Vec<(&'static str, Vec<usize>)> {
    vec![("lm_head.weight", vec![TINY.vocab, TINY.hidden])]
}

#[test]
fn several_outputs_are_combined_by_list_or_by_name() {
    let of = |choice: Value| readout("LlamaForSequenceClassification", &score(3), choice);
    let outputs = [1.0, 10.0, 100.0];
    assert_eq!(of(json!({})).expect("valid").combine(&outputs), 1.0, "the first");
    assert_eq!(of(json!({"head": {"weights": [1, 0.5, -1]}})).expect("valid").combine(&outputs), -94.0);
    assert_eq!(of(json!({"head": {"weights": {"o2": 2}}})).expect("valid").combine(&outputs), 200.0);
    assert!(of(json!({"head": {"weights": [1, 2]}})).expect_err("two")[0].contains("each of the 3 outputs, found 2"));
    assert!(of(json!({"head": {"weights": {"x": 2}}})).expect_err("no such")[0].contains("o0, o1, o2"));
    assert!(of(json!({"head": {"reduce": "min"}})).expect_err("no steps")[0].contains("needs steps"));
}

#[test]
fn named_rows_speak_for_and_against() {
    let of = |head: Value| readout("LlamaForCausalLM", &language(), json!({"head": head}));
    let tokens = json!({"plus": ["+"], "minus": ["-"]});
    let last = of(json!({"tokens": tokens})).expect("valid");
    assert_eq!((&last.plus[..], &last.minus[..], last.link), (&[3][..], &[4][..], Link::Logit));
    assert_eq!(last.combine(&[2.0, 0.5]), 1.5);
    let each = of(json!({"tokens": tokens, "at": "each \"<step>\"", "reduce": "product"})).expect("valid");
    assert_eq!((each.step, each.link, each.reduce), (Some(5), Link::Probability, Reduce::Product));
    assert!((each.combine(&[2.0, 0.5]) - 1.0 / (1.0 + (-1.5f64).exp())).abs() < 1e-15);
    for (head, words) in [
        (json!({"tokens": {"plus": ["ab"]}}), "head.tokens.plus: \"ab\" is not one token"),
        (json!({"tokens": {"plus": [99]}}), "is token 99, and the model has 24 rows"),
        (json!({"tokens": {"plus": ["+"], "minus": [3]}}), "both for and against"),
        (json!({"tokens": {"plus": ["+"]}, "as": "probability"}), "tokens that speak against"),
        (json!({"tokens": tokens, "at": "each \"ab\""}), "head.at: \"ab\" is not one token"),
    ] {
        let problems = of(head.clone()).expect_err("a mistake").join("\n");
        assert!(problems.contains(words), "{head}: {problems}");
    }
}

#[test]
fn steps_are_where_their_token_is_and_a_sample_without_one_says_so() {
    let of = |class: &str, outputs| {
        let biased = [score(outputs), vec![("score.bias", vec![outputs])]].concat();
        readout(class, &biased, json!({"head": {"at": "each \"<step>\""}})).expect("valid")
    };
    let two = of("LlamaForTokenClassification", 2);
    assert_eq!((two.link, two.weights.as_slice()), (Link::Probability, &[-1.0, 1.0][..]), "wrong and right");
    assert_eq!(two.places(&[5, 1, 5, 2]), Ok(Places { read: vec![0, 2], gate: None }));
    assert!(two.places(&[1, 2]).expect_err("none").contains("token 5 does not occur"));
    assert_eq!(of("LlamaForTokenClassification", 1).link, Link::Logit);
}

#[test]
fn pooling_is_the_operators_where_the_operator_says_so() {
    let of = |pooling: Value| readout("LlamaForSequenceClassification", &score(1), json!({"pooling": pooling}));
    let places = |pooling: Value| of(pooling).expect("valid").places(&[7, 3, 8, 2, 2]).map(|places| places.read);
    assert_eq!(places(Value::Null), Ok(vec![2]), "2 is the pad token");
    assert_eq!(places(json!("last_token")), Ok(vec![4]));
    assert_eq!(places(json!("mean")), Ok(vec![0, 1, 2, 3, 4]));
    assert_eq!(places(json!({"token": "+"})), Ok(vec![1]));
    assert!(places(json!({"token": "-"})).expect_err("absent").contains("token 4 does not occur"));
    assert!(of(json!({"token": "ab"})).is_err());
}

#[test]
fn a_gate_reads_at_the_last_prompts_end() {
    let head = vec![
        ("regression_layer.weight", vec![2, TINY.hidden]),
        ("reward_transform_matrix", vec![2, 2]),
        ("gating.layers.0.weight", vec![2, TINY.hidden]),
        ("gating.logit_scale", vec![1]),
    ];
    let gated = readout("LlamaForRewardModelWithGating", &head, json!({"head": {"gate_at": "ab"}})).expect("valid");
    let (a, b) = (u32::from(b'a'), u32::from(b'b'));
    assert_eq!(gated.places(&[a, b, 1, a, b, 1, a]), Ok(Places { read: vec![6], gate: Some(3) }));
    assert!(gated.places(&[a, 1, b]).expect_err("no prompt's end").contains("gating network reads, does not occur"));
    assert!(gated.places(&[a]).is_err(), "shorter than what is looked for");
    assert!(readout("LlamaForRewardModelWithGating", &head, json!({"head": {"weights": [1, 1]}})).is_err());
    assert!(readout("LlamaForSequenceClassification", &score(1), json!({"head": {"gate_at": "ab"}})).is_err());
}
