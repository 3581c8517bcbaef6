use std::path::Path;

use super::*;
use crate::checkpoint::fixture::{self, Size, Tensors};
use crate::merge::Recipe;

/// Large enough that a layer has several blocks, some of them short.
const WIDE: Size = Size { hidden: 264, intermediate: 512, layers: 2, vocab: 501 };

fn plan(dir: &Path, more: &str) -> MergePlan {
    MergePlan::open(&Recipe::from_yaml(&format!("members: [m0, m1, m2]\ninit: init\n{more}"), dir).unwrap()).unwrap()
}

fn family(dtypes: [&'static str; 4]) -> (tempfile::TempDir, Vec<Tensors>) {
    let dir = tempfile::tempdir().unwrap();
    let members: Vec<Tensors> = dtypes.into_iter().zip(1..).map(|(dtype, seed)| fixture::llama(WIDE, dtype, seed)).collect();
    for (name, tensors) in ["m0", "m1", "m2", "init"].iter().zip(&members) {
        fixture::write(&dir.path().join(name), &fixture::config(WIDE), tensors, 2).unwrap();
    }
    (dir, members)
}

fn numbers(tensor: &fixture::Tensor) -> Vec<f64> {
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
}

#[test]
fn the_products_are_those_of_task_vectors_over_whole_groups() {
    let (dir, members) = family(["F32"; 4]);
    for (granularity, count) in [("layer", 5), ("tensor", 21), ("global", 1)] {
        let groups = measure(&plan(dir.path(), &format!("slerp: {{granularity: {granularity}}}")), 0.5).unwrap();
        assert_eq!(groups.len(), count, "{granularity}");
        for group in &groups {
            let task_vector = |member: usize| -> Vec<f64> {
                let minus_init = |name: &String| {
                    let (member, init) = (numbers(&members[member][name]), numbers(&members[3][name]));
                    member.into_iter().zip(init).map(|(a, b)| a - b).collect::<Vec<_>>()
                };
                group.tensors.iter().flat_map(minus_init).collect()
            };
            let vectors: Vec<Vec<f64>> = (0..3).map(task_vector).collect();
            for (i, j) in Gram::pairs(3) {
                let expected: f64 = vectors[i].iter().zip(&vectors[j]).map(|(a, b)| a * b).sum();
                let size = (group.gram.norm(i) * group.gram.norm(j)).max(1e-300);
                assert!((group.gram.get(i, j) - expected).abs() < 1e-12 * size, "{} {i} {j}", group.name);
            }
        }
    }
}

#[test]
fn threads_change_no_angle() {
    let (dir, _) = family(["BF16", "F32", "F16", "BF16"]);
    let measured = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| measure(&plan(dir.path(), "method: slerp"), 0.5).unwrap())
    };
    let bits = |groups: Vec<Group>| -> Vec<u64> {
        groups.iter().flat_map(|group| group.combination.members.iter().chain([&group.combination.init]).map(|c| c.to_bits())).collect()
    };
    let one = bits(measured(1));
    assert_eq!(one.len(), 5 * 4);
    for threads in [2, 3, 7] {
        assert_eq!(bits(measured(threads)), one, "{threads} threads");
    }
}

#[test]
fn the_first_bad_value_is_told_and_lengths_beyond_float64_are_refused() {
    let (dir, members) = family(["F32"; 4]);
    let mut bad = members[1].clone();
    for (name, index) in [("model.layers.0.mlp.up_proj.weight", 70_000), ("model.embed_tokens.weight", 9)] {
        bad.get_mut(name).unwrap().bytes[4 * index..4 * index + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let path = dir.path().join("m1");
    std::fs::remove_dir_all(&path).unwrap();
    fixture::write(&path, &fixture::config(WIDE), &bad, 1).unwrap();
    let error = measure(&plan(dir.path(), "method: slerp"), 0.5).unwrap_err().to_string();
    let file = path.join("model.safetensors");
    assert_eq!(error, format!("{}: tensor \"model.embed_tokens.weight\": element 9 is NaN, expected finite numbers", file.display()));

    let mut long = members[1].clone();
    let huge = fixture::Tensor { dtype: "F64", shape: vec![1, 264], bytes: 1e300_f64.to_le_bytes().repeat(264) };
    long.insert("score.weight".to_owned(), huge);
    std::fs::remove_dir_all(&path).unwrap();
    fixture::write(&path, &fixture::config(WIDE), &long, 1).unwrap();
    let error = measure(&plan(dir.path(), "method: slerp"), 0.5).unwrap_err().to_string();
    assert!(error.ends_with("tensor \"score.weight\": the task vectors are too long to be measured"), "{error}");
}
