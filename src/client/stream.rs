//! One stream of requests and answers.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Client, ClientError};
use crate::wire::{self, stream_request::Kind};

/// The half that asks. The stream ends when it is dropped and everything is answered. Clones ask on the same stream.
#[derive(Clone, Debug)]
pub struct StreamRequests(mpsc::Sender<wire::StreamRequest>);

/// The half that is answered, in the order in which requests are finished.
#[derive(Debug)]
pub struct StreamAnswers(Streaming<wire::ScoreResponse>);

impl Client {
    /// Opens a stream of requests, each of which is answered when it is finished.
    pub async fn score_stream(&self) -> Result<(StreamRequests, StreamAnswers), ClientError> {
        let (sender, receiver) = mpsc::channel(1);
        let answers = self.rewards().score_stream(ReceiverStream::new(receiver)).await?.into_inner();
        Ok((StreamRequests(sender), StreamAnswers(answers)))
    }
}

impl StreamRequests {
    /// Sends a request when the server has room for it; false if the stream has ended.
    pub async fn score(&self, request: wire::ScoreRequest) -> bool {
        self.send(Kind::Score(request)).await
    }

    /// Withdraws a request; it is answered all the same.
    pub async fn cancel(&self, request_id: &str) -> bool {
        self.send(Kind::CancelRequestId(request_id.to_owned())).await
    }

    async fn send(&self, kind: Kind) -> bool {
        self.0.send(wire::StreamRequest { kind: Some(kind) }).await.is_ok()
    }
}

impl StreamAnswers {
    /// The next answer; `None` when there are no more.
    pub async fn next(&mut self) -> Result<Option<wire::ScoreResponse>, ClientError> {
        Ok(self.0.message().await?)
    }
}
