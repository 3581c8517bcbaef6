//! The header gate: what is decided about a call before a byte of its body is read.
//!
//! It takes the deadline and the right to be in flight when the headers arrive, and it answers DEADLINE_EXCEEDED itself a
//! little before the caller's own timer, because tonic's server answers CANCELLED when its timer fires, and wins every
//! tie. It sees a call end however it ends, so it is also where calls are counted and logged.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Instrument;

use super::body::{Charged, Unread};
use super::calls::CallBook;
use super::metrics::RPCS;
use super::{status, tenants};
use crate::clock::Clock;
use crate::scorer::Admission;

/// What the gate stands on.
#[derive(Clone)]
pub struct GateOptions {
    pub clock: Clock,
    pub admission: Admission,
    pub calls: CallBook,
    /// What a call is charged for until its message is read, where its headers announce no size.
    pub assumed_bytes: u64,
    /// The largest request message, whatever is announced.
    pub max_bytes: u64,
}

/// When the caller stops waiting; in the extensions of a request that has a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline(pub Instant);

/// Puts a [`Gate`] in front of all services.
#[derive(Clone)]
pub struct GateLayer(Arc<GateOptions>);

impl GateLayer {
    pub fn new(options: GateOptions) -> Self {
        Self(Arc::new(options))
    }
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner, options: self.0.clone() }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Gate<S> {
    inner: S,
    options: Arc<GateOptions>,
}

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        // The service that was polled ready is the one to call; its clone may not be.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let Some(rpc) = rpc_of(request.uri().path()) else {
            // Health and reflection answer whatever the load is.
            return Box::pin(inner.call(request));
        };
        let options = self.options.clone();
        let mut call = options.calls.begin(rpc.name, &request);
        request.extensions_mut().insert(call.facts.clone());
        let timeout = request.headers().get("grpc-timeout").and_then(|value| parse_timeout(value.as_bytes()));
        let deadline = timeout.and_then(|timeout| call.started.checked_add(timeout - margin(timeout)));
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(Deadline(deadline));
        }
        let mut held = None;
        if rpc.scores {
            let bytes = announced_bytes(&request).unwrap_or(options.assumed_bytes).min(options.max_bytes);
            let admission = call.span.in_scope(|| tracing::debug_span!("admission", bytes));
            let patience = deadline.map(|deadline| deadline.saturating_duration_since(call.started));
            let caller = tenants::caller(&request);
            match admission.in_scope(|| options.admission.admit_of(&caller, bytes, patience)) {
                Ok(permit) => {
                    held = Some(permit.clone());
                    request.extensions_mut().insert(permit.clone());
                    request.extensions_mut().insert(caller);
                    request = request.map(|body| Body::new(Charged::new(body, permit)));
                }
                Err(refused) => {
                    let status = status::shed(refused);
                    return Box::pin(async move { Ok(call.refuse(status)) });
                }
            }
        }
        // The handler runs inside the call's span, which therefore travels through the queue with what it submits.
        let answer = call.span.in_scope(|| inner.call(request)).instrument(call.span.clone());
        Box::pin(async move {
            let expired = async {
                match deadline {
                    Some(deadline) => options.clock.sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                response = answer => {
                    let response = response?;
                    call.answer(&response);
                    Ok(match held {
                        Some(permit) => response.map(|body| Body::new(Unread::new(body, permit))),
                        None => response,
                    })
                }
                () = expired => Ok(call.refuse(status::deadline_exceeded())),
            }
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rpc {
    name: &'static str,
    /// Whether it costs the device time, so that it needs a permit.
    scores: bool,
}

/// The call of our own services that this path names. Unknown methods are left to the router.
fn rpc_of(path: &str) -> Option<Rpc> {
    let (service, method) = path.strip_prefix("/warm.v1.")?.split_once('/')?;
    let name = RPCS.into_iter().find(|name| *name == method)?;
    Some(Rpc { name, scores: service == "RewardService" })
}

/// The size that a request announces in its headers. Most gRPC clients announce none.
fn announced_bytes<B>(request: &http::Request<B>) -> Option<u64> {
    request.headers().get(http::header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// How long before the caller's own timer the answer must leave: measured against tonic's client, 2 ms were just enough.
fn margin(timeout: Duration) -> Duration {
    Duration::from_millis(10).min(timeout / 5)
}

/// The value of `grpc-timeout`: up to 8 digits and a unit. `None` for anything else, which tonic ignores too.
fn parse_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits.iter().fold(0u64, |count, digit| count * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
