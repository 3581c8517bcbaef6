//! Merging against plainly reading the same files, side by side: gigabytes of member weights per second, from the page
//! cache, on all cores. Every merge also names its weights (`weights_id`), as a server does. SLERP reads everything twice,
//! and init too.

// The tests of the library use more of it.
#[allow(dead_code)]
#[path = "../src/checkpoint/fixture.rs"]
mod fixture;

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use warm::checkpoint::{CHUNK_ELEMENTS, Elements, TensorSource};
use warm::merge::{MergePlan, Merged, Recipe};

/// 168 million parameters: 336 MB in bfloat16.
const SIZE: fixture::Size = fixture::Size { hidden: 1024, intermediate: 3072, layers: 10, vocab: 31_000 };

fn merge(c: &mut Criterion) {
    // `cargo test --benches` runs every bench once, and has no time for large files.
    let size = if std::env::args().any(|argument| argument == "--test") { fixture::TINY } else { SIZE };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = |seed: u64| {
        let path = dir.path().join(format!("rm-{seed}"));
        fixture::write(&path, &fixture::config(size), &fixture::llama(size, "BF16", seed), 2).expect("room for the members");
        path
    };
    let (members, init) = ((0..4).map(checkpoint).collect::<Vec<_>>(), checkpoint(4));
    let mut group = c.benchmark_group("merge");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    for count in [2, 4] {
        let paths = &members[..count];
        group.throughput(Throughput::Bytes(plan(paths, "dtype: float32").bytes_to_read()));
        group.bench_function(BenchmarkId::new("plain-read", count), |b| b.iter(|| paths.iter().for_each(|path| read_files(path))));
        for dtype in ["bfloat16", "float32"] {
            let recipe = format!("dtype: {dtype}");
            group.bench_function(BenchmarkId::new(format!("to-{dtype}"), count), |b| b.iter(|| read_merged(plan(paths, &recipe))));
        }
        let slerp = format!("dtype: bfloat16\nmethod: slerp\ninit: {init:?}");
        group.bench_function(BenchmarkId::new("slerp-to-bfloat16", count), |b| b.iter(|| read_merged(plan(paths, &slerp))));
    }
    group.finish();
}

/// Adapters of rank 16 on all matrices of one base, against that base alone and as many full checkpoints.
fn adapters(c: &mut Criterion) {
    let size = if std::env::args().any(|argument| argument == "--test") { fixture::TINY } else { SIZE };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let full = |seed: u64| {
        let path = dir.path().join(format!("full-{seed}"));
        fixture::write(&path, &fixture::config(size), &fixture::llama(size, "BF16", seed), 2).expect("room for the checkpoints");
        path
    };
    let checkpoints: Vec<PathBuf> = (0..4).map(full).collect();
    let modules =
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let config = serde_json::json!({
        "peft_type": "LORA", "base_model_name_or_path": "../full-0", "r": 16, "lora_alpha": 32, "target_modules": "all-linear",
        "modules_to_save": ["score"],
    });
    let adapter = |seed: u64| {
        let path = dir.path().join(format!("rm-{seed}"));
        fixture::write_lora(&path, &config, &fixture::lora(size, "BF16", 16, &modules, seed)).expect("room for the adapters");
        path
    };
    let adapters: Vec<PathBuf> = (0..4).map(adapter).collect();
    let mut group = c.benchmark_group("adapters");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    for (name, paths) in [
        ("full", &checkpoints[..1]),
        ("full", &checkpoints),
        ("adapters", &adapters[..1]),
        ("adapters", &adapters[..2]),
        ("adapters", &adapters),
    ] {
        let id = BenchmarkId::new(format!("{name}-to-bfloat16"), paths.len());
        group.bench_function(id, |b| b.iter(|| read_merged(plan(paths, "dtype: bfloat16"))));
    }
    group.finish();
}

fn plan(paths: &[PathBuf], more: &str) -> Arc<MergePlan> {
    let recipe = Recipe::from_yaml(&format!("members: {paths:?}\n{more}"), Path::new("")).expect("a good recipe");
    Arc::new(MergePlan::open(&recipe).expect("members that fit together"))
}

fn read_merged(plan: Arc<MergePlan>) {
    let merged = Merged::new(plan).expect("coefficients");
    let mut into = Elements::default();
    for (name, info) in merged.manifest().iter() {
        let elements = info.elements();
        for begin in (0..elements).step_by(CHUNK_ELEMENTS) {
            merged.read(name, begin..elements.min(begin + CHUNK_ELEMENTS), &mut into).expect("finite weights");
            black_box(&into);
        }
    }
    black_box(merged.weights_id().expect("finite weights"));
}

fn read_files(dir: &Path) {
    let mut buffer = vec![0; 1 << 20];
    for entry in
        std::fs::read_dir(dir).expect("a folder").flatten().filter(|entry| entry.path().extension() == Some("safetensors".as_ref()))
    {
        let mut file = File::open(entry.path()).expect("a readable file");
        while file.read(&mut buffer).expect("a readable file") > 0 {
            black_box(&buffer);
        }
    }
}

criterion_group!(benches, merge, adapters);
criterion_main!(benches);
