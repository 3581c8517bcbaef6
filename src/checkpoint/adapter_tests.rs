use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::fixture::{self, TINY, Tensors, noise};
use crate::checkpoint::reader::Weights;
use crate::checkpoint::{CheckpointError, Folder, TensorInfo};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

fn whole(source: &dyn TensorSource, name: &str) -> Vec<f64> {
    let mut elements = Elements::default();
    source.read(name, 0..source.manifest().get(name).unwrap().elements(), &mut elements).unwrap();
    let mut wide = vec![f64::NAN; elements.len()];
    elements.widen(0..elements.len(), &mut wide);
    wide
}

#[test]
fn every_kind_of_adapter_gives_the_weights_that_peft_makes_of_it() {
    let mut cases: Vec<PathBuf> = fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.join("merged.safetensors").exists() && !case.ends_with("unsaved-biases"));
    assert!(cases.len() >= 19, "{cases:?}");
    for case in cases {
        let folder = Folder::open(&case, None).unwrap();
        assert_eq!(folder.lost_head, None);
        let merged = Weights::open_file(case.join("merged.safetensors")).unwrap();
        for (name, info) in merged.manifest().iter() {
            let found = folder.weights.manifest().get(name).unwrap_or_else(|| panic!("{}: {name}", case.display()));
            assert_eq!(found.shape, info.shape, "{}: {name}", case.display());
            let (found, expected) = (whole(&*folder.weights, name), whole(&merged, name));
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let deviation = (found - expected).abs() / expected.abs().max(1.0);
                assert!(deviation < 1e-6, "{}: {name} {index}: {found} against {expected}", case.display());
            }
        }
    }
}

#[test]
fn an_adapter_makes_its_base_a_sequence_classifier() {
    let config = |case: &str| Folder::open(&fixtures().join(case), None).unwrap().config;
    let plain = config("plain");
    assert_eq!(plain["architectures"], json!(["LlamaForSequenceClassification"]));
    assert_eq!((&plain["id2label"], &plain["label2id"]), (&json!({"0": "LABEL_0"}), &json!({"LABEL_0": 0})));
    assert_eq!(config("encoder")["architectures"], json!(["BertForSequenceClassification"]));
    assert_eq!(config("columns")["architectures"], json!(["GPT2ForSequenceClassification"]));
    // A head that shared the embedding's weights stays what it was, apart from what the adapter makes of the embedding.
    let tied = Folder::open(&fixtures().join("tied-embedding"), None).unwrap();
    let base = Weights::open(&fixtures().join("base/qwen2")).unwrap();
    assert_eq!(tied.config["tie_word_embeddings"], json!(false));
    assert_eq!(whole(&*tied.weights, "lm_head.weight"), whole(&base, "model.embed_tokens.weight"));
    assert_ne!(whole(&*tied.weights, "lm_head.weight"), whole(&*tied.weights, "model.embed_tokens.weight"));
    assert_eq!(config("factor-biases")["tie_word_embeddings"], json!(true));
}

/// A Llama base in `base` and an adapter beside it, rank 2 on two matrices of every layer.
struct Pair {
    dir: tempfile::TempDir,
    config: Value,
    tensors: Tensors,
}

impl Pair {
    fn new(dtype: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut base = fixture::llama(TINY, dtype, 1);
        base.remove("score.weight");
        base.insert(
            "lm_head.weight".to_owned(),
            fixture::tensor(dtype, &[TINY.vocab, TINY.hidden], noise(9).take(TINY.vocab * TINY.hidden)),
        );
        let mut config = fixture::config(TINY);
        config["architectures"] = json!(["LlamaForCausalLM"]);
        fixture::write(&dir.path().join("base"), &config, &base, 2).unwrap();
        let config = json!({
            "peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS", "bias": "none",
        });
        let pair = Self { dir, config, tensors: fixture::lora(TINY, "F32", 2, &["self_attn.q_proj", "mlp.down_proj"], 7) };
        pair.write();
        pair
    }

    fn adapter(&self) -> PathBuf {
        self.dir.path().join("adapter")
    }

    fn write(&self) {
        fixture::write_lora(&self.adapter(), &self.config, &self.tensors).unwrap();
    }

    fn open(&self) -> Result<Folder, CheckpointError> {
        Folder::open(&self.adapter(), None)
    }

    /// What is said of the pair after a change.
    fn problem(change: impl FnOnce(&mut Self)) -> String {
        let mut pair = Self::new("F32");
        change(&mut pair);
        pair.write();
        pair.open().unwrap_err().to_string().replace(&*pair.dir.path().to_string_lossy(), "")
    }
}

const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";
const A: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight";

#[test]
fn an_adapted_matrix_is_the_base_plus_the_scaled_product_in_float64() {
    for dtype in ["F32", "BF16", "F16", "F64"] {
        let pair = Pair::new(dtype);
        let folder = pair.open().unwrap();
        let base = Weights::open(&pair.dir.path().join("base")).unwrap();
        let stored = Weights::open_file(pair.adapter().join(WEIGHTS)).unwrap();
        let (w, a, b) = (whole(&base, QUERY), whole(&stored, A), whole(&stored, B));
        let expected: Vec<f64> =
            (0..64).map(|index| w[index] + 1.5 * (0..2).fold(0.0, |sum, k| sum + b[index / 8 * 2 + k] * a[k * 8 + index % 8])).collect();
        assert_eq!(whole(&*folder.weights, QUERY), expected, "{dtype}");
        assert_eq!(folder.weights.manifest().get(QUERY), Some(&TensorInfo { dtype: Dtype::F64, shape: vec![8, 8] }));
        // What is not adapted is the base's, in the dtype of the base.
        let key = "model.layers.1.self_attn.k_proj.weight";
        assert_eq!(folder.weights.manifest().get(key), base.manifest().get(key));
        assert_eq!(whole(&*folder.weights, key), whole(&base, key));
        assert_eq!(whole(&*folder.weights, "score.weight"), whole(&stored, "base_model.model.score.weight"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_range_is_that_part_of_the_whole_bit_for_bit(begin in 0_usize..200, count in 0_usize..200, which in 0_usize..4) {
        type Case = (Arc<dyn TensorSource>, String, Vec<u64>);
        static CASES: std::sync::LazyLock<Vec<Case>> = std::sync::LazyLock::new(|| {
            [("all-linear", "model.layers.0.mlp.down_proj.weight"), ("embedding", "model.embed_tokens.weight"),
             ("columns", "transformer.h.1.mlp.c_fc.weight"), ("factor-biases", "model.layers.0.self_attn.q_proj.bias")]
                .map(|(case, name)| {
                    let source = Folder::open(&fixtures().join(case), None).unwrap().weights;
                    let bits = whole(&*source, name).iter().map(|value| value.to_bits()).collect();
                    (source, name.to_owned(), bits)
                }).into()
        });
        let (source, name, bits) = &CASES[which];
        let (begin, end) = (begin.min(bits.len()), bits.len().min(begin + count));
        let range = begin..end.max(begin);
        let mut elements = Elements::default();
        source.read(name, range.clone(), &mut elements).unwrap();
        let Elements::F64(values) = elements else { panic!("{elements:?}") };
        prop_assert_eq!(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), &bits[range]);
    }
}

#[test]
fn a_base_may_be_given_in_place_of_the_one_that_is_named() {
    let mut pair = Pair::new("F32");
    pair.config["base_model_name_or_path"] = "meta/some-model".into();
    pair.write();
    let error = pair.open().unwrap_err().to_string();
    assert!(
        error.ends_with(
            "adapter_config.json: base_model_name_or_path: \"meta/some-model\" is a model of a hub, and only what a recipe names is \
             fetched; give its base in the recipe ({path: ..., base: ...}; a folder, or hf:org/name@revision)"
        ),
        "{error}"
    );
    let base = pair.dir.path().join("base");
    assert_eq!(
        Folder::open(&pair.adapter(), Some(&base)).unwrap().weights.manifest().len(),
        Pair::new("F32").open().unwrap().weights.manifest().len()
    );
    for (named, expected) in [
        (json!("/models/there/is/none"), "base_model_name_or_path: there is no folder \"/models/there/is/none\"; give"),
        (json!("../nowhere"), "/adapter/../nowhere\"; give its base in the recipe"),
        (Value::Null, "base_model_name_or_path: expected the folder of a checkpoint, found none; give"),
        (json!(7), "base_model_name_or_path: expected text, found 7"),
    ] {
        let problem = Pair::problem(|pair| pair.config["base_model_name_or_path"] = named);
        assert!(problem.contains(expected), "{problem:?} should say {expected:?}");
    }
    let error = Folder::open(&base, Some(&pair.adapter())).unwrap_err().to_string();
    assert!(error.contains("base: is no LoRA adapter, so it stands on no base; found base"), "{error}");
    let error = Folder::open(&pair.adapter(), Some(&pair.adapter())).unwrap_err().to_string();
    assert!(error.ends_with("adapter: is a LoRA adapter, expected a checkpoint of its own"), "{error}");
}

#[test]
fn the_tokenizer_is_the_adapters_where_it_has_one() {
    let pair = Pair::new("F32");
    let of_base = pair.open().unwrap().text.unwrap().hash();
    let mut tokenizer = fixture::tokenizer();
    tokenizer["model"]["vocab"]["a"] = 5.into();
    tokenizer["model"]["vocab"]["b"] = 4.into();
    fs::write(pair.adapter().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    assert_ne!(pair.open().unwrap().text.unwrap().hash(), of_base);
}

#[test]
fn a_pad_token_that_only_the_tokenizer_knows_is_noted_and_not_used() {
    let pair = Pair::new("F32");
    assert_eq!(pair.open().unwrap().notes, [""; 0]);
    let path = pair.dir.path().join("base/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("pad_token_id");
    fs::write(&path, config.to_string()).unwrap();
    let folder = pair.open().unwrap();
    assert_eq!(folder.architecture.unwrap().pad_token_id, None);
    assert!(
        folder.notes[0].starts_with("the tokenizer pads with \"<pad>\", but config.json of the adapter's base has no pad_token_id"),
        "{:?}",
        folder.notes
    );
}

#[test]
fn a_resized_embedding_and_a_wider_head_change_the_configuration() {
    let mut pair = Pair::new("F32");
    pair.tensors.insert("base_model.model.model.embed_tokens.weight".to_owned(), fixture::tensor("F32", &[26, 8], noise(3).take(208)));
    pair.tensors.insert("base_model.model.score.weight".to_owned(), fixture::tensor("F32", &[3, 8], noise(3).take(24)));
    pair.write();
    let folder = pair.open().unwrap();
    let architecture = folder.architecture.unwrap();
    assert_eq!((architecture.vocab_size, architecture.labels), (26, Some(3)));
    assert_eq!(folder.config["id2label"], json!({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}));
    let problem = Pair::problem(|pair| {
        pair.tensors.insert("base_model.model.model.embed_tokens.weight".to_owned(), fixture::tensor("F32", &[24, 9], noise(3).take(216)));
    });
    assert!(problem.contains("tensor \"base_model.model.model.embed_tokens.weight\": expected shape [24, 8] as tensor \"model.embed_tokens.weight\" of the base /adapter/../base, found [24, 9]"), "{problem}");
}

#[test]
fn an_adapter_without_its_head_says_so_or_takes_the_bases() {
    let mut pair = Pair::new("F32");
    pair.tensors.remove("base_model.model.score.weight");
    pair.write();
    let headless = pair.open().unwrap().lost_head.unwrap();
    assert!(headless.starts_with("the adapter was saved without its reward head, and its base "), "{headless}");
    assert!(headless.contains("modules_to_save: [\"score\"]"), "{headless}");
    // The base is a reward model already.
    let mut config = fixture::config(TINY);
    config["id2label"] = json!({"0": "reward"});
    fixture::write(&pair.dir.path().join("base"), &config, &fixture::llama(TINY, "F32", 1), 2).unwrap();
    let folder = pair.open().unwrap();
    assert_eq!(folder.lost_head, None);
    assert!(
        folder.notes[0].starts_with("the adapter was saved without a reward head; that of its base ")
            && folder.notes[0].ends_with("is used (score.weight)"),
        "{:?}",
        folder.notes
    );
    assert_eq!(folder.config["id2label"], json!({"0": "reward"}));
}

#[test]
fn whatever_does_not_fit_is_told_with_file_tensor_expected_and_found() {
    type Change = fn(&mut Pair);
    let cases: [(&str, Change, &[&str]); 20] = [
        (
            "another rank",
            |p| p.config["r"] = 3.into(),
            &[
                "/adapter/adapter_model.safetensors: tensor \"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight\": expected shape [3, 16] (rank 3 by adapter_config.json, and \"model.layers.0.mlp.down_proj.weight\" of the base /adapter/../base is F32 [8, 16]), found [2, 16]",
            ],
        ),
        ("rank 0", |p| p.config["r"] = 0.into(), &["/adapter/adapter_config.json: r: expected a rank from 1 to 4096, found 0"]),
        ("a huge rank", |p| p.config["r"] = json!(u64::MAX), &["r: expected a rank from 1 to 4096, found 18446744073709551615"]),
        (
            "no A",
            |p| _ = p.tensors.remove(A),
            &[
                "tensor \"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight\": expected the other factor lora_A of its module, found none",
            ],
        ),
        ("no B", |p| _ = p.tensors.remove(B), &["q_proj.lora_A.weight\": expected the other factor lora_B of its module, found none"]),
        (
            "neither",
            |p| {
                p.tensors.remove(A);
                p.tensors.remove(B);
            },
            &[
                "target_modules chooses 1 matrices of the base that have no factors in the file; expected lora_A and lora_B for \"model.layers.1.self_attn.q_proj.weight\"",
            ],
        ),
        (
            "a wrong width",
            |p| {
                let t = fixture::tensor("F32", &[2, 9], noise(1).take(18));
                p.tensors.insert(A.to_owned(), t);
            },
            &["lora_A.weight\": expected shape [2, 8]", "found [2, 9]"],
        ),
        (
            "three dimensions",
            |p| {
                let t = fixture::tensor("F32", &[2, 8, 1], noise(1).take(16));
                p.tensors.insert(A.to_owned(), t);
            },
            &["expected shape [2, 8]", "found [2, 8, 1]"],
        ),
        (
            "integers",
            |p| {
                let t = fixture::Tensor { dtype: "I32", shape: vec![2, 8], bytes: vec![0; 64] };
                p.tensors.insert(A.to_owned(), t);
            },
            &["lora_A.weight\": expected floating-point numbers, found I32"],
        ),
        (
            "another base",
            |p| {
                let t = p.tensors.remove(A).unwrap();
                p.tensors.insert(A.replace("layers.1", "layers.7"), t);
                let t = p.tensors.remove(B).unwrap();
                p.tensors.insert(B.replace("layers.1", "layers.7"), t);
            },
            &[
                "expected tensor \"model.layers.7.self_attn.q_proj.weight\" in the base /adapter/../base, which it adapts, found none: another base?",
            ],
        ),
        (
            "a module that is not chosen",
            |p| p.config["target_modules"] = json!(["down_proj"]),
            &[
                "expected no factors of module \"model.layers.0.self_attn.q_proj\", which target_modules",
                "does not choose: PEFT would not apply them",
            ],
        ),
        (
            "a module that is chosen",
            |p| p.config["target_modules"] = json!(["down_proj", "q_proj", "v_proj"]),
            &[
                "target_modules chooses 2 matrices of the base that have no factors in the file; expected lora_A and lora_B for \"model.layers.0.self_attn.v_proj.weight\"",
            ],
        ),
        (
            "a saved module that is lost",
            |p| p.config["modules_to_save"] = json!(["score", "embed_tokens"]),
            &["modules_to_save names \"embed_tokens\", so \"model.embed_tokens.weight\" was trained; expected it in the file, found none"],
        ),
        (
            "DoRA by its tensors",
            |p| {
                let t = fixture::tensor("F32", &[8], noise(1).take(8));
                p.tensors.insert(A.replace("lora_A.weight", "lora_magnitude_vector"), t);
            },
            &["lora_magnitude_vector\": a magnitude of DoRA, which is not supported"],
        ),
        (
            "DoRA by its configuration",
            |p| p.config["use_dora"] = true.into(),
            &["/adapter/adapter_config.json: use_dora: not supported: DoRA scales"],
        ),
        ("another kind", |p| p.config["peft_type"] = "IA3".into(), &["peft_type: expected \"LORA\", found \"IA3\""]),
        (
            "a bias of a factor",
            |p| {
                let t = fixture::tensor("F32", &[8], noise(1).take(8));
                p.tensors.insert(B.replace("weight", "bias"), t);
            },
            &["lora_B.bias\": expected no such tensor, as lora_bias is false"],
        ),
        (
            "a bias without a base",
            |p| {
                p.config["lora_bias"] = true.into();
                p.config["target_modules"] = json!(["q_proj"]);
                p.tensors.retain(|name, _| !name.contains("down_proj"));
                for layer in ["0", "1"] {
                    let t = fixture::tensor("F32", &[8], noise(1).take(8));
                    p.tensors.insert(B.replace("weight", "bias").replace("layers.1", &format!("layers.{layer}")), t);
                }
            },
            &["lora_B.bias\": expected tensor \"model.layers.0.self_attn.q_proj.bias\" in the base", "to which lora_bias adds, found none"],
        ),
        (
            "lora_bias without it",
            |p| p.config["lora_bias"] = true.into(),
            &["lora_B.weight\": expected a bias beside it, as lora_bias says, found none"],
        ),
        ("no tensors", |p| p.tensors.clear(), &["target_modules chooses 4 matrices"]),
    ];
    for (case, change, expected) in cases {
        let problem = Pair::problem(change);
        for part in expected {
            assert!(problem.contains(part), "{case}: {problem:?} should say {part:?}");
        }
    }
}

#[test]
fn trained_biases_that_were_not_saved_are_missed() {
    let error = Folder::open(&fixtures().join("unsaved-biases"), None).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "bias is \"lora_only\" in adapter_config.json, so 4 biases of the base were trained; expected them in the file, found none of \
         \"model.layers.0.self_attn.q_proj.bias\" (PEFT before 0.18 did not save them with lora_only)"
        ),
        "{error}"
    );
}

#[test]
fn folders_that_are_no_adapter_say_what_they_are() {
    let pair = Pair::new("F32");
    let problem = |message: &str| {
        let error = pair.open().unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} should say {message:?}");
    };
    // The configuration of the base beside the adapter is none of its business.
    fs::write(pair.adapter().join("config.json"), "{}").unwrap();
    pair.open().unwrap();
    fs::write(pair.adapter().join("model.safetensors"), "").unwrap();
    problem("adapter: holds both a LoRA adapter (adapter_config.json) and whole weights (model.safetensors), expected one of them");
    fs::remove_file(pair.adapter().join("model.safetensors")).unwrap();
    fs::write(pair.dir.path().join("base/config.json"), json!({"model_type": "llama", "quantization_config": {"bits": 4}}).to_string())
        .unwrap();
    problem("base/config.json: quantization_config: the base of an adapter is quantised");
    fs::rename(pair.adapter().join(WEIGHTS), pair.adapter().join("adapter_model.bin")).unwrap();
    problem("adapter: holds pickled weights (adapter_model.bin), which are never loaded");
    fs::remove_file(pair.adapter().join("adapter_model.bin")).unwrap();
    problem("adapter: has no weights of the adapter: expected adapter_model.safetensors");
    fs::write(pair.adapter().join(CONFIG), "{").unwrap();
    problem("adapter/adapter_config.json: is not valid JSON");
}

#[test]
fn numbers_that_are_none_are_told_with_their_file_and_place() {
    let mut pair = Pair::new("F32");
    let mut numbers: Vec<f32> = noise(1).take(16).collect();
    numbers[11] = f32::NAN;
    pair.tensors.insert(A.to_owned(), fixture::tensor("F32", &[2, 8], numbers.into_iter()));
    pair.write();
    let error = pair.open().unwrap().weights.read(QUERY, 3..9, &mut Elements::default()).unwrap_err().to_string();
    let file = pair.adapter().join(WEIGHTS);
    assert_eq!(error, format!("{}: tensor {A:?}: element 11 is NaN, expected finite numbers", file.display()));
    // Products of float64 may be infinite although their factors are not.
    let huge = |shape: &[usize]| fixture::Tensor { dtype: "F64", shape: shape.to_vec(), bytes: [1e200_f64.to_le_bytes(); 16].concat() };
    pair.tensors.insert(A.to_owned(), huge(&[2, 8]));
    pair.tensors.insert(B.to_owned(), huge(&[8, 2]));
    pair.write();
    let error = pair.open().unwrap().weights.read(QUERY, 3..9, &mut Elements::default()).unwrap_err().to_string();
    assert_eq!(error, format!("{}: tensor {QUERY:?}: element 3 is inf, expected finite numbers", pair.adapter().display()));
}

#[test]
fn an_adapter_whose_file_shrinks_or_whose_base_does_says_which() {
    let pair = Pair::new("F32");
    let folder = pair.open().unwrap();
    let file = pair.dir.path().join("base/model-00001-of-00002.safetensors");
    let shrink = |path: &Path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(100).unwrap();
    shrink(&file);
    shrink(&pair.dir.path().join("base/model-00002-of-00002.safetensors"));
    let error = folder.weights.read(QUERY, 0..64, &mut Elements::default()).unwrap_err().to_string();
    assert!(error.contains(".safetensors: tensor \"model.layers.1.self_attn.q_proj.weight\": the file has 100 bytes"), "{error}");
    shrink(&pair.adapter().join(WEIGHTS));
    let error = folder.weights.read("score.weight", 0..8, &mut Elements::default()).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors: tensor \"base_model.model.score.weight\": the file has 100 bytes"), "{error}");
}

#[test]
fn a_base_without_a_prefix_and_an_adapter_without_one_are_the_same_model() {
    let pair = Pair::new("BF16");
    let expected = whole(&*pair.open().unwrap().weights, QUERY);
    let mut bare = pair.tensors.clone();
    bare = bare.into_iter().map(|(name, tensor)| (name.replace("base_model.model.model.", "base_model.model."), tensor)).collect();
    fs::write(pair.adapter().join(WEIGHTS), fixture::safetensors(&bare)).unwrap();
    assert_eq!(whole(&*pair.open().unwrap().weights, QUERY), expected);
    let tensors: Tensors = fixture::llama(TINY, "BF16", 1).into_iter().map(|(name, tensor)| (name.replace("model.", ""), tensor)).collect();
    let base = pair.dir.path().join("base");
    fs::remove_dir_all(&base).unwrap();
    fixture::write(&base, &fixture::config(TINY), &tensors, 1).unwrap();
    assert_eq!(whole(&*pair.open().unwrap().weights, QUERY), expected);
    // An error names the tensor as the file does.
    fs::OpenOptions::new().write(true).open(base.join("model.safetensors")).unwrap().set_len(100).unwrap();
    let folder = Folder::open(&base, None);
    assert!(folder.is_err());
}
