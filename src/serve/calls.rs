//! One call from its headers to its end: counted, logged, and remembered when it failed.
//!
//! A line has the names and numbers of a call and never its text. What a mistake of the caller is about may quote that
//! text, so of an INVALID_ARGUMENT only the field is told, unless content may be logged.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::transport::server::TcpConnectInfo;
use tonic::{Code, Status};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::metrics::ServeMetrics;
use super::tenants::Tenants;
use crate::clock::Clock;
use crate::lock::lock;
use crate::registry::{ModelStamp, Problem, Recent, Timing};
use crate::wire::code_name;

/// A caller's own name of a call is cut here.
const MAX_REQUEST_ID: usize = 128;
/// What is logged of a sample, where content may be logged.
const MAX_CONTENT: usize = 512;

/// What becomes of calls beside their answer. Clones share it.
#[derive(Clone)]
pub struct CallBook(Arc<Book>);

struct Book {
    clock: Clock,
    metrics: ServeMetrics,
    recent: Recent,
    tenants: Arc<Tenants>,
    successes: Sampler,
    content: bool,
}

/// Settings of the log of calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CallLogOptions {
    /// The share of calls without any failure that are logged, from 0 to 1. Failures are always logged.
    pub successes: f64,
    /// Whether the text of samples may be logged.
    pub content: bool,
}

impl CallBook {
    pub fn new(clock: Clock, metrics: ServeMetrics, recent: Recent, tenants: Arc<Tenants>, options: CallLogOptions) -> Self {
        for name in tenants.names() {
            metrics.show_tenant(&name);
        }
        let successes = Sampler::new(options.successes);
        Self(Arc::new(Book { clock, metrics, recent, tenants, successes, content: options.content }))
    }

    pub fn logs_content(&self) -> bool {
        self.0.content
    }

    /// A call begins; whoever drops it before its end has cancelled it.
    pub(super) fn begin<B>(&self, rpc: &'static str, request: &http::Request<B>) -> Call {
        let peer = request.extensions().get::<TcpConnectInfo>().and_then(|connection| connection.remote_addr());
        let call = self.start(rpc, peer.map(|peer| peer.to_string()), self.0.tenants.of(request.headers()));
        if !call.span.is_disabled()
            && let Some(parent) = remote_parent(request.headers())
        {
            // Without a layer that exports there is nobody to tell.
            let _ = call.span.set_parent(parent);
        }
        call
    }

    /// One request of a stream begins, by the caller of the stream.
    pub(super) fn begin_on_stream(&self, rpc: &'static str, stream: &CallFacts) -> Call {
        let (peer, tenant) = stream.facts().caller.clone();
        self.start(rpc, peer, tenant)
    }

    fn start(&self, rpc: &'static str, peer: Option<String>, tenant: String) -> Call {
        self.0.metrics.started(rpc);
        let span = tracing::debug_span!(
            "request",
            otel.kind = "server",
            otel.status_code = tracing::field::Empty,
            rpc,
            tenant,
            request_id = tracing::field::Empty,
            code = tracing::field::Empty,
            fingerprint = tracing::field::Empty,
            samples = tracing::field::Empty,
            tokens = tracing::field::Empty,
        );
        let facts = CallFacts::default();
        facts.facts().caller = (peer.clone(), tenant.clone());
        Call { book: self.clone(), rpc, started: self.0.clock.now(), peer, tenant, facts, span, ended: false }
    }
}

/// What the handler tells of a call; in the extensions of every counted request.
#[derive(Clone, Debug, Default)]
pub(super) struct CallFacts(Arc<Mutex<Facts>>);

#[derive(Clone, Debug, Default)]
struct Facts {
    /// Peer and tenant.
    caller: (Option<String>, String),
    request_id: String,
    samples: usize,
    content: Option<String>,
    answered: Option<Answered>,
}

/// What is known of a call that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub stamp: ModelStamp,
    pub timing: Timing,
    /// Tokens of the samples that have scores.
    pub tokens: u64,
    /// Samples that have failures in place of scores.
    pub failed: usize,
}

impl CallFacts {
    /// Also names the request in the call's span, which is the current one of its handler.
    pub(super) fn asked(&self, request_id: &str, samples: usize) {
        let request_id: String = request_id.chars().take(MAX_REQUEST_ID).collect();
        tracing::Span::current().record("request_id", &request_id);
        tracing::Span::current().record("samples", samples);
        let mut facts = self.facts();
        (facts.request_id, facts.samples) = (request_id, samples);
    }

    /// What the first sample says; only where content may be logged.
    pub(super) fn content(&self, sample: &crate::domain::Sample) {
        let words = format!("{sample:?}");
        self.facts().content = Some(words.chars().take(MAX_CONTENT).collect());
    }

    /// Gives back how many samples failed.
    pub(super) fn answered(&self, answered: Answered) -> usize {
        let span = tracing::Span::current();
        if !span.is_disabled() {
            span.record("fingerprint", tracing::field::display(answered.stamp.fingerprint));
            span.record("tokens", answered.tokens);
        }
        let failed = answered.failed;
        self.facts().answered = Some(answered);
        failed
    }

    /// The name that the call is counted under.
    pub(super) fn tenant(&self) -> String {
        self.facts().caller.1.clone()
    }

    fn facts(&self) -> std::sync::MutexGuard<'_, Facts> {
        lock(&self.0)
    }
}

/// One counted call. Dropped before its end, it was cancelled.
pub(super) struct Call {
    book: CallBook,
    rpc: &'static str,
    pub(super) started: Instant,
    peer: Option<String>,
    tenant: String,
    pub(super) facts: CallFacts,
    pub(super) span: tracing::Span,
    ended: bool,
}

impl Call {
    /// Ends with a status of ours, before or in place of the handler's answer.
    pub(super) fn refuse(&mut self, status: Status) -> http::Response<tonic::body::Body> {
        self.end(status.code(), status.message());
        status.into_http()
    }

    /// Ends with the handler's answer, whose status is in its headers where there is no message.
    pub(super) fn answer<B>(&mut self, response: &http::Response<B>) {
        match Status::from_header_map(response.headers()) {
            None => self.end(Code::Ok, ""),
            Some(status) => self.end(status.code(), status.message()),
        }
    }

    /// Ends with what became of one request of a stream.
    pub(super) fn finish<T>(&mut self, result: &Result<T, Status>) {
        match result {
            Ok(_) => self.end(Code::Ok, ""),
            Err(status) => self.end(status.code(), status.message()),
        }
    }

    fn end(&mut self, code: Code, words: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let book = &self.book.0;
        let took = book.clock.now().saturating_duration_since(self.started);
        book.metrics.ended(self.rpc, code, took);
        let facts = self.facts.facts().clone();
        let tokens = facts.answered.as_ref().map_or(0, |answered| answered.tokens);
        book.metrics.billed(&self.tenant, facts.samples as u64, tokens);
        self.span.record("code", code_name(code));
        let words = if code == Code::InvalidArgument && !book.content { field_of(words) } else { words };
        if !matches!(code, Code::Ok | Code::Cancelled) {
            if is_ours(code) {
                self.span.record("otel.status_code", "ERROR");
            }
            book.recent.failed(Problem {
                at: book.clock.wall(),
                rpc: self.rpc,
                code: code_name(code),
                words: words.to_owned(),
                request_id: facts.request_id.clone(),
                count: 1,
            });
        }
        let failed = facts.answered.as_ref().map_or(0, |answered| answered.failed);
        if code != Code::Ok || failed > 0 || book.successes.next() {
            self.log(code, words, &facts, took);
        }
    }

    fn log(&self, code: Code, words: &str, facts: &Facts, took: Duration) {
        let answered = facts.answered.as_ref();
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let timing = answered.map(|answered| answered.timing);
        // The level is part of a macro's call site, so there is one for each.
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    request_id = %facts.request_id,
                    rpc = self.rpc,
                    code = code_name(code),
                    error = (!words.is_empty()).then_some(words),
                    peer = self.peer.as_deref(),
                    tenant = %self.tenant,
                    fingerprint = answered.map(|answered| answered.stamp.fingerprint.to_string()).as_deref(),
                    samples = facts.samples,
                    failed = answered.map(|answered| answered.failed),
                    tokens = answered.map(|answered| answered.tokens),
                    tokenize_ms = timing.map(|timing| milliseconds(timing.tokenize)),
                    queue_ms = timing.map(|timing| milliseconds(timing.queue)),
                    forward_ms = timing.map(|timing| milliseconds(timing.forward)),
                    ms = milliseconds(took),
                    content = facts.content.as_deref(),
                    "request"
                )
            };
        }
        self.span.in_scope(|| match code {
            Code::Internal | Code::Unknown | Code::DataLoss => line!(error),
            Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded => line!(warn),
            _ => line!(info),
        });
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Code::Cancelled, "");
    }
}

/// The caller's span, by its `traceparent`.
fn remote_parent(headers: &http::HeaderMap) -> Option<opentelemetry::Context> {
    struct Headers<'a>(&'a http::HeaderMap);
    impl Extractor for Headers<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key)?.to_str().ok()
        }
        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(http::HeaderName::as_str).collect()
        }
    }
    let context = TraceContextPropagator::new().extract_with_context(&opentelemetry::Context::new(), &Headers(headers));
    context.span().span_context().is_valid().then_some(context)
}

/// Whether a call ended like this by the server's doing.
fn is_ours(code: Code) -> bool {
    use Code::{DataLoss, DeadlineExceeded, Internal, ResourceExhausted, Unavailable, Unimplemented, Unknown};
    matches!(code, DataLoss | DeadlineExceeded | Internal | ResourceExhausted | Unavailable | Unimplemented | Unknown)
}

/// The field of a mistake, without what is wrong with it.
fn field_of(words: &str) -> &str {
    words.split_once(": ").map_or("", |(field, _)| field)
}

/// Lets a share of events through, evenly, the first one among them.
#[derive(Debug)]
struct Sampler {
    share: f64,
    seen: AtomicU64,
}

impl Sampler {
    fn new(share: f64) -> Self {
        Self { share: share.clamp(0.0, 1.0), seen: AtomicU64::new(0) }
    }

    fn next(&self) -> bool {
        let before = self.seen.fetch_add(1, Ordering::Relaxed) as f64;
        ((before + 1.0) * self.share).ceil() > (before * self.share).ceil()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn of_a_mistake_only_the_field_is_told() {
        assert_eq!(field_of("samples[3].text: expected at most 5 bytes, found \"secret: words\""), "samples[3].text");
        assert_eq!(field_of("a secret without a field"), "");
    }

    #[test]
    fn a_caller_is_the_parent_only_where_it_says_so_properly() {
        let parent = |value: &'static str| {
            let headers = [(http::HeaderName::from_static("traceparent"), http::HeaderValue::from_static(value))];
            remote_parent(&headers.into_iter().collect()).map(|context| context.span().span_context().trace_id().to_string())
        };
        let id = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(parent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").as_deref(), Some(id));
        for wrong in ["", "00-0-0-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "nonsense"] {
            assert_eq!(parent(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_sampler_lets_exactly_its_share_through(share in 0.0f64..=1.0, calls in 1u32..2000) {
            let sampler = Sampler::new(share);
            let through = (0..calls).filter(|_| sampler.next()).count();
            prop_assert_eq!(through as f64, (f64::from(calls) * share).ceil());
        }
    }
}
