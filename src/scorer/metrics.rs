//! What the scorer shows of itself. Every series exists before the first request.

use std::sync::{Arc, Mutex};

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use super::pace::Pace;

/// Bounds of every histogram of seconds: 100 µs to 60 s.
pub const SECONDS_BUCKETS: [f64; 19] =
    [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0];

/// The metrics of admission, queue and worker.
#[derive(Clone, Debug)]
pub struct ScorerMetrics {
    pub(super) devices: IntGauge,
    pub(super) queue_samples: IntGauge,
    pub(super) queue_tokens: IntGauge,
    pub(super) queue_seconds: Histogram,
    pub(super) forward_seconds: Histogram,
    pub(super) max_pack_tokens: IntGauge,
    pub(super) pack_tokens: Histogram,
    pub(super) pack_samples: Histogram,
    pub(super) tokens_computed: IntCounter,
    pub(super) tokens_shared: IntCounter,
    pub(super) tokens_cached: IntCounter,
    pub(super) samples: IntCounter,
    pub(super) packs: IntCounterVec,
    pub(super) skipped: IntCounterVec,
    pub(super) in_flight_requests: IntGauge,
    pub(super) in_flight_bytes: IntGauge,
    pub(super) in_flight_tokens: IntGauge,
    pub(super) shed: IntCounterVec,
    /// How long one model took for packs of so many tokens, shared ones counted each time: what admission foretells waits by.
    pub(super) pace: Arc<Mutex<Pace>>,
}

impl ScorerMetrics {
    /// Registers all series; fails where one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| -> Result<Histogram, prometheus::Error> {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
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
        let seconds = SECONDS_BUCKETS.to_vec();
        let tokens = counters(
            "warm_scorer_tokens_total",
            "Tokens of samples that were scored: computed, there already for another sample of the pack (shared), or for one of an earlier pack (cached).",
            "kind",
            &["computed", "shared", "cached"],
        )?;
        let samples = IntCounter::new("warm_scorer_samples_total", "Samples that went through a forward pass.")?;
        registry.register(Box::new(samples.clone()))?;
        let reasons: Vec<&str> = super::ShedReason::ALL.iter().map(|reason| reason.name()).collect();
        Ok(Self {
            devices: gauge("warm_scorer_devices", "Devices that take packs from the queue, each with forward passes of its own.")?,
            queue_samples: gauge("warm_scorer_queue_samples", "Samples that wait for the device.")?,
            queue_tokens: gauge("warm_scorer_queue_tokens", "Tokens that wait for the device.")?,
            queue_seconds: histogram("warm_scorer_queue_seconds", "Wait for the device, of a request, by pack.", seconds.clone())?,
            forward_seconds: histogram("warm_scorer_forward_seconds", "Forward pass of one pack, over all models of its lane.", seconds)?,
            max_pack_tokens: gauge("warm_scorer_max_pack_tokens", "Tokens that one pack may have.")?,
            pack_tokens: histogram("warm_scorer_pack_tokens", "Tokens that one pack computes, shared ones once.", powers_of_two(4, 18))?,
            pack_samples: histogram("warm_scorer_pack_samples", "Samples of one pack.", powers_of_two(0, 11))?,
            tokens_computed: tokens.with_label_values(&["computed"]),
            tokens_shared: tokens.with_label_values(&["shared"]),
            tokens_cached: tokens.with_label_values(&["cached"]),
            samples,
            packs: counters(
                "warm_scorer_packs_total",
                "Packs, by how their forward ended.",
                "outcome",
                &["ok", "split", "error", "panic"],
            )?,
            skipped: counters(
                "warm_scorer_skipped_total",
                "Queued work that was never run: samples past their deadline, and jobs whose caller has gone.",
                "reason",
                &["cancelled", "expired"],
            )?,
            in_flight_requests: gauge("warm_scorer_in_flight_requests", "Requests that hold a permit.")?,
            in_flight_bytes: gauge("warm_scorer_in_flight_bytes", "Bytes of message that permits are charged for.")?,
            in_flight_tokens: gauge("warm_scorer_in_flight_tokens", "Tokens that permits are charged for.")?,
            shed: counters("warm_serve_shed_total", "Requests refused for want of room, by what was full.", "reason", &reasons)?,
            pace: Arc::default(),
        })
    }

    /// Metrics of a registry of their own, for tests and for commands that show none.
    pub fn unregistered() -> Self {
        match Self::register(&Registry::new()) {
            Ok(metrics) => metrics,
            Err(error) => unreachable!("constant names and buckets in an empty registry: {error}"),
        }
    }
}

fn powers_of_two(first: u32, last: u32) -> Vec<f64> {
    (first..=last).map(|exponent| f64::from(1u32 << exponent)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_there_before_the_first_request_and_no_name_twice() {
        let registry = Registry::new();
        ScorerMetrics::register(&registry).expect("names are free");
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        for series in [
            "warm_scorer_queue_samples 0",
            "warm_scorer_queue_seconds_bucket{le=\"0.0001\"} 0",
            "warm_scorer_queue_seconds_bucket{le=\"60\"} 0",
            "warm_scorer_tokens_total{kind=\"shared\"} 0",
            "warm_scorer_packs_total{outcome=\"panic\"} 0",
            "warm_serve_shed_total{reason=\"draining\"} 0",
            "warm_serve_shed_total{reason=\"queue\"} 0",
        ] {
            assert!(text.contains(series), "{series} is not in\n{text}");
        }
        assert!(ScorerMetrics::register(&registry).is_err());
    }

    #[test]
    fn the_buckets_of_seconds_rise() {
        assert!(SECONDS_BUCKETS.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
