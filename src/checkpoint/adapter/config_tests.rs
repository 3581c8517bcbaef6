use serde_json::json;

use super::*;

/// What PEFT 0.21 writes, with some fields changed.
fn written(changes: Value) -> Value {
    let mut config = json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": "../base", "bias": "none", "corda_config": null, "ensure_weight_tying": false, "eva_config": null,
        "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
        "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8,
        "lora_bias": false, "lora_dropout": 0.05, "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
        "modules_to_save": ["score", "classifier", "score"], "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": null, "target_modules": ["q_proj", "v_proj"],
        "target_parameters": null, "task_type": "SEQ_CLS", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
        "use_qalora": false, "use_rslora": false, "velora_config": null,
    });
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

fn parse(changes: Value) -> AdapterConfig {
    AdapterConfig::parse(&written(changes)).unwrap()
}

fn problems(changes: Value) -> Vec<String> {
    AdapterConfig::parse(&written(changes)).unwrap_err()
}

const Q1: &str = "model.layers.1.self_attn.q_proj";
const V0: &str = "model.layers.0.self_attn.v_proj";

#[test]
fn what_peft_writes_is_read() {
    let config = parse(json!({}));
    assert_eq!((config.base.as_deref(), config.bias, config.factor_bias), (Some("../base"), BiasMode::None, false));
    assert_eq!((config.rank(Q1), config.scale(Q1)), (4, 2.0));
    assert_eq!(config.saved.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["classifier", "score"]);
    assert_eq!(
        (config.adapts(Q1), config.adapts("model.layers.0.mlp.up_proj"), config.adapts("score")),
        (Some(true), Some(false), Some(false))
    );
    // What the first versions wrote has fewer fields.
    let oldest =
        json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "enable_lora": null, "merge_weights": false});
    assert_eq!(AdapterConfig::parse(&oldest).unwrap().scale("q_proj"), 2.0);
}

#[test]
fn ranks_and_alphas_follow_the_first_pattern_that_matches() {
    let patterns = json!({
        "rank_pattern": {r"layers.1.self_attn.q_proj": 16, "q_proj": 2},
        "alpha_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj$": 5, "v_proj": 6.5},
    });
    let config = parse(patterns.clone());
    assert_eq!((config.rank(Q1), config.scale(Q1)), (16, 5.0 / 16.0));
    assert_eq!((config.rank("model.layers.11.self_attn.q_proj"), config.rank(V0)), (2, 4));
    assert_eq!(config.scale(V0), 6.5 / 4.0);
    let mut stabilised = patterns;
    stabilised["use_rslora"] = true.into();
    assert_eq!((parse(stabilised.clone()).scale(Q1), parse(stabilised).scale(V0)), (5.0 / 4.0, 6.5 / 2.0));
}

#[test]
fn modules_are_adapted_as_peft_chooses_them() {
    let adapts = |changes: Value, modules: [&str; 3]| modules.map(|module| parse(changes.clone()).adapts(module));
    let modules = [Q1, V0, "model.layers.1.mlp.up_proj"];
    let some = |flags: [bool; 3]| flags.map(Some);
    assert_eq!(adapts(json!({"target_modules": "all-linear"}), modules), [None; 3]);
    assert_eq!(adapts(json!({"target_modules": null}), modules), [None; 3]);
    assert_eq!(adapts(json!({"target_modules": [V0, "up_proj"]}), modules), some([false, true, true]));
    assert_eq!(adapts(json!({"target_modules": ["_proj"]}), modules), some([false; 3]));
    assert_eq!(adapts(json!({"target_modules": r".*layers\.1\..*(q|up)_proj"}), modules), some([true, false, true]));
    assert_eq!(adapts(json!({"target_modules": r"^(?!.*layers\.1).*_proj$"}), modules), some([false, true, false]));
    assert_eq!(adapts(json!({"exclude_modules": ["v_proj"]}), modules), some([true, false, false]));
    assert_eq!(adapts(json!({"exclude_modules": r".*1.*"}), modules), some([false, true, false]));
    assert_eq!(adapts(json!({"layers_to_transform": 1}), modules), some([true, false, false]));
    assert_eq!(adapts(json!({"layers_to_transform": [0, 7], "layers_pattern": "layers"}), modules), some([false, true, false]));
    assert_eq!(adapts(json!({"layers_to_transform": [0], "layers_pattern": ["h"]}), modules), some([false; 3]));
    assert_eq!(adapts(json!({"layers_to_transform": []}), modules), some([true, true, false]));
    // A module that is named in full is adapted whatever its layer.
    assert_eq!(adapts(json!({"target_modules": [Q1], "layers_to_transform": [0]}), modules), some([true, false, false]));
    assert_eq!(adapts(json!({"modules_to_save": ["self_attn"]}), modules), some([false, false, false]));
}

#[test]
fn what_changes_weights_in_another_way_is_refused_by_name() {
    let unsupported = [
        ("use_dora", json!(true)),
        ("layer_replication", json!([[0, 1], [0, 2]])),
        ("megatron_config", json!({"tensor_model_parallel_size": 2})),
        ("trainable_token_indices", json!([1, 2])),
        ("target_parameters", json!(["experts.down_proj"])),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([5])),
        ("arrow_config", json!({"top_k": 1})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("kasa_config", json!({"beta": 0.1})),
        ("velora_config", json!({"num_groups": 2})),
        ("monteclora_config", json!({"num_samples": 8})),
        ("enable_lora", json!([true, false, true])),
    ];
    for (name, value) in unsupported {
        let found = problems(json!({ name: value }));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(&format!("{name}: not supported: ")) && found[0].contains("merge_and_unload"), "{found:?}");
    }
    for init in ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"] {
        let found = problems(json!({"init_lora_weights": init}));
        assert!(found.len() == 1 && found[0].starts_with("init_lora_weights: not supported: "), "{found:?}");
        assert!(found[0].contains("path_initial_model_for_weight_conversion"), "{found:?}");
    }
    for init in [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal")] {
        parse(json!({"init_lora_weights": init, "eva_config": {"rho": 2.0}}));
    }
    assert_eq!(
        problems(json!({"use_next_years_trick": {"depth": 2}})),
        ["use_next_years_trick: is not known to this version and may change the weights, expected nothing, found {\"depth\":2}"]
    );
    parse(json!({"use_next_years_trick": false, "another": null, "third": [], "fourth": 0}));
    for kind in ["LOHA", "ADALORA", "IA3", "PROMPT_TUNING"] {
        let expected = format!("peft_type: expected \"LORA\", found {kind:?}: no other kind of adapter is supported");
        assert_eq!(problems(json!({"peft_type": kind})), [expected]);
    }
}

#[test]
fn every_other_mistake_is_told_at_once_with_its_field() {
    let found = problems(json!({
        "r": 0, "lora_alpha": "8", "use_rslora": 1, "bias": "some", "init_lora_weights": "unheard-of", "modules_to_save": [1],
        "rank_pattern": {"q_proj": 1_000_000_000_000_u64, "(": 3}, "alpha_pattern": [], "target_modules": "(", "exclude_modules": {},
        "layers_to_transform": "all",
    }));
    let expected = [
        "init_lora_weights: expected true, false, gaussian, eva, orthogonal or mica, found \"unheard-of\", which is not known",
        "layers_to_transform: expected numbers of layers, found \"all\"",
        "bias: expected none, lora_only or all, found \"some\"",
        "modules_to_save: expected a list of names, found [1]",
        "r: expected a rank from 1 to 4096, found 0",
        "lora_alpha: expected a number, found \"8\"",
        "use_rslora: expected true or false, found 1",
        "rank_pattern[\"q_proj\"]: expected a rank from 1 to 4096, found 1000000000000",
        "rank_pattern: \"(\" is not a regular expression that can be read here: ",
        "alpha_pattern: expected an object of patterns, found []",
        "target_modules: \"(\" is not a regular expression that can be read here: ",
        "exclude_modules: expected a list of names, found {}",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found:?} should begin with {expected:?}");
    }
    assert_eq!(AdapterConfig::parse(&json!([])).unwrap_err(), ["expected a JSON object"]);
    assert_eq!(problems(json!({"r": null}))[0], "r: expected a rank from 1 to 4096, found none");
}
