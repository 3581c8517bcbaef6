use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::checkpoint::{Positions, QkNorm, Rope, RopeScaling};

fn qwen3() -> Value {
    json!({
        "model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 380, "max_position_embeddings": 512,
        "pad_token_id": 0, "eos_token_id": 2, "id2label": {"0": "LABEL_0"},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
        config.extend(changes);
    }
    config
}

fn problems(config: Value) -> Vec<String> {
    Architecture::parse(&config).expect_err("a wrong configuration")
}

#[test]
fn a_qwen3_of_transformers_5_is_read() {
    let read = Architecture::parse(&qwen3()).expect("valid");
    assert_eq!((read.heads, read.kv_heads, read.head_dim, read.layers.len()), (4, 2, 16, 2));
    assert!(read.qk_norm == Some(QkNorm::Head) && read.causal && read.gated && !read.qkv_bias);
    assert_eq!(read.attention_scale, 0.25);
    assert_eq!((read.pad_token_id, read.labels), (Some(0), Some(1)));
}

#[test]
fn rope_is_the_same_in_both_generations() {
    let old = with(qwen3(), json!({"rope_parameters": null, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}));
    let new = with(qwen3(), json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}));
    let older = with(old.clone(), json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    let rope = |config| Architecture::parse(&config).expect("valid").ropes;
    assert_eq!(rope(old.clone()), rope(new));
    assert_eq!(rope(old.clone()), rope(older));
    assert_eq!(rope(old), [Rope { theta: 5e5, dims: 16, scaling: RopeScaling::Linear { factor: 4.0 }, attention_factor: 1.0 }]);
}

#[test]
fn windows_follow_each_familys_own_rule() {
    let windows = |config| Architecture::parse(&config).expect("valid").layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
    let mistral = with(qwen3(), json!({"model_type": "mistral"}));
    assert_eq!(windows(mistral.clone()), [Some(4096); 2]);
    assert_eq!(windows(with(mistral.clone(), json!({"sliding_window": 24}))), [Some(24); 2]);
    assert_eq!(windows(with(mistral, json!({"sliding_window": null}))), [None; 2]);
    let qwen = with(qwen3(), json!({"sliding_window": 24, "max_window_layers": 1}));
    assert_eq!(windows(qwen.clone()), [None; 2]);
    let sliding = with(qwen, json!({"use_sliding_window": true}));
    assert_eq!(windows(sliding.clone()), [None, Some(24)]);
    assert_eq!(windows(with(sliding, json!({"layer_types": ["sliding_attention", "full_attention"]}))), [Some(24), None]);
}

#[test]
fn biases_follow_family_and_configuration() {
    let biases = |config| {
        let read = Architecture::parse(&config).expect("valid");
        (read.qkv_bias, read.output_bias, read.mlp_bias)
    };
    let of = |family: &str, bias: bool| with(qwen3(), json!({"model_type": family, "attention_bias": bias, "mlp_bias": bias}));
    assert_eq!(biases(of("llama", false)), (false, false, false));
    assert_eq!(biases(of("llama", true)), (true, true, true));
    assert_eq!(biases(of("qwen2", false)), (true, false, false));
    assert_eq!(biases(of("qwen3", true)), (true, true, false));
    assert_eq!(biases(of("mistral", true)), (false, false, false));
}

#[test]
fn a_bert_reads_its_first_token_and_attends_both_ways() {
    let bert = json!({"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 9});
    let read = Architecture::parse(&bert).expect("valid");
    assert_eq!(
        (read.pooling, read.causal, read.positions, read.token_types),
        (Pooling::Cls, false, Some(Positions { rows: 512, first: 0, skips: None }), 2)
    );
    assert_eq!(read.norm, Norm::Layer { eps: 1e-12 });
    let relative = problems(with(bert, json!({"position_embedding_type": "relative_key"})));
    assert_eq!(relative, [r#"position_embedding_type: expected "absolute", found "relative_key""#]);
}

#[test]
fn every_mistake_is_reported_at_once_with_what_was_found() {
    let found = problems(with(
        qwen3(),
        json!({"hidden_size": 0, "num_hidden_layers": "two", "head_dim": 7, "rms_norm_eps": -1, "vocab_size": null}),
    ));
    let text = found.join("\n");
    for expected in [
        "hidden_size: expected a number from 1 to",
        "found 0",
        "num_hidden_layers: ",
        "\"two\"",
        "partial_rotary_factor: expected a share of head_dim (7) that is an even number",
        "rms_norm_eps: expected a positive number, found -1",
        "vocab_size: ",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn an_unknown_family_or_scaling_is_refused_with_the_choices() {
    assert_eq!(
        problems(json!({"model_type": "t5"})),
        [format!("model_type: expected one of {}, found \"t5\"", FAMILIES.map(|(family, _)| family).join(", "))]
    );
    let scaling = problems(with(qwen3(), json!({"rope_parameters": {"rope_type": "spiral"}})));
    assert_eq!(scaling, [r#"rope_parameters.rope_type: expected one of default, linear, dynamic, llama3, yarn, longrope, found "spiral""#]);
}

#[test]
fn differences_name_the_field_and_both_values_and_labels_are_the_heads_business() {
    let one = Architecture::parse(&qwen3()).expect("valid");
    let other = Architecture::parse(&with(qwen3(), json!({"pad_token_id": 3, "hidden_size": 64, "num_labels": 1}))).expect("valid");
    assert_eq!(one.differences(&other), ["hidden_size: expected 32, found 64", "pad_token_id: expected 0, found 3"]);
    assert!(one.differences(&one).is_empty());
}

fn read(config: Value) -> Architecture {
    Architecture::parse(&config).expect("valid")
}

#[test]
fn layers_of_two_kinds_have_two_rotations_in_both_generations() {
    let gemma = json!({
        "model_type": "gemma3_text", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 7, "intermediate_size": 96, "vocab_size": 380, "sliding_window": 16,
    });
    let old = json!({"sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let kinds: Vec<&str> = (1..8).map(|layer| if layer % 3 == 0 { "full_attention" } else { "sliding_attention" }).collect();
    let new = json!({"layer_types": kinds, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }});
    let (old, new) = (read(with(gemma.clone(), old)), read(with(gemma.clone(), new)));
    assert_eq!(old, new);
    // The scaling of transformers 4 holds for full attention alone.
    assert_eq!([&old.ropes[0].scaling, &old.ropes[1].scaling], [&RopeScaling::Linear { factor: 8.0 }, &RopeScaling::None]);
    assert_eq!(
        old.layers.iter().map(|layer| (layer.window, layer.rope)).take(3).collect::<Vec<_>>(),
        [(Some(16), Some(1)), (Some(16), Some(1)), (None, Some(0))]
    );
    let flat = problems(with(gemma, json!({"rope_parameters": {"rope_theta": 1e6}})));
    assert_eq!(flat, [r#"rope_parameters: expected a set for full_attention and one for sliding_attention, found ["rope_theta"]"#]);
}

#[test]
fn a_modernbert_sees_half_its_window_on_either_side_in_both_generations() {
    let base = json!({"model_type": "modernbert", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 64,
        "vocab_size": 380, "local_attention": 16});
    let old =
        read(with(base.clone(), json!({"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0})));
    let new = read(with(
        base,
        json!({"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 160000.0}, "sliding_attention": {"rope_theta": 10000.0}}}),
    ));
    assert_eq!(old, new);
    assert_eq!(old.layers.iter().map(|layer| layer.window).collect::<Vec<_>>(), [None, Some(9), Some(9), None]);
}

#[test]
fn partly_rotated_heads_are_read_under_every_name() {
    let neox = json!({"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 9});
    let pythia = read(with(neox.clone(), json!({"rotary_pct": 0.5, "rotary_emb_base": 5000})));
    let new =
        read(with(neox.clone(), json!({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000.0, "rope_type": "default"}})));
    assert_eq!(pythia, new);
    assert_eq!((pythia.ropes[0].dims, read(neox).ropes[0].dims), (8, 4));
    let qwen = problems(with(qwen3(), json!({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}})));
    assert_eq!(qwen, ["rope_parameters.partial_rotary_factor: expected 1 for this family, found 0.5"]);
}

#[test]
fn null_is_what_the_widths_say_and_absent_what_the_class_says() {
    let read = |changes| read(with(with(qwen3(), json!({"num_attention_heads": 32, "hidden_size": 64})), changes));
    assert_eq!((read(json!({})).kv_heads, read(json!({"num_key_value_heads": null})).kv_heads), (2, 32));
    assert_eq!(read(json!({"head_dim": null})).head_dim, 2);
    assert_eq!(read(json!({"model_type": "gemma2"})).attention_softcap, Some(50.0));
    assert_eq!(read(json!({"model_type": "gemma2", "attn_logit_softcapping": null})).attention_softcap, None);
}

#[test]
fn a_scaling_that_depends_on_length_has_a_table_for_it() {
    let scaled = |scaling: Value| read(with(qwen3(), json!({"max_position_embeddings": 64, "rope_parameters": scaling}))).ropes.remove(0);
    let dynamic = scaled(json!({"rope_type": "dynamic", "factor": 4.0}));
    assert_eq!([1, 64, 65, 90].map(|tokens| dynamic.variant(tokens)), [0, 0, 65, 90]);
    let factors = vec![1.5; 8];
    let long =
        scaled(json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 16}));
    assert_eq!([16, 17, 64].map(|tokens| long.variant(tokens)), [0, 1, 1]);
    assert!((long.attention_factor - (1.0 + 4f64.ln() / 16f64.ln()).sqrt()).abs() < 1e-12);
    let short =
        problems(with(qwen3(), json!({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": factors}})));
    assert_eq!(short, ["rope_parameters.short_factor: expected a list of 8 positive numbers, found a list of 1"]);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from)
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,9}", inner, 0..4).prop_map(|map| json!(map))
        ]
    })
}

proptest! {
    #[test]
    fn any_value_in_any_field_is_read_or_refused_and_never_panics(family in 0usize..FAMILIES.len(), field in 0usize..20, value in any_json()) {
        let names: Vec<String> = qwen3().as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default();
        let extra = ["rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "attention_bias", "hidden_act"];
        let name = names.iter().map(String::as_str).chain(extra).cycle().nth(field).unwrap_or("hidden_size").to_owned();
        let changed = with(with(qwen3(), json!({"model_type": FAMILIES[family].0})), json!({name: value}));
        let _ = Architecture::parse(&changed);
    }
}
