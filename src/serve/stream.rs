//! `ScoreStream`: the requests of one stream are scored side by side, and each is answered once, when it is finished.
//!
//! At most a window of them is under way, and two answers beside it are on their way out; while it is full, or while the caller
//! does not read its answers, nothing more is read, and HTTP/2's flow control holds the caller back. So a stream costs bounded
//! memory whatever is sent.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;

use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};
use tracing::Instrument;

use super::grpc::{Admitted, Edge, score};
use super::metrics::STREAMED;
use super::readiness::Phase;
use super::status;
use crate::scorer::Permit;
use crate::wire::{self, stream_request::Kind};

/// What a stream gives back.
pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<wire::ScoreResponse, Status>> + Send>>;

/// An answer, with what is held until it is taken.
type Answer = Result<(wire::ScoreResponse, Option<Permit>), Status>;

/// Starts to answer a stream; it goes on until the caller has said all and got all, leaves, or the server stops.
pub(super) fn start(edge: Edge, incoming: Streaming<wire::StreamRequest>, admitted: Admitted) -> Answers {
    // One answer waits for its reader; the others wait in the window.
    let (answers, reader) = mpsc::channel(1);
    let session = Session { edge, admitted, answers, under_way: JoinSet::new(), cancels: HashMap::new() };
    tokio::spawn(session.run(incoming).in_current_span());
    Box::pin(ReceiverStream::new(reader).map(|answer| answer.map(|(answer, _permit)| answer)))
}

struct Session {
    edge: Edge,
    /// Held for the length of the stream: its slot bounds the number of streams, each of which may be reading a message.
    admitted: Admitted,
    answers: mpsc::Sender<Answer>,
    under_way: JoinSet<Done>,
    /// By request id, where there is one.
    cancels: HashMap<String, oneshot::Sender<()>>,
}

struct Done {
    /// The id that may be used again; none for a request that was refused because its id was in use.
    id: Option<String>,
    answer: wire::ScoreResponse,
    /// Held until the answer is taken.
    permit: Option<Permit>,
}

impl Session {
    async fn run(mut self, mut incoming: Streaming<wire::StreamRequest>) {
        let (clock, mut phase) = (self.edge.engine.clock().clone(), self.edge.readiness.watch());
        let deadline = self.admitted.deadline;
        let mut ended = std::pin::pin!(async move {
            let stopping = phase.wait_for(|&phase| phase == Phase::Stopping);
            match deadline {
                Some(deadline) => tokio::select! { _ = stopping => {}, () = clock.sleep_until(deadline) => {} },
                None => drop(stopping.await),
            }
        });
        let mut reading = true;
        // Why the stream cannot be read to its end, if it cannot.
        let mut broken = None;
        // What was read and finds no room yet: a request, or a message without any.
        let mut held: Option<Option<wire::ScoreRequest>> = None;
        // An answer that waits for its reader; meanwhile the stream goes on listening.
        let mut unread: Option<Answer> = None;
        loop {
            if self.under_way.len() < self.edge.options.stream_window.max(1)
                && let Some(request) = held.take()
            {
                match request {
                    Some(request) => self.begin(request),
                    None => {
                        let nothing = Status::invalid_argument("kind: expected score or cancel_request_id, found none");
                        self.refuse(String::new(), &nothing);
                    }
                }
            }
            if !reading && held.is_none() && unread.is_none() && self.under_way.is_empty() {
                break;
            }
            tokio::select! {
                () = self.answers.closed() => return,
                room = self.answers.reserve(), if unread.is_some() => match (room, unread.take()) {
                    (Ok(room), Some(answer)) => room.send(answer),
                    _ => return,
                },
                Some(done) = self.under_way.join_next(), if unread.is_none() && !self.under_way.is_empty() => {
                    let answer = done.map_err(|panic| {
                        tracing::error!(%panic, "a request of a stream failed inside");
                        Status::internal("scoring failed inside the server; its log has the details")
                    });
                    if let Ok(Done { id: Some(id), .. }) = &answer {
                        self.cancels.remove(id);
                    }
                    unread = Some(answer.map(|done| (done.answer, done.permit)));
                }
                message = incoming.message(), if reading && held.is_none() => match message {
                    Ok(Some(wire::StreamRequest { kind: Some(Kind::Score(request)) })) => held = Some(Some(request)),
                    // What is finished, or was never asked for, cannot be cancelled any more.
                    Ok(Some(wire::StreamRequest { kind: Some(Kind::CancelRequestId(id)) })) => {
                        if let Some(cancel) = self.cancels.remove(&id) {
                            let _ = cancel.send(());
                        }
                    }
                    Ok(Some(wire::StreamRequest { kind: None })) => held = Some(None),
                    Ok(None) => reading = false,
                    Err(status) => (reading, broken) = (false, Some(status)),
                },
                () = &mut ended, if reading => reading = false,
            }
        }
        if let Some(status) = broken {
            // A caller that is gone needs no words.
            let _ = self.answers.send(Err(status)).await;
        }
    }

    /// An answer without a score, that takes its turn among the others.
    fn refuse(&mut self, request_id: String, status: &Status) {
        let answer = failed(request_id, status);
        self.under_way.spawn(async move { Done { id: None, answer, permit: None } });
    }

    fn begin(&mut self, request: wire::ScoreRequest) {
        let (edge, bytes) = (self.edge.clone(), request.encoded_len() as u64);
        // What unpacks messages keeps the room of the largest for as long as the stream lives. Whether there is room for this
        // one is decided by its own permit.
        let _ = self.admitted.permit.grow_bytes(bytes);
        let mut call = edge.calls.begin_on_stream(STREAMED, &self.admitted.facts);
        let id = request.request_id.clone();
        if self.cancels.contains_key(&id) {
            let status = Status::already_exists("request_id: a request of this name is under way on this stream");
            call.finish(&Err::<(), _>(status.clone()));
            return self.refuse(id, &status);
        }
        let timeout = request.options.as_ref().map_or(0, |options| options.timeout_ms);
        let own = (timeout > 0).then(|| call.started + Duration::from_millis(timeout.into()));
        let deadline = own.into_iter().chain(self.admitted.deadline).min();
        let patience = deadline.map(|deadline| deadline.saturating_duration_since(call.started));
        let permit = match edge.admission.admit_of(&self.admitted.caller, bytes, patience) {
            Ok(permit) => permit,
            Err(shed) => {
                let status = status::shed(shed);
                call.finish(&Err::<(), _>(status.clone()));
                return self.refuse(id, &status);
            }
        };
        let held = permit.clone();
        let admitted = Admitted { permit, caller: self.admitted.caller.clone(), deadline, facts: call.facts.clone() };
        let (cancel, cancelled) = oneshot::channel();
        if !id.is_empty() {
            self.cancels.insert(id.clone(), cancel);
        }
        let span = call.span.clone();
        let work = async move {
            let result = tokio::select! {
                result = score(&edge, request, admitted) => result,
                Ok(()) = cancelled => Err(Status::cancelled("the request was cancelled")),
            };
            call.finish(&result);
            let answer = result.unwrap_or_else(|status| failed(id.clone(), &status));
            Done { id: Some(id), answer, permit: Some(held) }
        };
        self.under_way.spawn(work.instrument(span));
    }
}

fn failed(request_id: String, status: &Status) -> wire::ScoreResponse {
    wire::ScoreResponse { request_id, error: Some(status::in_stream(status)), ..Default::default() }
}
