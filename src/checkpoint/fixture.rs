//! Small but whole checkpoint folders for tests and benches: a Llama reward model of any size, sharded as asked. It names
//! nothing of this crate, so that a bench can include it too.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Value, json};

/// The size of a model.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub vocab: usize,
}

pub const TINY: Size = Size { hidden: 8, intermediate: 16, layers: 2, vocab: 24 };

/// A tensor: dtype as the header spells it, shape, stored bytes.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

/// The bytes of a safetensors file.
pub fn safetensors<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let end = data.len() + tensor.bytes.len();
        header.insert(name.clone(), json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [data.len(), end]}));
        data.extend_from_slice(&tensor.bytes);
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(text.as_bytes());
    file.append(&mut data);
    file
}

/// Stores numbers in a dtype.
pub fn tensor(dtype: &'static str, shape: &[usize], values: impl Iterator<Item = f32>) -> Tensor {
    let bytes = match dtype {
        "F64" => values.flat_map(|x| f64::from(x).to_le_bytes()).collect(),
        "F32" => values.flat_map(f32::to_le_bytes).collect(),
        "F16" => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        "BF16" => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        other => panic!("no such dtype here: {other}"),
    };
    Tensor { dtype, shape: shape.to_vec(), bytes }
}

/// Numbers between -0.125 and 0.125 that look random and are the same for the same seed.
pub fn noise(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 26) as f32 - 0.125
    })
}

/// The tensors of a Llama reward model with two query heads.
pub fn llama(size: Size, dtype: &'static str, seed: u64) -> Tensors {
    let Size { hidden, intermediate, layers, vocab } = size;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("score.weight".to_owned(), vec![1, hidden]),
    ];
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        shapes.extend(["q", "k", "v", "o"].map(|part| (name(&format!("self_attn.{part}_proj")), vec![hidden, hidden])));
        shapes.extend(["gate", "up"].map(|part| (name(&format!("mlp.{part}_proj")), vec![intermediate, hidden])));
        shapes.push((name("mlp.down_proj"), vec![hidden, intermediate]));
        shapes.extend(["input_layernorm", "post_attention_layernorm"].map(|part| (name(part), vec![hidden])));
    }
    let mut values = noise(seed);
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let tensor = tensor(dtype, &shape, values.by_ref().take(count));
            (name, tensor)
        })
        .collect()
}

/// The tensors of a language model in place of a reward model's: another head.
pub fn language_model(size: Size, dtype: &'static str, seed: u64) -> Tensors {
    let mut tensors = llama(size, dtype, seed);
    tensors.remove("score.weight");
    let count = size.vocab * size.hidden;
    tensors.insert("lm_head.weight".to_owned(), tensor(dtype, &[size.vocab, size.hidden], noise(seed + 1000).take(count)));
    tensors
}

/// What PEFT saves of an adapter of [`llama`]: factors of some matrices of every layer, and a head.
pub fn lora(size: Size, dtype: &'static str, rank: usize, modules: &[&str], seed: u64) -> Tensors {
    let Size { hidden, intermediate, layers, .. } = size;
    let mut shapes = vec![("base_model.model.score.weight".to_owned(), vec![1, hidden])];
    for layer in 0..layers {
        for module in modules {
            let (outputs, inputs) = match *module {
                "mlp.gate_proj" | "mlp.up_proj" => (intermediate, hidden),
                "mlp.down_proj" => (hidden, intermediate),
                _ => (hidden, hidden),
            };
            let name = |factor: &str| format!("base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight");
            shapes.extend([(name("A"), vec![rank, inputs]), (name("B"), vec![outputs, rank])]);
        }
    }
    let mut values = noise(seed);
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let count = shape.iter().product();
        let tensor = tensor(dtype, &shape, values.by_ref().take(count));
        (name, tensor)
    };
    shapes.into_iter().map(tensor).collect()
}

/// Writes the folder of an adapter.
pub fn write_lora(dir: &Path, config: &Value, tensors: &Tensors) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("adapter_config.json"), config.to_string())?;
    std::fs::write(dir.join("adapter_model.safetensors"), safetensors(tensors))
}

pub fn config(size: Size) -> Value {
    json!({
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": size.hidden / 2,
        "vocab_size": size.vocab,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "id2label": {"0": "LABEL_0"},
    })
}

/// A tokenizer that knows single letters.
pub fn tokenizer() -> Value {
    let special = ["<s>", "</s>", "<pad>", "<unk>"];
    let letters = ('a'..='t').map(String::from);
    let vocab: serde_json::Map<String, Value> =
        special.map(str::to_owned).into_iter().chain(letters).enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

/// Writes a whole folder; more than one shard brings an index.
pub fn write(dir: &Path, config: &Value, tensors: &Tensors, shards: usize) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("config.json"), config.to_string())?;
    std::fs::write(dir.join("tokenizer.json"), tokenizer().to_string())?;
    let special = json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"});
    std::fs::write(dir.join("tokenizer_config.json"), special.to_string())?;
    if shards == 1 {
        return std::fs::write(dir.join("model.safetensors"), safetensors(tensors));
    }
    let file = |place: usize| format!("model-{:05}-of-{shards:05}.safetensors", place % shards + 1);
    for shard in 0..shards {
        let content = safetensors(tensors.iter().enumerate().filter(|(place, _)| place % shards == shard).map(|(_, entry)| entry));
        std::fs::write(dir.join(file(shard)), content)?;
    }
    let weight_map: BTreeMap<&String, String> = tensors.keys().enumerate().map(|(place, name)| (name, file(place))).collect();
    std::fs::write(dir.join("model.safetensors.index.json"), json!({"metadata": {}, "weight_map": weight_map}).to_string())
}
