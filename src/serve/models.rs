//! The model service: what is served, and how it is replaced.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::grpc::Handlers;
use super::readiness::{Phase, Readiness};
use super::{convert, status};
use crate::domain::Fingerprint;
use crate::registry::{Described, Engine, EngineError, GenerationState, Reload, ReloadFailure, ReloadReport, ReloadRequest, Reloader};
use crate::wire;
use crate::wire::model_service_server::ModelService;

type Steps = Pin<Box<dyn Stream<Item = Result<wire::ReloadProgress, Status>> + Send>>;

#[tonic::async_trait]
impl ModelService for Handlers {
    async fn get_model(&self, _: Request<wire::GetModelRequest>) -> Result<Response<wire::Generation>, Status> {
        let live = self.edge.engine.registry().current();
        let live = live.ok_or_else(|| status::status(EngineError::NotReady("none is live, because one is being loaded".to_owned())))?;
        Ok(Response::new(self.shown(&live.describe(), GenerationState::Live)))
    }

    async fn list_generations(&self, _: Request<wire::ListGenerationsRequest>) -> Result<Response<wire::ListGenerationsResponse>, Status> {
        let all = self.edge.engine.registry().list();
        let generations = all.iter().map(|(described, state)| self.shown(described, *state)).collect();
        Ok(Response::new(wire::ListGenerationsResponse { generations }))
    }

    type ReloadStream = Steps;

    async fn reload(&self, request: Request<wire::ReloadRequest>) -> Result<Response<Steps>, Status> {
        let wire::ReloadRequest { dry_run, stage_only } = request.into_inner();
        let reload = self.reloader()?.start(ReloadRequest { dry_run, stage_only }, "call").map_err(status::reload_running)?;
        let (send, receive) = mpsc::channel(16);
        let show = Show { engine: self.edge.engine.clone() };
        tokio::spawn(forward(reload, self.edge.readiness.clone(), show, send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn activate(&self, request: Request<wire::ActivateRequest>) -> Result<Response<wire::Generation>, Status> {
        let asked = request.into_inner().fingerprint;
        let fingerprint = Fingerprint::from_hex(&asked).ok_or_else(|| {
            let problem = format!("expected 64 hexadecimal digits, found {} bytes", asked.len());
            status::status(EngineError::Invalid { field: "fingerprint".to_owned(), problem })
        })?;
        let reloader = self.reloader()?.clone();
        // It is remembered on disk which one is live.
        let activated = tokio::task::spawn_blocking(move || reloader.activate(fingerprint)).await;
        let activated = activated.map_err(|panic| status::status(EngineError::Forward(panic.to_string())))?;
        let live = activated.map_err(|not_here| status::not_here(&not_here))?;
        Ok(Response::new(self.shown(&live.describe(), GenerationState::Live)))
    }
}

impl Handlers {
    fn reloader(&self) -> Result<&Reloader, Status> {
        self.edge.reloader.as_ref().ok_or_else(|| Status::failed_precondition("this server has nothing to load from"))
    }

    fn shown(&self, described: &Described, state: GenerationState) -> wire::Generation {
        convert::generation(described, state, self.edge.engine.instance(), self.edge.engine.scorer().max_pack_tokens())
    }
}

/// How generations are shown on a stream.
struct Show {
    engine: Engine,
}

/// Sends the steps of a reload for as long as somebody reads them and the server does not stop.
async fn forward(mut reload: Reload, readiness: Readiness, show: Show, send: mpsc::Sender<Result<wire::ReloadProgress, Status>>) {
    let mut phase = readiness.watch();
    let stopping = async { drop(phase.wait_for(|phase| *phase >= Phase::Stopping).await) };
    let steps = async {
        while let Some(step) = reload.steps.recv().await {
            if send.send(Ok(convert::reload_step(step))).await.is_err() {
                return;
            }
        }
        let end = reload.end.await.unwrap_or_else(|_| {
            let outcome = crate::registry::ReloadOutcome::Failed;
            Err(ReloadFailure { outcome, message: "the reload has no thread to run on".to_owned() })
        });
        let (last, status) = show.last(end);
        let _ = send.send(Ok(last)).await;
        if let Some(status) = status {
            let _ = send.send(Err(status)).await;
        }
    };
    tokio::select! {
        () = steps => {}
        () = stopping => drop(send.try_send(Err(Status::unavailable("the server is about to stop")))),
    }
}

impl Show {
    fn last(&self, end: Result<ReloadReport, ReloadFailure>) -> (wire::ReloadProgress, Option<Status>) {
        match end {
            Ok(ReloadReport { outcome, message, generation }) => {
                let show = |(described, state): (Described, _)| {
                    convert::generation(&described, state, self.engine.instance(), self.engine.scorer().max_pack_tokens())
                };
                let outcome = outcome.map_or("planned", crate::registry::ReloadOutcome::name).to_owned();
                let last =
                    wire::ReloadProgress { stage: "done".to_owned(), message, outcome, result: generation.map(show), ..Default::default() };
                (last, None)
            }
            Err(failure) => {
                let (stage, message, outcome) = ("failed".to_owned(), failure.message.clone(), failure.outcome.name().to_owned());
                (wire::ReloadProgress { stage, message, outcome, ..Default::default() }, Some(status::reload(&failure)))
            }
        }
    }
}
