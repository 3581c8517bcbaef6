//! The standard health service over [`Readiness`]. tonic-health's own reporter starts the whole server as serving and keeps
//! watches open for ever; this one is not serving until a model is live, and ends its watches when the server stops.

use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::readiness::{Phase, Readiness};

/// The services that health can be asked for, beside "" for the whole server.
const SERVICES: [&str; 2] = ["warm.v1.RewardService", "warm.v1.ModelService"];

pub(super) fn service(readiness: Readiness) -> HealthServer<impl Health> {
    HealthServer::new(HealthOf(readiness))
}

struct HealthOf(Readiness);

type Answers = std::pin::Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Health for HealthOf {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !known(&request.get_ref().service) {
            return Err(Status::not_found("no such service"));
        }
        Ok(Response::new(answer(status_of(self.0.phase()))))
    }

    type WatchStream = Answers;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Answers>, Status> {
        let known = known(&request.get_ref().service);
        let mut last = None;
        let changes = WatchStream::new(self.0.watch())
            .take_while(|&phase| phase < Phase::Stopping)
            .map(move |phase| if known { status_of(phase) } else { ServingStatus::ServiceUnknown })
            .filter(move |&status| last.replace(status) != Some(status))
            .map(|status| Ok(answer(status)));
        Ok(Response::new(Box::pin(changes)))
    }
}

fn known(service: &str) -> bool {
    service.is_empty() || SERVICES.contains(&service)
}

fn status_of(phase: Phase) -> ServingStatus {
    if phase == Phase::Ready { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    #[tokio::test]
    async fn health_follows_readiness_from_the_start() {
        let readiness = Readiness::default();
        let health = HealthOf(readiness.clone());
        for (phase, expected) in [
            (Phase::Starting, ServingStatus::NotServing),
            (Phase::Ready, ServingStatus::Serving),
            (Phase::Draining, ServingStatus::NotServing),
        ] {
            readiness.advance(phase);
            for service in ["", "warm.v1.RewardService", "warm.v1.ModelService"] {
                let answer = health.check(ask(service)).await.expect("known service").into_inner();
                assert_eq!(answer.status(), expected, "{service:?} while {}", phase.name());
            }
        }
        assert_eq!(health.check(ask("other")).await.expect_err("unknown").code(), tonic::Code::NotFound);
    }

    #[tokio::test]
    async fn a_watch_sees_each_change_once_and_ends_when_the_server_stops() {
        let readiness = Readiness::default();
        let health = HealthOf(readiness.clone());
        let mut watch = health.watch(ask("")).await.expect("watch").into_inner();
        let mut next = async || watch.next().await.map(|answer| answer.expect("answer").status());
        assert_eq!(next().await, Some(ServingStatus::NotServing));
        readiness.advance(Phase::Ready);
        assert_eq!(next().await, Some(ServingStatus::Serving));
        readiness.advance(Phase::Draining);
        assert_eq!(next().await, Some(ServingStatus::NotServing));
        readiness.advance(Phase::Stopping);
        assert_eq!(next().await, None);
    }
}
