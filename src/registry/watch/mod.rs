//! The watch on reward hacking: what happened to rewards, dated, run by run. It shows and does not judge: such signals audit
//! well and predict badly, so thresholds stand in the alert rules, relative to each run's own first hour.
//!
//! A run is what one tenant asks of one generation: other weights have other rewards, so with them a run begins anew. What is
//! counted costs a few sums per sample and one lock per call; figures are computed when somebody looks.

mod counts;
mod shadow;
mod stats;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use counts::LENGTH_BOUNDS;
pub use counts::REWARD_BOUNDS;
pub use shadow::ShadowOutcome;
use shadow::{Drawn, MAILBOX};
use stats::{BASELINE, Budget, FIGURES, Run, Sampler, Seen, Shadowed, Traffic, WINDOW};

use super::Generation;
use crate::clock::Clock;
use crate::domain::{FailureKind, GenerationId, Score};
use crate::lock::lock;
use crate::text::Encoding;

/// Settings of the watch.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchOptions {
    /// The share of prompts that the members score, too.
    pub shadow_share: f64,
    /// What the members may be given, each member's tokens counted.
    pub max_tokens_per_second: f64,
    /// Runs that are shown before their first call.
    pub tenants: Vec<String>,
}

/// Whose run a call belongs to, and which of its samples answer the same prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// A name of a bounded set.
    pub tenant: Arc<str>,
    /// So many samples each, in order.
    pub prompts: Vec<usize>,
}

/// A sample that was scored by the merged model.
#[derive(Clone, Debug)]
pub(super) struct Judged {
    pub encoding: Arc<Encoding>,
    /// Raw.
    pub reward: Score,
}

/// Runs at most; what comes beyond is counted under [`OTHER`]. Tenants have bounds of their own, this only makes sure.
const MAX_RUNS: usize = 40;
const OTHER: &str = "other";

/// Counts and shows. Clones are handles of the same.
#[derive(Clone)]
pub struct Watch(Arc<Inner>);

struct Inner {
    clock: Clock,
    shadow_share: f64,
    runs: Mutex<BTreeMap<Arc<str>, Watching>>,
    draw: Mutex<(Sampler, Budget)>,
    mailbox: mpsc::Sender<Drawn>,
    /// Until somebody scores what is in it.
    inbox: Mutex<Option<mpsc::Receiver<Drawn>>>,
    now: GaugeVec,
    first_hour: GaugeVec,
    rewards: HistogramVec,
    lengths: HistogramVec,
    shadow: IntCounterVec,
}

#[derive(Debug, Default)]
struct Watching {
    generation: Option<GenerationId>,
    began: Option<SystemTime>,
    calibration: Option<(f64, f64)>,
    run: Run,
}

impl Watching {
    /// Begins anew with another generation. A clock of another thread may bring an older one once more; it counts nowhere.
    fn of(&mut self, generation: &Generation, clock: &Clock) -> Option<&mut Run> {
        if self.generation.is_none_or(|known| known < generation.id) {
            let calibration = generation.calibration.as_ref().map(|calibration| (calibration.mean(), calibration.std()));
            let (began, generation) = (Some(clock.wall()), Some(generation.id));
            *self = Self { generation, began, calibration, run: Run::default() };
        }
        (self.generation == Some(generation.id)).then_some(&mut self.run)
    }
}

impl Watch {
    pub fn new(options: &WatchOptions, clock: Clock) -> Result<Self, prometheus::Error> {
        let gauges = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &["figure", "tenant"]);
        let help = "Samples that were drawn for the members, by what became of them.";
        let shadow = IntCounterVec::new(Opts::new("warm_watch_shadow_samples_total", help), &["outcome"])?;
        for outcome in ShadowOutcome::ALL {
            shadow.with_label_values(&[outcome.name()]);
        }
        let histogram = |name: &str, help: &str, bounds: &[f64]| -> Result<HistogramVec, prometheus::Error> {
            let histogram = HistogramVec::new(HistogramOpts::new(name, help).buckets(bounds.to_vec()), &["tenant"])?;
            for tenant in &options.tenants {
                histogram.with_label_values(&[tenant]);
            }
            Ok(histogram)
        };
        let (mailbox, inbox) = mpsc::channel(MAILBOX);
        let runs = options.tenants.iter().take(MAX_RUNS).map(|name| (name.as_str().into(), Watching::default())).collect();
        Ok(Self(Arc::new(Inner {
            clock,
            shadow_share: options.shadow_share,
            runs: Mutex::new(runs),
            draw: Mutex::new((Sampler::new(options.shadow_share), Budget::new(options.max_tokens_per_second))),
            mailbox,
            inbox: Mutex::new(Some(inbox)),
            now: gauges(
                "warm_watch_now",
                "Figures of the last ten minutes of a run; NaN where one is undefined. /watch says what they mean.",
            )?,
            first_hour: gauges("warm_watch_first_hour", "The same of the first hour of a run; NaN until it is over.")?,
            rewards: histogram("warm_watch_reward", "Raw rewards of the live generation.", &REWARD_BOUNDS)?,
            lengths: histogram("warm_watch_tokens", "Lengths of the samples that have these rewards.", &LENGTH_BOUNDS)?,
            shadow,
        })))
    }

    /// One call that the live generation has answered.
    pub(super) fn observe(&self, watched: &Watched, generation: &Arc<Generation>, samples: &[Result<Judged, FailureKind>]) {
        let mut traffic = Traffic::default();
        for sample in samples {
            match sample {
                Ok(Judged { encoding, reward }) => {
                    traffic.push(Seen { reward: f64::from(reward.get()), tokens: encoding.tokens(), truncated: encoding.truncated() })
                }
                Err(FailureKind::NonFinite) => traffic.non_finite += 1,
                // A sample that could not be read says nothing of rewards.
                Err(_) => {}
            }
        }
        let now = self.0.clock.now();
        let tenant = self.run(&watched.tenant, generation, |run| run.add(now, |sums| sums.merge(&traffic)));
        let (rewards, lengths) = (self.0.rewards.with_label_values(&[&tenant]), self.0.lengths.with_label_values(&[&tenant]));
        for Judged { encoding, reward } in samples.iter().flatten() {
            rewards.observe(f64::from(reward.get()));
            lengths.observe(encoding.tokens() as f64);
        }
        if self.0.shadow_share > 0.0 {
            self.draw(watched, generation, samples);
        }
    }

    /// What the members said of a prompt's samples. It counts only while the run is still one of this generation.
    fn shadowed(&self, tenant: &Arc<str>, generation: &Generation, shadowed: &Shadowed) {
        let now = self.0.clock.now();
        self.run(tenant, generation, |run| run.add(now, |sums| sums.push_shadowed(shadowed)));
    }

    /// Changes the run of a tenant and gives back the name that it is counted under.
    fn run(&self, tenant: &Arc<str>, generation: &Generation, change: impl FnOnce(&mut Run)) -> Arc<str> {
        let mut runs = lock(&self.0.runs);
        let tenant = if runs.contains_key(tenant) || runs.len() < MAX_RUNS { tenant.clone() } else { OTHER.into() };
        if let Some(run) = runs.entry(tenant.clone()).or_default().of(generation, &self.0.clock) {
            change(run);
        }
        tenant
    }

    /// Counts samples that were drawn.
    fn count(&self, outcome: ShadowOutcome, samples: usize) {
        self.0.shadow.with_label_values(&[outcome.name()]).inc_by(samples as u64);
    }

    /// Everything that is known, for people without Prometheus.
    pub fn report(&self) -> Value {
        let now = self.0.clock.now();
        let figures = |traffic: &Traffic, calibration| -> Map<String, Value> {
            traffic.figures(calibration).into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect()
        };
        let sizes = |traffic: &Traffic| (traffic.rewards.each(&REWARD_BOUNDS), traffic.lengths.each(&LENGTH_BOUNDS));
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        // Counted after it stands in a run, so read before: no sample is told as counted of which the figures know nothing.
        let shadow: Map<String, Value> = ShadowOutcome::ALL
            .iter()
            .map(|outcome| (outcome.name().to_owned(), json!(self.0.shadow.with_label_values(&[outcome.name()]).get())))
            .collect();
        let tenants: Map<String, Value> = lock(&self.0.runs)
            .iter()
            .map(|(name, watching)| {
                let Watching { generation, began, calibration, run } = watching;
                let (last, (first, over)) = (run.now(now), run.first_hour(now));
                let ((rewards, lengths), (first_rewards, first_lengths)) = (sizes(&last), sizes(first));
                let shown = json!({
                    "generation": generation.map(|generation| generation.0),
                    "began_unix_s": began.map(seconds),
                    "now": figures(&last, *calibration),
                    "first_hour": figures(first, *calibration),
                    "first_hour_is_over": over,
                    "rewards": {"now": rewards, "first_hour": first_rewards},
                    "lengths": {"now": lengths, "first_hour": first_lengths},
                });
                (name.to_string(), shown)
            })
            .collect();
        let meanings: Map<String, Value> = FIGURES.iter().map(|(name, meaning)| ((*name).to_owned(), json!(meaning))).collect();
        json!({
            "window_s": WINDOW.as_secs(),
            "baseline_s": BASELINE.as_secs(),
            "shadow_share": self.0.shadow_share,
            "shadow_samples": shadow,
            "figures": meanings,
            // One count for each bound, of what lies at or below it and above the one before; one more for the rest.
            "reward_bounds": REWARD_BOUNDS,
            "length_bounds": LENGTH_BOUNDS,
            "tenants": tenants,
        })
    }

    /// Puts the figures of this moment into the series.
    fn show(&self) {
        let now = self.0.clock.now();
        for (tenant, Watching { calibration, run, .. }) in &*lock(&self.0.runs) {
            let show = |gauges: &GaugeVec, traffic: Option<&Traffic>| {
                let values = traffic.map(|traffic| traffic.figures(*calibration));
                for (i, (name, _)) in FIGURES.iter().enumerate() {
                    let value = values.as_ref().and_then(|values| values[i].1);
                    gauges.with_label_values(&[*name, tenant.as_ref()]).set(value.unwrap_or(f64::NAN));
                }
            };
            show(&self.0.now, Some(&run.now(now)));
            let (first, over) = run.first_hour(now);
            show(&self.0.first_hour, over.then_some(first));
        }
    }
}

/// Computed when it is scraped.
impl Collector for Watch {
    fn desc(&self) -> Vec<&Desc> {
        let Inner { now, first_hour, rewards, lengths, shadow, .. } = &*self.0;
        [now.desc(), first_hour.desc(), rewards.desc(), lengths.desc(), shadow.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.show();
        let Inner { now, first_hour, rewards, lengths, shadow, .. } = &*self.0;
        [now.collect(), first_hour.collect(), rewards.collect(), lengths.collect(), shadow.collect()].concat()
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
