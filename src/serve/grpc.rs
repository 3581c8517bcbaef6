//! The two gRPC services, and the server that carries them with health and reflection.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::net::TcpListener;
use tonic::codec::CompressionEncoding::{Gzip, Zstd};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::calls::{Answered, CallBook, CallFacts};
use super::convert::{self, Asked, ConvertLimits, Violations};
use super::gate::{Deadline, GateLayer, GateOptions};
use super::readiness::Readiness;
use super::{health, status, stream};
use crate::domain::Failure;
use crate::registry::{CallOptions, CompareOptions, Engine, ModelStamp, Reloader, Timing, Watched};
use crate::scorer::{Admission, Caller, Permit};
use crate::wire::model_service_server::ModelServiceServer;
use crate::wire::reward_service_server::{RewardService, RewardServiceServer};
use crate::wire::{self};

/// Settings of the gRPC server.
#[derive(Clone, Debug, PartialEq)]
pub struct GrpcOptions {
    /// The largest request message.
    pub max_decode: usize,
    /// The largest response message.
    pub max_encode: usize,
    pub limits: ConvertLimits,
    /// `None`: open connections are never checked.
    pub keepalive_interval: Option<Duration>,
    pub keepalive_timeout: Duration,
    /// A connection of about this age is closed once its calls have ended. `None`: none is.
    pub max_connection_age: Option<Duration>,
    /// Requests of one stream that are scored at once.
    pub stream_window: usize,
}

/// The server could not be built or failed as a whole.
#[derive(Debug, thiserror::Error)]
#[error("gRPC server: {0}")]
pub struct ServeError(String);

/// What the gRPC server stands on.
#[derive(Clone)]
pub struct Edge {
    pub engine: Engine,
    pub admission: Admission,
    /// Absent where there is nothing to load from.
    pub reloader: Option<Reloader>,
    pub readiness: Readiness,
    pub calls: CallBook,
    pub options: GrpcOptions,
}

/// What an unread message is taken for, where its headers do not announce its size.
const ASSUMED_BYTES: u64 = 1 << 20;

/// Calls on one connection at once, of whatever kind: what the gate refuses takes memory for its headers, too.
const MAX_STREAMS: u32 = 1024;

/// A message of less than this is checked where it is read; a larger one in the pool that encodes.
const CHECKED_AT_ONCE: u64 = 256 << 10;

/// Serves on `listener` until `stop` completes, then lets open calls end. How long that may take is the caller's decision.
pub async fn serve(edge: Edge, listener: TcpListener, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let failed = |error: &dyn std::error::Error| ServeError(error.to_string());
    let gate = GateLayer::new(GateOptions {
        clock: edge.engine.clock().clone(),
        admission: edge.admission.clone(),
        calls: edge.calls.clone(),
        assumed_bytes: ASSUMED_BYTES.min(edge.options.max_decode as u64),
        max_bytes: edge.options.max_decode as u64,
    });
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection_v1 = reflection().build_v1().map_err(|error| failed(&error))?;
    // grpcurl of some years ago knows only the older one.
    let reflection_v1alpha = reflection().build_v1alpha().map_err(|error| failed(&error))?;
    let options = edge.options.clone();
    let handlers = Arc::new(Handlers { edge: edge.clone() });
    let rewards = RewardServiceServer::from_arc(handlers.clone())
        .max_decoding_message_size(options.max_decode)
        .max_encoding_message_size(options.max_encode)
        .accept_compressed(Gzip)
        .accept_compressed(Zstd);
    let models = ModelServiceServer::from_arc(handlers).max_encoding_message_size(options.max_encode);
    let mut server = Server::builder();
    if let Some(age) = options.max_connection_age {
        // Without tonic's grace: with one it says nothing at this age, and cuts calls off when the grace is over.
        server = server.max_connection_age(about(age, RandomState::new().hash_one(0)));
    }
    server
        .http2_keepalive_interval(options.keepalive_interval)
        .http2_keepalive_timeout(Some(options.keepalive_timeout))
        .initial_stream_window_size(Some(wire::STREAM_WINDOW))
        .initial_connection_window_size(Some(wire::CONNECTION_WINDOW))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .layer(gate)
        .add_service(health::service(edge.readiness))
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha)
        .add_service(rewards)
        .add_service(models)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop)
        .await
        .map_err(|error| failed(&error))
}

/// Up to a tenth more or less: servers that started together do not lose all connections of a client together.
fn about(age: Duration, random: u64) -> Duration {
    let tenth = age / 10;
    age.saturating_sub(tenth).saturating_add(tenth.mul_f64(2.0 * (random as f64 / u64::MAX as f64)))
}

pub(super) struct Handlers {
    pub edge: Edge,
}

/// What the gate knows of a call.
pub(super) struct Admitted {
    pub permit: Permit,
    pub caller: Caller,
    pub deadline: Option<std::time::Instant>,
    pub facts: CallFacts,
}

impl Admitted {
    /// Takes it out of the request.
    fn take<T>(request: &mut Request<T>) -> Result<Self, Status> {
        let extensions = request.extensions_mut();
        let Some(permit) = extensions.remove::<Permit>() else {
            tracing::error!("a call came past the gate without a permit");
            return Err(Status::internal("the call was not admitted"));
        };
        let deadline = extensions.get::<Deadline>().map(|deadline| deadline.0);
        let facts = extensions.remove::<CallFacts>().unwrap_or_default();
        let caller = extensions.remove::<Caller>().unwrap_or_default();
        Ok(Self { permit, caller, deadline, facts })
    }
}

fn answered<T>(outcomes: &[Result<T, Failure>], tokens: impl Fn(&T) -> usize, stamp: ModelStamp, timing: Timing) -> Answered {
    let tokens = outcomes.iter().flatten().map(|scored| tokens(scored) as u64).sum();
    Answered { stamp, timing, tokens, failed: outcomes.iter().filter(|outcome| outcome.is_err()).count() }
}

fn call_options(asked: Asked, permit: &Permit, deadline: Option<std::time::Instant>) -> CallOptions {
    CallOptions {
        truncation: asked.truncation,
        calibrated: asked.calibrated,
        fingerprint: asked.fingerprint,
        details: asked.details,
        priority: asked.priority,
        tenant: permit.tenant(),
        strict: asked.strict,
        deadline,
        scorer: asked.scorer.map(|name| name.to_string()),
        watched: None,
    }
}

/// A message as the domain has it. What it takes in memory is charged before any of it is copied, and a large one holds up
/// no thread of the runtime.
async fn checked<T: Send + 'static>(
    edge: &Edge,
    permit: &Permit,
    bytes: u64,
    parse: impl FnOnce() -> Result<T, Violations> + Send + 'static,
) -> Result<T, Status> {
    permit.charge_bytes(bytes).map_err(status::shed)?;
    let parsed =
        if bytes < CHECKED_AT_ONCE { parse() } else { edge.engine.in_pool(permit.clone(), parse).await.map_err(status::status)? };
    parsed.map_err(|violations| status::invalid(&violations))
}

/// Scores one request, whether it has a call of its own or comes on a stream.
pub(super) async fn score(edge: &Edge, request: wire::ScoreRequest, admitted: Admitted) -> Result<wire::ScoreResponse, Status> {
    let Admitted { permit, deadline, facts, .. } = admitted;
    let (bytes, limits) = (convert::score_bytes(&request), edge.options.limits);
    let parsed = checked(edge, &permit, bytes, move || convert::parse_score(request, limits)).await?;
    let (request_id, batch) = (parsed.request_id, parsed.batch);
    facts.asked(&request_id, batch.samples.len());
    if edge.calls.logs_content() {
        batch.samples.iter().take(1).for_each(|sample| facts.content(sample));
    }
    let prompts = std::iter::repeat_n(1, batch.shape.singles).chain(batch.shape.groups.iter().copied()).collect();
    let watched = Some(Watched { tenant: facts.tenant().into(), prompts });
    let options = CallOptions { watched, ..call_options(parsed.asked, &permit, deadline) };
    let reply = edge.engine.score(batch.samples, options, permit.clone()).await.map_err(status::status)?;
    let failed = facts.answered(answered(&reply.outcomes, |scored| scored.tokens, reply.stamp.clone(), reply.timing));
    let _reply = tracing::debug_span!("reply", failed).entered();
    let scores = reply.outcomes.into_iter().map(convert::outcome).collect();
    let folded = batch.shape.fold(scores);
    let response = wire::ScoreResponse {
        request_id,
        scores: folded.singles,
        groups: folded.groups.into_iter().map(|scores| wire::GroupScores { scores }).collect(),
        model: Some(convert::stamp(reply.stamp)),
        timing: Some(convert::timing(reply.timing)),
        error: None,
    };
    permit.scored(response.encoded_len() as u64);
    Ok(response)
}

#[tonic::async_trait]
impl RewardService for Handlers {
    async fn score(&self, mut request: Request<wire::ScoreRequest>) -> Result<Response<wire::ScoreResponse>, Status> {
        let admitted = Admitted::take(&mut request)?;
        score(&self.edge, request.into_inner(), admitted).await.map(Response::new)
    }

    type ScoreStreamStream = stream::Answers;

    async fn score_stream(&self, mut request: Request<Streaming<wire::StreamRequest>>) -> Result<Response<stream::Answers>, Status> {
        let admitted = Admitted::take(&mut request)?;
        Ok(Response::new(stream::start(self.edge.clone(), request.into_inner(), admitted)))
    }

    async fn compare(&self, mut request: Request<wire::CompareRequest>) -> Result<Response<wire::CompareResponse>, Status> {
        let Admitted { permit, deadline, facts, .. } = Admitted::take(&mut request)?;
        let (request, limits) = (request.into_inner(), self.edge.options.limits);
        let bytes = convert::compare_bytes(&request);
        let parsed = checked(&self.edge, &permit, bytes, move || convert::parse_compare(request, limits)).await?;
        let (request_id, batch) = (parsed.request_id, parsed.batch);
        facts.asked(&request_id, batch.samples.len());
        if self.edge.calls.logs_content() {
            batch.samples.iter().take(1).for_each(|sample| facts.content(sample));
        }
        let compare = CompareOptions {
            members: parsed.members.iter().map(ToString::to_string).collect(),
            uwo_lambda: parsed.uwo_lambda.map(f64::from),
            scale: parsed.member_scale,
        };
        let options = call_options(parsed.asked, &permit, deadline);
        let reply = self.edge.engine.compare(batch.samples, options, compare, permit.clone()).await.map_err(status::status)?;
        let failed = facts.answered(answered(&reply.outcomes, |compared| compared.merged.tokens, reply.stamp.clone(), reply.timing));
        let _reply = tracing::debug_span!("reply", failed).entered();
        let folded = batch.shape.fold(reply.outcomes);
        let response = wire::CompareResponse {
            request_id,
            samples: folded.singles.into_iter().map(convert::comparison).collect(),
            groups: folded.groups.into_iter().map(convert::compare_group).collect(),
            pairs: folded.pairs.into_iter().map(|(chosen, rejected)| convert::compare_pair(chosen, rejected)).collect(),
            model: Some(convert::stamp(reply.stamp)),
            members: reply.members.iter().map(ToString::to_string).collect(),
            member_scale: convert::member_scale(reply.scale).into(),
            scale_source: reply.scale_source.name().to_owned(),
            uwo_lambda: reply.uwo_lambda as f32,
            timing: Some(convert::timing(reply.timing)),
        };
        permit.scored(response.encoded_len() as u64);
        Ok(Response::new(response))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_age_is_moved_by_a_tenth_at_most(nanos: u64, random: u64) {
            let age = Duration::from_nanos(nanos);
            let moved = about(age, random);
            prop_assert!(moved.abs_diff(age) <= age / 10 + Duration::from_micros(1), "{moved:?}");
            prop_assert!(about(Duration::MAX, random) >= Duration::MAX / 10 * 9);
        }
    }
}
