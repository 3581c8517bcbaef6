use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Dtype, HeadChoice, Layout, TensorInfo};

type Shapes = Vec<(&'static str, Vec<usize>)>;

/// A decoder of no layers and eight hidden numbers, with these tensors beside its body.
fn decoder(config: Value, head: Shapes) -> Result<Layout, Vec<String>> {
    let body = [("model.embed_tokens.weight", vec![10, 8]), ("model.norm.weight", vec![8])];
    let layer = [
        ("input_layernorm.weight", vec![8]),
        ("self_attn.q_proj.weight", vec![8, 8]),
        ("self_attn.k_proj.weight", vec![8, 8]),
        ("self_attn.v_proj.weight", vec![8, 8]),
        ("self_attn.o_proj.weight", vec![8, 8]),
        ("post_attention_layernorm.weight", vec![8]),
        ("mlp.gate_proj.weight", vec![12, 8]),
        ("mlp.up_proj.weight", vec![12, 8]),
        ("mlp.down_proj.weight", vec![8, 12]),
    ];
    let layer = layer.map(|(name, shape)| (format!("model.layers.0.{name}"), shape));
    let owned = body.into_iter().chain(head).map(|(name, shape)| (name.to_owned(), shape));
    let manifest: Manifest = owned.chain(layer).map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect();
    let mut base = json!({
        "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12, "vocab_size": 10,
        "pad_token_id": 0, "eos_token_id": 1,
    });
    let (Value::Object(base_fields), Value::Object(fields)) = (&mut base, config) else { panic!("two objects") };
    let head = fields.get("head").cloned();
    let pooling = fields.get("pooling").cloned();
    base_fields.extend(fields);
    let mut architecture = Architecture::parse(&base).expect("valid");
    architecture.head.choice = HeadChoice::parse(head.as_ref(), pooling.as_ref()).expect("valid choice");
    Layout::new(&architecture, &manifest).map_err(|problems| problems.into_sentences().collect())
}

fn stages(layout: &Layout) -> Vec<(&str, bool, Option<Activation>)> {
    match &layout.head.form {
        HeadForm::Stages(stages) => {
            stages.iter().map(|stage| (stage.linear.weight.as_str(), stage.linear.bias.is_some(), stage.activation)).collect()
        }
        other => panic!("{other:?}"),
    }
}

const SEQUENCE: &str = "LlamaForSequenceClassification";

#[test]
fn a_linear_head_has_the_bias_that_is_there() {
    let plain = decoder(json!({}), vec![("score.weight", vec![1, 8])]).expect("a head");
    assert_eq!(stages(&plain), [("score.weight", false, None)]);
    assert_eq!(plain.head.pooling, Some(Pooling::LastNonPad));
    let biased = decoder(json!({}), vec![("score.weight", vec![3, 8]), ("score.bias", vec![3])]).expect("a head");
    assert_eq!((stages(&biased), biased.outputs()), (vec![("score.weight", true, None)], 3));
    assert!(decoder(json!({}), vec![("score.weight", vec![3, 8]), ("score.bias", vec![2])]).is_err());
}

#[test]
fn linear_layers_of_a_sequence_have_relu_between_them() {
    let relu = Some(Activation::Relu);
    let mlp =
        |name: [&'static str; 4]| -> Shapes { vec![(name[0], vec![6, 8]), (name[1], vec![6]), (name[2], vec![1, 6]), (name[3], vec![1])] };
    let inform = decoder(
        json!({"architectures": ["INFORMForSequenceClassification"]}),
        mlp(["score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"]),
    );
    let inform = inform.expect("a head");
    assert_eq!(stages(&inform), [("score.0.weight", true, relu), ("score.2.weight", true, None)]);
    assert_eq!(inform.head.pooling, Some(Pooling::FirstPadMinusOne), "as its own model code does");
    let grm =
        decoder(json!({}), mlp(["v_head.summary.0.weight", "v_head.summary.0.bias", "v_head.summary.2.weight", "v_head.summary.2.bias"]));
    assert_eq!(grm.expect("a head").head.pooling, Some(Pooling::LastToken));
    // Layers that do not fit together are no head.
    let broken = decoder(json!({}), vec![("score.0.weight", vec![6, 8]), ("score.2.weight", vec![1, 7])]).expect_err("7 is not 6");
    assert_eq!(broken, ["reward head \"score.2.weight\": expected shape [outputs, 6], found [1, 7]"]);
}

#[test]
fn named_heads_are_read_at_the_last_token() {
    for name in ["v_head.weight", "v_head.summary.weight", "regression_head.weight", "value_head.weight"] {
        let layout = decoder(json!({}), vec![(name, vec![1, 8])]).expect(name);
        assert_eq!((stages(&layout)[0].0, layout.head.pooling), (name, Some(Pooling::LastToken)));
    }
}

#[test]
fn openrlhf_names_its_head_in_the_config() {
    let config = json!({"architectures": ["RewardModel"], "value_head_prefix": "my_head"});
    let layout = decoder(config.clone(), vec![("my_head.weight", vec![1, 8]), ("lm_head.weight", vec![10, 8])]).expect("a head");
    assert_eq!((stages(&layout)[0].0, layout.head.pooling), ("my_head.weight", Some(Pooling::LastToken)));
    let unnamed = decoder(json!({"architectures": ["RewardModel"]}), vec![("score.weight", vec![1, 8])]).expect("a head");
    assert_eq!(unnamed.head.pooling, Some(Pooling::LastToken));
    // The prefix decides between two, and the other rides along.
    let two = decoder(config, vec![("my_head.weight", vec![1, 8]), ("score.weight", vec![1, 8])]).expect("the config decides");
    assert_eq!((stages(&two)[0].0, two.unused()), ("my_head.weight", ["score.weight".to_owned()].as_slice()));
}

#[test]
fn two_conventions_that_differ_on_this_model_are_refused_with_the_choices() {
    let config = |pad: u32, pooling: Value| json!({"architectures": [SEQUENCE], "value_head_prefix": "score", "pad_token_id": pad, "pooling": pooling});
    let head = || vec![("score.weight", vec![1, 8])];
    assert_eq!(decoder(config(0, Value::Null), head()).expect("they agree").head.pooling, Some(Pooling::LastToken));
    let problems = decoder(config(1, Value::Null), head()).expect_err("pad is eos").join("\n");
    assert!(problems.contains("set `pooling: last_token` or `pooling: last_non_pad`"), "{problems}");
    let chosen = decoder(config(1, json!("last_non_pad")), head()).expect("chosen");
    assert_eq!(chosen.head.pooling, Some(Pooling::LastNonPad));
}

#[test]
fn two_heads_are_refused_until_one_is_named() {
    let heads = || vec![("score.weight", vec![1, 8]), ("v_head.summary.weight", vec![1, 8]), ("v_head.summary.bias", vec![1])];
    let problems = decoder(json!({}), heads()).expect_err("ambiguous");
    let expected =
        "the checkpoint has more than one reward head (score, v_head.summary); say which one counts with `head: {name: ...}` in the recipe";
    assert_eq!(problems[0], expected);
    let named = decoder(json!({"head": {"name": "v_head.summary"}}), heads()).expect("named");
    assert_eq!((stages(&named)[0].0, named.unused()), ("v_head.summary.weight", ["score.weight".to_owned()].as_slice()));
    assert!(decoder(json!({"head": {"name": "reward"}}), heads()).expect_err("no such")[0].contains("which has: score, v_head.summary"));
}

#[test]
fn a_language_model_is_refused_unless_its_rows_are_asked_for() {
    let language = || vec![("lm_head.weight", vec![10, 8])];
    let problems = decoder(json!({"architectures": ["LlamaForCausalLM"]}), language()).expect_err("no head").join("\n");
    assert!(problems.contains("never initialised at random") && problems.contains("head: {tokens:"), "{problems}");
    let tokens = json!({"tokens": {"plus": ["+"], "minus": ["-"]}});
    let layout = decoder(json!({"head": tokens}), language()).expect("rows");
    match &layout.head.form {
        HeadForm::Rows(rows) => assert_eq!((rows.weight.as_str(), rows.vocab, rows.outputs), ("lm_head.weight", 10, 2)),
        other => panic!("{other:?}"),
    }
    assert_eq!(layout.head.pooling, Some(Pooling::LastToken));
    let tied = decoder(json!({"head": tokens, "tie_word_embeddings": true}), vec![]).expect("the embedding's rows");
    assert!(tied.used().iter().all(|name| name != "lm_head.weight"));
    assert!(decoder(json!({"head": tokens}), vec![]).is_err(), "neither an own head nor a tied one");
    // A reward head beside it rides along, because the operator chose.
    let both = decoder(json!({"head": tokens}), vec![("lm_head.weight", vec![10, 8]), ("score.weight", vec![1, 8])]).expect("rows");
    assert_eq!(both.unused(), ["score.weight"]);
}

#[test]
fn a_model_of_steps_needs_to_know_what_a_step_is() {
    let config = |head: Value| json!({"architectures": ["Qwen2ForTokenClassification"], "head": head});
    let head = || vec![("score.weight", vec![2, 8]), ("score.bias", vec![2])];
    let problems = decoder(config(Value::Null), head()).expect_err("which steps?").join("\n");
    assert!(problems.contains("at: each \"<step>\""), "{problems}");
    assert!(decoder(config(json!({"at": "each \"<s>\""})), head()).is_ok());
    assert!(decoder(config(json!({"at": "last"})), head()).is_ok());
    // The class always has a bias; one that is lost is not taken for none.
    assert!(decoder(config(json!({"at": "last"})), vec![("score.weight", vec![2, 8])]).is_err());
}

#[test]
fn a_gating_network_is_a_head_of_its_own() {
    let tensors = |transform: Vec<usize>| -> Shapes {
        vec![
            ("regression_layer.weight", vec![3, 8]),
            ("reward_transform_matrix", transform),
            ("gating.layers.0.weight", vec![5, 8]),
            ("gating.layers.0.bias", vec![5]),
            ("gating.layers.1.weight", vec![3, 5]),
            ("gating.logit_scale", vec![1]),
        ]
    };
    let layout = decoder(json!({"architectures": ["LlamaForRewardModelWithGating"]}), tensors(vec![3, 3])).expect("a head");
    assert_eq!((layout.outputs(), layout.head.pooling), (3, Some(Pooling::FirstPadMinusOne)));
    let mut names = layout.head.tensors();
    names.sort_unstable();
    let all = ["gating.layers.0.bias", "gating.layers.0.weight", "gating.layers.1.weight", "gating.logit_scale"];
    assert_eq!(names, [all.as_slice(), &["regression_layer.weight", "reward_transform_matrix"]].concat());
    assert!(decoder(json!({}), tensors(vec![3, 2])).is_err());
}

/// The heads of encoders, told by the same tensors whatever the body is.
#[test]
fn classifiers_of_each_family_have_their_own_activation() {
    let classifier: [(&str, Vec<usize>); 2] = [("classifier.weight", vec![1, 8]), ("classifier.bias", vec![1])];
    let dense = |name: [&'static str; 2]| -> Shapes { vec![(name[0], vec![8, 8]), (name[1], vec![8])] };
    let of = |config: Value, front: Shapes| decoder(config, front.into_iter().chain(classifier.clone()).collect()).expect("a head");
    let first = |layout: &Layout| stages(layout)[0].2;
    assert_eq!(first(&of(json!({}), dense(["pre_classifier.weight", "pre_classifier.bias"]))), Some(Activation::Relu));
    assert_eq!(first(&of(json!({}), dense(["bert.pooler.dense.weight", "bert.pooler.dense.bias"]))), Some(Activation::Tanh));
    let pooler = || dense(["pooler.dense.weight", "pooler.dense.bias"]);
    assert_eq!(first(&of(json!({"pooler_hidden_act": "gelu"}), pooler())), Some(Activation::Gelu));
    let modern = of(json!({"norm_eps": 1e-4}), vec![("head.dense.weight", vec![8, 8]), ("head.norm.weight", vec![8])]);
    let HeadForm::Stages(found) = &modern.head.form else { panic!("stages") };
    assert_eq!(
        (found[0].activation, found[0].norm.as_ref().map(|(kind, _)| *kind)),
        (Some(Activation::Gelu), Some(Norm::Layer { eps: 1e-4 }))
    );
    let roberta = vec![
        ("roberta.pooler.dense.weight", vec![8, 8]),
        ("roberta.pooler.dense.bias", vec![8]),
        ("classifier.dense.weight", vec![8, 8]),
        ("classifier.dense.bias", vec![8]),
        ("classifier.out_proj.weight", vec![1, 8]),
        ("classifier.out_proj.bias", vec![1]),
    ];
    let roberta = decoder(json!({}), roberta).expect("a head");
    assert_eq!((first(&roberta), roberta.unused().len()), (Some(Activation::Tanh), 2), "the pooler rides along");
    // A class that always has a bias does not lose it in silence.
    assert!(decoder(json!({}), vec![("pre_classifier.weight", vec![8, 8]), ("classifier.weight", vec![1, 8])]).is_err());
}
