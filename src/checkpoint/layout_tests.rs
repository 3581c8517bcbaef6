use serde_json::json;

use super::*;
use crate::checkpoint::{Dtype, TensorInfo};

fn architecture() -> Architecture {
    let config = json!({
        "model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
        "intermediate_size": 12, "vocab_size": 10, "id2label": {"0": "LABEL_0"}
    });
    Architecture::parse(&config).expect("valid")
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let layer = [
        ("input_layernorm.weight", vec![8]),
        ("self_attn.q_proj.weight", vec![8, 8]),
        ("self_attn.q_proj.bias", vec![8]),
        ("self_attn.k_proj.weight", vec![4, 8]),
        ("self_attn.k_proj.bias", vec![4]),
        ("self_attn.v_proj.weight", vec![4, 8]),
        ("self_attn.v_proj.bias", vec![4]),
        ("self_attn.o_proj.weight", vec![8, 8]),
        ("post_attention_layernorm.weight", vec![8]),
        ("mlp.gate_proj.weight", vec![12, 8]),
        ("mlp.up_proj.weight", vec![12, 8]),
        ("mlp.down_proj.weight", vec![8, 12]),
    ];
    let mut tensors: Vec<_> = layer.into_iter().map(|(name, shape)| (format!("model.layers.0.{name}"), shape)).collect();
    tensors.push(("model.embed_tokens.weight".to_owned(), vec![10, 8]));
    tensors.push(("model.norm.weight".to_owned(), vec![8]));
    tensors.push(("score.weight".to_owned(), vec![1, 8]));
    tensors
}

fn layout(tensors: Vec<(String, Vec<usize>)>) -> Result<Layout, Vec<String>> {
    let manifest: Manifest = tensors.into_iter().map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect();
    Layout::new(&architecture(), &manifest).map_err(|problems| problems.into_sentences().collect())
}

#[test]
fn every_tensor_has_its_place() {
    let layout = layout(tensors()).expect("complete");
    assert_eq!(layout.used().len(), tensors().len());
    assert_eq!(layout.outputs(), 1);
    assert_eq!(layout.blocks[0].query.bias.as_deref(), Some("model.layers.0.self_attn.q_proj.bias"));
}

#[test]
fn a_missing_head_is_refused_and_never_initialised() {
    let mut headless = tensors();
    headless.retain(|(name, _)| name != "score.weight");
    headless.push(("reward_model_head.weight".to_owned(), vec![1, 8]));
    let problems = layout(headless).expect_err("no head").join("\n");
    assert!(problems.contains("reward head \"score.weight\": expected shape [outputs, 8], found no such tensor (a missing head is never initialised at random)"), "{problems}");
    assert!(problems.contains("look like a head of another kind: reward_model_head.weight"), "{problems}");
}

#[test]
fn a_mis_shaped_head_and_a_wrong_number_of_outputs_are_refused() {
    let with_head = |shape: Vec<usize>| {
        let mut tensors = tensors();
        tensors.last_mut().expect("head").1 = shape;
        layout(tensors).expect_err("wrong head").join("\n")
    };
    assert_eq!(with_head(vec![1, 9]), "reward head \"score.weight\": expected shape [outputs, 8], found [1, 9]");
    assert_eq!(with_head(vec![2, 8]), "the configuration states 1 outputs (num_labels or id2label), the reward head has 2");
}

#[test]
fn all_missing_and_mis_shaped_tensors_are_listed_at_once() {
    let mut broken = tensors();
    broken.retain(|(name, _)| !name.ends_with("q_proj.bias"));
    broken.iter_mut().find(|(name, _)| name.ends_with("k_proj.weight")).expect("key").1 = vec![8, 4];
    let problems = layout(broken).expect_err("broken");
    assert_eq!(
        problems,
        [
            "tensor \"model.layers.0.self_attn.q_proj.bias\": expected shape [8], found no such tensor",
            "tensor \"model.layers.0.self_attn.k_proj.weight\": expected shape [4, 8], found [8, 4]",
        ]
    );
}

#[test]
fn a_tensor_that_nobody_would_read_is_refused_unless_it_is_known_to_ride_along() {
    let mut more = tensors();
    more.push(("lm_head.weight".to_owned(), vec![10, 8]));
    more.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![2]));
    assert_eq!(layout(more.clone()).expect("known").unused(), ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]);
    more.push(("model.layers.0.self_attn.o_proj.bias".to_owned(), vec![8]));
    let problems = layout(more).expect_err("an unknown bias");
    assert_eq!(
        problems,
        ["tensor \"model.layers.0.self_attn.o_proj.bias\": the model would not read it, so the score would not be the checkpoint's"]
    );
}
