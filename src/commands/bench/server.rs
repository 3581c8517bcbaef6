//! The server under load: over calls, or over one stream for each connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;

use super::load::Target;
use super::shape::Shape;
use super::tally::{Outcome, ServerTiming};
use crate::client::{Client, ClientError, StreamAnswers, StreamRequests};
use crate::lock::lock;
use crate::wire;

/// What an answer is called that never came.
const NO_ANSWER: &str = "NO_ANSWER";

/// A server over a few connections.
pub(super) struct Server {
    pub shape: Shape,
    pub timeout: Duration,
    pub connections: Connections,
}

pub(super) enum Connections {
    Calls(Vec<Client>),
    Streams(Vec<Stream>),
}

impl Target for Server {
    async fn send(&self, number: u64) -> Outcome {
        let request = self.shape.request(number);
        match &self.connections {
            Connections::Calls(clients) => match one_of(clients, number).score_within(request, self.timeout).await {
                Ok(response) => scored(response),
                Err(error) => Outcome::Refused(error.code().unwrap_or(NO_ANSWER)),
            },
            Connections::Streams(streams) => match one_of(streams, number).ask(number, request, self.timeout).await {
                Some(wire::ScoreResponse { error: Some(error), .. }) => Outcome::Refused(wire::code_name(error.code.into())),
                Some(response) => scored(response),
                None => Outcome::Refused(NO_ANSWER),
            },
        }
    }
}

fn one_of<T>(all: &[T], number: u64) -> &T {
    &all[(number % all.len() as u64) as usize]
}

fn scored(response: wire::ScoreResponse) -> Outcome {
    let timing = response.timing.unwrap_or_default();
    let scores = || response.scores.iter().chain(response.groups.iter().flat_map(|group| &group.scores));
    Outcome::Scored {
        rewards: scores().map(|score| score.reward).collect(),
        tokens: scores().map(|score| u64::from(score.tokens)).sum(),
        timing: ServerTiming {
            queue: Duration::from_micros(timing.queue_us),
            tokenize: Duration::from_micros(timing.tokenize_us),
            forward: Duration::from_micros(timing.forward_us),
        },
    }
}

type Waiting = Mutex<HashMap<String, oneshot::Sender<wire::ScoreResponse>>>;

/// A stream, and who waits on it for what.
pub(super) struct Stream {
    requests: StreamRequests,
    waiting: Arc<Waiting>,
}

impl Stream {
    pub(super) async fn open(client: &Client) -> Result<Self, ClientError> {
        let (requests, answers) = client.score_stream().await?;
        let waiting: Arc<Waiting> = Arc::default();
        tokio::spawn(deliver(answers, waiting.clone()));
        Ok(Self { requests, waiting })
    }

    async fn ask(&self, number: u64, mut request: wire::ScoreRequest, timeout: Duration) -> Option<wire::ScoreResponse> {
        request.request_id = number.to_string();
        request.options.get_or_insert_default().timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let (deliver, answer) = oneshot::channel();
        lock(&self.waiting).insert(request.request_id.clone(), deliver);
        if !self.requests.score(request).await {
            lock(&self.waiting).remove(&number.to_string());
        }
        answer.await.ok()
    }
}

/// Hands answers out until there are no more; then nobody waits any longer.
async fn deliver(mut answers: StreamAnswers, waiting: Arc<Waiting>) {
    while let Ok(Some(answer)) = answers.next().await {
        let waits = lock(&waiting).remove(&answer.request_id);
        if let Some(waits) = waits {
            let _ = waits.send(answer);
        }
    }
    lock(&waiting).clear();
}
