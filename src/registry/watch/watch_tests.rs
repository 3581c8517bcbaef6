//! The watch on fakes: the device is stepped by hand, and the clock is the test's own.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use proptest::prelude::*;

use super::super::testing::*;
use super::super::{Calibration, CallOptions, Engine};
use super::*;
use crate::domain::{MemberName, Sample};
use crate::scorer::{Permit, ScorerMetrics, ScorerOptions, Worker, pair};

struct Bench {
    clock: Clock,
    engine: Engine,
    worker: Worker,
    watch: Watch,
    member: Arc<FakeModel>,
}

/// A generation whose models all have a mean to be centred by: 4, 10 and -50.
fn calibrated(id: u64, factor: f32, member: &Arc<FakeModel>) -> Generation {
    let mut generation = generation(id, FakeModel::new(factor), &[("rm-0", member.clone()), ("rm-1", FakeModel::new(-4.0))]);
    let calibration = |mean, std| Calibration::new(mean, std, 9, "x").expect("valid");
    generation.calibration = Some(calibration(4.0, 2.0));
    for (name, mean) in [("rm-0", 10.0), ("rm-1", -50.0)] {
        generation.member_calibrations.insert(MemberName::try_from(name.to_owned()).expect("plain"), calibration(mean, 5.0));
    }
    generation
}

fn bench(shadow_share: f64, max_tokens_per_second: f64, keep: usize) -> Bench {
    let clock = Clock::manual();
    let options = ScorerOptions { max_pack_tokens: 64, threads: 1, ..ScorerOptions::default() };
    let (scorer, worker) = pair(options, clock.clone(), ScorerMetrics::unregistered());
    let options = WatchOptions { shadow_share, max_tokens_per_second, tenants: vec!["none".to_owned()] };
    let watch = Watch::new(&options, clock.clone()).expect("names of series");
    let engine = engine_watched(scorer, clock.clone(), keep, Some(watch.clone()));
    let member = FakeModel::new(2.0);
    engine.registry().install(calibrated(1, 1.0, &member));
    Bench { clock, engine, worker, watch, member }
}

fn poll<T>(future: &mut Pin<Box<dyn Future<Output = T>>>) -> Option<T> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn of(tenant: &str, prompts: &[usize]) -> CallOptions {
    CallOptions { watched: Some(Watched { tenant: tenant.into(), prompts: prompts.to_vec() }), ..CallOptions::default() }
}

impl Bench {
    fn step(&mut self) {
        while self.worker.step() {}
    }

    fn ask(&self, ids: &[u32], options: CallOptions) -> Pin<Box<dyn Future<Output = usize>>> {
        let (engine, samples) = (self.engine.clone(), ids.iter().map(|id| Sample::Tokens(vec![*id])).collect());
        Box::pin(async move { engine.score(samples, options, Permit::unlimited()).await.expect("answered").outcomes.len() })
    }

    fn score(&mut self, ids: &[u32], options: CallOptions) {
        let mut call = self.ask(ids, options);
        assert!(poll(&mut call).is_none());
        self.step();
        assert_eq!(poll(&mut call), Some(ids.len()));
    }

    fn shadow(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(self.watch.clone().shadow(self.engine.clone()))
    }

    fn figure(&self, tenant: &str, name: &str) -> Option<f64> {
        self.watch.report()["tenants"][tenant]["now"][name].as_f64()
    }

    fn counted(&self, outcome: ShadowOutcome) -> u64 {
        self.watch.report()["shadow_samples"][outcome.name()].as_u64().expect("a count")
    }
}

#[test]
fn what_the_live_generation_answers_counts_for_its_run() {
    let mut bench = bench(0.0, 1e6, 1);
    bench.score(&[10, 20, NAN], of("a", &[1, 2]));
    for (name, expected) in [("samples", 2.0), ("reward_mean", 15.0), ("reward_shift", 5.5), ("reward_std", 5.0), ("reward_spread", 2.5)] {
        assert_eq!(bench.figure("a", name), Some(expected), "{name}");
    }
    assert_eq!(bench.figure("a", "non_finite_ratio"), Some(1.0 / 3.0));
    bench.score(&[30], of("b", &[1]));
    assert_eq!((bench.figure("a", "samples"), bench.figure("b", "reward_mean")), (Some(2.0), Some(30.0)));
    // Nobody's run, and what a member says.
    bench.score(&[1], CallOptions::default());
    bench.score(&[1], CallOptions { scorer: Some("rm-0".to_owned()), ..of("a", &[1]) });
    assert_eq!(bench.figure("a", "samples"), Some(2.0));
    assert_eq!(bench.member.forwards.load(Ordering::Relaxed), 1, "without a share the members are left alone");

    // Other weights have other rewards.
    let before = bench.engine.registry().current().expect("live").fingerprint.to_string();
    bench.engine.registry().install(calibrated(2, 3.0, &bench.member));
    bench.score(&[10], of("a", &[1]));
    bench.score(&[10], CallOptions { fingerprint: Some(before), ..of("a", &[1]) });
    assert_eq!((bench.figure("a", "samples"), bench.figure("a", "reward_mean")), (Some(1.0), Some(30.0)));
    assert_eq!(bench.watch.report()["tenants"]["a"]["generation"], 2);
}

#[test]
fn members_score_what_was_drawn_and_the_figures_show_how_they_differ() {
    let mut bench = bench(1.0, 1e6, 1);
    bench.score(&[10, 20], of("a", &[2]));
    let mut shadow = bench.shadow();
    for _ in 0..4 {
        assert!(poll(&mut shadow).is_none(), "it goes on");
        bench.step();
    }
    // Centred: WARM 6 and 16, the members 10 and 30, 10 and -30, hence means 10 and 0.
    for (name, expected) in
        [("shadow_samples", 2.0), ("member_std", 15.0), ("gap", 10.0), ("rank_agreement", -1.0), ("sign_disagreement_ratio", 0.5)]
    {
        assert_eq!(bench.figure("a", name), Some(expected), "{name}");
    }
    assert_eq!(bench.figure("a", "samples"), Some(2.0), "the shadow is no traffic");
    assert_eq!(bench.counted(ShadowOutcome::Scored), 2);
}

#[test]
fn while_somebody_waits_for_the_device_the_shadow_does_not_touch_it() {
    let mut bench = bench(1.0, 1e6, 1);
    bench.score(&[10, 20], of("a", &[2]));
    let mut waiting = bench.ask(&[7], CallOptions::default());
    assert!(poll(&mut waiting).is_none());
    let mut shadow = bench.shadow();
    for _ in 0..200 {
        assert!(poll(&mut shadow).is_none());
        assert_eq!(bench.engine.scorer().queued_samples(), 1, "the caller's");
        bench.clock.advance(Duration::from_millis(50));
    }
    assert_eq!((bench.counted(ShadowOutcome::Busy), bench.member.forwards.load(Ordering::Relaxed)), (2, 0));
    bench.step();
    assert_eq!(poll(&mut waiting), Some(1));
}

#[test]
fn what_cannot_be_shadowed_is_counted_by_its_reason() {
    // Two members of one token each: the third prompt is over the budget.
    let mut bench = bench(1.0, 4.0, 0);
    bench.score(&[1, 2, 3], of("a", &[1, 1, 1]));
    assert_eq!(bench.counted(ShadowOutcome::Budget), 1);
    // The generation goes before its members are asked.
    bench.engine.registry().install(generation(2, FakeModel::new(2.0), &[]));
    let mut shadow = bench.shadow();
    assert!(poll(&mut shadow).is_none());
    assert_eq!(bench.counted(ShadowOutcome::Gone), 2);
    bench.clock.advance(Duration::from_secs(5));
    bench.score(&[1], of("a", &[1]));
    assert_eq!(bench.counted(ShadowOutcome::NoMembers), 1);
    // Members of which nobody knows where their rewards lie.
    bench.engine.registry().install(generation(3, FakeModel::new(3.0), &[("rm-0", FakeModel::new(1.0))]));
    bench.score(&[1], of("a", &[1]));
    for _ in 0..3 {
        assert!(poll(&mut shadow).is_none());
        bench.step();
    }
    assert_eq!((bench.counted(ShadowOutcome::Uncentered), bench.figure("a", "shadow_samples")), (1, Some(0.0)));
}

#[test]
fn what_nobody_comes_to_score_is_dropped() {
    let mut bench = bench(1.0, 1e6, 1);
    let many = MAILBOX + 8;
    bench.score(&vec![1; many], of("a", &vec![1; many]));
    assert_eq!(bench.counted(ShadowOutcome::Busy), 8);
}

#[test]
fn the_series_are_there_before_the_first_call_and_the_first_hour_once_it_is_over() {
    let mut bench = bench(0.0, 1.0, 1);
    let registry = prometheus::Registry::new();
    registry.register(Box::new(bench.watch.clone())).expect("free names");
    let value = |series: &str| {
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse::<f64>().ok()).expect("a series")
    };
    let now = "warm_watch_now{figure=\"reward_mean\",tenant=\"none\"}";
    let first = "warm_watch_first_hour{figure=\"reward_mean\",tenant=\"none\"}";
    assert!(value(now).is_nan() && value(first).is_nan());
    assert_eq!(value("warm_watch_shadow_samples_total{outcome=\"busy\"}"), 0.0);
    bench.score(&[10], of("none", &[1]));
    assert!((value(now), value(first).is_nan()) == (10.0, true));
    bench.clock.advance(Duration::from_secs(3600));
    assert!(value(now).is_nan() && value(first) == 10.0, "nothing came in the last ten minutes");
}

#[test]
fn rewards_and_lengths_are_counted_by_size_for_each_run() {
    let mut bench = bench(0.0, 1.0, 1);
    let registry = prometheus::Registry::new();
    registry.register(Box::new(bench.watch.clone())).expect("free names");
    bench.score(&[10, 10, 20], of("a", &[3]));
    bench.clock.advance(Duration::from_secs(601));
    bench.score(&[1], of("a", &[1]));
    bench.score(&[2], of("b", &[1]));
    let report = bench.watch.report();
    let above = |tenant: &str, what: &str, when: &str| -> Vec<(f64, u64)> {
        let numbers = |value: &Value| value.as_array().expect("a list").clone();
        let bounds = numbers(&report[if what == "rewards" { "reward_bounds" } else { "length_bounds" }]);
        let counts = numbers(&report["tenants"][tenant][what][when]);
        assert_eq!(counts.len(), bounds.len() + 1, "one more for what is above them");
        let pairs = bounds.iter().zip(&counts).map(|(bound, count)| (bound.as_f64().expect("a bound"), count.as_u64().expect("a count")));
        pairs.filter(|(_, count)| *count > 0).collect()
    };
    assert_eq!(above("a", "rewards", "now"), [(1.0, 1)]);
    assert_eq!(above("a", "rewards", "first_hour"), [(1.0, 1), (10.0, 2), (20.0, 1)]);
    assert_eq!((above("a", "lengths", "first_hour"), above("b", "rewards", "now")), (vec![(16.0, 4)], vec![(2.0, 1)]));
    assert!(above("none", "rewards", "now").is_empty() && above("none", "lengths", "first_hour").is_empty());
    // Prometheus has them since the start, whatever the generation.
    bench.engine.registry().install(calibrated(2, 1.0, &bench.member));
    bench.score(&[5], of("a", &[1]));
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
    for line in [
        "warm_watch_reward_count{tenant=\"none\"} 0",
        "warm_watch_reward_bucket{tenant=\"a\",le=\"10\"} 4",
        "warm_watch_reward_sum{tenant=\"a\"} 46",
        "warm_watch_tokens_count{tenant=\"a\"} 5",
        "warm_watch_tokens_sum{tenant=\"b\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn however_many_tenants_call_the_runs_stay_few() {
    let bench = bench(0.0, 1.0, 1);
    let live = bench.engine.registry().current().expect("live");
    for i in 0..200 {
        bench.watch.observe(&Watched { tenant: i.to_string().as_str().into(), prompts: Vec::new() }, &live, &[]);
    }
    assert!(bench.watch.report()["tenants"].as_object().expect("tenants").len() <= MAX_RUNS + 1);
    let series = bench.watch.0.rewards.collect();
    assert!(series[0].get_metric().len() <= MAX_RUNS + 1, "nor do their series become many");
}

proptest! {
    #[test]
    fn pieces_are_all_samples_in_order_and_small(lengths in prop::collection::vec(1usize..3000, 0..12)) {
        let judged = |length: &usize| Judged {
            encoding: Arc::new(Encoding::for_test(vec![0; *length])),
            reward: Score::try_from(0.0).expect("finite"),
        };
        let samples: Vec<Judged> = lengths.iter().map(judged).collect();
        let pieces: Vec<Vec<usize>> = shadow::pieces(&samples).map(|piece| piece.iter().map(|sample| sample.encoding.tokens()).collect()).collect();
        for piece in &pieces {
            prop_assert!(piece.len() == 1 || piece.iter().sum::<usize>() <= shadow::PIECE_TOKENS, "{piece:?}");
        }
        prop_assert_eq!(pieces.concat(), lengths);
    }
}
