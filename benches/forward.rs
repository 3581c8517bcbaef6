//! The forward pass against the matrix products that it contains: what is lost is everything that is not a product.
//!
//! `cargo bench --bench forward`

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use warm::checkpoint::{Architecture, Dtype, Elements, Layout, Manifest, Readout, SourceError, TensorInfo, TensorSource, TextFacts};
use warm::domain::{Sample, Truncation};
use warm::model::{self, Pack, RewardModel};
use warm::text::{TextOptions, TextPipeline};

const HIDDEN: usize = 512;
const INNER: usize = 1536;
const HEADS: usize = 8;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const LAYERS: usize = 8;
const VOCAB: usize = 4096;

/// Weights that are drawn when they are read.
struct Random(Manifest);

impl TensorSource for Random {
    fn manifest(&self) -> &Manifest {
        &self.0
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let mut state = name.bytes().fold(1u32, |state, byte| state.wrapping_mul(31).wrapping_add(u32::from(byte))) | 1;
        let mut draw = |_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            ((state >> 8) as f32 / 8_388_608.0 - 1.0) * 0.05
        };
        *into = Elements::F32(range.map(&mut draw).collect());
        Ok(())
    }
}

fn qwen3() -> Arc<dyn RewardModel> {
    let config = json!({
        "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
        "max_position_embeddings": 32768, "id2label": {"0": "LABEL_0"}
    });
    let architecture = Architecture::parse(&config).expect("a valid configuration");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("score.weight".to_owned(), vec![1, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let shapes = [
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD_DIM]),
            ("self_attn.q_norm", vec![HEAD_DIM]),
            ("self_attn.k_norm", vec![HEAD_DIM]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ];
        tensors.extend(shapes.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    let manifest: Manifest = tensors.into_iter().map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect();
    let layout = Layout::new(&architecture, &manifest).expect("complete");
    model::load(&Random(manifest), &architecture, &layout, &Readout::unnamed(&architecture, &layout), usize::MAX, &mut |_, _| {})
        .expect("loads")
}

fn pack(lengths: &[usize]) -> Pack {
    let family = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/family/rm-0");
    let facts = TextFacts::open(family.as_ref()).expect("the bundled tokenizer");
    let text = TextPipeline::new(&facts, TextOptions::new(32768, VOCAB, jiff::civil::DateTime::default())).expect("a pipeline");
    let ids = |length: usize| (0..length).map(|i| (i * 7919 % (VOCAB - 10)) as u32 + 5).collect();
    let encode = |length: &usize| Arc::new(text.encode(&Sample::Tokens(ids(*length)), Truncation::Refuse).expect("fits"));
    Pack::new(&lengths.iter().map(encode).collect::<Vec<_>>())
}

/// The matrix products of one forward of so many tokens, alone.
fn products(tokens: usize) -> impl FnMut() {
    let device = Device::Cpu;
    let pair = |inputs: usize, outputs: usize| {
        let x = Tensor::randn(0f32, 1., (tokens, inputs), &device).expect("x");
        let weight = Tensor::randn(0f32, 1., (outputs, inputs), &device).expect("weight").t().expect("transposed");
        (x, weight)
    };
    let shapes =
        [pair(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), pair(HEADS * HEAD_DIM, HIDDEN), pair(HIDDEN, 2 * INNER), pair(INNER, HIDDEN)];
    move || {
        for _ in 0..LAYERS {
            for (x, weight) in &shapes {
                black_box(x.matmul(weight).expect("a product"));
            }
        }
    }
}

fn forward(criterion: &mut Criterion) {
    let model = qwen3();
    let cases: [(&str, Vec<usize>); 4] = [
        ("1 x 64", vec![64]),
        ("8 x 512", vec![512; 8]),
        ("1 x 4096", vec![4096]),
        ("mixed", (0..16).map(|i| 64 + i * 448 / 15 + (i % 3) * 37).collect()),
    ];
    let mut group = criterion.benchmark_group("forward");
    group.sample_size(10);
    for (name, lengths) in cases {
        let tokens: usize = lengths.iter().sum();
        let pack = pack(&lengths);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::new("model", name), |bencher| bencher.iter(|| model.forward(&pack).expect("forward")));
        group.bench_function(BenchmarkId::new("products alone", name), |bencher| bencher.iter(products(tokens)));
    }
    group.finish();

    // What bit-identical scores cost: a pack has at least four rows. Wider packs pay nothing, and no matrix of this model is
    // as narrow as those that are padded.
    let mut group = criterion.benchmark_group("one token");
    group.bench_function("products of four rows, as scores are computed", |bencher| bencher.iter(products(4)));
    group.bench_function("products of one row", |bencher| bencher.iter(products(1)));
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
