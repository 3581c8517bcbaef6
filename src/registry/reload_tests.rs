//! Reloads of fakes: what is loaded, how it fails and when it ends is in the test's hand.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc as gate;

use super::super::testing::*;
use super::super::{CallOptions, EngineError};
use super::super::{CanaryBounds, Progress};
use super::*;
use crate::clock::Clock;
use crate::domain::{GenerationId, Sample};
use crate::registry::canary::Figures;
use crate::scorer::{Permit, ScorerMetrics, ScorerOptions, spawn};

/// What the next candidate is.
#[derive(Clone)]
enum Wanted {
    /// A model of this factor, which names it.
    Model(f32),
    NoPlan,
    NoWeights,
    NoLoad,
    /// Another model than the one that was named.
    Changes,
    Panic,
    /// It says what it is, and then gives nothing but NaN.
    NotFinite(f32),
}

struct Fakes {
    wanted: Mutex<Wanted>,
    last_good: Mutex<Option<f32>>,
    bytes: AtomicU64,
    /// Of a candidate's prefix caches.
    prefixes: AtomicU64,
    bounds: Mutex<CanaryBounds>,
    /// Calls of `load`.
    loads: Arc<AtomicU64>,
    /// A load takes one message before it goes on, where there is a gate.
    gate: Mutex<Option<Arc<Mutex<gate::Receiver<()>>>>>,
}

struct Fake {
    wanted: Wanted,
    bytes: u64,
    prefixes: u64,
    probes: Probes,
    bounds: CanaryBounds,
    loads: Arc<AtomicU64>,
    gate: Option<Arc<Mutex<gate::Receiver<()>>>>,
    remarks: Vec<String>,
}

fn print(factor: f32) -> Fingerprint {
    generation(0, FakeModel::new(factor), &[]).fingerprint
}

impl Fakes {
    fn candidate(&self, wanted: Wanted) -> Fake {
        let texts = ["one", "three", "a fourth one", "twenty-two", "zzzz"].map(|text| Sample::Text(text.to_owned()));
        Fake {
            wanted,
            bytes: self.bytes.load(Ordering::Relaxed),
            prefixes: self.prefixes.load(Ordering::Relaxed),
            probes: Probes::new(texts.to_vec(), vec![]).expect("probes"),
            bounds: *self.bounds.lock().expect("whole"),
            loads: self.loads.clone(),
            gate: self.gate.lock().expect("whole").clone(),
            remarks: vec!["listen stays".to_owned()],
        }
    }
}

impl Source for Fakes {
    fn prepare(&self, _: &mut dyn FnMut(Progress)) -> Result<Box<dyn Candidate>, String> {
        match self.wanted.lock().expect("whole").clone() {
            Wanted::NoPlan => Err("members differ".to_owned()),
            wanted => Ok(Box::new(self.candidate(wanted))),
        }
    }

    fn last_good(&self, _: &mut dyn FnMut(Progress)) -> Result<Box<dyn Candidate>, String> {
        let factor = self.last_good.lock().expect("whole").ok_or("none")?;
        Ok(Box::new(self.candidate(Wanted::Model(factor))))
    }

    fn accepted(&self, generation: &Generation) {
        *self.last_good.lock().expect("whole") = Some(f32::from_be_bytes(generation.fingerprint.0[..4].try_into().expect("four")));
    }
}

impl Candidate for Fake {
    fn summary(&self) -> String {
        "two members".to_owned()
    }

    fn restart_needed(&self) -> &[String] {
        &self.remarks
    }

    fn fingerprint(&self, progress: &mut dyn FnMut(Progress)) -> Result<Fingerprint, String> {
        progress(Progress::step("hash", 1, 1));
        match self.wanted {
            Wanted::Model(factor) | Wanted::NotFinite(factor) => Ok(print(factor)),
            Wanted::NoWeights => Err("a shard is short".to_owned()),
            _ => Ok(print(99.0)),
        }
    }

    fn equipment(&self) -> Result<String, String> {
        Ok(generation(0, FakeModel::new(1.0), &[]).equipment())
    }

    fn device_bytes(&self) -> u64 {
        self.bytes
    }

    fn prefix_bytes(&self) -> u64 {
        self.prefixes
    }

    fn canary(&self) -> (&Probes, &CanaryBounds) {
        (&self.probes, &self.bounds)
    }

    fn load(&self, id: GenerationId, progress: &mut dyn FnMut(Progress)) -> Result<Generation, String> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        progress(Progress::step("merge", 1, 2));
        if let Some(gate) = &self.gate {
            gate.lock().expect("whole").recv().map_err(|_| "the test is over".to_owned())?;
        }
        match self.wanted {
            Wanted::Model(factor) => Ok(generation(id.0, FakeModel::new(factor), &[])),
            Wanted::NotFinite(factor) => {
                let mut broken = generation(id.0, FakeModel::new(f32::NAN), &[]);
                broken.fingerprint = print(factor);
                Ok(broken)
            }
            Wanted::Changes => Ok(generation(id.0, FakeModel::new(5.0), &[])),
            Wanted::Panic => panic!("asked to panic"),
            _ => Err("the device is full".to_owned()),
        }
    }
}

struct Bench {
    engine: Engine,
    fakes: Arc<Fakes>,
    reloader: Reloader,
    clock: Clock,
    free: Arc<Mutex<Option<u64>>>,
}

/// Factor 1 is live.
fn bench_of(options: ReloadOptions, keep: usize, live: Arc<FakeModel>) -> Bench {
    let clock = Clock::manual();
    let scorer_options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _) = spawn(scorer_options, clock.clone(), ScorerMetrics::unregistered()).expect("threads");
    let engine = engine_keeping(scorer, clock.clone(), keep);
    let id = engine.registry().next_id();
    engine.registry().install(generation(id.0, live, &[]));
    let bounds = CanaryBounds { max_mean_shift: f64::MAX, ..CanaryBounds::default() };
    let fakes = Arc::new(Fakes {
        wanted: Mutex::new(Wanted::Model(1.0)),
        last_good: Mutex::new(Some(1.0)),
        bytes: AtomicU64::new(4),
        prefixes: AtomicU64::new(0),
        bounds: Mutex::new(bounds),
        loads: Arc::default(),
        gate: Mutex::default(),
    });
    let free = Arc::new(Mutex::new(Some(1 << 40)));
    let asked = free.clone();
    let reloader =
        Reloader::new(engine.clone(), fakes.clone(), options, Box::new(move || *asked.lock().expect("whole")), Handle::current());
    Bench { engine, fakes, reloader, clock, free }
}

fn bench() -> Bench {
    bench_of(ReloadOptions::default(), 1, FakeModel::new(1.0))
}

type Ended = (Vec<ReloadStep>, Result<ReloadReport, ReloadFailure>);

async fn ended(mut reload: Reload) -> Ended {
    let mut steps = Vec::new();
    while let Some(step) = reload.steps.recv().await {
        steps.push(step);
    }
    (steps, reload.end.await.expect("an end"))
}

impl Bench {
    fn want(&self, wanted: Wanted) {
        *self.fakes.wanted.lock().expect("whole") = wanted;
    }

    async fn run(&self, request: ReloadRequest) -> Ended {
        ended(self.reloader.start(request, "test").expect("none is running")).await
    }

    async fn reload(&self, wanted: Wanted) -> Result<ReloadReport, ReloadFailure> {
        self.want(wanted);
        self.run(ReloadRequest::default()).await.1
    }

    async fn score(&self, options: CallOptions) -> Result<(f32, Fingerprint), EngineError> {
        let reply = self.engine.score(vec![Sample::Tokens(vec![10])], options, Permit::unlimited()).await?;
        Ok((reply.outcomes[0].as_ref().expect("scored").reward.get(), reply.stamp.fingerprint))
    }

    fn states(&self) -> Vec<(u64, GenerationState)> {
        self.engine.registry().list().into_iter().map(|(described, state)| (described.id.0, state)).collect()
    }

    fn loads(&self) -> u64 {
        self.fakes.loads.load(Ordering::Relaxed)
    }
}

fn pinned(factor: f32) -> CallOptions {
    CallOptions { fingerprint: Some(print(factor).to_string()), ..CallOptions::default() }
}

#[tokio::test]
async fn a_candidate_goes_live_and_the_one_before_serves_whoever_names_it() {
    let bench = bench();
    bench.want(Wanted::Model(2.0));
    let (steps, end) = bench.run(ReloadRequest::default()).await;
    let report = end.expect("loaded");
    assert_eq!(report.outcome, Some(ReloadOutcome::Loaded));
    assert_eq!(
        report.generation.as_ref().map(|(described, state)| (described.fingerprint, *state)),
        Some((print(2.0), GenerationState::Live))
    );
    let mut stages: Vec<&str> = steps.iter().map(|step| step.stage.as_str()).collect();
    stages.dedup();
    assert_eq!(stages, ["plan", "hash", "room", "merge", "canary", "swap"]);
    assert!(steps.iter().any(|step| step.message == "needs a restart: listen stays"), "{steps:?}");
    assert_eq!(bench.score(CallOptions::default()).await, Ok((20.0, print(2.0))));
    assert_eq!(bench.score(pinned(1.0)).await, Ok((10.0, print(1.0))), "held");
    assert_eq!(bench.states(), [(2, GenerationState::Live), (1, GenerationState::Held)]);
    assert_eq!(*bench.fakes.last_good.lock().expect("whole"), Some(2.0), "remembered");
    // The next one lets the first go.
    bench.reload(Wanted::Model(3.0)).await.expect("loaded");
    assert!(matches!(bench.score(pinned(1.0)).await, Err(EngineError::FingerprintNotServed { .. })));
    assert_eq!(bench.score(pinned(2.0)).await, Ok((20.0, print(2.0))));
    assert_eq!(bench.states().len(), 3, "what is gone can still be named");
}

#[tokio::test]
async fn a_reload_that_changes_nothing_says_so_and_loads_nothing() {
    let bench = bench();
    let report = bench.reload(Wanted::Model(1.0)).await.expect("fine");
    assert_eq!((report.outcome, bench.loads()), (Some(ReloadOutcome::Unchanged), 0));
    assert!(report.message.contains("unchanged"), "{report:?}");
    assert_eq!(bench.states(), [(1, GenerationState::Live)]);
}

#[tokio::test]
async fn whatever_fails_leaves_the_live_generation_and_says_why() {
    let bench = bench();
    let opposite = Wanted::Model(-1.0);
    for (wanted, outcome, words) in [
        (Wanted::NoPlan, ReloadOutcome::NoPlan, "members differ"),
        (Wanted::NoWeights, ReloadOutcome::Failed, "a shard is short"),
        (Wanted::NoLoad, ReloadOutcome::Failed, "the device is full"),
        (Wanted::Changes, ReloadOutcome::Failed, "files changed while they were read"),
        (Wanted::Panic, ReloadOutcome::Failed, "panicked: asked to panic"),
        (Wanted::NotFinite(7.0), ReloadOutcome::Refused, "are not finite"),
        (opposite, ReloadOutcome::Refused, "rank correlation with the live model is -1.0000"),
    ] {
        let failure = bench.reload(wanted).await.expect_err("fails");
        assert_eq!(failure.outcome, outcome, "{failure}");
        assert!(failure.message.contains(words), "{failure}");
        assert_eq!(bench.score(CallOptions::default()).await, Ok((10.0, print(1.0))));
        assert_eq!(bench.engine.registry().current().map(|live| live.id.0), Some(1));
    }
    assert_eq!(*bench.fakes.last_good.lock().expect("whole"), Some(1.0));
    bench.reload(Wanted::Model(2.0)).await.expect("the next good one is loaded");
}

#[tokio::test]
async fn only_one_reload_runs_and_what_is_triggered_meanwhile_runs_once_after_it() {
    let bench = bench();
    let (open, closed) = gate::channel();
    *bench.fakes.gate.lock().expect("whole") = Some(Arc::new(Mutex::new(closed)));
    bench.want(Wanted::Model(2.0));
    let first = bench.reloader.start(ReloadRequest::default(), "test").expect("none is running");
    while bench.loads() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.reloader.start(ReloadRequest::default(), "test").expect_err("one is running"), ReloadRunning);
    bench.want(Wanted::Model(3.0));
    (0..5).for_each(|_| bench.reloader.trigger("SIGHUP"));
    let mut live = bench.engine.registry().watch();
    open.send(()).expect("the first waits");
    assert_eq!(ended(first).await.1.expect("loaded").outcome, Some(ReloadOutcome::Loaded));
    open.send(()).expect("the second waits");
    live.wait_for(|live| live.as_ref().is_some_and(|live| live.fingerprint == print(3.0))).await.expect("the second goes live");
    while bench.reloader.start(ReloadRequest::default(), "test").is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.loads(), 2, "five triggers are one reload");
}

#[tokio::test]
async fn what_is_staged_goes_live_on_call_and_back_again() {
    let options = ReloadOptions { activation: Activation::OnCall, ..ReloadOptions::default() };
    let bench = bench_of(options, 1, FakeModel::new(1.0));
    let report = bench.reload(Wanted::Model(2.0)).await.expect("staged");
    assert_eq!(report.outcome, Some(ReloadOutcome::Staged));
    assert_eq!(bench.score(CallOptions::default()).await, Ok((10.0, print(1.0))));
    assert!(bench.score(pinned(2.0)).await.is_err(), "staged is not served");
    assert_eq!(bench.reload(Wanted::Model(2.0)).await.expect("again").outcome, Some(ReloadOutcome::Unchanged));
    assert_eq!(*bench.fakes.last_good.lock().expect("whole"), Some(1.0), "staged is not good yet");
    for (factor, score) in [(2.0, 20.0), (1.0, 10.0), (1.0, 10.0), (2.0, 20.0)] {
        bench.reloader.activate(print(factor)).expect("here");
        assert_eq!(bench.score(CallOptions::default()).await, Ok((score, print(factor))));
        assert_eq!(*bench.fakes.last_good.lock().expect("whole"), Some(factor));
    }
    let problem = bench.reloader.activate(print(9.0)).expect_err("unknown").to_string();
    assert!(problem.contains(&print(1.0).to_string()) && problem.contains("is held"), "{problem}");
    assert_eq!(bench.loads(), 1);
}

#[tokio::test]
async fn a_reload_to_what_is_held_swaps_without_loading() {
    let bench = bench();
    bench.reload(Wanted::Model(2.0)).await.expect("loaded");
    assert_eq!(bench.reload(Wanted::Model(1.0)).await.expect("back").outcome, Some(ReloadOutcome::Activated));
    assert_eq!((bench.loads(), bench.score(CallOptions::default()).await), (1, Ok((10.0, print(1.0)))));
}

#[tokio::test]
async fn a_dry_run_plans_and_loads_nothing() {
    let bench = bench();
    bench.want(Wanted::Model(2.0));
    let (steps, end) = bench.run(ReloadRequest { dry_run: true, ..ReloadRequest::default() }).await;
    let report = end.expect("planned");
    assert_eq!((report.outcome, bench.loads()), (None, 0));
    assert!(report.message.contains(&print(2.0).to_string()) && report.message.contains("beside"), "{report:?}");
    assert!(steps.iter().any(|step| step.message == "two members"));
    *bench.free.lock().expect("whole") = Some(0);
    let failure = bench.run(ReloadRequest { dry_run: true, ..ReloadRequest::default() }).await.1.expect_err("no room");
    assert_eq!(failure.outcome, ReloadOutcome::NoRoom);
}

#[tokio::test]
async fn without_room_nothing_is_loaded_and_what_is_held_makes_room() {
    let bench = bench();
    bench.reload(Wanted::Model(2.0)).await.expect("loaded");
    *bench.free.lock().expect("whole") = Some(1 << 20);
    let failure = bench.reload(Wanted::Model(3.0)).await.expect_err("no room");
    assert_eq!((failure.outcome, bench.loads()), (ReloadOutcome::NoRoom, 1));
    assert!(failure.message.contains("1.0 MiB are free"), "{failure}");
    // Just enough, once the 4 bytes of what is held are free.
    *bench.free.lock().expect("whole") = Some(super::super::room::HEADROOM);
    bench.reload(Wanted::Model(3.0)).await.expect("after a release");
    assert_eq!(bench.score(CallOptions::default()).await, Ok((30.0, print(3.0))));
    assert!(bench.score(pinned(1.0)).await.is_err(), "was held, made room");
    assert_eq!(bench.score(pinned(2.0)).await, Ok((20.0, print(2.0))), "was live");
}

#[tokio::test]
async fn the_live_model_is_asked_once_and_a_candidate_does_not_stand_in_its_queue() {
    let (entered, mut inside) = mpsc::unbounded_channel();
    let (release, released) = gate::channel::<()>();
    let released = Mutex::new(released);
    // A request of token 7 holds the device until it is let go.
    let live = FakeModel::hooked(1.0, move |samples| {
        if samples[0] == [7] {
            let _ = entered.send(());
            let _ = released.lock().expect("whole").recv();
        }
    });
    let bench = bench_of(ReloadOptions::default(), 1, live.clone());
    assert_eq!(bench.reload(Wanted::Model(-1.0)).await.expect_err("ranks otherwise").outcome, ReloadOutcome::Refused);
    let asked = live.forwards.load(Ordering::Relaxed);
    assert!(asked > 0);
    assert_eq!(bench.reload(Wanted::Model(-2.0)).await.expect_err("ranks otherwise").outcome, ReloadOutcome::Refused);
    assert_eq!(live.forwards.load(Ordering::Relaxed), asked, "it says what it said");

    let engine = bench.engine.clone();
    let busy = tokio::spawn(async move { engine.score(vec![Sample::Tokens(vec![7])], CallOptions::default(), Permit::unlimited()).await });
    inside.recv().await.expect("the device is busy");
    assert_eq!(bench.reload(Wanted::Model(2.0)).await.expect("goes live").outcome, Some(ReloadOutcome::Loaded));
    // The one that is live now was asked as a candidate.
    assert_eq!(bench.reload(Wanted::Model(3.0)).await.expect("goes live").outcome, Some(ReloadOutcome::Loaded));
    release.send(()).expect("the device waits");
    assert_eq!(busy.await.expect("no panic").expect("scored").stamp.fingerprint, print(1.0));
}

#[tokio::test]
async fn room_for_prefix_caches_counts_and_is_named_where_it_lacks() {
    let bench = bench();
    bench.fakes.prefixes.store(1 << 20, Ordering::Relaxed);
    *bench.free.lock().expect("whole") = Some(super::super::room::HEADROOM + (1 << 20) + 3);
    let failure = bench.reload(Wanted::Model(2.0)).await.expect_err("a byte is missing");
    assert_eq!((failure.outcome, bench.loads()), (ReloadOutcome::NoRoom, 0));
    assert!(failure.message.contains("1.0 MiB that prefix caches may take"), "{failure}");
    *bench.free.lock().expect("whole") = Some(super::super::room::HEADROOM + (1 << 20) + 4);
    bench.reload(Wanted::Model(2.0)).await.expect("just enough");
    // What the live one's caches hold is gone from free memory and comes back when the next one's begin to fill.
    let mut live = generation(9, FakeModel::new(9.0), &[]);
    live.prefix_bytes = 1 << 20;
    bench.engine.registry().install(live);
    *bench.free.lock().expect("whole") = Some(super::super::room::HEADROOM + (1 << 20) + 4 - FakeModel::HELD);
    bench.reload(Wanted::Model(3.0)).await.expect("just enough");
}

const IN_PLACE: ReloadOptions =
    ReloadOptions { swap: Swap::InPlace, activation: Activation::OnLoad, drain: Duration::from_secs(30), threads: 1 };

#[tokio::test]
async fn in_place_answers_unavailable_until_the_new_generation_is_there() {
    let bench = bench_of(IN_PLACE, 0, FakeModel::new(1.0));
    let (open, closed) = gate::channel();
    *bench.fakes.gate.lock().expect("whole") = Some(Arc::new(Mutex::new(closed)));
    bench.want(Wanted::Model(2.0));
    let reload = bench.reloader.start(ReloadRequest::default(), "test").expect("none is running");
    while bench.loads() == 0 {
        tokio::task::yield_now().await;
    }
    assert!(matches!(bench.score(CallOptions::default()).await, Err(EngineError::NotReady(_))));
    assert!(matches!(bench.score(pinned(1.0)).await, Err(EngineError::NotReady(_))), "nothing is held");
    assert_eq!(bench.states(), [(1, GenerationState::Gone)], "its memory is free before the next one is loaded");
    open.send(()).expect("the load waits");
    let (steps, end) = ended(reload).await;
    assert_eq!(end.expect("loaded").outcome, Some(ReloadOutcome::Loaded));
    assert!(steps.iter().any(|step| step.stage == "room" && step.message.contains("nothing is held")), "{steps:?}");
    assert_eq!(bench.score(CallOptions::default()).await, Ok((20.0, print(2.0))));
}

#[tokio::test]
async fn in_place_a_candidate_that_fails_brings_the_last_good_one_back() {
    let bench = bench_of(IN_PLACE, 0, FakeModel::new(1.0));
    for (wanted, outcome) in [
        (Wanted::NoLoad, ReloadOutcome::Failed),
        (Wanted::NotFinite(7.0), ReloadOutcome::Refused),
        // Compared with what the live one said before it went.
        (Wanted::Model(-1.0), ReloadOutcome::Refused),
    ] {
        assert_eq!(bench.reload(wanted).await.expect_err("fails").outcome, outcome);
        assert_eq!(bench.score(CallOptions::default()).await, Ok((10.0, print(1.0))));
    }
    *bench.fakes.last_good.lock().expect("whole") = None;
    let failure = bench.reload(Wanted::NoLoad).await.expect_err("fails");
    assert!(failure.message.contains("does not come back: none"), "{failure}");
    assert!(matches!(bench.score(CallOptions::default()).await, Err(EngineError::NotReady(_))));
    bench.reload(Wanted::Model(2.0)).await.expect("from nothing");
}

#[tokio::test]
async fn in_place_requests_that_do_not_end_keep_their_generation_live() {
    let bench = bench_of(IN_PLACE, 0, FakeModel::new(1.0));
    bench.want(Wanted::Model(2.0));
    // What a request holds for its whole length.
    let request = bench.engine.registry().current();
    let mut live = bench.engine.registry().watch();
    live.mark_unchanged();
    let reload = bench.reloader.start(ReloadRequest::default(), "test").expect("none is running");
    live.wait_for(Option::is_none).await.expect("drains");
    while bench.engine.registry().current().is_none() {
        bench.clock.advance(Duration::from_secs(1));
        tokio::task::yield_now().await;
    }
    let failure = ended(reload).await.1.expect_err("given up");
    assert!(failure.message.contains("still use the live generation"), "{failure}");
    assert_eq!((failure.outcome, bench.loads()), (ReloadOutcome::NoRoom, 0));
    assert_eq!(bench.states(), [(1, GenerationState::Live)]);
    assert_eq!(bench.engine.registry().metrics().retiring().get(), 0);
    drop(request);
    assert_eq!(bench.reload(Wanted::Model(2.0)).await.expect("loaded").outcome, Some(ReloadOutcome::Loaded));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_reloads_under_load_fail_no_request_and_keep_no_memory() {
    const RELOADS: usize = 200;
    const CALLERS: u64 = 4;
    let bench = bench();
    let stop = Arc::new(AtomicBool::new(false));
    let (answered, mut answers) = tokio::sync::watch::channel(0_u64);
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (engine, stop, answered) = (bench.engine.clone(), stop.clone(), answered.clone());
            tokio::spawn(async move {
                let mut generations = HashSet::new();
                loop {
                    let ids: Vec<u32> = (1..20 + caller as u32).collect();
                    let samples = vec![Sample::Tokens(ids.clone()); 3];
                    let reply = engine.score(samples, CallOptions::default(), Permit::unlimited()).await.expect("no request fails");
                    let factor = f32::from_be_bytes(reply.stamp.fingerprint.0[..4].try_into().expect("four"));
                    let own = FakeModel::new(factor).score(&ids);
                    for outcome in reply.outcomes {
                        assert_eq!(outcome.expect("scored").reward.get(), own, "all by the generation that is named");
                    }
                    generations.insert(reply.stamp.generation.0);
                    answered.send_modify(|answered| *answered += 1);
                    if stop.load(Ordering::Relaxed) {
                        return generations;
                    }
                }
            })
        })
        .collect();
    drop(answered);
    for i in 0..RELOADS {
        let factor = 2.0 + (i % 7) as f32;
        let outcome = bench.reload(Wanted::Model(factor)).await.expect("good").outcome;
        assert_eq!(outcome, Some(ReloadOutcome::Loaded), "reload {i}");
        // Each caller may have asked the generation before; whoever answers twice has asked this one.
        let enough = *answers.borrow() + CALLERS + 1;
        answers.wait_for(|&answered| answered >= enough).await.expect("callers go on");
    }
    stop.store(true, Ordering::Relaxed);
    let mut generations = HashSet::new();
    for caller in callers {
        let seen = caller.await.expect("no panic");
        assert!(!seen.is_empty());
        generations.extend(seen);
    }
    assert!(generations.len() >= RELOADS, "the load saw {} generations", generations.len());
    let registry = bench.engine.registry();
    let ends: Vec<_> = registry.vacate();
    for end in ends {
        end.comes().await;
    }
    while bench.states().iter().any(|(_, state)| *state != GenerationState::Gone) {
        tokio::task::yield_now().await;
    }
    assert_eq!(registry.metrics().retiring().get(), 0, "every generation has given its memory back");
    assert!(bench.states().len() <= 17, "what is gone is not listed for ever");
}

#[tokio::test]
async fn the_figures_of_the_canary_are_shown() {
    let registry = prometheus::Registry::new();
    let metrics = super::super::RegistryMetrics::register(&registry).expect("names are free");
    let text = || prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
    for series in [
        "warm_registry_canary{figure=\"rank_correlation\"} NaN",
        "warm_registry_generations{state=\"held\"} 0",
        "warm_registry_generations{state=\"retiring\"} 0",
        "warm_registry_reloads_total{outcome=\"refused\"} 0",
        "warm_registry_reloading 0",
        "warm_registry_restart_needed 0",
        "warm_registry_reload_timestamp_seconds 0",
    ] {
        assert!(text().contains(series), "{series} is not in\n{}", text());
    }
    metrics.canary(&Figures { answered: 5, rank_correlation: Some(0.75), ..Figures::default() });
    assert!(text().contains("warm_registry_canary{figure=\"rank_correlation\"} 0.75"));
    assert!(text().contains("warm_registry_canary{figure=\"accuracy\"} NaN"));
}

#[tokio::test]
async fn packs_are_measured_for_every_generation_and_are_so_large_once_it_is_live() {
    let bench = bench();
    // Four bytes of every generation, and a hundred tokens by its factor.
    bench.reloader.fit_packs(Box::new(|generation, others| {
        let factor = f32::from_be_bytes(generation.fingerprint.0[..4].try_into().expect("four"));
        100 * factor as usize + others as usize
    }));
    let tokens = || bench.engine.scorer().max_pack_tokens();
    let before = tokens();
    bench.want(Wanted::Model(2.0));
    bench.run(ReloadRequest { stage_only: true, ..ReloadRequest::default() }).await.1.expect("staged");
    assert_eq!(tokens(), before, "what is staged changes nothing");
    bench.want(Wanted::Model(3.0));
    bench.run(ReloadRequest::default()).await.1.expect("live");
    assert_eq!(tokens(), 308, "beside a live and a staged one");
    bench.reloader.activate(print(2.0)).expect("staged");
    assert_eq!(tokens(), 204, "as was measured when it was loaded");
}
