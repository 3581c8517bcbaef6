//! The engine on fakes: the worker is stepped by hand and the clock is the test's own.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use proptest::prelude::*;

use super::testing::*;
use super::*;
use crate::clock::Clock;
use crate::domain::{Conversation, FailureKind, MemberScale, Sample, Truncation};
use crate::scorer::{Admission, AdmissionOptions, Permit, ScorerMetrics, ScorerOptions, Worker};

type Call<T> = Pin<Box<dyn Future<Output = Result<T, EngineError>>>>;

/// What a call has come to, if anything.
fn now<T>(call: &mut Call<T>) -> Option<Result<T, EngineError>> {
    match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

fn score(engine: &Engine, samples: Vec<Sample>, options: CallOptions, permit: Permit) -> Call<ScoreReply> {
    let engine = engine.clone();
    Box::pin(async move { engine.score(samples, options, permit).await })
}

fn compare(engine: &Engine, samples: Vec<Sample>, options: CallOptions, compare: CompareOptions) -> Call<CompareReply> {
    let engine = engine.clone();
    Box::pin(async move { engine.compare(samples, options, compare, Permit::unlimited()).await })
}

struct Bench {
    clock: Clock,
    engine: Engine,
    worker: Worker,
    model: Arc<FakeModel>,
    members: [Arc<FakeModel>; 2],
}

impl Bench {
    fn with(options: ScorerOptions, resident: bool) -> Self {
        let clock = Clock::manual();
        let (engine, worker) = stepped(options, clock.clone());
        let (model, members) = (FakeModel::new(1.0), [FakeModel::new(2.0), FakeModel::new(-4.0)]);
        let named = [("rm-0", members[0].clone()), ("rm-1", members[1].clone())];
        engine.registry().install(generation(1, model.clone(), if resident { &named } else { &[] }));
        Self { clock, engine, worker, model, members }
    }

    fn new() -> Self {
        Self::with(ScorerOptions { max_pack_tokens: 64, ..ScorerOptions::default() }, true)
    }

    /// Polls once so that the work is submitted, steps the worker until it is idle, and takes the result.
    fn finish<T>(&mut self, mut call: Call<T>) -> Result<T, EngineError> {
        if let Some(result) = now(&mut call) {
            return result;
        }
        while self.worker.step() {}
        now(&mut call).expect("the worker is idle, so everything is answered")
    }

    fn score(&mut self, samples: Vec<Sample>, options: CallOptions) -> Result<ScoreReply, EngineError> {
        let call = score(&self.engine, samples, options, Permit::unlimited());
        self.finish(call)
    }
}

fn tokens(ids: &[u32]) -> Sample {
    Sample::Tokens(ids.to_vec())
}

#[test]
fn a_reply_has_every_score_in_order_and_names_who_scored() {
    let mut bench = Bench::new();
    let options = CallOptions { details: true, truncation: Truncation::Left, ..CallOptions::default() };
    let mut long = vec![9; 70];
    long[69] = 7;
    let reply = bench.score(vec![tokens(&[1, 2]), Sample::Text("a".into()), tokens(&long)], options).expect("scored");
    let scored: Vec<_> = reply.outcomes.iter().map(|outcome| outcome.as_ref().expect("scored")).collect();
    assert_eq!(scored.iter().map(|scored| scored.tokens).collect::<Vec<_>>(), [2, 1, 64]);
    assert_eq!((scored[0].reward.get(), scored[1].reward.get()), (5.0, 97.0));
    assert_eq!(scored[2].reward.get(), bench.model.score(&long[6..]));
    assert!(scored[2].truncated && !scored[0].truncated && scored[0].outputs.is_empty());
    let details = scored[0].details.as_ref().expect("asked for");
    assert_eq!((details.token_ids.as_slice(), details.pooled_position), ([1, 2].as_slice(), 1));
    let live = bench.engine.registry().current().expect("installed");
    assert_eq!(reply.stamp, bench.engine.stamp(&live));
    assert_eq!((reply.stamp.generation.0, reply.stamp.instance.as_str()), (1, "test"));
}

#[test]
fn one_bad_sample_of_512_costs_itself_and_strict_fails_the_call() {
    for (bad, kind) in [
        (tokens(&[5; 65]), FailureKind::TooLong),
        (tokens(&[]), FailureKind::Empty),
        (Sample::Conversation(Conversation::user("x")), FailureKind::TemplateRefused),
        (tokens(&[NAN]), FailureKind::NonFinite),
    ] {
        let mut samples: Vec<Sample> = (0..512).map(|i| tokens(&[i])).collect();
        samples[300] = bad;
        let mut bench = Bench::new();
        let reply = bench.score(samples.clone(), CallOptions::default()).expect("a reply");
        for (i, outcome) in reply.outcomes.iter().enumerate() {
            match outcome {
                Ok(scored) => assert_eq!(scored.reward.get(), i as f32),
                Err(failure) => assert_eq!((i, failure.kind), (300, kind)),
            }
        }
        assert_eq!(reply.outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 511);
        let error = bench.score(samples, CallOptions { strict: true, ..CallOptions::default() }).expect_err("strict");
        assert!(matches!(error, EngineError::Strict { index: 300, failure } if failure.kind == kind));
        let counted = bench.engine.registry().metrics().failures.with_label_values(&[kind.name()]).get();
        assert_eq!(counted, 2, "one in each call");
    }
}

#[test]
fn a_call_of_nothing_but_bad_samples_never_reaches_the_device() {
    let mut bench = Bench::new();
    let reply = bench.score(vec![tokens(&[])], CallOptions::default()).expect("a reply");
    assert_eq!(reply.outcomes[0].as_ref().map_err(|failure| failure.kind), Err(FailureKind::Empty));
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 0);
    assert!(matches!(bench.score(vec![], CallOptions::default()), Err(EngineError::Invalid { field, .. }) if field == "samples"));
}

#[test]
fn what_a_call_asks_for_and_cannot_have_is_named() {
    let mut bench = Bench::with(ScorerOptions::default(), false);
    let with = |change: fn(&mut CallOptions)| {
        let mut options = CallOptions::default();
        change(&mut options);
        options
    };
    let one = || vec![tokens(&[1])];
    let error = bench.score(one(), with(|options| options.fingerprint = Some("00ff".into()))).expect_err("another model");
    assert!(matches!(&error, EngineError::FingerprintNotServed { asked, .. } if asked == "00ff"));
    let error = bench.score(one(), with(|options| options.scorer = Some("rm-1".into()))).expect_err("off");
    assert_eq!(error, EngineError::MembersNotLoaded);
    let error = bench.score(one(), with(|options| options.scorer = Some("rm-9".into()))).expect_err("unknown");
    assert_eq!(error.to_string(), "no member is named \"rm-9\"; expected one of: rm-0, rm-1");
    let error = bench.score(one(), with(|options| options.calibrated = true)).expect_err("none loaded");
    assert_eq!(error, EngineError::CalibrationMissing);
    let call = compare(&bench.engine, one(), CallOptions::default(), CompareOptions::default());
    assert_eq!(bench.finish(call).expect_err("off"), EngineError::MembersNotLoaded);
    let (engine, _worker) = stepped(ScorerOptions::default(), Clock::manual());
    let mut call = score(&engine, one(), CallOptions::default(), Permit::unlimited());
    assert!(matches!(now(&mut call), Some(Err(EngineError::NotReady(_)))));
}

#[test]
fn the_named_generation_and_the_named_member_score() {
    let mut bench = Bench::new();
    let live = bench.engine.registry().current().expect("installed");
    let fingerprint = Some(live.fingerprint.to_string());
    let options = CallOptions { fingerprint, scorer: Some("rm-1".into()), ..CallOptions::default() };
    let reply = bench.score(vec![tokens(&[3])], options).expect("scored");
    assert_eq!(reply.outcomes[0].as_ref().expect("scored").reward.get(), -12.0);
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 0);
}

#[test]
fn a_request_is_scored_by_the_generation_that_it_pinned() {
    let mut bench = Bench::new();
    let mut before = score(&bench.engine, vec![tokens(&[1]); 100], CallOptions::default(), Permit::unlimited());
    assert!(now(&mut before).is_none());
    bench.worker.step();
    let old = Arc::downgrade(&bench.engine.registry().install(generation(2, FakeModel::new(10.0), &[])).expect("one before"));
    let mut after = score(&bench.engine, vec![tokens(&[1]); 100], CallOptions::default(), Permit::unlimited());
    assert!(now(&mut after).is_none() && old.upgrade().is_some());
    while bench.worker.step() {}
    let (before, after) = (now(&mut before).expect("done").expect("scored"), now(&mut after).expect("done").expect("scored"));
    assert!(before.outcomes.iter().all(|outcome| outcome.as_ref().is_ok_and(|scored| scored.reward.get() == 1.0)));
    assert!(after.outcomes.iter().all(|outcome| outcome.as_ref().is_ok_and(|scored| scored.reward.get() == 10.0)));
    assert_eq!((before.stamp.generation.0, after.stamp.generation.0), (1, 2));
    assert!(old.upgrade().is_none(), "the old generation goes with its last request");
}

#[test]
fn calibration_moves_the_reward_of_the_merged_model() {
    let mut bench = Bench::new();
    let mut calibrated = generation(2, FakeModel::new(1.0), &[("rm-0", FakeModel::new(1.0))]);
    calibrated.calibration = Some(Calibration::new(2.0, 4.0, 100, "tests").expect("valid"));
    bench.engine.registry().install(calibrated);
    let options = CallOptions { calibrated: true, ..CallOptions::default() };
    let reply = bench.score(vec![tokens(&[10])], options.clone()).expect("scored");
    assert_eq!(reply.outcomes[0].as_ref().expect("scored").reward.get(), 2.0);
    let member = CallOptions { scorer: Some("rm-0".into()), ..options };
    assert_eq!(bench.score(vec![tokens(&[10])], member), Err(EngineError::CalibrationMissing));
    for (mean, std) in [(f64::NAN, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, f64::INFINITY)] {
        assert!(Calibration::new(mean, std, 1, "").is_err());
    }
}

#[test]
fn several_outputs_come_whole_and_the_reward_is_the_first() {
    let mut bench = Bench::new();
    let model = Arc::new(FakeModel { outputs: 3, ..FakeModel::bare(1.0) });
    bench.engine.registry().install(generation(2, model, &[]));
    let reply = bench.score(vec![tokens(&[4])], CallOptions::default()).expect("scored");
    let scored = reply.outcomes[0].as_ref().expect("scored");
    assert_eq!((scored.reward.get(), scored.outputs.as_slice()), (4.0, [4.0; 3].as_slice()));
}

#[test]
fn a_comparison_shows_the_members_beside_the_merged_model() {
    let mut bench = Bench::new();
    let call = compare(&bench.engine, vec![tokens(&[1]), tokens(&[]), tokens(&[3])], CallOptions::default(), CompareOptions::default());
    let reply = bench.finish(call).expect("compared");
    assert_eq!(reply.members.iter().map(|name| name.as_str()).collect::<Vec<_>>(), ["rm-0", "rm-1"]);
    assert_eq!(reply.uwo_lambda, 0.5);
    let compared = reply.outcomes[2].as_ref().expect("compared");
    assert_eq!(compared.members.iter().map(|score| score.get()).collect::<Vec<_>>(), [6.0, -12.0]);
    // By hand: mean (6 - 12) / 2, deviations 9, gap 3 - (-3).
    assert_eq!((compared.stats.mean, compared.stats.std, compared.stats.gap, compared.stats.argmin), (-3.0, 9.0, 6.0, 1));
    assert_eq!(reply.outcomes[1].as_ref().map_err(|failure| failure.kind), Err(FailureKind::Empty));
    let forwards = |model: &FakeModel| model.forwards.load(Ordering::Relaxed);
    assert_eq!((forwards(&bench.model), forwards(&bench.members[0]), forwards(&bench.members[1])), (1, 1, 1));
    let agreement = group_agreement(&reply.outcomes).expect("two have scores");
    // Merged prefers the last; rm-0 too; rm-1 and the mean prefer the first.
    assert_eq!((agreement.best_by_merged, agreement.best_by_mean, agreement.votes), (2, 0, vec![1, 0, 1]));
    assert_eq!(group_agreement(&reply.outcomes[1..2]), None);
}

#[test]
fn a_comparison_of_some_members_runs_no_other() {
    let mut bench = Bench::new();
    let some = CompareOptions { members: vec!["rm-1".into()], uwo_lambda: Some(0.0), ..CompareOptions::default() };
    let call = compare(&bench.engine, vec![tokens(&[1])], CallOptions::default(), some);
    let reply = bench.finish(call).expect("compared");
    let compared = reply.outcomes[0].as_ref().expect("compared");
    assert_eq!((compared.members.len(), compared.stats.mean, compared.stats.uwo), (1, -4.0, -4.0));
    assert_eq!(bench.members[0].forwards.load(Ordering::Relaxed), 0);
}

#[test]
fn every_model_is_scaled_by_its_own_statistics() {
    let mut bench = Bench::new();
    let scaled = |scale| CompareOptions { scale, ..CompareOptions::default() };
    let call = |bench: &Bench, scale| compare(&bench.engine, vec![tokens(&[10])], CallOptions::default(), scaled(scale));
    let standardized = call(&bench, MemberScale::Standardized);
    let missing = bench.finish(standardized).expect_err("no statistics");
    assert!(matches!(&missing, EngineError::ScaleMissing { who, seen: 0 } if who == "the merged model"), "{missing}");

    let mut calibrated = generation(2, FakeModel::new(1.0), &[("rm-0", FakeModel::new(2.0)), ("rm-1", FakeModel::new(-4.0))]);
    calibrated.calibration = Some(Calibration::new(4.0, 2.0, 9, "x").expect("valid"));
    for (name, mean, std) in [("rm-0", 10.0, 5.0), ("rm-1", -50.0, 20.0)] {
        let name = crate::domain::MemberName::try_from(name.to_owned()).expect("plain");
        calibrated.member_calibrations.insert(name, Calibration::new(mean, std, 9, "x").expect("valid"));
    }
    bench.engine.registry().install(calibrated);
    // Raw rewards are 10, 20 and -40.
    for (scale, merged, members) in
        [(MemberScale::Raw, 10.0, [20.0, -40.0]), (MemberScale::Centered, 6.0, [10.0, 10.0]), (MemberScale::Standardized, 3.0, [2.0, 0.5])]
    {
        let call = call(&bench, scale);
        let reply = bench.finish(call).expect("compared");
        let compared = reply.outcomes[0].as_ref().expect("compared");
        assert_eq!(compared.merged.reward.get(), merged);
        assert_eq!(compared.members.iter().map(|score| score.get()).collect::<Vec<_>>(), members);
        assert_eq!(compared.stats.gap, f64::from(merged - (members[0] + members[1]) / 2.0), "statistics are in the scale");
        let source = if scale == MemberScale::Raw { ScaleSource::None } else { ScaleSource::Calibration };
        assert_eq!((reply.scale, reply.scale_source), (scale, source));
    }
    // A member that scores alone has its own calibration, too.
    let options = CallOptions { scorer: Some("rm-0".into()), calibrated: true, ..CallOptions::default() };
    assert_eq!(bench.score(vec![tokens(&[10])], options).expect("scored").outcomes[0].as_ref().expect("scored").reward.get(), 2.0);
}

#[test]
fn without_calibrations_what_was_seen_so_far_is_the_scale() {
    let mut bench = Bench::new();
    let samples: Vec<Sample> = (0..MIN_RUNNING as u32).map(|i| tokens(&[i % 2 * 2])).collect();
    let call = compare(&bench.engine, samples, CallOptions::default(), CompareOptions::default());
    bench.finish(call).expect("compared");
    // Half of the samples are 0 and half 2: the merged model's mean is 1 and its deviation 1, rm-0's twice that.
    let scaled = CompareOptions { scale: MemberScale::Standardized, ..CompareOptions::default() };
    let call = compare(&bench.engine, vec![tokens(&[3])], CallOptions::default(), scaled);
    let reply = bench.finish(call).expect("compared");
    assert_eq!(reply.scale_source, ScaleSource::Running);
    let compared = reply.outcomes[0].as_ref().expect("compared");
    let found: Vec<f32> =
        std::iter::once(compared.merged.reward).chain(compared.members.iter().copied()).map(|score| score.get()).collect();
    assert!(found.iter().zip([2.0, 2.0, -2.0]).all(|(found, expected)| (found - expected).abs() < 1e-5), "{found:?}");
}

/// Members that are made when they are asked for; counts how many are there at once.
struct Streams(Arc<std::sync::atomic::AtomicI64>, Arc<std::sync::atomic::AtomicI64>);

struct Streamed(Arc<FakeModel>, Arc<std::sync::atomic::AtomicI64>);

impl crate::model::RewardModel for Streamed {
    fn forward(&self, pack: &crate::model::Pack) -> Result<Vec<crate::model::Output>, crate::model::ModelError> {
        self.0.forward(pack)
    }

    fn limits(&self) -> crate::model::Limits {
        self.0.limits()
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

impl StreamedMembers for Streams {
    fn load(&self, index: usize) -> Result<Arc<dyn crate::model::RewardModel>, String> {
        let here = self.0.fetch_add(1, Ordering::SeqCst) + 1;
        self.1.fetch_max(here, Ordering::SeqCst);
        match index {
            0 => Ok(Arc::new(Streamed(FakeModel::new(2.0), self.0.clone()))),
            1 => Ok(Arc::new(Streamed(FakeModel::new(-4.0), self.0.clone()))),
            _ => Err("no such member".to_owned()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streamed_members_say_what_resident_ones_say_and_never_stand_there_together() {
    let clock = Clock::system();
    let options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _thread) = crate::scorer::spawn(options, clock.clone(), ScorerMetrics::unregistered()).expect("threads");
    let engine = engine_on(scorer, clock);
    let samples = || vec![tokens(&[1]), tokens(&[]), tokens(&[3])];
    let ask = async |engine: &Engine, members: &[&str]| {
        let compare = CompareOptions { members: members.iter().map(|name| (*name).to_owned()).collect(), ..CompareOptions::default() };
        engine.compare(samples(), CallOptions::default(), compare, Permit::unlimited()).await.map(|reply| (reply.outcomes, reply.members))
    };
    engine.registry().install(generation(1, FakeModel::new(1.0), &[("rm-0", FakeModel::new(2.0)), ("rm-1", FakeModel::new(-4.0))]));
    let (all, one) = (ask(&engine, &[]).await.expect("compared"), ask(&engine, &["rm-1"]).await.expect("compared"));
    let mut streamed = generation(2, FakeModel::new(1.0), &[]);
    let (here, most) = (Arc::<std::sync::atomic::AtomicI64>::default(), Arc::<std::sync::atomic::AtomicI64>::default());
    streamed.streamed = Some(Arc::new(Streams(here.clone(), most.clone())));
    engine.registry().install(streamed);
    let calls = (0..8).map(|_| {
        let engine = engine.clone();
        tokio::spawn(async move {
            engine.compare(vec![tokens(&[1])], CallOptions::default(), CompareOptions::default(), Permit::unlimited()).await
        })
    });
    let calls: Vec<_> = calls.collect();
    assert_eq!(ask(&engine, &[]).await.expect("compared"), all);
    assert_eq!(ask(&engine, &["rm-1"]).await.expect("compared"), one);
    for call in calls {
        call.await.expect("no panic").expect("compared");
    }
    let member = CallOptions { scorer: Some("rm-1".into()), ..CallOptions::default() };
    let scored = engine.score(vec![tokens(&[3])], member, Permit::unlimited()).await.expect("scored");
    assert_eq!(scored.outcomes[0].as_ref().expect("scored").reward.get(), -12.0);
    assert_eq!(most.load(Ordering::SeqCst), 1, "one place for all calls");
    let unknown = ask(&engine, &["rm-9"]).await.expect_err("unknown");
    assert!(matches!(unknown, EngineError::UnknownMember { .. }));
}

#[test]
fn a_comparison_refuses_what_it_cannot_mean() {
    let mut bench = Bench::new();
    let refused = |bench: &mut Bench, options: CallOptions, comparing: CompareOptions| {
        let call = compare(&bench.engine, vec![tokens(&[1])], options, comparing);
        match bench.finish(call) {
            Err(EngineError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    };
    let calibrated = CallOptions { calibrated: true, ..CallOptions::default() };
    assert_eq!(refused(&mut bench, calibrated, CompareOptions::default()), "options.scale");
    let member = CallOptions { scorer: Some("rm-0".into()), ..CallOptions::default() };
    assert_eq!(refused(&mut bench, member, CompareOptions::default()), "options.scorer");
    let twice = CompareOptions { members: vec!["rm-0".into(), "rm-0".into()], ..CompareOptions::default() };
    assert_eq!(refused(&mut bench, CallOptions::default(), twice), "members[1]");
    for lambda in [f64::NAN, -1.0, f64::INFINITY] {
        let wrong = CompareOptions { uwo_lambda: Some(lambda), ..CompareOptions::default() };
        assert_eq!(refused(&mut bench, CallOptions::default(), wrong), "uwo_lambda");
    }
}

#[test]
fn a_member_that_gives_nan_fails_the_sample_by_name() {
    let mut bench = Bench::new();
    let call = compare(&bench.engine, vec![tokens(&[NAN]), tokens(&[1])], CallOptions::default(), CompareOptions::default());
    let reply = bench.finish(call).expect("a reply");
    assert_eq!(reply.outcomes[0].as_ref().map_err(|failure| failure.kind), Err(FailureKind::NonFinite));
    assert!(reply.outcomes[1].is_ok());
}

#[test]
fn the_deadline_holds_while_queued_and_the_work_is_withdrawn() {
    let mut bench = Bench::new();
    let deadline = Some(bench.clock.now() + Duration::from_millis(50));
    let mut call = score(&bench.engine, vec![tokens(&[1])], CallOptions { deadline, ..CallOptions::default() }, Permit::unlimited());
    assert!(now(&mut call).is_none());
    bench.clock.advance(Duration::from_millis(49));
    assert!(now(&mut call).is_none());
    bench.clock.advance(Duration::from_millis(1));
    assert_eq!(now(&mut call), Some(Err(EngineError::DeadlineExceeded)), "no worker was needed to say so");
    while bench.worker.step() {}
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 0);
    let past = CallOptions { deadline, ..CallOptions::default() };
    assert_eq!(bench.score(vec![tokens(&[1])], past), Err(EngineError::DeadlineExceeded));
}

#[test]
fn a_deadline_that_the_worker_finds_first_is_the_same_answer() {
    let mut bench = Bench::new();
    let deadline = Some(bench.clock.now() + Duration::from_millis(50));
    let mut call = score(&bench.engine, vec![tokens(&[1])], CallOptions { deadline, ..CallOptions::default() }, Permit::unlimited());
    assert!(now(&mut call).is_none());
    bench.clock.advance(Duration::from_millis(50));
    while bench.worker.step() {}
    assert_eq!(now(&mut call), Some(Err(EngineError::DeadlineExceeded)));
}

#[test]
fn a_dropped_call_is_never_run_and_frees_its_permit() {
    let mut bench = Bench::new();
    let admission = Admission::new(AdmissionOptions::default(), ScorerMetrics::unregistered());
    let mut call = score(&bench.engine, vec![tokens(&[1])], CallOptions::default(), admission.admit(10).expect("room"));
    assert!(now(&mut call).is_none());
    drop(call);
    while bench.worker.step() {}
    assert_eq!((bench.model.forwards.load(Ordering::Relaxed), *admission.in_flight().borrow()), (0, 0));
}

#[test]
fn a_panic_in_the_forward_fails_only_its_own_request() {
    let mut bench = Bench::new();
    let call = |ids: &[u32]| score(&bench.engine, vec![tokens(ids); 2], CallOptions::default(), Permit::unlimited());
    let (mut broken, mut neighbour, mut other) = (call(&[PANIC; 16]), call(&[1; 16]), call(&[2; 32]));
    assert!(now(&mut broken).is_none() && now(&mut neighbour).is_none() && now(&mut other).is_none());
    while bench.worker.step() {}
    assert!(matches!(now(&mut broken), Some(Err(EngineError::Forward(words))) if words.contains("asked to panic")));
    assert!(now(&mut neighbour).expect("answered").is_ok() && now(&mut other).expect("answered").is_ok());
    let failing = bench.score(vec![tokens(&[FAIL])], CallOptions::default());
    assert!(matches!(failing, Err(EngineError::Forward(words)) if words.contains("asked to fail")));
}

#[test]
fn a_panic_while_encoding_fails_its_own_request() {
    let mut bench = Bench::new();
    let pair = Sample::Pair { first: "a".into(), second: "b".into() };
    let error = bench.score(vec![pair], CallOptions::default()).expect_err("the fake panics");
    assert_eq!(error, EngineError::Forward("encoding panicked: asked to panic".into()));
    assert!(bench.score(vec![tokens(&[1])], CallOptions::default()).is_ok());
}

#[tokio::test]
async fn a_large_request_is_encoded_in_the_pool_with_the_same_result() {
    let clock = Clock::system();
    let options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _thread) = crate::scorer::spawn(options, clock.clone(), ScorerMetrics::unregistered()).expect("threads");
    let engine = engine_on(scorer, clock);
    let model = FakeModel::new(1.0);
    engine.registry().install(generation(1, model.clone(), &[]));
    let samples: Vec<Sample> = (0..512u32).map(|i| tokens(&[i; 40])).collect();
    let reply = engine.score(samples, CallOptions::default(), Permit::unlimited()).await.expect("scored");
    for (i, outcome) in reply.outcomes.iter().enumerate() {
        assert_eq!(outcome.as_ref().expect("scored").reward.get(), model.score(&[i as u32; 40]));
    }
    let pair = Sample::Pair { first: "a".repeat(5000), second: String::new() };
    let error = engine.score(vec![pair], CallOptions::default(), Permit::unlimited()).await.expect_err("the fake panics");
    assert_eq!(error, EngineError::Forward("encoding panicked: asked to panic".into()));
    let again = engine.score(vec![tokens(&[1; 3000])], CallOptions::default(), Permit::unlimited()).await;
    assert!(again.is_ok(), "the pool lives on");
}

#[test]
fn overload_is_shed_with_a_hint_and_what_was_let_in_is_answered() {
    let mut bench = Bench::with(ScorerOptions { max_queue_samples: 4, ..ScorerOptions::default() }, false);
    let admission =
        Admission::new(AdmissionOptions { max_requests: 3, max_tokens: 100, ..AdmissionOptions::default() }, ScorerMetrics::unregistered());
    let call = |samples: Vec<Sample>, permit| score(&bench.engine, samples, CallOptions::default(), permit);
    let mut too_large = call(vec![tokens(&[1; 60]); 2], admission.admit(0).expect("room"));
    assert!(matches!(now(&mut too_large), Some(Err(EngineError::Invalid { .. }))));
    drop(too_large);
    let mut first = call(vec![tokens(&[1]); 3], admission.admit(0).expect("room"));
    assert!(now(&mut first).is_none());
    let mut queue_full = call(vec![tokens(&[1]); 2], admission.admit(0).expect("room"));
    assert!(matches!(now(&mut queue_full), Some(Err(EngineError::Overloaded { retry_after, .. })) if !retry_after.is_zero()));
    drop(queue_full);
    let mut tokens_full = call(vec![tokens(&[1; 49]); 2], admission.admit(0).expect("room"));
    assert!(matches!(now(&mut tokens_full), Some(Err(EngineError::Overloaded { .. }))), "3 tokens are in flight");
    let held = [admission.admit(0).expect("room"), admission.admit(0).expect("room")];
    let refused: EngineError = admission.admit(0).expect_err("three are in flight").into();
    assert!(matches!(refused, EngineError::Overloaded { .. }));
    drop(held);
    while bench.worker.step() {}
    assert_eq!(now(&mut first).expect("answered").expect("scored").outcomes.len(), 3);
    assert_eq!(*admission.in_flight().borrow(), 0);
}

#[tokio::test]
async fn as_many_texts_as_have_room_by_their_tokens_are_let_in_whatever_their_bytes() {
    let clock = Clock::system();
    let options = ScorerOptions { threads: 1, ..ScorerOptions::default() };
    let (scorer, _thread) = crate::scorer::spawn(options, clock.clone(), ScorerMetrics::unregistered()).expect("threads");
    let engine = engine_on(scorer, clock);
    engine.registry().install(generation(1, FakeModel::new(1.0), &[]));
    // Just room for 512 samples of the longest that the fake takes, with one token in flight beside them.
    let bounds = AdmissionOptions { max_tokens: 512 * 64 + 1, ..AdmissionOptions::default() };
    let admission = Admission::new(bounds, ScorerMetrics::unregistered());
    let neighbour = admission.admit(0).expect("room");
    neighbour.charge(1).expect("room");
    let texts = vec![Sample::Text("a text of far more bytes than three for each token. ".repeat(40)); 512];
    let options = CallOptions { truncation: Truncation::Left, ..CallOptions::default() };
    let reply = engine.score(texts, options, admission.admit(0).expect("room")).await.expect("scored");
    assert!(reply.outcomes.iter().all(Result::is_ok));
}

/// Tells that it has begun with a text and waits to be let on.
struct Gated {
    begun: std::sync::mpsc::Sender<char>,
    go: Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Gated {
    /// Lets the bench read by it. The first letter of what it begins to read comes out; it reads on while it is told to, and for
    /// ever when nobody can tell it any more.
    fn behind(bench: &Bench) -> (std::sync::mpsc::Receiver<char>, std::sync::mpsc::Sender<()>, Admission) {
        let ((begun, letters), (go, gate)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
        let text = Arc::new(Self { begun, go: Mutex::new(gate) });
        bench.engine.registry().install(generation_reading(2, FakeModel::new(1.0), text));
        (letters, go, Admission::new(AdmissionOptions::default(), ScorerMetrics::unregistered()))
    }
}

impl Encode for Gated {
    fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<crate::text::Encoding, crate::domain::Failure> {
        let first = if let Sample::Text(text) = sample { text.chars().next() } else { None };
        let _ = self.begun.send(first.unwrap_or(' '));
        let _ = self.go.lock().expect("whole").recv();
        FakeText.encode(sample, truncation)
    }
}

#[tokio::test]
async fn what_waits_for_the_pool_holds_its_permit_though_its_caller_has_gone() {
    let bench = Bench::new();
    let (first_begun, go, admission) = Gated::behind(&bench);
    let large = |permit| score(&bench.engine, vec![Sample::Text("x".repeat(5000))], CallOptions::default(), permit);
    let (mut first, mut second) = (large(admission.admit(0).expect("room")), large(admission.admit(0).expect("room")));
    assert!(now(&mut first).is_none());
    first_begun.recv().expect("the pool's one thread is busy");
    assert!(now(&mut second).is_none());
    drop((first, second));
    assert_eq!(*admission.in_flight().borrow(), 2, "both texts are still in memory");
    drop(go);
    admission.idle().await;
    assert_eq!(first_begun.try_iter().count(), 0, "nobody wants the second any more");
}

#[tokio::test]
async fn a_tenant_with_much_text_keeps_nobody_elses_from_being_read() {
    let bench = Bench::new();
    let (first_letters, go, admission) = Gated::behind(&bench);
    let ask = |who: &str, texts: usize, bytes: usize| {
        let caller = crate::scorer::Caller { named: None, peer: Some(who.into()) };
        let permit = admission.admit_of(&caller, 0, None).expect("room");
        let options = CallOptions { truncation: Truncation::Left, ..CallOptions::default() };
        score(&bench.engine, vec![Sample::Text(who.repeat(bytes)); texts], options, permit)
    };
    let (mut flood, mut other) = (ask("f", 20, 70_000), ask("o", 1, 5000));
    assert!(now(&mut flood).is_none());
    let mut order = vec![first_letters.recv().expect("the pool's one thread is busy")];
    assert!(now(&mut other).is_none());
    drop(go);
    order.extend((0..20).map(|_| first_letters.recv().expect("all are read")));
    let place = order.iter().position(|letter| *letter == 'o').expect("read");
    assert!(place <= 2, "read as the {}th: {order:?}", place + 1);
}

#[tokio::test]
async fn draining_finishes_what_is_in_flight_and_refuses_the_rest() {
    let mut bench = Bench::new();
    let admission = Admission::new(AdmissionOptions::default(), ScorerMetrics::unregistered());
    let mut call = score(&bench.engine, vec![tokens(&[1])], CallOptions::default(), admission.admit(0).expect("room"));
    assert!(now(&mut call).is_none());
    admission.drain();
    let refused: EngineError = admission.admit(0).expect_err("draining").into();
    assert!(matches!(refused, EngineError::Draining { .. }));
    while bench.worker.step() {}
    assert!(now(&mut call).expect("answered").is_ok());
    admission.idle().await;
}

#[test]
fn a_worker_that_is_gone_is_an_error_for_the_caller() {
    let Bench { engine, worker, .. } = Bench::new();
    let mut call = score(&engine, vec![tokens(&[1])], CallOptions::default(), Permit::unlimited());
    assert!(now(&mut call).is_none());
    drop(worker);
    assert_eq!(now(&mut call), Some(Err(EngineError::WorkerGone)));
    let mut late = score(&engine, vec![tokens(&[1])], CallOptions::default(), Permit::unlimited());
    assert_eq!(now(&mut late), Some(Err(EngineError::WorkerGone)));
}

/// One random request: its samples, and what its caller does.
#[derive(Clone, Debug)]
struct Request {
    samples: Vec<Vec<u32>>,
    priority: i32,
    tenant: Option<Arc<str>>,
    deadline_ms: Option<u64>,
    /// The caller goes after this many turns.
    patience: Option<usize>,
    comparing: bool,
}

fn request(random: &mut impl FnMut(u64) -> u64) -> Request {
    let samples = (0..1 + random(5)).map(|_| (0..1 + random(12)).map(|_| random(1000) as u32).collect()).collect();
    Request {
        samples,
        priority: random(5) as i32 - 2,
        tenant: (random(3) > 0).then(|| ["a", "b"][random(2) as usize].into()),
        deadline_ms: (random(4) == 0).then(|| random(60)),
        patience: (random(6) == 0).then(|| random(4) as usize),
        comparing: random(8) == 0,
    }
}

enum Caller {
    Scores(Call<ScoreReply>),
    Compares(Call<CompareReply>),
}

impl Caller {
    /// The merged model's reward of every sample.
    fn poll(&mut self) -> Option<Result<Vec<Option<f32>>, EngineError>> {
        let reward = |scored: &crate::domain::Scored| scored.reward.get();
        Some(match self {
            Self::Scores(call) => now(call)?.map(|reply| reply.outcomes.iter().map(|o| o.as_ref().ok().map(reward)).collect()),
            Self::Compares(call) => {
                now(call)?.map(|reply| reply.outcomes.iter().map(|o| o.as_ref().ok().map(|c| reward(&c.merged))).collect())
            }
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    #[test]
    fn a_thousand_random_requests_at_a_time_are_answered_exactly_once(seed in any::<u64>()) {
        let mut state = seed | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) % below
        };
        let mut bench = Bench::with(ScorerOptions { max_pack_tokens: 48, max_queue_samples: 60, ..ScorerOptions::default() }, true);
        let (seen, clock) = (Arc::new(Mutex::new(0usize)), bench.clock.clone());
        let count = seen.clone();
        *bench.model.hook.lock().expect("whole") = Some(Box::new(move |samples: &[Vec<u32>]| {
            clock.advance(Duration::from_millis(1));
            *count.lock().expect("whole") += samples.len();
        }));
        let bounds = AdmissionOptions { max_requests: 30, max_tokens: 2000, ..AdmissionOptions::default() };
        let admission = Admission::new(bounds, ScorerMetrics::unregistered());
        let (mut open, mut sent, mut scored) = (Vec::<(Request, Caller, usize)>::new(), 0usize, 0usize);
        let mut ended = HashSet::new();
        let (mut shed, mut late, mut left) = (0, 0, 0);
        while sent < 1000 || !open.is_empty() {
            for _ in 0..if sent < 1000 { random(4) } else { 0 } {
                let request = request(&mut random);
                sent += 1;
                let Ok(permit) = admission.admit(100) else { shed += 1; ended.insert(sent); continue };
                let samples = request.samples.iter().map(|ids| tokens(ids)).collect();
                let deadline = request.deadline_ms.map(|ms| bench.clock.now() + Duration::from_millis(ms));
                let options =
                    CallOptions { deadline, priority: request.priority, tenant: request.tenant.clone(), ..CallOptions::default() };
                let engine = bench.engine.clone();
                let caller = if request.comparing {
                    Caller::Compares(Box::pin(async move { engine.compare(samples, options, CompareOptions::default(), permit).await }))
                } else {
                    Caller::Scores(score(&engine, samples, options, permit))
                };
                open.push((request, caller, sent));
            }
            if random(3) > 0 {
                bench.worker.step();
            }
            if random(5) == 0 {
                bench.clock.advance(Duration::from_millis(random(8)));
            }
            let mut still = Vec::new();
            for (mut request, mut caller, number) in open {
                match caller.poll() {
                    Some(result) => {
                        prop_assert!(ended.insert(number), "answered twice");
                        match result {
                            Ok(rewards) => {
                                prop_assert_eq!(rewards.len(), request.samples.len());
                                for (reward, ids) in rewards.iter().zip(&request.samples) {
                                    // None: expired while others of the request were in time.
                                    prop_assert!(reward.is_none_or(|reward| reward == bench.model.score(ids)));
                                    prop_assert!(reward.is_some() || request.deadline_ms.is_some());
                                }
                                scored += rewards.iter().flatten().count();
                            }
                            Err(EngineError::DeadlineExceeded) => {
                                prop_assert!(request.deadline_ms.is_some());
                                late += 1;
                            }
                            Err(EngineError::Overloaded { .. }) => shed += 1,
                            Err(other) => prop_assert!(false, "{other}"),
                        }
                    }
                    None if request.patience == Some(0) => {
                        left += 1;
                        prop_assert!(ended.insert(number));
                    }
                    None => {
                        request.patience = request.patience.map(|turns| turns - 1);
                        still.push((request, caller, number));
                    }
                }
            }
            open = still;
        }
        while bench.worker.step() {}
        prop_assert_eq!(ended.len(), sent);
        prop_assert_eq!((bench.engine.scorer().queued_samples(), *admission.in_flight().borrow()), (0, 0));
        let forwarded = *seen.lock().expect("whole");
        prop_assert!(scored > 0 && shed + late + left > 0 && forwarded >= scored, "{scored} {forwarded}");
    }
}

#[test]
fn a_fingerprint_names_everything_that_a_score_depends_on() {
    use crate::domain::WeightsId;
    let calibration = Calibration::new(0.0, 1.0, 1, "a").expect("valid");
    let elsewhere = Calibration::new(0.0, 1.0, 9, "b").expect("valid");
    let base = FingerprintParts {
        weights_id: WeightsId([1; 32]),
        dtype: "float32",
        architecture: "a",
        text: [2; 32],
        max_tokens: 64,
        calibration: None,
    };
    let calibrated = FingerprintParts { calibration: Some(&calibration), ..base.clone() };
    let all = [
        base.clone(),
        FingerprintParts { weights_id: WeightsId([3; 32]), ..base.clone() },
        FingerprintParts { dtype: "bfloat16", ..base.clone() },
        FingerprintParts { architecture: "b", ..base.clone() },
        FingerprintParts { text: [4; 32], ..base.clone() },
        FingerprintParts { max_tokens: 65, ..base.clone() },
        calibrated.clone(),
    ];
    let prints: HashSet<_> = all.iter().map(FingerprintParts::fingerprint).collect();
    assert_eq!(prints.len(), all.len());
    let same = FingerprintParts { calibration: Some(&elsewhere), ..calibrated.clone() };
    assert_eq!(same.fingerprint(), calibrated.fingerprint());
    // The same bytes, cut at another place, are another model.
    let (one, two) =
        (FingerprintParts { dtype: "ab", architecture: "c", ..base.clone() }, FingerprintParts { dtype: "a", architecture: "bc", ..base });
    assert_ne!(one.fingerprint(), two.fingerprint());
}

#[test]
fn the_metrics_are_there_before_the_first_request_and_name_one_generation() {
    let registry = prometheus::Registry::new();
    let metrics = RegistryMetrics::register(&registry).expect("names are free");
    let text = || prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
    for series in [
        "warm_registry_ready 0",
        "warm_registry_reloads_total{outcome=\"failed\"} 0",
        "warm_registry_failures_total{kind=\"non_finite\"} 0",
        "warm_registry_reward_bucket{le=\"-100\"} 0",
        "warm_registry_tokenize_seconds_bucket{le=\"60\"} 0",
        "warm_registry_generation_info{",
    ] {
        assert!(text().contains(series), "{series} is not in\n{}", text());
    }
    let live = Registry::new(metrics.clone(), 0);
    let readiness = live.watch();
    assert!(readiness.borrow().is_none());
    for id in 1..=2 {
        assert_eq!(live.next_id().0, id);
        live.install(generation(id, FakeModel::new(id as f32), &[]));
    }
    metrics.reloaded(ReloadOutcome::Loaded);
    let text = text();
    assert_eq!(text.matches("warm_registry_generation_info{").count(), 1, "{text}");
    assert!(text.contains("generation=\"2\"") && text.contains("warm_registry_ready 1") && text.contains("{outcome=\"loaded\"} 1"));
    assert_eq!(readiness.borrow().as_ref().map(|generation| generation.id.0), Some(2));
}
