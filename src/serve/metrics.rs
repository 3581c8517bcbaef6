//! What the edge shows of itself. Every series exists before the first request.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};
use tonic::Code;

use crate::scorer::SECONDS_BUCKETS;
use crate::wire::code_name;

/// The calls that are counted, by the last part of their path.
pub(super) const RPCS: [&str; 5] = ["Score", "ScoreStream", "Compare", "GetModel", "ListGenerations"];
/// What the requests on streams are counted as; the streams are counted as calls.
pub(super) const STREAMED: &str = "ScoreStream.request";

/// The metrics of calls.
#[derive(Clone, Debug)]
pub struct ServeMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    in_flight: IntGaugeVec,
}

impl ServeMetrics {
    /// Registers all series, and what was built; fails where one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let requests = IntCounterVec::new(Opts::new("warm_serve_requests_total", "Calls that ended, by rpc and code."), &["rpc", "code"])?;
        let buckets = HistogramOpts::new("warm_serve_request_seconds", "From the headers of a call to the headers of its answer.")
            .buckets(SECONDS_BUCKETS.to_vec());
        let seconds = HistogramVec::new(buckets, &["rpc"])?;
        let in_flight = IntGaugeVec::new(Opts::new("warm_serve_in_flight_requests", "Calls that are being answered."), &["rpc"])?;
        let build = IntGaugeVec::new(Opts::new("warm_build_info", "1, labelled with what was built."), &["version"])?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        registry.register(Box::new(build.clone()))?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for rpc in RPCS.into_iter().chain([STREAMED]) {
            seconds.with_label_values(&[rpc]);
            in_flight.with_label_values(&[rpc]);
            for code in 0..=16 {
                requests.with_label_values(&[rpc, code_name(Code::from_i32(code))]);
            }
        }
        Ok(Self { requests, seconds, in_flight })
    }

    pub(super) fn started(&self, rpc: &'static str) {
        self.in_flight.with_label_values(&[rpc]).inc();
    }

    pub(super) fn ended(&self, rpc: &'static str, code: Code, took: Duration) {
        self.in_flight.with_label_values(&[rpc]).dec();
        self.requests.with_label_values(&[rpc, code_name(code)]).inc();
        self.seconds.with_label_values(&[rpc]).observe(took.as_secs_f64());
    }
}
