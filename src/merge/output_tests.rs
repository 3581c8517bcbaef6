use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::*;
use crate::checkpoint::fixture::{self, Size, TINY, Tensors};
use crate::checkpoint::{Checkpoint, Elements, Manifest};
use crate::merge::{FileError, Recipe};

/// Tensors of several blocks.
const WIDE: Size = Size { hidden: 264, intermediate: 512, layers: 1, vocab: 1001 };

fn member(dir: &Path, name: &str, size: Size, dtype: &'static str, seed: u64) -> Tensors {
    let tensors = fixture::llama(size, dtype, seed);
    let mut config = fixture::config(size);
    config["mean"] = json!(0.25);
    config["std"] = json!(1.5);
    config["torch_dtype"] = json!("float64");
    fixture::write(&dir.join(name), &config, &tensors, 2).unwrap();
    tensors
}

fn merged(dir: &Path, recipe: &str) -> Merged {
    Merged::new(Arc::new(MergePlan::open(&Recipe::from_yaml(recipe, dir).unwrap()).unwrap())).unwrap()
}

fn go(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn write(dir: &Path, recipe: &str, name: &str, options: WriteOptions) -> Result<Written, WriteError> {
    write_checkpoint(&merged(dir, recipe), &dir.join(name), options, &mut go)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All files of a folder.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    names(folder).into_iter().map(|name| (name.clone(), std::fs::read(folder.join(name)).unwrap())).collect()
}

#[test]
fn what_is_written_reads_back_as_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        member(dir.path(), &format!("m{seed}"), WIDE, ["BF16", "F32", "F16"][seed as usize], seed);
    }
    for (dtype, max_shard_bytes) in [("float32", 5_000_000_000), ("bfloat16", 300_000), ("float16", 1)] {
        let recipe = format!("members: [m0, m1, m2]\ndtype: {dtype}");
        let written = write(dir.path(), &recipe, dtype, WriteOptions { max_shard_bytes, ..WriteOptions::default() }).unwrap();
        let (source, found) = (merged(dir.path(), &recipe), Checkpoint::open(&dir.path().join(dtype)).unwrap());
        assert_eq!(found.manifest(), source.manifest());
        assert_eq!((written.tensors, written.bytes), (source.manifest().len(), source.plan().merged_bytes()));
        assert_eq!(written.weights_id, source.weights_id().unwrap());
        for (name, info) in source.manifest().iter() {
            let (mut expected, mut read) = (Elements::default(), Elements::default());
            source.read(name, 0..info.elements(), &mut expected).unwrap();
            found.read(name, 0..info.elements(), &mut read).unwrap();
            assert!(expected == read, "{dtype} {name}");
        }
        let indexed = dir.path().join(dtype).join("model.safetensors.index.json").exists();
        assert_eq!((written.files.len() > 1, indexed), (dtype != "float32", dtype != "float32"), "{:?}", written.files);
    }
}

#[test]
fn how_the_head_is_read_travels_with_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        member(dir.path(), name, TINY, "F32", 1);
    }
    std::fs::write(dir.path().join("nested.yaml"), "members: [a, b]\npooling: mean\nhead: {as: logit}").unwrap();
    write(dir.path(), "members: [nested.yaml]", "out", WriteOptions::default()).unwrap();
    let plan = |recipe: &str| MergePlan::open(&Recipe::from_yaml(recipe, dir.path()).unwrap());
    let choice = |recipe: &str| Value::Object(plan(recipe).unwrap().reward().unwrap().architecture.head.choice.to_json());
    let chosen = json!({"head": {"as": "logit"}, "pooling": "mean"});
    let config: Value = serde_json::from_slice(&std::fs::read(dir.path().join("out/config.json")).unwrap()).unwrap();
    assert_eq!(config["warm"], chosen);
    assert_eq!(choice("members: [out]"), chosen);
    assert_eq!(choice("members: [nested.yaml, out]"), chosen);
    let note =
        "the head is read as the config.json of member \"out\" records it (warm: {\"head\":{\"as\":\"logit\"},\"pooling\":\"mean\"})";
    assert!(plan("members: [out]").unwrap().notes().iter().any(|found| found == note), "{:?}", plan("members: [out]").unwrap().notes());
    // What a recipe says wins, each part on its own, and is what is recorded next.
    assert_eq!(choice("members: [out]\npooling: last_token"), json!({"head": {"as": "logit"}, "pooling": "last_token"}));
    assert_eq!(choice("members: [a]"), json!({}));
    // Two that were read in two ways do not average to one that is read in either.
    let problems = plan("members: [out, a]").unwrap_err().problems.join("\n");
    assert!(problems.contains("pooling: expected mean, found last_non_pad"), "{problems}");
    let both = json!({"head": {"as": "logit"}, "pooling": "last_token"});
    assert_eq!(choice("members: [out, a]\npooling: last_token\nhead: {as: logit}"), both);
    let problems = plan("members: [out, a]\npooling: mean").unwrap_err().problems.join("\n");
    assert!(problems.contains("its config.json records `warm: {\"pooling\":\"mean\"}`, expected"), "{problems}");
}

#[test]
fn a_broken_record_of_how_the_head_is_read_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    member(dir.path(), "a", TINY, "F32", 1);
    let mut config = fixture::config(TINY);
    config["warm"] = json!({"pooling": "median"});
    std::fs::write(dir.path().join("a/config.json"), config.to_string()).unwrap();
    let problems = MergePlan::open(&Recipe::from_yaml("members: [a]", dir.path()).unwrap()).unwrap_err().problems.join("\n");
    assert!(problems.contains("warm.pooling: expected one of"), "{problems}");
}

#[test]
fn a_merge_of_one_in_its_own_dtype_is_that_checkpoint_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, name) in [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")] {
        let stored = member(dir.path(), dtype, WIDE, dtype, 7);
        write(dir.path(), &format!("members: [{dtype}]\ndtype: {name}"), name, WriteOptions::default()).unwrap();
        let file = std::fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let entries: Value = serde_json::from_slice(&file[8..header]).unwrap();
        for (name, tensor) in &stored {
            let offset = |end: usize| header + entries[name]["data_offsets"][end].as_u64().unwrap() as usize;
            assert!(file[offset(0)..offset(1)] == tensor.bytes, "{dtype} {name}");
            assert_eq!(entries[name]["dtype"], tensor.dtype);
            assert_eq!(entries[name]["shape"], json!(tensor.shape));
        }
        assert_eq!(entries.as_object().unwrap().len(), stored.len() + 1, "all tensors and __metadata__");
    }
}

#[test]
fn the_folder_says_what_it_is_and_where_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    member(dir.path(), "a", TINY, "F32", 1);
    member(dir.path(), "b", TINY, "F32", 2);
    for name in ["a", "b"] {
        std::fs::write(dir.path().join(name).join("chat_template.jinja"), "{{ messages }}").unwrap();
        std::fs::create_dir(dir.path().join(name).join(TEMPLATES)).unwrap();
        std::fs::write(dir.path().join(name).join(TEMPLATES).join("tool.jinja"), "{{ tools }}").unwrap();
        std::fs::write(dir.path().join(name).join("optimizer.pt"), "no part of a checkpoint").unwrap();
    }
    let recipe = "members: [{path: a, coefficient: 3}, b]\ndtype: bfloat16";
    let written = write(dir.path(), recipe, "out", WriteOptions::default()).unwrap();
    let out = dir.path().join("out");
    let expected =
        [TEMPLATES, "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "warm.json"];
    assert_eq!(names(&out), expected);
    let json = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(out.join(name)).unwrap()).unwrap() };
    let config = json("config.json");
    assert_eq!((&config["dtype"], &config["torch_dtype"]), (&json!("bfloat16"), &json!("bfloat16")));
    assert!(config.get("mean").is_none() && config.get("std").is_none(), "statistics of the first member alone");
    assert_eq!(config["architectures"], json!(["LlamaForSequenceClassification"]));

    let record = json("warm.json");
    let hashes = merged(dir.path(), recipe).member_hashes().unwrap();
    assert_eq!(record["weights_id"], json!(written.weights_id.to_string()));
    assert_eq!(record["inputs"][0]["content_hash"], json!(blake3::Hash::from(hashes[0]).to_hex().as_str()));
    assert_eq!((&record["inputs"][0]["coefficient"], &record["inputs"][1]["name"]), (&json!(0.75), &json!("b")));
    assert_eq!(record["method"], "linear");
    // The recipe as it is recorded reads as the recipe.
    let again = Recipe::from_yaml(&record["recipe"].to_string(), Path::new("/elsewhere")).unwrap();
    assert_eq!(again, Recipe::from_yaml(recipe, dir.path()).unwrap());

    let file = std::fs::read(out.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let metadata = serde_json::from_slice::<Value>(&file[8..header]).unwrap()["__metadata__"].clone();
    assert_eq!(metadata["format"], "pt");
    assert_eq!(metadata["warm_weights_id"], record["weights_id"]);
    assert_eq!(metadata["warm_recipe"], record["recipe"].to_string());
    assert_eq!(metadata["warm_inputs"], record["inputs"].to_string());
    assert_eq!(metadata["warm_version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_merge_of_adapters_has_their_text_or_their_bases() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // The base is a language model.
    let mut base = fixture::config(TINY);
    base["architectures"] = json!(["LlamaForCausalLM"]);
    base.as_object_mut().unwrap().remove("id2label");
    fixture::write(&at("base"), &base, &fixture::language_model(TINY, "BF16", 1), 1).unwrap();
    std::fs::write(at("base").join("chat_template.jinja"), "{{ messages }}").unwrap();
    for (name, seed) in [("rm-0", 1), ("rm-1", 2)] {
        let config = json!({
            "peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
            "modules_to_save": ["score"],
        });
        fixture::write_lora(&at(name), &config, &fixture::lora(TINY, "F32", 2, &["self_attn.q_proj"], seed)).unwrap();
    }
    let check = |out: &str, template: &str| {
        let recipe = "members: [rm-0, rm-1]";
        write(dir.path(), recipe, out, WriteOptions::default()).unwrap();
        assert_eq!(std::fs::read_to_string(at(out).join("chat_template.jinja")).unwrap(), template);
        assert_eq!(std::fs::read(at(out).join("tokenizer.json")).unwrap(), std::fs::read(at("base/tokenizer.json")).unwrap());
        let found = Checkpoint::open(&at(out)).unwrap();
        assert_eq!(found.config()["architectures"], json!(["LlamaForSequenceClassification"]));
        assert_eq!(found.config()["id2label"], json!({"0": "LABEL_0"}));
        let merged = merged(dir.path(), recipe);
        assert_eq!(found.manifest(), merged.manifest());
        let record: Value = serde_json::from_slice(&std::fs::read(at(out).join("warm.json")).unwrap()).unwrap();
        assert_eq!(record["inputs"][1]["base"], json!(std::fs::canonicalize(at("base")).unwrap()));
        let hash = blake3::Hash::from(merged.member_hashes().unwrap()[1]).to_hex();
        assert_eq!(record["inputs"][1]["content_hash"], json!(hash.as_str()));
    };
    check("from-base", "{{ messages }}");
    // A tokenizer that was saved with the adapters counts more, and its template with it.
    for name in ["rm-0", "rm-1"] {
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(at("base").join(file), at(name).join(file)).unwrap();
        }
        std::fs::write(at(name).join("chat_template.jinja"), "{{ messages[1:] }}").unwrap();
    }
    check("from-adapter", "{{ messages[1:] }}");
    let refused = write(dir.path(), "members: [rm-0, rm-1]", "base", WriteOptions { overwrite: true, ..WriteOptions::default() });
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("which a merge to this place would remove"), "{refused}");
}

#[test]
fn a_merge_of_merges_records_what_came_before() {
    let dir = tempfile::tempdir().unwrap();
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] {
        member(dir.path(), name, TINY, "F32", seed);
    }
    let first = write(dir.path(), "members: [a, b]", "first", WriteOptions::default()).unwrap();
    let second = write(dir.path(), "members: [first, c]", "second", WriteOptions::default()).unwrap();
    write(dir.path(), "members: [second, first]", "third", WriteOptions::default()).unwrap();
    let record: Value = serde_json::from_slice(&std::fs::read(dir.path().join("third/warm.json")).unwrap()).unwrap();
    let ids: Vec<_> = record["chain"].as_array().unwrap().iter().map(|record| record["weights_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, [first.weights_id.to_string(), second.weights_id.to_string()]);
    assert_eq!(record["inputs"][0]["weights_id"], json!(second.weights_id.to_string()));
    assert_eq!(record["chain"][1]["inputs"][1]["name"], "c");
}

#[test]
fn a_recipe_within_is_recorded_as_the_merge_that_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for (name, seed) in [("init", 0), ("a", 1), ("b", 2), ("c", 3)] {
        member(dir.path(), name, TINY, "F32", seed);
    }
    let inner = "members: [a, b]\nmethod: slerp\ninit: init";
    std::fs::write(dir.path().join("inner.yaml"), inner).unwrap();
    write(dir.path(), "members: [inner.yaml, c]\ninit: init\nliti: {eta: 0.5}", "out", WriteOptions::default()).unwrap();
    let inner = write(dir.path(), inner, "inner", WriteOptions::default()).unwrap().weights_id.to_string();
    let record: Value = serde_json::from_slice(&std::fs::read(dir.path().join("out/warm.json")).unwrap()).unwrap();
    assert_eq!(record["inputs"][0]["weights_id"], json!(inner));
    assert_eq!(record["inputs"][1].get("weights_id"), None);
    assert_eq!((&record["init"]["name"], record["init"]["content_hash"].as_str().unwrap().len()), (&json!("init"), 64));
    assert_ne!(record["init"]["content_hash"], json!("0".repeat(64)));
    assert_eq!(record["chain"].as_array().unwrap().len(), 1);
    assert_eq!((&record["chain"][0]["weights_id"], &record["chain"][0]["inputs"][1]["name"]), (&json!(inner), &json!("b")));
}

#[test]
fn threads_change_no_byte_of_any_file() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        member(dir.path(), &format!("m{seed}"), WIDE, "BF16", seed);
    }
    let written = [1, 2, 5].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let name = format!("out-{threads}");
        let options = WriteOptions { max_shard_bytes: 500_000, ..WriteOptions::default() };
        pool.install(|| write(dir.path(), "members: [m0, m1, m2]\ndtype: bfloat16", &name, options)).unwrap();
        content(&dir.path().join(name))
    });
    assert!(written[0] == written[1] && written[1] == written[2]);
}

/// The first reads of a source, then an error.
struct Failing<'a>(&'a Merged, AtomicUsize);

impl TensorSource for Failing<'_> {
    fn manifest(&self) -> &Manifest {
        self.0.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        if self.1.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(SourceError::Read { file: "m".to_owned(), tensor: name.to_owned(), problem: "vanished".to_owned() });
        }
        self.0.read(name, range, into)
    }
}

#[test]
fn an_error_in_the_middle_leaves_nothing_and_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    member(dir.path(), "a", TINY, "F32", 1);
    let merged = merged(dir.path(), "members: [a]");
    let out = dir.path().join("out");
    let write = |fails_at, overwrite| {
        let source = Failing(&merged, AtomicUsize::new(fails_at));
        let draft = Provenance::draft(merged.plan());
        let job = Job { source: &source, plan: merged.plan(), text_folder: &dir.path().join("a"), provenance: &mut |_| Ok(draft.clone()) };
        job.write(&out, WriteOptions { overwrite, ..WriteOptions::default() }, &mut go)
    };
    let error = write(10, false).unwrap_err();
    assert_eq!(
        error,
        WriteError::Source(SourceError::Read { file: "m".to_owned(), tensor: error_tensor(&error), problem: "vanished".to_owned() })
    );
    assert_eq!(names(dir.path()), ["a"]);
    write(1000, false).unwrap();
    let before = content(&out);
    write(10, true).unwrap_err();
    assert!(content(&out) == before, "what stood there stays as it was");
    assert_eq!(names(dir.path()), ["a", "out"]);
}

fn error_tensor(error: &WriteError) -> String {
    match error {
        WriteError::Source(SourceError::Read { tensor, .. }) => tensor.clone(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_place_that_is_taken_is_left_alone_unless_told() {
    let dir = tempfile::tempdir().unwrap();
    member(dir.path(), "a", TINY, "F32", 1);
    member(dir.path(), "b", TINY, "F32", 2);
    write(dir.path(), "members: [a]", "out", WriteOptions::default()).unwrap();
    let before = content(&dir.path().join("out"));
    let error = write(dir.path(), "members: [b]", "out", WriteOptions::default()).unwrap_err().to_string();
    assert!(error.contains("stands there already"), "{error}");
    assert!(content(&dir.path().join("out")) == before);
    let overwrite = WriteOptions { overwrite: true, ..WriteOptions::default() };
    write(dir.path(), "members: [b]", "out", overwrite).unwrap();
    assert!(content(&dir.path().join("out")) != before);
    for (recipe, place) in [("members: [a, b]", "b"), ("members: [a]\ninit: b", "b"), ("members: [a]", ".")] {
        let error = write(dir.path(), recipe, place, overwrite).unwrap_err().to_string();
        assert!(error.contains("a merge to this place would remove"), "{error}");
    }
    assert_eq!(names(dir.path()), ["a", "b", "out"]);
}

#[test]
fn a_tokenizer_that_changes_after_the_plan_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    member(dir.path(), "a", TINY, "F32", 1);
    let merged = merged(dir.path(), "members: [a]");
    let special = json!({"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"});
    std::fs::write(dir.path().join("a/tokenizer_config.json"), special.to_string()).unwrap();
    let error = write_checkpoint(&merged, &dir.path().join("out"), WriteOptions::default(), &mut go).unwrap_err().to_string();
    assert!(error.contains("have changed since the plan was made"), "{error}");
    assert_eq!(names(dir.path()), ["a"]);
}

#[test]
fn a_place_without_a_parent_is_an_error_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    member(dir.path(), "a", TINY, "F32", 1);
    let error = write(dir.path(), "members: [a]", "no/where", WriteOptions::default()).unwrap_err();
    let place = dir.path().join("no").display().to_string();
    assert!(matches!(&error, WriteError::File(FileError { file, .. }) if *file == place), "{error}");
}
