//! The forward pass against the matrix products that it contains: what is lost is everything that is not a product.
//!
//! `cargo bench --bench forward`

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use warm::checkpoint::{Architecture, Dtype, Elements, Layout, Manifest, Readout, SourceError, TensorInfo, TensorSource, TextFacts};
use warm::domain::{Sample, Truncation};
use warm::model::{self, Pack, RewardModel};
use warm::text::{TextOptions, TextPipeline};

const VOCAB: usize = 4096;

/// A decoder of the Qwen3 family.
struct Shape {
    name: &'static str,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
}

const SMALL: Shape = Shape { name: "hidden 512", hidden: 512, inner: 1536, heads: 8, kv_heads: 4, head_dim: 64, layers: 8 };
/// The layers of Qwen3-0.6B, a quarter of them.
const LARGE: Shape = Shape { name: "hidden 1024", hidden: 1024, inner: 3072, heads: 16, kv_heads: 8, head_dim: 128, layers: 7 };

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

fn qwen3(shape: &Shape) -> Arc<dyn RewardModel> {
    let &Shape { hidden, inner, heads, kv_heads, head_dim, layers, .. } = shape;
    let config = json!({
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "max_position_embeddings": 32768, "id2label": {"0": "LABEL_0"}
    });
    let architecture = Architecture::parse(&config).expect("a valid configuration");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("score.weight".to_owned(), vec![1, hidden]),
    ];
    for layer in 0..layers {
        let shapes = [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![heads * head_dim, hidden]),
            ("self_attn.k_proj", vec![kv_heads * head_dim, hidden]),
            ("self_attn.v_proj", vec![kv_heads * head_dim, hidden]),
            ("self_attn.o_proj", vec![hidden, heads * head_dim]),
            ("self_attn.q_norm", vec![head_dim]),
            ("self_attn.k_norm", vec![head_dim]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
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

/// Rows of one product, at most: as a forward has them, because what more rows need does not stay in the processor's caches.
const ROWS: usize = 1024;

/// The matrix products of one forward of so many tokens, alone, as fast as they can be.
fn products(shape: &Shape, tokens: usize) -> impl FnMut() {
    let &Shape { hidden, inner, heads, kv_heads, head_dim, layers, .. } = shape;
    let device = Device::Cpu;
    let pair = |inputs: usize, outputs: usize| {
        let rows = (0..tokens).step_by(ROWS).map(|first| ROWS.min(tokens - first));
        let x: Vec<Tensor> = rows.map(|rows| Tensor::randn(0f32, 1., (rows, inputs), &device).expect("x")).collect();
        (x, Tensor::randn(0f32, 1., (inputs, outputs), &device).expect("weight"))
    };
    let shapes =
        [pair(hidden, (heads + 2 * kv_heads) * head_dim), pair(heads * head_dim, hidden), pair(hidden, 2 * inner), pair(inner, hidden)];
    move || {
        for _ in 0..layers {
            for (x, weight) in shapes.iter().flat_map(|(x, weight)| x.iter().map(move |x| (x, weight))) {
                black_box(x.matmul(weight).expect("a product"));
            }
        }
    }
}

fn forward(criterion: &mut Criterion) {
    let cases: [(&Shape, &str, Vec<usize>); 6] = [
        (&SMALL, "1 x 64", vec![64]),
        (&SMALL, "8 x 512", vec![512; 8]),
        (&SMALL, "1 x 4096", vec![4096]),
        (&SMALL, "mixed", (0..16).map(|i| 64 + i * 448 / 15 + (i % 3) * 37).collect()),
        (&LARGE, "1 x 1024", vec![1024]),
        (&LARGE, "8 x 1024", vec![1024; 8]),
    ];
    let models = [&SMALL, &LARGE].map(qwen3);
    let mut group = criterion.benchmark_group("forward");
    group.sample_size(10);
    for (shape, name, lengths) in &cases {
        let tokens: usize = lengths.iter().sum();
        let pack = pack(lengths);
        let model = &models[usize::from(shape.hidden == LARGE.hidden)];
        let name = format!("{}, {name}", shape.name);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::new("model", &name), |bencher| bencher.iter(|| model.forward(&pack).expect("forward")));
        group.bench_function(BenchmarkId::new("products alone", &name), |bencher| bencher.iter(products(shape, tokens)));
        // Turn by turn, so that whatever else runs on the machine slows both sides alike.
        let rounds = if std::env::args().any(|argument| argument == "--test") { 1 } else { 9 };
        let mut alone = products(shape, tokens);
        let (whole, alone) = medians(rounds, || drop(model.forward(&pack).expect("forward")), &mut alone);
        println!("{name}: {:.0} % of the time are matrix products", 100.0 * alone.as_secs_f64() / whole.as_secs_f64());
    }
    group.finish();

    // What bit-identical scores cost: a pack has at least four rows. Wider packs pay nothing, and no matrix of this model is
    // as narrow as those that are padded.
    let mut group = criterion.benchmark_group("one token");
    group.bench_function("products of four rows, as scores are computed", |bencher| bencher.iter(products(&SMALL, 4)));
    group.bench_function("products of one row", |bencher| bencher.iter(products(&SMALL, 1)));
    group.finish();
}

/// The median times of two things, done in turn.
fn medians(rounds: usize, mut one: impl FnMut(), mut other: impl FnMut()) -> (Duration, Duration) {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed()
    };
    let mut times: Vec<(Duration, Duration)> = (0..rounds).map(|_| (time(&mut one), time(&mut other))).collect();
    let mut median = |of: fn(&(Duration, Duration)) -> Duration| {
        times.sort_by_key(of);
        of(&times[times.len() / 2])
    };
    (median(|pair| pair.0), median(|pair| pair.1))
}

criterion_group!(benches, forward);
criterion_main!(benches);
