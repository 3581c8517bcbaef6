//! What a reload costs those who call, and what the ensemble costs beside the merged model.
//!
//! `cargo bench --bench live` prints three tables. The last reloads again and again (200 times; `RELOADS` in the environment
//! changes that) while callers saturate the server, and checks every answer against the scores that its generation gave when it was alone.
//! The first scores the same samples with WARM and with the ensemble, for M = 1, 2, 5 and 10 members; the second does so with
//! LoRA members, each whole (`ensemble: resident`) and all on their one base (`ensemble: adapters`). Client, server and model
//! share this machine.

#[allow(dead_code)]
#[path = "../src/checkpoint/fixture.rs"]
mod fixture;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use warm::app::{App, SettingsSource, Started, load_spec, loader};
use warm::client::{Client, sample_to_wire};
use warm::clock::Clock;
use warm::config::{Resolved, Sources};
use warm::domain::{Conversation, Sample};
use warm::registry::{CallOptions, CompareOptions};
use warm::scorer::Permit;
use warm::shutdown::Stop;
use warm::wire;

const CALLERS: usize = 4;

fn member(index: usize) -> String {
    format!("{}/demo/family/rm-{}", env!("CARGO_MANIFEST_DIR"), index % 5)
}

fn samples(count: usize) -> Vec<Sample> {
    let answer = |i: usize| format!("Answer {i} gives its reasons one by one. {}", "And one more. ".repeat(i % 7));
    (0..count).map(|i| Sample::Conversation(Conversation::user("Why is the sky blue?").answered(answer(i)))).collect()
}

/// Resident memory of this process; 0 where nobody says.
fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

struct Server {
    client: Client,
    stop: oneshot::Sender<Stop>,
    task: tokio::task::JoinHandle<()>,
}

async fn serve(file: &Path) -> Server {
    let started = Started { file: Some(file.to_owned()), ..Started::default() };
    let resolved = started.resolve().expect("settings");
    let clock = Clock::system();
    let mut app = App::new(&resolved.config, clock.clone(), "bench".to_owned()).expect("app");
    let source = SettingsSource::new(started, resolved, clock);
    app.reload_from_settings(source.clone());
    app.load(source.first(app.engine().registry().metrics().clone()), &mut |_| {}).expect("loaded");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(async move {
        let stopped = async { stopped.await.unwrap_or(Stop::Interrupt) };
        app.serve(listener, std::future::ready(Ok(())), stopped).await.expect("a clean stop");
    });
    Server { client: Client::connect(&address).await.expect("connected"), stop, task }
}

impl Server {
    async fn stopped(self) {
        drop(self.client);
        let _ = self.stop.send(Stop::Interrupt);
        self.task.await.expect("no panic");
    }
}

fn want(file: &Path, members: &[usize]) {
    let members: Vec<String> = members.iter().map(|index| member(*index)).collect();
    let text = format!("shadow: {{share: 0}}\nmodel:\n  members: [{}]\n", members.join(", "));
    std::fs::write(file.with_extension("new"), text).expect("written");
    std::fs::rename(file.with_extension("new"), file).expect("renamed");
}

async fn scores(client: &Client) -> (Vec<u32>, String) {
    let samples = samples(8).iter().map(sample_to_wire).collect();
    let response = client.score(wire::ScoreRequest { samples, ..Default::default() }).await.expect("no request fails");
    let bits = response.scores.iter().map(|score| score.reward.expect("scored").to_bits()).collect();
    (bits, response.model.expect("a stamp").fingerprint)
}

type Own = Arc<HashMap<String, Vec<u32>>>;

/// When a request ended, and how long it took.
type Took = (Instant, Duration);

/// Latencies of callers until `stop`, each answer checked.
fn callers(client: &Client, own: &Own, stop: &Arc<AtomicBool>) -> Vec<tokio::task::JoinHandle<Vec<Took>>> {
    let one = |_| {
        let (client, own, stop) = (client.clone(), own.clone(), stop.clone());
        tokio::spawn(async move {
            let mut took = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let begin = Instant::now();
                let (bits, name) = scores(&client).await;
                took.push((Instant::now(), begin.elapsed()));
                assert_eq!(own.get(&name), Some(&bits), "an answer is of exactly one generation");
            }
            took
        })
    };
    (0..CALLERS).map(one).collect()
}

async fn joined(callers: Vec<tokio::task::JoinHandle<Vec<Took>>>) -> Vec<Took> {
    let mut all = Vec::new();
    for caller in callers {
        all.extend(caller.await.expect("no panic"));
    }
    all.sort_by_key(|(_, took)| *took);
    all
}

fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |found| found.as_secs_f64() * 1e3)
}

/// Median and 99th percentile.
fn two(sorted: &[Took]) -> [f64; 2] {
    let sorted: Vec<Duration> = sorted.iter().map(|(_, took)| *took).collect();
    [percentile(&sorted, 0.5), percentile(&sorted, 0.99)]
}

async fn reloads(count: usize) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file: PathBuf = dir.path().join("warm.yaml");
    let wanted: [&[usize]; 3] = [&[0, 1, 2], &[1, 2, 3], &[0, 1, 2, 3, 4]];
    let mut own = HashMap::new();
    for members in wanted {
        want(&file, members);
        let alone = serve(&file).await;
        let (bits, name) = scores(&alone.client).await;
        own.insert(name, bits);
        alone.stopped().await;
    }
    let own: Own = Arc::new(own);
    want(&file, wanted[2]);
    let server = serve(&file).await;
    let measure = async |work: &mut dyn AsyncWork| {
        let stop = Arc::new(AtomicBool::new(false));
        let callers = callers(&server.client, &own, &stop);
        work.run(&server.client, &file).await;
        stop.store(true, Ordering::Relaxed);
        joined(callers).await
    };
    let steady = measure(&mut Steady(Duration::from_secs(10))).await;
    let before = resident_mib();
    let begin = Instant::now();
    let mut work = Reloads { count, wanted: &wanted, steps: Vec::new(), resident: Vec::new() };
    let during = measure(&mut work).await;
    let took = begin.elapsed().as_secs_f64();
    println!("{count} reloads under load of {CALLERS} callers, 8 conversations a request, {:.2} s each", took / count as f64);
    let [still, moving] = [&steady, &during].map(|found| two(found));
    for (name, found, [p50, p99]) in [("steady", &steady, still), ("reloading", &during, moving)] {
        println!("  {name:9}  {:6} requests  p50 {p50:7.2} ms  p99 {p99:7.2} ms", found.len());
    }
    println!("  reloading against steady: p50 {:.2}x, p99 {:.2}x", moving[0] / still[0], moving[1] / still[1]);
    println!("  the slowest hundredth ended while a reload was at: {}", work.stages_of(&during[during.len() - during.len() / 100..]));
    println!("  no request failed, every answer was its generation's own");
    let parts: Vec<_> = (1..=4).map(|part| format!("{:.0}", work.resident[(count * part / 4).saturating_sub(1)])).collect();
    println!("  resident {before:.0} MiB before, {} MiB after each quarter of the reloads", parts.join(", "));
    server.stopped().await;
}

/// What happens while callers call.
trait AsyncWork {
    fn run<'w>(&'w mut self, client: &'w Client, file: &'w Path) -> std::pin::Pin<Box<dyn Future<Output = ()> + 'w>>;
}

struct Steady(Duration);

impl AsyncWork for Steady {
    fn run<'w>(&'w mut self, _: &'w Client, _: &'w Path) -> std::pin::Pin<Box<dyn Future<Output = ()> + 'w>> {
        Box::pin(tokio::time::sleep(self.0))
    }
}

struct Reloads<'w> {
    count: usize,
    wanted: &'w [&'w [usize]],
    /// When a stage was first told.
    steps: Vec<(Instant, String)>,
    /// MiB after each reload.
    resident: Vec<f64>,
}

impl Reloads<'_> {
    /// How many of these requests ended in which stage.
    fn stages_of(&self, slow: &[Took]) -> String {
        let mut count = BTreeMap::<&str, usize>::new();
        for (ended, _) in slow {
            let stage = self.steps.iter().rev().find(|(at, _)| at <= ended).map_or("", |(_, stage)| stage);
            *count.entry(stage).or_default() += 1;
        }
        let words: Vec<_> = count.into_iter().map(|(stage, count)| format!("{stage} {count}")).collect();
        words.join(", ")
    }
}

impl AsyncWork for Reloads<'_> {
    fn run<'w>(&'w mut self, client: &'w Client, file: &'w Path) -> std::pin::Pin<Box<dyn Future<Output = ()> + 'w>> {
        Box::pin(async move {
            for i in 0..self.count {
                want(file, self.wanted[i % self.wanted.len()]);
                let told = |step: &wire::ReloadProgress| self.steps.push((Instant::now(), step.stage.clone()));
                let last = client.reload(wire::ReloadRequest::default(), told).await.expect("a good candidate");
                // The one before is held, so every third is back by a swap alone.
                assert!(["loaded", "activated"].contains(&last.outcome.as_str()), "{}", last.message);
                self.resident.push(resident_mib());
            }
        })
    }
}

/// A model with its members, and what it costs.
struct Cost {
    warm_ms: f64,
    all_ms: f64,
    warm_mib: f64,
    all_mib: f64,
}

/// The same samples by WARM alone and by WARM beside all its members, for each of some settings, by turns, so that whatever
/// else this machine does hits all of them; medians of `rounds`.
async fn costs<const N: usize>(settings: [String; N], samples: &[Sample], rounds: usize) -> [Cost; N] {
    let apps = settings.map(|settings| {
        let file = Some((PathBuf::from("bench.yaml"), settings));
        let config = Resolved::new(Sources { file, ..Sources::default() }).expect("settings").config;
        let clock = Clock::system();
        let app = App::new(&config, clock.clone(), "bench".to_owned()).expect("app");
        app.load(loader(load_spec(&config).expect("members that are there"), clock), &mut |_| {}).expect("loaded");
        (app, Vec::new(), Vec::new())
    });
    let mut apps = apps;
    for _ in 0..rounds {
        for (app, warm, all) in &mut apps {
            let engine = app.engine();
            let begin = Instant::now();
            engine.score(samples.to_vec(), CallOptions::default(), Permit::unlimited()).await.expect("scored");
            warm.push(begin.elapsed());
            let begin = Instant::now();
            let (options, compare) = (CallOptions::default(), CompareOptions::default());
            engine.compare(samples.to_vec(), options, compare, Permit::unlimited()).await.expect("compared");
            all.push(begin.elapsed());
        }
    }
    apps.map(|(app, mut warm, mut all)| {
        let live = app.engine().registry().current().expect("live");
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        warm.sort();
        all.sort();
        let (warm_mib, all_mib) = (mib(live.limits().device_bytes), mib(live.device_bytes()));
        Cost { warm_ms: percentile(&warm, 0.5), all_ms: percentile(&all, 0.5), warm_mib, all_mib }
    })
}

/// LoRA members of one base, whole and apart from it.
async fn adapters() {
    const SIZE: fixture::Size = fixture::Size { hidden: 768, intermediate: 2048, layers: 4, vocab: 4096 };
    const MODULES: [&str; 7] =
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    const RANK: usize = 16;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut config = fixture::config(SIZE);
    config["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
    config["max_position_embeddings"] = 1024.into();
    (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) = (12.into(), 12.into(), 64.into());
    fixture::write(&dir.path().join("base"), &config, &fixture::language_model(SIZE, "BF16", 1), 1).expect("written");
    let targets: Vec<&str> = MODULES.iter().filter_map(|module| module.rsplit('.').next()).collect();
    let config = serde_json::json!({
        "peft_type": "LORA", "base_model_name_or_path": "../base", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets,
        "modules_to_save": ["score"], "task_type": "SEQ_CLS", "bias": "none",
    });
    for member in 0..10 {
        let tensors = fixture::lora(SIZE, "BF16", RANK, &MODULES, member);
        fixture::write_lora(&dir.path().join(format!("rm-{member}")), &config, &tensors).expect("written");
    }
    let text = |i: usize| Sample::Text("abcdefghijklmnopqrst".repeat(3 + i % 5).chars().skip(i % 7).collect());
    let samples: Vec<Sample> = (0..8).map(text).collect();
    println!("8 texts, in process: LoRA members (rank {RANK} on every matrix) of one base, each whole, and all on the base");
    println!("   M   WARM ms   resident ms   adapters ms   ratio   WARM MiB   resident MiB   adapters MiB   ratio");
    for count in [2, 5, 10] {
        let members: Vec<String> = (0..count).map(|i| dir.path().join(format!("rm-{i}")).display().to_string()).collect();
        let settings = |mode: &str| format!("ensemble: {mode}\nprefix_cache_bytes: off\nmodel:\n  members: [{}]\n", members.join(", "));
        let [resident, apart] = costs([settings("resident"), settings("adapters")], &samples, 9).await;
        println!(
            "  {count:2}  {:8.1}  {:12.1}  {:12.1}  {:6.2}  {:9.1}  {:13.1}  {:13.1}  {:6.2}",
            (resident.warm_ms + apart.warm_ms) / 2.0,
            resident.all_ms,
            apart.all_ms,
            apart.all_ms / resident.all_ms,
            resident.warm_mib,
            resident.all_mib,
            apart.all_mib,
            apart.all_mib / resident.all_mib,
        );
    }
}

async fn ensembles() {
    println!("32 conversations, in process: WARM alone against WARM and the ensemble of its M members");
    println!("   M   WARM ms    ENS ms   ratio   WARM MiB   ENS MiB");
    for count in [1, 2, 5, 10] {
        let members: Vec<String> = (0..count).map(|i| format!("{{path: {}, name: rm-{i}}}", member(i))).collect();
        let text = format!("ensemble: resident\nmodel:\n  members: [{}]\n", members.join(", "));
        let [Cost { warm_ms, all_ms, warm_mib, all_mib }] = costs([text], &samples(32), 30).await;
        println!("  {count:2}  {warm_ms:8.2}  {all_ms:8.2}  {:6.2}  {warm_mib:9.2}  {all_mib:8.2}", all_ms / warm_ms);
    }
}

fn main() {
    let count = std::env::var("RELOADS").ok().and_then(|count| count.parse().ok()).unwrap_or(200);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        ensembles().await;
        adapters().await;
        reloads(count).await;
    });
}
