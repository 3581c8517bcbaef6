use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::checkpoint::Dtype;

#[test]
fn a_layer_is_all_under_the_first_number() {
    let layer = |name| group_of(name, Granularity::Layer);
    for (name, expected) in [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3."),
        ("model.layers.13.self_attn.q_proj.bias", "model.layers.13."),
        ("h.0.attn.c_attn.weight", "h.0."),
        ("score.0.weight", "score.0."),
        ("0.weight", "0."),
        ("model.experts.7.layers.2.weight", "model.experts.7."),
        ("score.weight", "score.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.layer3.weight", "model.layer3.weight"),
        // Nothing is under a number that ends the name.
        ("blocks.3", "blocks.3"),
        ("a..b", "a..b"),
        ("", ""),
    ] {
        assert_eq!(layer(name), expected);
    }
    assert_eq!(group_of("score.0.weight", Granularity::Tensor), "score.0.weight");
    assert_eq!(group_of("score.0.weight", Granularity::Global), "");
}

fn recipe(text: &str) -> Recipe {
    Recipe::from_yaml(text, Path::new("")).unwrap()
}

fn info(dtype: Dtype) -> TensorInfo {
    TensorInfo { dtype, shape: vec![2] }
}

#[test]
fn the_first_rule_that_matches_decides_and_integers_are_never_averaged() {
    let recipe = recipe("members: [a, b]\nrules: [{match: 'score.*', from: b}, {match: '*.weight', coefficients: {a: 3, b: 1}}]");
    let of = |name, dtype| Treatment::of(&recipe, name, &info(dtype));
    assert_eq!(of("score.weight", Dtype::F32), Treatment::Rule(0));
    assert_eq!(of("norm.weight", Dtype::F32), Treatment::Rule(1));
    assert_eq!(of("norm.bias", Dtype::Bf16), Treatment::Method);
    for (name, dtype) in [("norm.steps", Dtype::I64), ("norm.mask", Dtype::Bool), ("reward_transform_matrix", Dtype::F32)] {
        assert_eq!(of(name, dtype), Treatment::Equal, "{name}");
    }
    assert_eq!(Treatment::Rule(0).combination(&recipe), Combination { members: vec![0.0, 1.0], init: 0.0 });
    assert_eq!(Treatment::Rule(1).combination(&recipe), Combination { members: vec![0.75, 0.25], init: 0.0 });
    assert_eq!((Treatment::Rule(0).sources(&recipe), Treatment::Equal.sources(&recipe)), (vec![1], vec![0, 1]));
}

#[test]
fn who_is_read_and_who_must_have_a_tensor_follows_from_the_recipe() {
    let method = |text: &str| {
        let recipe = recipe(text);
        (Treatment::Method.sources(&recipe), Treatment::Method.holders(&recipe).into_iter().collect::<Vec<_>>())
    };
    assert_eq!(method("members: [a, b]\ninit: i"), (vec![0, 1], vec![0, 1]));
    assert_eq!(method("members: [a, {path: b, coefficient: 0}]"), (vec![0], vec![0, 1]));
    assert_eq!(method("members: [a, b]\ninit: i\nliti: {eta: 0.5}"), (vec![0, 1, 2], vec![0, 1, 2]));
    assert_eq!(method("members: [a, b]\ninit: i\nliti: {eta: 1}"), (vec![0, 1], vec![0, 1]));
    assert_eq!(method("members: [a, b]\ninit: i\nliti: {eta: 0}"), (vec![2], vec![0, 1, 2]));
    assert_eq!(method("members: [a, b]\ninit: i\nslerp: {t: 0}"), (vec![0, 1, 2], vec![0, 1, 2]));
    // One vector has no angle to another.
    assert_eq!(method("members: [a]\ninit: i\nmethod: slerp"), (vec![0], vec![0]));
    assert_eq!(method("members: [a, b]\nema: {mu: 1}"), (vec![1], vec![0, 1]));
}

#[test]
fn a_rule_may_take_from_init_what_no_member_has() {
    let recipe = recipe("members: [a]\ninit: i\nrules: [{match: 'score.*', init: true}]");
    let manifest = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), info(Dtype::F32))).collect::<Manifest>();
    let (member, init) = (manifest(&["norm.weight"]), manifest(&["norm.weight", "score.weight", "other.weight"]));
    let found = treatments(&recipe, &[Some(&member), None], Some(&init));
    let expected = [("norm.weight", Treatment::Method), ("score.weight", Treatment::Rule(0))];
    assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
}

proptest! {
    #[test]
    fn a_group_is_a_prefix_of_its_tensors_that_ends_after_a_number(name in "([a-z]{0,2}[0-9]{0,2}\\.?){1,6}") {
        let group = group_of(&name, Granularity::Layer);
        prop_assert!(name.starts_with(group));
        if group != name {
            let number = group.trim_end_matches('.').rsplit('.').next().unwrap();
            prop_assert!(number.parse::<u32>().is_ok());
            let longer = format!("{group}x.9.y");
            prop_assert_eq!(group_of(&longer, Granularity::Layer), group);
        }
    }
}
