use std::path::PathBuf;

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::checkpoint::fixture::{self, Size, TINY, Tensors};
use crate::merge::Recipe;

/// Large enough that a tensor has several blocks, the last of them short.
const WIDE: Size = Size { hidden: 264, intermediate: 512, layers: 1, vocab: 1001 };

const EMBEDDING: &str = "model.embed_tokens.weight";

fn write(dir: &tempfile::TempDir, name: &str, size: Size, tensors: &Tensors, shards: usize) -> PathBuf {
    let path = dir.path().join(name);
    fixture::write(&path, &fixture::config(size), tensors, shards).unwrap();
    path
}

fn plan(text: &str, dir: &tempfile::TempDir) -> Arc<MergePlan> {
    Arc::new(MergePlan::open(&Recipe::from_yaml(text, dir.path()).unwrap()).unwrap())
}

fn read_all(merged: &Merged) -> Vec<Elements> {
    let read = |(name, info): (&str, &crate::checkpoint::TensorInfo)| {
        let mut into = Elements::default();
        merged.read(name, 0..info.elements(), &mut into).unwrap();
        into
    };
    merged.manifest().iter().map(read).collect()
}

fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// The numbers of a stored tensor, by the definitions of the formats.
fn numbers(tensor: &fixture::Tensor) -> Vec<f64> {
    let chunks = |size| tensor.bytes.chunks_exact(size);
    match tensor.dtype {
        "F32" => chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        "BF16" => chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        "F16" => chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        other => panic!("{other}"),
    }
}

#[test]
fn the_merge_is_the_float64_mean_rounded_once() {
    let dir = tempfile::tempdir().unwrap();
    let members: Vec<Tensors> =
        ["F32", "BF16", "F16"].into_iter().zip(1..).map(|(dtype, seed)| fixture::llama(WIDE, dtype, seed)).collect();
    for (index, tensors) in members.iter().enumerate() {
        write(&dir, &format!("m{index}"), WIDE, tensors, index + 1);
    }
    let recipe = "members: [{path: m0, coefficient: 1}, {path: m1, coefficient: 2}, {path: m2, coefficient: 5}]";
    let merged = Merged::new(plan(recipe, &dir)).unwrap();
    for ((name, _), found) in merged.manifest().iter().zip(read_all(&merged)) {
        let Elements::F32(found) = found else { panic!("{found:?}") };
        let columns: Vec<Vec<f64>> = members.iter().map(|tensors| numbers(&tensors[name])).collect();
        for (index, found) in found.iter().enumerate() {
            let mean = columns[0][index] * 0.125 + columns[1][index] * 0.25 + columns[2][index] * 0.625;
            assert_eq!(found.to_bits(), (mean as f32).to_bits(), "{name} {index}");
        }
    }
}

#[test]
fn members_are_summed_in_the_order_of_the_recipe() {
    let dir = tempfile::tempdir().unwrap();
    for (name, value) in [("large", 1e30), ("opposite", -1e30), ("small", 4.0)] {
        let mut tensors = fixture::llama(TINY, "F32", 1);
        tensors.insert("score.weight".to_owned(), fixture::tensor("F32", &[1, 8], std::iter::repeat_n(value, 8)));
        write(&dir, name, TINY, &tensors, 1);
    }
    // Beside 1e30 a 4 is lost; after the two have cancelled it is not.
    let quarter = |name: &str| format!("{{path: {name}, coefficient: 0.25}}");
    for (order, expected) in [(["large", "opposite", "small"], 1.0), (["small", "large", "opposite"], 0.0)] {
        let members = order.map(quarter).join(", ");
        let merged = Merged::new(plan(&format!("members: [{members}, {{path: small, name: again, coefficient: 0.25}}]"), &dir)).unwrap();
        let mut into = Elements::default();
        merged.read("score.weight", 0..8, &mut into).unwrap();
        assert_eq!(into, Elements::F32(vec![expected + 1.0; 8]), "{order:?}");
    }
}

#[test]
fn threads_and_chunks_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        write(&dir, &format!("m{seed}"), WIDE, &fixture::llama(WIDE, "BF16", seed), 1);
    }
    let plan = plan("members: [m0, m1, m2]\ndtype: bfloat16", &dir);
    let whole = in_pool(1, || read_all(&Merged::new(Arc::clone(&plan)).unwrap()));
    for threads in [2, 5] {
        assert_eq!(in_pool(threads, || read_all(&Merged::new(Arc::clone(&plan)).unwrap())), whole);
    }
    let merged = Merged::new(plan).unwrap();
    let place = merged.manifest().names().position(|name| name == EMBEDDING).unwrap();
    let elements = merged.manifest().get(EMBEDDING).unwrap().elements();
    for chunk in [999, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 150_000] {
        let (mut bytes, mut into) = (Vec::new(), Elements::default());
        for begin in (0..elements).step_by(chunk) {
            merged.read(EMBEDDING, begin..elements.min(begin + chunk), &mut into).unwrap();
            bytes.extend_from_slice(into.bytes());
        }
        assert_eq!(bytes, whole[place].bytes(), "in chunks of {chunk}");
    }
}

#[test]
fn a_member_alone_is_its_checkpoint_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, name) in [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")] {
        let mut tensors = fixture::llama(TINY, dtype, 9);
        // Negative zero and a subnormal number are the ones that sloppy arithmetic loses.
        tensors.insert("model.norm.weight".to_owned(), fixture::tensor(dtype, &[8], [-0.0, 3e-8, 1.0, -1.0].into_iter().cycle().take(8)));
        write(&dir, dtype, TINY, &tensors, 2);
        write(&dir, "other", TINY, &fixture::llama(TINY, dtype, 10), 1);
        let alone = Merged::new(plan(&format!("members: [{dtype}]\ndtype: {name}"), &dir)).unwrap();
        let second = plan(&format!("members: [other, {dtype}]\ndtype: {name}"), &dir).member_source(1).unwrap().unwrap();
        for merged in [&alone, &second] {
            for ((name, stored), found) in tensors.iter().zip(read_all(merged)) {
                found.with_little_endian(|bytes| assert_eq!(bytes, stored.bytes, "{name}"));
            }
        }
        assert_eq!(alone.weights_id().unwrap(), second.weights_id().unwrap());
        assert!(second.plan().member_source(2).unwrap().is_none());
    }
}

#[test]
fn the_id_names_what_the_weights_depend_on_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (fixture::llama(WIDE, "BF16", 1), fixture::llama(WIDE, "BF16", 2));
    write(&dir, "a", WIDE, &a, 1);
    write(&dir, "b", WIDE, &b, 1);
    write(&dir, "b-sharded", WIDE, &b, 4);
    let mut changed = b.clone();
    changed.get_mut(EMBEDDING).unwrap().bytes[200_001] ^= 1;
    write(&dir, "b-changed", WIDE, &changed, 1);
    let wider: Tensors =
        b.iter().map(|(name, t)| (name.clone(), fixture::tensor("F32", &t.shape, numbers(t).iter().map(|&x| x as f32)))).collect();
    write(&dir, "b-wider", WIDE, &wider, 1);
    let id = |text: &str| Merged::new(plan(text, &dir)).unwrap().weights_id().unwrap();
    let base = id("members: [a, b]");
    assert_eq!(id("members: [{path: a, name: x}, b-sharded]\ninit: a"), base);
    assert_eq!(id("members: [{path: a, coefficient: 0.5}, {path: b, coefficient: 0.5}]"), base);
    let others = [
        "members: [a]",
        "members: [b, a]",
        "members: [a, b-changed]",
        "members: [a, b-wider]",
        "members: [{path: a, coefficient: 2}, b]",
        "members: [a, b]\ndtype: bfloat16",
    ];
    let ids: Vec<_> = others.map(id).into_iter().chain([base]).collect();
    for (index, one) in ids.iter().enumerate() {
        assert!(ids.iter().skip(index + 1).all(|other| other != one), "{}", others[index]);
    }
    let merged = Merged::new(plan("members: [a, b]", &dir)).unwrap();
    let mut into = Elements::default();
    merged.read(EMBEDDING, 0..100_000, &mut into).unwrap();
    assert_eq!(in_pool(3, || merged.weights_id().unwrap()), base);
    assert_eq!(merged.member_hashes().unwrap().len(), 2);
}

#[test]
fn the_first_of_several_bad_values_is_told_with_its_file() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, "a", WIDE, &fixture::llama(WIDE, "F32", 1), 1);
    let mut bad = fixture::llama(WIDE, "F32", 2);
    for index in [70_000, 140_000, 200_000] {
        bad.get_mut(EMBEDDING).unwrap().bytes[4 * index..4 * index + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let path = write(&dir, "b", WIDE, &bad, 1).join("model.safetensors");
    let expected = format!("{}: tensor {EMBEDDING:?}: element 70000 is NaN, expected finite numbers", path.display());
    for threads in [1, 4] {
        let merged = Merged::new(plan("members: [a, b]", &dir)).unwrap();
        let error = in_pool(threads, || merged.read(EMBEDDING, 5..264_264, &mut Elements::default()).unwrap_err());
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(Merged::new(plan("members: [a, b]", &dir)).unwrap().weights_id().unwrap_err().to_string(), expected);
}

#[test]
fn a_value_that_the_output_cannot_hold_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = fixture::llama(TINY, "F32", 1);
    tensors.insert("score.weight".to_owned(), fixture::tensor("F32", &[1, 8], [1.0, 2.0, 7e4, 0.0].into_iter().cycle().take(8)));
    write(&dir, "a", TINY, &tensors, 1);
    let merged = Merged::new(plan("members: [a]\ndtype: float16", &dir)).unwrap();
    let error = merged.read("score.weight", 1..8, &mut Elements::default()).unwrap_err().to_string();
    assert_eq!(error, "tensor \"score.weight\": element 2 merges to 70000, which F16 cannot hold; choose a wider dtype");
}

#[test]
fn a_member_that_vanishes_or_shrinks_is_told_by_file_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, "a", TINY, &fixture::llama(TINY, "F32", 1), 1);
    let path = write(&dir, "b", TINY, &fixture::llama(TINY, "F32", 2), 1).join("model.safetensors");
    let merged = Merged::new(plan("members: [a, b]", &dir)).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = merged.read("score.weight", 0..8, &mut Elements::default()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: tensor \"score.weight\": the file has 100 bytes", path.display())), "{error}");
}

#[test]
fn a_range_beyond_the_tensor_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, "a", TINY, &fixture::llama(TINY, "F32", 1), 1);
    let merged = Merged::new(plan("members: [a]", &dir)).unwrap();
    assert!(merged.read("score.weight", 0..9, &mut Elements::default()).is_err());
    assert!(merged.read("nothing", 0..0, &mut Elements::default()).is_err());
    let mut into = Elements::F64(vec![1.0]);
    merged.read("score.weight", 8..8, &mut into).unwrap();
    assert_eq!(into, Elements::F32(Vec::new()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_range_is_that_part_of_the_whole(begin in 0_usize..264_264, count in 0_usize..200_000) {
        static WHOLE: std::sync::LazyLock<(tempfile::TempDir, Merged, Elements)> = std::sync::LazyLock::new(|| {
            let dir = tempfile::tempdir().unwrap();
            for seed in 0..2 {
                write(&dir, &format!("m{seed}"), WIDE, &fixture::llama(WIDE, "F16", seed), 1);
            }
            let merged = Merged::new(plan("members: [m0, m1]", &dir)).unwrap();
            let mut whole = Elements::default();
            merged.read(EMBEDDING, 0..264_264, &mut whole).unwrap();
            (dir, merged, whole)
        });
        let (_, merged, whole) = &*WHOLE;
        let end = 264_264.min(begin + count);
        let mut into = Elements::default();
        merged.read(EMBEDDING, begin..end, &mut into).unwrap();
        prop_assert_eq!(into.bytes(), &whole.bytes()[4 * begin..4 * end]);
    }
}
