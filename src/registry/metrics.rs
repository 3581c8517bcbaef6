//! What the registry shows of itself. Every series exists before the first request.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::Generation;
use crate::domain::{Failure, FailureKind, Score};
use crate::scorer::SECONDS_BUCKETS;

/// How loading a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadOutcome {
    /// It is live.
    Loaded,
    /// It has the fingerprint of the live one.
    Unchanged,
    /// It could not be loaded or did not answer; the live one stays.
    Failed,
}

impl ReloadOutcome {
    pub const ALL: [Self; 3] = [Self::Loaded, Self::Unchanged, Self::Failed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
        }
    }
}

/// The metrics of generations and of scoring by them.
#[derive(Clone, Debug)]
pub struct RegistryMetrics {
    generation_info: IntGaugeVec,
    ready: IntGauge,
    members: IntGauge,
    resident: IntGauge,
    device_bytes: IntGauge,
    reloads: IntCounterVec,
    failures: IntCounterVec,
    reward: Histogram,
    tokenize_seconds: Histogram,
    doubled_bos: IntCounter,
}

impl RegistryMetrics {
    /// Registers all series; fails where one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<Histogram, prometheus::Error> {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            for value in values {
                counters.with_label_values(&[value]);
            }
            Ok(counters)
        };
        let info = Opts::new("warm_registry_generation_info", "1, labelled with the live generation.");
        let generation_info = IntGaugeVec::new(info, &["generation", "fingerprint", "weights_id", "dtype", "method"])?;
        registry.register(Box::new(generation_info.clone()))?;
        // Until there is one, the series says so.
        generation_info.with_label_values(&["0", "", "", "", ""]).set(0);
        Ok(Self {
            generation_info,
            ready: gauge("warm_registry_ready", "1 while a generation is live.")?,
            members: gauge("warm_registry_members", "Members of the live merge.")?,
            resident: gauge("warm_registry_resident_members", "Members on the device beside the live merged model.")?,
            device_bytes: gauge("warm_registry_device_bytes", "Bytes of weights that the live generation keeps on the device.")?,
            reloads: counters(
                "warm_registry_reloads_total",
                "Generations that were loaded, the first one included, by outcome.",
                "outcome",
                &ReloadOutcome::ALL.map(ReloadOutcome::name),
            )?,
            failures: counters(
                "warm_registry_failures_total",
                "Samples that could not be scored, by kind.",
                "kind",
                &FailureKind::ALL.map(FailureKind::name),
            )?,
            doubled_bos: {
                let counter = IntCounter::new(
                    "warm_registry_doubled_bos_total",
                    "Texts that came with a BOS of their own, of which one was dropped.",
                )?;
                registry.register(Box::new(counter.clone()))?;
                counter
            },
            reward: histogram("warm_registry_reward", "Raw rewards that were handed out.", &reward_buckets())?,
            tokenize_seconds: histogram("warm_registry_tokenize_seconds", "Encoding of all samples of one request.", &SECONDS_BUCKETS)?,
        })
    }

    /// Metrics of a registry of their own, for tests and for commands that show none.
    pub fn unregistered() -> Self {
        match Self::register(&Registry::new()) {
            Ok(metrics) => metrics,
            Err(error) => unreachable!("constant names and buckets in an empty registry: {error}"),
        }
    }

    /// Counts a generation that was loaded, or that was not.
    pub fn reloaded(&self, outcome: ReloadOutcome) {
        self.reloads.with_label_values(&[outcome.name()]).inc();
    }

    pub(super) fn show_generation(&self, generation: &Generation) {
        // The labels of the one before would stay for ever otherwise.
        self.generation_info.reset();
        let labels = [
            &generation.id.to_string(),
            &generation.fingerprint.to_string(),
            &generation.weights_id.to_string(),
            &generation.info.dtype,
            &generation.info.method,
        ];
        self.generation_info.with_label_values(&labels.map(String::as_str)).set(1);
        self.ready.set(1);
        self.members.set(generation.info.members.len() as i64);
        self.resident.set(generation.resident().count() as i64);
        self.device_bytes.set(generation.device_bytes() as i64);
    }

    pub(super) fn failed(&self, failure: &Failure) {
        self.failures.with_label_values(&[failure.kind.name()]).inc();
    }

    pub(super) fn rewarded(&self, raw: Score) {
        self.reward.observe(f64::from(raw.get()));
    }

    pub(super) fn dropped_bos(&self, count: u64) {
        self.doubled_bos.inc_by(count);
    }

    pub(super) fn tokenized(&self, took: std::time::Duration) {
        self.tokenize_seconds.observe(took.as_secs_f64());
    }
}

/// Log-symmetric around 0: raw rewards have no unit, so both small and large ones must resolve.
fn reward_buckets() -> Vec<f64> {
    let sizes = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];
    let below = sizes.iter().rev().map(|size| -size);
    below.chain([0.0]).chain(sizes).collect()
}
