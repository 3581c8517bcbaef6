//! A thin client of the wire contract, for the command line, the demo, benchmarks and tests.

mod fleet;
mod from_domain;
mod names;
mod stream;

use std::time::Duration;

use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::wire;
use crate::wire::model_service_client::ModelServiceClient;
use crate::wire::reward_service_client::RewardServiceClient;

pub use fleet::Fleet;
pub use from_domain::{group_to_wire, sample_to_wire};
pub use names::addresses_of;
pub use stream::{StreamAnswers, StreamRequests};

/// The largest message either side takes by default: 64 MiB.
pub const DEFAULT_MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why the server could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("address `{address}`: {problem}")]
    Address { address: String, problem: String },
    #[error("no connection to {address}: {problem}")]
    Connect { address: String, problem: String },
    #[error("the server answers {code}: {message}")]
    Status {
        /// As gRPC spells it, such as `RESOURCE_EXHAUSTED`.
        code: &'static str,
        message: String,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
        /// The fields that are wrong, with what is wrong with them.
        violations: Vec<(String, String)>,
    },
}

impl ClientError {
    /// The code of the server's answer; `None` where it gave none.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Self::Status { code, .. } => Some(code),
            Self::Address { .. } | Self::Connect { .. } => None,
        }
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
        Self::Status {
            code: wire::code_name(status.code()),
            message: status.message().to_owned(),
            retry_after: status.get_details_retry_info().and_then(|info| info.retry_delay),
            violations: violations.into_iter().map(|violation| (violation.field, violation.description)).collect(),
        }
    }
}

/// A connection to one server. Clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    max_message_bytes: usize,
}

impl Client {
    /// Connects to `host:port` or `http://host:port`.
    pub async fn connect(address: &str) -> Result<Self, ClientError> {
        let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|error| ClientError::Address { address: address.to_owned(), problem: error.to_string() })?
            .connect_timeout(Duration::from_secs(10))
            .tcp_nodelay(true)
            .initial_stream_window_size(wire::STREAM_WINDOW)
            .initial_connection_window_size(wire::CONNECTION_WINDOW);
        let channel = endpoint.connect().await.map_err(|error| {
            // tonic's own words are "transport error"; the reason is further down.
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            ClientError::Connect { address: address.to_owned(), problem: cause }
        })?;
        Ok(Self::over(channel))
    }

    /// A client over a channel that exists already.
    pub fn over(channel: Channel) -> Self {
        Self { channel, max_message_bytes: DEFAULT_MAX_MESSAGE_BYTES }
    }

    /// The generated client of the scoring service, for what this type does not wrap (deadlines, metadata).
    pub fn rewards(&self) -> RewardServiceClient<Channel> {
        RewardServiceClient::new(self.channel.clone())
            .max_decoding_message_size(self.max_message_bytes)
            .max_encoding_message_size(self.max_message_bytes)
    }

    /// The generated client of the model service.
    pub fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone()).max_decoding_message_size(self.max_message_bytes)
    }

    /// The generated client of the standard health service.
    pub fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    pub async fn score(&self, request: wire::ScoreRequest) -> Result<wire::ScoreResponse, ClientError> {
        Ok(self.rewards().score(request).await?.into_inner())
    }

    /// The same with a deadline, which travels with the request.
    pub async fn score_within(&self, request: wire::ScoreRequest, timeout: Duration) -> Result<wire::ScoreResponse, ClientError> {
        let mut request = tonic::Request::new(request);
        request.set_timeout(timeout);
        Ok(self.rewards().score(request).await?.into_inner())
    }

    pub async fn compare(&self, request: wire::CompareRequest) -> Result<wire::CompareResponse, ClientError> {
        Ok(self.rewards().compare(request).await?.into_inner())
    }

    pub async fn get_model(&self) -> Result<wire::Generation, ClientError> {
        Ok(self.models().get_model(wire::GetModelRequest {}).await?.into_inner())
    }

    /// All generations that the server can still name, the newest first.
    pub async fn list_generations(&self) -> Result<Vec<wire::Generation>, ClientError> {
        Ok(self.models().list_generations(wire::ListGenerationsRequest {}).await?.into_inner().generations)
    }

    /// Reloads, telling every step, and gives back the last one. A reload that fails tells its reason in its last step, too.
    pub async fn reload(
        &self,
        request: wire::ReloadRequest,
        mut tell: impl FnMut(&wire::ReloadProgress),
    ) -> Result<wire::ReloadProgress, ClientError> {
        let mut steps = self.models().reload(request).await?.into_inner();
        let mut last = wire::ReloadProgress::default();
        while let Some(step) = steps.message().await? {
            tell(&step);
            last = step;
        }
        Ok(last)
    }

    /// Makes a staged or held generation the live one.
    pub async fn activate(&self, fingerprint: &str) -> Result<wire::Generation, ClientError> {
        Ok(self.models().activate(wire::ActivateRequest { fingerprint: fingerprint.to_owned() }).await?.into_inner())
    }

    /// Whether `service` (empty for the whole server) says that it serves.
    pub async fn is_serving(&self, service: &str) -> Result<bool, ClientError> {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = self.health().check(request).await?.into_inner();
        Ok(answer.status() == ServingStatus::Serving)
    }
}
