//! One device by itself, without a server: `benches/gpu.sh` runs it on a card beside transformers; on the CPU it shows that
//! the bench works.
//!
//! ```text
//! cargo bench --features cuda --bench gpu -- rates --device cuda:0 --dtype bfloat16 CHECKPOINT_DIR...
//! cargo bench --features cuda --bench gpu -- parity --device cuda:0 --dtype float32 CONFORMANCE_DIR
//! cargo bench --features cuda,flash-attn --bench gpu -- flash --device cuda:0
//! cargo bench --features cuda --bench gpu -- split --device cuda:0 --dtype bfloat16 CHECKPOINT_DIR
//! cargo bench --features cuda --bench gpu -- lost --device cuda:0 --dtype bfloat16 CHECKPOINT_DIR
//! cargo bench --features cuda --bench gpu -- scores --device cuda:0 --dtype bfloat16 --ids FILE CHECKPOINT_DIR
//! ```
//!
//! Every line of output is a JSON object. Rates are medians of some rounds after a warm-up.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use warm::checkpoint::{Architecture, Dtype, Readout, TextFacts};
use warm::domain::{Sample, Truncation};
use warm::merge::{MergePlan, Merged, Recipe};
use warm::model::{self, Arithmetic, Devices, ModelError, Output, Pack, Place, RewardModel, What};
use warm::text::{Encoding, TextOptions, TextPipeline};

type Failure = Box<dyn std::error::Error>;

#[derive(Parser)]
struct Arguments {
    mode: Mode,
    /// A checkpoint, the members of a merge, or a folder of conformance families.
    folders: Vec<PathBuf>,
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, default_value = "float32")]
    dtype: String,
    /// Tokens of one pack.
    #[arg(long, default_value_t = 16384)]
    pack: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Fixed shapes, so that a score has the same bits in any company.
    #[arg(long)]
    batch_invariant: bool,
    /// A JSON list of lists of token ids.
    #[arg(long)]
    ids: Option<PathBuf>,
    /// Cargo says so to every bench.
    #[arg(long)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    /// Load, products, forwards of three kinds of pack, and scores alone against packed.
    Rates,
    /// Load alone.
    Load,
    /// Scores of transformers.
    Parity,
    /// Flash attention against plain attention.
    Flash,
    Scores,
    /// A pack for which a card has no room left, and its parts.
    Split,
    /// What is told of a card that is broken for good.
    Lost,
}

struct Loaded {
    model: Arc<dyn RewardModel>,
    architecture: Architecture,
    text: TextPipeline,
}

impl Arguments {
    /// The model, by its folder.
    fn name(&self) -> String {
        let first = self.folders.first().and_then(|folder| folder.file_name());
        first.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn dtype(&self) -> Result<Dtype, Failure> {
        match self.dtype.as_str() {
            "float32" => Ok(Dtype::F32),
            "bfloat16" => Ok(Dtype::Bf16),
            "float16" => Ok(Dtype::F16),
            other => Err(format!("expected float32, bfloat16 or float16, found {other}").into()),
        }
    }

    fn load(&self, members: &[PathBuf]) -> Result<Loaded, Failure> {
        let dtype = self.dtype()?;
        let recipe = Recipe::uniform(members)?.with_dtype(dtype).ok_or("no merge can be stored in that")?;
        let plan = Arc::new(MergePlan::open(&recipe)?);
        let (merged, reward) = (Merged::new(Arc::clone(&plan))?, plan.reward()?);
        let readout = Readout::unnamed(reward.architecture, reward.layout);
        let what = What {
            source: &merged,
            architecture: reward.architecture,
            layout: reward.layout,
            readout: &readout,
            max_tokens: usize::MAX,
            apart: None,
        };
        let place: Place = self.device.parse()?;
        let arithmetic = Arithmetic { dtype, batch_invariant: self.batch_invariant };
        let model = model::load_on(&Devices::open(&[place])?, arithmetic, &what, &mut |_, _| {})?;
        let facts = TextFacts::open(&members[0])?;
        let limit = model.limits().max_tokens;
        let text = TextPipeline::new(&facts, TextOptions::new(limit, reward.architecture.vocab_size, jiff::civil::DateTime::default()))?;
        Ok(Loaded { model, architecture: reward.architecture.clone(), text })
    }
}

impl Loaded {
    fn encode(&self, ids: Vec<u32>) -> Result<Arc<Encoding>, Failure> {
        let encoded = self.text.encode(&Sample::Tokens(ids), Truncation::Refuse);
        Ok(Arc::new(encoded.map_err(|failure| failure.to_string())?))
    }

    fn pack(&self, samples: &[Arc<Encoding>]) -> Pack {
        Pack::forest(samples, |tokens| self.model.prefix_key(tokens))
    }

    fn positions(&self) -> usize {
        self.model.limits().max_tokens.min(self.architecture.max_positions)
    }

    /// Tokens of a long sample.
    fn long(&self) -> usize {
        1024.min(self.positions() / 2)
    }

    /// Long samples that fill a pack of so many tokens.
    fn equal(&self, pack: usize) -> Result<Vec<Arc<Encoding>>, Failure> {
        (0..(pack / self.long()).max(1)).map(|seed| self.encode(self.random(self.long(), seed))).collect()
    }

    fn random(&self, length: usize, seed: usize) -> Vec<u32> {
        let vocabulary = self.architecture.vocab_size - 20;
        (0..length).map(|i| ((i + 1) * 7919 + seed * 104_729) % vocabulary + 10).map(|id| id as u32).collect()
    }
}

/// The larger of two differences. A NaN is no agreement, and a maximum would pass over it.
fn worse(a: f64, b: f64) -> f64 {
    if b.is_nan() { f64::MAX } else { a.max(b) }
}

fn differences<'a>(pairs: impl IntoIterator<Item = (&'a Output, &'a Output)>) -> f64 {
    pairs.into_iter().map(|(a, b)| f64::from((a.reward - b.reward).abs())).fold(0.0, worse)
}

fn seconds(rounds: usize, mut run: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    run()?;
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds.max(1) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Operations of a second in the model's own largest product, at the pack's size.
fn matrix_rate(arguments: &Arguments, architecture: &Architecture) -> Result<f64, Failure> {
    let device = match arguments.device.parse::<Place>()? {
        Place::Cuda(ordinal) => Device::new_cuda(ordinal)?,
        Place::Metal(ordinal) => Device::new_metal(ordinal)?,
        Place::Cpu => Device::Cpu,
    };
    let dtype = match arguments.dtype()? {
        Dtype::Bf16 if !device.is_cpu() => DType::BF16,
        Dtype::F16 if !device.is_cpu() => DType::F16,
        _ => DType::F32,
    };
    let (rows, inputs, outputs) = (arguments.pack, architecture.hidden_size, 2 * architecture.intermediate_size);
    let x = Tensor::randn(0f32, 1., (rows, inputs), &device)?.to_dtype(dtype)?;
    let weight = Tensor::randn(0f32, 1., (outputs, inputs), &device)?.to_dtype(dtype)?.t()?;
    let took = seconds(arguments.rounds, || {
        for _ in 0..4 {
            x.matmul(&weight)?;
        }
        Ok(device.synchronize()?)
    })?;
    Ok(4.0 * 2.0 * (rows * inputs * outputs) as f64 / took)
}

/// Loads a model, and says how long that took beside a plain read of the same files from the page cache.
fn load(arguments: &Arguments) -> Result<Loaded, Failure> {
    let bytes: u64 = weights(&arguments.folders)?.iter().map(|file| Ok(file.metadata()?.len())).sum::<std::io::Result<u64>>()?;
    let read = seconds(1, || {
        for file in weights(&arguments.folders)? {
            std::io::copy(&mut std::fs::File::open(file)?, &mut std::io::sink())?;
        }
        Ok(())
    })?;
    // A device is opened once by a process, and used again; its driver may compile kernels then.
    let start = Instant::now();
    let place: Place = arguments.device.parse()?;
    drop(Devices::open(&[place])?);
    let opened = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let loaded = arguments.load(&arguments.folders)?;
    let took = start.elapsed().as_secs_f64();
    let on = loaded.model.runs_on().join(", ");
    let what = if arguments.folders.len() > 1 { format!("load of a merge of {}", arguments.folders.len()) } else { "load".to_owned() };
    println!(
        "{}",
        json!({"what": what, "model": arguments.name(), "on": on, "bytes": bytes, "seconds": took, "plain_read_seconds": read,
            "open_seconds": opened, "times_a_read": took / read})
    );
    Ok(loaded)
}

/// Bytes that are taken of a card by anybody, of the machine by this process.
fn used(place: Place) -> Option<u64> {
    if let Some(card) = model::card(place) {
        return Some(card.total_bytes.saturating_sub(card.free_bytes));
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// What a forward over a full pack takes of the device, beside what was planned for it.
fn memory(arguments: &Arguments, loaded: &Loaded) -> Result<(), Failure> {
    let place: Place = arguments.device.parse()?;
    let pack = loaded.pack(&loaded.equal(arguments.pack)?);
    // What a library takes when it is first called is not the forward's.
    loaded.model.forward(&Pack::new(&[loaded.encode(loaded.random(16, 1))?]))?;
    model::settle(&[place])?;
    let (before, (ran, watched)) = (used(place), mpsc::channel::<()>());
    let most = std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let mut most = used(place);
            while watched.recv_timeout(Duration::from_millis(1)) == Err(mpsc::RecvTimeoutError::Timeout) {
                most = most.max(used(place));
            }
            most.max(used(place))
        });
        let forward = loaded.model.forward(&pack);
        drop(ran);
        forward.map(|_| watch.join().ok().flatten())
    })?;
    let (planned, rise) =
        (loaded.model.activation_bytes(pack.computed_tokens()), most.zip(before).map(|(most, before)| most.saturating_sub(before)));
    let share = rise.zip(planned).map(|(rise, planned)| rise as f64 / planned as f64);
    println!(
        "{}",
        json!({"what": "memory of a forward", "model": arguments.name(), "on": loaded.model.runs_on().join(", "), "tokens": pack.computed_tokens(),
            "planned_bytes": planned, "used_bytes": rise, "share_of_plan": share})
    );
    Ok(())
}

/// Takes so much of a card that a full pack has no room left; its parts have the scores that they had before.
fn split(arguments: &Arguments) -> Result<(), Failure> {
    let Place::Cuda(ordinal) = arguments.device.parse()? else {
        println!("{}", json!({"what": "out of memory, skipped"}));
        return Ok(());
    };
    let (place, loaded) = (Place::Cuda(ordinal), arguments.load(&arguments.folders)?);
    let samples = loaded.equal(arguments.pack)?;
    let expected = loaded.model.forward(&loaded.pack(&samples))?;
    model::settle(&[place])?;
    let (free, planned) =
        (model::card(place).ok_or("no card")?.free_bytes, loaded.model.activation_bytes(arguments.pack).ok_or("no plan")?);
    let taken = usize::try_from(free.saturating_sub(planned / 8))?;
    let device = Device::new_cuda(ordinal)?;
    let ballast = Tensor::zeros(taken, DType::U8, &device)?;
    device.synchronize()?;
    let refused = loaded.model.forward(&loaded.pack(&samples)).err().map(|error| error.to_string());
    let (mut part, mut rewards) = (samples.len(), Vec::new());
    while rewards.is_empty() && part > 1 {
        part = part.div_ceil(2);
        let parts: Result<Vec<_>, _> = samples.chunks(part).map(|part| loaded.model.forward(&loaded.pack(part))).collect();
        match parts {
            Ok(parts) => rewards = parts.into_iter().flatten().map(|output| output.reward).collect(),
            Err(ModelError::OutOfMemory(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    drop(ballast);
    let largest = expected.iter().zip(&rewards).map(|(a, b)| f64::from((a.reward - b).abs())).fold(0.0, worse);
    let recovered =
        refused.as_ref().is_some_and(|words| words.contains("out of memory")) && rewards.len() == expected.len() && largest <= 1e-3;
    println!(
        "{}",
        json!({"what": "out of memory", "model": arguments.name(), "on": loaded.model.runs_on().join(", "), "taken_bytes": taken,
            "refused": refused, "samples": samples.len(), "part": part, "largest": largest, "recovered": recovered})
    );
    Ok(())
}

/// Breaks the context of the card for this process, which ends behind this, and asks for a score.
fn lost(arguments: &Arguments) -> Result<(), Failure> {
    let Place::Cuda(ordinal) = arguments.device.parse()? else {
        println!("{}", json!({"what": "a lost device, skipped"}));
        return Ok(());
    };
    let loaded = arguments.load(&arguments.folders)?;
    let device = Device::new_cuda(ordinal)?;
    // No table has such a row.
    let outside = || {
        Tensor::zeros((2, 2), DType::F32, &device)?.index_add(
            &Tensor::new(&[1u32 << 30], &device)?,
            &Tensor::ones((1, 2), DType::F32, &device)?,
            0,
        )
    };
    let broken = outside().and_then(|x| x.to_vec2::<f32>()).err().map(|error| error.to_string());
    let found = loaded.model.forward(&Pack::new(&[loaded.encode(loaded.random(16, 1))?]));
    let told = matches!(found, Err(ModelError::DeviceLost(_)));
    let words = found.err().map(|error| error.to_string());
    println!("{}", json!({"what": "a lost device", "model": arguments.name(), "broken": broken, "found": words, "told": told}));
    Ok(())
}

fn rates(arguments: &Arguments) -> Result<(), Failure> {
    let loaded = load(arguments)?;
    let (on, name) = (loaded.model.runs_on().join(", "), arguments.name());
    let invariant = if arguments.batch_invariant { ", batch invariant" } else { "" };
    memory(arguments, &loaded)?;
    let rate = matrix_rate(arguments, &loaded.architecture)?;
    println!("{}", json!({"what": "matrix products", "model": name, "on": on, "dtype": arguments.dtype, "tera_per_second": rate / 1e12}));

    let a = &loaded.architecture;
    let embedding = (a.vocab_size * a.embedding_size()) as u64;
    // Of a mixture, a token meets the experts that it chose.
    let idle = a.experts.as_ref().map_or(0, |experts| {
        let weights = if a.gated { 3 } else { 2 } * a.hidden_size * experts.intermediate_size;
        (experts.count.saturating_sub(experts.per_token) * weights * a.layers.len()) as u64
    });
    // Two operations a weight and token; attention is not counted.
    let per_token = 2.0 * (loaded.model.limits().parameters - embedding - idle) as f64;
    let positions = loaded.positions();
    let long = loaded.long();
    // From a sixteenth of that length to four times it, evenly on a scale of doublings.
    let most = positions.min(4 * long);
    let mixed: Vec<Vec<u32>> = (0..64usize)
        .map(|i| ((long / 16).max(1) as f64 * 64f64.powf(i as f64 / 63.0)) as usize)
        .map(|length| loaded.random(length.min(most), length))
        .collect();
    let prompt = loaded.random(long, 1);
    let group: Vec<Vec<u32>> = (0..16).map(|i| [prompt.clone(), loaded.random(long / 4, i + 2)].concat()).collect();
    let encoded = |samples: Vec<Vec<u32>>| samples.into_iter().map(|ids| loaded.encode(ids)).collect::<Result<Vec<_>, _>>();
    // As many groups as a pack holds.
    let count = (arguments.pack / (long + 16 * (long / 4))).max(1);
    let groups = (0..count).flat_map(|number| {
        let prompt = loaded.random(long, 1000 + number);
        (0..16).map(move |i| (prompt.clone(), 2000 + 16 * number + i)).collect::<Vec<_>>()
    });
    let groups: Vec<Vec<u32>> = groups.map(|(prompt, seed)| [prompt, loaded.random(long / 4, seed)].concat()).collect();
    for (what, samples) in [
        ("equal lengths", loaded.equal(arguments.pack)?),
        ("mixed lengths", encoded(mixed)?),
        ("a group", encoded(group)?),
        ("groups that fill a pack", encoded(groups)?),
    ] {
        let mut packs: Vec<Vec<Arc<Encoding>>> = vec![Vec::new()];
        for sample in &samples {
            let last = packs.last().map_or(0, |pack| pack.iter().map(|sample| sample.tokens()).sum::<usize>());
            if what == "mixed lengths" && last > 0 && last + sample.tokens() > arguments.pack {
                packs.push(Vec::new());
            }
            packs.last_mut().ok_or("a pack")?.push(sample.clone());
        }
        let packs: Vec<Pack> = packs.iter().map(|samples| loaded.pack(samples)).collect();
        // As a worker does it: while one pack is computed, the next one is made ready.
        let took = seconds(arguments.rounds, || {
            for (number, pack) in packs.iter().enumerate() {
                std::thread::scope(|scope| {
                    scope.spawn(|| loaded.model.prepare(0, &packs[(number + 1) % packs.len()]));
                    loaded.model.forward(pack)
                })?;
            }
            Ok(())
        })?;
        let tokens: usize = samples.iter().map(|sample| sample.tokens()).sum();
        let computed: usize = packs.iter().map(Pack::computed_tokens).sum();
        let share = computed as f64 * per_token / took / rate;
        println!(
            "{}",
            json!({"what": format!("{what}{invariant}"), "model": name, "on": on, "dtype": arguments.dtype, "samples": samples.len(), "tokens": tokens, "computed": computed,
                "seconds": took, "tokens_per_second": tokens as f64 / took, "share_of_matrix_rate": share})
        );
        // A score may not depend on its company, nor on whether its beginning is shared, by more than rounding; of fixed
        // shapes, not at all.
        let few = &samples[..4.min(samples.len())];
        let (together, unshared) = (loaded.model.forward(&loaded.pack(few))?, loaded.model.forward(&Pack::new(few))?);
        let alone = few.iter().map(|sample| Ok(loaded.model.forward(&Pack::new(std::slice::from_ref(sample)))?.remove(0)));
        let alone = alone.collect::<Result<Vec<_>, ModelError>>()?;
        let (apart, sharing) = (differences(alone.iter().zip(&together)), differences(unshared.iter().zip(&together)));
        let bits = |outputs: &[Output]| outputs.iter().map(|output| output.reward.to_bits()).collect::<Vec<_>>();
        let equal = bits(&alone) == bits(&together) && bits(&alone) == bits(&unshared);
        println!(
            "{}",
            json!({"what": format!("alone against packed{invariant}"), "model": name, "samples": what, "on": on, "dtype": arguments.dtype,
                "largest": apart.max(sharing), "alone": apart, "unshared": sharing, "equal_bits": equal})
        );
    }
    Ok(())
}

fn weights(folders: &[PathBuf]) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in folders {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// Golden scores of every family below a folder, on this device.
fn parity(arguments: &Arguments) -> Result<(), Failure> {
    let (mut cases, mut skipped, mut largest, mut mixtures) = (0, 0, 0f64, 0f64);
    for family in families(arguments.folders.first().ok_or("expected a folder of families")?)? {
        let golden: Value = serde_json::from_slice(&std::fs::read(family.join("golden.json"))?)?;
        // Scores that were not taken one by one in float32 are of rounded frequencies, or of a table of them that is held from
        // text to text; the tests of the CPU know which of these cases count.
        let held = family.file_name().is_some_and(|name| name.to_string_lossy().contains("dynamic"));
        if golden.get("scores_by").is_none() && (golden["dtype"] != "float32" || held) {
            continue;
        }
        let loaded = match arguments.load(&[family.join("member-0")]) {
            Ok(loaded) => loaded,
            Err(error) => {
                skipped += 1;
                println!("{}", json!({"what": "parity", "family": family, "skipped": error.to_string()}));
                continue;
            }
        };
        let mut worst = 0f64;
        for case in golden["cases"].as_array().into_iter().flatten() {
            let types = case.get("token_type_ids").and_then(Value::as_array);
            if types.is_some_and(|types| types.iter().any(|id| id.as_u64() != Some(0))) {
                continue;
            }
            let ids = case["input_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64).map(|id| id as u32).collect();
            let Ok(encoding) = loaded.encode(ids) else { continue };
            let values = &loaded.model.forward(&Pack::new(&[encoding]))?[0].values;
            let score = &case["scores"]["member-0"];
            let expected = score.as_f64().or_else(|| score.get(0)?.as_f64()).ok_or("a score")?;
            worst = worse(worst, (f64::from(values[0]) - expected).abs() / expected.abs().max(1.0));
            cases += 1;
        }
        println!("{}", json!({"what": "parity", "family": family, "on": loaded.model.runs_on(), "largest": worst}));
        // Rounded weights may choose other experts, which is no error of the arithmetic.
        let rounded = arguments.dtype != "float32" && loaded.architecture.experts.is_some();
        let of = if rounded { &mut mixtures } else { &mut largest };
        *of = worse(*of, worst);
    }
    let all = if arguments.dtype == "float32" { "parity, all".to_owned() } else { format!("parity in {}, all", arguments.dtype) };
    println!(
        "{}",
        json!({"what": all, "dtype": arguments.dtype, "cases": cases, "skipped": skipped, "largest": largest, "of_mixtures": mixtures})
    );
    Ok(())
}

fn families(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    if folder.join("golden.json").exists() {
        return Ok(vec![folder.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.join("config.json").exists() {
            found.extend(families(&path)?);
        }
    }
    found.sort();
    Ok(found)
}

/// The flash kernels in every shape that a family may ask for.
fn flash(arguments: &Arguments) -> Result<(), Failure> {
    let checks = model::flash_checks(arguments.device.parse()?)?;
    let (mut plain, mut exact, mut absent) = (0f32, 0f32, 0);
    for check in &checks {
        println!("{}", json!({"what": "flash", "shape": check}));
        match (check.from_plain, check.from_float32) {
            // A NaN is no agreement, and a maximum would pass over it.
            (Some(a), Some(b)) if a.is_finite() && b.is_finite() => (plain, exact) = (plain.max(a), exact.max(b)),
            (Some(_), _) => (plain, exact) = (f32::INFINITY, f32::INFINITY),
            _ => absent += 1,
        }
    }
    println!("{}", json!({"what": "flash, all", "shapes": checks.len(), "absent": absent, "largest": plain.max(exact).min(f32::MAX)}));
    Ok(())
}

/// The reward of every list of ids.
fn scores(arguments: &Arguments) -> Result<(), Failure> {
    let loaded = arguments.load(&arguments.folders)?;
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(arguments.ids.as_ref().ok_or("expected --ids")?)?)?;
    let samples = lists.into_iter().map(|ids| loaded.encode(ids)).collect::<Result<Vec<_>, _>>()?;
    let mut rewards = Vec::with_capacity(samples.len());
    for samples in samples.chunks(16) {
        rewards.extend(loaded.model.forward(&loaded.pack(samples))?.into_iter().map(|output| output.reward));
    }
    println!("{}", json!({"what": "scores", "on": loaded.model.runs_on(), "rewards": rewards}));
    Ok(())
}

fn main() -> Result<(), Failure> {
    // Without a mode this is the run of all benches, in which a card has no part.
    if std::env::args().skip(1).all(|argument| argument.starts_with("--")) {
        println!("name a mode, such as `cargo bench --bench gpu -- rates CHECKPOINT_DIR`");
        return Ok(());
    }
    let arguments = Arguments::parse();
    match arguments.mode {
        Mode::Rates => rates(&arguments),
        Mode::Load => load(&arguments).map(|_| ()),
        Mode::Flash => flash(&arguments),
        Mode::Parity => parity(&arguments),
        Mode::Scores => scores(&arguments),
        Mode::Split => split(&arguments),
        Mode::Lost => lost(&arguments),
    }
}
