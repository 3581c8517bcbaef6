//! A thin client of the wire contract, for the command line, the demo, benchmarks and tests.

mod again;
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

use crate::clock::Clock;
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
        Ok(self.scored(&request, None).await?)
    }

    /// The same with a deadline, which travels with the request.
    pub async fn score_within(&self, request: wire::ScoreRequest, timeout: Duration) -> Result<wire::ScoreResponse, ClientError> {
        Ok(self.scored(&request, Some((&Clock::system(), timeout))).await?)
    }

    /// Within a time over all attempts.
    async fn scored(&self, request: &wire::ScoreRequest, within: Option<(&Clock, Duration)>) -> Result<wire::ScoreResponse, Status> {
        let end = within.and_then(|(clock, timeout)| Some((clock, clock.now().checked_add(timeout)?)));
        let call = || {
            let (mut rewards, mut request) = (self.rewards(), tonic::Request::new(request.clone()));
            if let Some((clock, end)) = end {
                request.set_timeout(end.saturating_duration_since(clock.now()));
            }
            async move { rewards.score(request).await }
        };
        again::made(call).await
    }

    pub async fn compare(&self, request: wire::CompareRequest) -> Result<wire::CompareResponse, ClientError> {
        let call = || {
            let (mut rewards, request) = (self.rewards(), request.clone());
            async move { rewards.compare(request).await }
        };
        Ok(again::made(call).await?)
    }

    pub async fn get_model(&self) -> Result<wire::Generation, ClientError> {
        let call = || {
            let mut models = self.models();
            async move { models.get_model(wire::GetModelRequest {}).await }
        };
        Ok(again::made(call).await?)
    }

    /// All generations that the server can still name, the newest first.
    pub async fn list_generations(&self) -> Result<Vec<wire::Generation>, ClientError> {
        let call = || {
            let mut models = self.models();
            async move { models.list_generations(wire::ListGenerationsRequest {}).await }
        };
        Ok(again::made(call).await?.generations)
    }

    /// Reloads, telling every step, and gives back the last one. A reload that fails tells its reason in its last step, too.
    pub async fn reload(
        &self,
        request: wire::ReloadRequest,
        mut tell: impl FnMut(&wire::ReloadProgress),
    ) -> Result<wire::ReloadProgress, ClientError> {
        let call = || {
            let mut models = self.models();
            async move { models.reload(request).await }
        };
        let mut steps = again::made(call).await?;
        let mut last = wire::ReloadProgress::default();
        while let Some(step) = steps.message().await? {
            tell(&step);
            last = step;
        }
        Ok(last)
    }

    /// Makes a staged or held generation the live one.
    pub async fn activate(&self, fingerprint: &str) -> Result<wire::Generation, ClientError> {
        let call = || {
            let (mut models, request) = (self.models(), wire::ActivateRequest { fingerprint: fingerprint.to_owned() });
            async move { models.activate(request).await }
        };
        Ok(again::made(call).await?)
    }

    /// Whether `service` (empty for the whole server) says that it serves.
    pub async fn is_serving(&self, service: &str) -> Result<bool, ClientError> {
        let call = || {
            let (mut health, request) = (self.health(), HealthCheckRequest { service: service.to_owned() });
            async move { health.check(request).await }
        };
        Ok(again::made(call).await?.status() == ServingStatus::Serving)
    }
}
