//! Logs: text or JSON lines on standard error, so that standard output stays for results.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// A log filter that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("log.filter `{filter}`: {problem}")]
pub struct TelemetryError {
    pub filter: String,
    pub problem: String,
}

/// Starts logging for the whole process. A second call changes nothing.
pub fn start(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let parsed = EnvFilter::try_new(filter).map_err(|error| TelemetryError { filter: filter.to_owned(), problem: error.to_string() })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_span_events(FmtSpan::NONE);
    // An error means that a subscriber is there already, as in tests: theirs stays.
    let _ = match format {
        LogFormat::Text => builder.with_target(true).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}
