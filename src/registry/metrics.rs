//! What the registry shows of itself. Every series exists before the first request.

use std::time::Duration;

use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::canary::Figures;
use super::watch::REWARD_BOUNDS;
use super::{CacheUse, Generation, GenerationState};
use crate::domain::{Failure, FailureKind, Score};
use crate::scorer::SECONDS_BUCKETS;

/// How loading a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReloadOutcome {
    /// It is live.
    Loaded,
    /// It waits beside the live one.
    Staged,
    /// It was staged or held already, and is live now.
    Activated,
    /// It has the fingerprint of the live one.
    Unchanged,
    /// The settings, the recipe or the checkpoints do not make a model; the live one stays, as in all that follow.
    NoPlan,
    /// There is no room for it.
    NoRoom,
    /// It could not be read, or did not answer with finite scores.
    Failed,
    /// Its answers are too far from those of the live one.
    Refused,
    /// The last good generation was loaded once more, because its successor could not be.
    Restored,
}

impl ReloadOutcome {
    pub const ALL: [Self; 9] = [
        Self::Loaded,
        Self::Staged,
        Self::Activated,
        Self::Unchanged,
        Self::NoPlan,
        Self::NoRoom,
        Self::Failed,
        Self::Refused,
        Self::Restored,
    ];

    /// The name used in metric labels and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Staged => "staged",
            Self::Activated => "activated",
            Self::Unchanged => "unchanged",
            Self::NoPlan => "no_plan",
            Self::NoRoom => "no_room",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Restored => "restored",
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
    generations: IntGaugeVec,
    reloads: IntCounterVec,
    cache: IntCounterVec,
    reloading: IntGauge,
    reload_seconds: Gauge,
    reload_ended: Gauge,
    restart_needed: IntGauge,
    canary: GaugeVec,
    pub(super) failures: IntCounterVec,
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
        let number = |name: &str, help: &str| -> Result<Gauge, prometheus::Error> {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let states = Opts::new("warm_registry_generations", "Generations whose weights are on the device, by state.");
        let generations = IntGaugeVec::new(states, &["state"])?;
        registry.register(Box::new(generations.clone()))?;
        for state in GenerationState::ALL.into_iter().filter(|state| *state != GenerationState::Gone) {
            generations.with_label_values(&[state.name()]);
        }
        let canary = GaugeVec::new(Opts::new("warm_registry_canary", "Figures of the last canary; NaN before the first."), &["figure"])?;
        registry.register(Box::new(canary.clone()))?;
        for (figure, _) in Figures::default().named() {
            canary.with_label_values(&[figure]).set(f64::NAN);
        }
        let info = Opts::new("warm_registry_generation_info", "1, labelled with the live generation.");
        let generation_info = IntGaugeVec::new(info, &["generation", "fingerprint", "weights_id", "dtype", "method"])?;
        registry.register(Box::new(generation_info.clone()))?;
        // Until there is one, the series says so.
        generation_info.with_label_values(&["0", "", "", "", ""]).set(0);
        Ok(Self {
            generation_info,
            generations,
            canary,
            reloading: gauge("warm_registry_reloading", "1 while a generation is being loaded beside, or in the place of, the live one.")?,
            reload_seconds: number("warm_registry_reload_seconds", "How long the last reload took.")?,
            reload_ended: number("warm_registry_reload_timestamp_seconds", "When the last reload ended, in seconds since 1970; 0 before.")?,
            restart_needed: gauge("warm_registry_restart_needed", "Changed settings that a reload does not take up.")?,
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
            cache: counters(
                "warm_registry_cache_total",
                "Generations that were loaded, by what the cache of merged weights had to do with it.",
                "outcome",
                &CacheUse::NAMES,
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
            reward: histogram("warm_registry_reward", "Raw rewards that were handed out.", &REWARD_BOUNDS)?,
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

    /// Counts how the merged weights of a generation came.
    pub(super) fn cached(&self, cache: &CacheUse) {
        self.cache.with_label_values(&[cache.name()]).inc();
    }

    pub(super) fn reload_begins(&self) {
        self.reloading.set(1);
    }

    pub(super) fn reload_ends(&self, took: Duration, ended: std::time::SystemTime) {
        self.reloading.set(0);
        self.reload_seconds.set(took.as_secs_f64());
        self.reload_ended.set(ended.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    }

    /// Shows how many changed settings wait for a restart.
    pub(super) fn restart_needed(&self, settings: usize) {
        self.restart_needed.set(i64::try_from(settings).unwrap_or(i64::MAX));
    }

    pub(super) fn canary(&self, figures: &Figures) {
        for (name, value) in figures.named() {
            self.canary.with_label_values(&[name]).set(value.unwrap_or(f64::NAN));
        }
    }

    /// Counts generations that have been let go and still have requests.
    pub(super) fn retiring(&self) -> IntGauge {
        self.generations.with_label_values(&[GenerationState::Retiring.name()])
    }

    /// Shows what is here now.
    pub(super) fn show(&self, live: Option<&Generation>, states: impl Iterator<Item = GenerationState>) {
        let mut count = [0i64; 3];
        let counted = [GenerationState::Staged, GenerationState::Live, GenerationState::Held];
        for state in states {
            if let Some(place) = counted.iter().position(|counted| *counted == state) {
                count[place] += 1;
            }
        }
        for (state, count) in counted.into_iter().zip(count) {
            self.generations.with_label_values(&[state.name()]).set(count);
        }
        // The labels of the one before would stay for ever otherwise.
        self.generation_info.reset();
        let Some(live) = live else {
            self.generation_info.with_label_values(&["0", "", "", "", ""]).set(0);
            [&self.ready, &self.members, &self.resident, &self.device_bytes].into_iter().for_each(|gauge| gauge.set(0));
            return;
        };
        let labels =
            [&live.id.to_string(), &live.fingerprint.to_string(), &live.weights_id.to_string(), &live.info.dtype, &live.info.method];
        self.generation_info.with_label_values(&labels.map(String::as_str)).set(1);
        self.ready.set(1);
        self.members.set(live.info.members.len() as i64);
        self.resident.set(live.resident().count() as i64);
        self.device_bytes.set(live.device_bytes() as i64);
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
