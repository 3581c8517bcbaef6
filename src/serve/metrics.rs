//! What the edge shows of itself. Every series exists before the first request.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};
use tonic::Code;

use super::tenants;
use crate::scorer::SECONDS_BUCKETS;
use crate::wire::code_name;

/// The calls that are counted, by the last part of their path.
pub(super) const RPCS: [&str; 7] = ["Score", "ScoreStream", "Compare", "GetModel", "ListGenerations", "Reload", "Activate"];
/// What the requests on streams are counted as; the streams are counted as calls.
pub(super) const STREAMED: &str = "ScoreStream.request";

/// The metrics of calls.
#[derive(Clone, Debug)]
pub struct ServeMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    in_flight: IntGaugeVec,
    tenant_requests: IntCounterVec,
    tenant_samples: IntCounterVec,
    tenant_tokens: IntCounterVec,
}

impl ServeMetrics {
    /// Registers all series, and what was built; fails where one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let requests = IntCounterVec::new(Opts::new("warm_serve_requests_total", "Calls that ended, by rpc and code."), &["rpc", "code"])?;
        let buckets = HistogramOpts::new("warm_serve_request_seconds", "From the headers of a call to the headers of its answer.")
            .buckets(SECONDS_BUCKETS.to_vec());
        let seconds = HistogramVec::new(buckets, &["rpc"])?;
        let in_flight = IntGaugeVec::new(Opts::new("warm_serve_in_flight_requests", "Calls that are being answered."), &["rpc"])?;
        let build = IntGaugeVec::new(Opts::new("warm_build_info", "1, labelled with what was built."), &["version", "commit"])?;
        let by_tenant = |name: &str, help: &str| -> Result<IntCounterVec, prometheus::Error> {
            let counters = IntCounterVec::new(Opts::new(name, help), &["tenant"])?;
            registry.register(Box::new(counters.clone()))?;
            Ok(counters)
        };
        let tenant_requests = by_tenant("warm_serve_tenant_requests_total", "Calls that ended, by tenant.")?;
        let tenant_samples = by_tenant("warm_serve_tenant_samples_total", "Samples that were asked for, by tenant.")?;
        let tenant_tokens = by_tenant("warm_serve_tenant_tokens_total", "Tokens of samples that were scored, by tenant.")?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        registry.register(Box::new(build.clone()))?;
        build.with_label_values(&[crate::domain::VERSION, crate::domain::COMMIT]).set(1);
        for rpc in RPCS.into_iter().chain([STREAMED]) {
            seconds.with_label_values(&[rpc]);
            in_flight.with_label_values(&[rpc]);
            for code in 0..=16 {
                requests.with_label_values(&[rpc, code_name(Code::from_i32(code))]);
            }
        }
        let metrics = Self { requests, seconds, in_flight, tenant_requests, tenant_samples, tenant_tokens };
        for name in [tenants::NONE, tenants::OTHER] {
            metrics.show_tenant(name);
        }
        Ok(metrics)
    }

    /// Shows a tenant before its first call.
    pub(super) fn show_tenant(&self, name: &str) {
        self.billed_by(name, 0, 0, 0);
    }

    /// A call of this tenant ended, of so many samples, and with scores of so many tokens.
    pub(super) fn billed(&self, tenant: &str, samples: u64, tokens: u64) {
        self.billed_by(tenant, 1, samples, tokens);
    }

    fn billed_by(&self, tenant: &str, requests: u64, samples: u64, tokens: u64) {
        self.tenant_requests.with_label_values(&[tenant]).inc_by(requests);
        self.tenant_samples.with_label_values(&[tenant]).inc_by(samples);
        self.tenant_tokens.with_label_values(&[tenant]).inc_by(tokens);
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
