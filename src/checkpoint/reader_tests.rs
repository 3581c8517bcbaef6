use std::fs;

use super::*;
use crate::checkpoint::fixture::{self, TINY, Tensors};
use crate::checkpoint::folder::MAX_CONFIG_BYTES;
use crate::checkpoint::{Checkpoint, Dtype, TensorInfo};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        fixture::write(&folder.path(""), &fixture::config(TINY), &fixture::llama(TINY, "BF16", 1), 1).unwrap();
        folder
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join("rm").join(file)
    }

    fn problem(&self) -> String {
        Checkpoint::open(&self.path("")).unwrap_err().to_string()
    }
}

fn read_all(source: &dyn TensorSource) -> Vec<(String, TensorInfo, Vec<u8>)> {
    let mut into = Elements::default();
    let read = |(name, info): (&str, &TensorInfo)| {
        source.read(name, 0..info.elements(), &mut into).unwrap();
        (name.to_owned(), info.clone(), into.bytes().to_vec())
    };
    source.manifest().iter().map(read).collect()
}

#[test]
fn tensors_come_back_as_they_were_written_whatever_their_dtype_and_sharding() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in ["F64", "F32", "F16", "BF16"] {
        let tensors = fixture::llama(TINY, dtype, 3);
        for shards in [1, 2, 5] {
            let path = dir.path().join(format!("{dtype}-{shards}"));
            fixture::write(&path, &fixture::config(TINY), &tensors, shards).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            let read = read_all(&checkpoint);
            assert_eq!(read.len(), tensors.len());
            for ((name, info, bytes), (expected_name, expected)) in read.iter().zip(&tensors) {
                assert_eq!((name, info.dtype.safetensors_name(), &info.shape), (expected_name, expected.dtype, &expected.shape));
                let mut stored = Elements::default();
                stored.reset(info.dtype, info.elements());
                stored.bytes_mut().copy_from_slice(&expected.bytes);
                stored.from_little_endian();
                assert_eq!(bytes, stored.bytes(), "{name}");
            }
        }
    }
}

#[test]
fn a_range_reads_just_its_elements() {
    let folder = Folder::new();
    let checkpoint = Checkpoint::open(&folder.path("")).unwrap();
    let name = "model.embed_tokens.weight";
    let (mut whole, mut part) = (Elements::default(), Elements::I64(vec![1]));
    checkpoint.read(name, 0..192, &mut whole).unwrap();
    checkpoint.read(name, 17..40, &mut part).unwrap();
    assert_eq!(part.bytes(), &whole.bytes()[34..80]);
    checkpoint.read(name, 192..192, &mut part).unwrap();
    assert!(part.is_empty());
    #[expect(clippy::reversed_empty_ranges, reason = "the caller's mistake is the point")]
    for range in [0..193, 193..193, 5..4, 0..usize::MAX] {
        let error = checkpoint.read(name, range, &mut part).unwrap_err().to_string();
        assert!(error.contains("expected a range within 0..192"), "{error}");
    }
    let error = checkpoint.read("no.such", 0..1, &mut part).unwrap_err().to_string();
    assert_eq!(error, "tensor \"no.such\": there is no tensor of this name");
}

#[test]
fn a_non_finite_value_is_an_error_with_its_place() {
    let folder = Folder::new();
    for dtype in ["F64", "F32", "F16", "BF16"] {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let mut tensors = fixture::llama(TINY, dtype, 1);
            let mut values: Vec<f32> = fixture::noise(5).take(8).collect();
            values[6] = value;
            tensors.insert("model.norm.weight".to_owned(), fixture::tensor(dtype, &[8], values.into_iter()));
            fs::write(folder.path("model.safetensors"), fixture::safetensors(&tensors)).unwrap();
            let checkpoint = Checkpoint::open(&folder.path("")).unwrap();
            let mut into = Elements::default();
            checkpoint.read("model.norm.weight", 0..6, &mut into).unwrap();
            let error = checkpoint.read("model.norm.weight", 5..8, &mut into).unwrap_err().to_string();
            let file = folder.path("model.safetensors");
            let expected = format!("{}: tensor \"model.norm.weight\": element 6 is {value}, expected finite numbers", file.display());
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn integers_are_read_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = |dtype, bytes: &[u8], count| fixture::Tensor { dtype, shape: vec![count], bytes: bytes.to_vec() };
    let tensors: Tensors = [
        ("a", tensor("I64", &(-7_i64).to_le_bytes(), 1)),
        ("b", tensor("I32", &[0xff; 8], 2)),
        ("c", tensor("I16", &300_i16.to_le_bytes(), 1)),
        ("d", tensor("BOOL", &[1, 0, 1], 3)),
        ("e", tensor("I8", &[0xff], 1)),
    ]
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .into();
    fs::write(dir.path().join(SINGLE), fixture::safetensors(&tensors)).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    let expected = [
        ("a", Elements::I64(vec![-7])),
        ("b", Elements::I32(vec![-1, -1])),
        ("c", Elements::I16(vec![300])),
        ("d", Elements::Bytes(vec![1, 0, 1])),
        ("e", Elements::Bytes(vec![255])),
    ];
    for (name, expected) in expected {
        let mut into = Elements::default();
        weights.read(name, 0..weights.manifest().get(name).unwrap().elements(), &mut into).unwrap();
        assert_eq!(into, expected);
    }
    assert_eq!(weights.manifest().get("d").unwrap().dtype, Dtype::Bool);
}

#[test]
fn a_file_that_shrinks_while_in_use_says_so() {
    let folder = Folder::new();
    let checkpoint = Checkpoint::open(&folder.path("")).unwrap();
    let file = fs::OpenOptions::new().write(true).open(folder.path("model.safetensors")).unwrap();
    let before = file.metadata().unwrap().len();
    file.set_len(before - 10).unwrap();
    let mut into = Elements::default();
    let error = checkpoint.read("score.weight", 0..8, &mut into).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: tensor \"score.weight\""), "{error}");
    assert!(error.contains(&format!("has {} bytes, but had {before} when it was opened", before - 10)), "{error}");
}

#[test]
fn a_folder_that_is_replaced_while_in_use_is_still_read() {
    let folder = Folder::new();
    let checkpoint = Checkpoint::open(&folder.path("")).unwrap();
    let before = read_all(&checkpoint);
    fs::remove_dir_all(folder.path("")).unwrap();
    assert_eq!(read_all(&checkpoint), before);
}

#[test]
fn every_broken_folder_is_refused_with_what_is_wrong() {
    type Break = fn(&Folder);
    let cases: [(&str, Break, &[&str]); 16] = [
        ("no folder", |f| fs::remove_dir_all(f.path("")).unwrap(), &["there is no such folder"]),
        (
            "a file",
            |f| {
                fs::remove_dir_all(f.path("")).unwrap();
                fs::write(f.0.path().join("rm"), "x").unwrap();
            },
            &["is a file, expected a checkpoint folder"],
        ),
        (
            "an empty folder",
            |f| {
                fs::remove_dir_all(f.path("")).unwrap();
                fs::create_dir(f.path("")).unwrap();
            },
            &["has no config.json; expected a Hugging Face checkpoint folder"],
        ),
        (
            "config.json is a folder",
            |f| {
                fs::remove_file(f.path("config.json")).unwrap();
                fs::create_dir(f.path("config.json")).unwrap();
            },
            &["config.json: is a folder, expected a file"],
        ),
        ("config.json is no JSON", |f| fs::write(f.path("config.json"), "{").unwrap(), &["config.json: is not valid JSON"]),
        (
            "config.json is no UTF-8",
            |f| fs::write(f.path("config.json"), b"{\"a\": \"\xff\"}").unwrap(),
            &["config.json: is not valid JSON"],
        ),
        ("config.json is no object", |f| fs::write(f.path("config.json"), "[]").unwrap(), &["config.json: expected a JSON object"]),
        (
            "config.json is huge",
            |f| fs::OpenOptions::new().write(true).open(f.path("config.json")).unwrap().set_len(MAX_CONFIG_BYTES + 1).unwrap(),
            &["config.json: has 16777217 bytes, expected at most 16777216"],
        ),
        ("no weights", |f| fs::remove_file(f.path(SINGLE)).unwrap(), &["has no weights: expected model.safetensors or"]),
        (
            "other weights",
            |f| fs::rename(f.path(SINGLE), f.path("other.safetensors")).unwrap(),
            &["has no weights", "found [\"other.safetensors\"]"],
        ),
        (
            "pickled weights",
            |f| fs::rename(f.path(SINGLE), f.path("pytorch_model.bin")).unwrap(),
            &["pickled weights (pytorch_model.bin)", "convert them once in Python", "safe_serialization=True"],
        ),
        (
            "weights are a folder",
            |f| {
                fs::remove_file(f.path(SINGLE)).unwrap();
                fs::create_dir(f.path(SINGLE)).unwrap();
            },
            &["model.safetensors: is a folder, expected a file"],
        ),
        ("weights are empty", |f| fs::write(f.path(SINGLE), "").unwrap(), &["model.safetensors: has 0 bytes, expected at least the 8"]),
        (
            "weights are cut short",
            |f| {
                let bytes = fs::read(f.path(SINGLE)).unwrap();
                fs::write(f.path(SINGLE), &bytes[..bytes.len() - 1]).unwrap();
            },
            &["model.safetensors: tensor \"score.weight\": data_offsets", "lie outside of the file's"],
        ),
        (
            "weights are text",
            |f| fs::write(f.path(SINGLE), "<!DOCTYPE html>").unwrap(),
            &["model.safetensors: its header claims", "no safetensors file"],
        ),
        ("no tokenizer", |f| fs::remove_file(f.path("tokenizer.json")).unwrap(), &["tokenizer.json"]),
    ];
    for (case, break_it, expected) in cases {
        let folder = Folder::new();
        break_it(&folder);
        let problem = folder.problem();
        for part in expected {
            assert!(problem.contains(part), "{case}: {problem:?} should say {part:?}");
        }
        assert!(problem.starts_with(&*folder.0.path().to_string_lossy()), "{case}: {problem:?} should begin with a path");
    }
}

#[test]
fn a_broken_index_is_refused_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = fixture::llama(TINY, "BF16", 1);
    fixture::write(dir.path(), &fixture::config(TINY), &tensors, 2).unwrap();
    let index = fs::read_to_string(dir.path().join(INDEX)).unwrap();
    let problem = |text: &str| {
        fs::write(dir.path().join(INDEX), text).unwrap();
        Checkpoint::open(dir.path()).unwrap_err().to_string()
    };
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    assert!(problem(&index.replace(second, "gone.safetensors")).contains("gone.safetensors: there is no such file"));
    assert!(problem(&index.replace(second, first)).contains("which does not hold it"));
    assert!(problem(&index.replace(second, "../x.safetensors")).contains("expected the name of a file in the same folder"));
    assert!(problem("{}").contains("model.safetensors.index.json: cannot be read: missing field"));
}

#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_file_is_refused_without_waiting_for_it() {
    let folder = Folder::new();
    let path = folder.path("model.safetensors");
    fs::remove_file(&path).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    assert!(folder.problem().contains("is not a regular file"));
}
