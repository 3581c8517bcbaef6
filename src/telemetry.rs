//! Logs: text or JSON lines on standard error, so that standard output stays for results; and traces over OTLP, where a
//! collector is named.

use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Where traces go.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceOptions {
    /// A collector that speaks OTLP over gRPC, such as `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// The share of traces that begin here and are kept, from 0 to 1. A caller's own decision (`traceparent`) is kept to.
    pub share: f64,
    /// The name of this process.
    pub instance: String,
}

/// A filter or an exporter that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{setting} `{value}`: {problem}")]
pub struct TelemetryError {
    pub setting: &'static str,
    pub value: String,
    pub problem: String,
}

/// How long the last spans may take to be sent when the process ends.
const FLUSH: Duration = Duration::from_secs(3);
/// How long one batch of spans may take.
const EXPORT: Duration = Duration::from_secs(5);

/// What has to be told that the process ends.
#[derive(Debug, Default)]
pub struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// Sends what has not been sent yet. The runtime in which it was started must still run, and this waits, so it is not for
    /// a thread of that runtime.
    pub fn stop(self) {
        if let Some(Err(error)) = self.0.map(|provider| provider.shutdown_with_timeout(FLUSH)) {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Starts logging for the whole process, without traces. A second call changes nothing.
pub fn start(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    start_with(format, filter, None).map(drop)
}

/// Starts logging, and tracing where a collector is named; the latter needs a tokio runtime around it, which sends. What a
/// trace says of a request are names and numbers, as in the log.
pub fn start_with(format: LogFormat, filter: &str, traces: Option<&TraceOptions>) -> Result<Telemetry, TelemetryError> {
    let wrong = |problem: String| TelemetryError { setting: "log.filter", value: filter.to_owned(), problem };
    let parsed = EnvFilter::try_new(filter).map_err(|error| wrong(error.to_string()))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = match format {
        LogFormat::Text => lines.with_target(true).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let provider = traces.map(exporting).transpose()?;
    // Spans are made at debug level; only our own are traced, so that exporting does not trace itself.
    let own = Targets::new().with_target("warm", LevelFilter::DEBUG);
    let spans = provider.as_ref().map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("warm")).with_filter(own));
    // An error means that a subscriber is there already, as in tests: theirs stays.
    let _ = tracing_subscriber::registry().with(lines.with_filter(parsed)).with(spans).try_init();
    Ok(Telemetry(provider))
}

fn exporting(options: &TraceOptions) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&options.endpoint)
        .with_timeout(EXPORT)
        .build()
        .map_err(|error| TelemetryError { setting: "traces.endpoint", value: options.endpoint.clone(), problem: error.to_string() })?;
    let resource = Resource::builder_empty()
        .with_service_name("warm")
        .with_attributes([
            KeyValue::new("service.version", crate::domain::VERSION),
            KeyValue::new("service.instance.id", options.instance.clone()),
        ])
        .build();
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.share)));
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_sampler(sampler).with_resource(resource).build())
}
