//! What the wire costs: the same samples in process and over loopback gRPC, and one small sample against its forward
//! alone. Client, server and model share this machine, as they do in a laptop's test.
//!
//! `cargo bench --bench serve`; after criterion's own figures it prints two ratios, measured turn by turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use warm::app::{App, load_spec, loader};
use warm::checkpoint::Readout;
use warm::client::{Client, sample_to_wire};
use warm::clock::Clock;
use warm::config::{Config, Resolved, Sources};
use warm::domain::{Conversation, Sample, Truncation};
use warm::merge::{MergePlan, Merged, Recipe};
use warm::model::{self, Pack, RewardModel};
use warm::registry::{CallOptions, Engine, open_text};
use warm::scorer::Permit;
use warm::shutdown::Stop;
use warm::text::{Encoding, TextPipeline};
use warm::wire;

/// The bundled family served on a free port of this machine.
struct Bench {
    runtime: Runtime,
    client: Client,
    engine: Engine,
    model: Arc<dyn RewardModel>,
    text: TextPipeline,
    /// As the server's worker has one.
    pool: rayon::ThreadPool,
    _stop: oneshot::Sender<Stop>,
}

fn config() -> Config {
    let folders = (0..5).map(|i| format!("{}/demo/family/rm-{i}", env!("CARGO_MANIFEST_DIR")).into()).collect();
    let flags = vec![("listen".to_owned(), "127.0.0.1:0".to_owned())];
    Resolved::new(Sources { flags, folders, ..Sources::default() }).expect("settings").config
}

impl Bench {
    fn start() -> Self {
        let config = config();
        let clock = Clock::system();
        let spec = load_spec(&config).expect("the bundled family");
        let (_, text, _) = open_text(&spec, &clock, &mut |_, _, _| {}).expect("the bundled tokenizer");
        let model = forward_alone(&spec.recipe);
        let app = App::new(&config, clock.clone(), "bench".to_owned()).expect("app");
        app.load(loader(spec, clock), &mut |_| {}).expect("loaded");
        let engine = app.engine().clone();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
        let (stop, stopped) = oneshot::channel();
        let client = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(config.listen).await.expect("a free port");
            let address = listener.local_addr().expect("an address").to_string();
            tokio::spawn(async move {
                let stop = async { stopped.await.unwrap_or(Stop::Interrupt) };
                app.serve(listener, std::future::ready(Ok(())), stop).await.expect("a clean stop");
            });
            Client::connect(&address).await.expect("connected")
        });
        let pool = rayon::ThreadPoolBuilder::new().build().expect("a pool");
        Self { runtime, client, engine, model, text, pool, _stop: stop }
    }

    fn in_process(&self, samples: &[Sample]) -> Vec<f32> {
        let call = self.engine.score(samples.to_vec(), CallOptions::default(), Permit::unlimited());
        let reply = self.runtime.block_on(call).expect("scored");
        reply.outcomes.into_iter().map(|outcome| outcome.expect("a score").reward.get()).collect()
    }

    fn over_loopback(&self, request: &wire::ScoreRequest) -> Vec<f32> {
        let response = self.runtime.block_on(self.client.score(request.clone())).expect("scored");
        response.scores.into_iter().map(|score| score.reward.expect("a score")).collect()
    }

    fn pack(&self, sample: &Sample) -> Pack {
        let encoding: Encoding = self.text.encode(sample, Truncation::Refuse).expect("fits");
        Pack::new(&[Arc::new(encoding)])
    }

    fn forward(&self, pack: &Pack) -> f32 {
        self.pool.install(|| self.model.forward(pack)).expect("forward")[0].values[0]
    }
}

/// The same merged model once more, to be run without anything around it.
fn forward_alone(recipe: &Recipe) -> Arc<dyn RewardModel> {
    let plan = Arc::new(MergePlan::open(recipe).expect("mergeable"));
    let (merged, reward) = (Merged::new(plan.clone()).expect("coefficients"), plan.reward().expect("a reward model"));
    let readout = Readout::unnamed(reward.architecture, reward.layout);
    model::load(&merged, reward.architecture, reward.layout, &readout, usize::MAX, &mut |_, _| {}).expect("loads")
}

/// Conversations of about 20 to 300 tokens, no two alike.
fn conversations(count: usize) -> Vec<Sample> {
    const SENTENCE: &str = "First weigh the flour, then fold in the butter, and let the dough rest for an hour before you roll it. ";
    let one = |i: usize| {
        let question = format!("Question {i}: how do I bake a pie for {} people?", i % 7 + 2);
        Sample::Conversation(Conversation::user(question).answered(SENTENCE.repeat(1 + i * 7 % 13)))
    };
    (0..count).map(one).collect()
}

fn request(samples: &[Sample]) -> wire::ScoreRequest {
    wire::ScoreRequest { samples: samples.iter().map(sample_to_wire).collect(), ..Default::default() }
}

fn small() -> Sample {
    Sample::Conversation(Conversation::user("Is the sky blue?").answered("Yes, on most days."))
}

fn end_to_end(criterion: &mut Criterion) {
    let bench = Bench::start();
    let batch = conversations(64);
    let wired = request(&batch);
    assert_eq!(bench.in_process(&batch), bench.over_loopback(&wired), "the wire changes no bit");
    let mut group = criterion.benchmark_group("64 conversations");
    group.sample_size(10).throughput(Throughput::Elements(batch.len() as u64));
    group.bench_function("in process", |bencher| bencher.iter(|| bench.in_process(&batch)));
    group.bench_function("over loopback", |bencher| bencher.iter(|| bench.over_loopback(&wired)));
    group.finish();

    let one = request(&[small()]);
    let pack = bench.pack(&small());
    let mut group = criterion.benchmark_group("one small sample");
    group.bench_function("forward alone", |bencher| bencher.iter(|| bench.forward(&pack)));
    group.bench_function("over loopback", |bencher| bencher.iter(|| bench.over_loopback(&one)));
    group.finish();

    // Turn by turn, so that whatever else runs on the machine slows both sides alike.
    let rounds = if std::env::args().any(|argument| argument == "--test") { 1 } else { 300 };
    let (alone, wire) = medians(rounds, || bench.forward(&pack), || bench.over_loopback(&one));
    println!("one small sample, median: forward alone {alone:?}, over loopback {wire:?}, {:?} more", wire.saturating_sub(alone));
    let (local, wire) = medians(rounds.div_ceil(10), || bench.in_process(&batch), || bench.over_loopback(&wired));
    let share = 100.0 * local.as_secs_f64() / wire.as_secs_f64();
    println!("{} conversations, median: in process {local:?}, over loopback {wire:?}: {share:.0} % of the speed", batch.len());
}

/// The median time of each of two ways, which take turns.
fn medians<A, B>(rounds: usize, mut a: impl FnMut() -> A, mut b: impl FnMut() -> B) -> (Duration, Duration) {
    let (mut first, mut second) = (Vec::with_capacity(rounds), Vec::with_capacity(rounds));
    for _ in 0..rounds {
        let start = Instant::now();
        std::hint::black_box(a());
        let between = Instant::now();
        std::hint::black_box(b());
        first.push(between - start);
        second.push(between.elapsed());
    }
    first.sort();
    second.sort();
    (first[rounds / 2], second[rounds / 2])
}

criterion_group!(benches, end_to_end);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
}
