//! The last minutes of a few series, for people without Prometheus: samples of the same registry that `/metrics` shows,
//! taken at a steady pace. Pure: time and numbers are handed in.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use prometheus::Registry;
use prometheus::proto::MetricFamily;

/// How often a sample is taken.
pub(super) const STEP: Duration = Duration::from_secs(5);
/// Samples that are kept: ten minutes of steps.
const KEPT: usize = 121;
/// What "now" means for rates and latencies: the last minute.
const WINDOW: Duration = Duration::from_secs(60);

/// Cumulative numbers of one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Totals {
    pub calls: f64,
    pub faults: f64,
    pub samples: f64,
    pub tokens: f64,
    pub shared: f64,
    pub forward_seconds: f64,
    /// Each of which passes its own seconds.
    pub devices: f64,
    pub queue_samples: f64,
    pub queue_tokens: f64,
    pub in_flight: f64,
    /// Of Score calls.
    pub latency: Buckets,
    pub rewards: Buckets,
}

/// A histogram: counts at or below each bound, and all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Buckets {
    pub bounds: Vec<f64>,
    pub cumulative: Vec<f64>,
    pub count: f64,
    pub sum: f64,
}

/// Codes of calls that ended by the server's doing.
const FAULTS: [&str; 5] = ["INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED"];

impl Totals {
    pub fn gather(registry: &Registry) -> Self {
        let families = registry.gather();
        let value = |name: &str, wanted: &[(&str, &[&str])]| sum(&families, name, wanted);
        Self {
            calls: value("warm_serve_requests_total", &[]),
            faults: value("warm_serve_requests_total", &[("code", &FAULTS)]),
            samples: value("warm_scorer_samples_total", &[]),
            tokens: value("warm_scorer_tokens_total", &[]),
            shared: value("warm_scorer_tokens_total", &[("kind", &["shared", "cached"])]),
            forward_seconds: buckets(&families, "warm_scorer_forward_seconds", &[]).sum,
            devices: value("warm_scorer_devices", &[]),
            queue_samples: value("warm_scorer_queue_samples", &[]),
            queue_tokens: value("warm_scorer_queue_tokens", &[]),
            in_flight: value("warm_scorer_in_flight_requests", &[]),
            latency: buckets(&families, "warm_serve_request_seconds", &[("rpc", &["Score"])]),
            rewards: buckets(&families, "warm_registry_reward", &[]),
        }
    }
}

/// Counters by one label of theirs.
pub(super) fn by_label(registry: &Registry, name: &str, label: &str) -> BTreeMap<String, f64> {
    let families = registry.gather();
    let named = metrics(&families, name, &[]).filter_map(|metric| {
        let pair = metric.get_label().iter().find(|pair| pair.name() == label)?;
        Some((pair.value().to_owned(), metric.get_counter().get_value()))
    });
    named.collect()
}

/// Requests, samples and tokens by tenant.
pub(super) fn tenants(registry: &Registry) -> BTreeMap<String, [f64; 3]> {
    let mut tenants: BTreeMap<String, [f64; 3]> = BTreeMap::new();
    for (i, what) in ["requests", "samples", "tokens"].into_iter().enumerate() {
        for (name, count) in by_label(registry, &format!("warm_serve_tenant_{what}_total"), "tenant") {
            tenants.entry(name).or_default()[i] = count;
        }
    }
    tenants
}

type Wanted<'a> = [(&'a str, &'a [&'a str])];

fn metrics<'a>(families: &'a [MetricFamily], name: &str, wanted: &Wanted<'_>) -> impl Iterator<Item = &'a prometheus::proto::Metric> {
    let all = families.iter().filter(move |family| family.name() == name).flat_map(MetricFamily::get_metric);
    all.filter(move |metric| {
        wanted.iter().all(|(label, values)| metric.get_label().iter().any(|pair| pair.name() == *label && values.contains(&pair.value())))
    })
}

fn sum(families: &[MetricFamily], name: &str, wanted: &Wanted<'_>) -> f64 {
    metrics(families, name, wanted).map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum()
}

/// The first histogram of this name: those that are read here have one, or one for each value of the wanted label.
fn buckets(families: &[MetricFamily], name: &str, wanted: &Wanted<'_>) -> Buckets {
    let Some(metric) = metrics(families, name, wanted).next() else { return Buckets::default() };
    let histogram = metric.get_histogram();
    let finite = || histogram.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite());
    Buckets {
        bounds: finite().map(|bucket| bucket.upper_bound()).collect(),
        cumulative: finite().map(|bucket| bucket.cumulative_count() as f64).collect(),
        count: histogram.get_sample_count() as f64,
        sum: histogram.get_sample_sum(),
    }
}

impl Buckets {
    /// What came after `earlier`, which is the same histogram some time ago, or an empty one.
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |i: usize| earlier.cumulative.get(i).copied().unwrap_or(0.0);
        Self {
            bounds: self.bounds.clone(),
            cumulative: self.cumulative.iter().enumerate().map(|(i, count)| count - before(i)).collect(),
            count: self.count - earlier.count,
            sum: self.sum - earlier.sum,
        }
    }

    /// Counts of each bucket, the one above the last bound included.
    pub fn each(&self) -> Vec<f64> {
        let mut below = 0.0;
        let all = self.cumulative.iter().chain([&self.count]);
        all.map(|&count| (count - std::mem::replace(&mut below, count)).max(0.0)).collect()
    }

    /// Interpolated inside its bucket, as Prometheus does it; `None` without observations.
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        if self.count <= 0.0 || self.bounds.is_empty() {
            return None;
        }
        let rank = quantile * self.count;
        let Some(at) = self.cumulative.iter().position(|&count| count >= rank) else { return self.bounds.last().copied() };
        let (low, below) = if at == 0 { (0.0_f64.min(self.bounds[0]), 0.0) } else { (self.bounds[at - 1], self.cumulative[at - 1]) };
        let inside = self.cumulative[at] - below;
        let share = if inside > 0.0 { (rank - below) / inside } else { 1.0 };
        Some(low + (self.bounds[at] - low) * share)
    }

    pub fn mean(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }
}

/// Samples of the last minutes, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct History(VecDeque<(Instant, Totals)>);

/// Rates and latencies over a while.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Flow {
    pub calls: f64,
    pub samples: f64,
    pub tokens: f64,
    /// Of all tokens.
    pub shared: Option<f64>,
    /// The share of their time that the devices worked.
    pub busy: f64,
    /// Of all calls.
    pub faults: Option<f64>,
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
}

impl History {
    pub fn push(&mut self, now: Instant, totals: Totals) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back((now, totals));
    }

    /// What flowed in the minute before `now`, or since the start if that is less ago.
    pub fn now(&self, now: Instant, totals: &Totals) -> Flow {
        let recent = self.0.iter().find(|(at, _)| now.saturating_duration_since(*at) <= WINDOW);
        recent.map(|(at, earlier)| flow(earlier, totals, now.saturating_duration_since(*at))).unwrap_or_default()
    }

    /// What flowed from each sample to the next.
    pub fn steps(&self) -> Vec<Flow> {
        let pairs = self.0.iter().zip(self.0.iter().skip(1));
        pairs.map(|((before, earlier), (after, later))| flow(earlier, later, after.saturating_duration_since(*before))).collect()
    }

    /// Rewards since the oldest sample.
    pub fn rewards(&self, totals: &Totals) -> Buckets {
        let none = Buckets::default();
        totals.rewards.since(self.0.front().map_or(&none, |(_, oldest)| &oldest.rewards))
    }
}

fn flow(earlier: &Totals, later: &Totals, took: Duration) -> Flow {
    let seconds = took.as_secs_f64();
    let rate = |field: fn(&Totals) -> f64| if seconds > 0.0 { (field(later) - field(earlier)) / seconds } else { 0.0 };
    let share = |part: fn(&Totals) -> f64, whole: fn(&Totals) -> f64| {
        let whole = whole(later) - whole(earlier);
        (whole > 0.0).then(|| (part(later) - part(earlier)) / whole)
    };
    let latency = later.latency.since(&earlier.latency);
    Flow {
        calls: rate(|totals| totals.calls),
        samples: rate(|totals| totals.samples),
        tokens: rate(|totals| totals.tokens),
        shared: share(|totals| totals.shared, |totals| totals.tokens),
        busy: (rate(|totals| totals.forward_seconds) / later.devices.max(1.0)).clamp(0.0, 1.0),
        faults: share(|totals| totals.faults, |totals| totals.calls),
        p50: latency.quantile(0.5),
        p90: latency.quantile(0.9),
        p99: latency.quantile(0.99),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn latency(cumulative: [f64; 3], count: f64) -> Buckets {
        Buckets { bounds: vec![0.1, 1.0, 10.0], cumulative: cumulative.to_vec(), count, sum: 0.0 }
    }

    #[test]
    fn quantiles_lie_inside_their_bucket() {
        let buckets = latency([50.0, 90.0, 100.0], 100.0);
        assert_eq!(buckets.quantile(0.5), Some(0.1));
        assert_eq!(buckets.quantile(0.25), Some(0.05));
        assert_eq!(buckets.quantile(0.7), Some(0.55));
        assert_eq!(latency([0.0, 0.0, 1.0], 10.0).quantile(0.99), Some(10.0), "above the last bound, the last bound");
        assert_eq!(latency([0.0; 3], 0.0).quantile(0.5), None);
        assert_eq!(buckets.each(), [50.0, 40.0, 10.0, 0.0]);
    }

    #[test]
    fn rates_are_over_the_last_minute() {
        let start = Instant::now();
        let mut history = History::default();
        for step in 0..40_u32 {
            let total = f64::from(step) * 50.0;
            let totals = Totals { samples: total, calls: total, latency: latency([total, total, total], total), ..Totals::default() };
            history.push(start + STEP * step, totals);
        }
        let now = start + STEP * 40;
        let totals = Totals { samples: 39.0 * 50.0 + 110.0, ..Totals::default() };
        let flow = history.now(now, &totals);
        // From 60 s ago, where there were 28 * 50: 660 samples.
        assert_eq!(flow.samples, 11.0);
        let steps = history.steps();
        assert_eq!(steps.len(), 39);
        assert!(steps.iter().all(|step| step.samples == 10.0 && step.p99.is_some_and(|p99| p99 <= 0.1) && step.faults == Some(0.0)));
    }

    #[test]
    fn two_devices_are_half_busy_while_one_of_them_works() {
        let (start, mut history) = (Instant::now(), History::default());
        history.push(start, Totals { devices: 2.0, ..Totals::default() });
        let flow = history.now(start + STEP, &Totals { forward_seconds: 5.0, devices: 2.0, ..Totals::default() });
        assert_eq!(flow.busy, 0.5);
    }

    #[test]
    fn a_fresh_history_has_no_rates_and_a_long_one_forgets() {
        let (start, mut history) = (Instant::now(), History::default());
        assert_eq!(history.now(start, &Totals::default()), Flow::default());
        for step in 0..1000 {
            history.push(start + STEP * step, Totals::default());
        }
        assert_eq!(history.steps().len(), KEPT - 1);
    }

    #[test]
    fn totals_come_from_the_registry_that_metrics_shows() {
        let registry = Registry::new();
        let scorer = crate::scorer::ScorerMetrics::register(&registry).expect("fresh registry");
        let serve = crate::serve::ServeMetrics::register(&registry).expect("fresh registry");
        drop(scorer);
        for (rpc, code, ms) in [("Score", tonic::Code::Ok, 4), ("Score", tonic::Code::Internal, 700), ("Compare", tonic::Code::Ok, 1)] {
            serve.started(rpc);
            serve.ended(rpc, code, Duration::from_millis(ms));
        }
        let totals = Totals::gather(&registry);
        assert_eq!((totals.calls, totals.faults, totals.latency.count), (3.0, 1.0, 2.0));
        assert!((totals.latency.sum - 0.704).abs() < 1e-9, "{totals:?}");
        serve.billed("team", 3, 500);
        assert_eq!(tenants(&registry)["team"], [1.0, 3.0, 500.0]);
    }

    proptest! {
        #[test]
        fn a_quantile_never_leaves_the_bounds(counts in prop::collection::vec(0u32..100, 3), above in 0u32..10, quantile in 0.0f64..=1.0) {
            let mut total = 0.0;
            let cumulative: Vec<f64> = counts.iter().map(|&count| { total += f64::from(count); total }).collect();
            let buckets = Buckets { bounds: vec![-1.0, 1.0, 5.0], cumulative, count: total + f64::from(above), sum: 0.0 };
            if let Some(value) = buckets.quantile(quantile) {
                prop_assert!((-1.0..=5.0).contains(&value), "{value}");
            }
        }
    }
}
