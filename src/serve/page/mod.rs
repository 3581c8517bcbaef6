//! The status page: one file of HTML without a build step, and the numbers that it draws.
//!
//! Whatever comes from callers (request ids, words of errors) travels as JSON and is set as text, never as markup; the page
//! may load nothing and talk to nobody but this port.

mod history;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use prometheus::Registry;
use serde_json::{Value, json};

use super::convert;
use super::readiness::Readiness;
use crate::lock::lock;
use crate::registry::{ComparedPoint, Engine, GenerationState};
use history::{Buckets, Flow, History, Totals};

/// The page.
pub(super) const HTML: &str = include_str!("status.html");

/// What a browser may do with the page: run what is in it, and ask this port.
pub(super) const SECURITY_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
     img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// How often the page's history takes a sample.
pub(super) const STEP: Duration = history::STEP;

/// What the page shows, and its memory of the last minutes.
#[derive(Clone)]
pub(super) struct Page {
    readiness: Readiness,
    registry: Registry,
    engine: Engine,
    started: SystemTime,
    history: Arc<Mutex<History>>,
}

impl Page {
    pub fn new(readiness: Readiness, registry: Registry, engine: Engine) -> Self {
        let started = engine.clock().wall();
        let page = Self { readiness, registry, engine, started, history: Arc::default() };
        page.sample();
        page
    }

    /// Whether the worker that owns the device is there to answer.
    pub fn is_alive(&self) -> bool {
        self.engine.scorer().is_alive()
    }

    /// The watch on rewards, if there is one.
    pub fn watch(&self) -> Option<Value> {
        Some(self.engine.watch()?.report())
    }

    /// Takes a sample for the history.
    pub fn sample(&self) {
        let totals = Totals::gather(&self.registry);
        self.history().push(self.engine.clock().now(), totals);
    }

    /// Everything that the page draws.
    pub fn json(&self) -> Value {
        let (clock, totals) = (self.engine.clock(), Totals::gather(&self.registry));
        let history = self.history().clone();
        let recent = self.engine.registry().recent();
        json!({
            "instance": self.engine.instance(),
            "version": crate::domain::VERSION,
            "commit": crate::domain::COMMIT,
            "phase": self.readiness.phase().name(),
            "alive": self.is_alive(),
            "now_unix_ms": unix_ms(clock.wall()),
            "started_unix_ms": unix_ms(self.started),
            "model": self.model(),
            "now": now(&history, clock.now(), &totals),
            "history": steps(&history.steps()),
            "rewards": rewards(&history.rewards(&totals)),
            "compared": compared(&recent.comparisons()),
            "watch": self.watch(),
            "tenants": history::tenants(&self.registry).into_iter().map(|(name, [requests, samples, tokens])| json!({
                "name": name,
                "requests": requests,
                "samples": samples,
                "tokens": tokens,
            })).collect::<Vec<_>>(),
            "failures": history::by_label(&self.registry, "warm_registry_failures_total", "kind").into_iter().map(|(kind, count)| json!({
                "kind": kind,
                "count": count,
            })).collect::<Vec<_>>(),
            "reloads": recent.reloads().iter().rev().map(|event| json!({
                "at_unix_ms": unix_ms(event.at),
                "outcome": event.outcome.name(),
                "fingerprint": event.fingerprint.map(|fingerprint| fingerprint.to_string()),
                "problem": event.problem,
            })).collect::<Vec<_>>(),
            "problems": recent.problems().iter().rev().map(|problem| json!({
                "at_unix_ms": unix_ms(problem.at),
                "rpc": problem.rpc,
                "code": problem.code,
                "words": problem.words,
                "request_id": problem.request_id,
                "count": problem.count,
            })).collect::<Vec<_>>(),
        })
    }

    fn model(&self) -> Option<Value> {
        let live = self.engine.registry().current()?;
        let max_pack_tokens = self.engine.scorer().max_pack_tokens();
        let wire = convert::generation(&live.describe(), GenerationState::Live, self.engine.instance(), max_pack_tokens);
        let resident: Vec<&str> = live.resident().map(|name| name.as_str()).collect();
        let members: Vec<Value> = wire
            .members
            .iter()
            .map(|member| {
                json!({
                    "name": member.name,
                    "coefficient": member.coefficient,
                    "content_hash": member.content_hash,
                    "resident": resident.contains(&member.name.as_str()),
                })
            })
            .collect();
        let stamp = wire.stamp.unwrap_or_default();
        Some(json!({
            "fingerprint": stamp.fingerprint,
            "weights_id": stamp.weights_id,
            "generation": stamp.generation,
            "method": wire.method,
            "members": members,
            "architecture": wire.architecture,
            "dtype": wire.dtype,
            "devices": wire.devices,
            "parameters": wire.parameters,
            "device_bytes": wire.device_bytes,
            "max_tokens": wire.max_tokens,
            "max_pack_tokens": wire.max_pack_tokens,
            "loaded_unix_ms": wire.loaded_unix_ms,
            "calibration": wire.calibration.map(|calibration| json!({"mean": calibration.mean, "std": calibration.std})),
            "notes": live.info.notes,
        }))
    }

    fn history(&self) -> std::sync::MutexGuard<'_, History> {
        lock(&self.history)
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn now(history: &History, at: Instant, totals: &Totals) -> Value {
    let flow = history.now(at, totals);
    json!({
        "calls_per_second": flow.calls,
        "samples_per_second": flow.samples,
        "tokens_per_second": flow.tokens,
        "shared": flow.shared,
        "busy": flow.busy,
        "faults": flow.faults,
        "p50_seconds": flow.p50,
        "p90_seconds": flow.p90,
        "p99_seconds": flow.p99,
        "queue_samples": totals.queue_samples,
        "queue_tokens": totals.queue_tokens,
        "in_flight": totals.in_flight,
        "samples_total": totals.samples,
        "calls_total": totals.calls,
    })
}

fn steps(steps: &[Flow]) -> Value {
    let each = |value: fn(&Flow) -> Value| steps.iter().map(value).collect::<Vec<_>>();
    json!({
        "step_seconds": STEP.as_secs_f64(),
        "samples_per_second": each(|flow| json!(flow.samples)),
        "tokens_per_second": each(|flow| json!(flow.tokens)),
        "busy": each(|flow| json!(flow.busy)),
        "p50_seconds": each(|flow| json!(flow.p50)),
        "p99_seconds": each(|flow| json!(flow.p99)),
    })
}

fn rewards(rewards: &Buckets) -> Value {
    json!({
        "bounds": rewards.bounds,
        "counts": rewards.each(),
        "count": rewards.count,
        "mean": rewards.mean(),
        "p10": rewards.quantile(0.1),
        "p50": rewards.quantile(0.5),
        "p90": rewards.quantile(0.9),
    })
}

/// WARM against ENS over the last samples that both scored.
fn compared(points: &[ComparedPoint]) -> Value {
    let count = points.len() as f64;
    let mean = |value: fn(&ComparedPoint) -> f32| points.iter().map(|point| f64::from(value(point))).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.mean), mean(|point| point.merged));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for point in points {
        let (dx, dy) = (f64::from(point.mean) - x, f64::from(point.merged) - y);
        (xy, xx, yy) = (xy + dx * dy, xx + dx * dx, yy + dy * dy);
    }
    let correlation = if xx > 0.0 && yy > 0.0 { Some(xy / (xx * yy).sqrt()) } else { None };
    let finite = |value: f64| value.is_finite().then_some(value);
    json!({
        "points": points.iter().map(|point| json!([point.mean, point.merged, point.std])).collect::<Vec<_>>(),
        "gap": finite(mean(|point| point.merged - point.mean)),
        "member_std": finite(mean(|point| point.std)),
        "correlation": correlation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::domain::Fingerprint;
    use crate::registry::testing::{FakeModel, generation, stepped};
    use crate::registry::{Problem, ReloadEvent, ReloadOutcome};
    use crate::scorer::ScorerOptions;

    #[test]
    fn the_page_tells_of_model_members_reloads_and_problems() {
        let clock = Clock::manual();
        let (engine, worker) = stepped(ScorerOptions::default(), clock.clone());
        let page = Page::new(Readiness::default(), Registry::new(), engine.clone());
        assert_eq!(page.json()["model"], Value::Null, "nothing is loaded yet");
        engine.registry().install(generation(1, FakeModel::new(2.0), &[("rm-0", FakeModel::new(1.0))]));
        let recent = engine.registry().recent();
        let at = clock.wall() + Duration::from_secs(7);
        recent.reloaded(ReloadEvent { at, outcome: ReloadOutcome::Loaded, fingerprint: Some(Fingerprint([5; 32])), problem: None });
        let words = "<script>alert(1)</script>".to_owned();
        recent.failed(Problem { at, rpc: "Score", code: "INTERNAL", words, request_id: "r".into(), count: 1 });
        recent.compared([(1.0, 1.5, 0.5), (3.0, 3.5, 0.5)].map(|(mean, merged, std)| ComparedPoint { merged, mean, std }));
        let json = page.json();
        assert_eq!(json["model"]["members"][0]["name"], "rm-0");
        assert_eq!(json["model"]["members"][0]["coefficient"], 0.5);
        assert_eq!((&json["model"]["members"][0]["resident"], &json["model"]["members"][1]["resident"]), (&json!(true), &json!(false)));
        assert_eq!(json["reloads"][0]["fingerprint"], "05".repeat(32));
        assert_eq!(json["reloads"][0]["at_unix_ms"], 7000);
        assert_eq!(json["problems"][0]["words"], "<script>alert(1)</script>");
        assert_eq!((&json["compared"]["gap"], &json["compared"]["correlation"]), (&json!(0.5), &json!(1.0)));
        assert_eq!(json["alive"], true);
        drop(worker);
        assert_eq!(page.json()["alive"], false);
    }

    #[test]
    fn no_numbers_are_null_and_not_nan() {
        assert_eq!(compared(&[])["gap"], Value::Null);
        assert_eq!(rewards(&Buckets::default())["mean"], Value::Null);
        let flat = [ComparedPoint { merged: 1.0, mean: 1.0, std: 0.0 }; 3];
        assert_eq!(compared(&flat)["correlation"], Value::Null);
    }

    #[test]
    fn the_page_loads_nothing_and_sets_no_markup_from_data() {
        for word in ["http://", "https://", "src=", "<link", "@import", "innerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            let stray = HTML.replace("http://www.w3.org/2000/svg", "");
            assert!(!stray.contains(word), "{word}");
        }
    }
}
